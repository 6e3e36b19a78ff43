"""The figure of probes applied to other datasets: its numbers, and a heat map of pairs of datasets.

frame = scores_of_pairs(wh, layer=None, model=["smollm2-135m"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from kdb.analysis.style import upright

if TYPE_CHECKING:
    from kdb.analysis.style import Chart, Look
    from kdb.warehouse.store import Warehouse

_CELL = 60
"""Width and height of the cell of a pair."""


def scores_of_pairs(wh: Warehouse, *, layer: int | None, **params: Any) -> pl.DataFrame:
    """Return one row for each pair of datasets: at the given layer, or at the best one of the probe's own test part."""
    rows = wh.query("probe-transfer", layer=layer, **params)
    return rows if layer is not None else rows.filter("best")


def pair_map(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw AUC for each pair of datasets: a panel for each model. A pair without a score has no cell."""
    models = look.order("model", frame["model"])
    panels = [_panel(frame.filter(model=model), model, look) for model in models]
    return alt.concat(*panels, columns=min(3, len(panels)))


def _panel(frame: pl.DataFrame, model: str, look: Look) -> Any:
    sources, targets = (look.order("dataset", frame[name]) for name in ("source_dataset", "dataset"))
    layers = dict(frame.select("source_dataset", "layer").iter_rows())
    frame = frame.with_columns(
        probe=pl.format("{}, layer {}", "source_dataset", "layer"),
        own=pl.col("source_dataset") == pl.col("dataset"),
        count=pl.format("n = {}", "n"),
    )
    rows = [f"{source}, layer {layers[source]}" for source in sources]
    axis = upright(targets, 10, grid=False)
    base = alt.Chart(frame).encode(
        alt.X("dataset:N", sort=targets, title="applied to", axis=axis),
        alt.Y("probe:N", sort=rows, title="probe of", axis=alt.Axis(labelLimit=200, grid=False)),
        tooltip=["source_dataset", "dataset", "layer", *_SCORES, "n", "n_left_out"],
    )
    scale = alt.Scale(scheme="blueorange", domain=[0, 1], domainMid=0.5, reverse=True)
    color = alt.Color("auc:Q", scale=scale, legend=alt.Legend(title="AUC"))
    ink = alt.when("abs(datum.auc - 0.5) > 0.35").then(alt.value("white")).otherwise(alt.value("black"))
    frames = base.transform_filter("datum.own").mark_rect(filled=False, stroke="black", strokeWidth=2.5)
    return alt.layer(
        base.mark_rect().encode(color),
        frames,
        base.mark_text(fontSize=12, dy=-6).encode(text=alt.Text("auc:Q", format=".2f"), color=ink),
        base.mark_text(fontSize=9, dy=9).encode(text="count:N", color=ink),
    ).properties(
        width=_CELL * len(targets),
        height=_CELL * len(sources),
        title=alt.TitleParams(model, fontSize=11, fontWeight="normal"),
    )


_SCORES = ("auc", "auc_low", "auc_high", "accuracy", "accuracy_refitted", "cosine")
