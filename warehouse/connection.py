"""The one place that opens DuckDB for queries: in memory, with the views of a lake, which is all that it can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from kdb.errors import WarehouseError
from kdb.queries.catalogue import literal
from kdb.warehouse import current
from kdb.warehouse.limits import Limits, restrict
from kdb.warehouse.manifest import Files
from kdb.warehouse.run_folders import empty_file
from kdb.warehouse.statements import message
from kdb.warehouse.views import escape_glob, runs_glob, view_statements


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
        empty = literal(escape_glob(empty_file(lake, "runs").parents[1]))
        connection.execute(f"SET VARIABLE kdb_lake = {empty}")
        for statement in view_statements(files, with_current=with_current, needed_by=needed_by):
            connection.execute(statement)
        connection.execute(f"SET VARIABLE kdb_lake = {literal(runs_glob(lake))}")
        if runs is not None:
            # As a literal, because binding a value makes DuckDB import pandas, if installed, which takes 0.25 s. And as
            # one text, because DuckDB copies it for each file: a list of thousands takes longer.
            connection.execute(f"SET VARIABLE kdb_runs = {literal(','.join(['', *runs, '']))}")
        if remembered is not None and remembered.is_known:
            connection.execute(remembered.statement)
        restrict(connection, lake, limits, ["kdb://lake/"] if filesystem is not None else [])
    except duckdb.Error as error:
        connection.close()
        raise WarehouseError(
            f"{lake}: cannot be read: {message(error)}. `kdb verify` lists damaged files, and `kdb rebuild` "
            "restores the files that every view needs."
        ) from error
    return connection
