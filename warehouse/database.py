"""DuckDB over the lake: views, saved queries and SQL that can only read, as Polars frames.

Everything that kdb itself asks runs in an in-memory DuckDB whose views are globs over the lake, so that no lock
on ``kdb.duckdb`` is ever taken; that file holds the same views for people's own shells.

    with Database(lake, runs) as database:
        database.query("concept-depth", dataset="cities")
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import duckdb
import polars as pl

from kdb.errors import KdbError, WarehouseError
from kdb.queries.catalogue import SavedQuery, Value, find_query, literal, macros
from kdb.warehouse import current, shell
from kdb.warehouse.frames import to_frame
from kdb.warehouse.lake import empty_file
from kdb.warehouse.notes import KdbNote, notes, notes_on_current, notes_on_nothing
from kdb.warehouse.paging import column_types
from kdb.warehouse.schema import PARTITIONS, SCHEMA_VERSION, TABLES, Vector, arrow_schema, column_names, sql_type
from kdb.warehouse.shell import SHELL_FILE as SHELL_FILE
from kdb.warehouse.statements import check_public, check_reads, message, reported
from kdb.warehouse.values import check_values

if TYPE_CHECKING:
    import pyarrow as pa
    from sqlalchemy import Engine, Table

_BATCH = 20_000
"""Rows of a batch, where rows are read as they are computed."""

_STORAGE_VERSION = "v1.0.0"
"""Of the shell file: what DuckDB 1.0 wrote, so that every shell from 1.4 on opens it."""


@dataclass(frozen=True)
class Limits:
    """What one connection may use, where strangers ask: bytes of memory, and threads."""

    memory: int
    threads: int


Files = Mapping[int, Mapping[str, Sequence[str]]]
"""The files of each table by their addresses, for each schema version that they follow."""


def view_statements(
    lake: Path,
    files: Files | None = None,
    *,
    movable: bool = False,
    with_current: bool = True,
    needed_by: str | None = None,
) -> list[str]:
    """The SQL that creates a view for every table, schema `current`, and the macros of the saved queries.

    Views see the runs listed in the variable `kdb_runs`, or all of them where it is not set, as in a shell. They are
    globs over the lake, or read the `files` of each table, by their addresses: one that has none has no rows. `movable`
    ones glob in the folders that the variable `kdb_lake` says at the time. With `needed_by`, macros that this statement
    does not need are left out.
    """

    def rows(name: str, table: Table) -> str:
        if files is not None:
            return _rows_of_versions(table, files)
        if movable:
            return _rows(table, f"getvariable('kdb_lake') || '/{name}/*.parquet'")
        return _rows(table, literal(f"{_run_folders(lake)}/{name}/*.parquet"))

    return _statements(lambda table: rows(table.name, table), macros(needed_by), with_current=with_current)


def _statements(rows: Callable[[Table], str], shared: str, *, with_current: bool = True) -> list[str]:
    """Statements that every database of kdb starts with: views, macros. The only such list."""
    views = [_create_view(name, rows(table)) for name, table in TABLES.items()]
    return [*current.stubs(), shared, *views] if with_current else [*views, shared]


def _rows_of_versions(table: Table, files: Files) -> str:
    """The SELECT of a table's rows in files of several schemas: a column that an older one lacks is NULL."""
    selects = [
        _rows(table, literal(tuple(tables[table.name])), version=version)
        for version, tables in sorted(files.items(), reverse=True)
        if tables.get(table.name)
    ]
    return " UNION ALL ".join(selects) if selects else _rows(table, "[]")


def shell_statements(warehouse: Path, *, older_runs: bool = False) -> list[str]:
    """The SQL of `kdb.duckdb`, whose views read the folder that the file lies in, wherever that is copied or moved.

    With `older_runs`, files may lack columns, and every file's names are read for each question.
    """
    home = shell.Home(warehouse)

    def rows(table: Table) -> str:
        return f"{_rows(table, home.files(table.name), union=older_runs)} WHERE {home.is_here}"

    return [shell.create_type(home.name), *_statements(rows, shell.bound_to(home.name, macros())), *_all_comments()]


