"""Uncertainty of numbers: resampled prompts, resampled test sets, and intervals of J and C.

The first functions take and return arrays; the later ones read a warehouse. Prompts are resampled, so every interval
says how much a number may change with other prompts of the same kind.

    depth_intervals(kdb.open("kdb-warehouse"), model=["smollm2-135m"])
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import bdtr

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

Floats = NDArray[np.float64]

N_RESAMPLES = 1000
_SEED = 2024
_LEVEL = (0.025, 0.975)


# Resampling ------------------------------------------------------------------------------------------------------


def resampled_means(values: NDArray[Any], n_resamples: int = N_RESAMPLES) -> Floats:
    """Return means (m, n_resamples) of the columns of ``values`` (n, m) over rows drawn with replacement.

    All columns use the same draws, so that differences and ranks between columns can be computed from the result. A
    draw is the count of each row, so the means of all columns are one matrix product, while scipy.stats.bootstrap
    gathers rows. The intervals are the same (tests compare them).
    """
    means: Floats = (_draws(len(values), n_resamples) @ values / len(values)).T
    return means


@functools.lru_cache(maxsize=12)
def _draws(n: int, n_resamples: int) -> NDArray[np.float32]:
    """Return the count of each of n rows in each resample (n_resamples, n); the same for all inputs with n rows."""
    rng = np.random.default_rng(_SEED)
    counts = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(n_resamples)]
    return np.stack(counts).astype(np.float32)


def intervals(resampled: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % interval of each row of ``resampled`` (m, n_resamples)."""
    low, high = np.quantile(resampled, _LEVEL, axis=1)
    return low, high


def rank_intervals(resampled: Floats, rows: Sequence[int]) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % interval of the rank of each of ``rows`` among all, from 1 for the largest."""
    ranks = np.stack([1 + (resampled > resampled[row]).sum(axis=0) for row in rows])
    low, high = np.quantile(ranks, _LEVEL, axis=1, method="closest_observation")
    return low, high


# Means over prompts ----------------------------------------------------------------------------------------------


def with_intervals(ranking: pl.DataFrame, scores: pl.DataFrame, by: Sequence[str], item: str) -> pl.DataFrame:
    """Add the columns low, high, rank_low and rank_high to a ranking, from the prompts behind its means.

    ``scores`` has one row per prompt and item, with the columns ``by`` (which define separate rankings), dataset,
    prompt_id, ``item`` and score; an item missing in a prompt counts as 0 there, as in the ranking itself.
    """
    groups = dict(_groups(scores, by))
    parts = []
    for key, listed in _groups(ranking, by):
        names, values = _matrix(groups[key], item)
        rows = [names.index(name) for name in listed[item]]
        resampled = resampled_means(values)
        low, high = intervals(resampled[rows])
        rank_low, rank_high = rank_intervals(resampled, rows)
        ends = {"low": low, "high": high, "rank_low": rank_low.astype(int), "rank_high": rank_high.astype(int)}
        parts.append(listed.with_columns(pl.Series(name, end) for name, end in ends.items()))
    schema = {"low": pl.Float64, "high": pl.Float64, "rank_low": pl.Int64, "rank_high": pl.Int64}
    none = ranking.clear().with_columns(pl.lit(None, dtype=kind).alias(name) for name, kind in schema.items())
    return pl.concat([none, *parts], how="vertical_relaxed")


def _groups(frame: pl.DataFrame, by: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], pl.DataFrame]]:
    return iter(frame.partition_by(*by, as_dict=True, maintain_order=True).items())


def _matrix(scores: pl.DataFrame, item: str) -> tuple[list[str], NDArray[np.float32]]:
    """Return the names of the items, and their scores (prompt, item)."""
    prompts = scores.select(pl.struct("dataset", "prompt_id").rank("dense") - 1).to_series().to_numpy()
    names = scores[item].unique(maintain_order=True)
    indices = scores[item].replace_strict(names, pl.int_range(len(names), eager=True)).to_numpy()
    values = np.zeros((int(prompts.max()) + 1, len(names)), dtype=np.float32)
    np.add.at(values, (prompts, indices), scores["score"].to_numpy())
    return names.to_list(), values


# Concept depth ---------------------------------------------------------------------------------------------------


def jump_layers(accuracy: Floats, jump_ratio: float = 1.1) -> Floats:
    """Return J as a layer for curves (…, layers); NaN if none. Tests compare the SQL macro concept_depth with it."""
    return _extreme(np.round(_variation_rates(accuracy), 12) >= jump_ratio, first=True)


def converging_layers(accuracy: Floats, tolerance: float = 0.03) -> Floats:
    """Return C as a layer for curves (…, layers); NaN if none. Tests compare the SQL macro concept_depth with it."""
    return _extreme(np.round(np.abs(_variation_rates(accuracy) - 1), 12) < tolerance, first=False)


def _variation_rates(accuracy: Floats) -> Floats:
    """Return β of curves (…, layers) as (…, layers − 1); NaN after an accuracy of 0."""
    before = np.where(accuracy[..., :-1] == 0, np.nan, accuracy[..., :-1])
    rates: Floats = accuracy[..., 1:] / before
    return rates


def _extreme(holds: NDArray[np.bool_], *, first: bool) -> Floats:
    """Return the first or last layer at which a condition holds; ``holds`` (…, layers − 1) begins with layer 1."""
    n = holds.shape[-1]
    index = holds.argmax(axis=-1) if first else n - 1 - holds[..., ::-1].argmax(axis=-1)
    return np.where(holds.any(axis=-1), index + 1.0, np.nan)


def depth_intervals(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return J and C of each model and dataset, with intervals over resampled test prompts.

    ``params`` are those of the saved query ``probe-outcomes``. One row per model, dataset and point: n_layers, layer,
    the 95 % interval in percent of depth (over the resamples that have the point), and the percentages of resamples in
    which it is at the same layer, or does not exist. jump_p_value is McNemar's, of J's layer against the one before.
    """
    return _depth_rows(wh.query("probe-outcomes", **params))


