"""Charts of concept depth: accuracy by layer, measures of depth, hidden states, and the robustness of J and C.

Jin et al., Exploring Concept Depth (arXiv 2404.07066). Each function draws the rows of a saved query or of
``depth_measures.py``; ``figures.py`` names them.
"""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import polars as pl

from kdb.analysis.style import Chart, Look, depth_axis, full_rows
from kdb.errors import QueryError

METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "auc": "ROC AUC",
    "selectivity": "selectivity (accuracy − control)",
    "control_accuracy": "accuracy on the control task",
}

_WITH_INTERVALS = ("accuracy", "balanced_accuracy", "auc")
"""Metrics with columns of the ends of their 95 % intervals."""


# Accuracy by depth -----------------------------------------------------------------------------------------------


_MOST_LINES = 6
"""Largest number of lines with intervals that can be told apart in one panel."""


def depth_curves(frame: pl.DataFrame, look: Look, *, metric: str) -> Chart:
    """Experiment 1: a panel for each model, a line for each dataset.

    With many datasets of few models, it is a panel for each dataset and a line for each model.
    """
    if frame["model"].n_unique() <= _MOST_LINES < frame["dataset"].n_unique():
        return _by_dataset(frame, look, metric, _own_answers(frame, look, "model", metric))
    panels = look.order("model", frame["model"])
    drawn = alt.layer(*_curve(frame, look, "dataset", metric), *_own_answers(frame, look, "dataset", metric))
    return _panels(drawn.properties(width=300, height=220), frame, "model", panels, columns=3)


def curves_by_model(frame: pl.DataFrame, look: Look, *, metric: str) -> Chart:
    """Experiment 2: a panel for each dataset, a line for each model."""
    return _by_dataset(frame, look, metric, [])


def _by_dataset(frame: pl.DataFrame, look: Look, metric: str, beside: list[Any]) -> Chart:
    panels = look.order("dataset", frame["dataset"])
    drawn = alt.layer(*_curve(frame, look, "model", metric), *beside).properties(width=240, height=170)
    return _panels(drawn, frame, "dataset", panels, columns=3)


def curves_by_size(frame: pl.DataFrame, look: Look, *, metric: str) -> Chart:
    """Experiment 3: a row of panels for each family, a line for each of its models."""
    datasets = look.order("dataset", frame["dataset"])
    width = 240 if len(datasets) <= 3 else 130
    drawn = alt.layer(*_curve(frame, look, "model", metric), data=frame).properties(width=width, height=130)
    row = alt.Row("family:N", title=None, sort=sorted(frame["family"].unique()))
    return drawn.facet(row=row, column=alt.Column("dataset:N", title=None, sort=datasets))


def curves_by_variant(frame: pl.DataFrame, look: Look, *, metric: str) -> Chart:
    """The paper's ablations, noise and precision: a panel for each model and dataset, a line for each variant."""
    frame = frame.with_columns(panel=pl.format("{} · {}", "model", "dataset"))
    pairs = [(m, d) for m in look.order("model", frame["model"]) for d in look.order("dataset", frame["dataset"])]
    panels = [name for name in (f"{m} · {d}" for m, d in pairs) if name in set(frame["panel"])]
    drawn = alt.layer(*_curve(frame, look, "variant", metric)).properties(width=240, height=170)
    return _panels(drawn, frame, "panel", panels, columns=3)


def _panels(drawn: Any, frame: pl.DataFrame, field: str, names: list[str], columns: int) -> Chart:
    facet = alt.Facet(f"{field}:N", title=None, sort=names)
    chart: Chart = drawn.properties(data=frame).facet(facet, columns=full_rows(len(names), columns))
    return chart


def _curve(frame: pl.DataFrame, look: Look, line: str, metric: str) -> list[Any]:
    """Draw a line for each value of the field ``line``, its interval as a band, the best baseline, and its marks."""
    if metric not in METRICS:
        raise QueryError(f"Unknown metric {metric!r}. Use one of {', '.join(METRICS)}.")
    encodings = look.lines(line, frame[line])
    base = alt.Chart().encode(x=depth_axis(frame))
    y = _readable(frame, metric)
    tooltip = [alt.Tooltip(name) for name in ("model", "dataset", "layer", "n_test")]
    tooltip.append(alt.Tooltip(f"{metric}:Q", format=".3f"))
    layers: list[Any] = []
    if metric in _WITH_INTERVALS:
        ends = alt.Y(f"{metric}_low:Q", title=METRICS[metric]), alt.Y2(f"{metric}_high:Q")
        layers.append(base.mark_area(opacity=0.14).encode(*ends, color=encodings["color"]))
    if metric == "accuracy":
        level = alt.Y("baseline_accuracy:Q", title=METRICS[metric])
        layers.append(base.mark_line(strokeWidth=0.7, opacity=0.8).encode(y=level, color=encodings["color"]))
    layers.append(base.mark_line(strokeWidth=1.6).encode(y=y, tooltip=tooltip, **encodings))
    return layers + _marks(base.encode(y=y, color=encodings["color"], tooltip=tooltip), frame)


