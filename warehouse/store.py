"""A warehouse as its users see it: folders and DuckDB under one handle."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from kdb.errors import QueryError, UnknownNameError, WarehouseError
from kdb.warehouse import database
from kdb.warehouse.lake import Lake, storage_errors, write_json
from kdb.warehouse.schema import SCHEMA_VERSION, TABLES, data_dictionary

if TYPE_CHECKING:
    import polars as pl
    from sqlalchemy import Engine


class Warehouse:
    """Measurements that can be asked for; ``kdb.open`` makes one.

    Every question sees the runs that were committed when it was asked, each of them whole.
    Raises WarehouseError if ``path`` is no warehouse, or one that a newer kdb wrote.
    """

    _shared: database.Database | None = None

    def __init__(self, path: str | Path) -> None:
        self.lake = Lake(Path(path))
        with contextlib.suppress(WarehouseError):  # on a read-only disk there is nothing to mend, only to ask
            self._mend()

    @classmethod
    def create(cls, path: str | Path) -> Warehouse:
        """Open the warehouse at ``path`` to write to it, making it first where the folder is missing or empty."""
        Lake.create(Path(path))
        opened = cls(path)
        opened._mend()  # where that fails, so would whatever is to be written
        return opened

    @property
    def tables(self) -> list[str]:
        """Names of the tables."""
        return list(TABLES)

    @contextlib.contextmanager
    def snapshot(self, runs: Sequence[str] | None = None, limits: database.Limits | None = None) -> Iterator[Warehouse]:
        """The warehouse as it is now, opened once for many questions: all see the same runs.

        `runs` are those that `runs()` gave a while ago; `limits` bound what questions may use.
        """
        opening = self._database() if runs is None else database.Database(self.lake.root, runs, limits)
        with opening as opened:
            frozen = copy.copy(self)
            frozen._shared = opened
            yield frozen

    def query(self, name: str, /, **params: object) -> pl.DataFrame:
        """Answer a saved query; ``kdb queries`` lists them with their parameters.

        Raises UnknownNameError for a name that is none, QueryError for wrong parameters.
        """
        with self._database() as opened:
            return opened.query(name, **params)

    def sql(self, text: str, params: Sequence[object] | Mapping[str, object] | None = None) -> pl.DataFrame:
        """Answer one SELECT; ``params`` fill ``?`` or ``$name``. Raises QueryError for anything else."""
        with self._database() as opened:
            return opened.sql(text, params)

    @property
    def opened(self) -> database.Database:
        """The database of a snapshot, for answers that are streamed."""
        if self._shared is None:
            raise AssertionError("only a snapshot has a database of its own")
        return self._shared

    def scan(self, table: str) -> pl.LazyFrame:
        """A table as a Polars LazyFrame, over all runs. Raises UnknownNameError."""
        if table not in TABLES:
            raise UnknownNameError("table", table, TABLES, "`kdb schema` lists them.")
        return database.scan(self.lake.root, table, self.runs())

    def engine(self) -> Engine:
        """A SQLAlchemy engine that reads the views, for pandas and notebooks."""
        return database.engine(self.lake.root, self.runs)

    def rebuild(self) -> Path:
        """Write ``kdb.duckdb`` anew, and the empty tables that its views need; returns its path."""
        self.lake.restore_empty_tables()
        with storage_errors(self.lake.path):
            database.write_shell_file(self.lake.path)
            write_json(self.lake.marker, {"schema_version": SCHEMA_VERSION, "views": self._views})
        return self.lake.path / "kdb.duckdb"

    def publish(self, url: str, path: Path) -> None:
        """Write a DuckDB file over the committed runs as anyone reads them from ``url``, the warehouse's folder.

        Raises QueryError where that is no URL, WarehouseError where the file cannot be written.
        """
        if not re.match(r"https?://[^/?#]+[^?#]*$", url):
            raise QueryError(
                f"--url: expected the address of a folder, such as https://example.org/shared, found {url!r}"
            )
        files = {
            table: [
                f"{url.rstrip('/')}/{quote(file.relative_to(self.lake.path).as_posix(), safe='/=')}"
                for folder in self.lake.run_folders()
                for file in sorted((folder.path / table).glob("*.parquet"))
            ]
            for table in TABLES
        }
        with storage_errors(path.parent):
            database.write_public_file(path, self.lake.root, files)

    def _mend(self) -> None:
        """Rebuild ``kdb.duckdb`` where it is missing, or its views are not of this place and version."""
        marker = json.loads(self.lake.marker.read_text())
        if marker.get("views") != self._views or not (self.lake.path / "kdb.duckdb").exists():
            self.rebuild()

    @functools.cached_property
    def _views(self) -> str:
        statements = [*database.view_statements(self.lake.root), data_dictionary()]  # comments on columns, too
        return hashlib.sha256("\n".join(statements).encode()).hexdigest()

    def _database(self) -> contextlib.AbstractContextManager[database.Database]:
        if self._shared is not None:
            return contextlib.nullcontext(self._shared)
        return database.Database(self.lake.root, self.runs())

    def runs(self) -> list[str]:
        """Ids of the committed runs."""
        return [folder.run for folder in self.lake.run_folders()]
