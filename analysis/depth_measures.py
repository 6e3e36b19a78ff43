"""Measures of concept depth of stored runs: best layer, depth_90, tests, and the paper's J and C, with intervals.

    summary(kdb.open("kdb-warehouse"), model=["smollm2-135m"])

Test prompts, or their groups where a dataset has them, are resampled; the fitted probes are held fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kdb.analysis.curves import Measured, measure, paper_points
from kdb.analysis.prompt_means import groups_of
from kdb.analysis.uncertainty import group_sums, largest_mean_p

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

PAPER = {"classifier": "logistic-raw", "split": "paper"}
"""The probe and split of which J and C are read."""

_KEYS = ("model", "dataset")


@dataclass(frozen=True)
class Curve:
    """Outcomes of one run's probe on its test prompts: correct (prompt, layer), of the given layers and prompt ids."""

    model: str
    dataset: str
    layers: tuple[int, ...]
    n_layers: int
    prompts: tuple[int, ...]
    correct: NDArray[np.float32]
    baselines: Mapping[str, NDArray[np.float32]]
    groups: NDArray[Any] | None

    @property
    def complete(self) -> NDArray[np.float32]:
        """Return ``correct`` with a column for every layer, 0 for one that was not measured."""
        every = np.zeros((len(self.correct), self.n_layers), dtype=np.float32)
        every[:, list(self.layers)] = self.correct
        return every


def curves(wh: Warehouse, **params: Any) -> Iterator[Curve]:
    """Yield the outcomes of each run; ``params`` are those of the saved query ``probe-outcomes``."""
    outcomes = wh.query("probe-outcomes", **params)
    models, site, *probe = _chosen(params)
    guessed = wh.sql("FROM baseline_outcomes(?, ?, ?)", [models, *probe]).rows_by_key("run")
    tested = wh.sql("SELECT run, prompts, groups FROM test_prompts(?, ?, ?, ?)", [models, site, *probe])
    of_run = {run: (tuple(prompts), groups) for run, prompts, groups in tested.iter_rows()}
    for (model, dataset, run), frame in groups_of(outcomes, (*_KEYS, "run")):
        frame = frame.sort("layer")
        correct = np.stack([_bits(text) for text in frame["outcomes"]], axis=1)
        baselines = {name: _bits(text) for *_, name, text in guessed.get(run, [])}
        prompts, names = of_run.get(run, ((), [None]))
        groups = None if None in names else np.array(names)
        n_layers = int(frame["n_layers"][0])
        yield Curve(model, dataset, tuple(frame["layer"]), n_layers, prompts, correct, baselines, groups)


def _chosen(params: Mapping[str, Any]) -> list[Any]:
    """Return the models, site, classifier and split that a query with these parameters shows."""
    model = params.get("model")
    models = [model] if isinstance(model, str) else model and list(model)
    probe = (params.get(name, "default") for name in ("classifier", "split"))
    return [models, params.get("site", "resid_post"), *probe]


def _bits(outcomes: str) -> NDArray[np.float32]:
    return (np.frombuffer(outcomes.encode(), dtype=np.uint8) - ord("0")).astype(np.float32)


# Measures --------------------------------------------------------------------------------------------------------


