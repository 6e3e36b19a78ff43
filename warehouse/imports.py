"""Runs from another warehouse: checked as input, marked with where they come from, and copied.

    take_in(lake, source, source.find("1f0c9a3b5d7e2468"), Origin("shared/"))

A run is copied if its id follows from its identity, its files have the columns and types of their tables, and its rows
say of which model, dataset and run they are. It never takes the place of a run measured here: `current_runs` puts those
first, unless the run was imported to be preferred.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdb.errors import WarehouseError
from kdb.warehouse.lake import Lake
from kdb.warehouse.manifest import FileRecord, Manifest, RunFolder, run_id
from kdb.warehouse.migration import upgraded
from kdb.warehouse.schema import PARTITIONS, TABLES, Vector, arrow_schema, column_names

_DERIVED = (("seed", "classifiers", "splits"), ("projections",))
"""Settings that, with its source, made the id of a derived run before schema 4: of a refit, of a projection."""

_ROWS = 2**18


@dataclass(frozen=True)
class Origin:
    """Where an imported run comes from, and whether it is to take precedence over runs measured here."""

    place: str
    preferred: bool = False


def take_in(lake: Lake, source: Lake, folder: RunFolder, origin: Origin) -> bool:
    """Copy a run of another warehouse into ``lake``; False where a run of this id is stored already.

    Raises WarehouseError for a run that is damaged, or is not what it says; nothing of it is then visible.
    """
    if any(found.run == folder.run for found in lake.run_folders()):
        return False
    manifest = source.manifest(folder)
    source.look([folder], vectors=True)
    row = _checked_rows(folder, manifest)
    _check_id(folder, manifest, row)
    changed = dict(_upgraded(folder, manifest))
    changed["runs"] = _marked(changed.get("runs", _read(folder, manifest.of("runs")[0])), origin)
    return lake.adopt(folder, changed=changed)


def _upgraded(folder: RunFolder, manifest: Manifest) -> Iterator[tuple[str, pa.Table]]:
    """The tables of a run that today's schema gives more columns."""
    for table in manifest.tables:
        if column_names(table, manifest.schema_version) != column_names(table):
            rows = pa.concat_tables(_read(folder, record) for record in manifest.of(table))
            yield table, upgraded(table, rows)


def _marked(row: pa.Table, origin: Origin) -> pa.Table:
    told: dict[str, Any] = {
        "imported_from": origin.place,
        "imported_at": datetime.now(UTC),
        "preferred": origin.preferred,
    }
    for name, value in told.items():
        field = arrow_schema("runs").field(name)
        row = row.set_column(row.schema.get_field_index(name), field, pa.array([value], field.type))
    return row


def _read(folder: RunFolder, record: FileRecord) -> pa.Table:
    return pq.ParquetFile(folder.path / record.path).read()


def _checked_rows(folder: RunFolder, manifest: Manifest) -> dict[str, Any]:
    """The row of ``runs``, once every file was read and found to be of its table and of this run."""
    for record in manifest.files:
        try:
            _check_file(folder, record, manifest.schema_version)
        except (OSError, pa.ArrowException) as error:
            raise _refused(folder, f"{record.path} cannot be read ({error})") from error
    rows = _read(folder, manifest.of("runs")[0]).to_pylist()
    if len(rows) != 1:
        raise _refused(folder, f"its table runs has {len(rows)} rows, and a run has one")
    _check_row(folder, manifest, rows[0])
    return dict(rows[0])


def _check_file(folder: RunFolder, record: FileRecord, version: int) -> None:
    file = pq.ParquetFile(folder.path / record.path)
    _check_columns(folder, record, file.schema_arrow, version)
    names = dict(zip(PARTITIONS, (folder.model, folder.dataset, folder.run), strict=True))
    for batch in file.iter_batches(_ROWS):  # read to the end: a page that cannot be read is found here
        for column, name in names.items():
            if column in batch.schema.names and not pc.all(pc.equal(batch[column], name)).as_py() and len(batch):
                raise _refused(folder, f"{record.path} has rows of another {column} than {name!r}")


def _check_columns(folder: RunFolder, record: FileRecord, found: pa.Schema, version: int) -> None:
    expected = {name: arrow_schema(record.table).field(name).type for name in column_names(record.table, version)}
    vectors = {column.name for column in TABLES[record.table].columns if isinstance(column.type, Vector)}
    own = {field.name: field.type for field in found if field.name not in PARTITIONS}
    if len(own) + len(PARTITIONS) < len(found) or list(own) != list(expected):
        raise _refused(folder, f"{record.path} has the columns {', '.join(own)}; expected {', '.join(expected)}")
    for name, kind in own.items():
        if not (_is_vector(kind) if name in vectors else kind == expected[name]):
            raise _refused(folder, f"{record.path}, column {name}: its type is {kind}, expected {expected[name]}")
    for name in PARTITIONS:
        if name in found.names and not pa.types.is_string(found.field(name).type):
            raise _refused(
                folder, f"{record.path}, column {name}: its type is {found.field(name).type}, expected string"
            )


def _is_vector(kind: pa.DataType) -> bool:
    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind)
    return bool(lists and (pa.types.is_float32(kind.value_type) or pa.types.is_float16(kind.value_type)))


def _check_row(folder: RunFolder, manifest: Manifest, row: Mapping[str, Any]) -> None:
    """Raise WarehouseError unless the run's row agrees with its manifest and holds what every reader counts on."""
    settings = _settings(row)
    if settings is None:
        raise _refused(folder, "its settings are not a JSON object")
    if row["study"] not in ("concept", "knowledge"):
        raise _refused(folder, f"its study is {row['study']!r}, expected concept or knowledge")
    if not isinstance(row["variant"], str) or not row["variant"] or row["finished_at"] is None:
        raise _refused(folder, "its variant or the time at which it ended is missing")
    if sorted(row["tables"] or ()) != manifest.tables:
        raise _refused(folder, "its row names other tables than its manifest")
    identity = manifest.identity or {}
    for name, value in (("model", folder.model), ("dataset", folder.dataset)):
        if identity.get(name, value) != value:
            raise _refused(folder, f"its identity is of the {name} {identity[name]!r}")


def _settings(row: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        settings = json.loads(row["settings"])
    except (ValueError, TypeError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _check_id(folder: RunFolder, manifest: Manifest, row: Mapping[str, Any]) -> None:
    """Raise WarehouseError unless the run's id follows from what determined its result."""
    if manifest.formula is None:
        raise _refused(folder, "its manifest does not say what its run id was computed from")
    if manifest.identity is not None:  # checked where the manifest was read
        return
    settings = {key: value for key, value in (_settings(row) or {}).items() if key != "step"}
    candidates = [settings]  # of a measured run, or of an ablation
    candidates += [
        {"source_run": row["source_run"], **{k: settings[k] for k in keys if k in settings}} for keys in _DERIVED
    ]
    if folder.run not in (run_id(identity, 1) for identity in candidates):
        raise _refused(folder, "its run id does not follow from its settings")


def _refused(folder: RunFolder, why: str) -> WarehouseError:
    return WarehouseError(
        f"Run {folder.run} ({folder.model} on {folder.dataset}) of {str(folder.path)!r} is not copied: {why}."
    )