def write_shell_file(warehouse: Path, *, older_runs: bool = False) -> None:
    """Write `kdb.duckdb`: views only. Replaces it without opening it.

    A shell that holds the old file keeps it. Raises OSError when the folder cannot be written.
    """
    target = warehouse / SHELL_FILE
    _put_shell_file(target, shell_statements(warehouse, older_runs=older_runs))
    # A log left by a shell that crashed belongs to the old file; DuckDB would replay it into this one.
    target.with_name(f"{SHELL_FILE}.wal").unlink(missing_ok=True)


def write_public_file(path: Path, lake: Path, urls: Mapping[str, Sequence[str]], *, encoded: bool) -> None:
    """Write a DuckDB file whose views read Parquet files by their URLs, a list for each table; nothing is fetched.

    `encoded`: a folder's name is encoded, and a URL of HTTP encodes that again. Column types come from the lake's empty
    tables. Raises OSError when the file cannot be written.
    """

    def rows(table: Table) -> str:
        found = literal(tuple(urls.get(table.name, ())))
        if found != "[]":
            found = f"coalesce(getvariable('kdb_files_{table.name}')::VARCHAR[], {found})"
        return _rows(table, found, name_of="url_decode({})" if encoded else "{}")

    # Views and macros are tried out as they are created: on empty files, as the others may not be there yet.
    empty = [f"SET VARIABLE kdb_files_{name} = {literal((str(empty_file(lake, name)),))}" for name in TABLES]
    name = shell.name_of_files(urls)
    views = _statements(rows, shell.bound_to(name, macros()))
    _put_shell_file(path, [*empty, shell.create_type(name), *views, *_all_comments()])


def _put_shell_file(target: Path, statements: list[str]) -> None:
    if target.exists() and not target.is_file():  # a device must not be replaced
        raise OSError(errno.EINVAL, "not a regular file", str(target))
    staged = target.with_name(f".{SHELL_FILE}.{secrets.token_hex(4)}")
    # Built elsewhere: DuckDB cannot attach every path (a ? ends the name of its log file).
    with tempfile.TemporaryDirectory(prefix="kdb-") as folder:
        built = Path(folder) / SHELL_FILE
        _build_shell_file(built, statements)
        try:
            shutil.copyfile(built, staged)
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)


def connect(
    lake: Path,
    runs: Sequence[str] | None = None,
    limits: Limits | None = None,
    *,
    files: Files | None = None,
    filesystem: Any = None,
    with_current: bool = True,
    needed_by: str | None = None,
    remembered: current.Remembered | None = None,
) -> duckdb.DuckDBPyConnection:
    """Open an in-memory DuckDB that reads the lake and nothing else. The only place where one is opened.

    `runs` is a snapshot: with it, a run committed meanwhile stays invisible, so that no query sees it in one
    table and not in the next; None shows every run. `limits` bound what it may use; else DuckDB's own do. `files`
    name what is read, where globs over the lake would not do: for runs of an older schema, and where `filesystem`
    (fsspec's) opens those that are not local. A connection opens sooner without schema `current`, and with those macros
    alone that are `needed_by` one statement. Raises WarehouseError when the lake cannot be read.
    """
    connection = duckdb.connect()
    try:
        # Views are created first: that reads files, and creating anything is refused by the time users ask.
        if filesystem is not None:
            connection.register_filesystem(filesystem)
        # They are created over the empty files alone: each would list all folders, 3 s of them for a thousand runs.
        empty = literal(_escape_glob(empty_file(lake, "runs").parents[1]))
        connection.execute(f"SET VARIABLE kdb_lake = {empty}")
        for statement in view_statements(lake, files, movable=True, with_current=with_current, needed_by=needed_by):
            connection.execute(statement)
        connection.execute(f"SET VARIABLE kdb_lake = {literal(_run_folders(lake))}")
        if runs is not None:
            # As a literal: binding any value makes DuckDB import pandas, where that is installed, for 0.25 s. And as
            # one text, which DuckDB copies for each file that it asks about: a list of thousands takes longer.
            connection.execute(f"SET VARIABLE kdb_runs = {literal(','.join(['', *runs, '']))}")
        if remembered is not None and remembered.is_known:
            connection.execute(remembered.statement)
        _lock(connection, lake, limits, ["kdb://lake/"] if filesystem is not None else [])
    except duckdb.Error as error:
        connection.close()
        raise WarehouseError(
            f"{lake}: cannot be read: {message(error)}. `kdb verify` names damaged files, and `kdb rebuild` "
            "writes again what every view needs."
        ) from error
    return connection


