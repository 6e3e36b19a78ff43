from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers.stored import NOON, Rows, add_run, assert_same_in_the_shell, create_lake, needs_shell
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdb.analysis.curves import depth_90, first_within_one_error
from kdb.errors import QueryError, UnknownNameError
from kdb.ingest.forward.checks import DETAIL
from kdb.queries.catalogue import find_query, literal, load_catalogue
from kdb.warehouse.database import Database

HEADER = """\
-- Rows
-- No paper
--
-- One row per row,
-- and no more.
--
-- Parameters:
--   model  text = all  one model
--   limit  integer = 20  rows at most
--   share  number required  share of rows
--   kinds  texts = all  kinds of rows
"""
BODY = "SELECT getvariable('model'), getvariable('limit'), getvariable('share'), getvariable('kinds');\n"


def scores(accuracies: list[float], site: str = "resid_post", split: str = "paper", **more: Any) -> Rows:
    """probe_scores rows of the paper's probe, a layer for each accuracy."""
    kind = {"site": site, "classifier": "logistic-raw", "split": split, "n_test": 100, "converged": True}
    kind |= {"is_default": split == "paper"} | more
    return [
        {"layer": layer, "depth": layer / len(accuracies), "accuracy": accuracy, **kind}
        for layer, accuracy in enumerate(accuracies)
    ]


def add_probes(
    lake: Path, model: str, dataset: str, run: str, rows: Rows, *, family: str, size: float, **info: Any
) -> None:
    """Commit a probe run. `size` is in billions of parameters."""
    n_layers = 1 + max(row["layer"] for row in rows)
    about = {"family": family, "n_layers": n_layers, "n_params": round(size * 1e9)}
    shared = {"split": "paper", "n_test": 100}
    guesses = [{"baseline": name, "accuracy": rate} | shared for name, rate in (("majority", 0.5), ("words", 0.55))]
    add_run(lake, model, dataset, run, models=[about], probe_scores=rows, baselines=guesses, runs=[info])


CONCEPT = {name for name, query in load_catalogue().items() if query.group == "concept"}
BEYOND_PROBES = {"hidden-states", "probe-outcomes", "probe-predictions", "probe-transfer", "zero-shot"}
"""Queries of tables that the warehouse of this module lacks."""

