"""Charts of concept depth: accuracy by layer, converging points, hidden states, and the robustness of J and C.

Jin et al., Exploring Concept Depth (arXiv 2404.07066). Each function draws the rows of a saved query; ``figures.py``
names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from kdb.analysis.style import Chart, Look, depth_axis
from kdb.analysis.uncertainty import depth_intervals
from kdb.errors import QueryError

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "auc": "ROC AUC",
    "selectivity": "selectivity (accuracy − control)",
    "control_accuracy": "accuracy on shuffled labels",
}

MARKS = "▲ jump point J   ◇ converging point C"


# Accuracy by depth -----------------------------------------------------------------------------------------------


def curves_with_answers(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``layer-accuracy`` with the accuracy of the model's own answers; NULL if none are stored."""
    frame = wh.query("layer-accuracy", **params)
    shared = {name: params[name] for name in ("model", "dataset", "variant", "run") if name in params}
    answers = wh.query("zero-shot", **shared).select("model", "dataset", zero_shot="accuracy")
    return frame.join(answers.unique(["model", "dataset"]), on=["model", "dataset"], how="left", maintain_order="left")


def families_at_size(wh: Warehouse, *, size: float, within: float, **params: Any) -> pl.DataFrame:
    """Return rows of ``layer-accuracy`` of models whose size is within a factor of ``size`` billion parameters."""
    return wh.query("layer-accuracy", **params).filter(pl.col("size_billions").is_between(size / within, size * within))


def depth_curves(frame: pl.DataFrame, look: Look, *, metric: str) -> Chart:
    """Experiment 1: a panel for each model, a line for each dataset."""
    panels = look.order("model", frame["model"])
    drawn = alt.layer(*_curve(frame, look, "dataset", metric), *_own_answers(frame, look, metric))
    return _panels(drawn.properties(width=300, height=220), frame, "model", panels, columns=3)


def curves_by_model(frame: pl.DataFrame, look: Look, *, metric: str) -> Chart:
    """Experiment 2: a panel for each dataset, a line for each model."""
    panels = look.order("dataset", frame["dataset"])
    drawn = alt.layer(*_curve(frame, look, "model", metric)).properties(width=240, height=170)
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
    chart: Chart = drawn.properties(data=frame).facet(facet, columns=min(columns, len(names)))
    return chart


def _curve(frame: pl.DataFrame, look: Look, line: str, metric: str) -> list[Any]:
    """Draw a line for each value of the field ``line``, its interval as a band, and its J and C as marks."""
    if metric not in METRICS:
        raise QueryError(f"Unknown metric {metric!r}. Use one of {', '.join(METRICS)}.")
    encodings = look.lines(line, frame[line])
    x = depth_axis(frame)
    y = alt.Y(f"{metric}:Q", title=METRICS[metric], scale=alt.Scale(zero=False))
    base = alt.Chart().encode(x=x)
    tooltip = [
        alt.Tooltip("model"),
        alt.Tooltip("dataset"),
        alt.Tooltip("layer"),
        alt.Tooltip(f"{metric}:Q", format=".3f"),
    ]
    layers: list[Any] = [base.mark_line(strokeWidth=1.6).encode(y=y, tooltip=tooltip, **encodings)]
    if metric == "accuracy":
        band = base.mark_area(opacity=0.14).encode(
            y=alt.Y("accuracy_low:Q", title=METRICS[metric]), y2="accuracy_high:Q"
        )
        layers.insert(0, band.encode(color=encodings["color"]))
    marked = base.encode(y=y, color=encodings["color"], tooltip=tooltip)
    jumps = marked.mark_point(shape="triangle-up", filled=True, size=70, opacity=1).transform_filter("datum.jump")
    ends = marked.mark_point(shape="diamond", filled=False, size=70, opacity=1).transform_filter("datum.converging")
    return [*layers, jumps, ends]


def _own_answers(frame: pl.DataFrame, look: Look, metric: str) -> list[Any]:
    """Draw the accuracy of the model's own answers as a tick at the right edge of each line's panel."""
    if metric != "accuracy" or frame["zero_shot"].null_count() == len(frame):
        return []
    ticks = alt.Chart().transform_filter("datum.layer == datum.n_layers - 1 && isValid(datum.zero_shot)")
    color = look.lines("dataset", frame["dataset"])["color"]
    y = alt.Y("zero_shot:Q", title=METRICS[metric])
    return [ticks.mark_point(shape="cross", filled=True, size=90, opacity=1).encode(depth_axis(frame), y, color)]


# Converging points -----------------------------------------------------------------------------------------------


def points_by_size(frame: pl.DataFrame, look: Look) -> Chart:
    """Experiment 3: J and C in percent of depth; a panel for each dataset, models by family and size."""
    frame = frame.with_columns(
        row=pl.format("{} ({} B)", "model", pl.col("size_billions").round(2)),
        J="jump_percent",
        C="converging_percent",
    )
    order = {model: position for position, model in enumerate(look.order("model", frame["model"]))}
    by_size = frame.sort(pl.col("model").replace_strict(order, return_dtype=pl.Int64), maintain_order=True)
    rows = by_size["row"].unique(maintain_order=True).to_list()
    long = frame.unpivot(["J", "C"], index=["model", "dataset", "row"], variable_name="point", value_name="percent")
    drawn = alt.layer(_dots(alt.Y("row:N", sort=rows, title=None, axis=alt.Axis(grid=True, labelLimit=200))))
    drawn = drawn.properties(width=210, height=16 * len(rows))
    return _panels(drawn, long, "dataset", look.order("dataset", frame["dataset"]), columns=3)