class Database:
    """The committed runs as they were when it was opened, to be asked in SQL.

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
            raise WarehouseError("This snapshot has ended: ask within its `with` block, or ask the warehouse itself.")
        return self._opened

    def sql(self, text: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> pl.DataFrame:
        """The rows of one statement that reads.

        `params` are the values of its `?` (a sequence) or `$name` (a mapping). Raises QueryError for a
        statement that would change anything, and with DuckDB's words for one that fails.
        """
        self._before(text)
        statement = check_reads(self._connection, text)
        self.note_current(text)
        return self._frame(statement, params)

    def query(self, name: str, /, **params: object) -> pl.DataFrame:
        """The rows of a saved query; a KdbNote warns where runs are left out that one may look for.

        Raises UnknownNameError and QueryError, see `SavedQuery.bind` and `check_values`.
        """
        saved, values = self._bound(name, params)
        answer = self._frame(saved.sql)
        if answer.is_empty():
            with reported():
                _warn(notes_on_nothing(self._connection, saved, values))
        return answer

    def note_current(self, text: str = "current.") -> None:
        """Warn with a KdbNote where a text names schema `current`, and that leaves runs out that one may look for."""
        if names_current(text):
            self._keep_known_runs(None)
            with reported():
                _warn(notes_on_current(self._connection))

    def public_sql(self, text: str) -> pa.RecordBatchReader:
        """As `sql`, for a stranger's statement, and as batches that are computed as they are read.

        Raises QueryError for a statement that reads anything but the views; see `check_public`.
        """
        self._before(text)
        with reported():
            statement = check_public(self._connection, text)
            self.note_current(text)
            return self._batches(statement)

    def public_query(self, name: str, /, **params: object) -> pa.RecordBatchReader:
        """As `query`, as batches that are computed as they are read."""
        return self._batches(self._bound(name, params)[0].sql)

    def batches(self, text: str, params: Sequence[Any] = ()) -> pa.RecordBatchReader:
        """The rows of kdb's own SQL, as batches that are computed as they are read."""
        self._before(text)
        return self._batches(text, params)

    def current_runs(self, table: str) -> list[tuple[str, str, str]]:
        """Model, dataset and run of those whose rows of a table `current` shows."""
        self._keep_known_runs(None)
        plain = f"current_runs WHERE table_name = {literal(table)} AND variant = 'default'"
        with reported():
            return self._connection.execute(f"SELECT model, dataset, run FROM {plain}").fetchall()

    def _bound(self, name: str, params: Mapping[str, object]) -> tuple[SavedQuery, Mapping[str, Value]]:
        """A saved query whose parameters are set and checked, and their values."""
        saved = find_query(name)
        self._before(saved.sql)
        values = saved.bind(params)
        for variable, value in values.items():
            if variable in params:
                self._connection.execute(f"SET VARIABLE {variable} = ?", [value])
            else:  # a default is our own text, and need not be bound: see connect
                self._connection.execute(f"SET VARIABLE {variable} = {literal(value)}")
        if "variant" in values:  # else all runs are asked about, current or not
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
        """Give back memory and temporary files."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def names_current(text: str) -> bool:
    """Whether a statement names schema `current`."""
    return bool(re.search(r"\bcurrent\b\"?\s*\.", text, re.IGNORECASE))


def _warn(found: Sequence[str]) -> None:
    for note in found:
        warnings.warn(note, KdbNote, stacklevel=7)  # where Warehouse.query was called


def is_gone(error: KdbError) -> bool:
    """Whether a question failed because a file that was there when it was asked is no longer."""
    return bool(re.search(r"No such file or directory|No files found|its run was removed", str(error)))


def engine(
    opened: Callable[[], duckdb.DuckDBPyConnection], before: Callable[[str], None] = lambda _text: None
) -> Engine:
    """A SQLAlchemy engine that reads the lake, for pandas, notebooks and reflection.

    Each connection is one that ``opened`` returns, see `connect`. ``before`` is called with the text of each statement
    before it is run.
    """
    from kdb.warehouse.engine import open_engine  # here: only who asks for an engine waits for it

    def check(connection: Any, statement: str) -> None:
        check_reads(connection, statement)
        before(statement)
        if names_current(statement):
            _warn(notes_on_current(connection))

    return open_engine(opened, check)


def scan(lake: Path, table: str, runs: Sequence[str] | None = None) -> pl.LazyFrame:
    """A table as a Polars LazyFrame, in the view's columns; of `runs` alone, where given.

    Vectors come as lists of Float32, whatever their length and stored width.
    """
    columns = TABLES[table].columns
    vectors = [pl.col(c.name).cast(pl.List(pl.Float32)) for c in columns if isinstance(c.type, Vector)]
    typed = pl.DataFrame(arrow_schema(table).empty_table()).with_columns(vectors).lazy()
    folders = [
        folder
        for folder in sorted(lake.glob(f"model=*/dataset=*/run=*/{table}"))
        if runs is None or folder.parent.name.removeprefix("run=") in {*runs, "__none__"}
    ]
    # One scan per run: Polars reads fixed-size vectors as arrays, whose lengths differ between models.
    frames = [_scan_files(sorted(folder.glob("*.parquet"))).with_columns(vectors) for folder in folders]
    # What a run of an older schema lacks is NULL.
    return pl.concat([*frames, typed], how="diagonal").select(*PARTITIONS, *columns.keys())


def _run_folders(lake: Path) -> str:
    """The glob of all runs' folders."""
    return f"{_escape_glob(lake)}/*/*/*"


