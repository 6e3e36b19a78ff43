"""Intervals, tests and verdicts: against scipy, against known truth, and on warehouses made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers.curves import baseline_rows, curve_rows, prediction_rows, warehouse_of
from helpers.stored import add_run, create_lake
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, spearmanr

from kdb.analysis.curves import converging_layers, indistinguishable, jump_layers, measure, paper_points
from kdb.analysis.depth_measures import depth_intervals, disagreements, spans, summary, verdicts
from kdb.analysis.prompt_means import with_intervals
from kdb.analysis.uncertainty import (
    MIN_PROMPTS,
    group_sums,
    intervals,
    largest_mean_p,
    mcnemar,
    mean_intervals,
    rank_intervals,
    resampled_means,
    spearman,
    spearman_interval,
)
from kdb.warehouse.database import Database
from kdb.warehouse.store import Warehouse

# Resampling ------------------------------------------------------------------------------------------------------


def test_ranges_of_resampled_means_are_scipys_percentile_intervals() -> None:
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


def test_below_five_prompts_there_is_no_interval_of_a_mean_or_rank() -> None:
    for n in (1, 4, MIN_PROMPTS):
        scores = pl.DataFrame(
            [("x", "d", i, item, float(i + shift)) for i in range(n) for item, shift in (("a", 0), ("b", 9))],
            schema=["g", "dataset", "prompt_id", "item", "score"],
            orient="row",
        )
        ranking = pl.DataFrame({"g": ["x", "x"], "item": ["b", "a"]})
        ends = with_intervals(ranking, scores, ["g"], "item").select("low", "high", "rank_low", "rank_high")
        assert ends.null_count().sum_horizontal().item() == (8 if n < 5 else 0)


def test_a_prompt_without_an_item_counts_0_in_its_interval() -> None:
    some = [("x", "d", i, "a", float(i)) for i in range(10)] + [("x", "d", i, "b", float(i)) for i in range(5, 10)]
    every = some + [("x", "d", i, "b", 0.0) for i in range(5)]
    ranking = pl.DataFrame({"g": ["x", "x"], "item": ["a", "b"]})
    found = [
        with_intervals(
            ranking, pl.DataFrame(rows, ["g", "dataset", "prompt_id", "item", "score"], orient="row"), ["g"], "item"
        )
        for rows in (some, every)
    ]
    assert found[0].equals(found[1])
    assert found[0].null_count().sum_horizontal().item() == 0


def test_intervals_of_skewed_means_hold_the_truth_where_percentiles_of_means_do_not() -> None:
    values = np.random.default_rng(0).gamma(0.5, size=(10, 600))
    low, high = mean_intervals(values)
    assert np.mean((low <= 0.5) & (high >= 0.5)) > 0.9
    low, high = intervals(resampled_means(values))
    assert np.mean((low <= 0.5) & (high >= 0.5)) < 0.9


def test_a_mean_has_no_interval_where_its_spread_is_not_known() -> None:
    equal, once = np.full(20, 0.3), np.eye(20)[0]
    spread = np.arange(20.0)
    low, high = mean_intervals(np.stack([equal, once, spread], axis=1))
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True, True, False]


def test_many_columns_have_the_intervals_that_each_has_alone() -> None:
    values = np.random.default_rng(0).normal(size=(6, 1500))
    low, high = mean_intervals(values)
    alone = mean_intervals(values[:, [1400]])
    assert (low[1400], high[1400]) == pytest.approx((alone[0][0], alone[1][0]))


def test_prompts_of_one_group_count_once() -> None:
    values = np.random.default_rng(0).normal(size=(30, 1))
    twice, groups = np.repeat(values, 2, axis=0), np.repeat(np.arange(30), 2)
    alone, grouped = mean_intervals(values), mean_intervals(*group_sums(twice, groups))
    assert grouped[0] == pytest.approx(alone[0], rel=1e-5)
    assert grouped[1] == pytest.approx(alone[1], rel=1e-5)
    ungrouped = mean_intervals(twice)
    assert ungrouped[1] - ungrouped[0] < 0.8 * (grouped[1] - grouped[0])


# Tests -----------------------------------------------------------------------------------------------------------


def test_a_large_mean_is_found_and_its_sign_matters() -> None:
    differences = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    assert largest_mean_p(differences + np.float32([0, 0, 1, 0, 0, 0])) == 1 / 1001
    assert largest_mean_p(differences - np.float32(1)) == 1.0


def test_a_tie_counts_against_a_rise() -> None:
    assert largest_mean_p(np.zeros((9, 3), dtype=np.float32)) == 1.0


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
    assert jump["p_any_rise"] == 1 / 1001
    assert (jump["point"], jump["layer"], jump["same_percent"], jump["none_percent"]) == ("J", 2.0, 100.0, 0.0)
    assert jump["low_percent"] == jump["high_percent"] == pytest.approx(200 / 3)


def test_a_curve_that_never_jumps_has_no_interval_and_says_how_sure_that_is(tmp_path: Path) -> None:
    flat = [[1, 0] * 50] * 3
    wh = warehouse_of(tmp_path, curve_rows([0.5] * 3), prediction_rows(flat), 3)
    jump, end = depth_intervals(wh).rows(named=True)
    assert (jump["layer"], jump["low_percent"], jump["none_percent"], jump["same_percent"]) == (None, None, 100, 100)
    assert end["layer"] == 2.0


def test_a_point_that_most_resamples_lack_has_no_range() -> None:
    rng = np.random.default_rng(1)
    hits, rest = np.tile([[1, 1]], (100, 1)), np.tile([[0, 0]], (92, 1))
    nearly = np.vstack([hits, np.tile([[0, 1]], (8, 1)), rest])  # 108 / 100: no jump, which some resamples have
    point = paper_points(rng.permutation(nearly))["J"]
    assert (point.layer, point.low, point.high) == (None, None, None)
    assert 0.5 < point.none < 1


def verdict(wh: Warehouse) -> dict[str, Any]:
    return dict(verdicts(wh).select("point", "depends_on").rows())


def test_a_clear_jump_to_a_plateau_holds(tmp_path: Path) -> None:
    correct = [[1, 0] * 50, [1, 0] * 50, *([[1] * 100] * 4), [1, 0] * 50]
    accuracies = [0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    wh = warehouse_of(tmp_path, curve_rows(accuracies), prediction_rows(correct), 7)
    assert verdict(wh) == {"J": "", "C": ""}


def test_a_jump_that_another_probe_or_split_does_not_have_depends_on_them(tmp_path: Path) -> None:
    correct = [[1, 0] * 50, [1] * 100, [1] * 100, [1, 0] * 50]
    curves = curve_rows([0.5, 1.0, 1.0, 0.5])
    curves += curve_rows([0.5] * 4, classifier="logistic-paper") + curve_rows([0.5] * 4, split="grouped")
    wh = warehouse_of(tmp_path, curves, prediction_rows(correct), 4)
    assert set(verdict(wh)["J"].split(", ")) >= {"classifier", "split"}


def test_a_jump_up_to_chance_is_named_so_and_a_last_layer_as_its_definition(tmp_path: Path) -> None:
    correct = [[1, 0, 0, 0] * 25, [1, 0] * 50, [1, 0] * 50]
    wh = warehouse_of(tmp_path, curve_rows([0.25, 0.5, 0.5]), prediction_rows(correct), 3)
    assert verdict(wh) == {"J": "chance", "C": "its definition"}


# Measures of a curve ---------------------------------------------------------------------------------------------


def rows_right(*counts: int, n: int = 100) -> list[list[int]]:
    """A list for each layer: so many of the first of n prompts are right."""
    return [[1] * count + [0] * (n - count) for count in counts]


def test_a_step_is_measured_against_the_best_baseline() -> None:
    correct = np.array(rows_right(50, 50, 90, 92, 91)).T
    baselines = np.array(rows_right(40, 50)).T
    found = measure(correct, baselines)
    assert (found.best_layer, found.best_accuracy, found.n_prompts, found.n_groups) == (3, 0.92, 100, None)
    assert found.first_within == 2
    assert found.best_layers == (2, 3, 4)
    assert found.p_any_rise == 1 / 1001
    beside = found.baseline
    assert beside is not None
    assert (beside.index, beside.accuracy, beside.p_value) == (1, 0.5, 1 / 1001)
    assert (beside.depth_90_low, beside.depth_90, beside.depth_90_high) == (2, 2, 3)
    assert beside.area == pytest.approx((0 + 0 + 0.4 + 0.42 + 0.41) / 5)


def test_a_layer_far_below_the_best_is_told_from_it() -> None:
    draws = np.random.default_rng(0).normal(0, 0.01, size=(3, 500)) + np.array([[0.5], [0.79], [0.8]])
    assert indistinguishable(np.array([0.5, 0.79, 0.8]), draws) == (1, 2)


def test_a_flat_curve_has_no_depth_90_although_its_best_layer_is_above_the_baseline(tmp_path: Path) -> None:
    correct = np.random.default_rng(0).integers(0, 2, size=(6, 100)).tolist()
    baseline = [1, 0] * 50
    accuracies = [sum(rights) / 100 for rights in correct]
    assert max(accuracies) > 0.5
    wh = warehouse_of(tmp_path, curve_rows(accuracies), prediction_rows(correct), 6, **baseline_rows(baseline))
    row = summary(wh).row(0, named=True)
    assert (row["depth_90_layer"], row["depth_90_low"]) == (None, None)
    assert row["p_beats_baseline"] > 0.05
    assert row["p_any_rise"] > 0.05
    assert row["area_low"] < row["area"] < row["area_high"]


def test_measures_of_a_stored_run_stand_beside_j_and_c(tmp_path: Path) -> None:
    correct, baseline = rows_right(50, 50, 90, 92, 91), rows_right(50)[0]
    groups = [{"prompt_id": i, "label": i % 2, "group_id": f"g{i // 2}"} for i in range(100)]
    accuracies = [sum(rights) / 100 for rights in correct]
    more = baseline_rows(baseline) | {"prompts": groups}
    wh = warehouse_of(tmp_path, curve_rows(accuracies), prediction_rows(correct), 5, **more)
    row = summary(wh).row(0, named=True)
    assert (row["n_test"], row["n_groups"], row["best_layer"], row["best_layers"]) == (100, 50, 3, "2–4")
    assert (row["depth_90_percent"], row["baseline"], row["jump_percent"]) == (40.0, "words", 40.0)
    assert row["p_beats_baseline"] == row["p_any_rise"] == 1 / 1001


def test_a_run_without_baselines_or_predictions_keeps_what_its_accuracies_say(tmp_path: Path) -> None:
    wh = warehouse_of(tmp_path, curve_rows([0.5, 0.9]), [], 2)
    row = summary(wh).row(0, named=True)
    assert (row["best_layer"], row["p_beats_baseline"], row["depth_90_layer"], row["area"]) == (1, None, None, None)


def test_probes_that_disagree_on_j_are_named(tmp_path: Path) -> None:
    curves = curve_rows([0.5, 0.9, 0.9]) + curve_rows([0.5, 0.5, 0.9], classifier="logistic")
    wh = warehouse_of(tmp_path, curves, prediction_rows(rows_right(50, 90, 90)), 3)
    jump, end = disagreements(wh).rows(named=True)
    assert (jump["logistic-raw"], jump["agree"]) == (pytest.approx(100 / 3), False)
    assert jump["logistic"] == pytest.approx(200 / 3)
    assert (end["point"], end["agree"]) == ("C", False)


def test_consecutive_layers_are_joined() -> None:
    assert spans([]) == ""
    assert spans([3, 7, 8, 9, 11]) == "3, 7–9, 11"


def test_the_rank_correlation_of_means_is_that_of_scipy_with_ties_too() -> None:
    a, b = np.array([1.0, 2, 2, 5, 0]), np.array([3.0, 1, 4, 4, 0])
    assert float(spearman(a, b)) == pytest.approx(spearmanr(a, b).statistic)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_the_interval_of_a_rank_correlation_holds_the_truth_and_needs_five_prompts() -> None:
    """Scores and effects of 60 parts, each a true mean plus noise that both share in part, in 8 or 20 prompts."""
    rng, covered = np.random.default_rng(7), []
    for n, correlation in [(8, 0.0), (8, 0.5), (20, 0.0), (20, 0.5)] * 50:
        true = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], 60)
        noise = rng.multivariate_normal([0, 0], [[1, 0.3], [0.3, 1]], (n, 60))
        score, effect = np.moveaxis(true + noise, -1, 0)
        low, high = spearman_interval(score, effect)
        covered.append(low <= float(spearman(*true.T)) <= high)
        assert -1 <= low <= high <= 1
    assert np.mean(covered) >= 0.9
    assert np.isnan(spearman_interval(score[:4], effect[:4])).all()
