"""Style of all charts: the same colour for a model or dataset in all figures, fixed orders, one design.

Colours are Paul Tol's "muted" set and Okabe and Ito's, both made for colour-blind readers. They differ in lightness.
Lines also differ in their dashes and points in their shapes, so that a page printed in grey can be read.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import altair as alt

from kdb.queries.domains import CATEGORIES

if TYPE_CHECKING:
    import polars as pl

    from kdb.warehouse.store import Warehouse

Chart: TypeAlias = Any
"""Any Altair chart; the classes have no common base with all methods that are used here."""

PAPER_DATASETS = (
    *("cities", "common_claim", "counterfact", "hateeval", "stsa", "imdb", "sarcasm", "strategyqa", "coinflip"),
)

_PALETTE = (*("#332288", "#cc6677", "#117733", "#44aa99", "#aa4499", "#999933", "#882255", "#88ccee", "#ddcc77"),)
"""The pale ones are last: a line in them is hard to see."""

_DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2])

ATTN, FFN, MIXER = "#0072b2", "#e69f00", "#009e73"
"""Colours of attention (blue), FFN (orange) and mixers (green) in all figures that show several of them."""


@dataclass(frozen=True)
class Look:
    """The order and colour of every model and dataset of a warehouse, independent of the figure."""

    models: tuple[str, ...]
    datasets: tuple[str, ...]

    def order(self, field: str, shown: Iterable[str]) -> list[str]:
        """Return the shown names of a field in their fixed order; names without one are last."""
        known = {"model": self.models, "dataset": self.datasets, "category": CATEGORIES}.get(field, ())
        return sorted(set(shown), key=lambda name: (known.index(name) if name in known else len(known), name))

    def lines(self, field: str, shown: Iterable[str]) -> dict[str, Any]:
        """Return encodings that distinguish the lines of a field by colour and dashes."""
        names = self.order(field, shown)
        positions = [self._place(field, name, names) for name in names]
        colors = [_PALETTE[position % len(_PALETTE)] for position in positions]
        # With nine colours and four kinds of dashes, the pair repeats after 36 names.
        dashes = [_DASHES[position % len(_DASHES)] for position in positions]
        legend = alt.Legend(title=field, symbolType="stroke", symbolStrokeWidth=2, symbolSize=300, symbolOpacity=1)
        return {
            "color": alt.Color(f"{field}:N", scale=alt.Scale(domain=names, range=colors), legend=legend),
            "strokeDash": alt.StrokeDash(f"{field}:N", scale=alt.Scale(domain=names, range=dashes), legend=legend),
        }

    def _place(self, field: str, name: str, names: Sequence[str]) -> int:
        known = {"model": self.models, "dataset": self.datasets}.get(field, ())
        return known.index(name) if name in known else len(known) + list(names).index(name)


def look_of(wh: Warehouse) -> Look:
    """Return all models by family and size, and all datasets: the paper's in its order, then the others by name."""
    models = wh.sql("SELECT model FROM models GROUP BY model ORDER BY min(family), min(n_params), model")
    datasets = wh.sql("SELECT DISTINCT dataset FROM datasets ORDER BY dataset")["dataset"].to_list()
    others = [name for name in datasets if name not in PAPER_DATASETS]
    return Look(tuple(models["model"]), (*PAPER_DATASETS, *others))


def depth_axis(frame: pl.DataFrame, **options: Any) -> alt.X:
    """Return the horizontal axis of depth: layers from 0, or percent if the models differ in their number of layers."""
    if frame["n_layers"].n_unique() > 1:
        return alt.X("depth_percent:Q", title="depth (%)", scale=alt.Scale(domain=[0, 100]), **options)
    last = int(frame["n_layers"][0]) - 1
    axis = alt.Axis(format="d", tickMinStep=1)
    return alt.X("layer:Q", title="layer", axis=axis, scale=alt.Scale(domain=[0, max(last, 1)], nice=False), **options)