def _depth_rows(outcomes: pl.DataFrame) -> pl.DataFrame:
    rows = [
        {"model": model, "dataset": dataset, **row}
        for (model, dataset, _run), frame in _groups(outcomes, ("model", "dataset", "run"))
        for row in _points(frame)
    ]
    numbers = ("layer", "low_percent", "high_percent", "same_percent", "none_percent", "jump_p_value")
    schema = {"model": pl.String, "dataset": pl.String, "point": pl.String, "n_layers": pl.Int64}
    return pl.DataFrame(rows, schema=schema | dict.fromkeys(numbers, pl.Float64))


def _points(layers: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Return J and C of one run, from rows with the columns layer, n_layers and outcomes, one for each layer."""
    n_layers = int(layers["n_layers"][0])
    correct = np.zeros((len(layers["outcomes"][0]), n_layers), dtype=np.float32)
    for layer, outcomes in layers.select("layer", "outcomes").iter_rows():
        correct[:, layer] = np.frombuffer(outcomes.encode(), dtype=np.uint8) - ord("0")
    curve, resampled = correct.mean(axis=0, dtype=np.float64), resampled_means(correct)
    finders: dict[str, Callable[[Floats], Floats]] = {"J": jump_layers, "C": converging_layers}
    for point, find in finders.items():
        layer, resampled_layers = float(find(curve)), find(resampled.T)
        existing = resampled_layers[~np.isnan(resampled_layers)]
        low, high = 100 * np.quantile(existing, _LEVEL) / n_layers if len(existing) else (None, None)
        same = np.isnan(resampled_layers) if np.isnan(layer) else resampled_layers == layer
        before = None if np.isnan(layer) or point == "C" else correct[:, int(layer) - 1]
        yield {
            "point": point,
            "n_layers": n_layers,
            "layer": None if np.isnan(layer) else layer,
            "low_percent": low,
            "high_percent": high,
            "same_percent": 100 * float(np.mean(same)),
            "none_percent": 100 * float(np.mean(np.isnan(resampled_layers))),
            "jump_p_value": None if before is None else _paired(before, correct[:, int(layer)]),
        }


def _paired(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return McNemar's p-value of two layers that are right (1) or wrong (0) on the same prompts (n,)."""
    return mcnemar(int(np.sum(a > b)), int(np.sum(b > a)))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact p-value of McNemar's test: ``only_a`` prompts are right only in a, ``only_b`` only in b."""
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
