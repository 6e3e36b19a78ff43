"""Compare three ways to commit a run to an object store: kdb's commit object, Delta Lake and DuckLake.

    python benchmarks/commit.py

Ten small runs are written to an S3 server on loopback that delays every answer by 30 ms, as a cloud does. Prints for
each way the seconds and requests to write one run, to ask a question in a new process, and to ask it again there. The
files and the question are the same, and the answers are compared. kdb is also measured without its local mirror:
through DuckDB's own reader (httpfs) and the views that `kdb rebuild` writes.

Two differences that the figures do not show: Delta Lake commits table by table, so a reader can see a run in one table
and not yet in the next. DuckLake commits all tables at once, in a catalog that no bucket can hold: here a DuckDB file
on the local disk, which one process at a time can write; elsewhere a database server.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import polars as pl
from deltalake import DeltaTable, write_deltalake

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.object_store import KEY, SECRET, ObjectStore, extension, object_store

import kdb
from kdb.warehouse import bucket_storage
from kdb.warehouse.manifest import RunFolder, read_manifest
from kdb.warehouse.run_copy import copy_run
from kdb.warehouse.schema import PARTITIONS
from kdb.warehouse.store import Warehouse
from kdb.web.demo import PACKED

LATENCY = 0.03
URL = "s3://lab/kdb"

QUESTION = """
SELECT model, category, layer, head, avg(score) AS score
FROM head_scores JOIN prompts USING (model, dataset, run, prompt_id)
WHERE model = 'smollm2-135m' GROUP BY ALL ORDER BY score DESC, layer, head LIMIT 10
"""
TABLES = ("head_scores", "prompts")

Way = tuple[Callable[[RunFolder], object], Callable[[], Iterator[Callable[[], pl.DataFrame]]]]
"""A function that writes a run, and one that yields two queries: the first as in a new process, then a repetition."""


def marker(store: ObjectStore, folder: Path) -> Way:
    """Kdb's own: files, then the commit object that names them; what is read is kept in a local mirror."""
    bucket_storage.user_cache_path = lambda _: folder / "writer"  # type: ignore[assignment]  # a cache of its own
    lake = Warehouse.create(URL).storage

    def ask() -> Iterator[Callable[[], pl.DataFrame]]:
        bucket_storage.user_cache_path = lambda _: folder / "reader"  # type: ignore[assignment]  # and of its own
        yield lambda: kdb.open(URL).sql(QUESTION)
        yield lambda: kdb.open(URL).sql(QUESTION)

    return functools.partial(copy_run, lake), ask


def direct(store: ObjectStore, folder: Path) -> Way:
    """The same objects, read by httpfs in a shell."""

    def ask() -> Iterator[Callable[[], pl.DataFrame]]:
        shell = connect(store, str(kdb.open(URL).rebuild()), read_only=True)
        yield lambda: shell.execute(QUESTION).pl()
        yield lambda: shell.execute(QUESTION).pl()

    return lambda _: None, ask


def delta(store: ObjectStore, folder: Path) -> Way:
    """A Delta table for each of kdb's."""
    options = {**store.environment, "AWS_ALLOW_HTTP": "true", "aws_conditional_put": "etag"}

    def write(run: RunFolder) -> None:
        for table, frame in tables(run):
            write_deltalake(
                f"s3://lab/delta/{table}",
                frame.to_arrow(),
                mode="append",
                partition_by=["model", "dataset", "run"],
                storage_options=options,
            )

    def ask() -> Iterator[Callable[[], pl.DataFrame]]:
        def answer() -> pl.DataFrame:
            shell = duckdb.connect()
            for table in TABLES:
                found = DeltaTable(f"s3://lab/delta/{table}", storage_options=options).to_pyarrow_dataset()
                shell.register(table, found)
            return shell.execute(QUESTION).pl()

        yield answer
        yield answer

    return write, ask


def ducklake(store: ObjectStore, folder: Path) -> Way:
    """A DuckLake whose catalog is a local file, partitioned as kdb's folders are."""
    shell = connect(store)
    shell.execute(f"LOAD '{extension('ducklake')}'")
    shell.execute(
        f"ATTACH 'ducklake:{folder / 'catalog.ducklake'}' AS lake "
        "(DATA_PATH 's3://lab/ducklake/', DATA_INLINING_ROW_LIMIT 0); USE lake"  # rows in the bucket
    )

    def write(run: RunFolder) -> None:
        shell.execute("BEGIN")
        for table, frame in tables(run):
            shell.register("frame", frame)
            shell.execute(f"CREATE TABLE IF NOT EXISTS {table} AS SELECT * FROM frame LIMIT 0")
            shell.execute(f"INSERT INTO {table} SELECT * FROM frame")
        shell.execute("COMMIT")

    def ask() -> Iterator[Callable[[], pl.DataFrame]]:
        yield lambda: shell.execute(QUESTION).pl()
        yield lambda: shell.execute(QUESTION).pl()

    return write, ask


def tables(run: RunFolder) -> Iterator[tuple[str, pl.DataFrame]]:
    """Every table of a run, with the run's names."""
    names = [pl.lit(getattr(run, name)).alias(name) for name in PARTITIONS]
    for record in read_manifest(run.path):
        yield record.path.partition("/")[0], pl.read_parquet(run.path / record.path, glob=False).with_columns(names)


def connect(store: ObjectStore, path: str = ":memory:", *, read_only: bool = False) -> duckdb.DuckDBPyConnection:
    """A shell that reads the server through httpfs."""
    shell = duckdb.connect(path, read_only=read_only)
    shell.execute(f"LOAD '{extension('httpfs')}'")
    shell.execute(
        f"CREATE SECRET (TYPE s3, KEY_ID '{KEY}', SECRET '{SECRET}', USE_SSL false, URL_STYLE 'path', "
        f"ENDPOINT '{store.endpoint.removeprefix('http://')}')"
    )
    return shell


def measured(store: ObjectStore, work: Callable[[], object]) -> tuple[object, str]:
    """Return the result of the work, and a text with its seconds and number of requests."""
    with store.counted() as seen:
        begun = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - begun
    return result, f"{seconds:.2f} s, {len(seen)}"


def main() -> None:
    ways = {"kdb": marker, "kdb, httpfs": direct, "Delta Lake": delta, "DuckLake": ducklake}
    with tempfile.TemporaryDirectory() as name, object_store() as store:
        folder = Path(name)
        os.environ.update(store.environment)
        zipfile.ZipFile(PACKED).extractall(folder / "demo")
        runs = sorted(Warehouse(folder / "demo").storage.run_folders(), key=lambda run: run.dataset == "knowledge")
        expected = kdb.open(folder / "demo").sql(QUESTION)
        print("| | write a run | ask | ask again |\n| --- | --- | --- | --- |")
        for way, prepare in ways.items():
            write, ask = prepare(store, folder)
            store.latency = 0.0
            for run in runs[:-1]:
                write(run)
            store.latency = LATENCY
            _, written = measured(store, lambda write=write: write(runs[-1]))  # type: ignore[misc]
            told = []
            for answer in ask():
                rows, said = measured(store, answer)
                assert isinstance(rows, pl.DataFrame) and rows.drop("score").equals(expected.drop("score")), way
                told.append(said)
            print(f"| {way} | {written} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()
