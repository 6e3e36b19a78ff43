"""Migration: rewrites runs of an older schema in the current one, with the same rows and id, and the new columns.

    for folder in older(storage):
        migrate(storage, folder)
    finish(storage)

A run is replaced in one step, after its new files were read back. Whenever the process is killed, the complete old run
or the complete new run is there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdb.errors import WarehouseError
from kdb.warehouse.compaction import rewriting
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.schema import DEFAULT_PROBE, PARTITIONS, SCHEMA_VERSION, TABLES, arrow_schema, column_names
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
        written = files.write({table: _groups(table, files.paths[table]) for table in tables})
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
    there = {*column_names(table, version), *_COMPUTED.get(table, ())}
    return [column.name for column in TABLES[table].columns if column.name not in there and table != "runs"]


_COMPUTED = {"probe_scores": ("is_default",)}
"""Columns that are computed from those of an older schema."""


def upgraded(table: str, rows: pa.Table) -> pa.Table:
    """Return rows of an older schema with the current columns; new ones are computed from the others, or NULL."""
    columns = []
    for field in arrow_schema(table):
        if field.name in rows.column_names:
            columns.append((rows.schema.field(field.name), rows[field.name]))
        elif field.name == "is_default":
            columns.append((field, is_default_probe(rows)))
        else:
            columns.append((field, pa.chunked_array([pa.nulls(len(rows), field.type)])))
    columns += [(rows.schema.field(name), rows[name]) for name in PARTITIONS if name in rows.column_names]
    return pa.table([values for _, values in columns], schema=pa.schema([field for field, _ in columns]))


def is_default_probe(rows: pa.Table) -> pa.ChunkedArray:
    """Whether each row of ``probe_scores`` is of the default classifier on the default split."""
    equal = [pc.equal(rows[name], value) for name, value in DEFAULT_PROBE.items()]
    return functools.reduce(pc.and_, equal)


def _groups(table: str, paths: Sequence[Path]) -> Iterator[pa.Table]:
    for path in paths:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield upgraded(table, file.read_row_group(group))
        if not file.num_row_groups:
            yield upgraded(table, file.read())


def _check_same_rows(table: str, version: int, before: Sequence[Path], after: Path) -> None:
    """Raise WarehouseError unless a table's new file has the same rows as the old ones, in the old columns."""
    columns = [*column_names(table, version), *PARTITIONS]
    old = pa.concat_tables(pq.ParquetFile(path).read(columns) for path in before)
    if not pq.ParquetFile(after).read(columns).equals(old):
        raise WarehouseError(
            f"{after} does not hold the rows of {before[0]}. The run was not changed; run the command again."
        )
