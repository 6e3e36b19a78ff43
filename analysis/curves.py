"""Measures of a curve of accuracy by layer, with tests and intervals over test prompts: arrays in, frozen results out.

Prompts, or groups of prompts where a dataset has groups, are resampled while the fitted probes are held fixed. So the
intervals say what other test prompts would change, and not what another training part would.

    measured = measure(correct, baselines)    # correct (prompt, layer) and baselines (prompt, baseline): 0 or 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdb.analysis.uncertainty import (
    Floats,
    group_sums,
    intervals,
    largest_mean_p,
    mcnemar,
    mean_intervals,
    resampled_means,
)

SURE = 0.05
"""Level of the tests."""

_SHARE = 0.9
"""Share of the way from the best baseline to the best layer at which depth_90 is."""


@dataclass(frozen=True)
class Baseline:
    """The best baseline beside a curve, and measures relative to it.

    ``index`` is its column, ``p_value`` that of the best layer against it, after the choice of the layer. ``depth_90``
    is a layer, with its interval; None unless the best layer beats the baseline (p < SURE). ``area`` is the mean over
    layers of accuracy minus the baseline's.
    """

    index: int
    accuracy: float
    p_value: float
    depth_90: int | None
    depth_90_low: int | None
    depth_90_high: int | None
    area: float
    area_low: float | None
    area_high: float | None


@dataclass(frozen=True)
class Measured:
    """Measures of one curve; layers are columns of the array from which they are computed.

    ``best_layers`` are those that cannot be told from the best: a 95 % confidence set. ``first_within`` is the first
    layer within one standard error of the best. ``p_any_rise`` is the p-value of the largest rise of accuracy between
    adjacent layers, after its choice: if it is small, accuracy rises somewhere; not that it rises at J.
    """

    n_prompts: int
    n_groups: int | None
    best_layer: int
    best_accuracy: float
    best_layers: tuple[int, ...]
    first_within: int
    p_any_rise: float | None
    baseline: Baseline | None


def measure(
    correct: NDArray[Any], baselines: NDArray[Any] | None = None, groups: NDArray[Any] | None = None
) -> Measured:
    """Measure a curve from correct (prompt, layer) and ``baselines`` (prompt, baseline), each 1 or 0."""
    sums, sizes = group_sums(correct, groups)
    curve = _rates(sums, sizes)
    best = int(curve.argmax())
    resampled = resampled_means(sums, sizes=sizes)
    return Measured(
        n_prompts=len(correct),
        n_groups=None if groups is None else len(sums),
        best_layer=best,
        best_accuracy=float(curve[best]),
        best_layers=indistinguishable(curve, resampled),
        first_within=first_within_one_error(curve, len(correct)),
        p_any_rise=largest_mean_p(np.diff(sums, axis=1)) if sums.shape[1] > 1 else None,
        baseline=None
        if baselines is None
        else _beside(sums, sizes, curve, resampled, group_sums(baselines, groups)[0]),
    )


def _rates(sums: NDArray[Any], sizes: NDArray[Any]) -> Floats:
    rates: Floats = sums.sum(axis=0, dtype=np.float64) / float(sizes.sum())
    return rates


def _beside(
    sums: NDArray[Any], sizes: NDArray[Any], curve: Floats, resampled: Floats, baselines: NDArray[Any]
) -> Baseline:
    """Measure a curve against the best of the baselines; all arrays are sums over groups."""
    rates = _rates(baselines, sizes)
    index = int(rates.argmax())
    above, level = sums - baselines[:, [index]], float(rates[index])
    p_value = largest_mean_p(above)
    depth: tuple[int | None, int | None, int | None] = (None, None, None)
    if p_value < SURE:
        levels = resampled_means(baselines[:, [index]], sizes=sizes)[0]
        reached = int(depth_90(curve, np.float64(level)))
        first, last = depth_90_interval(curve, level, resampled, levels, n=len(sums))
        depth = (reached, min(first, reached), max(last, reached))
    low, high = (float(end[0]) for end in mean_intervals(above.mean(axis=1, keepdims=True), sizes))
    ends = (None, None) if np.isnan(low) else (low, high)
    return Baseline(index, level, p_value, *depth, float(np.mean(curve - level)), *ends)


# The best layer --------------------------------------------------------------------------------------------------


def indistinguishable(curve: Floats, resampled: Floats) -> tuple[int, ...]:
    """Return the layers that cannot be told from the best one; ``resampled`` (layer, resample) are their accuracies.

    A layer is left out if the best of all is further above it than in 95 % of resamples, in which each difference is
    taken from its own mean. In 95 % of test sets the layer that is truly the best is among them, as in multiple
    comparisons with the best (Hsu 1984).
    """
    moved = resampled - curve[:, None]
    kept = []
    for layer, rate in enumerate(curve):
        further = np.quantile((moved - moved[layer]).max(axis=0), 0.95)
        if curve.max() - rate <= further + 1e-12:
            kept.append(layer)
    return tuple(kept)


def first_within_one_error(curve: Floats, n: int) -> int:
    """Return the first layer within one binomial standard error of the best. It depends on n, so it has no interval."""
    best = float(curve.max())
    return int(np.argmax(np.round(curve, 12) >= round(best - np.sqrt(best * (1 - best) / n), 12)))


def depth_90(curve: Floats, level: Floats | np.float64) -> NDArray[np.int64]:
    """Return the first layer of curves (…, layers) at 90 % of the way from the baseline's ``level`` to the best.

    Tests compare the SQL macro _measures_of_all with it.
    """
    reached = np.round(curve - _threshold(curve, level)[..., None], 12) >= 0
    first: NDArray[np.int64] = reached.argmax(axis=-1)
    return first


def _threshold(curve: Floats, level: Floats | np.float64) -> Floats:
    threshold: Floats = level + _SHARE * (curve.max(axis=-1) - level)
    return threshold


def depth_90_interval(curve: Floats, level: float, resampled: Floats, levels: Floats, *, n: int) -> tuple[int, int]:
    """Return the 95 % interval of depth_90, as layers; ``n`` prompts or groups were resampled.

    For each layer, the margin of the best layer so far over the threshold has a basic bootstrap interval; the largest
    of all layers is above its expectation, and the reflection corrects that. The interval of depth_90 goes from the
    first layer whose margin may be positive to the first whose margin must be. As margins grow with the layer, this
    needs no correction for their number.
    """
    margin = np.maximum.accumulate(curve) - _threshold(curve, np.float64(level))
    drawn = np.maximum.accumulate(resampled, axis=0) - _threshold(resampled.T, levels)
    low, high = intervals(drawn, n)
    return _first(2 * margin - low), _first(2 * margin - high)


def _first(margin: Floats) -> int:
    """Return the first layer whose margin is not negative; the last layer if none is."""
    reached = margin >= -1e-9
    return int(reached.argmax()) if reached.any() else len(margin) - 1


# Two curves on the same prompts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differences:
    """Accuracies of two curves on the same prompts, and b − a with its 95 % interval, by column.

    The ends are NaN where ``mean_intervals`` gives none. ``only_a`` and ``only_b`` count prompts that only one of them
    has right, ``p_values`` are McNemar's. ``p_largest`` is that of the largest difference of either sign, after its
    choice among the columns.
    """

    n_groups: int | None
    accuracy_a: Floats
    accuracy_b: Floats
    low: Floats
    high: Floats
    only_a: NDArray[np.int64]
    only_b: NDArray[np.int64]
    p_values: Floats
    p_largest: float


def differences(a: NDArray[Any], b: NDArray[Any], groups: NDArray[Any] | None = None) -> Differences:
    """Compare two curves, each from correct (prompt, layer), whose columns correspond.

    The interval and ``p_largest`` keep groups together; McNemar's test takes each prompt as independent.
    """
    sums, sizes = group_sums(b - a, groups)
    # Where few groups differ, some resampled standard errors are next to nothing, and ends lie beyond what can be.
    low, high = (np.clip(end, -1.0, 1.0) for end in mean_intervals(sums, sizes))
    only_a, only_b = (a > b).sum(axis=0), (b > a).sum(axis=0)
    return Differences(
        None if groups is None else len(sums),
        a.mean(axis=0, dtype=np.float64),
        b.mean(axis=0, dtype=np.float64),
        low,
        high,
        only_a,
        only_b,
        np.array([mcnemar(*counts) for counts in zip(only_a, only_b, strict=True)]),
        largest_mean_p(np.hstack([sums, -sums])),
    )


# The paper's points ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """J or C of a curve as a layer, and where it is in resampled test sets.

    ``low`` and ``high`` hold the middle 95 % of the resamples that have the point; None if most have none. They hold
    the true point less often than 95 %. ``same`` and ``none`` are shares of resamples: at the same layer, without it.
    """

    layer: int | None
    low: float | None
    high: float | None
    same: float
    none: float


def paper_points(correct: NDArray[Any], groups: NDArray[Any] | None = None) -> dict[str, Point]:
    """Return J and C of a curve, from correct (prompt, layer), with ranges over resampled test prompts or groups."""
    sums, sizes = group_sums(correct, groups)
    curve, resampled = _rates(sums, sizes), resampled_means(sums, sizes=sizes).T
    return {
        "J": _point(jump_layers(curve), jump_layers(resampled)),
        "C": _point(converging_layers(curve), converging_layers(resampled)),
    }


def _point(found: Floats, resampled: Floats) -> Point:
    missing = np.isnan(resampled)
    none, layer = float(np.mean(missing)), None if np.isnan(found) else int(found)
    same = none if layer is None else float(np.mean(resampled == layer))
    if none > 0.5 or missing.all():
        return Point(layer, None, None, same, none)
    low, high = intervals(resampled[~missing][None, :])
    return Point(layer, float(low[0]), float(high[0]), same, none)


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
    if n == 0:
        return np.full(holds.shape[:-1], np.nan)
    index = holds.argmax(axis=-1) if first else n - 1 - holds[..., ::-1].argmax(axis=-1)
    return np.where(holds.any(axis=-1), index + 1.0, np.nan)
