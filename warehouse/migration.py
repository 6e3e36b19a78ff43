"""Migration: rewrites runs of an older schema in the current one, with the same rows and id, and the new columns.

    for folder in older(storage):
        migrate(storage, folder)
    finish(storage)

A run is replaced in one step, after its new files were read back. Whenever the process is killed, the complete old run
or the complete new run is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from kdb.errors import WarehouseError
from kdb.warehouse.compaction import rewriting
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.scan import as_today
from kdb.warehouse.schema import OLDER_ROWS, PARTITIONS, SCHEMA_VERSION, TABLES, arrow_schema, column_names
from kdb.warehouse.shell_file import rebuild
from kdb.warehouse.storage import Storage


def older(storage: Storage) -> list[RunFolder]:
    """Return the committed runs whose files have an older schema."""
    return [folder for folder in storage.run_folders() if storage.manifest(folder).schema_version < SCHEMA_VERSION]


def migrate(storage: Storage, folder: RunFolder) -> list[str]:
    """Rewrite a run in the current schema; returns the columns that stay NULL until the run is measured again.

    Raises WarehouseError if the run is damaged, or cannot be replaced in one step (`Storage.replace_run`).
    """
    with rewriting(storage, folder) as files:
        version = files.manifest.schema_version
        tables = [table for table in files.paths if column_names(table, version) != column_names(table)]
        written = files.write({table: _groups(table, files.paths[table], folder.dataset) for table in tables})
        for table, path in written.items():
            _check_same_rows(table, version, files.paths[table], path)
        files.commit(schema_version=SCHEMA_VERSION, formula=files.manifest.formula or 1)
    return [f"{table}.{name}" for table in tables for name in missing(table, version)]


def finish(storage: Storage) -> None:
    """Record that no run has an older schema, and rewrite ``kdb.duckdb``, whose views are then simpler."""
    if not storage.is_remote:
        storage.local.record(older_runs=None)
        rebuild(storage)


def missing(table: str, version: int) -> list[str]:
    """Return the columns of a table that only a new measurement can fill in a run of this schema version."""
    there = {*column_names(table, version), *OLDER_ROWS.get(table, ())}
    return [column.name for column in TABLES[table].columns if column.name not in there and table != "runs"]


def upgraded(table: str, rows: pa.Table, dataset: str) -> pa.Table:
    """Return rows of an older schema in the current one; columns that they lack are computed from others, or NULL.

    ``dataset`` is that of the rows' run, on which the name of a split depends.
    """
    columns = []
    for field in arrow_schema(table):
        if field.name in rows.column_names:
            columns.append((rows.schema.field(field.name), rows[field.name]))
        else:
            columns.append((field, pa.chunked_array([pa.nulls(len(rows), field.type)])))
    columns += [(rows.schema.field(name), rows[name]) for name in PARTITIONS if name in rows.column_names]
    made = pa.table([values for _, values in columns], schema=pa.schema([field for field, _ in columns]))
    return _renamed(table, made, dataset) if table in OLDER_ROWS else made


def _renamed(table: str, rows: pa.Table, dataset: str) -> pa.Table:
    frame = pl.from_arrow(rows).lazy()  # type: ignore[union-attr]  # a table gives a frame
    read = as_today(table, frame.with_columns(dataset=pl.lit(dataset))).collect()
    return read.select(rows.column_names).to_arrow().cast(rows.schema)


def _groups(table: str, paths: Sequence[Path], dataset: str) -> Iterator[pa.Table]:
    for path in paths:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield upgraded(table, file.read_row_group(group), dataset)
        if not file.num_row_groups:
            yield upgraded(table, file.read(), dataset)


def _check_same_rows(table: str, version: int, before: Sequence[Path], after: Path) -> None:
    """Raise WarehouseError unless a table's new file has the same rows as the old ones, in columns of one meaning."""
    columns = [name for name in (*column_names(table, version), *PARTITIONS) if name not in OLDER_ROWS.get(table, ())]
    old = pa.concat_tables(pq.ParquetFile(path).read(columns) for path in before)
    if not pq.ParquetFile(after).read(columns).equals(old):
        raise WarehouseError(
            f"{after} does not hold the rows of {before[0]}. The run was not changed; run the command again."
        )