def summary(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of the saved query ``concept-depth`` with tests and 95 % intervals, one per model and dataset.

    ``params`` are those of the query; the site defaults to resid_post. Added columns: n_groups (groups of test
    prompts, by which prompts are resampled), best_layers (those that cannot be told from the best),
    p_beats_baseline (the best layer against the best baseline), p_any_rise (accuracy rises between some adjacent
    layers; it does not say that J is there), and the ends of the intervals of depth_90 and area. depth_90 is NULL
    unless p_beats_baseline is below 0.05; without stored predictions, it is that of the query.
    """
    params = {"site": "resid_post"} | params
    rows = wh.query("concept-depth", **params)
    asked = {name: value for name, value in params.items() if name not in ("jump_ratio", "convergence_tolerance")}
    measured = pl.DataFrame([_row(curve) for curve in curves(wh, **asked)], schema=_MEASURES)
    both = rows.join(measured, on=_KEYS, how="left", maintain_order="left")
    tested = pl.col("p_beats_baseline").is_not_null()
    replaced = [
        pl.when(tested).then(pl.col(f"tested_{name}")).otherwise(name).alias(name)
        for name in ("depth_90_layer", "depth_90_percent")
    ]
    return both.with_columns(replaced).select(_COLUMNS)


_MEASURES = {
    "model": pl.String,
    "dataset": pl.String,
    "n_groups": pl.Int64,
    "best_layers": pl.String,
    "p_beats_baseline": pl.Float64,
    "p_any_rise": pl.Float64,
    "tested_depth_90_layer": pl.Int16,
    "tested_depth_90_percent": pl.Float64,
    "depth_90_low": pl.Float64,
    "depth_90_high": pl.Float64,
    "area_low": pl.Float64,
    "area_high": pl.Float64,
}

_COLUMNS = (
    *("model", "dataset", "site", "classifier", "split", "n_layers", "n_test", "n_groups"),
    *("best_layer", "best_percent", "best_accuracy", "best_layers", "first_within_one_se"),
    *("baseline", "baseline_accuracy", "p_beats_baseline"),
    *("depth_90_layer", "depth_90_percent", "depth_90_low", "depth_90_high", "area", "area_low", "area_high"),
    *("p_any_rise", "jump_layer", "jump_percent", "converging_layer", "converging_percent"),
)


def _row(curve: Curve) -> dict[str, Any]:
    baselines = np.stack(list(curve.baselines.values()), axis=1) if curve.baselines else None
    measured = measure(curve.correct, baselines, curve.groups)
    return {
        "model": curve.model,
        "dataset": curve.dataset,
        "n_groups": measured.n_groups,
        "best_layers": spans([curve.layers[i] for i in measured.best_layers]),
        "p_any_rise": measured.p_any_rise,
        **_beside_baseline(curve, measured),
    }


def _beside_baseline(curve: Curve, measured: Measured) -> dict[str, Any]:
    beside = measured.baseline
    if beside is None:
        return {}

    def layer(index: int | None) -> int | None:
        return None if index is None else curve.layers[index]

    def percent(index: int | None) -> float | None:
        return None if index is None else 100 * curve.layers[index] / curve.n_layers

    return {
        "p_beats_baseline": beside.p_value,
        "tested_depth_90_layer": layer(beside.depth_90),
        "tested_depth_90_percent": percent(beside.depth_90),
        "depth_90_low": percent(beside.depth_90_low),
        "depth_90_high": percent(beside.depth_90_high),
        "area_low": beside.area_low,
        "area_high": beside.area_high,
    }


def spans(layers: list[int]) -> str:
    """Return ascending numbers as text with the runs among them joined: 3, 7–9."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    return ", ".join("–".join(map(str, run)) for run in runs)


# The paper's points ----------------------------------------------------------------------------------------------


def depth_intervals(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return J and C of each model and dataset, with ranges over resampled test prompts or groups.

    ``params`` are those of the saved query ``probe-outcomes``; classifier and split default to the paper's. One row
    per model, dataset and point: n_layers, layer, the range in percent of depth that holds the middle 95 % of the
    resamples that have the point (NULL if most have none), and the percentages of resamples in which it is at the same
    layer, or does not exist. p_any_rise, in rows of J, is the p-value of the largest rise of the curve.
    """
    rows = [row for curve in curves(wh, **PAPER | params) for row in _point_rows(curve)]
    numbers = ("layer", "low_percent", "high_percent", "same_percent", "none_percent", "p_any_rise")
    schema = {"model": pl.String, "dataset": pl.String, "point": pl.String, "n_layers": pl.Int64}
    return pl.DataFrame(rows, schema=schema | dict.fromkeys(numbers, pl.Float64))


def _point_rows(curve: Curve) -> Iterator[dict[str, Any]]:
    sums, _ = group_sums(curve.correct, curve.groups)
    rise = largest_mean_p(np.diff(sums, axis=1)) if len(curve.layers) > 1 else None
    for name, point in paper_points(curve.complete, curve.groups).items():
        yield {
            "model": curve.model,
            "dataset": curve.dataset,
            "point": name,
            "n_layers": curve.n_layers,
            "layer": point.layer,
            "low_percent": None if point.low is None else 100 * point.low / curve.n_layers,
            "high_percent": None if point.high is None else 100 * point.high / curve.n_layers,
            "same_percent": 100 * point.same,
            "none_percent": 100 * point.none,
            "p_any_rise": rise if name == "J" else None,
        }


def robustness(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``depth-robustness``, for the published condition with ranges over resampled test prompts.

    The added columns are those of ``depth_intervals``, and n_test, the number of test prompts of the published
    condition.
    """
    sizes = (
        wh.query("layer-accuracy", **PAPER | params).select("model", "dataset", "n_test").unique(["model", "dataset"])
    )
    frame = wh.query("depth-robustness", **params).join(
        sizes, on=["model", "dataset"], how="left", maintain_order="left"
    )
    ends = depth_intervals(wh, **params).drop("n_layers", "layer").with_columns(varied=pl.lit("published"))
    return frame.join(ends, on=["model", "dataset", "point", "varied"], how="left", maintain_order="left")


def disagreements(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return J and C of every classifier on the paper's split, in percent of depth, and whether they agree.

    One row per model, dataset and point, with a column for each classifier. They agree if all have the point, at most
    a tenth of the depth apart, or none has it.
    """
    frame = wh.query("depth-robustness", **params).filter(pl.col("varied").is_in(["published", "classifier"]))
    named = pl.when(varied="published").then(pl.lit(params.get("classifier", PAPER["classifier"])))
    keys = ["model", "dataset", "point"]
    rows = frame.with_columns(condition=named.otherwise("condition"))
    agree = (pl.col("percent").null_count() == pl.len()) | (
        (pl.col("percent").null_count() == 0) & (pl.col("percent").max() - pl.col("percent").min() <= FAR)
    )
    verdict = rows.group_by(keys, maintain_order=True).agg(agree=agree)
    if rows.is_empty():
        return verdict
    wide = rows.pivot("condition", index=keys, values="percent", aggregate_function="first")
    return wide.join(verdict, on=keys, maintain_order="left")


FAR = 10.0
"""Percent of depth by which a point may move before it counts as dependent on the procedure."""

_SAME = 80.0
"""Percentage of resamples in which a point must exist, or must not."""

_SURE = 0.05
"""p_any_rise above which accuracy may rise nowhere, so that a jump may be due to the choice of test prompts."""


def verdicts(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return whether J and C of each model and dataset are robust, or depend on the procedure.

    One row per model, dataset and point: layer, percent, the range over resampled test prompts, none_percent,
    p_any_rise, and ``depends_on``, which lists the choices that move the point by more than a tenth of the depth
    or remove it: 'threshold', 'classifier', 'split', 'test prompts'. It also has 'chance' if a jump only reaches the
    accuracy of always guessing the larger class, and 'its definition' for a C in the last layer. It is empty if the
    point is robust.
    """
    frame, chance = robustness(wh, **params), _jumps_to_chance(wh, **PAPER | params)
    keys = ["model", "dataset", "point"]
    moved = (
        frame.filter(pl.col("varied") != "published")
        .join(frame.filter(varied="published").select(*keys, home="percent"), on=keys)
        .filter((pl.col("moved_percent").abs() > FAR) | (pl.col("percent").is_null() != pl.col("home").is_null()))
        .group_by(keys, maintain_order=True)
        .agg(pl.col("varied").unique(maintain_order=True).alias("moves"))
    )
    points = frame.filter(varied="published").join(moved, on=keys, how="left", maintain_order="left")
    points = points.join(chance, on=keys, how="left", maintain_order="left")
    spread = pl.col("high_percent") - pl.col("low_percent") > 2 * FAR
    split = pl.col("none_percent").is_between(100 - _SAME, _SAME)
    last = (pl.col("point") == "C") & (pl.col("layer") == pl.col("n_layers") - 1)
    reasons = pl.concat_list(
        pl.col("moves").fill_null([]),
        pl.when(spread | split | (pl.col("p_any_rise") > _SURE)).then(pl.lit("test prompts")),
        pl.when("to_chance").then(pl.lit("chance")),
        pl.when(last).then(pl.lit("its definition")),
    ).list.drop_nulls()
    kept = ("layer", "percent", "low_percent", "high_percent", "none_percent", "p_any_rise")
    return points.select(*keys, *kept, depends_on=reasons.list.join(", "))


def _jumps_to_chance(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return jumps whose layer is not better than always guessing the larger class: its interval has that share."""
    rates = wh.query("layer-accuracy", **params).filter("jump")
    sizes = wh.sql(
        "SELECT DISTINCT model, dataset, n_positive / n_prompts AS share FROM datasets "
        "JOIN chosen_runs('probe_scores', ?, ?) USING (model, dataset, run) WHERE n_positive > 0",
        [params.get("variant", "default"), params.get("run")],
    )
    larger = pl.max_horizontal("share", 1 - pl.col("share"))
    joined = rates.join(sizes.unique(["model", "dataset"]), on=["model", "dataset"])
    return joined.select("model", "dataset", point=pl.lit("J"), to_chance=pl.col("accuracy_low") <= larger)


# Curves ----------------------------------------------------------------------------------------------------------


def layer_curves(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``layer-accuracy`` with balanced accuracy and its 95 % interval, from the stored predictions."""
    frame = wh.query("layer-accuracy", **params)
    balanced = wh.sql("FROM balanced_accuracies(?, ?, ?, ?)", _chosen(params)).drop("balanced_accuracy")
    return frame.join(balanced, on=["model", "dataset", "run", "layer"], how="left", maintain_order="left")


def curves_with_answers(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return ``layer_curves`` with the accuracy of the model's own answers; NULL if none are stored."""
    frame = layer_curves(wh, **params)
    shared = {name: params[name] for name in ("model", "dataset", "variant", "run") if name in params}
    answers = wh.query("zero-shot", **shared).select("model", "dataset", zero_shot="accuracy")
    return frame.join(answers.unique(["model", "dataset"]), on=["model", "dataset"], how="left", maintain_order="left")


def families_at_size(wh: Warehouse, *, size: float, within: float, **params: Any) -> pl.DataFrame:
    """Return ``layer_curves`` of models whose size is within a factor of ``size`` billion parameters."""
    return layer_curves(wh, **params).filter(pl.col("size_billions").is_between(size / within, size * within))