def _marks(base: Any, frame: pl.DataFrame) -> list[Any]:
    """Mark the best layer, depth_90, J and C of each line; a kind that no line has would be an empty group."""
    return [
        base.mark_point(shape=shape, filled=filled, size=size, opacity=1).transform_filter(f"datum.{name}")
        for name, shape, filled, size in _MARKED
        if frame[name].any()
    ]


_MARKED = (
    ("best", "circle", True, 55),
    ("depth_90", "square", False, 80),
    ("jump", "triangle-up", True, 70),
    ("converging", "diamond", False, 70),
)
"""Marks of a curve: the column that says at which layer, the shape, whether it is filled, and the size."""

_STEP = 0.05
"""Multiple at which the vertical axis begins and ends."""


def _readable(frame: pl.DataFrame, metric: str) -> alt.Y:
    """Return the vertical axis from just below the smallest number drawn to just above the largest."""
    names = [
        metric,
        f"{metric}_low",
        f"{metric}_high",
        *(("baseline_accuracy", "zero_shot") if metric == "accuracy" else ()),
    ]
    drawn = frame.select(pl.col(name).cast(pl.Float64) for name in names if name in frame.columns)
    low, high = drawn.min().min_horizontal()[0], drawn.max().max_horizontal()[0]
    if low is None or high is None:
        return alt.Y(f"{metric}:Q", title=METRICS[metric], scale=alt.Scale(zero=False))
    ends = [_STEP * math.floor(low / _STEP + 1e-9), _STEP * math.ceil(high / _STEP - 1e-9)]
    scale = alt.Scale(domain=[round(end, 2) for end in ends], nice=False, zero=False)
    return alt.Y(f"{metric}:Q", title=METRICS[metric], scale=scale)


def _own_answers(frame: pl.DataFrame, look: Look, line: str, metric: str) -> list[Any]:
    """Draw the accuracy of the model's own answers as a cross at the right edge of each line's panel."""
    if metric != "accuracy" or frame["zero_shot"].null_count() == len(frame):
        return []
    ticks = alt.Chart().transform_filter("datum.layer == datum.n_layers - 1 && isValid(datum.zero_shot)")
    color = look.lines(line, frame[line])["color"]
    y = alt.Y("zero_shot:Q", title=METRICS[metric])
    return [ticks.mark_point(shape="cross", filled=True, size=90, opacity=1).encode(depth_axis(frame), y, color)]


# Measures --------------------------------------------------------------------------------------------------------


POINTS = {
    "best layer": ("best_percent", "#117733", "circle"),
    "depth_90": ("depth_90_percent", "#000000", "square"),
    "J": ("jump_percent", "#0072b2", "triangle-up"),
    "C": ("converging_percent", "#d55e00", "diamond"),
}
"""Measures of depth: for each its column, color and shape."""


def points_by_size(frame: pl.DataFrame, look: Look) -> Chart:
    """Experiment 3: measures in percent of depth; a panel for each dataset, models by family and size."""
    labelled = frame.with_columns(row=pl.format("{} ({} B)", "model", pl.col("size_billions").round(2)))
    return _measures(labelled, look)


