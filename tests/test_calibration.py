"""Tests and intervals on simulations of known truth: a small benchmarks/calibration.py, with generous bounds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import calibration

pytestmark = pytest.mark.slow

DRAWS = 120


def shares(kind: str, n: int, group: int = 1) -> dict[str, float]:
    """Percentage of simulated curves in which each test rejects, or each interval holds the truth."""
    return {row.what: 100 * row.share for row in calibration.curve_rows(kind, n, DRAWS, group)}


@pytest.mark.parametrize("group", [1, 2])
def test_on_a_flat_curve_tests_after_selection_seldom_reject_where_a_jump_is_often_found(group: int) -> None:
    found = shares("flat", 100, group)
    assert found["p_any_rise < 0.05"] < 12
    assert found["p_beats_baseline < 0.05"] < 12
    assert found["area"] > 85
    assert found["set of best layers"] > 85
    assert found["J is found"] > 60
    assert "depth_90" not in found


@pytest.mark.parametrize(("kind", "n"), [("step", 100), ("ramp", 200)])
def test_on_a_rising_curve_intervals_hold_the_truth(kind: str, n: int) -> None:
    found = shares(kind, n)
    assert found["p_beats_baseline < 0.05"] == 100
    assert min(found["depth_90"], found["area"], found["set of best layers"]) > 83
    if kind == "step":
        assert found["p_any_rise < 0.05"] > 90


def test_adjacent_layers_disagree_on_as_many_prompts_as_in_real_data() -> None:
    for kind in calibration.CURVES:
        rows = calibration.curve_rows(kind, 200, 10)
        width = next(row.width for row in rows if row.what == "adjacent layers disagree")
        assert width is not None
        assert 0.10 <= width <= 0.145


@pytest.mark.parametrize("name", calibration.SCORES)
@pytest.mark.parametrize("n", [5, 20])
def test_intervals_of_means_of_few_scores_hold_the_truth(name: str, n: int) -> None:
    mean, rank = calibration.mean_rows(name, n, 300)
    assert mean.share > 0.84
    assert rank.share > 0.88
