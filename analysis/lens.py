"""Readouts of every layer (the logit lens): shares of prompts whose answer comes first, and one prompt as a map.

frame = answers_by_layer(wh, model=["smollm2-135m"])
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from kdb.analysis.importance import check_single, grid, keys_of, with_depth
from kdb.analysis.prompt_means import with_intervals
from kdb.analysis.style import ATTN, Chart, Look, depth_axis
from kdb.queries.catalogue import bind, find_query

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

_FIRST = """
SELECT model, shown_dataset, dataset, category, prompt_id, layer, 100 * (target_rank = 1)::DOUBLE AS score
FROM answer_ranks(?, ?, ?, ?, ?, ?, wanted_pool := ?)
ORDER BY model, shown_dataset, category_order(category), dataset, prompt_id, layer
"""
_PANEL = ("model", "dataset", "category")


def answers_by_layer(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return the percentage of kept prompts whose answer is the first choice after each layer, with its interval.

    One row per model, dataset, category and layer: first_percent, low, high (95 % over prompts), n_prompts.
    """
    query = find_query("answer-by-layer")
    values = bind(query.name, query.params, params)
    names = ("model", "category", "dataset", "variant", "run", "lens", "pool")
    asked = [list(value) if isinstance(value, tuple) else value for value in map(values.get, names)]
    rows = wh.sql(_FIRST, asked)
    by_prompt = rows if values["pool"] else rows.drop("shown_dataset")
    shown = rows.drop("dataset").rename({"shown_dataset": "dataset"})
    means = shown.group_by(*_PANEL, "layer", maintain_order=True).agg(
        first_percent=pl.col("score").mean(), n_prompts=pl.len()
    )
    found = with_intervals(means, by_prompt, keys_of(values, "category"), "layer", ranks=False)
    return with_depth(wh, "lens_readouts", found, values)


def answer_by_layer(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw the share of prompts whose answer is first, by layer: a panel for each dataset and category."""
    title = "answer first (% of prompts)"
    limits = alt.Scale(domain=[0, 100], clamp=True)
    base = alt.Chart().encode(x=depth_axis(frame))
    band = base.mark_area(opacity=0.2, color=ATTN).encode(alt.Y("low:Q", title=title, scale=limits), alt.Y2("high:Q"))
    line = base.mark_line(strokeWidth=1.6, color=ATTN).encode(
        alt.Y("first_percent:Q", title=title, scale=limits),
        tooltip=["layer", alt.Tooltip("first_percent:Q", format=".0f"), "n_prompts"],
    )
    return grid(alt.layer(band, line).properties(width=210, height=130), frame, look)


_PLACES = {"resid_pre": "in", "resid_mid": "mid", "resid_post": "out"}
_LONGEST = 14
"""Characters of a token that a cell shows."""


def lens_map(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw one prompt in one model: the most probable next token at each position and place, the last block on top.

    Columns are the positions whose readouts are stored: the last one, or all after ``kdb lens``.
    """
    del look
    check_single(frame, "lens-map")
    frame = frame.with_columns(
        place=pl.format("{} {}", "layer", pl.col("place").replace(_PLACES)),
        best=pl.col("tokens").map_elements(_best, return_dtype=pl.String),
        at=pl.format("{} {}", "position", pl.col("token").fill_null("").map_elements(_shown, return_dtype=pl.String)),
    )
    rows = frame["place"].unique(maintain_order=True).reverse().to_list()
    y = alt.Y("place:N", sort=rows, title="layer", axis=alt.Axis(labelOverlap=False))
    n = frame["position"].n_unique()
    size = {"width": (96 if n == 1 else 82) * n, "height": 14 * len(rows)}
    return alt.hconcat(_cells(frame, y).properties(**size), _ranks(frame, rows, size["height"]), spacing=8)


def _cells(frame: pl.DataFrame, y: alt.Y) -> Any:
    base = alt.Chart(frame).encode(
        alt.X(
            "at:N", sort=frame["at"].unique(maintain_order=True).to_list(), title="token", axis=alt.Axis(labelAngle=0)
        ),
        y,
    )
    scale = alt.Scale(range=["#f7f7f7", "#6baed6", "#08306b"], domain=[0, 0.5, 1])
    tooltip = ["place", "at", "tokens", *(alt.Tooltip(f"{x}:Q", format=".3f") for x in ("prob", "target_logp"))]
    tooltip += ["target_rank", alt.Tooltip("kl:Q", format=".3f")]
    legend = alt.Legend(title="probability of the token", gradientLength=120)
    ink = alt.when("datum.prob > 0.55").then(alt.value("white")).otherwise(alt.value("black"))
    return alt.layer(
        base.mark_rect().encode(alt.Color("prob:Q", scale=scale, legend=legend), tooltip=tooltip),
        base.mark_text(fontSize=9).encode(text="best:N", color=ink, tooltip=tooltip),
    )


def _ranks(frame: pl.DataFrame, rows: list[str], height: int) -> Any:
    """Write the answer's rank at the last position beside each row."""
    last = frame.filter(pl.col("position") == pl.col("position").max())
    shown = alt.Chart(last).mark_text(fontSize=9, align="left")
    drawn = shown.encode(alt.Y("place:N", sort=rows, axis=None), x=alt.value(4), text="target_rank:Q")
    title = alt.TitleParams("answer's rank", fontSize=10, fontWeight="normal", anchor="start")
    return drawn.properties(width=70, height=height, title=title, view=alt.ViewConfig(stroke=None))


def _best(tokens: str) -> str:
    """Return the first of several JSON strings as a cell shows it."""
    return _shown(str(json.loads(f"[{tokens}]")[0]))


def _shown(token: str) -> str:
    """Return a token, short, with a leading space that is seen."""
    shown = json.dumps(token, ensure_ascii=False)[1:-1].replace('\\"', '"')
    shown = "␣" + shown[1:] if shown.startswith(" ") else shown
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
