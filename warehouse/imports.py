"""Runs from another warehouse: checked as untrusted input, marked with their origin, and copied.

    import_run(storage, source.find("1f0c9a3b5d7e2468"), Origin("shared/"))

A run is copied if its id follows from its identity, its files have the columns and types of their tables, and its rows
name the right model, dataset and run. It never replaces a run measured here: `current_runs` gives those precedence,
unless the run was imported with --prefer-imported.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdb.errors import WarehouseError
from kdb.warehouse.compaction import rewriting
from kdb.warehouse.manifest import FileRecord, Manifest, RunFolder, run_id
from kdb.warehouse.migration import upgraded
from kdb.warehouse.run_copy import copy_run
from kdb.warehouse.schema import PARTITIONS, TABLES, Vector, arrow_schema, column_names
from kdb.warehouse.storage import Storage

_DERIVED = (("seed", "classifiers", "splits"), ("projections",))
"""Settings that determined, with the source run, the id of a refit or projection before schema 4."""

_ROWS = 2**18


@dataclass(frozen=True)
class Origin:
    """The source of an imported run, and whether the run takes precedence over runs measured here."""

    location: str
    preferred: bool = False


def import_run(storage: Storage, folder: RunFolder, origin: Origin) -> bool:
    """Copy a run of another warehouse into ``storage``; return False if a run with this id is already stored.

    Raises WarehouseError for a run that is damaged or inconsistent; nothing of it is then visible.
    """
    if any(stored.run == folder.run for stored in storage.run_folders()):
        return False

    def prepare(copy: RunFolder, manifest: Manifest) -> dict[str, pa.Table]:
        with _explained(folder):
            row = _checked_rows(copy, manifest)
            _check_id(copy, manifest, row)
            changed = dict(_upgraded(copy, manifest))
            changed["runs"] = _marked(changed.get("runs", _read(copy, manifest.of("runs")[0])), origin)
        return changed

    return copy_run(storage, folder, prepare)


@contextlib.contextmanager
def _explained(folder: RunFolder) -> Iterator[None]:
    """Convert an error about a copy into a WarehouseError about the original run."""
    try:
        yield
    except _RefusedError as refused:
        raise WarehouseError(
            f"Run {folder.run} ({folder.model} on {folder.dataset}) of {str(folder.path)!r} was not copied: {refused}."
        ) from refused


class _RefusedError(Exception):
    """The reason why a run is refused."""


def prefer(storage: Storage, folder: RunFolder, preferred: bool) -> bool:
    """Store with an imported run whether it takes precedence over local runs; return whether that changed anything.

    Raises WarehouseError for a run that another process is changing.
    """
    with rewriting(storage, folder) as files:
        row = pa.concat_tables(pq.ParquetFile(path).read() for path in files.paths["runs"])
        if row["imported_from"][0].as_py() is None or row["preferred"][0].as_py() == preferred:
            return False
        files.write({"runs": [_with(row, {"preferred": preferred})]})
        files.commit()
    return True


def _upgraded(folder: RunFolder, manifest: Manifest) -> Iterator[tuple[str, pa.Table]]:
    """Return the tables of a run to which the current schema adds columns."""
    for table in manifest.tables:
        if column_names(table, manifest.schema_version) != column_names(table):
            rows = pa.concat_tables(_read(folder, record) for record in manifest.of(table))
            yield table, upgraded(table, rows, folder.dataset)


def _marked(row: pa.Table, origin: Origin) -> pa.Table:
    changed: dict[str, Any] = {
        "imported_from": origin.location,
        "imported_at": datetime.now(UTC),
        "preferred": origin.preferred,
    }
    return _with(row, changed)


def _with(row: pa.Table, values: Mapping[str, Any]) -> pa.Table:
    """Return the row of ``runs`` with changed values."""
    for name, value in values.items():
        field = arrow_schema("runs").field(name)
        row = row.set_column(row.schema.get_field_index(name), field, pa.array([value], field.type))
    return row


def _read(folder: RunFolder, record: FileRecord) -> pa.Table:
    return pq.ParquetFile(folder.path / record.path).read()


def _checked_rows(folder: RunFolder, manifest: Manifest) -> dict[str, Any]:
    """Return the row of ``runs``, after checking that all files belong to their tables and to this run."""
    for record in manifest.files:
        try:
            _check_file(folder, record, manifest.schema_version)
        except (OSError, pa.ArrowException) as error:
            raise _RefusedError(f"{record.path} cannot be read ({error})") from error
    row = _only_row(folder, manifest, "runs")
    _check_row(folder, manifest, row)
    n_layers = _only_row(folder, manifest, "models")["n_layers"]
    if not isinstance(n_layers, int) or n_layers < 1:
        raise _RefusedError(f"its model has {n_layers} layers")
    _only_row(folder, manifest, "datasets")
    for table in manifest.tables:
        _check_places(folder, manifest, table, n_layers)
    return row


def _only_row(folder: RunFolder, manifest: Manifest, table: str) -> dict[str, Any]:
    """Return the row of a table that has one row in each run."""
    try:
        rows = [row for record in manifest.of(table) for row in _read(folder, record).to_pylist()]
    except (OverflowError, ValueError) as error:  # for example a time out of range
        raise _RefusedError(f"a value of its table {table} cannot be read ({error})") from error
    if len(rows) != 1:
        raise _RefusedError(f"its table {table} has {len(rows)} rows, expected one")
    return dict(rows[0])


def _check_places(folder: RunFolder, manifest: Manifest, table: str, n_layers: int) -> None:
    """Refuse duplicate rows, and rows of a layer that the model does not have."""
    there = column_names(table, manifest.schema_version)
    key = ", ".join(f'"{name}"' for name in TABLES[table].info["key"] if name in there)
    if not key:  # one row per run
        return
    layers = "min(layer), max(layer)" if "layer" in TABLES[table].columns else "NULL, NULL"
    files = [str(folder.path / record.path) for record in manifest.of(table)]
    with duckdb.connect(config={"temp_directory": str(folder.path / "temporary")}) as connection:
        rows = connection.read_parquet(files, hive_partitioning=False)
        n_places = connection.sql(f"SELECT count(*) FROM (SELECT DISTINCT {key} FROM rows)").fetchone()
        n_rows, first, last = connection.sql(f"SELECT count(*), {layers} FROM rows").fetchone() or (0, None, None)
        del rows
    if n_places != (n_rows,):
        raise _RefusedError(f"its table {table} has duplicate rows ({key})")
    if first is not None and not 0 <= first <= last < n_layers:
        raise _RefusedError(f"its table {table} has layers {first} to {last}, but its model has {n_layers}")


def _check_file(folder: RunFolder, record: FileRecord, version: int) -> None:
    file = pq.ParquetFile(folder.path / record.path)
    _check_columns(folder, record, file.schema_arrow, version)
    names = dict(zip(PARTITIONS, (folder.model, folder.dataset, folder.run), strict=True))
    vectors = [name for name in file.schema_arrow.names if _is_vector(file.schema_arrow.field(name).type)]
    sizes: set[int | None] = set()
    for batch in file.iter_batches(_ROWS):  # read to the end, to find pages that cannot be read
        for column, name in names.items():
            if column in batch.schema.names and not pc.all(pc.fill_null(pc.equal(batch[column], name), False)).as_py():
                raise _RefusedError(f"{record.path} has rows whose {column} is not {name!r}")
        for column in vectors:
            sizes.update(pc.unique(pc.list_value_length(batch[column])).to_pylist())
            if pc.list_flatten(batch[column]).null_count:
                raise _RefusedError(f"{record.path} has a vector with a missing number")
    if len(sizes) > 1:
        raise _RefusedError(f"{record.path} has vectors of different lengths, or of length 0")


def _check_columns(folder: RunFolder, record: FileRecord, schema: pa.Schema, version: int) -> None:
    expected = {name: arrow_schema(record.table).field(name).type for name in column_names(record.table, version)}
    vectors = {column.name for column in TABLES[record.table].columns if isinstance(column.type, Vector)}
    own = {field.name: field.type for field in schema if field.name not in PARTITIONS}
    if len(own) + len(PARTITIONS) < len(schema) or list(own) != list(expected):
        raise _RefusedError(f"{record.path} has the columns {', '.join(own)}; expected {', '.join(expected)}")
    for name, kind in own.items():
        if not (_is_vector(kind) if name in vectors else kind == expected[name]):
            raise _RefusedError(f"{record.path}, column {name}: its type is {kind}, expected {expected[name]}")
    for name in PARTITIONS:
        if name in schema.names and not pa.types.is_string(schema.field(name).type):
            raise _RefusedError(f"{record.path}, column {name}: its type is {schema.field(name).type}, expected string")


def _is_vector(kind: pa.DataType) -> bool:
    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind)
    return bool(lists and (pa.types.is_float32(kind.value_type) or pa.types.is_float16(kind.value_type)))


def _check_row(folder: RunFolder, manifest: Manifest, row: Mapping[str, Any]) -> None:
    """Raise WarehouseError unless the run's row agrees with its manifest and has all values that readers need."""
    settings = _settings(row)
    if settings is None:
        raise _RefusedError("its settings are not a JSON object")
    if row["study"] not in ("concept", "knowledge"):
        raise _RefusedError(f"its study is {row['study']!r}, expected concept or knowledge")
    if not isinstance(row["variant"], str) or not row["variant"] or row["finished_at"] is None:
        raise _RefusedError("its variant or its finished_at is missing")
    if sorted(row["tables"] or ()) != manifest.tables:
        raise _RefusedError("its row and its manifest name different tables")
    identity = manifest.identity or {}
    for name, value in (("model", folder.model), ("dataset", folder.dataset)):
        if identity.get(name, value) != value:
            raise _RefusedError(f"its identity names the {name} {identity[name]!r}")


def _settings(row: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        settings = json.loads(row["settings"])
    except (ValueError, TypeError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _check_id(folder: RunFolder, manifest: Manifest, row: Mapping[str, Any]) -> None:
    """Raise WarehouseError unless the run's id follows from its settings."""
    if manifest.formula is None:
        raise _RefusedError("its manifest does not record from what its run id was computed")
    if manifest.identity is not None:  # checked when the manifest was read
        return
    settings = {key: value for key, value in (_settings(row) or {}).items() if key != "step"}
    candidates = [settings]  # of a measured run, or of an ablation
    candidates += [
        {"source_run": row["source_run"], **{k: settings[k] for k in keys if k in settings}} for keys in _DERIVED
    ]
    if folder.run not in (run_id(identity, 1) for identity in candidates):
        raise _RefusedError("its run id does not follow from its settings")
