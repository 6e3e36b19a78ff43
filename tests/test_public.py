"""Exported folders as others read them: with `datasets`, a config a table, and in DuckDB over HTTP."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from helpers.hub import attaching, listening
from starlette.applications import Starlette
from starlette.responses import FileResponse, Response
from starlette.routing import Route

import kdb
from kdb.warehouse.checksums import file_record
from kdb.warehouse.dataset_card import configs
from kdb.warehouse.files import write_json
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.manifest import MANIFEST, Manifest
from kdb.warehouse.schema import PARTITIONS, TABLES
from kdb.warehouse.vectors import activation_groups

pytestmark = pytest.mark.slow

SIZES = {"lab/wide 1%": 5, "007": 3}
"""Two models, with names that a path encodes, and the length of their vectors."""


def measure(lake: FolderStorage, model: str, size: int) -> None:
    """A run with rows in every table but one, of which it has an empty file."""
    with lake.stage(f"{size:016x}", model, "towns") as staged:
        for table in TABLES.keys() - {"runs", "activations", "ablations"}:
            layers = [{"layer": layer, "n_layers": 4, "score": 0.5, "accuracy": 0.5 + layer / 10} for layer in range(4)]
            rows = [{k: v for k, v in row.items() if k in TABLES[table].columns} for row in layers]
            staged.write_rows(table, "part", rows[:1] if table == "models" else rows)
        staged.write_rows("ablations", "part", [])
        for name, prompts in (("one", [0, 1]), ("two", [2])):
            vectors = np.full((len(prompts), 4, 1, size), size, np.float32)
            staged.write("activations", name, activation_groups(prompts, ["resid_post"], vectors))
        staged.commit({"study": "concept", "variant": "default", "settings": '{"seed": 1}'})


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, run_kdb: Callable[..., Result]) -> Path:
    """An exported folder with the runs of two models."""
    lake = FolderStorage.create(tmp_path_factory.mktemp("public") / "w")
    for model, size in SIZES.items():
        measure(lake, model, size)
    folder = lake.local.path.with_name("shared")
    result = run_kdb("export", folder, "--license", "cc-by-4.0", "--warehouse", lake.local.path)
    assert result.exit_code == 0, result.output
    return folder


# A card, and `datasets` ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    datasets = pytest.importorskip("datasets")
    cache = str(tmp_path_factory.mktemp("datasets-cache"))
    return lambda name: datasets.load_dataset(str(shared_folder), name, split="train", cache_dir=cache)


def test_every_table_with_rows_is_a_config_that_datasets_loads(shared_folder: Path, load: Callable[[str], Any]) -> None:
    names = configs(FolderStorage(shared_folder).run_folders())
    vectors = {"activations-lab%2Fwide%201%25": 5, "activations-007": 3}
    assert set(names) == TABLES.keys() - {"activations", "ablations"} | set(vectors)
    opened = kdb.open(shared_folder)
    for table in TABLES.keys() & names.keys():
        rows = load(table)
        assert sorted(set(zip(rows["model"], rows["dataset"], rows["run"], strict=True))) == sorted(
            (model, "towns", f"{size:016x}") for model, size in SIZES.items()
        )
        assert len(rows) == opened.sql(f"SELECT count(*) FROM {table}").item()
        assert {*PARTITIONS, *TABLES[table].columns.keys()} == set(rows.column_names)
    for name, size in vectors.items():
        assert [row["vector"] for row in load(name)] == [[float(size)] * size] * 12


def test_the_card_says_what_the_numbers_are(shared_folder: Path) -> None:
    card = re.sub(" +", " ", (shared_folder / "README.md").read_text())  # cells are filled with spaces
    for text in (
        *("license: cc-by-4.0", "| lab/wide 1% ", "| 007 ", '`{"seed": 1}`', f"{3:016x}"),
        *("### head_scores", "log-probability increase of the target", 'load_dataset("', "hive_partitioning = true"),
    ):
        assert text in card
    assert "### ablations" not in card


def test_every_file_tells_where_it_is_from(shared_folder: Path) -> None:
    for folder in FolderStorage(shared_folder).run_folders():
        for file in folder.path.rglob("*.parquet"):
            rows = pq.ParquetFile(file).read(list(PARTITIONS)).to_pylist()
            names = {"model": folder.model, "dataset": folder.dataset, "run": folder.run}
            assert all(row == names for row in rows)


def test_files_that_do_not_tell_are_read_beside_those_that_do(shared_folder: Path, tmp_path: Path) -> None:
    """Older files do not hold the names of their model, dataset and run as columns."""
    copy = Path(shutil.copytree(shared_folder, tmp_path / "mixed"))
    for file in copy.glob("lake/model=007/*/*/*/*.parquet"):
        pq.write_table(pq.ParquetFile(file).read().drop_columns(list(PARTITIONS)), file)
    for folder in FolderStorage(copy).run_folders():
        records = tuple(file_record(path, folder.path) for path in sorted(folder.path.rglob("*.parquet")))
        write_json(folder.path / MANIFEST, Manifest(records).content())
    old, new = kdb.open(copy), kdb.open(shared_folder)
    for table in TABLES:
        assert sorted(map(repr, old.sql(f"FROM {table}").rows())) == sorted(map(repr, new.sql(f"FROM {table}").rows()))
        assert sorted(map(repr, old.scan(table).collect().rows())) == sorted(
            map(repr, new.scan(table).collect().rows())
        )


# Over HTTP -------------------------------------------------------------------------------------------------------


class Site:
    """The folder, served as any static host does, ranges included; and how many bytes were read of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent, self.url = folder, 0, ""

    def app(self) -> Any:
        inner = Starlette(routes=[Route("/shared/{path:path}", self._file)])

        async def count(scope: Any, receive: Any, send: Any) -> None:
            async def counted(message: Any) -> None:
                self.sent += len(message.get("body", b"")) if scope["method"] == "GET" else 0
                await send(message)

            await inner(scope, receive, counted)

        return count

    async def _file(self, request: Any) -> Response:
        file = self.folder / request.path_params["path"]
        return FileResponse(file) if file.is_file() else Response(status_code=404)


