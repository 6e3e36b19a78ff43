"""The folder on this machine that every warehouse has: runs are staged in it, and files are read from it.

    W/warehouse.json    marks the folder; schema version
    W/lake/             runs by model, dataset and run, see ``run_folders.py``
    W/staging/          runs in progress, see ``staging.py``
    W/kdb.duckdb        views for the DuckDB shell, see ``shell_file.py``

The runs of a bucket are committed elsewhere: its folder is a cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdb.errors import WarehouseError
from kdb.warehouse.files import is_partial, storage_errors, write_json
from kdb.warehouse.manifest import parse_json, schema_version_of
from kdb.warehouse.parquet import with_partitions, write_parquet
from kdb.warehouse.run_folders import PLACEHOLDER, empty_file, list_run_folders
from kdb.warehouse.schema import OLDEST_SCHEMA, SCHEMA_VERSION, TABLES, arrow_schema
from kdb.warehouse.shell_lookup import SHELL_FILE
from kdb.warehouse.staging import Staging

_MARKER_SECONDS = 600
"""Seconds for which a change of the marker waits for another process that changes it."""


class LocalFolder:
    """A folder with the layout of a warehouse.

    Raises WarehouseError if ``path`` is not such a folder, or was written by a newer kdb.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.lake = self.path / "lake"
        self.staging = Staging(self.path / "staging")
        self.marker = self.path / "warehouse.json"
        self.shell_file = self.path / SHELL_FILE
        self.schema_version = self._checked_version()

    @classmethod
    def create(cls, path: Path) -> LocalFolder:
        """Open the folder at ``path``, and create it if it is missing or empty."""
        marker = path / "warehouse.json"
        with storage_errors(path):
            # Checked twice, because another process may be creating it, too.
            if not marker.exists() and not _is_vacant(path) and not marker.exists():
                raise WarehouseError(
                    f"{str(path)!r} is not empty and not a kdb warehouse. Name a new or empty folder with --warehouse."
                )
            if not marker.exists():
                # The marker comes first: after an interruption, the folder is recognised and completed later.
                path.mkdir(parents=True, exist_ok=True)
                write_json(marker, {"schema_version": SCHEMA_VERSION})
            local = cls(path)
            if not all(empty_file(local.lake, table).exists() for table in TABLES):
                _write_empty_tables(local.lake)
            local._record_schema_version()
        return local

    def _record_schema_version(self) -> None:
        """Record that the folder may hold runs of this kdb's schema, so that an older kdb refuses it."""
        if self.schema_version < SCHEMA_VERSION:
            _write_empty_tables(self.lake)
            self.record(schema_version=SCHEMA_VERSION, older_runs=bool(list_run_folders(self.lake)))
            self.schema_version = SCHEMA_VERSION

    def recorded(self) -> dict[str, Any]:
        """Return the fields of ``warehouse.json``. Raises WarehouseError if it cannot be read."""
        return parse_json(self.marker.read_bytes(), self.marker)

    def record(self, **changed: object) -> None:
        """Change fields of ``warehouse.json``; None removes a field."""
        with storage_errors(self.path):
            self.staging.path.mkdir(exist_ok=True)
            # Locked, because two processes may change different fields.
            with self.staging.lock("marks").acquire(timeout=_MARKER_SECONDS):
                fields = {**self.recorded(), **changed}
                write_json(self.marker, {name: value for name, value in fields.items() if value is not None})

    def restore_empty_tables(self) -> None:
        """Rewrite the empty typed files, without which a view over no run is an error."""
        with storage_errors(self.path):
            _write_empty_tables(self.lake)

    def _checked_version(self) -> int:
        name = repr(str(self.path))
        for folder in (self.lake, self.staging.path):
            if folder.is_symlink():
                raise WarehouseError(
                    f"{str(folder)!r} is a link, but a warehouse's folders must be real. Replace it by a folder."
                )
        if not self.path.is_dir():
            why = "it is a file" if self.path.exists() else "no such folder"
            raise WarehouseError(
                f"There is no warehouse at {name}: {why}. Create one with `kdb ingest`, or name another folder."
            )
        try:
            content = self.marker.read_text()
        except FileNotFoundError:
            raise WarehouseError(
                f"{name} is not a kdb warehouse: it has no warehouse.json. Name another folder with --warehouse."
            ) from None
        except UnicodeDecodeError:
            content = ""
        except OSError as error:
            raise WarehouseError(
                f"The warehouse {name} cannot be read: {error.strerror}. Check its permissions."
            ) from error
        return check_version(str(self.path), content)


def check_version(location: str, marker: str | bytes) -> int:
    """Return the schema version in a warehouse.json. Raises WarehouseError unless this kdb can read its tables."""
    version = schema_version_of(marker, location + "/warehouse.json")
    if version > SCHEMA_VERSION:
        raise WarehouseError(
            f"The warehouse {location!r} was written by a newer kdb (schema {version}, this one knows "
            f"{SCHEMA_VERSION}). Upgrade kdb, or name another with --warehouse."
        )
    if version < OLDEST_SCHEMA:
        raise WarehouseError(
            f"The warehouse {location!r} was written by an older kdb (schema {version}, this one reads "
            f"{OLDEST_SCHEMA} and later). Measure again into a new folder, named with --warehouse."
        )
    return version


def _is_vacant(path: Path) -> bool:
    """Whether a warehouse can be created here: no folder, an empty one, or one that a killed kdb left incomplete."""
    return not path.exists() or (path.is_dir() and all(map(is_partial, path.iterdir())))


def _write_empty_tables(lake: Path) -> None:
    for table in TABLES:
        rows = with_partitions(arrow_schema(table).empty_table(), *[PLACEHOLDER] * 3)
        write_parquet(empty_file(lake, table), [rows])