def _dots(y: alt.Y, **encodings: Any) -> Any:
    """Draw J and C along an axis of depth, distinguished by colour and shape."""
    colors = alt.Scale(domain=["J", "C"], range=["#0072b2", "#d55e00"])
    shapes = alt.Scale(domain=["J", "C"], range=["triangle-up", "diamond"])
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


def robustness(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``depth-robustness``, for the published condition with intervals over resampled test prompts.

    The added columns are those of ``depth_intervals``: low_percent, high_percent, same_percent and none_percent.
    """
    frame = wh.query("depth-robustness", **params)
    ends = depth_intervals(wh, **params).drop("n_layers", "layer").with_columns(varied=pl.lit("published"))
    return frame.join(ends, on=["model", "dataset", "point", "varied"], how="left", maintain_order="left")


def depth_robustness(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw J and C under every condition, for the published one with the interval over resampled test prompts."""
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
    dots = _dots(y, tooltip=tooltip)
    base = alt.Chart().encode(y=y, color=dots.encoding.color)
    ends = alt.X("low_percent:Q", title="depth (%)", scale=scale), alt.X2("high_percent:Q")
    rule = base.mark_rule(strokeWidth=3, opacity=0.45).encode(*ends)
    none = base.mark_text(text="none", fontSize=9, align="left", dx=2).encode(x=alt.datum(0, scale=scale))
    drawn = alt.layer(rule, dots, none.transform_filter("datum.percent === null"))
    return _panels(drawn.properties(width=220, height=15 * len(rows)), frame, "panel", panels, columns=3)


_FAR = 10.0
"""Percent of depth by which a point may move before it counts as dependent on the procedure."""

_SAME = 80.0
"""Percentage of resamples in which a point must be within that distance of its layer."""


_SURE = 0.05
"""McNemar's p-value above which a jump may be due to the choice of test prompts."""


def verdicts(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return whether J and C of each model and dataset are robust, or depend on the procedure.

    One row per model, dataset and point: layer, percent, the interval over resampled test prompts, none_percent,
    jump_p_value (McNemar's, against the layer before), and ``hangs_on``. ``hangs_on`` lists the choices that move the
    point by more than a tenth of the depth or remove it: 'threshold', 'classifier', 'split', 'test prompts'. It also
    has 'chance' if a jump only reaches the accuracy of always guessing the larger class, and 'its definition' for a C
    in the last layer. It is empty if the point is robust.
    """
    frame, chance = robustness(wh, **params), _jumps_to_chance(wh, **params)
    keys = ["model", "dataset", "point"]
    moved = (
        frame.filter(pl.col("varied") != "published")
        .join(frame.filter(varied="published").select(*keys, home="percent"), on=keys)
        .filter((pl.col("moved_percent").abs() > _FAR) | (pl.col("percent").is_null() != pl.col("home").is_null()))
        .group_by(keys, maintain_order=True)
        .agg(pl.col("varied").unique(maintain_order=True).alias("moves"))
    )
    points = frame.filter(varied="published").join(moved, on=keys, how="left", maintain_order="left")
    points = points.join(chance, on=keys, how="left", maintain_order="left")
    spread = pl.col("high_percent") - pl.col("low_percent") > 2 * _FAR
    split = pl.col("none_percent").is_between(100 - _SAME, _SAME)
    last = (pl.col("point") == "C") & (pl.col("layer") == pl.col("n_layers") - 1)
    reasons = pl.concat_list(
        pl.col("moves").fill_null([]),
        pl.when(spread | split | (pl.col("jump_p_value") > _SURE)).then(pl.lit("test prompts")),
        pl.when("to_chance").then(pl.lit("chance")),
        pl.when(last).then(pl.lit("its definition")),
    ).list.drop_nulls()
    kept = ("layer", "percent", "low_percent", "high_percent", "none_percent", "jump_p_value")
    return points.select(*keys, *kept, hangs_on=reasons.list.join(", "))


def _jumps_to_chance(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return jumps whose layer is not better than always guessing the larger class: its interval has that share."""
    curves = wh.query("layer-accuracy", **params).filter("jump")
    sizes = wh.sql(
        "SELECT DISTINCT model, dataset, n_positive / n_prompts AS share FROM datasets "
        "JOIN chosen_runs('probe_scores', ?, ?) USING (model, dataset, run) WHERE n_positive > 0",
        [params.get("variant", "default"), params.get("run")],
    )
    larger = pl.max_horizontal("share", 1 - pl.col("share"))
    joined = curves.join(sizes.unique(["model", "dataset"]), on=["model", "dataset"])
    return joined.select("model", "dataset", point=pl.lit("J"), to_chance=pl.col("accuracy_low") <= larger)
