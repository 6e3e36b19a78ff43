"""Current rows in SQL, Polars and saved queries; checks of parameter values; notes about runs that are left out."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pytest
from click.testing import Result
from helpers.knowledge_rows import ALPHA, add_knowledge
from helpers.stored import NOON, Rows, add_run, create_lake, needs_shell, of_today, shell
from polars.testing import assert_frame_equal

import kdb
from kdb.errors import KdbError, QueryError, UnknownNameError
from kdb.ingest.concept.probes import CLASSIFIERS
from kdb.queries.catalogue import find_query, load_catalogue, macros
from kdb.queries.domains import DEFAULT_CLASSIFIER, DOMAINS, SITES, Names
from kdb.warehouse.database import Database
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.notes import KdbNote
from kdb.warehouse.schema import TABLES
from kdb.warehouse.shell_file import write_shell_file
from kdb.warehouse.store import Warehouse
from kdb.web import answers

YEAR_2999 = datetime(2999, 1, 1, tzinfo=NOON.tzinfo)
LATER = NOON + timedelta(hours=1)
FROM_ELSEWHERE = {"imported_from": "elsewhere", "imported_at": NOON - timedelta(days=1)}


def probe(accuracy: float, classifier: str = "logistic", split: str = "paper", **more: Any) -> Rows:
    """probe_scores of two layers and both sites."""
    kind = {"classifier": classifier, "split": split, "accuracy": accuracy, **more}
    return [{"layer": layer, "depth": layer / 2, "site": site, **kind} for site in SITES for layer in (0, 1)]


def add_probe(lake: Path, run: str, rows: Rows, *, model: str = "m", dataset: str = "d", **info: Any) -> None:
    about = {"n_layers": 2, "revision": info.pop("revision", "r1")}
    add_run(lake, model, dataset, run * 16, models=[about], probe_scores=rows, runs=[info])


def shown(database: Database, **asked: Any) -> list[float]:
    return database.query("layer-accuracy", **asked)["accuracy"].unique().sort().to_list()


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    return create_lake(tmp_path / "w")


@pytest.fixture
def full(tmp_path: Path) -> Warehouse:
    """A warehouse where a plain mean is wrong: two models, classifiers and splits, a variant, a refit, an old run."""
    warehouse = Warehouse.create(tmp_path / "w")
    others = [*probe(0.1, "logistic-paper"), *probe(0.2, split="stratified-43"), *probe(0.3, "random-forest")]

    def add(run: str, rows: Rows, model: str = "m", dataset: str = "d", **info: Any) -> None:
        with FolderStorage(tmp_path / "w").stage(run * 16, model, dataset) as staged:
            staged.write_rows("models", "part", [{"n_layers": 2, "n_heads": 2, "revision": "r1"}])
            staged.write_rows("datasets", "part", [{"study": "concept", "n_prompts": 2}])
            if "source_run" not in info:
                staged.write_rows("prompts", "part", [{"prompt_id": i, "text": run, "label": i} for i in (0, 1)])
            staged.write_rows("probe_scores", "part", of_today("probe_scores", rows))
            kind = {"layer": 0, "site": "resid_post", "split": "paper"}
            both = [kind | {"prompt_id": i, "classifier": c} for i in (0, 1) for c in ("logistic", "logistic-paper")]
            staged.write_rows("probe_predictions", "part", of_today("probe_predictions", both))
            staged.commit({"study": "concept", "variant": "default", "settings": "{}"} | info)

    add("a", [*probe(0.4), *others])
    add("b", [*probe(0.5), *others])
    add("c", [*probe(0.9), *others], source_run="b" * 16)
    add("d", [*probe(0.6), *others], variant="noise")
    add("e", [*probe(0.7), *others], model="n")
    return warehouse


# The schema ------------------------------------------------------------------------------------------------------


def test_current_probe_scores_has_one_row_a_layer(full: Warehouse) -> None:
    text = "SELECT layer, accuracy FROM {} WHERE model = 'm' AND dataset = 'd' AND site = 'resid_post' ORDER BY layer"
    assert full.sql(text.format("current.probe_scores")).rows() == [(0, 0.9), (1, 0.9)]
    assert len(full.sql(text.format("probe_scores"))) == 2 * 4 * 4, "the table itself has everything"


def test_current_has_every_table_and_its_newest_plain_run(full: Warehouse) -> None:
    newest = {table: set(full.sql(f"SELECT model, run[1] FROM current.{table}").rows()) for table in TABLES}
    assert newest["probe_scores"] == newest["runs"] == {("m", "c"), ("n", "e")}
    assert newest["prompts"] == {("m", "b"), ("n", "e")}, "the refit has none"
    assert len(full.sql("FROM current.probe_predictions")) == 4


def test_the_default_probe_is_marked_and_told_where_it_is_not(lake: Path) -> None:
    other = {"classifier": "logistic", "split": "grouped"}
    marked = [*probe(0.8, **other, is_default=True), *probe(0.1, is_default=False)]
    add_probe(lake, "a", marked, dataset="marked")
    add_probe(lake, "b", [*probe(0.1, **other), *probe(0.7)], dataset="not marked")
    with Database(lake) as database:
        rows = database.sql("SELECT DISTINCT dataset, accuracy FROM current.probe_scores ORDER BY ALL").rows()
    assert rows == [("marked", 0.8), ("not marked", 0.7)]


def test_the_default_probe_is_that_of_saved_queries(lake: Path) -> None:
    other = {"classifier": "logistic", "split": "grouped"}
    add_probe(lake, "a", [*probe(0.8, **other, is_default=True), *probe(0.1, is_default=False)], dataset="marked")
    add_probe(lake, "b", [*probe(0.1, **other), *probe(0.7)], dataset="not marked")
    with Database(lake) as database:
        shown = "SELECT DISTINCT dataset, accuracy FROM current.probe_scores WHERE site = 'resid_post' ORDER BY ALL"
        asked = database.query("layer-accuracy").select("dataset", "accuracy").unique().sort("dataset")
        assert database.sql(shown).rows() == asked.rows() == [("marked", 0.8), ("not marked", 0.7)]
    for saved in load_catalogue().values():
        defaults = {param.default for param in saved.params if param.name in ("classifier", "split")}
        assert defaults <= {"default"} or saved.name == "depth-robustness"


@needs_shell
def test_current_is_read_in_shells_and_by_other_programs(full: Warehouse, tmp_path: Path) -> None:
    asked = "SELECT layer, accuracy FROM {}current.probe_scores WHERE site = 'ffn_norm' AND model = 'm' ORDER BY layer"
    assert shell(full.storage.local.path / "kdb.duckdb", asked.format("")) == ["0,0.9", "1,0.9"]
    with duckdb.connect() as other:
        other.execute(f"ATTACH '{full.storage.local.path / 'kdb.duckdb'}' AS paper (READ_ONLY)")
        assert other.execute(asked.format("paper.")).fetchall() == [(0, 0.9), (1, 0.9)]
    assert len(pd.read_sql(asked.format(""), full.engine())) == 2
    with full.snapshot() as frozen:
        assert len(frozen.opened.public_sql(asked.format("")).read_all()) == 2


def test_scan_and_table_read_what_is_current_unless_everything_is_asked_for(full: Warehouse) -> None:
    for table in ("probe_scores", "probe_predictions", "prompts", "runs", "activations"):
        everything = full.sql(f"SELECT * FROM {table} ORDER BY ALL")
        current = full.sql(f"SELECT * FROM current.{table} ORDER BY ALL")
        assert_frame_equal(full.table(table), current, check_row_order=False)
        assert_frame_equal(full.scan(table).collect(), current, check_row_order=False)
        assert_frame_equal(full.table(table, everything=True), everything, check_row_order=False)
        assert_frame_equal(full.scan(table, everything=True).collect(), everything, check_row_order=False)
    with pytest.raises(UnknownNameError, match="Did you mean 'probe_scores'"):
        full.table("probe_score")


def test_a_macro_called_bare_answers_the_saved_query_of_its_name(full: Warehouse, tmp_path: Path) -> None:
    lake = create_lake(tmp_path / "k")
    add_knowledge(lake, "alpha", "facts", "a" * 16, ALPHA)
    add_knowledge(lake, "alpha", "facts", "b" * 16, ALPHA, variant="noise")
    public = set(re.findall(r"CREATE MACRO (\w+)", macros()))
    named = {name for name in load_catalogue() if name.replace("-", "_") in public}
    assert named == {"concept-depth", "ablation-effects"}
    with Database(full.storage.local.lake) as concept, Database(lake) as knowledge:
        for name in named:
            database = concept if find_query(name).group == "concept" else knowledge
            answer = database.query(name)
            assert not answer.is_empty()
            assert_frame_equal(database.sql(f"FROM {name.replace('-', '_')}()"), answer, check_row_order=False)


# Which run is current --------------------------------------------------------------------------------------------


def test_an_imported_run_never_takes_the_place_of_one_measured_here(lake: Path) -> None:
    add_probe(lake, "a", probe(0.5))
    add_probe(lake, "b", probe(0.9), finished_at=YEAR_2999, **FROM_ELSEWHERE)
    add_probe(lake, "c", probe(0.8), dataset="e", finished_at=YEAR_2999, **FROM_ELSEWHERE)
    with Database(lake) as database, pytest.warns(KdbNote, match="1 run of 'm' imported from elsewhere is not shown"):
        assert shown(database, dataset="d") == [0.5]
        assert shown(database, dataset="e") == [0.8], "nothing was measured here"


def test_an_imported_run_is_preferred_where_that_was_asked_at_import(lake: Path) -> None:
    add_probe(lake, "a", probe(0.5), finished_at=LATER)
    add_probe(lake, "b", probe(0.9), preferred=True, **FROM_ELSEWHERE)
    with Database(lake) as database, pytest.warns(KdbNote, match="1 run of 'm' measured here is not shown"):
        assert shown(database) == [0.9]


def test_a_preference_that_a_run_measured_here_claims_counts_for_nothing(lake: Path) -> None:
    add_probe(lake, "a", probe(0.5), preferred=True)
    add_probe(lake, "b", probe(0.6), finished_at=LATER)
    with Database(lake) as database:
        assert shown(database) == [0.6]


def test_a_date_in_the_future_makes_no_imported_run_the_newest(lake: Path) -> None:
    early, late = NOON - timedelta(days=2), NOON - timedelta(days=1)
    add_probe(lake, "b", probe(0.9), finished_at=YEAR_2999, imported_from="x", imported_at=early)
    add_probe(lake, "a", probe(0.5), finished_at=late, imported_from="x", imported_at=LATER)
    with Database(lake) as database:
        assert shown(database) == [0.5]


def test_two_models_of_one_name_are_never_mixed(lake: Path) -> None:
    add_probe(lake, "a", probe(0.5), revision="first")
    add_probe(lake, "b", probe(0.6), dataset="e", revision="first")
    add_probe(lake, "c", probe(0.9), revision="second", finished_at=LATER)
    add_probe(lake, "d", probe(0.4), revision="first", source_run="a" * 16, finished_at=YEAR_2999)
    told = r"3 runs of another model stored under the name 'm' \(revision first\) are not shown; .*`run` shows one"
    with Database(lake) as database, pytest.warns(KdbNote, match=told):
        assert shown(database) == [0.9], "a later refit of the other model changes nothing"
        assert database.sql("SELECT DISTINCT dataset FROM current.probe_scores").rows() == [("d",)]
    with Database(lake) as database, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shown(database, run="b" * 16) == [0.6]
        assert shown(database, run="d" * 16) == [0.4]
        assert len(database.query("runs")) == 4


def test_an_imported_model_of_the_same_name_hides_no_model_measured_here(lake: Path) -> None:
    add_probe(lake, "a", probe(0.5), revision="own")
    add_probe(lake, "b", probe(0.9), revision="theirs", dataset="e", finished_at=YEAR_2999, **FROM_ELSEWHERE)
    with Database(lake) as database, pytest.warns(KdbNote, match="another model stored under the name 'm'"):
        assert shown(database) == [0.5]


def test_variants_of_different_models_under_one_name_are_told_of(lake: Path) -> None:
    add_probe(lake, "a", probe(0.5), revision="first")
    add_probe(lake, "b", probe(0.6), revision="second", variant="noise")
    with Database(lake) as database:
        with pytest.warns(KdbNote, match=r"Variants of 'm' were measured with different models .*first, second"):
            assert shown(database, variant="all") == [0.5, 0.6]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert shown(database) == [0.5]


def test_sql_over_schema_current_comes_with_the_notes_of_saved_queries(tmp_path: Path) -> None:
    lake = create_lake(tmp_path / "w")
    add_probe(lake, "a", probe(0.5), revision="first")
    add_probe(lake, "c", probe(0.9), revision="second", finished_at=LATER)
    told = "another model stored under the name 'm'"
    with Database(lake) as database:
        for text in ("SELECT accuracy FROM current.probe_scores", 'FROM "current"."probe_scores" SELECT accuracy'):
            with pytest.warns(KdbNote, match=told):
                assert set(database.sql(text)["accuracy"]) == {0.9}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert set(database.sql("SELECT accuracy FROM probe_scores")["accuracy"]) == {0.5, 0.9}


def test_an_empty_answer_names_the_variants_that_are_stored(lake: Path) -> None:
    add_probe(lake, "a", probe(0.5), variant="limit=20")
    add_probe(lake, "b", probe(0.5), model="other")
    with Database(lake) as database:
        told = r"No matching run of the variant 'default'\. Stored: limit=20 \(`variant='limit=20'`\)"
        with pytest.warns(KdbNote, match=told):
            assert shown(database, model="m") == []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert shown(database, model="m", variant="limit=20") == [0.5]


def test_an_older_run_and_a_refits_source_are_no_news(full: Warehouse) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert full.query("layer-accuracy", model="m")["accuracy"].unique().to_list() == [0.9]


def test_notes_are_printed_by_the_command_line_once(tmp_path: Path, run_kdb: Callable[..., Result]) -> None:
    for number, revision in enumerate(("first", "second")):
        with FolderStorage.create(tmp_path / "w").stage(f"{number:016x}", "m", "d") as staged:
            staged.write_rows("models", "part", [{"n_layers": 2, "revision": revision}])
            staged.write_rows("probe_scores", "part", [row | {"auc": 0.5} for row in probe(0.5)])
            staged.commit({"study": "concept", "variant": "default"})
    noted = "Note: 1 run of another model stored under the name 'm' (revision first) is not shown"
    select = "SELECT accuracy FROM current.probe_scores"
    with Warehouse(tmp_path / "w").snapshot() as held:
        assert "another model stored under the name" in answers.sql(held, select, "json")[0]["note"]
    for command in (
        ("query", "layer-accuracy"),
        ("plot", "depth-curves", "-o", tmp_path / "x.csv"),
        ("sql", select),
    ):
        result = run_kdb(*command, "--warehouse", tmp_path / "w")
        assert result.exit_code == 0, result.output
        assert result.stderr.count(noted) == 1


# Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "given", "problem"),
    [
        ("layer-accuracy", {"model": "mm"}, "Unknown model 'mm'. Did you mean 'm'?"),
        ("layer-accuracy", {"model": ["m", "x"]}, "Unknown model 'x'."),
        ("layer-accuracy", {"dataset": "livng"}, "Unknown dataset 'livng'. Did you mean 'living'?"),
        ("layer-accuracy", {"site": "resid_pst"}, "Did you mean 'resid_post'? Use one of resid_post, ffn_norm."),
        ("layer-accuracy", {"variant": "nois"}, "Did you mean 'noise'?"),
        ("concept-depth", {"variant": "all"}, "Unknown variant 'all'."),
        ("layer-accuracy", {"classifier": "logistc"}, "Did you mean 'logistic'"),
        ("layer-accuracy", {"split": "papr"}, "Did you mean 'paper'?"),
        ("layer-accuracy", {"run": "a" * 15 + "b"}, f"Did you mean {'a' * 16!r}"),
        ("top-heads", {"category": "capitol"}, "Did you mean 'capital'"),
        ("top-heads", {"category": "zo"}, "Did you mean 'zoo'?"),
        ("top-neurons", {"component": "fnn"}, "Use one of attn, ffn."),
        ("runs", {"study": "konwledge"}, "Did you mean 'knowledge'?"),
        ("top-heads", {"k": -1}, "parameter k: expected an integer from 1, found -1"),
        ("top-heads", {"k": "0"}, "parameter k: expected an integer from 1, found 0"),
        ("top-heads", {"k": 10**30}, "parameter k: expected an integer up to 2147483647"),
        ("head-by-category", {"layer": -1, "head": 0}, "parameter layer: expected an integer from 0, found -1"),
        ("head-by-category", {"layer": 3, "head": 0}, "parameter layer: expected an integer from 0 to 2, found 3"),
        ("prompt-story", {"prompt": 7}, "parameter prompt: expected an integer from 0 to 6, found 7"),
        ("concept-depth", {"jump_ratio": 0}, "parameter jump_ratio: expected a number above 0, found 0"),
        ("families-at-size", {"within": 0.5}, "parameter within: expected a number from 1, found 0.5"),
    ],
)
def test_a_value_that_cannot_be_is_an_error(lake: Path, query: str, given: dict[str, Any], problem: str) -> None:
    add_probe(lake, "a", probe(0.5))
    add_probe(lake, "b", probe(0.5), dataset="living", variant="noise")
    add_knowledge(lake, "alpha", "facts", "c" * 16, ALPHA)
    with Database(lake, [c * 16 for c in "abc"]) as database:
        with pytest.raises((QueryError, UnknownNameError), match=re.escape(problem)):
            database.query(query, **given)
        with pytest.raises((QueryError, UnknownNameError), match=re.escape(problem)):
            database.public_query(query, **given)


def test_a_value_that_is_known_and_has_no_rows_is_an_empty_answer(lake: Path) -> None:
    add_probe(lake, "a", probe(0.5))
    add_probe(lake, "b", probe(0.5, split="stratified-43"), model="n", dataset="e", variant="noise")
    with Database(lake, ["a" * 16, "b" * 16]) as database:
        for given in (
            {"model": "m", "dataset": "e"},
            {"model": "m", "variant": "noise"},
            {"model": "m", "run": "b" * 16},
            {"split": "stratified-43"},
            {"classifier": "random-forest"},
        ):
            assert database.query("layer-accuracy", **given).is_empty()


def test_what_is_not_in_a_snapshot_is_not_known_in_it(lake: Path) -> None:
    add_probe(lake, "a", probe(0.5))
    add_probe(lake, "b", probe(0.5), model="other")
    with Database(lake, ["a" * 16]) as database, pytest.raises(UnknownNameError):
        database.query("layer-accuracy", model="other")


def test_every_name_that_a_query_takes_is_checked_and_known_to_whoever_measures() -> None:
    taken = {param.name for saved in load_catalogue().values() for param in saved.params if param.type != "boolean"}
    assert taken <= set(DOMAINS)
    for name, known in (("site", SITES), ("classifier", CLASSIFIERS)):
        domain = DOMAINS[name]
        assert isinstance(domain, Names)
        assert set(domain.fixed) - {"default"} >= set(known)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["query", "layer-accuracy", "--model", "mm"], "Did you mean 'm'?"),
        (["query", "top-heads", "--k", "-1"], "expected an integer from 1, found -1"),
        (["plot", "depth-curves", "--model", "mm", "-o", "x.html"], "Did you mean 'm'?"),
        (["report", "--model", "m", "--model", "mm", "-o", "x.html"], "Did you mean 'm'?"),
        (["runs", "keep-vectors", "none", "--model", "mm"], "Did you mean 'm'?"),
        (["export", "x", "--model", "mm"], "Did you mean 'm'?"),
        (["export", "x", "--dataset", "dd"], "Did you mean 'd'?"),
        (["compare", "a" * 15 + "b", "b" * 16], f"Did you mean {'a' * 16!r}"),
    ],
)
def test_commands_check_values_too(
    full: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result], command: list[str], problem: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = run_kdb(*command, "--warehouse", full.storage.local.path)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.html").exists()


# Joins -----------------------------------------------------------------------------------------------------------

KEY = {"model", "dataset", "run"}


def statements() -> Iterator[str]:
    """Every SELECT of queries/."""
    for saved in load_catalogue().values():
        yield saved.sql
    for body in re.findall(r"(?ms)^CREATE MACRO[^;]*? AS TABLE\n(.*?;)", macros()):
        yield body
    for body in re.findall(r"(?ms)^CREATE VIEW \w+ AS\n(.*?;)", macros()):
        yield body


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(part)


def parsed(text: str) -> Any:
    (found,) = duckdb.execute("SELECT json_serialize_sql(?)", [text]).fetchall()[0]
    tree = json.loads(found)
    assert not tree["error"], text
    return tree


def equated(condition: Any) -> set[str]:
    """The columns that a join's condition compares with one of another name's, or of the same, for equality."""
    return {
        side["column_names"][-1]
        for node in nodes(condition)
        if node.get("type") == "COMPARE_EQUAL"
        for side in (node["left"], node["right"])
        if side.get("column_names")
    }


def halves_of_a_key(text: str) -> list[set[str]]:
    """The columns of each join, group and window of a statement that has `run` without `model` or `dataset`."""
    keys = []
    for node in nodes(parsed(text)):
        if node.get("type") == "JOIN":
            keys += [set(node["using_columns"]), equated(node["condition"])]
        for partition in ("partitions", "group_expressions"):
            columns = [part.get("column_names", [""])[-1] for part in node.get(partition) or ()]
            keys.append(set(columns))
    return [key for key in keys if "run" in key and not key >= KEY]


def test_the_check_of_joins_finds_those_by_run_alone() -> None:
    assert halves_of_a_key("FROM a JOIN b USING (run, prompt_id)") == [{"run", "prompt_id"}]
    assert halves_of_a_key("FROM a JOIN b ON a.run = b.run AND a.x = b.y") == [{"run", "x", "y"}]
    assert halves_of_a_key("SELECT count(*) OVER (PARTITION BY run) FROM a") == [{"run"}]
    assert halves_of_a_key("SELECT run, count(*) FROM a GROUP BY run") == [{"run"}]
    assert halves_of_a_key("FROM a JOIN b USING (run, dataset, model) SEMI JOIN c USING (model)") == []


def test_every_join_in_sql_is_by_model_dataset_and_run() -> None:
    found = list(statements())
    assert len(found) > 50
    assert {text: keys for text in found if (keys := halves_of_a_key(text))} == {}


def test_no_sql_in_python_joins_by_run_alone() -> None:
    root = Path(find_query("runs").path).parents[2]
    folders = ("analysis", "benchmarks", "docs", "ingest", "kdb", "warehouse")
    files = [file for folder in folders for kind in ("*.py", "*.md") for file in (root / folder).rglob(kind)]
    assert len(files) > 100
    for file in [*files, root / "README.md"]:
        for using in re.findall(r"(?:USING \(|on=\[)([^)\]]*)", file.read_text()):
            names = set(re.findall(r"\w+", using))
            assert "run" not in names or names >= KEY, f"{file}: {using}"


@pytest.mark.slow
def test_two_models_with_one_run_id_do_not_mix(tmp_path: Path) -> None:
    lake = create_lake(tmp_path / "w")
    add_knowledge(lake, "alpha", "facts", "a" * 16, ALPHA)
    names = [name for name, saved in load_catalogue().items() if saved.group in ("concept", "knowledge")]
    required: dict[str, Any] = {"prompt": 0, "layer": 1, "head": 0, "neuron": "f0_3"}
    asked = {name: {p.name: required[p.name] for p in find_query(name).params if p.required} for name in names}

    def answers() -> dict[str, pl.DataFrame]:
        with Database(lake) as database:
            return {name: database.query(name, model="alpha", **asked[name]) for name in names}

    before = answers()
    hundredfold = {
        table: [row | {"score": 100 * row["score"]} if "score" in row else row for row in rows]
        for table, rows in ALPHA.items()
    }
    add_knowledge(lake, "beta", "facts", "a" * 16, hundredfold)
    add_knowledge(lake, "alpha", "more", "a" * 16, hundredfold, variant="noise")
    for name, after in answers().items():
        assert_frame_equal(after, before[name], check_row_order=False)


# Names -----------------------------------------------------------------------------------------------------------


def test_a_category_named_all_is_refused(tmp_path: Path) -> None:
    from kdb.ingest.datasets import load_dataset

    (tmp_path / "facts.csv").write_text("prompt,answer,category\nThe capital of France is,Paris,all\n")
    with pytest.raises(KdbError, match="'all', which means all categories: rename it"):
        load_dataset(str(tmp_path / "facts.csv"))


def test_what_measuring_stores_as_default_is_what_current_shows() -> None:
    from kdb.ingest.concept.probing import _is_default

    def score(classifier: str, split: str) -> Any:
        return SimpleNamespace(classifier=classifier, split=split)

    assert _is_default(score(DEFAULT_CLASSIFIER, "grouped"), "grouped")
    assert not _is_default(score(DEFAULT_CLASSIFIER, "paper"), "grouped")
    assert not _is_default(score("logistic-raw", "grouped"), "grouped")


def test_an_empty_warehouse_can_be_scanned(tmp_path: Path) -> None:
    Warehouse.create(tmp_path / "w")
    assert kdb.open(tmp_path / "w").table("probe_scores").is_empty()
    write_shell_file(tmp_path / "w")


def test_sql_and_python_name_the_same_default_classifier(tmp_path: Path) -> None:
    assert Warehouse.create(tmp_path / "wh").sql("SELECT usual_classifier()").item() == DEFAULT_CLASSIFIER