def _create_view(name: str, rows: str) -> str:
    """The SQL of a table's view, in the place of its stub."""
    visible = "getvariable('kdb_runs') IS NULL OR contains(getvariable('kdb_runs')::VARCHAR, ',' || run || ',')"
    return f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM ({rows}) WHERE {visible}"


def _rows(table: Table, files: str, *, name_of: str = "{}", version: int = SCHEMA_VERSION, union: bool = False) -> str:
    """The SELECT of a table's rows in `files`, SQL for a glob or a list; `name_of` makes a name of its path's.

    The files follow the schema `version`: a column that came later is NULL. With `union` they follow several, and
    DuckDB looks into each for its columns.
    """
    if files == "[]":  # which read_parquet refuses
        typed = (f"NULL::{kind} AS {_quoted(name)}" for name, kind in column_types(table.name).items())
        return f"SELECT {', '.join(typed)} WHERE false"
    names = [f"{name_of.format(_quoted(name))} AS {_quoted(name)}" for name in PARTITIONS]
    types = ", ".join(f"'{name}': VARCHAR" for name in PARTITIONS)
    there = column_names(table.name, version)
    columns = [
        _quoted(c.name) if c.name in there else f"NULL::{sql_type(c)} AS {_quoted(c.name)}" for c in table.columns
    ]
    return (
        f"SELECT {', '.join([*names, *columns])} "
        f"FROM read_parquet({files}, hive_partitioning = true, hive_types = {{{types}}}"
        f"{', union_by_name = true' if union else ''})"
    )


