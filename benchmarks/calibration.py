"""Simulate known curves, and count how often tests reject a true hypothesis and intervals contain the true value.

    python benchmarks/calibration.py                 # 2,000 draws of each, about ten minutes on one core
    python benchmarks/calibration.py --draws 200

Curves of accuracy by layer are flat, a step or a ramp. A prompt's correctness is correlated over layers, as in real
data: adjacent layers disagree on 10 to 14 % of the test prompts. The table is in docs/statistics.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from kdb.analysis.curves import converging_layers, depth_90, jump_layers, measure, paper_points
from kdb.analysis.uncertainty import mcnemar, mean_intervals, rank_intervals, resampled_means

N_LAYERS = 24
LEVEL = 0.05
_LAYERS = np.arange(N_LAYERS)
Floats = NDArray[np.float64]

CURVES: dict[str, tuple[Floats, float]] = {
    "flat": (np.full(N_LAYERS, 0.55), 0.55),
    "step": (np.where(_LAYERS < 8, 0.5, 0.8), 0.5),
    "ramp": (np.interp(_LAYERS, [4, 16], [0.5, 0.8]), 0.5),
}
"""True accuracy by layer, and that of the best of two baselines; that of the other is 0.05 less."""

_ADJACENT, _SHARED, _WITH_BASELINE = 0.9, 0.6, 0.2
"""Correlations of the latent score of a prompt: of adjacent layers, of all layers, with the baselines."""

SCORES: dict[str, tuple[Callable[[np.random.Generator, int], Floats], float]] = {
    "gamma, shape 2": (lambda rng, n: rng.gamma(2, size=n), 2.0),
    "gamma, shape 0.5": (lambda rng, n: rng.gamma(0.5, size=n), 0.5),
    "lognormal, sigma 1": (lambda rng, n: rng.lognormal(size=n), float(np.exp(0.5))),
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
}
"""Distributions of skewed scores, each with its mean."""


@dataclass(frozen=True)
class Row:
    """One line of the table: the share of draws in which something held, and the median width of the interval."""

    what: str
    of: str
    n: int
    share: float
    width: float | None = None


def draw_curve(
    rng: np.random.Generator, kind: str, n: int, group: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw correct (prompt, layer) and baselines (prompt, 2); ``group`` prompts in a row share half their variance."""
    accuracy, level = CURVES[kind]
    step = (_ADJACENT - _SHARED) / (1 - _SHARED)
    latent = _noise(rng, n, group, N_LAYERS)
    for layer in range(1, N_LAYERS):
        latent[:, layer] = step * latent[:, layer - 1] + np.sqrt(1 - step**2) * latent[:, layer]
    common = _noise(rng, n, group, 1)
    scores = np.sqrt(_SHARED) * common + np.sqrt(1 - _SHARED) * latent
    words = np.sqrt(_WITH_BASELINE) * common + np.sqrt(1 - _WITH_BASELINE) * _noise(rng, n, group, 2)
    levels = norm.ppf([level, level - 0.05])
    return (scores < norm.ppf(accuracy)).astype(np.float32), (words < levels).astype(np.float32)


