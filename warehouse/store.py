"""The public class of a warehouse, which combines folders and DuckDB."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from kdb.errors import KdbError, QueryError, UnknownNameError, WarehouseError
from kdb.queries.catalogue import find_query
from kdb.warehouse import current, database
from kdb.warehouse.bucket import is_url
from kdb.warehouse.files import storage_errors
from kdb.warehouse.inspection import DamagedRunError, memory_path
from kdb.warehouse.lake import Lake
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.schema import SCHEMA_VERSION, TABLES, has_vectors
from kdb.warehouse.shell import SHELL_FILE

if TYPE_CHECKING:
    import duckdb
    import polars as pl
    from sqlalchemy import Engine

    from kdb.warehouse.cloud import CloudLake


VERSION = 1
"""Increased when the rules of `current_runs` change, so that cached results are not reused."""

_TRIES = 5
"""Maximum attempts of a query while runs are being changed, before a snapshot of its runs is made."""

_CHANGING = "The runs of the warehouse are being changed. Retry in a moment."

_VECTORS = re.compile(rf"\b({'|'.join(filter(has_vectors, TABLES))})\b", re.IGNORECASE)


class Warehouse:
    """Measurements that can be queried; ``kdb.open`` returns one.

    A query sees the runs that were committed when it was started, each of them complete. ``location`` is a folder, or a
    URL in an object store. Raises WarehouseError if it is not a warehouse, or was written by a newer kdb.
    """

    _shared: database.Database | None = None
    _folders: Sequence[RunFolder] = ()
    _root: Path | None = None

    def __init__(self, location: str | Path) -> None:
        self._open(lake_at(location))

    @classmethod
    def create(cls, location: str | Path) -> Warehouse:
        """Open a warehouse to write to it, and create it if the folder or URL is missing or empty."""
        opened = cls.__new__(cls)
        opened._open(lake_at(location, create=True))
        if not opened._remote:
            opened._mend()  # if this fails, later writes would fail, too
        return opened

    def _open(self, lake: Lake) -> None:
        self.lake = lake
        self._remote = _remote(lake)
        if not self._remote:
            # On a read-only disk, nothing can be repaired, but queries work.
            with contextlib.suppress(WarehouseError, OSError):
                lake.sweep()
                self._mend()

    @property
    def tables(self) -> list[str]:
        """Return the names of the tables."""
        return list(TABLES)

    @contextlib.contextmanager
    def snapshot(self, runs: Sequence[str] | None = None, limits: database.Limits | None = None) -> Iterator[Warehouse]:
        """Return a snapshot of the warehouse, opened once for many queries, which all see the same runs and rows.

        In a writable folder, it does not change even if runs are removed (`Lake.held`). It is restricted to `runs`, if
        given; `limits` are those of its queries.
        """
        with contextlib.ExitStack() as stack:
            root, folders = self._held(stack, runs)
            frozen = copy.copy(self)
            frozen._folders = folders
            frozen._root = root
            frozen._shared = stack.enter_context(self._database_of(folders, limits, root))
            yield frozen

    def _held(self, stack: contextlib.ExitStack, runs: Sequence[str] | None) -> tuple[Path, list[RunFolder]]:
        for _ in range(_TRIES):
            folders = self._listed(runs)
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                root, held = stack.enter_context(self.lake.held(folders))
                if self.lake.still(folders):
                    return root, held
        raise WarehouseError(_CHANGING)

    @contextlib.contextmanager
    def unheld(self, runs: Sequence[str], limits: database.Limits | None = None) -> Iterator[Warehouse]:
        """Return a snapshot of runs that are not protected from removal: see `unchanged`."""
        folders = self._listed(runs)
        with self._database_of(folders, limits) as opened:
            frozen = copy.copy(self)
            frozen._folders, frozen._shared = folders, opened
            yield frozen

    def unchanged(self) -> bool:
        """Whether the runs of a snapshot are the same as when it was opened."""
        return self.lake.still(self._folders)

    def query(self, name: str, /, **params: object) -> pl.DataFrame:
        """Run a saved query; ``kdb queries`` lists them with their parameters.

        Raises UnknownNameError for an unknown name, QueryError for wrong parameters.
        """
        saved = find_query(name)
        return self._ask(lambda opened: opened.query(name, **params), with_current=False, needed_by=saved.sql)

    def sql(self, text: str, params: Sequence[object] | Mapping[str, object] | None = None) -> pl.DataFrame:
        """Run one SELECT; ``params`` are the values of ``?`` or ``$name``. Raises QueryError for anything else."""
        return self._ask(lambda opened: opened.sql(text, params), with_current=_names_more(text))

    def _ask(self, question: Callable[[database.Database], pl.DataFrame], **needed: Any) -> pl.DataFrame:
        """Return an answer from the current runs; repeat the query if a run was removed or rewritten meanwhile.

        `needed`: see `database.connect`.
        """
        if self._shared is not None:
            return question(self._shared)
        for _ in range(_TRIES):
            folders = self._listed()
            try:
                with self._database_of(folders, **needed) as opened:
                    answer = question(opened)
            except KdbError as error:
                if self.lake.still(folders) and not database.is_gone(error):
                    raise
            else:
                if self.lake.still(folders):
                    return answer
        with self.snapshot() as held:
            return question(held.opened)

    @property
    def opened(self) -> database.Database:
        """Return the database of a snapshot, for answers that are streamed."""
        if self._shared is None:
            raise AssertionError("only a snapshot has a database of its own")
        return self._shared

    def table(self, table: str, *, everything: bool = False) -> pl.DataFrame:
        """Return the current rows of a table, those of `current.TABLE` in SQL, or all rows.

        Raises UnknownNameError.
        """
        return self.scan(table, everything=everything).collect()

    def scan(self, table: str, *, everything: bool = False) -> pl.LazyFrame:
        """Return a table as a Polars LazyFrame, which reads only what it needs. Raises UnknownNameError."""
        if table not in TABLES:
            raise UnknownNameError("table", table, TABLES, "`kdb schema` lists them.")
        folders = self._seen_runs()
        if not everything:
            with self._current(folders) as opened:
                shown = {run for _, _, run in opened.current_runs(table)}
                opened.note_current()
            folders = [folder for folder in folders if folder.run in shown]
        self.lake.look(folders, vectors=has_vectors(table))
        runs = _ids(folders)
        if self._remote:
            self._remote.fetch(table, runs)
        root = folders[0].path.parents[2] if folders else self.lake.root
        rows = database.scan(root, table, runs)
        return rows if everything else rows.filter(current.default_rows(table))

    def _seen_runs(self) -> Sequence[RunFolder]:
        """Return the runs of a snapshot, or those that are committed now."""
        return self._listed() if self._shared is None else self._folders

    def _current(self, folders: Sequence[RunFolder]) -> contextlib.AbstractContextManager[database.Database]:
        return contextlib.nullcontext(self._shared) if self._shared else self._database_of(folders)

    def files(self, table: str) -> list[str]:
        """Return the committed Parquet files of a table, for other engines, as absolute paths or URLs of a bucket.

        Model, dataset and run are in the path (``model=…/dataset=…/run=…``, percent-encoded). Raises UnknownNameError.
        """
        if table not in TABLES:
            raise UnknownNameError("table", table, TABLES, "`kdb schema` lists them.")
        if self._shared is None or self._remote:
            seen = None if self._shared is None else {f"run={folder.run}" for folder in self._folders}
            return [f for f in self.lake.committed_files(table) if seen is None or not seen.isdisjoint(f.split("/"))]
        manifests = ((folder, self.lake.manifest(folder)) for folder in self._folders)
        return [str(folder.path / file.path) for folder, manifest in manifests for file in manifest.of(table)]

    def engine(self) -> Engine:
        """Return a SQLAlchemy engine that reads the views, for pandas and notebooks."""

        def opened() -> duckdb.DuckDBPyConnection:
            folders = self._seen_runs()
            return database.connect(self._root or self.lake.root, _ids(folders), **self._sources(folders))

        return database.engine(opened, lambda text: self._before(self._seen_runs(), text))

    def rebuild(self) -> Path:
        """Rewrite ``kdb.duckdb`` and the empty tables that its views need; returns its path.

        For a warehouse in an object store, the file reads the runs that are there now.
        """
        self.lake.restore_empty_tables()
        shell = self.lake.path / SHELL_FILE
        with storage_errors(self.lake.path):
            if self._remote:
                self._refuse_older()
                urls = {table: self.files(table) for table in TABLES}
                database.write_public_file(shell, self.lake.root, urls, encoded=False)
            else:
                database.write_shell_file(self.lake.path, older_runs=self.lake.older_runs)
                self.lake.mark(views=self._views)
        return shell

    def publish(self, url: str, path: Path) -> None:
        """Write a DuckDB file that reads the committed runs from ``url``, the public address of the warehouse's folder.

        Raises QueryError if that is not a URL, WarehouseError if the file cannot be written.
        """
        if not re.match(r"https?://[^/?#]+[^?#]*$", url):
            raise QueryError(
                f"--url: expected the address of a folder, such as https://example.org/shared, found {url!r}"
            )
        self._refuse_older()
        base = url.rstrip("/")
        within = {table: [f.removeprefix(f"{self.lake.location}/") for f in self.files(table)] for table in TABLES}
        urls = {table: [f"{base}/{quote(path, safe='/=')}" for path in paths] for table, paths in within.items()}
        with storage_errors(path.parent):
            database.write_public_file(path, self.lake.root, urls, encoded=True)

    def _refuse_older(self) -> None:
        """Raise WarehouseError if a run has an older schema: views over single files support only one schema."""
        if self.lake.older_runs:
            versions = {self.lake.manifest(folder).schema_version for folder in self.lake.run_folders()}
            if versions - {SCHEMA_VERSION}:
                raise WarehouseError(
                    "Some runs were measured by an older kdb. Run `kdb migrate`, then this command again."
                )

    def _mend(self) -> None:
        """Rebuild ``kdb.duckdb`` if it is missing, or its views are of another folder or version."""
        if self.lake.marks().get("views") != self._views or not (self.lake.path / "kdb.duckdb").exists():
            self.rebuild()

    @property
    def _views(self) -> str:
        statements = database.shell_statements(self.lake.path, older_runs=self.lake.older_runs)
        return hashlib.sha256("\n".join(statements).encode()).hexdigest()

    def _listed(self, runs: Sequence[str] | None = None) -> list[RunFolder]:
        """Return the committed runs after inspecting them: each is complete. Raises DamagedRunError."""
        for left in reversed(range(_TRIES)):
            folders = [folder for folder in self.lake.run_folders() if runs is None or folder.run in runs]
            try:
                self.lake.look(folders, vectors=False)
            except DamagedRunError:
                if not left or self.lake.still(folders):
                    raise
            else:
                return folders
        raise WarehouseError(_CHANGING)

    def _database_of(
        self,
        folders: Sequence[RunFolder],
        limits: database.Limits | None = None,
        root: Path | None = None,
        **needed: Any,
    ) -> database.Database:
        before = functools.partial(self._before, folders)
        return database.Database(
            root or self.lake.root,
            _ids(folders),
            limits,
            before=before,
            remembered=self._remembered(folders),
            **needed,
            **self._sources(folders),
        )

    def _remembered(self, folders: Sequence[RunFolder]) -> current.Remembered:
        """Return the cached data about these runs, in these versions."""
        key = hashlib.sha256("\n".join(f"{VERSION} {folder.run} {folder.version}" for folder in folders).encode())
        return current.Remembered(memory_path(self.lake.root).with_suffix(".runs.parquet"), key.hexdigest())

    def _before(self, folders: Sequence[RunFolder], text: str) -> None:
        """Inspect the files of vectors before a statement that names their table."""
        if _VECTORS.search(text):
            self.lake.look(folders, vectors=True)

    def _sources(self, folders: Sequence[RunFolder]) -> dict[str, Any]:
        """Return the files that a connection reads if globs over the lake are not enough; see `database.connect`."""
        if self._remote:
            return {"files": self.lake.files(folders), "filesystem": self._remote.filesystem}
        versions = {self.lake.schema_version, *self.lake.schema_versions(folders).values()}
        return {"files": self.lake.files(folders)} if versions != {SCHEMA_VERSION} else {}

    def runs(self) -> list[str]:
        """Return the ids of the committed runs, or of the runs of a snapshot."""
        return _ids(self._folders if self._shared else self.lake.run_folders())


def lake_at(location: str | Path, *, create: bool = False) -> Lake:
    """Return the lake in a folder, or in an object store if the location is a URL."""
    if not is_url(location):
        return Lake.create(Path(location)) if create else Lake(Path(location))
    from kdb.warehouse.cloud import CloudLake

    return CloudLake.create_at(str(location)) if create else CloudLake(str(location))


def _names_more(text: str) -> bool:
    """Whether a statement may use schema `current`, or list the tables."""
    return bool(
        re.search(
            r"\b(current|information_schema|show|describe|summarize|\w+_catalog|duckdb_\w+|pragma_\w+)\b",
            text,
            re.IGNORECASE,
        )
    )


def _ids(folders: Sequence[RunFolder]) -> list[str]:
    return [folder.run for folder in folders]


def _remote(lake: Lake) -> CloudLake | None:
    return cast("CloudLake", lake) if is_url(lake.location) else None