def _quoted(name: str) -> str:
    return f'"{name}"'


def _all_comments() -> list[str]:
    return list(map(_comments, TABLES.values()))


def _comments(table: Table) -> str:
    """What the table's rows and columns mean, for `duckdb_columns()` in a shell."""
    meanings = {**PARTITIONS, **{column.name: column.comment for column in table.columns}}
    lines = []
    for view in (table.name, f"{current.SCHEMA}.{table.name}"):
        lines.append(f"COMMENT ON VIEW {view} IS {literal(table.comment)};")
        lines += [f'COMMENT ON COLUMN {view}."{name}" IS {literal(text)};' for name, text in meanings.items()]
    return "\n".join(lines)


def _escape_glob(folder: Path) -> str:
    """The folder's absolute path, as a DuckDB glob that matches it alone."""
    return re.sub(r"[\[*?{]", r"[\g<0>]", str(folder.resolve()))


def _build_shell_file(path: Path, statements: list[str]) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH {literal(str(path))} AS kdb (STORAGE_VERSION '{_STORAGE_VERSION}')")
        connection.execute("USE kdb; BEGIN")  # one transaction: each one waits for the disk
        for statement in statements:
            connection.execute(statement)
        connection.execute("COMMIT; USE memory; DETACH kdb")  # detaching folds the log into the file


def _interruptible(connection: duckdb.DuckDBPyConnection, work: Callable[[], pa.Table]) -> pa.Table:
    """The work's result, computed beside the main thread: DuckDB may notice Ctrl-C only when it has finished."""
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
    if ignored or threading.current_thread() is not threading.main_thread():
        return work()
    with ThreadPoolExecutor(1, "kdb-query") as beside:
        working = beside.submit(work)
        try:
            # Looked at now and then: a signal that another thread takes does not wake this one.
            while not wait([working], timeout=0.1).done:
                pass
        except KeyboardInterrupt:
            connection.interrupt()
            raise
        return working.result()


@contextlib.contextmanager
def _as_arrow() -> Iterator[None]:
    """Without DuckDB 2's warning: it would rather have a relation, which takes no checked statement."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Arrow output on a DB-API result")
        yield


def _lock(connection: duckdb.DuckDBPyConnection, lake: Path, limits: Limits | None, also: list[str]) -> None:
    """Leave the connection able to read the lake, and to change none of its settings."""
    # The path check sees a view's glob as it is written, escapes included.
    readable = f"[{', '.join(map(literal, [str(lake.resolve()), _escape_glob(lake), *also]))}]"
    if limits is not None:
        connection.execute(
            f"SET memory_limit = '{limits.memory}B'; SET threads = {limits.threads};"
            f"SET max_temp_directory_size = '{4 * limits.memory}B';"
            # Files never change once they are committed, so what their footers say can be kept.
            "SET parquet_metadata_cache = true; SET enable_progress_bar = false"
        )
    spill = Path(tempfile.gettempdir()) / f"kdb-{os.getpid()}-{secrets.token_hex(4)}"
    connection.execute(
        "SET TimeZone = 'UTC';"
        "SET python_enable_replacements = false;"  # FROM name must not find a Python variable
        f"SET temp_directory = {literal(str(spill))};"  # else .tmp in the current folder; made when memory is short
        f"SET allowed_directories = {readable};"
        "SET enable_external_access = false;"
        "SET lock_configuration = true"
    )


def _scan_files(files: list[Path]) -> pl.LazyFrame:
    # Without glob=False Polars would read [ in a folder's name as a pattern.
    return pl.scan_parquet(files, glob=False, hive_partitioning=True, hive_schema=dict.fromkeys(PARTITIONS, pl.String))
