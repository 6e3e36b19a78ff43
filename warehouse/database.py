"""DuckDB over the lake: views, saved queries and read-only SQL, with answers as Polars frames.

All of kdb's own queries run in an in-memory DuckDB whose views are globs over the lake, so that ``kdb.duckdb`` is never
locked. That file holds the same views for use in a DuckDB shell.

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
"""Rows per batch when an answer is streamed."""

_STORAGE_VERSION = "v1.0.0"
"""Storage version of the shell file: that of DuckDB 1.0, so that every shell since 1.4 can open it."""


@dataclass(frozen=True)
class Limits:
    """Limits of one connection for untrusted queries: bytes of memory, and number of threads."""

    memory: int
    threads: int


Files = Mapping[int, Mapping[str, Sequence[str]]]
"""The paths or URLs of each table's files, for each schema version."""


def view_statements(
    lake: Path,
    files: Files | None = None,
    *,
    movable: bool = False,
    with_current: bool = True,
    needed_by: str | None = None,
) -> list[str]:
    """Return the SQL that creates a view for every table, schema `current`, and the macros of the saved queries.

    Views show the runs listed in the variable `kdb_runs`; if it is not set, as in a shell, they show all. They are
    globs over the lake, or read the given `files` of each table. `movable` views glob in the folders that the variable
    `kdb_lake` names at the time of a query. With `needed_by`, macros that this statement does not need are left out.
    """

    def rows(name: str, table: Table) -> str:
        if files is not None:
            return _rows_of_versions(table, files)
        if movable:
            return _rows(table, f"getvariable('kdb_lake') || '/{name}/*.parquet'")
        return _rows(table, literal(f"{_run_folders(lake)}/{name}/*.parquet"))

    return _statements(lambda table: rows(table.name, table), macros(needed_by), with_current=with_current)


def _statements(rows: Callable[[Table], str], shared: str, *, with_current: bool = True) -> list[str]:
    """Return the statements that create the views and macros of every database of kdb."""
    views = [_create_view(name, rows(table)) for name, table in TABLES.items()]
    return [*current.stubs(), shared, *views] if with_current else [*views, shared]


def _rows_of_versions(table: Table, files: Files) -> str:
    """Return the SELECT of a table's rows in files of several schemas; columns missing in older ones are NULL."""
    selects = [
        _rows(table, literal(tuple(tables[table.name])), version=version)
        for version, tables in sorted(files.items(), reverse=True)
        if tables.get(table.name)
    ]
    return " UNION ALL ".join(selects) if selects else _rows(table, "[]")


def shell_statements(warehouse: Path, *, older_runs: bool = False) -> list[str]:
    """Return the SQL of `kdb.duckdb`, whose views read the folder that contains the file, even after a copy or move.

    With `older_runs`, files may lack columns, so each query reads the column names of all files.
    """
    home = shell.Home(warehouse)

    def rows(table: Table) -> str:
        return f"{_rows(table, home.files(table.name), union=older_runs)} WHERE {home.is_here}"

    return [shell.create_type(home.name), *_statements(rows, shell.bound_to(home.name, macros())), *_all_comments()]


def write_shell_file(warehouse: Path, *, older_runs: bool = False) -> None:
    """Write `kdb.duckdb`, which holds only views. Replaces the old file without opening it.

    A shell that has the old file open keeps it. Raises OSError if the folder cannot be written.
    """
    target = warehouse / SHELL_FILE
    _put_shell_file(target, shell_statements(warehouse, older_runs=older_runs))
    # A log left by a shell that crashed belongs to the old file; DuckDB would replay it into this one.
    target.with_name(f"{SHELL_FILE}.wal").unlink(missing_ok=True)


