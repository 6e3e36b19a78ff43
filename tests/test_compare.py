"""kdb compare: what differs between two runs, on runs made by hand and on a real one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import Result
from helpers.stored import Rows, add_run, create_lake
from helpers.synthetic import write_manifests
from helpers.tiny_llama import ASK_OPTIONS

import kdb
from kdb.analysis.compare import (
    check_comparable,
    compared_rows,
    described,
    differing_settings,
    find_runs,
    matched_prompts,
    moved_numbers,
)
from kdb.analysis.compare_depth import by_depth
from kdb.analysis.curves import differences
from kdb.errors import QueryError, UnknownNameError
from kdb.ingest.datasets.base import Dataset, Example, prompts
from kdb.warehouse.schema import SCHEMA_VERSION
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

A, B, OTHER, DEEP, FACTS, RENAMED, REFITTED, REPLACED, LATER = (
    digits + "0" * 12 for digits in ("aa11", "aa22", "bb33", "cc44", "dd55", "ee66", "ff77", "ab88", "ac99")
)

TEXTS = [f"Claim {i}." for i in range(8)]


def score(layer: int, accuracy: float, split: str = "paper", **more: object) -> dict[str, object]:
    place = {"layer": layer, "site": "resid_post", "classifier": "logistic", "split": split}
    numbers = {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1, "n_test": 8}
    return place | {"depth": layer / 2} | numbers | more


def predictions(layers: int, right: Callable[[int, int], bool], numbers: Sequence[int] = range(8)) -> Rows:
    place = {"site": "resid_post", "classifier": "logistic", "split": "paper"}
    return [
        {"prompt_id": i, "layer": layer, "predicted": int(right(i, layer)), "correct": right(i, layer)} | place
        for i in numbers
        for layer in range(layers)
    ]


def texts(names: Sequence[str], label: int | None = 1, **more: object) -> Rows:
    return [{"prompt_id": i, "text": text, "label": label, **more} for i, text in enumerate(names)]


def neuron(head: int | None, value: float, prompt: int = 0) -> dict[str, object]:
    place = {"prompt_id": prompt, "component": "attn" if head else "ffn", "layer": 1, "head": head, "neuron": 5}
    return place | {"position": None, "score": value, "exact": True}


MODELS: Rows = [{"n_layers": 2, "family": "f", "dtype": "float32"}]


def add_two_settings(lake: Path) -> None:
    """Add runs A and B of one dataset, which differ in seed, template and noise, and in their scores."""
    add_run(
        lake,
        *("m", "d", A),
        models=MODELS,
        datasets=[{"fingerprint": "x"}],
        runs=[{"settings": '{"seed": 1, "store": "float32"}', "kdb_version": "1"}],
        prompts=texts(TEXTS),
        probe_scores=[score(0, 0.25), score(1, 0.5, auc=0.9), score(1, 0.7, split="grouped")],
        probe_predictions=predictions(2, lambda i, layer: i < 2 + 2 * layer),
        neuron_scores=[neuron(None, 1.0), neuron(3, 2.0)],
    )
    add_run(
        lake,
        *("m", "d", B),
        models=MODELS,
        datasets=[{"fingerprint": "x", "template": "True? {text}"}],
        runs=[{"settings": '{"seed": 2, "store": "float32"}', "kdb_version": "1", "noise": "aaa or bbb"}],
        prompts=texts([f"True? {'aaa' if i % 2 else 'bbb'} {text}" for i, text in enumerate(TEXTS)]),
        probe_scores=[score(0, 0.75), score(1, 0.5)],
        probe_predictions=predictions(2, lambda i, layer: i >= 2 + 2 * layer),
        neuron_scores=[neuron(None, 1.5), neuron(3, 2.0)],
    )


def add_deeper_model(lake: Path) -> None:
    """Add a run of a model of five layers, with some texts of A in another order."""
    add_run(
        lake,
        *("deep", "d", DEEP),
        models=[{**MODELS[0], "n_layers": 5}],
        datasets=[{"fingerprint": "z"}],
        prompts=texts(["New claim.", *TEXTS[4:], "Claim 1."]),
        probe_scores=[score(layer, 0.75) for layer in range(5)],
        probe_predictions=predictions(5, lambda i, layer: i < 4 or layer == 3, [1, 2, 3, 5]),
    )


def add_other_texts(lake: Path) -> None:
    """Add runs whose texts are not those of A: of another dataset, of a renamed one, and of a replaced file."""
    other = texts(["Another claim.", "Claim 7.", "One more."])
    renamed = texts([*TEXTS[:5], "Claim 0."])
    checks: Rows = [{"check": "c"}]
    add_run(lake, "m", "other", OTHER, models=MODELS, datasets=[{"fingerprint": "y"}], prompts=other, checks=checks)
    add_run(lake, "m", "renamed", RENAMED, models=MODELS, datasets=[{}], prompts=renamed, checks=checks)
    add_run(lake, "m", "d", REPLACED, models=MODELS, datasets=[{}], prompts=texts(["Changed.", "Anew."]), checks=[])


def add_refit(lake: Path) -> None:
    """Add a run that was computed from B, and has no prompts of its own."""
    runs: Rows = [{"source_run": B}]
    add_run(lake, "m", "d", REFITTED, models=MODELS, datasets=[{}], runs=runs, checks=[{"check": "c"}])


def add_facts(lake: Path) -> None:
    """Add two runs of the knowledge study; the later one has one more prompt, and the others under other numbers."""
    earlier = (["The sky is", "Grass is"], [neuron(None, 1.0), neuron(None, 3.0, prompt=1)])
    later = (
        ["Snow is", "The sky is", "Grass is"],
        [neuron(None, 7.0), neuron(None, 1.0, prompt=1), neuron(None, 3.5, prompt=2)],
    )
    study: Rows = [{"study": "knowledge"}]
    for run, (names, scores) in {FACTS: earlier, LATER: later}.items():
        prompts = texts(names, None, answer="blue")
        add_run(
            lake, "m", "facts", run, models=MODELS, datasets=study, runs=study, prompts=prompts, neuron_scores=scores
        )


@pytest.fixture(scope="module")
def wh(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """A warehouse of nine runs made by hand."""
    folder = tmp_path_factory.mktemp("compare")
    lake = create_lake(folder)
    for add in (add_two_settings, add_deeper_model, add_other_texts, add_refit, add_facts):
        add(lake)
    (folder / "warehouse.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}}}')
    write_manifests(folder)
    return Warehouse(folder)


def location(wh: Warehouse) -> Path:
    return Path(wh.storage.local.path)


# Settings and numbers --------------------------------------------------------------------------------------------


def test_settings_that_differ_are_named_and_no_others(wh: Warehouse) -> None:
    found = differing_settings(wh, A, B)
    assert sorted(found.rows()) == [
        ("noise", None, "aaa or bbb"),
        ("run", A, B),
        ("seed", "1", "2"),
        ("template", None, "True? {text}"),
    ]


def test_numbers_that_moved_come_largest_first_with_their_key(wh: Warehouse) -> None:
    moved = moved_numbers(wh, A, B).filter(table="probe_scores").filter(pl.col("column").is_in(["accuracy", "auc"]))
    place = "site=resid_post classifier=logistic split=paper"
    assert moved.select("key", "column", "a", "b").rows() == [
        (f"layer=0 {place}", "accuracy", 0.25, 0.75),
        (f"layer=1 {place}", "auc", 0.9, None),
    ]
    assert moved["change_percent"][0] == pytest.approx(100 * 0.5 / 0.75)


def test_a_key_that_is_null_in_both_runs_is_the_same_row(wh: Warehouse) -> None:
    moved = moved_numbers(wh, A, B).filter(table="neuron_scores")
    assert moved.select("key", "column", "difference").rows() == [
        ("prompt_id=0 component=ffn layer=1 neuron=5", "score", 0.5)
    ]


def test_rows_that_one_run_lacks_are_counted(wh: Warehouse) -> None:
    assert compared_rows(wh, A, B).rows() == [
        ("prompts", 8, 0, 0),
        ("probe_scores", 2, 1, 0),
        ("probe_predictions", 16, 0, 0),
        ("neuron_scores", 2, 0, 0),
    ]


def test_rows_of_a_prompt_are_matched_by_its_text_and_not_by_its_number(wh: Warehouse) -> None:
    moved = moved_numbers(wh, FACTS, LATER).filter(table="neuron_scores")
    assert moved.select("key", "a", "b").rows() == [("prompt_id=1 component=ffn layer=1 neuron=5", 3.0, 3.5)]
    assert ("neuron_scores", 2, 0, 1) in compared_rows(wh, FACTS, LATER).rows()


def test_a_run_is_no_different_from_itself(wh: Warehouse) -> None:
    assert moved_numbers(wh, A, A).is_empty()
    assert differing_settings(wh, A, A).is_empty()


def test_runs_are_found_by_their_first_digits(wh: Warehouse) -> None:
    assert find_runs(wh, "aa2", "b") == [B, OTHER]
    with pytest.raises(
        QueryError, match=r"'aa': aa11000000000000 \(.* on .*\), aa22000000000000 \(.* on .*\)\. Give more digits"
    ):
        find_runs(wh, "aa")
    with pytest.raises(UnknownNameError, match="Unknown run 'zz'"):
        find_runs(wh, "zz")


def test_runs_with_nothing_in_common_are_refused(wh: Warehouse) -> None:
    with pytest.raises(QueryError, match="have no table in common"):
        moved_numbers(wh, REFITTED, A)


# Prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_matched_by_text_under_any_template_and_noise(wh: Warehouse) -> None:
    matched = matched_prompts(wh, A, B)
    assert (matched.pairs.rows(), matched.only_a, matched.only_b) == ([(i, i) for i in range(8)], 0, 0)
    matched = matched_prompts(wh, A, DEEP)
    assert (matched.pairs.rows(), matched.only_a, matched.only_b) == ([(1, 5), (4, 1), (5, 2), (6, 3), (7, 4)], 3, 1)


def test_a_text_that_stands_twice_has_a_partner_for_each_time(wh: Warehouse) -> None:
    matched = matched_prompts(wh, RENAMED, RENAMED)
    assert matched.pairs.rows() == [(i, i) for i in range(6)]
    matched = matched_prompts(wh, A, RENAMED)
    assert (len(matched.pairs), matched.only_a, matched.only_b) == (5, 3, 1)


def test_a_run_computed_from_another_has_the_prompts_of_that_one(wh: Warehouse) -> None:
    assert len(matched_prompts(wh, A, REFITTED).pairs) == 8


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(
    "template", ["{text}", "Say: {text}\nTrue? Answer:", "{text} {text}", "é {text} and “{text}”!"]
)
def test_the_text_of_an_example_is_read_back_from_its_prompt(tmp_path: Path, template: str, noise: bool) -> None:
    wanted = ["Zürich is a city.", "bbb is no word.", "A 🧭 in {text}", "True? ü"]
    dataset = Dataset("d", "source", template, tuple(Example(f" {text}", 1) for text in wanted))
    lake = create_lake(tmp_path)
    runs: Rows = [{"noise": "aaa or bbb" if noise else None}]
    filled = texts(prompts(dataset, noise=noise))
    add_run(lake, "m", "d", A, models=[{}], datasets=[{"template": template}], runs=runs, prompts=filled)
    (tmp_path / "warehouse.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}}}')
    write_manifests(tmp_path)
    found = Warehouse(tmp_path).sql("SELECT text FROM example_texts(?) ORDER BY prompt_id", [A])
    assert found["text"].to_list() == wanted


def check(wh: Warehouse, a: str, b: str) -> None:
    check_comparable(*described(wh, a, b), matched_prompts(wh, a, b))


def test_runs_of_two_datasets_or_two_studies_are_refused(wh: Warehouse, run_kdb: Callable[..., Result]) -> None:
    refused = {
        (A, OTHER): rf"{A} \(d\) and {OTHER} \(other\) are of two different datasets: they share 1 of 3 texts",
        (A, REPLACED): r"\(d\) and .* \(d\) are of two different datasets: they share 0 of 2 texts",
        (A, FACTS): f"{A} is of the concept study, run {FACTS} of the knowledge study",
    }
    for pair, message in refused.items():
        with pytest.raises(QueryError, match=message):
            check(wh, *pair)
        result = run_kdb("compare", *pair, "--warehouse", location(wh))
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_one_dataset_under_two_names_and_of_two_sizes_is_compared(wh: Warehouse) -> None:
    for a, b in ((A, RENAMED), (A, DEEP), (FACTS, LATER)):
        check(wh, a, b)  # raises QueryError for two datasets
        assert len(matched_prompts(wh, a, b).pairs) > 0


# Accuracy by depth -----------------------------------------------------------------------------------------------


def test_accuracies_on_the_same_prompts_are_tested_at_every_depth(wh: Warehouse) -> None:
    found = by_depth(wh, A, B, matched_prompts(wh, A, B).pairs)
    assert found is not None
    first, second = found.table.to_dicts()
    assert (first["accuracy_a"], first["accuracy_b"], first["only_a"], first["only_b"]) == (0.25, 0.75, 2, 6)
    assert first["p_value"] == pytest.approx(2 * (1 + 8 + 28) / 2**8)
    assert (first["n"], first["difference"], second["difference"]) == (8, 0.5, 0.0)
    assert second["low"] < 0.0 < second["high"]


def test_layers_of_two_models_are_aligned_by_depth_on_the_common_test_prompts(wh: Warehouse) -> None:
    for a, b in ((A, DEEP), (DEEP, A)):
        found = by_depth(wh, a, b, matched_prompts(wh, a, b).pairs)
        assert found is not None
        assert found.n == 4  # prompts 4, 5, 6 and 1 of the one are 1, 2, 3 and 5 of the other
        layers = found.table.select("depth_percent", "layer_a", "layer_b").rows()
        assert layers == ([(0.0, 0, 0), (50.0, 1, 2)] if a == A else [(0.0, 0, 0), (50.0, 2, 1)])
        shallow, deep = ("accuracy_a", "accuracy_b") if a == A else ("accuracy_b", "accuracy_a")
        assert found.table[shallow].to_list() == [0.25, 0.25]
        assert found.table[deep].to_list() == [0.75, 0.75]


def test_the_p_value_of_the_largest_difference_allows_for_the_choice_of_the_depth() -> None:
    rng = np.random.default_rng(0)
    drawn = [differences(*(rng.random((2, 100, 20)) < 0.7).astype(np.float32)) for _ in range(60)]
    chosen = np.mean([found.p_values.min() < 0.05 for found in drawn])
    assert chosen > 0.3
    assert np.mean([found.p_largest < 0.05 for found in drawn]) <= 0.1


def test_the_interval_of_a_difference_of_accuracies_stays_within_what_can_be() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 4)
    for _ in range(40):
        a = (rng.random((24, 8)) < 0.9).astype(np.float32)
        b = np.where(rng.random((24, 8)) < 0.15, 1 - a, a)
        found = differences(a, b, groups)
        given = ~np.isnan(found.low)
        assert (found.low[given] >= -1).all() and (found.high[given] <= 1).all()


def test_differences_keep_groups_together() -> None:
    rng = np.random.default_rng(0)
    a, b = np.repeat((rng.random((2, 20, 1)) < 0.6).astype(np.float32), 10, axis=1)
    groups = np.repeat(np.arange(20), 10)
    alone, grouped = differences(a, b), differences(a, b, groups)
    assert (alone.n_groups, grouped.n_groups) == (None, 20)
    assert (grouped.high - grouped.low)[0] > 2 * (alone.high - alone.low)[0]
    assert grouped.p_largest > alone.p_largest


# The command -----------------------------------------------------------------------------------------------------


def test_compare_leads_with_accuracies_by_depth_and_measures(
    wh: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    result = run_kdb("compare", "aa1", "aa2", "--warehouse", location(wh))
    assert result.exit_code == 0, result.output
    headings = (
        f"a: {A}, m on d",
        "Prompts with the same text: 8. Without a partner: 0 of a, 0 of b.",
        "Accuracy by depth on the 8 prompts",
        "Largest difference: +0.500 at 0 % of depth, p = 0.",
        "best layer",
        "depth_90",
        "J and C are the paper's",
        "Settings that differ: 4",
        "Matched rows",
        "Numbers that changed",
    )
    places = [result.stdout.index(heading) for heading in headings]
    assert places[:4] == sorted(places[:4])
    assert max(places[:7]) < places[7] < places[8] < places[9]
    assert max(len(line) for line in result.stdout[: places[7]].splitlines()) <= 80
    whole = tmp_path / "by-depth.csv"
    assert run_kdb("compare", "aa1", "aa2", "-o", whole, "--warehouse", location(wh)).exit_code == 0
    assert pl.read_csv(whole)["only_b"].to_list() == [6, 4]
    assert run_kdb("compare", "aa1", "zz", "--warehouse", location(wh)).exit_code == 2
    same = run_kdb("compare", "aa1", "aa1", "--warehouse", location(wh))
    assert "The accuracies are equal at every depth." in same.stdout
    assert "No number changed." in same.stdout


def test_numbers_of_models_with_other_layers_are_not_compared_row_by_row(
    wh: Warehouse, run_kdb: Callable[..., Result]
) -> None:
    result = run_kdb("compare", "aa1", "cc4", "--warehouse", location(wh))
    assert result.exit_code == 0, result.output
    assert "Without a partner: 3 of a, 1 of b." in result.stdout
    assert "on the 4 prompts" in result.stdout
    assert "Numbers that changed" not in result.stdout


def test_two_knowledge_runs_are_compared_number_by_number(
    wh: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    result = run_kdb("compare", "dd5", "ac9", "--warehouse", location(wh))
    assert result.exit_code == 0, result.output
    assert "Numbers that changed: 1" in result.stdout
    assert "by depth" not in result.stdout
    whole = tmp_path / "moved.csv"
    assert run_kdb("compare", "dd5", "ac9", "-o", whole, "--warehouse", location(wh)).exit_code == 0
    assert len(whole.read_text().splitlines()) == 2


def test_a_measured_run_is_compared_with_one_under_noise_and_another_template(
    warehouse: Path, tiny_model: Path, user_dataset: Path, run_kdb: Callable[..., Result]
) -> None:
    options = ("--model", tiny_model, "--dataset", user_dataset, *ASK_OPTIONS, "--warehouse", warehouse)
    changed = ("--noise", "--template", "Weather: {text} So?", "--group-by", "town")
    assert run_kdb("ingest", *options, *changed).exit_code == 0
    a, b = kdb.open(warehouse).sql("SELECT run FROM runs ORDER BY finished_at")["run"]
    result = run_kdb("compare", a, b, "--warehouse", warehouse)
    assert result.exit_code == 0, result.output
    assert "Prompts with the same text: 40. Without a partner: 0 of a, 0 of b." in result.stdout
    assert re.search(r"logistic, paper {2,}logistic, grouped", result.stdout)
    paper = run_kdb("compare", a, b, "--split", "paper", "--warehouse", warehouse)
    assert "Accuracy by depth on the 16 prompts" in paper.stdout
    assert re.search(r"The prompts are in \d+ groups", paper.stdout)
    for split, message in (("nosuch", "Unknown split"), ("grouped", f"Run {a} has no predictions of split grouped")):
        refused = run_kdb("compare", a, b, "--split", split, "--warehouse", warehouse)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert message in refused.stderr
