"""Saved queries and read-only SQL over the lake, with answers as Polars frames or streams of Arrow batches.

    with Database(lake, runs) as database:
        database.query("concept-depth", dataset="cities")

All of kdb's own queries run in an in-memory DuckDB (``connection.py``), so that ``kdb.duckdb`` is never locked.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import duckdb
import polars as pl

from kdb.errors import KdbError, WarehouseError
from kdb.queries.catalogue import SavedQuery, Value, find_query, literal
from kdb.warehouse import current
from kdb.warehouse.connection import connect
from kdb.warehouse.frames import to_frame
from kdb.warehouse.limits import Limits
from kdb.warehouse.manifest import Files
from kdb.warehouse.notes import KdbNote, notes, notes_on_current, notes_on_nothing
from kdb.warehouse.statements import check_public, check_reads, reported
from kdb.warehouse.values import check_values

if TYPE_CHECKING:
    import pyarrow as pa
    from sqlalchemy import Engine

_BATCH = 20_000
"""Rows per batch when an answer is streamed."""


class Database:
    """A connection to query the runs that were committed when it was opened.

    ``before`` is called with the text of each statement before it is run.
    """

    def __init__(
        self,
        lake: Path,
        runs: Sequence[str] | None = None,
        limits: Limits | None = None,
        *,
        files: Files | None = None,
        filesystem: Any = None,
        with_current: bool = True,
        needed_by: str | None = None,
        remembered: current.Remembered | None = None,
        before: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._opened: duckdb.DuckDBPyConnection | None = connect(
            lake,
            runs,
            limits,
            files=files,
            filesystem=filesystem,
            with_current=with_current,
            needed_by=needed_by,
            remembered=remembered,
        )
        self._known = None if runs is None else current.KnownRuns(self._connection, remembered)
        self._before = before

    @property
    def _connection(self) -> duckdb.DuckDBPyConnection:
        if self._opened is None:
            raise WarehouseError(
                "This snapshot is closed. Query it within its `with` block, or query the warehouse itself."
            )
        return self._opened

    def sql(self, text: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> pl.DataFrame:
        """Return the rows of one read-only statement.

        `params` are the values of its `?` (a sequence) or `$name` (a mapping). Raises QueryError for a statement that
        would change anything, and with DuckDB's message for one that fails.
        """
        self._before(text)
        statement = check_reads(self._connection, text)
        self.note_current(text)
        return self._frame(statement, params)

    def query(self, name: str, /, **params: object) -> pl.DataFrame:
        """Return the rows of a saved query; a KdbNote warns if the answer leaves out runs that users may expect.

        Raises UnknownNameError and QueryError, see `SavedQuery.bind` and `check_values`.
        """
        saved, values = self._bound(name, params)
        answer = self._frame(saved.sql)
        if answer.is_empty():
            with reported():
                _warn(notes_on_nothing(self._connection, saved, values))
        return answer

    def note_current(self, text: str = "current.") -> None:
        """Warn with a KdbNote if a statement uses schema `current` and that leaves out runs that users may expect."""
        if names_current(text):
            self._keep_known_runs(None)
            with reported():
                _warn(notes_on_current(self._connection))

    def public_sql(self, text: str) -> pa.RecordBatchReader:
        """Return the rows of an untrusted statement as a stream of batches.

        Raises QueryError for a statement that reads anything except the views; see `check_public`.
        """
        self._before(text)
        with reported():
            statement = check_public(self._connection, text)
            self.note_current(text)
            return self._batches(statement)

    def public_query(self, name: str, /, **params: object) -> pa.RecordBatchReader:
        """Return the rows of a saved query as a stream of batches; see `query`."""
        return self._batches(self._bound(name, params)[0].sql)

    def batches(self, text: str, params: Sequence[Any] = ()) -> pa.RecordBatchReader:
        """Return the rows of kdb's own SQL as a stream of batches."""
        self._before(text)
        return self._batches(text, params)

    def current_runs(self, table: str) -> list[tuple[str, str, str]]:
        """Return model, dataset and run of the runs whose rows of a table are shown by schema `current`."""
        self._keep_known_runs(None)
        plain = f"current_runs WHERE table_name = {literal(table)} AND variant = 'default'"
        with reported():
            return self._connection.execute(f"SELECT model, dataset, run FROM {plain}").fetchall()

    def _bound(self, name: str, params: Mapping[str, object]) -> tuple[SavedQuery, Mapping[str, Value]]:
        """Return a saved query after setting and checking its parameters, and their values."""
        saved = find_query(name)
        self._before(saved.sql)
        values = saved.bind(params)
        for variable, value in values.items():
            if variable in params:
                self._connection.execute(f"SET VARIABLE {variable} = ?", [value])
            else:  # a default is trusted and need not be bound: see connect
                self._connection.execute(f"SET VARIABLE {variable} = {literal(value)}")
        if "variant" in values:  # otherwise the query is about all runs, current or not
            models = values.get("model")
            self._keep_known_runs(models if isinstance(models, tuple) else None)
        with reported():
            check_values(self._connection, saved.params, values, lambda: self._keep_known_runs(None))
            _warn(notes(self._connection, saved, values))
        return saved, values

    def _keep_known_runs(self, models: Collection[str] | None) -> None:
        if self._known is not None:
            with reported():
                self._known.keep(models)

    def _batches(self, statement: duckdb.Statement | str, params: Any = None) -> pa.RecordBatchReader:
        with reported(), _as_arrow():
            return self._connection.execute(statement, params).to_arrow_reader(_BATCH)

    def _frame(self, statement: duckdb.Statement | str, params: Any = None) -> pl.DataFrame:
        def answered() -> pa.Table:
            return self._connection.execute(statement, params).to_arrow_table()

        with reported(), _as_arrow():
            table = _interruptible(self._connection, answered)
        return to_frame(table)

    def close(self) -> None:
        """Release memory and temporary files."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def names_current(text: str) -> bool:
    """Whether a statement uses schema `current`."""
    return bool(re.search(r"\bcurrent\b\"?\s*\.", text, re.IGNORECASE))


def _warn(found: Sequence[str]) -> None:
    for note in found:
        warnings.warn(KdbNote(note), stacklevel=7)  # where Warehouse.query was called


def is_gone(error: KdbError) -> bool:
    """Whether a query failed because a file was removed while it was running."""
    return bool(re.search(r"No such file or directory|No files found|its run was removed", str(error)))


def engine(
    opened: Callable[[], duckdb.DuckDBPyConnection], before: Callable[[str], None] = lambda _text: None
) -> Engine:
    """Return a SQLAlchemy engine that reads the lake, for pandas, notebooks and reflection.

    ``opened`` opens its connections, see `connect`. ``before`` is called with the text of each statement before it is
    run.
    """
    from kdb.warehouse.engine import open_engine  # imported here: only users of an engine wait for it

    def check(connection: Any, statement: str) -> None:
        check_reads(connection, statement)
        before(statement)
        if names_current(statement):
            _warn(notes_on_current(connection))

    return open_engine(opened, check)


def _interruptible(connection: duckdb.DuckDBPyConnection, work: Callable[[], pa.Table]) -> pa.Table:
    """Run the work in another thread and return its result, because DuckDB may react to Ctrl-C only at its end."""
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
    if ignored or threading.current_thread() is not threading.main_thread():
        return work()
    with ThreadPoolExecutor(1, "kdb-query") as beside:
        working = beside.submit(work)
        try:
            # Checked periodically, because a signal handled by another thread does not wake this one.
            while not wait([working], timeout=0.1).done:
                pass
        except KeyboardInterrupt:
            connection.interrupt()
            raise
        return working.result()


@contextlib.contextmanager
def _as_arrow() -> Iterator[None]:
    """Return the rows as Arrow, without the warning of DuckDB 2, which recommends relations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Arrow output on a DB-API result")
        yield
