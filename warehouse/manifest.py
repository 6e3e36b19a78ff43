"""Manifests: lists of the files of committed runs, read as untrusted input.

    manifest = read_manifest(folder, run="1f0c9a3b5d7e2468")

A manifest is JSON. It lists the files of a run by their paths within its folder, with their rows, bytes and SHA-256,
and says how the run's id follows from what determined the result. Nothing here opens a file that a manifest names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from kdb.errors import WarehouseError
from kdb.warehouse.schema import OLDEST_SCHEMA, SCHEMA_VERSION, TABLES

MANIFEST = "manifest.json"

FORMULA = 2
"""Number of the current formula for run ids; see `run_id`."""

_DEEPEST = 50
"""Maximum nesting of lists and objects in JSON."""

_LARGEST = 64 * 2**20
"""Maximum bytes of a manifest, enough for some hundred thousand files."""

_FILE_NAME = re.compile(r"[\w-][\w.-]{0,200}\.parquet", re.ASCII)
_SHA256 = re.compile("[0-9a-f]{64}")
RUN_ID = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class RunFolder:
    """A committed run, as named by its path. ``version`` changes whenever the run is rewritten under its id."""

    run: str
    model: str
    dataset: str
    path: Path
    version: str = field(default="", compare=False)


@dataclass(frozen=True)
class FileRecord:
    """Record of a file at commit; ``path`` is ``<table>/<name>.parquet``, relative to the run's folder."""

    path: str
    rows: int
    bytes: int
    sha256: str

    @property
    def table(self) -> str:
        """Return the table whose rows the file holds."""
        return self.path.partition("/")[0]


@dataclass(frozen=True)
class Manifest:
    """The files of a run, their schema version, and the values from which its id was computed.

    ``formula`` and ``identity`` are None if these values are not recorded.
    """

    files: tuple[FileRecord, ...]
    schema_version: int = SCHEMA_VERSION
    formula: int | None = None
    identity: Mapping[str, Any] | None = None

    @property
    def tables(self) -> list[str]:
        """Return the tables of which the run has files, in alphabetical order."""
        return sorted({file.table for file in self.files})

    def of(self, table: str) -> list[FileRecord]:
        """Return the files of one table."""
        return [file for file in self.files if file.table == table]

    def row_counts(self) -> dict[str, int]:
        """Return the number of rows of each table."""
        return {table: sum(file.rows for file in self.of(table)) for table in self.tables}

    def content(self) -> dict[str, Any]:
        """Return the manifest as an object for JSON."""
        return asdict(self)


Files = Mapping[int, Mapping[str, Sequence[str]]]
"""The paths or URLs of each table's files, for each schema version."""


def run_id(identity: Mapping[str, Any], formula: int = FORMULA) -> str:
    """Return 16 hex digits derived from everything that determines a result.

    Formula 1, of runs measured before schema 4, also hashed the schema version, so a new column changed every id.
    """
    salt = {1: {"schema_version": 3}, 2: {"formula": 2}}[formula]
    text = json.dumps({**identity, **salt}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_manifest(folder: Path, run: str) -> Manifest:
    """Return the manifest of the run in ``folder``. Raises WarehouseError, or FileNotFoundError if there is none."""
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            path.lstat()
            raise _damaged(path, "it is not a regular file")
        if path.stat().st_size > _LARGEST:
            raise _damaged(path, f"it is longer than {_LARGEST:,} bytes")
        return parse_manifest(path.read_bytes(), run, str(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise WarehouseError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def row_counts(folder: RunFolder) -> dict[str, int]:
    """Return the row counts of a run's tables from its manifest. Raises WarehouseError if that cannot be read."""
    try:
        return read_manifest(folder.path, folder.run).row_counts()
    except FileNotFoundError:
        raise WarehouseError(
            f"{folder.path / MANIFEST} is missing: run {folder.run} is damaged. See `kdb verify`."
        ) from None


def parse_manifest(content: bytes, run: str, where: str) -> Manifest:
    """Return the manifest in ``content`` of the run with this id. Raises WarehouseError for any other content."""
    fields = parse_json(content, where)
    version = _whole(fields.get("schema_version"), "schema_version", where)
    if not OLDEST_SCHEMA <= version <= SCHEMA_VERSION:
        raise WarehouseError(
            f"{where} was written with schema {version}, but this kdb reads {OLDEST_SCHEMA} to {SCHEMA_VERSION}. "
            f"{'Upgrade kdb' if version > SCHEMA_VERSION else 'Measure the run again'}."
        )
    files = fields.get("files")
    if not isinstance(files, list) or not files:
        raise _damaged(where, "it lists no files")
    records = tuple(_record(file, where) for file in files)
    if len({record.path.lower() for record in records}) < len(records):
        raise _damaged(where, "it lists a file twice")
    if [record.table for record in records].count("runs") != 1:
        raise _damaged(where, "it does not list exactly one file of the table runs")
    formula = 1 if version < 4 else fields.get("formula")
    return Manifest(records, version, *_checked_identity(formula, fields.get("identity"), run, where))


def parse_json(content: bytes | str, where: object) -> dict[str, Any]:
    """Return the JSON object in ``content``. Raises WarehouseError for any other content, however deep or long."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise _damaged(where, "it is nested too deeply") from None
    except ValueError as error:
        raise _damaged(where, f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _damaged(where, "it is not a JSON object")
    if _is_deep(value):
        raise _damaged(where, "it is nested too deeply")
    return cast("dict[str, Any]", value)


def _is_deep(content: object) -> bool:
    """Whether lists and objects are nested more than `_DEEPEST` times, because writing JSON is recursive."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            return False
    return True


def _inner(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list) else []


def schema_version_of(content: bytes | str, where: str) -> int:
    """Return the schema version in a ``warehouse.json``. Raises WarehouseError if there is none."""
    return _whole(parse_json(content, where).get("schema_version"), "schema_version", where)


def _record(file: object, where: object) -> FileRecord:
    if not isinstance(file, dict) or set(file) != {"path", "rows", "bytes", "sha256"}:
        raise _damaged(where, "a file's fields are not path, rows, bytes and sha256")
    path, sha256 = file["path"], file["sha256"]
    table, _, name = path.partition("/") if isinstance(path, str) else ("", "", "")
    if table not in TABLES or not _FILE_NAME.fullmatch(name):
        raise _damaged(where, f"it lists {str(path)[:200]!r}, which is not TABLE/NAME.parquet")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise _damaged(where, f"the sha256 of {path} is not 64 hex digits")
    return FileRecord(path, _whole(file["rows"], "rows", where), _whole(file["bytes"], "bytes", where), sha256)


def _whole(value: object, name: str, where: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise _damaged(where, f"{name} is not a whole number")
    return value


def _checked_identity(formula: object, identity: object, run: str, where: object) -> tuple[int | None, Any]:
    """Return formula and identity after checking the run's id against them; None and None if there are none."""
    if formula is None and identity is None:
        return None, None
    if formula not in (1, FORMULA):
        raise _damaged(where, f"it computes its run id by formula {formula!r}, but this kdb knows only 1 and {FORMULA}")
    if identity is None and formula == 1:
        return 1, None  # the table runs has the values from which it was computed: see `kdb.warehouse.imports`
    if not isinstance(identity, dict):
        raise _damaged(where, "its identity is not a JSON object")
    if run_id(identity, formula) != run:
        raise _damaged(where, f"the run id {run} does not follow from its identity")
    return formula, identity


def _damaged(where: object, why: str) -> WarehouseError:
    return WarehouseError(f"{where} is damaged: {why}.")