@pytest.fixture(scope="module")
def site(shared_folder: Path, run_kdb: Callable[..., Result]) -> Iterator[Site]:
    site = Site(shared_folder)
    with listening(site.app()) as base:
        site.url = f"{base}/shared"
        result = run_kdb(
            "rebuild", "--url", f"{site.url}/", "-o", shared_folder / "paper.duckdb", "--warehouse", shared_folder
        )
        assert result.exit_code == 0, result.output
        assert site.sent == 0  # nothing was fetched to write it
        yield site


@pytest.fixture
def shell(site: Site) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB with httpfs, which has attached the file by its URL."""
    with attaching() as connection:
        connection.execute(f"ATTACH '{site.url}/paper.duckdb' AS paper (READ_ONLY)")
        yield connection


def test_views_and_macros_answer_over_http(shared_folder: Path, shell: duckdb.DuckDBPyConnection) -> None:
    assert shell.execute("SELECT count(*) FROM paper.probe_scores").fetchall() == [(8,)]
    shell.execute("USE paper; SET TimeZone = 'UTC'")
    opened = kdb.open(shared_folder)
    for query in ("FROM concept_depth()", "FROM current_runs", *(f"FROM {table}" for table in TABLES)):
        there = pl.DataFrame(shell.execute(query).to_arrow_table())
        assert sorted(map(repr, there.rows())) == sorted(map(repr, opened.sql(query).rows())), query
    assert shell.execute("FROM ablations").fetchall() == []


def test_a_question_reads_the_files_of_its_table_alone(site: Site, shell: duckdb.DuckDBPyConnection) -> None:
    site.sent = 0
    rows = shell.execute("SELECT DISTINCT model, dataset FROM paper.head_scores WHERE model = 'lab/wide 1%'").fetchall()
    assert rows == [("lab/wide 1%", "towns")]
    assert site.sent <= sum(path.stat().st_size for path in site.folder.glob("lake/*/*/*/head_scores/*.parquet"))


def test_the_file_has_the_storage_version_of_the_shell_file(shared_folder: Path, site: Site) -> None:
    def version(path: Path) -> int:
        return int.from_bytes(path.read_bytes()[12:20], "little")

    assert version(shared_folder / "paper.duckdb") == version(shared_folder / "kdb.duckdb") == 64


@pytest.mark.parametrize(
    "options", [["--url", "https://host/w"], ["-o", "x.duckdb"], ["--url", "ftp://host", "-o", "x.duckdb"]]
)
def test_half_an_address_is_refused(shared_folder: Path, run_kdb: Callable[..., Result], options: list[str]) -> None:
    result = run_kdb("rebuild", *options, "--warehouse", shared_folder)
    assert result.exit_code == 2
    assert "https://example.org/shared" in result.stderr
    assert not Path("x.duckdb").exists()
