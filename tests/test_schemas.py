"""Warehouses that an older kdb measured: read as they are, and migrated run by run.

``tests/warehouses`` has a small warehouse of each older schema, measured by the kdb of its day: both studies, a refit,
a projection and an ablation of a tiny model. A change of the schema adds the one that it makes old.
"""

from __future__ import annotations

import json
import shutil
import signal
import zipfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import duckdb
import pytest
from click.testing import Result

import kdb
from kdb.queries.catalogue import load_catalogue
from kdb.warehouse import migration
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.schema import OLDEST_SCHEMA, SCHEMA_VERSION, TABLES, column_names
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

RunKdb = Callable[..., Result]
FOLDER = Path(__file__).parent / "warehouses"
OLDER = range(OLDEST_SCHEMA, SCHEMA_VERSION)
REQUIRED: dict[str, Any] = {"model": "tiny", "dataset": "facts", "prompt": 0, "neuron": "f0_1", "layer": 0, "head": 0}


NEW_TABLES = (
    "baselines",
    "baseline_predictions",
    "probe_weights",
    "probe_transfer",
    "effects",
    "lens_readouts",
    "candidate_scores",
    "lens_fits",
    "ablated_parts",
    "experts",
    "router",
    "routing",
    "expert_scores",
)
UNKNOWN_THEN = {
    *("depth-by-step", "scores-by-step", "families-at-size", "baselines", "probe-transfer"),
    *("head-effects", "layer-effects", "score-vs-effect", "answer-by-layer", "lens-story", "lens-fits"),
    *("expert-scores", "top-experts", "router-by-category"),
    *(f"{kind}{table}" for kind in ("table ", "current ", "scan ") for table in NEW_TABLES),
}
"""Questions for which an older warehouse has no rows."""

OLDER_NAMES = {("logistic-raw", "label-0-first"), ("logistic-paper", "label-0-first")}
"""Current names of the classifiers and of the split `paper` of older runs."""


def unpacked(version: int, folder: Path) -> Path:
    with zipfile.ZipFile(FOLDER / f"schema-{version}.zip") as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture(params=[version for version in OLDER if version < 5])