def _noise(rng: np.random.Generator, n: int, group: int, m: int) -> Floats:
    if group == 1:
        return rng.normal(size=(n, m))
    shared = np.repeat(rng.normal(size=(n // group, m)), group, axis=0)
    return np.sqrt(0.5) * shared + np.sqrt(0.5) * rng.normal(size=(n, m))


def curve_rows(kind: str, n: int, draws: int, group: int = 1, seed: int = 0) -> list[Row]:
    """Measure ``draws`` curves of one kind, and return how often each test and interval was right."""
    rng = np.random.default_rng([seed, n, group])
    groups = None if group == 1 else np.arange(n) // group
    found = [_tried(*draw_curve(rng, kind, n, group), groups, kind) for _ in range(draws)]
    name = kind if group == 1 else f"{kind}, groups of {group}"
    return list(_summed(found, name, n))


def _tried(
    correct: NDArray[np.float32], baselines: NDArray[np.float32], groups: NDArray[Any] | None, kind: str
) -> dict[str, tuple[bool | None, float]]:
    """Return what one draw gives: for each test whether it rejects, for each interval whether it holds, its width."""
    accuracy, level = CURVES[kind]
    measured, points = measure(correct, baselines, groups), paper_points(correct, groups)
    beside = measured.baseline
    assert beside is not None
    assert measured.p_any_rise is not None
    truly = float(np.mean(accuracy) - level)
    area = (np.nan, np.nan) if beside.area_low is None else (beside.area_low, beside.area_high)
    tried: dict[str, tuple[bool | None, float]] = {
        "p_any_rise < 0.05": (measured.p_any_rise < LEVEL, np.nan),
        "p_beats_baseline < 0.05": (beside.p_value < LEVEL, np.nan),
        "set of best layers": (int(accuracy.argmax()) in measured.best_layers, len(measured.best_layers) / N_LAYERS),
        "area": (area[0] <= truly <= area[1], area[1] - area[0]),
        "J is found": (points["J"].layer is not None, np.nan),
        "McNemar at J < 0.05": (_at_jump(correct, points["J"].layer), np.nan),
        "adjacent layers disagree": (None, float(np.mean(correct[:, 1:] != correct[:, :-1]))),
    }
    if beside.depth_90 is not None and kind != "flat":
        low, high, true = beside.depth_90_low, beside.depth_90_high, int(depth_90(accuracy, np.float64(level)))
        assert low is not None
        assert high is not None
        tried["depth_90"] = (low <= true <= high, (high - low) / N_LAYERS)
    for name, truth in (("J", jump_layers(accuracy)), ("C", converging_layers(accuracy))):
        point = points[name]
        if point.low is not None and point.high is not None and not np.isnan(truth):
            width = (point.high - point.low) / N_LAYERS
            tried[f"range of {name}"] = (bool(point.low <= truth <= point.high), width)
    return tried


def _at_jump(correct: NDArray[np.float32], layer: int | None) -> bool:
    if layer is None:
        return False
    before, after = correct[:, layer - 1], correct[:, layer]
    return mcnemar(int(np.sum(before > after)), int(np.sum(after > before))) < LEVEL


def _summed(found: list[dict[str, tuple[bool | None, float]]], of: str, n: int) -> Iterator[Row]:
    for what in dict.fromkeys(name for tried in found for name in tried):
        held = [tried[what] for tried in found if what in tried]
        widths = [width for _, width in held if not np.isnan(width)]
        share = float(np.mean([right for right, _ in held])) if held[0][0] is not None else np.nan
        yield Row(what, of, n, share, float(np.median(widths)) if widths else None)


def mean_rows(name: str, n: int, draws: int, seed: int = 0) -> list[Row]:
    """Return how often intervals of means of ``n`` scores hold the true mean, and ranges of ranks the true rank.

    The rank is that of the second of three items whose means are 1.2, 1 and 0.8 times that of the distribution, or for
    the normal one, 0.2, 0 and -0.2.
    """
    draw, mean = SCORES[name]
    rng = np.random.default_rng([seed, n])
    low, high = mean_intervals(draw(rng, n * draws).reshape(n, draws))
    given = ~np.isnan(low)
    held = (low <= mean) & (mean <= high)
    rows = [Row("mean", name, n, float(held[given].mean()), float(np.median((high - low)[given])))]
    ranks = [_rank(draw(rng, n * 3).reshape(n, 3), mean) for _ in range(draws)]
    return [*rows, Row("rank", name, n, float(np.mean([r for r, _ in ranks])), float(np.mean([w for _, w in ranks])))]


def _rank(scores: Floats, mean: float) -> tuple[bool, int]:
    moved = scores * np.array([1.2, 1, 0.8]) if mean else scores + np.array([0.2, 0, -0.2])
    low, high = rank_intervals(resampled_means(moved), [1])
    return bool(low[0] <= 2 <= high[0]), int(high[0] - low[0]) + 1


def table(draws: int) -> Iterator[Row]:
    """Yield all lines."""
    for kind in CURVES:
        for n in (100, 200, 600):
            yield from curve_rows(kind, n, draws)
    for kind in CURVES:
        yield from curve_rows(kind, 200, draws, group=2)
        yield from curve_rows(kind, 320, draws, group=16)
    for name in SCORES:
        for n in (5, 10, 20, 50, 200):
            yield from mean_rows(name, n, draws)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="simulated test sets of each kind")
    print("| curve or scores | n | what | share of draws (%) | width |\n| --- | --- | --- | --- | --- |")
    for row in table(parser.parse_args().draws):
        width = "" if row.width is None else f"{row.width:.2f}"
        share = "" if np.isnan(row.share) else f"{100 * row.share:.1f}"
        print(f"| {row.of} | {row.n} | {row.what} | {share} | {width} |", flush=True)


if __name__ == "__main__":
    main()