def components(field: str = "component", names: Sequence[str] = ("attn", "ffn")) -> dict[str, Any]:
    """Return encodings that distinguish attention, FFN and mixers by colour and dashes."""
    legend = alt.Legend(title=None, symbolType="stroke", symbolStrokeWidth=2, symbolSize=300, symbolOpacity=1)
    colors = {"attn": ATTN, "ffn": FFN, "mixer": MIXER}
    scale = alt.Scale(domain=list(names), range=[colors[next(c for c in colors if c in name)] for name in names])
    dashes = alt.Scale(domain=list(names), range=[_DASHES["query" in name] for name in names])
    return {
        "color": alt.Color(f"{field}:N", scale=scale, legend=legend),
        "strokeDash": alt.StrokeDash(f"{field}:N", scale=dashes, legend=legend),
    }


def layer_components(frame: pl.DataFrame) -> list[str]:
    """Return the components to distinguish in a figure of layers: attention and FFN, and mixers if there are any."""
    return ["attn", "ffn", *(["mixer"] if "mixer" in frame["component"] else [])]


def component_points(names: Sequence[str]) -> tuple[alt.Color, alt.Shape]:
    """Return encodings that distinguish points of these components by colour and shape."""
    legend, n = alt.Legend(title=None, symbolOpacity=1), len(names)
    colors = alt.Scale(domain=list(names), range=[ATTN, FFN, MIXER][:n])
    shapes = alt.Scale(domain=list(names), range=["circle", "square", "diamond"][:n])
    return alt.Color("component:N", scale=colors, legend=legend), alt.Shape("component:N", scale=shapes, legend=legend)


def full_rows(n_panels: int, most: int) -> int:
    """Return how many panels stand in a row, at most ``most``: one fewer if that fills every row.

    Vega-Lite draws an axis below a place that no panel fills.
    """
    most = min(most, n_panels)
    return most - 1 if most > 2 and n_panels % most and not n_panels % (most - 1) else most


def upright(names: Iterable[str], characters: int, **options: Any) -> alt.Axis:
    """Return an axis whose names are not rotated: they are broken into lines of so many characters."""
    lines = {name: _broken(name, characters) for name in names}
    # Only names can stand in the expression, as JSON, so that none of them is read as a part of it.
    return alt.Axis(labelAngle=0, labelExpr=f"({json.dumps(lines)})[datum.label]", labelOverlap=False, **options)


def _broken(name: str, characters: int) -> list[str]:
    """Return the lines of a name, broken at spaces or after hyphens, underscores, slashes and dots."""
    spaced = re.sub(r"([-_/.])", r"\1 ", name)
    return [re.sub(r"(?<=[-_/.]) ", "", line) for line in textwrap.wrap(spaced, characters, break_on_hyphens=False)]


alt.data_transformers.disable_max_rows()  # its limit protects notebooks from millions of rows; figures have thousands


def finished(chart: Chart, title: str, subtitle: Sequence[str]) -> Chart:
    """Return the chart with its title, what it is of and what its marks are, and the style of all figures."""
    head = alt.TitleParams(text=title, subtitle=list(subtitle), anchor="start", offset=12)
    styled: Chart = (
        chart.properties(title=head, background="white")
        .configure(font="DejaVu Sans, Verdana, Arial, sans-serif")
        .configure_view(stroke="#cccccc")
        .configure_title(fontSize=14, subtitleFontSize=11, subtitleColor="#444444")
        .configure_axis(labelFontSize=10, titleFontSize=11, titleFontWeight="normal", gridColor="#eeeeee")
        .configure_axisX(labelAngle=0)  # Vega-Lite would rotate the labels of categories
        .configure_header(labelFontSize=11, titleFontSize=11, titleFontWeight="normal")
        .configure_legend(orient="bottom", columns=5, labelLimit=220, labelFontSize=11, titleFontWeight="normal")
    )
    return styled
