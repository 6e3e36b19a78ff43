"""Intervals and tests of means over prompts, by resampling: arrays in, arrays out.

Every interval says how much a number may change with other prompts of the same kind. ``benchmarks/calibration.py``
measures how often the intervals hold a known truth; its table is in ``docs/statistics.md``.

    low, high = mean_intervals(scores)    # scores (prompt, item)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr
from scipy.stats import norm, rankdata
from scipy.stats import t as student

Floats = NDArray[np.float64]

N_RESAMPLES = 1000
MIN_PROMPTS = 5
"""Fewest prompts from which an interval is computed: with fewer, none of the methods tried holds what it promises."""

_SEED = 2024
_LEVEL = (0.025, 0.975)
_CHUNK = 1024
"""Columns for which intervals are computed together, which bounds the memory."""


# Resampling ------------------------------------------------------------------------------------------------------


def resampled_means(
    values: NDArray[Any], n_resamples: int = N_RESAMPLES, *, sizes: NDArray[Any] | None = None
) -> Floats:
    """Return means (m, n_resamples) of the columns of ``values`` (n, m) over rows drawn with replacement.

    All columns use the same draws, so that differences and ranks between columns can be computed from the result. A
    draw is the count of each row, so the means of all columns are one matrix product, while scipy.stats.bootstrap
    gathers rows. With ``sizes`` (n,), rows are sums over groups of so many prompts, and groups are drawn.
    """
    draws = _draws(len(values), n_resamples)
    drawn = np.float64(len(values)) if sizes is None else (draws @ sizes.astype(np.float32))[:, None]
    means: Floats = (draws @ values / drawn).T
    return means


@functools.lru_cache(maxsize=12)
def _draws(n: int, n_resamples: int) -> NDArray[np.float32]:
    """Return the count of each of n rows in each resample (n_resamples, n); the same for all inputs with n rows."""
    rng = np.random.default_rng(_SEED)
    counts = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(n_resamples)]
    return np.stack(counts).astype(np.float32)


def group_sums(values: NDArray[Any], groups: NDArray[Any] | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the sums of ``values`` (n, m) over the rows of each group, and the groups' sizes.

    Without groups, each row is its own.
    """
    if groups is None:
        return values.astype(np.float32), np.ones(len(values), dtype=np.float32)
    _, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((int(index.max()) + 1, values.shape[1]), dtype=np.float32)
    np.add.at(sums, index, values)
    return sums, np.bincount(index).astype(np.float32)


# Intervals -------------------------------------------------------------------------------------------------------


def intervals(resampled: Floats, n: int | None = None) -> tuple[Floats, Floats]:
    """Return the range that holds the middle 95 % of each row of ``resampled`` (m, n_resamples).

    With ``n``, the number of rows that were resampled, it is wider for few, as an interval of Student's t is for few
    values (Hesterberg 2015, section 5.3).
    """
    tail = _LEVEL[0] if n is None else float(norm.cdf(student.ppf(_LEVEL[0], n - 1) * np.sqrt(n / (n - 1))))
    low, high = np.quantile(resampled, (tail, 1 - tail), axis=1)
    return low, high


