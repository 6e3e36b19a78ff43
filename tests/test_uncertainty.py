"""Intervals and verdicts: against scipy, against the SQL that they resample, and on warehouses made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers.curves import curve_rows, prediction_rows, warehouse_of
from helpers.stored import add_run, create_lake
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from kdb.analysis.depth import verdicts
from kdb.analysis.uncertainty import (
    converging_layers,
    depth_intervals,
    intervals,
    jump_layers,
    mcnemar,
    rank_intervals,
    resampled_means,
    with_intervals,
)
from kdb.warehouse.database import Database
from kdb.warehouse.store import Warehouse

# Resampling ------------------------------------------------------------------------------------------------------


def test_intervals_of_means_are_scipys_percentile_intervals() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=(40, 3))
    low, high = intervals(resampled_means(values, 4000))
    for column in range(3):
        theirs = bootstrap((values[:, column],), np.mean, n_resamples=4000, method="percentile").confidence_interval
        width = theirs.high - theirs.low
        assert low[column] == pytest.approx(theirs.low, abs=0.08 * width)
        assert high[column] == pytest.approx(theirs.high, abs=0.08 * width)


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=2), min_size=1, max_size=20))
@settings(deadline=None)
def test_a_resampled_mean_lies_between_the_smallest_and_the_largest_value(rows: list[list[float]]) -> None:
    values = np.array(rows, dtype=np.float32)
    means = resampled_means(values, 50)
    assert (means >= values.min(axis=0)[:, None] - 1e-5).all()
    assert (means <= values.max(axis=0)[:, None] + 1e-5).all()


def test_columns_are_resampled_together() -> None:
    values = np.random.default_rng(0).normal(size=(30, 1))
    means = resampled_means(np.hstack([values, values + 1.0]))
    np.testing.assert_allclose(means[1] - means[0], 1.0, atol=1e-6)


def test_a_rank_that_no_resample_changes_has_an_interval_of_one_place() -> None:
    clear = np.array([[3.0, 2.0, 1.0]] * 10)
    low, high = rank_intervals(resampled_means(clear), [0, 1, 2])
    assert low.tolist() == high.tolist() == [1, 2, 3]


def test_two_that_change_places_share_the_interval_of_their_ranks() -> None:
    values = np.array([[1.0, 0.0, -9.0], [0.0, 1.0, -9.0]] * 10)
    low, high = rank_intervals(resampled_means(values), [0, 1])
    assert (low.tolist(), high.tolist()) == ([1, 1], [2, 2])


def test_a_prompt_without_an_item_counts_0_in_its_interval() -> None:
    scores = pl.DataFrame(
        {"g": "x", "dataset": "d", "prompt_id": [0, 1, 1], "item": ["a", "a", "b"], "score": [2.0, 2.0, 4.0]}
    )
    ranking = pl.DataFrame({"g": ["x", "x"], "item": ["a", "b"], "score": [2.0, 2.0]})
    found = with_intervals(ranking, scores, ["g"], "item")
    assert found.select("low", "high").rows() == [(2.0, 2.0), (0.0, 4.0)]


def test_mcnemar_is_a_fair_coin_over_the_prompts_that_one_alone_gets_right() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 1) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)


@given(st.integers(0, 60), st.integers(1, 60))
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    assert mcnemar(only_a, only_b) == pytest.approx(float(binomtest(only_a, only_a + only_b).pvalue))


# J and C ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.55, 0.6, 0.61, 0.9, 1.0]), min_size=2, max_size=8))
@settings(deadline=None, max_examples=25)
def test_resampled_points_follow_the_same_rule_as_the_sql(
    tmp_path_factory: pytest.TempPathFactory, accuracies: list[float]
) -> None:
    lake = create_lake(tmp_path_factory.mktemp("curve"))
    add_run(lake, "m", "d", "e" * 16, models=[{"n_layers": len(accuracies)}], probe_scores=curve_rows(accuracies))
    with Database(lake) as database:
        row = database.sql("SELECT jump_layer, converging_layer FROM concept_depth()").row(0)
    curve = np.array(accuracies)
    found = [None if np.isnan(layer) else int(layer) for layer in (jump_layers(curve), converging_layers(curve))]
    assert found == list(row)


def test_a_jump_that_every_resample_has_is_certain(tmp_path: Path) -> None:
    correct = [[1, 0] * 50, [1, 0] * 50, [1] * 100]
    wh = warehouse_of(tmp_path, curve_rows([0.5, 0.5, 1.0]), prediction_rows(correct), 3)
    jump, _ = depth_intervals(wh).rows(named=True)
    assert (jump["point"], jump["layer"], jump["same_percent"], jump["none_percent"]) == ("J", 2.0, 100.0, 0.0)
    assert jump["low_percent"] == jump["high_percent"] == pytest.approx(200 / 3)
    assert jump["jump_p_value"] < 1e-10


def test_a_curve_that_never_jumps_has_no_interval_and_says_how_sure_that_is(tmp_path: Path) -> None:
    flat = [[1, 0] * 50] * 3
    wh = warehouse_of(tmp_path, curve_rows([0.5] * 3), prediction_rows(flat), 3)
    jump, end = depth_intervals(wh).rows(named=True)
    assert (jump["layer"], jump["low_percent"], jump["none_percent"], jump["same_percent"]) == (None, None, 100, 100)
    assert end["layer"] == 2.0


def verdict(wh: Warehouse) -> dict[str, Any]:
    return dict(verdicts(wh).select("point", "hangs_on").rows())


def test_a_clear_jump_to_a_plateau_holds(tmp_path: Path) -> None:
    correct = [[1, 0] * 50, [1, 0] * 50, *([[1] * 100] * 4), [1, 0] * 50]
    accuracies = [0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    wh = warehouse_of(tmp_path, curve_rows(accuracies), prediction_rows(correct), 7)
    assert verdict(wh) == {"J": "", "C": ""}


def test_a_jump_that_another_probe_or_split_does_not_have_hangs_on_them(tmp_path: Path) -> None:
    correct = [[1, 0] * 50, [1] * 100, [1] * 100, [1, 0] * 50]
    curves = curve_rows([0.5, 1.0, 1.0, 0.5])
    curves += curve_rows([0.5] * 4, classifier="logistic-paper") + curve_rows([0.5] * 4, split="grouped")
    wh = warehouse_of(tmp_path, curves, prediction_rows(correct), 4)
    assert set(verdict(wh)["J"].split(", ")) >= {"classifier", "split"}


def test_a_jump_up_to_chance_is_named_so_and_a_last_layer_as_its_definition(tmp_path: Path) -> None:
    correct = [[1, 0, 0, 0] * 25, [1, 0] * 50, [1, 0] * 50]
    wh = warehouse_of(tmp_path, curve_rows([0.25, 0.5, 0.5]), prediction_rows(correct), 3)
    assert verdict(wh) == {"J": "chance", "C": "its definition"}