def depth_measures(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw measures of each model in percent of depth, a panel for each dataset; the interval of depth_90 as a bar."""
    return _measures(frame.with_columns(row=pl.col("model")), look)


def _measures(frame: pl.DataFrame, look: Look) -> Chart:
    order = {model: position for position, model in enumerate(look.order("model", frame["model"]))}
    ordered = frame.sort(pl.col("model").replace_strict(order, return_dtype=pl.Int64), maintain_order=True)
    rows = ordered["row"].unique(maintain_order=True).to_list()
    y = alt.Y("row:N", sort=rows, title=None, axis=alt.Axis(grid=True, labelLimit=200))
    columns = {name: column for name, (column, *_) in POINTS.items()}
    about = [name for name in ("n_test", "p_beats_baseline", "p_any_rise", "best_layers") if name in frame.columns]
    ends = [name for name in ("depth_90_low", "depth_90_high") if name in frame.columns]
    index = ["model", "dataset", "row", *about, *ends]
    long = frame.unpivot(list(columns.values()), index=index, variable_name="column", value_name="percent")
    names = {column: name for name, column in columns.items()}
    long = long.with_columns(point=pl.col("column").replace_strict(names, return_dtype=pl.String))
    layers = [_dots(y, list(POINTS), tooltip=["model", "dataset", "point", "percent", *about])]
    if ends and long["depth_90_low"].is_not_null().any():
        scale = alt.Scale(domain=[0, 100])
        bar = alt.Chart().mark_rule(strokeWidth=3, opacity=0.35).transform_filter("datum.point == 'depth_90'")
        x = alt.X("depth_90_low:Q", title="depth (%)", scale=scale), alt.X2("depth_90_high:Q")
        layers.insert(0, bar.encode(*x, y))
    drawn = alt.layer(*layers).properties(width=210, height=18 * len(rows))
    sizes = long.group_by("dataset").agg(least=pl.col("n_test").min(), most=pl.col("n_test").max())
    named = {dataset: _with_n(dataset, least, most) for dataset, least, most in sizes.iter_rows()}
    panels = [named[dataset] for dataset in look.order("dataset", frame["dataset"])]
    long = long.with_columns(panel=pl.col("dataset").replace_strict(named, return_dtype=pl.String))
    return _panels(drawn, long, "panel", panels, columns=3)


def _with_n(dataset: str, least: int | None, most: int | None) -> str:
    """Return a dataset's name with its number of test prompts, which is given as a range if models differ in it."""
    if least is None:
        return dataset
    return f"{dataset} (n = {least})" if least == most else f"{dataset} (n = {least} to {most})"


def _dots(y: alt.Y, names: list[str], **encodings: Any) -> Any:
    """Draw points along an axis of depth, distinguished by colour and shape."""
    colors = alt.Scale(domain=names, range=[POINTS[name][1] for name in names])
    shapes = alt.Scale(domain=names, range=[POINTS[name][2] for name in names])
    legend = alt.Legend(title=None, symbolOpacity=1)
    return (
        alt.Chart()
        .mark_point(filled=True, size=60, opacity=1)
        .encode(
            alt.X("percent:Q", title="depth (%)", scale=alt.Scale(domain=[0, 100])),
            y,
            alt.Color("point:N", scale=colors, legend=legend),
            alt.Shape("point:N", scale=shapes, legend=legend),
            **encodings,
        )
    )


# Hidden states ---------------------------------------------------------------------------------------------------


def hidden_states(frame: pl.DataFrame, look: Look) -> Chart:
    """The prompts of one dataset in one model, projected: a panel for each layer, coloured by label."""
    del look
    pairs = frame.select("model", "dataset").unique(maintain_order=True).rows()
    if len(pairs) > 1:
        listed = "; ".join(f"--model {model} --dataset {dataset}" for model, dataset in pairs[:6])
        raise QueryError(f"hidden-states shows one model and one dataset. Name them, such as {listed}.")
    frame = frame.with_columns(panel=_panel_names(frame))
    names = frame.sort("layer")["panel"].unique(maintain_order=True).to_list()
    scale = alt.Scale(domain=[0, 1], range=["#e69f00", "#0072b2"])
    shapes = alt.Scale(domain=[0, 1], range=["triangle-up", "circle"])
    axis = alt.Axis(labels=False, ticks=False, grid=False)
    dots = alt.Chart(frame).mark_point(filled=True, size=14, opacity=0.6)
    drawn = dots.encode(
        alt.X("pc1:Q", title=None, axis=axis, scale=alt.Scale(zero=False)),
        alt.Y("pc2:Q", title=None, axis=axis, scale=alt.Scale(zero=False)),
        alt.Color("label:N", scale=scale, legend=alt.Legend(title="label")),
        alt.Shape("label:N", scale=shapes, legend=alt.Legend(title="label")),
        tooltip=["text", "label"],
    ).properties(width=150, height=130)
    facet = alt.Facet("panel:N", title=None, sort=names)
    return drawn.facet(facet, columns=4).resolve_scale(x="independent", y="independent")


def _panel_names(frame: pl.DataFrame) -> pl.Expr:
    if frame["explained1_percent"].null_count():
        return pl.format("layer {}", "layer")
    shares = [pl.col(f"explained{i}_percent").round(0).cast(pl.Int64) for i in (1, 2)]
    return pl.format("layer {} ({} + {} %)", "layer", *shares)


# Robustness of J and C -------------------------------------------------------------------------------------------


def depth_robustness(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw J and C under every condition, for the published one with the range over resampled test prompts."""
    frame = frame.with_columns(
        row=pl.format(
            "{} {}", "point", pl.when(varied="published").then(pl.lit("as published")).otherwise("condition")
        ),
        panel=pl.format("{} · {}", "model", "dataset"),
    )
    rows = frame.unique("row", maintain_order=True).sort(pl.col("point") == "C", maintain_order=True)["row"].to_list()
    pairs = [(m, d) for m in look.order("model", frame["model"]) for d in look.order("dataset", frame["dataset"])]
    panels = [name for name in (f"{m} · {d}" for m, d in pairs) if name in set(frame["panel"])]
    y = alt.Y("row:N", sort=rows, title=None, axis=alt.Axis(grid=True, labelLimit=200))
    scale = alt.Scale(domain=[0, 100])
    tooltip = ["point", "condition", "layer", "percent", "low_percent", "high_percent", "same_percent", "none_percent"]
    dots = _dots(y, ["J", "C"], tooltip=tooltip)
    base = alt.Chart().encode(y=y, color=dots.encoding.color)
    ends = alt.X("low_percent:Q", title="depth (%)", scale=scale), alt.X2("high_percent:Q")
    rule = base.mark_rule(strokeWidth=3, opacity=0.45).encode(*ends)
    none = base.mark_text(text="none", fontSize=9, align="left", dx=2).encode(x=alt.datum(0, scale=scale))
    shown = [dots, none.transform_filter("datum.percent === null")]
    if frame["low_percent"].is_not_null().any():
        shown.insert(0, rule)
    drawn = alt.layer(*shown)
    return _panels(drawn.properties(width=220, height=15 * len(rows)), frame, "panel", panels, columns=3)