def mean_intervals(values: NDArray[Any], sizes: NDArray[Any] | None = None) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % interval of the mean of each column of ``values`` (n, m), by the bootstrap-t.

    Each resampled mean is studentised by its own standard error (Efron and Tibshirani 1993, chapter 12), which holds
    for skewed scores, where percentiles of the means are too narrow. The ends are NaN below MIN_PROMPTS rows, where
    all rows are equal, and where so few rows differ from the others that many resamples have none of them.
    With ``sizes`` (n,), rows are sums over groups of so many prompts, and the mean is that over prompts.
    """
    n, m = values.shape
    if n < MIN_PROMPTS:
        return np.full(m, np.nan), np.full(m, np.nan)
    sizes = np.ones(n) if sizes is None else sizes.astype(np.float64)
    parts = [_studentised(values[:, i : i + _CHUNK], sizes) for i in range(0, m, _CHUNK)]
    low, high = np.concatenate(parts, axis=1) if parts else np.empty((2, 0))
    return low, high


def _studentised(values: NDArray[Any], sizes: Floats) -> Floats:
    """Return the two ends of the bootstrap-t intervals (2, m)."""
    means = values.sum(axis=0, dtype=np.float64) / sizes.sum()
    residuals = values - means * sizes[:, None]
    errors = _standard_errors(np.ones((1, len(sizes))), residuals, sizes)[1][0]
    moved, spread = _standard_errors(_draws(len(sizes), N_RESAMPLES).astype(np.float64), residuals, sizes)
    none = spread <= 1e-9 * np.abs(residuals).max(axis=0)
    t = np.where(none, np.where(moved == 0, 0.0, np.copysign(np.inf, moved)), moved / np.where(none, 1.0, spread))
    tail = float(norm.cdf(norm.ppf(_LEVEL[0]) * np.sqrt(len(sizes) / (len(sizes) - 1))))
    low, high = np.quantile(t, tail, axis=0, method="lower"), np.quantile(t, 1 - tail, axis=0, method="higher")
    given = (errors > 1e-9 * np.abs(means)) & np.isfinite(low) & np.isfinite(high)
    low, high = np.where(given, low, 0), np.where(given, high, 0)
    return np.where(given, np.stack([means - high * errors, means - low * errors]), np.nan)


def _standard_errors(weights: Floats, residuals: Floats, sizes: Floats) -> tuple[Floats, Floats]:
    """Return the weighted means (b, m) of residuals (n, m), and their standard errors; ``weights`` is (b, n).

    Those of a ratio of sums, which for groups of one prompt are those of a mean.
    """
    total, n = (weights @ sizes)[:, None], len(sizes)
    mean = weights @ residuals / total
    squares = weights @ residuals**2 - 2 * mean * (weights @ (residuals * sizes[:, None]))
    squares += mean**2 * (weights @ sizes**2)[:, None]
    return mean, np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / total


def rank_intervals(resampled: Floats, rows: Sequence[int]) -> tuple[Floats, Floats]:
    """Return the ends of the middle 95 % of the ranks of each of ``rows`` among all, from 1 for the largest."""
    ranks = np.stack([1 + (resampled > resampled[row]).sum(axis=0) for row in rows])
    low, high = np.quantile(ranks, _LEVEL, axis=1, method="closest_observation")
    return low, high


# Rank correlation ------------------------------------------------------------------------------------------------


def spearman(a: Floats, b: Floats) -> Floats:
    """Return the rank correlations of the last axis of two arrays (…, m); NaN where all of a row are equal."""
    ranks = [rankdata(values, axis=-1) for values in (a, b)]
    x, y = (each - each.mean(axis=-1, keepdims=True) for each in ranks)
    sizes = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    with np.errstate(invalid="ignore"):
        correlations: Floats = (x * y).sum(axis=-1) / sizes
    return correlations


def spearman_interval(a: NDArray[Any], b: NDArray[Any]) -> tuple[float, float]:
    """Return the ends of the 95 % interval of the rank correlation of the means of ``a`` and ``b`` (n, m) over n rows.

    Both means come from the same resampled rows. Noise pulls a rank correlation towards that of the noise, and
    resampling does so once more: percentiles of the resamples lie beyond the estimate, and often miss the truth. The
    interval holds them and their mirror image at the estimate (the basic bootstrap). NaN below MIN_PROMPTS rows.
    """
    if len(a) < MIN_PROMPTS or a.shape[1] < 3:
        return np.nan, np.nan
    estimate = float(spearman(a.mean(axis=0), b.mean(axis=0)))
    resampled = spearman(resampled_means(a).T, resampled_means(b).T)[None]
    low, high = (float(end[0]) for end in intervals(resampled, len(a)))
    return max(-1.0, min(low, 2 * estimate - high)), min(1.0, max(high, 2 * estimate - low))


# Tests -----------------------------------------------------------------------------------------------------------


def largest_mean_p(differences: NDArray[Any]) -> float:
    """Return the p-value of the largest mean among the columns of ``differences`` (n, m), by flips of rows' signs.

    Tests whether any column's mean is above 0, after the choice of the largest. The sign of a whole row is flipped, so
    the columns keep their correlation; p = (1 + count) / (1 + draws), where count is the number of draws whose largest
    mean is not smaller. Rows are prompts, or sums over groups of prompts.
    """
    largest = differences.sum(axis=0, dtype=np.float64).max()
    flipped = (_signs(len(differences), N_RESAMPLES) @ differences).max(axis=1)
    return float((1 + np.sum(flipped >= largest)) / (1 + N_RESAMPLES))


@functools.lru_cache(maxsize=12)
def _signs(n: int, n_draws: int) -> NDArray[np.float32]:
    """Return signs 1 or -1 of each of n rows in each draw (n_draws, n); the same for all inputs with n rows."""
    rng = np.random.default_rng(_SEED + 1)
    return (2 * rng.integers(2, size=(n_draws, n)) - 1).astype(np.float32)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact p-value of McNemar's test: ``only_a`` prompts are right only in a, ``only_b`` only in b."""
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