OF_CHECKPOINTS = {"depth-by-step"}
"""Queries that test_plan_file.py asks."""


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four models of two families on two datasets; accuracies chosen so that J and C can be read off."""
    lake = create_lake(tmp_path_factory.mktemp("warehouse"))
    rises = [0.5, 0.5, 0.8, 0.82, 0.9]  # β: 1, 1.6, 1.025, 1.0976
    sites = [*scores(rises), *scores([0.5, 0.6, 0.9, 0.99, 1.0], "ffn_norm"), *scores([1.0] * 5, split="grouped")]
    add_probes(lake, "gemma-7b", "cities", "a" * 16, sites, family="gemma", size=8.5377)
    add_probes(lake, "gemma-2b", "cities", "b" * 16, scores([0.5, 0.9, 0.5, 0.9]), family="gemma", size=2.506)
    add_probes(lake, "llama-7b", "cities", "c" * 16, scores([0.8, 0.79, 0.8, 0.7]), family="llama", size=6.738)
    add_probes(lake, "llama-7b", "coinflip", "d" * 16, scores([0.5, 0.95, 0.94, 0.5]), family="llama", size=6.738)
    later = {"family": "llama", "size": 6.738, "finished_at": NOON + timedelta(hours=1)}
    noisy = scores([0.4, 0.5])
    add_probes(lake, "llama-7b", "coinflip", "e" * 16, noisy, variant="noise", **later)  # type: ignore[arg-type]
    return lake


@pytest.fixture(scope="module")
def database(lake: Path) -> Database:
    return Database(lake)


def test_layer_accuracy(database: Database) -> None:
    rows = database.query("layer-accuracy", dataset="coinflip")
    assert rows.select("model", "layer", "depth_percent", "accuracy").rows() == [
        ("llama-7b", layer, 25.0 * layer, accuracy) for layer, accuracy in enumerate([0.5, 0.95, 0.94, 0.5])
    ]
    assert database.query("layer-accuracy", model="gemma-7b")["site"].unique().to_list() == ["resid_post"]
    assert database.query("layer-accuracy")["model"].unique().sort().to_list() == ["gemma-2b", "gemma-7b", "llama-7b"]


def test_variation_rate(database: Database) -> None:
    rows = database.query("variation-rate", model="llama-7b", dataset="coinflip")
    assert rows["variation_rate"].to_list() == [None, 0.95 / 0.5, 0.94 / 0.95, 0.5 / 0.94]


def test_concept_depth_for_every_model_dataset_and_site(database: Database) -> None:
    rows = database.query("concept-depth")
    named = ("jump_layer", "jump_percent", "converging_layer", "converging_percent")
    assert rows.select("model", "dataset", "site", *named).rows() == [
        ("gemma-2b", "cities", "resid_post", 1, 25.0, None, None),
        ("gemma-7b", "cities", "resid_post", 2, 40.0, 3, 60.0),
        ("gemma-7b", "cities", "ffn_norm", 1, 20.0, 4, 80.0),
        ("llama-7b", "cities", "resid_post", None, None, 2, 50.0),
        ("llama-7b", "coinflip", "resid_post", 1, 25.0, 2, 50.0),
    ]


def test_a_ratio_at_its_threshold_is_a_jump_and_has_not_converged(database: Database) -> None:
    """β ≥ 1.1 and |β − 1| < 0.03, of ratios that floats miss by a bit."""
    ties = "is_jump(0.55::DOUBLE / 0.5, 1.1), has_converged(0.515::DOUBLE / 0.5, 0.03)"
    assert database.sql(f"SELECT {ties}").row(0) == (True, False)


def test_concept_depth_takes_its_thresholds(database: Database) -> None:
    rows = database.query("concept-depth", model="gemma-7b", site="resid_post", jump_ratio=1.01)
    assert rows["jump_layer"].item() == 2
    rows = database.query("concept-depth", model="gemma-7b", site="resid_post", convergence_tolerance="0.1")
    assert rows["converging_layer"].item() == 4


def test_concept_depth_measures_the_curve_against_the_best_baseline(database: Database) -> None:
    row = database.query("concept-depth", model="gemma-7b", site="resid_post").row(0, named=True)
    assert (row["best_layer"], row["best_percent"], row["best_accuracy"], row["n_test"]) == (4, 80.0, 0.9, 100)
    assert (row["baseline"], row["baseline_accuracy"], row["first_within_one_se"]) == ("words", 0.55, 4)
    assert row["area"] == pytest.approx((0.5 + 0.5 + 0.8 + 0.82 + 0.9) / 5 - 0.55)
    assert (row["depth_90_layer"], row["depth_90_percent"]) == (4, 80.0), "0.55 + 0.9 * 0.35 = 0.865"


def test_a_best_layer_that_chance_explains_has_no_depth_90(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    for name, accuracies in (("flat", [0.5, 0.62, 0.6]), ("rising", [0.5, 0.9, 0.9])):
        add_probes(lake, "m", name, f"{name[0]:a<16}".replace("r", "b"), scores(accuracies), family="f", size=1.0)
    with Database(lake) as database:
        rows = database.query("concept-depth").select("dataset", "best_layer", "depth_90_layer").rows()
    assert rows == [("flat", 1, None), ("rising", 1, 1)]


@given(st.lists(st.integers(0, 200), min_size=1, max_size=9), st.integers(0, 200))
@settings(max_examples=25, deadline=None)
def test_measures_of_the_sql_are_those_of_the_resampled_curves(right: list[int], level: int) -> None:
    curve = np.array(right) / 200
    with TemporaryDirectory() as folder:
        lake = create_lake(Path(folder))
        rows = scores([n / 200 for n in right], n_test=200)
        baselines = [{"baseline": "words", "split": "paper", "accuracy": level / 200}]
        add_run(lake, "m", "d", "a" * 16, models=[{"n_layers": len(right)}], probe_scores=rows, baselines=baselines)
        with Database(lake) as database:
            found = database.sql("FROM _measures_of_all()").row(0, named=True)
    assert (found["best_layer"], found["first_within_one_se"]) == (curve.argmax(), first_within_one_error(curve, 200))
    assert found["area"] == pytest.approx(curve.mean() - level / 200)
    if found["depth_90_layer"] is not None:
        assert found["depth_90_layer"] == depth_90(curve, np.float64(level / 200))


@pytest.fixture
def several(tmp_path: Path) -> Iterator[Database]:
    """A run whose default probe is on the grouped split, and one of kdb 0.2 as it is shown."""
    lake = create_lake(tmp_path)
    flat, jumping = [0.6, 0.6, 0.6], [0.5, 0.5, 0.9]
    grouped = scores(flat, split="grouped", classifier="logistic", is_default=True)
    paper = scores(flat, classifier="logistic", is_default=False)
    raw = [*scores(jumping, is_default=False), *scores([0.7] * 3, split="grouped", is_default=False)]
    add_probes(lake, "m", "new", "a" * 16, [*grouped, *paper, *raw], family="f", size=1.0)
    older = scores(jumping, classifier="logistic-raw", split="label-0-first", is_default=True)
    add_probes(lake, "m", "old", "b" * 16, older, family="f", size=1.0)
    with Database(lake) as database:
        yield database


def test_queries_show_the_default_probe_and_beside_it_the_papers_points(several: Database) -> None:
    rows = several.query("concept-depth").select("dataset", "classifier", "split", "best_accuracy", "jump_layer")
    assert rows.rows() == [("new", "logistic", "grouped", 0.6, 2), ("old", "logistic-raw", "label-0-first", 0.9, None)]
    curve = several.query("layer-accuracy", dataset="new")
    assert curve["accuracy"].to_list() == [0.6] * 3
    assert curve.filter("jump")["layer"].to_list() == [2]


def test_a_classifier_or_split_that_is_asked_for_is_that_of_j_and_c_too(several: Database) -> None:
    given = {"classifier": "logistic-raw", "dataset": "new"}
    rows = several.query("concept-depth", **given)
    assert rows.select("split", "best_accuracy", "jump_layer").rows() == [("grouped", 0.7, 2)], "J stays that of paper"
    rows = several.query("concept-depth", **given, split="grouped")
    assert rows.select("split", "best_accuracy", "jump_layer").rows() == [("grouped", 0.7, None)]
    rows = several.query("concept-depth", classifier="logistic", split="paper", dataset="new")
    assert rows.select("split", "jump_layer").rows() == [("paper", None)]
    rows = several.query("concept-depth", split="label-0-first")
    assert rows.select("dataset", "jump_layer").rows() == [("old", 2)], "the default classifier of that run"


def test_every_query_that_prints_j_or_c_says_what_they_are_worth(database: Database) -> None:
    for name, query in load_catalogue().items():
        columns = database.sql(query.sql.replace("getvariable('neuron')", "'f0_1'")).columns
        if {"jump", "converging", "jump_percent", "converging_percent", "moved_percent"} & set(columns):
            assert "By chance alone, most flat curves of 100 test prompts have a J" in query.description, name
            assert re.search("logistic-raw|paper", query.description), name


def test_baselines_of_the_shown_split_are_listed_best_first(database: Database) -> None:
    rows = database.query("baselines", dataset="coinflip").select("baseline", "split", "accuracy", "n_test")
    assert rows.rows() == [("words", "paper", 0.55, 100), ("majority", "paper", 0.5, 100)]


def test_checks_stand_in_the_order_in_which_their_details_refer_to_each_other(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    for run, failed in (("a", None), ("b", "readout_kl")):
        names = [*reversed(DETAIL), "doubled_bos"]
        rows = [{"check": name, "value": 1e-9, "tolerance": 1e-3, "passed": name != failed} for name in names]
        add_run(lake, "m", run, run * 16, checks=rows)
    with Database(lake) as database:
        found = database.query("checks")["check"].to_list()
    assert found == ["readout_kl", *DETAIL, "doubled_bos", *(c for c in DETAIL if c != "readout_kl"), "doubled_bos"]


def test_datasets_by_model(database: Database) -> None:
    rows = database.query("datasets-by-model", model="llama-7b")
    at_depth = ("accuracy_at_0_percent", "accuracy_at_50_percent", "accuracy_at_100_percent")
    assert rows.select("dataset", "n_layers", *at_depth, "best_accuracy", "best_layer").rows() == [
        ("coinflip", 4, 0.5, 0.94, 0.5, 0.95, 1),
        ("cities", 4, 0.8, 0.8, 0.7, 0.8, 0),
    ]
    assert rows.select("jump_percent", "converging_percent").rows() == [(25.0, 50.0), (None, 50.0)]


def test_accuracy_at_quarters_of_the_way(database: Database) -> None:
    row = database.query("datasets-by-model", model="gemma-7b").row(0, named=True)
    assert [row[f"accuracy_at_{share}_percent"] for share in (0, 25, 50, 75, 100)] == [0.5, 0.5, 0.8, 0.82, 0.9]


def test_families_at_size(database: Database) -> None:
    columns = ("dataset", "family", "model", "size_billions", "best_accuracy", "jump_percent", "converging_percent")
    rows = database.query("families-at-size").select(columns)
    assert rows.rows() == [
        ("cities", "gemma", "gemma-7b", 8.538, 0.9, 40.0, 60.0),
        ("cities", "llama", "llama-7b", 6.738, 0.8, None, 50.0),
        ("coinflip", "llama", "llama-7b", 6.738, 0.95, 25.0, 50.0),
    ]
    assert database.query("families-at-size", within=1.1, dataset="cities")["family"].to_list() == ["llama"]
    assert database.query("families-at-size", size=2)["model"].to_list() == ["gemma-2b"]


def test_converging_point_by_size(database: Database) -> None:
    columns = ("dataset", "family", "size_billions", "model", "converging_percent", "jump_percent")
    assert database.query("converging-point-by-size").select(columns).rows() == [
        ("cities", "gemma", 2.506, "gemma-2b", None, 25.0),
        ("cities", "gemma", 8.538, "gemma-7b", 60.0, 40.0),
        ("cities", "llama", 6.738, "llama-7b", 50.0, None),
        ("coinflip", "llama", 6.738, "llama-7b", 50.0, 25.0),
    ]


def test_a_variant_or_a_run_is_asked_for_by_name(database: Database) -> None:
    assert database.query("layer-accuracy", variant="noise")["accuracy"].to_list() == [0.4, 0.5]
    assert database.query("layer-accuracy", run="e" * 16)["accuracy"].to_list() == [0.4, 0.5]
    assert database.query("layer-accuracy", variant="all", dataset="coinflip")["variant"].n_unique() == 2
    with pytest.raises(UnknownNameError, match="Unknown run 'ffffffffffffffff'"):
        database.query("layer-accuracy", run="f" * 16)


def test_parameters_do_not_leak_into_the_next_query(database: Database) -> None:
    before = database.query("concept-depth")
    database.query("concept-depth", model="llama-7b", jump_ratio=3)
    assert database.query("concept-depth").equals(before)


def test_a_refit_replaces_the_scores_of_its_source_run(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    about = {"family": "f", "size": 1.0}
    add_probes(lake, "m", "d", "b" * 16, scores([0.5, 0.6]), **about)  # type: ignore[arg-type]
    refit = {**about, "finished_at": NOON + timedelta(hours=1), "source_run": "b" * 16}
    add_probes(lake, "m", "d", "a" * 16, scores([0.7, 0.8]), **refit)  # type: ignore[arg-type]
    with Database(lake) as database:
        assert database.query("layer-accuracy")["accuracy"].to_list() == [0.7, 0.8]


Curve = list[int | None]
N_TEST = 110


def reference(curve: Curve, threshold: Fraction, tolerance: Fraction) -> tuple[int | None, int | None]:
    """Layers of J and C, from numbers right out of N_TEST, in exact arithmetic."""
    rates = {
        i: Fraction(after, before)
        for i, (before, after) in enumerate(itertools.pairwise(curve), start=1)
        if before and after is not None
    }
    jumps = [i for i, rate in rates.items() if rate >= threshold]
    flats = [i for i, rate in rates.items() if abs(rate - 1) < tolerance]
    return min(jumps, default=None), max(flats, default=None)


# 100 → 110 is a rate of exactly 1.1, 100 → 103 and 100 → 97 are exactly at the tolerance; None is a missing layer.
curves = st.lists(
    st.one_of(st.none(), st.integers(0, N_TEST), st.sampled_from([0, 10, 11, 97, 100, 103, 110])),
    min_size=1,
    max_size=8,
).filter(lambda curve: curve[-1] is not None)


def rows_of(curve: Curve, split: str) -> Rows:
    rows = scores([0 if right is None else right / N_TEST for right in curve], split=split)
    return [row for row in rows if curve[row["layer"]] is not None]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(curves, min_size=1, max_size=8))
def test_jump_and_converging_point_agree_with_exact_arithmetic(batch: list[Curve]) -> None:
    expected = {}
    with TemporaryDirectory() as folder:
        lake = create_lake(Path(folder))
        for number, curve in enumerate(batch):
            rows = rows_of(curve, "paper")
            add_probes(lake, "m", f"{number}", f"{number:016x}", rows, family="f", size=1.0)
            layers = reference(curve, Fraction(11, 10), Fraction(3, 100))
            expected[f"{number}"] = (*layers, *(None if i is None else i / len(curve) for i in layers))
        with Database(lake) as database:
            columns = "dataset, jump_layer, converging_layer, jump_point, converging_point"
            found = database.sql(f"SELECT {columns} FROM _depths_of_all()").rows()
    assert {dataset: tuple(values) for dataset, *values in found} == expected


@pytest.mark.parametrize(
    ("curve", "layers"),
    [
        ([50], (None, None)),
        ([100, 110], (1, None)),
        ([100, 103, 100, 97], (None, 2)),  # 100/103 is within the tolerance; 1.03 and 0.97 are not
        ([0, 50, 50], (None, 2)),
        ([None, 50, 100], (2, None)),
        ([50, None, 100, 100], (None, 3)),
        ([10, 11, 10, 11], (1, None)),
    ],
)
def test_reference_of_known_curves(curve: Curve, layers: tuple[int | None, int | None]) -> None:
    assert reference(curve, Fraction(11, 10), Fraction(3, 100)) == layers


def write_query(folder: Path, text: str) -> Path:
    (folder / "study").mkdir()
    (folder / "study" / "rows.sql").write_text(text, encoding="utf-8")
    return folder


def test_header_becomes_a_record(tmp_path: Path) -> None:
    query = load_catalogue(write_query(tmp_path, HEADER + BODY))["rows"]
    assert (query.name, query.title, query.reference) == ("rows", "Rows", "No paper")
    assert query.description == "One row per row, and no more."
    assert [(p.name, p.type, p.default, p.required, p.meaning) for p in query.params] == [
        ("model", "text", None, False, "one model"),
        ("limit", "integer", 20, False, "rows at most"),
        ("share", "number", None, True, "share of rows"),
        ("kinds", "texts", None, False, "kinds of rows"),
    ]
    assert query.group == "study"
    assert query.sql == HEADER + BODY


@pytest.mark.parametrize(
    ("given", "value"), [(True, True), (False, False), ("yes", True), ("No", False), ("true", True), ("0", False)]
)
def test_a_boolean_is_yes_or_no(tmp_path: Path, given: object, value: bool) -> None:
    header = HEADER.replace("--   kinds  texts = all", "--   kinds  boolean = no")
    query = load_catalogue(write_query(tmp_path, header + BODY))["rows"]
    assert query.params[-1].default is False
    assert query.params[-1].shown_default == "no"
    assert query.bind({"share": 1})["kinds"] is False
    assert query.bind({"share": 1, "kinds": given})["kinds"] is value
    assert "SET VARIABLE kinds = false;" in query.shell_script()
    with pytest.raises(QueryError, match="parameter kinds: expected yes or no, found 'perhaps'"):
        query.bind({"share": 1, "kinds": "perhaps"})


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("getvariable('model'), ", "", "'model' is declared but not used"),
        ("getvariable('model')", "getvariable('modle')", "'modle' is used but not declared"),
        ("--   limit ", "--   model ", "'model' is declared twice"),
        ("integer = 20", "int = 20", "line 9: expected"),
        ("integer = 20", "integer = many", "parameter limit: expected an integer, found 'many'"),
        ("-- Parameters:\n", "", "needs a title"),
        ("-- Rows\n-- No paper\n", "", "needs a title"),
    ],
)
def test_a_wrong_header_fails_when_it_is_loaded(tmp_path: Path, old: str, new: str, problem: str) -> None:
    with pytest.raises(QueryError, match=re.escape(problem)):
        load_catalogue(write_query(tmp_path, (HEADER + BODY).replace(old, new)))


def test_values_come_from_the_caller_else_from_the_header(tmp_path: Path) -> None:
    query = load_catalogue(write_query(tmp_path, HEADER + BODY))["rows"]
    assert query.bind({"share": "0.5"}) == {"model": None, "limit": 20, "share": 0.5, "kinds": None}
    values = {"share": 1, "limit": "5", "model": "m", "kinds": ["b", "a"]}
    assert query.bind(values) == {"model": "m", "limit": 5, "share": 1.0, "kinds": ("b", "a")}
    assert query.bind({"share": 1, "model": "all"})["model"] is None


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("a", ("a",)),
        (["a"], ("a",)),
        (("b", "a"), ("b", "a")),
        (pl.Series(["a", "b"]), ("a", "b")),
        ("all", None),
        (["all"], None),
        (None, None),
    ],
)
def test_texts_are_one_or_several(tmp_path: Path, given: object, value: tuple[str, ...] | None) -> None:
    query = load_catalogue(write_query(tmp_path, HEADER + BODY))["rows"]
    assert query.bind({"share": 1, "kinds": given})["kinds"] == value


def test_the_shell_script_says_what_a_default_does_not_show(tmp_path: Path) -> None:
    script = load_catalogue(write_query(tmp_path, HEADER + BODY))["rows"].shell_script()
    assert script.splitlines()[:4] == [
        "SET VARIABLE model = NULL; -- one model",
        "SET VARIABLE limit = 20; -- rows at most",
        "SET VARIABLE share = NULL; -- share of rows (required)",
        "SET VARIABLE kinds = NULL; -- kinds of rows (a list: ['a', 'b'])",
    ]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "rows needs share (number: share of rows)"),
        ({"share": None}, "parameter share: expected a number, found None"),
        ({"share": "all"}, "parameter share: expected a number, found 'all'"),
        ({"share": "nan"}, "parameter share: expected a number, found 'nan'"),
        ({"share": 1, "limit": "x"}, "parameter limit: expected an integer, found 'x'"),
        ({"share": 1, "limit": 2.5}, "parameter limit: expected an integer, found 2.5"),
        ({"share": 1, "limit": True}, "parameter limit: expected an integer, found True"),
        ({"share": 1, "model": 7}, "parameter model: expected a text, found 7"),
        ({"share": 1, "kinds": 7}, "parameter kinds: expected one or several texts, found 7"),
        ({"share": 1, "kinds": []}, "parameter kinds: expected one or several texts, found ()"),
        ({"share": 1, "kinds": ["a", 7]}, "parameter kinds: expected one or several texts, found ('a', 7)"),
    ],
)
def test_missing_and_wrong_values_are_query_errors(tmp_path: Path, given: dict[str, object], problem: str) -> None:
    query = load_catalogue(write_query(tmp_path, HEADER + BODY))["rows"]
    with pytest.raises(QueryError, match=re.escape(problem)):
        query.bind(given)


def test_unknown_names_suggest_the_nearest(database: Database) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'concept-depth'"):
        database.query("concept-dept")
    with pytest.raises(
        UnknownNameError, match=r"'modle'\. Did you mean 'model'.* has the parameters model, dataset, site"
    ):
        database.query("concept-depth", modle="m")
    with pytest.raises(QueryError, match="prompt-story needs prompt"):
        database.query("prompt-story")


def test_no_two_files_share_a_name() -> None:
    names = [path.stem for path in Path(find_query("concept-depth").path).parents[1].glob("*/*.sql")]
    assert sorted(names) == sorted(load_catalogue())


@pytest.mark.parametrize("value", ["", "it's", "''", "a\\b", 'a"b', "ü\n;--", 7, -0.03, 1e-300, None])
def test_quoting_survives_a_round_trip(database: Database, value: str | float | None) -> None:
    kind = "DOUBLE" if isinstance(value, float) else "VARCHAR" if isinstance(value, str) else "INTEGER"
    assert database.sql(f"SELECT {literal(value)}::{kind} AS x").item() == value


def test_lists_survive_a_round_trip(database: Database) -> None:
    for value in ((), ("it's",), ("a\\b", "]", ", ", "ü\n;--")):
        assert database.sql(f"SELECT {literal(value)}::VARCHAR[] AS x").item().to_list() == list(value)


@pytest.mark.parametrize("name", load_catalogue())
def test_saved_query_only_reads_and_runs_on_an_empty_warehouse(tmp_path: Path, name: str) -> None:
    given = {"neuron": "f0_1"}
    required = {param.name: given.get(param.name, "1") for param in find_query(name).params if param.required}
    with Database(create_lake(tmp_path)) as database:
        answer = database.query(name, **required)
        assert answer.is_empty()
        assert database.sql(find_query(name).sql).columns == answer.columns


@needs_shell
@pytest.mark.parametrize("name", sorted(CONCEPT - BEYOND_PROBES - OF_CHECKPOINTS))
def test_saved_query_answers_the_same_in_the_shell(lake: Path, database: Database, name: str) -> None:
    required = {param.name: "llama-7b" for param in find_query(name).params if param.required}
    assert_same_in_the_shell(lake, database, name, **required)
