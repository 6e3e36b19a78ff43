"""kdb compare: what differs between two runs, on runs made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from helpers.stored import Rows, add_run, create_lake
from helpers.synthetic import write_manifests

from kdb.analysis.compare import (
    accuracy_differences,
    compared_rows,
    differing_settings,
    find_runs,
    moved_numbers,
)
from kdb.errors import QueryError, UnknownNameError
from kdb.warehouse.schema import SCHEMA_VERSION
from kdb.warehouse.store import Warehouse

A, B, OTHER = "aa11" + "0" * 12, "aa22" + "0" * 12, "bb33" + "0" * 12


def score(layer: int, accuracy: float, split: str = "paper", **more: object) -> dict[str, object]:
    place = {"layer": layer, "site": "resid_post", "classifier": "logistic", "split": split}
    return place | {"accuracy": accuracy, "n_test": 10} | more


def prediction(prompt: int, correct: bool) -> dict[str, object]:
    place = {"layer": 0, "site": "resid_post", "classifier": "logistic", "split": "paper"}
    return {"prompt_id": prompt, "predicted": int(correct), "correct": correct} | place


def neuron(head: int | None, value: float) -> dict[str, object]:
    return {
        "prompt_id": 0,
        "component": "attn" if head else "ffn",
        "layer": 1,
        "head": head,
        "neuron": 5,
        "position": None,
        "score": value,
        "exact": True,
    }


@pytest.fixture(scope="module")
def wh(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    folder = tmp_path_factory.mktemp("compare")
    lake = create_lake(folder)
    models: Rows = [{"n_layers": 2, "family": "f", "dtype": "float32"}]
    add_run(
        lake,
        "m",
        "d",
        A,
        models=models,
        datasets=[{"fingerprint": "x"}],
        runs=[{"settings": '{"seed": 1, "store": "float32"}', "kdb_version": "1"}],
        probe_scores=[score(0, 0.5), score(1, 0.8, auc=0.9), score(1, 0.7, split="grouped")],
        probe_predictions=[prediction(i, i < 2) for i in range(8)],
        neuron_scores=[neuron(None, 1.0), neuron(3, 2.0)],
    )
    add_run(
        lake,
        "m",
        "d",
        B,
        models=models,
        datasets=[{"fingerprint": "x"}],
        runs=[{"settings": '{"seed": 2, "store": "float32"}', "kdb_version": "1"}],
        probe_scores=[score(0, 0.6), score(1, 0.8)],
        probe_predictions=[prediction(i, i >= 2) for i in range(8)],
        neuron_scores=[neuron(None, 1.5), neuron(3, 2.0)],
    )
    add_run(lake, "m", "other", OTHER, models=models, datasets=[{"fingerprint": "y"}], checks=[{"check": "c"}])
    (folder / "warehouse.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}}}')
    write_manifests(folder)
    return Warehouse(folder)


def test_settings_that_differ_are_named_and_no_others(wh: Warehouse) -> None:
    found = differing_settings(wh, A, B)
    assert found.rows() == [("run", A, B), ("seed", "1", "2")]


def test_numbers_that_moved_come_largest_first_with_their_key(wh: Warehouse) -> None:
    moved = moved_numbers(wh, A, B).filter(table="probe_scores")
    place = "site=resid_post classifier=logistic split=paper"
    assert moved.select("key", "column", "a", "b").rows() == [
        (f"layer=0 {place}", "accuracy", 0.5, 0.6),
        (f"layer=1 {place}", "auc", 0.9, None),
    ]
    assert moved["change_percent"][0] == pytest.approx(100 * 0.1 / 0.8)


def test_a_key_that_is_null_in_both_runs_is_the_same_row(wh: Warehouse) -> None:
    moved = moved_numbers(wh, A, B).filter(table="neuron_scores")
    assert moved.select("key", "column", "difference").rows() == [
        ("prompt_id=0 component=ffn layer=1 neuron=5", "score", 0.5)
    ]


def test_rows_that_one_run_lacks_are_counted(wh: Warehouse) -> None:
    assert compared_rows(wh, A, B).rows() == [
        ("probe_scores", 2, 1, 0),
        ("probe_predictions", 8, 0, 0),
        ("neuron_scores", 2, 0, 0),
    ]


def test_a_run_is_no_different_from_itself(wh: Warehouse) -> None:
    assert moved_numbers(wh, A, A).is_empty()
    assert differing_settings(wh, A, A).is_empty()


def test_accuracies_on_the_same_prompts_are_tested(wh: Warehouse) -> None:
    row = accuracy_differences(wh, A, B).row(0, named=True)
    assert (row["accuracy_a"], row["accuracy_b"], row["only_a"], row["only_b"]) == (0.25, 0.75, 2, 6)
    assert row["p_value"] == pytest.approx(2 * (1 + 8 + 28) / 2**8)
    assert accuracy_differences(wh, A, OTHER).is_empty()


def test_runs_are_found_by_their_first_digits(wh: Warehouse) -> None:
    assert find_runs(wh, "aa2", "b") == [B, OTHER]
    with pytest.raises(QueryError, match="aa11000000000000, aa22000000000000"):
        find_runs(wh, "aa")
    with pytest.raises(UnknownNameError, match="Unknown run 'zz'"):
        find_runs(wh, "zz")


def test_runs_with_nothing_in_common_are_refused(wh: Warehouse) -> None:
    with pytest.raises(QueryError, match="have no table in common"):
        moved_numbers(wh, A, OTHER)


def test_compare_prints_settings_numbers_and_tests(
    wh: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    result = run_kdb("compare", "aa1", "aa2", "--warehouse", wh.storage.local.path)
    assert result.exit_code == 0, result.output
    for heading in ("Settings that differ: 2", "Matched rows", "Numbers that changed", "McNemar"):
        assert heading in result.stdout
    whole = tmp_path / "moved.csv"
    assert run_kdb("compare", "aa1", "aa2", "-o", whole, "--warehouse", wh.storage.local.path).exit_code == 0
    assert len(whole.read_text().splitlines()) == 1 + len(moved_numbers(wh, A, B))
    assert run_kdb("compare", "aa1", "zz", "--warehouse", wh.storage.local.path).exit_code == 2
    same = run_kdb("compare", "aa1", "aa1", "--warehouse", wh.storage.local.path)
    assert "No number changed." in same.stdout