def with_older_names(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A warehouse of a schema in which the names of classifiers and splits had another meaning."""
    return unpacked(request.param, tmp_path / "w")


@pytest.fixture(params=OLDER)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return unpacked(request.param, tmp_path / "w")


def answers(warehouse: Warehouse) -> dict[str, Any]:
    """The answer to every saved query, and every table's rows."""
    found: dict[str, Any] = {}
    for name, saved in load_catalogue().items():
        given = {p.name: REQUIRED[p.name] for p in saved.params if p.required}
        found[name] = sorted(map(repr, warehouse.query(name, **given).rows()))
    for table in TABLES:
        found[f"table {table}"] = sorted(map(repr, warehouse.sql(f"FROM {table}").rows()))
        found[f"current {table}"] = sorted(map(repr, warehouse.sql(f"FROM current.{table}").rows()))
        found[f"scan {table}"] = sorted(map(repr, warehouse.scan(table, everything=True).collect().rows()))
    return found


def test_there_is_a_warehouse_of_every_older_schema() -> None:
    assert [int(path.stem.removeprefix("schema-")) for path in sorted(FOLDER.glob("*.zip"))] == list(OLDER)


def test_every_query_reads_an_older_warehouse_as_it_is(old: Path) -> None:
    opened = kdb.open(old)
    found = answers(opened)
    assert {name for name, rows in found.items() if not rows} <= UNKNOWN_THEN
    assert all(folder.path.is_dir() for folder in opened.storage.run_folders())
    assert {opened.storage.manifest(folder).schema_version for folder in opened.storage.run_folders()} == {
        opened.storage.local.schema_version
    }
    missing = opened.sql("SELECT weights_dtype, imported_from FROM models JOIN runs USING (model, dataset, run)")
    assert {row[1] for row in missing.rows()} == {None}
    assert opened.sql("SELECT count(rival_logp) FROM prompts").item() == 0


def test_the_shell_reads_an_older_warehouse(old: Path) -> None:
    kdb.open(old)
    with duckdb.connect(old / "kdb.duckdb", read_only=True) as shell:
        assert shell.sql("SELECT count(*) FROM current.probe_scores").fetchall()[0][0] > 0


def test_the_shell_gives_older_probes_todays_names(with_older_names: Path) -> None:
    old = with_older_names
    kdb.open(old)
    with duckdb.connect(old / "kdb.duckdb", read_only=True) as shell:
        read = "SELECT DISTINCT classifier, split, is_default FROM {} ORDER BY ALL"
        for table in ("probe_scores", "probe_predictions"):
            rows = shell.sql(read.format(table)).fetchall()
            assert rows == kdb.open(old).sql(read.format(table)).rows()
            assert {row[:2] for row in rows} >= OLDER_NAMES
            assert [row[:2] for row in rows if row[2]] == [("logistic-raw", "label-0-first")]


def test_older_probes_have_todays_names_in_sql_and_in_polars(with_older_names: Path) -> None:
    opened = kdb.open(with_older_names)
    assert opened.sql("SELECT count(f1_paper), count(c) FROM probe_scores").row(0) == (0, 0)
    for table in ("probe_scores", "probe_predictions"):
        read = opened.sql(f"FROM {table} ORDER BY ALL")
        assert opened.scan(table, everything=True).collect().sort(read.columns).rows() == read.sort(read.columns).rows()
    told = "SELECT DISTINCT control_accuracy, selectivity, shuffled_accuracy IS NULL FROM probe_scores"
    assert opened.sql(told).rows() == [(None, None, False)]


def test_migration_keeps_every_row_and_answer_and_leaves_no_older_run(old: Path, run_kdb: RunKdb) -> None:
    before, runs = answers(kdb.open(old)), {folder.run for folder in FolderStorage(old).run_folders()}
    result = run_kdb("migrate", "--warehouse", old)
    assert result.exit_code == 0, result.output
    assert f"{len(runs)} runs migrated." in result.stdout
    assert "prompts.rival_logp" in result.stderr  # told as what only a new measurement can give
    opened = kdb.open(old)
    assert migration.older(opened.storage) == []
    assert list(opened.storage.verify()) == []
    refitted = {folder.run for folder in opened.storage.run_folders()} - runs
    for run in refitted:
        assert opened.sql("SELECT DISTINCT split FROM probe_scores WHERE run = ? AND is_default", [run]).rows() == [
            ("paper",)
        ]
        opened.storage.remove(run)
    after = answers(kdb.open(old))
    assert {name for name in before if before[name] != after[name]} == set()
    assert run_kdb("migrate", "--warehouse", old).stdout.startswith("Nothing to migrate: ")


def test_an_older_run_is_imported_in_todays_schema_and_says_where_it_is_from(
    old: Path, tmp_path: Path, run_kdb: RunKdb
) -> None:
    result = run_kdb("import", old, "--warehouse", tmp_path / "new")
    assert result.exit_code == 0, result.output
    opened = kdb.open(tmp_path / "new")
    assert migration.older(opened.storage) == []
    rows = opened.sql("SELECT DISTINCT imported_from, preferred, imported_at IS NOT NULL FROM runs").rows()
    assert rows == [(str(old), False, True)]
    for table in set(TABLES) - {"runs", "probe_scores"}:
        assert opened.sql(f"FROM {table} ORDER BY ALL").rows() == kdb.open(old).sql(f"FROM {table} ORDER BY ALL").rows()


def test_an_older_run_whose_id_is_not_that_of_its_settings_is_not_imported(
    old: Path, tmp_path: Path, run_kdb: RunKdb
) -> None:
    for folder in FolderStorage(old).run_folders():
        folder.path.rename(folder.path.with_name(f"run={int(folder.run, 16) ^ 1:016x}"))
    result = run_kdb("import", old, "--warehouse", tmp_path / "new")
    assert result.exit_code == 2
    assert kdb.open(tmp_path / "new").storage.run_folders() == []


def test_what_is_measured_into_an_older_warehouse_stands_beside_its_runs(
    old: Path, tiny_model: Path, user_dataset: Path, run_kdb: RunKdb
) -> None:
    before = kdb.open(old).sql("SELECT run FROM runs")["run"].to_list()
    arguments = ["--model", tiny_model, "--name", "another", "--dataset", user_dataset, "--warehouse", old]
    assert run_kdb("ingest", *arguments).exit_code == 0
    opened = kdb.open(old)
    assert json.loads((old / "warehouse.json").read_text())["schema_version"] == SCHEMA_VERSION
    told = dict(opened.sql("SELECT model, count(token_ids) FROM prompts GROUP BY model").rows())
    assert told == {"another": 40, "tiny": 0}
    assert set(before) < set(opened.sql("SELECT run FROM runs")["run"])
    with duckdb.connect(old / "kdb.duckdb", read_only=True) as shell:
        assert dict(shell.sql("SELECT model, count(token_ids) FROM prompts GROUP BY model").fetchall()) == told


def test_a_warehouse_that_cannot_be_written_is_read_as_it_is(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kdb.warehouse.files.appears_whole", refuse)
    monkeypatch.setattr("kdb.warehouse.shell_file.rebuild", refuse)
    assert len(kdb.open(old).query("runs")) == len(FolderStorage(old).run_folders())


def migrate_all(folder: Path) -> None:
    lake = FolderStorage(folder)
    for run in migration.older(lake):
        migration.migrate(lake, run)


def test_a_migration_that_is_killed_leaves_every_run_whole_and_goes_on(old: Path, processes: ForkServerContext) -> None:
    expected = {name: rows for name, rows in answers(kdb.open(old)).items() if "probe_scores" not in name}
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        process = processes.Process(target=migrate_all, args=(old,))
        process.start()
        process.join(delay)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        assert list(FolderStorage(old).verify()) == []
    migrate_all(old)
    opened = kdb.open(old)
    assert migration.older(opened.storage) == []
    assert {name: rows for name, rows in answers(opened).items() if "probe_scores" not in name} == expected
    assert not list(old.glob("staging/rewritten-*"))


def test_a_damaged_run_is_not_migrated_and_left_as_it_is(old: Path, run_kdb: RunKdb) -> None:
    file = next(old.glob("lake/model=tiny/*/*/models/*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    kept = shutil.copytree(file.parents[1], old.parent / "kept")
    result = run_kdb("migrate", "--warehouse", old)
    assert result.exit_code == 2
    assert "is damaged" in result.stderr
    for path in kept.rglob("*.parquet"):
        assert (file.parents[1] / path.relative_to(kept)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("version", OLDER)
def test_columns_say_since_when_they_are_there(version: int) -> None:
    assert all(set(column_names(table, version)) <= set(column_names(table)) for table in TABLES)
    assert any(column_names(table, version) != column_names(table) for table in TABLES)
