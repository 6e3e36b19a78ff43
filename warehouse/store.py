"""The public class of a warehouse, which combines its storage and DuckDB."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdb.errors import KdbError, UnknownNameError, WarehouseError
from kdb.queries.catalogue import find_query
from kdb.warehouse import current, shell_file
from kdb.warehouse.bucket import is_url
from kdb.warehouse.connection import connect
from kdb.warehouse.database import Database, engine, is_gone
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.inspection import DamagedRunError, memory_path
from kdb.warehouse.limits import Limits
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.probes import Probe, find_probe
from kdb.warehouse.scan import scan
from kdb.warehouse.schema import TABLES, has_vectors
from kdb.warehouse.storage import Storage

if TYPE_CHECKING:
    import duckdb
    import polars as pl
    from sqlalchemy import Engine


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

    _shared: Database | None = None
    _folders: Sequence[RunFolder] = ()
    _lake: Path | None = None

    def __init__(self, location: str | Path) -> None:
        self._open(storage_at(location))

    @classmethod
    def create(cls, location: str | Path) -> Warehouse:
        """Open a warehouse to write to it, and create it if the folder or URL is missing or empty."""
        opened = cls.over(storage_at(location, create=True))
        if not opened.storage.is_remote:
            shell_file.repair(opened.storage)  # if this fails, later writes would fail, too
        return opened

    @classmethod
    def over(cls, storage: Storage) -> Warehouse:
        """Return the warehouse in this storage."""
        opened = cls.__new__(cls)
        opened._open(storage)
        return opened

    def _open(self, storage: Storage) -> None:
        self.storage = storage
        if not storage.is_remote:
            # On a read-only disk, nothing can be repaired, but queries work.
            with contextlib.suppress(WarehouseError, OSError):
                storage.local.staging.delete_leftovers()
                shell_file.repair(storage)

    @property
    def tables(self) -> list[str]:
        """Return the names of the tables."""
        return list(TABLES)

    @contextlib.contextmanager
    def snapshot(self, runs: Sequence[str] | None = None, limits: Limits | None = None) -> Iterator[Warehouse]:
        """Return a snapshot of the warehouse, opened once for many queries, which all see the same runs and rows.

        In a writable folder, it does not change even if runs are removed (`Storage.protected`). It is restricted to
        `runs`, if given; `limits` are those of its queries.
        """
        with contextlib.ExitStack() as stack:
            lake, folders = self._protected(stack, runs)
            yield self._frozen(folders, stack.enter_context(self._database_of(folders, limits, lake)), lake)

    def _frozen(self, folders: Sequence[RunFolder], opened: Database, lake: Path | None = None) -> Warehouse:
        frozen = copy.copy(self)
        frozen._folders, frozen._shared, frozen._lake = folders, opened, lake
        return frozen

    def _protected(self, stack: contextlib.ExitStack, runs: Sequence[str] | None) -> tuple[Path, list[RunFolder]]:
        for _ in range(_TRIES):
            folders = self._listed(runs)
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                lake, protected = stack.enter_context(self.storage.protected(folders))
                if self.storage.are_unchanged(folders):
                    return lake, protected
        raise WarehouseError(_CHANGING)

    @contextlib.contextmanager
    def unprotected_snapshot(self, runs: Sequence[str], limits: Limits | None = None) -> Iterator[Warehouse]:
        """Return a snapshot of runs that are not protected from removal: see `unchanged`."""
        folders = self._listed(runs)
        with self._database_of(folders, limits) as opened:
            yield self._frozen(folders, opened)

    def unchanged(self) -> bool:
        """Whether the runs of a snapshot are the same as when it was opened."""
        return self.storage.are_unchanged(self._folders)

    def query(self, name: str, /, **params: object) -> pl.DataFrame:
        """Run a saved query; ``kdb queries`` lists them with their parameters.

        Raises UnknownNameError for an unknown name, QueryError for wrong parameters.
        """
        saved = find_query(name)
        return self._ask(lambda opened: opened.query(name, **params), with_current=False, needed_by=saved.sql)

    def sql(self, text: str, params: Sequence[object] | Mapping[str, object] | None = None) -> pl.DataFrame:
        """Run one SELECT; ``params`` are the values of ``?`` or ``$name``. Raises QueryError for anything else."""
        return self._ask(lambda opened: opened.sql(text, params), with_current=_names_more(text))

    def _ask(self, question: Callable[[Database], pl.DataFrame], **needed: Any) -> pl.DataFrame:
        """Return an answer from the current runs; repeat the query if a run was removed or rewritten meanwhile.

        `needed`: see `connect`.
        """
        if self._shared is not None:
            return question(self._shared)
        for _ in range(_TRIES):
            folders = self._listed()
            try:
                with self._database_of(folders, **needed) as opened:
                    answer = question(opened)
            except KdbError as error:
                if self.storage.are_unchanged(folders) and not is_gone(error):
                    raise
            else:
                if self.storage.are_unchanged(folders):
                    return answer
        with self.snapshot() as frozen:
            return question(frozen.opened)

    @property
    def opened(self) -> Database:
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
        self.storage.inspect(folders, vectors=has_vectors(table))
        self.storage.download_table(table, folders)
        lake = folders[0].path.parents[2] if folders else self.storage.local.lake
        rows = scan(lake, table, _ids(folders))
        return rows if everything else rows.filter(current.default_rows(table))

    def _seen_runs(self) -> Sequence[RunFolder]:
        """Return the runs of a snapshot, or those that are committed now."""
        return self._listed() if self._shared is None else self._folders

    def _current(self, folders: Sequence[RunFolder]) -> contextlib.AbstractContextManager[Database]:
        return contextlib.nullcontext(self._shared) if self._shared else self._database_of(folders)

    def files(self, table: str) -> list[str]:
        """Return the committed Parquet files of a table, for other engines, as absolute paths or URLs of a bucket.

        Model, dataset and run are in the path (``model=…/dataset=…/run=…``, percent-encoded). Raises UnknownNameError.
        """
        if table not in TABLES:
            raise UnknownNameError("table", table, TABLES, "`kdb schema` lists them.")
        return self.storage.committed_files(table, None if self._shared is None else self._folders)

    def probe(self, **chosen: Any) -> Probe:
        """Return a stored probe, to apply it to hidden states; the parameters are those of ``probes.find_probe``."""
        return find_probe(self, **chosen)

    def direction(self, **chosen: Any) -> Probe:
        """Return the same, for those who steer: its ``weights`` and ``unit`` point towards label 1."""
        return self.probe(**chosen)

    def engine(self) -> Engine:
        """Return a SQLAlchemy engine that reads the views, for pandas and notebooks."""

        def opened() -> duckdb.DuckDBPyConnection:
            folders = self._seen_runs()
            return connect(self._lake or self.storage.local.lake, _ids(folders), **self._sources(folders))

        return engine(opened, lambda text: self._before(self._seen_runs(), text))

    def rebuild(self) -> Path:
        """Rewrite ``kdb.duckdb`` and the empty tables that its views need; returns its path.

        For a warehouse in an object store, the file reads the runs that are there now.
        """
        return shell_file.rebuild(self.storage)

    def publish(self, url: str, path: Path) -> None:
        """Write a DuckDB file that reads the committed runs from ``url``, the public address of the warehouse's folder.

        Raises QueryError if that is not a URL, WarehouseError if the file cannot be written.
        """
        shell_file.publish(self.storage, url, path)

    def _listed(self, runs: Sequence[str] | None = None) -> list[RunFolder]:
        """Return the committed runs after inspecting them: each is complete. Raises DamagedRunError."""
        for left in reversed(range(_TRIES)):
            folders = [folder for folder in self.storage.run_folders() if runs is None or folder.run in runs]
            try:
                self.storage.inspect(folders, vectors=False)
            except DamagedRunError:
                if not left or self.storage.are_unchanged(folders):
                    raise
            else:
                return folders
        raise WarehouseError(_CHANGING)

    def _database_of(
        self,
        folders: Sequence[RunFolder],
        limits: Limits | None = None,
        lake: Path | None = None,
        **needed: Any,
    ) -> Database:
        before = functools.partial(self._before, folders)
        return Database(
            lake or self.storage.local.lake,
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
        return current.Remembered(memory_path(self.storage.local.lake).with_suffix(".runs.parquet"), key.hexdigest())

    def _before(self, folders: Sequence[RunFolder], text: str) -> None:
        """Inspect the files of vectors before a statement that names their table."""
        if _VECTORS.search(text):
            self.storage.inspect(folders, vectors=True)

    def _sources(self, folders: Sequence[RunFolder]) -> dict[str, Any]:
        """Return the files that a connection reads if globs over the lake are not enough; see `connect`."""
        return {"files": self.storage.files_by_version(folders), "filesystem": self.storage.filesystem}

    def runs(self) -> list[str]:
        """Return the ids of the committed runs, or of the runs of a snapshot."""
        return _ids(self._folders if self._shared else self.storage.run_folders())


def storage_at(location: str | Path, *, create: bool = False) -> Storage:
    """Return the storage in a folder, or in an object store if the location is a URL."""
    if not is_url(location):
        return FolderStorage.create(Path(location)) if create else FolderStorage(Path(location))
    from kdb.warehouse.bucket_storage import BucketStorage  # imported here: only users of a bucket wait for fsspec

    return BucketStorage.create(str(location)) if create else BucketStorage(str(location))


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