def write_public_file(path: Path, lake: Path, urls: Mapping[str, Sequence[str]], *, encoded: bool) -> None:
    """Write a DuckDB file whose views read Parquet files by their URLs, a list for each table. Nothing is downloaded.

    `encoded` is true for HTTP: names of folders are percent-encoded, and the URL encodes them again. Column types come
    from the lake's empty tables. Raises OSError if the file cannot be written.
    """

    def rows(table: Table) -> str:
        found = literal(tuple(urls.get(table.name, ())))
        if found != "[]":
            found = f"coalesce(getvariable('kdb_files_{table.name}')::VARCHAR[], {found})"
        return _rows(table, found, name_of="url_decode({})" if encoded else "{}")

    # DuckDB tests views and macros when it creates them: on empty files, as the others may not exist yet.
    empty = [f"SET VARIABLE kdb_files_{name} = {literal((str(empty_file(lake, name)),))}" for name in TABLES]
    name = shell.name_of_files(urls)
    views = _statements(rows, shell.bound_to(name, macros()))
    _put_shell_file(path, [*empty, shell.create_type(name), *views, *_all_comments()])


def _put_shell_file(target: Path, statements: list[str]) -> None:
    if target.exists() and not target.is_file():  # a device must not be replaced
        raise OSError(errno.EINVAL, "not a regular file", str(target))
    staged = target.with_name(f".{SHELL_FILE}.{secrets.token_hex(4)}")
    # Built in another folder, because DuckDB cannot attach every path (a ? ends the name of its log file).
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
    """Open an in-memory DuckDB that reads the lake and nothing else. All connections are opened here.

    `runs` is a snapshot: runs committed later are invisible, so that no query sees a run in one table but not in
    another. None shows all runs. `limits` default to DuckDB's own. `files` lists the files to read where globs over the
    lake are not enough: for runs of an older schema, and for remote files, which `filesystem` (of fsspec) opens. A
    connection opens faster without schema `current`, and with only the macros `needed_by` one statement. Raises
    WarehouseError if the lake cannot be read.
    """
    connection = duckdb.connect()
    try:
        # Views are created first: that reads files, and nothing can be created once users can send statements.
        if filesystem is not None:
            connection.register_filesystem(filesystem)
        # They are created over the empty files only: otherwise each lists all folders, 3 s for a thousand runs.
        empty = literal(_escape_glob(empty_file(lake, "runs").parents[1]))
        connection.execute(f"SET VARIABLE kdb_lake = {empty}")
        for statement in view_statements(lake, files, movable=True, with_current=with_current, needed_by=needed_by):
            connection.execute(statement)
        connection.execute(f"SET VARIABLE kdb_lake = {literal(_run_folders(lake))}")
        if runs is not None:
            # As a literal, because binding a value makes DuckDB import pandas, if installed, which takes 0.25 s. And as
            # one text, because DuckDB copies it for each file: a list of thousands takes longer.
            connection.execute(f"SET VARIABLE kdb_runs = {literal(','.join(['', *runs, '']))}")
        if remembered is not None and remembered.is_known:
            connection.execute(remembered.statement)
        _lock(connection, lake, limits, ["kdb://lake/"] if filesystem is not None else [])
    except duckdb.Error as error:
        connection.close()
        raise WarehouseError(
            f"{lake}: cannot be read: {message(error)}. `kdb verify` lists damaged files, and `kdb rebuild` "
            "restores the files that every view needs."
        ) from error
    return connection


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
        warnings.warn(note, KdbNote, stacklevel=7)  # where Warehouse.query was called


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


def scan(lake: Path, table: str, runs: Sequence[str] | None = None) -> pl.LazyFrame:
    """Return a table as a Polars LazyFrame with the view's columns; only the rows of `runs`, if given.

    Vectors are lists of Float32, whatever their length and storage format.
    """
    columns = TABLES[table].columns
    vectors = [pl.col(c.name).cast(pl.List(pl.Float32)) for c in columns if isinstance(c.type, Vector)]
    typed = pl.DataFrame(arrow_schema(table).empty_table()).with_columns(vectors).lazy()
    folders = [
        folder
        for folder in sorted(lake.glob(f"model=*/dataset=*/run=*/{table}"))
        if runs is None or folder.parent.name.removeprefix("run=") in {*runs, "__none__"}
    ]
    # One scan per run, because Polars reads fixed-size vectors as arrays, whose lengths differ between models.
    frames = [_scan_files(sorted(folder.glob("*.parquet"))).with_columns(vectors) for folder in folders]
    # Columns missing in an older schema are NULL.
    return pl.concat([*frames, typed], how="diagonal").select(*PARTITIONS, *columns.keys())


