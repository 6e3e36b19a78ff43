"""A warehouse as its users see it: folders and DuckDB under one handle."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import quote

from kdb.errors import QueryError, UnknownNameError, WarehouseError
from kdb.warehouse import current, database
from kdb.warehouse.bucket import is_url
from kdb.warehouse.lake import Lake, storage_errors, write_json
from kdb.warehouse.schema import SCHEMA_VERSION, TABLES, data_dictionary

if TYPE_CHECKING:
    import polars as pl
    from sqlalchemy import Engine

    from kdb.warehouse.cloud import CloudLake


class Warehouse:
    """Measurements that can be asked for; ``kdb.open`` makes one.

    Every question sees the runs that were committed when it was asked, each of them whole.
    ``location`` is a folder, or the URL of one in an object store. Raises WarehouseError if it is no warehouse, or one
    that a newer kdb wrote.
    """

    _shared: database.Database | None = None

    def __init__(self, location: str | Path) -> None:
        self._open(lake_at(location))

    @classmethod
    def create(cls, location: str | Path) -> Warehouse:
        """Open a warehouse to write to it, making it first where the folder is missing or empty, or the URL vacant."""
        opened = cls.__new__(cls)
        opened._open(lake_at(location, create=True))
        if not opened._remote:
            opened._mend()  # where that fails, so would whatever is to be written
        return opened

    def _open(self, lake: Lake) -> None:
        self.lake = lake
        self._remote = _remote(lake)
        if not self._remote:
            with contextlib.suppress(WarehouseError):  # on a read-only disk there is nothing to mend, only to ask
                self._mend()

    @property
    def tables(self) -> list[str]:
        """Names of the tables."""
        return list(TABLES)

    @contextlib.contextmanager
    def snapshot(self, runs: Sequence[str] | None = None, limits: database.Limits | None = None) -> Iterator[Warehouse]:
        """The warehouse as it is now, opened once for many questions: all see the same runs.

        `runs` are those that `runs()` gave a while ago; `limits` bound what questions may use.
        """
        opening = self._database() if runs is None else self._database_of(runs, limits)
        with opening as opened:
            frozen = copy.copy(self)
            frozen._shared = opened
            yield frozen

    def query(self, name: str, /, **params: object) -> pl.DataFrame:
        """Answer a saved query; ``kdb queries`` lists them with their parameters.

        Raises UnknownNameError for a name that is none, QueryError for wrong parameters.
        """
        return self._ask(lambda opened: opened.query(name, **params))

    def sql(self, text: str, params: Sequence[object] | Mapping[str, object] | None = None) -> pl.DataFrame:
        """Answer one SELECT; ``params`` fill ``?`` or ``$name``. Raises QueryError for anything else."""
        return self._ask(lambda opened: opened.sql(text, params))

    def _ask(self, question: Callable[[database.Database], pl.DataFrame]) -> pl.DataFrame:
        """The answer of the runs as they are now; asked again where a file was gone that had just been listed."""
        try:
            with self._database() as opened:
                return question(opened)
        except QueryError as error:
            if not database.is_gone(error):
                raise
        with self._database() as opened:
            return question(opened)

    @property
    def opened(self) -> database.Database:
        """The database of a snapshot, for answers that are streamed."""
        if self._shared is None:
            raise AssertionError("only a snapshot has a database of its own")
        return self._shared

    def table(self, table: str, *, everything: bool = False) -> pl.DataFrame:
        """The current rows of a table, those of `current.TABLE` in SQL; or everything that is stored.

        Raises UnknownNameError.
        """
        return self.scan(table, everything=everything).collect()

    def scan(self, table: str, *, everything: bool = False) -> pl.LazyFrame:
        """The same as a Polars LazyFrame: of the files, only what is needed is read. Raises UnknownNameError."""
        if table not in TABLES:
            raise UnknownNameError("table", table, TABLES, "`kdb schema` lists them.")
        runs = self.runs() if everything else self._current_runs(table)
        if self._remote:
            self._remote.fetch(table, runs)
        rows = database.scan(self.lake.root, table, runs)
        return rows if everything else rows.filter(current.default_rows(table))

    def _current_runs(self, table: str) -> list[str]:
        with self._database() as opened:
            return [run for _, _, run in opened.current_runs(table)]

    def files(self, table: str) -> list[str]:
        """The committed Parquet files of a table, for other engines: absolute paths, or URLs of a bucket.

        Model, dataset and run are in the path (``model=…/dataset=…/run=…``, percent-encoded). Raises UnknownNameError.
        """
        if table not in TABLES:
            raise UnknownNameError("table", table, TABLES, "`kdb schema` lists them.")
        return self.lake.committed_files(table)

    def engine(self) -> Engine:
        """A SQLAlchemy engine that reads the views, for pandas and notebooks."""
        return database.engine(self.lake.root, self.runs, self._remote)

    def rebuild(self) -> Path:
        """Write ``kdb.duckdb`` anew, and the empty tables that its views need; returns its path.

        Of a warehouse in an object store, it reads the runs that are there now.
        """
        self.lake.restore_empty_tables()
        shell = self.lake.path / database.SHELL_FILE
        with storage_errors(self.lake.path):
            if self._remote:
                urls = {table: self.files(table) for table in TABLES}
                database.write_public_file(shell, self.lake.root, urls, encoded=False)
            else:
                database.write_shell_file(self.lake.path)
                write_json(self.lake.marker, {"schema_version": SCHEMA_VERSION, "views": self._views})
        return shell

    def publish(self, url: str, path: Path) -> None:
        """Write a DuckDB file over the committed runs as anyone reads them from ``url``, the warehouse's folder.

        Raises QueryError where that is no URL, WarehouseError where the file cannot be written.
        """
        if not re.match(r"https?://[^/?#]+[^?#]*$", url):
            raise QueryError(
                f"--url: expected the address of a folder, such as https://example.org/shared, found {url!r}"
            )
        base = url.rstrip("/")
        within = {table: [f.removeprefix(f"{self.lake.location}/") for f in self.files(table)] for table in TABLES}
        urls = {table: [f"{base}/{quote(path, safe='/=')}" for path in paths] for table, paths in within.items()}
        with storage_errors(path.parent):
            database.write_public_file(path, self.lake.root, urls, encoded=True)

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
        return self._database_of(self.runs())

    def _database_of(self, runs: Sequence[str], limits: database.Limits | None = None) -> database.Database:
        return database.Database(self.lake.root, runs, limits, self._remote)

    def runs(self) -> list[str]:
        """Ids of the committed runs."""
        return [folder.run for folder in self.lake.run_folders()]


def lake_at(location: str | Path, *, create: bool = False) -> Lake:
    """The lake in a folder, or in an object store where the location is a URL."""
    if not is_url(location):
        return Lake.create(Path(location)) if create else Lake(Path(location))
    from kdb.warehouse.cloud import CloudLake

    return CloudLake.create_at(str(location)) if create else CloudLake(str(location))


def _remote(lake: Lake) -> CloudLake | None:
    return cast("CloudLake", lake) if is_url(lake.location) else None
