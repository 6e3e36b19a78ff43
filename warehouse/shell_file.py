"""``kdb.duckdb``, a file for the DuckDB shell that holds only views, of a folder or of public URLs.

rebuild(storage)
publish(storage, "https://example.org/shared", Path("paper.duckdb"))
"""

from __future__ import annotations

import errno
import hashlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import duckdb

from kdb.errors import QueryError, WarehouseError
from kdb.queries.catalogue import literal, macros
from kdb.warehouse import shell_lookup
from kdb.warehouse.files import storage_errors
from kdb.warehouse.run_folders import empty_file
from kdb.warehouse.schema import SCHEMA_VERSION, TABLES
from kdb.warehouse.shell_lookup import SHELL_FILE
from kdb.warehouse.storage import Storage
from kdb.warehouse.views import comments, create_statements, select_rows

if TYPE_CHECKING:
    from sqlalchemy import Table

_STORAGE_VERSION = "v1.0.0"
"""Storage version of the shell file: that of DuckDB 1.0, so that every shell since 1.4 can open it."""


def rebuild(storage: Storage) -> Path:
    """Rewrite ``kdb.duckdb`` and the empty tables that its views need; returns its path.

    The file of a bucket reads the runs that are there now.
    """
    local = storage.local
    local.restore_empty_tables()
    with storage_errors(local.path):
        if storage.is_remote:
            _refuse_older(storage)
            urls = {table: storage.committed_files(table) for table in TABLES}
            write_public_file(local.shell_file, local.lake, urls, encoded=False)
        else:
            write_shell_file(local.path, older_runs=storage.older_runs)
            local.record(views=_digest(storage))
    return local.shell_file


def repair(storage: Storage) -> None:
    """Rebuild the file of a folder if it is missing, or its views are of another folder or version."""
    if storage.local.recorded().get("views") != _digest(storage) or not storage.local.shell_file.exists():
        rebuild(storage)


def publish(storage: Storage, url: str, path: Path) -> None:
    """Write a file that reads the committed runs from ``url``, the public address of the warehouse's folder.

    Raises QueryError if that is not a URL, WarehouseError if the file cannot be written.
    """
    if not re.match(r"https?://[^/?#]+[^?#]*$", url):
        raise QueryError(f"--url: expected the address of a folder, such as https://example.org/shared, found {url!r}")
    _refuse_older(storage)
    base, here = url.rstrip("/"), f"{storage.location}/"
    paths = {table: [f.removeprefix(here) for f in storage.committed_files(table)] for table in TABLES}
    urls = {table: [f"{base}/{quote(path, safe='/=')}" for path in within] for table, within in paths.items()}
    with storage_errors(path.parent):
        write_public_file(path, storage.local.lake, urls, encoded=True)


def _refuse_older(storage: Storage) -> None:
    """Raise WarehouseError if a run has an older schema: views over single files support only one schema."""
    if storage.older_runs:
        versions = {storage.manifest(folder).schema_version for folder in storage.run_folders()}
        if versions - {SCHEMA_VERSION}:
            raise WarehouseError("Some runs were measured by an older kdb. Run `kdb migrate`, then this command again.")


def _digest(storage: Storage) -> str:
    """Return a text that changes with the views of a folder's file."""
    statements = shell_statements(storage.local.path, older_runs=storage.older_runs)
    return hashlib.sha256("\n".join(statements).encode()).hexdigest()


def shell_statements(warehouse: Path, *, older_runs: bool = False) -> list[str]:
    """Return the SQL of `kdb.duckdb`, whose views read the folder that contains the file, even after a copy or move.

    With `older_runs`, files may lack columns, so each query reads the column names of all files.
    """
    home = shell_lookup.Home(warehouse)

    def rows(table: Table) -> str:
        return f"{select_rows(table, home.files(table.name), union=older_runs)} WHERE {home.is_here}"

    return [
        shell_lookup.create_type(home.name),
        *create_statements(rows, shell_lookup.bound_to(home.name, macros())),
        *comments(),
    ]


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
        files = literal(tuple(urls.get(table.name, ())))
        if files != "[]":
            files = f"coalesce(getvariable('kdb_files_{table.name}')::VARCHAR[], {files})"
        return select_rows(table, files, name_of="url_decode({})" if encoded else "{}")

    # DuckDB tests views and macros when it creates them: on empty files, as the others may not exist yet.
    empty = [f"SET VARIABLE kdb_files_{name} = {literal((str(empty_file(lake, name)),))}" for name in TABLES]
    name = shell_lookup.name_of_files(urls)
    views = create_statements(rows, shell_lookup.bound_to(name, macros()))
    _put_shell_file(path, [*empty, shell_lookup.create_type(name), *views, *comments()])


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


def _build_shell_file(path: Path, statements: list[str]) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH {literal(str(path))} AS kdb (STORAGE_VERSION '{_STORAGE_VERSION}')")
        connection.execute("USE kdb; BEGIN")  # one transaction: each one waits for the disk
        for statement in statements:
            connection.execute(statement)
        connection.execute("COMMIT; USE memory; DETACH kdb")  # detaching folds the log into the file