def _run_folders(lake: Path) -> str:
    """Return the glob of all runs' folders."""
    return f"{_escape_glob(lake)}/*/*/*"


def _create_view(name: str, rows: str) -> str:
    """Return the SQL of a table's view, which replaces its stub."""
    visible = "getvariable('kdb_runs') IS NULL OR contains(getvariable('kdb_runs')::VARCHAR, ',' || run || ',')"
    return f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM ({rows}) WHERE {visible}"


def _rows(table: Table, files: str, *, name_of: str = "{}", version: int = SCHEMA_VERSION, union: bool = False) -> str:
    """Return the SELECT of a table's rows in `files`, SQL for a glob or a list; `name_of` decodes a name in a path.

    The files have the schema `version`: columns added later are NULL. With `union`, they have several schemas, and
    DuckDB reads the columns of each file.
    """
    if files == "[]":  # read_parquet refuses an empty list
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
    """Return SQL comments with the meanings of a table and its columns, for `duckdb_columns()` in a shell."""
    meanings = {**PARTITIONS, **{column.name: column.comment for column in table.columns}}
    lines = []
    for view in (table.name, f"{current.SCHEMA}.{table.name}"):
        lines.append(f"COMMENT ON VIEW {view} IS {literal(table.comment)};")
        lines += [f'COMMENT ON COLUMN {view}."{name}" IS {literal(text)};' for name, text in meanings.items()]
    return "\n".join(lines)


def _escape_glob(folder: Path) -> str:
    """Return the folder's absolute path, as a DuckDB glob that matches only this folder."""
    return re.sub(r"[\[*?{]", r"[\g<0>]", str(folder.resolve()))


def _build_shell_file(path: Path, statements: list[str]) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH {literal(str(path))} AS kdb (STORAGE_VERSION '{_STORAGE_VERSION}')")
        connection.execute("USE kdb; BEGIN")  # one transaction: each one waits for the disk
        for statement in statements:
            connection.execute(statement)
        connection.execute("COMMIT; USE memory; DETACH kdb")  # detaching folds the log into the file


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


def _lock(connection: duckdb.DuckDBPyConnection, lake: Path, limits: Limits | None, also: list[str]) -> None:
    """Restrict the connection to reading the lake, and lock its settings."""
    # DuckDB compares the path with a view's glob as written, including escapes.
    readable = f"[{', '.join(map(literal, [str(lake.resolve()), _escape_glob(lake), *also]))}]"
    if limits is not None:
        connection.execute(
            f"SET memory_limit = '{limits.memory}B'; SET threads = {limits.threads};"
            f"SET max_temp_directory_size = '{4 * limits.memory}B';"
            # Committed files never change, so their footers can be cached.
            "SET parquet_metadata_cache = true; SET enable_progress_bar = false"
        )
    spill = Path(tempfile.gettempdir()) / f"kdb-{os.getpid()}-{secrets.token_hex(4)}"
    connection.execute(
        "SET TimeZone = 'UTC';"
        "SET python_enable_replacements = false;"  # FROM name must not find a Python variable
        f"SET temp_directory = {literal(str(spill))};"  # default: .tmp in the current folder; created if needed
        f"SET allowed_directories = {readable};"
        "SET enable_external_access = false;"
        "SET lock_configuration = true"
    )


def _scan_files(files: list[Path]) -> pl.LazyFrame:
    # Without glob=False, Polars would take [ in a folder's name for a pattern.
    return pl.scan_parquet(files, glob=False, hive_partitioning=True, hive_schema=dict.fromkeys(PARTITIONS, pl.String))
