"""SQL of the views: one for each table, over Parquet files, with schema `current` and the macros of saved queries.

Views are globs over a lake, or read files that are listed by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kdb.queries.catalogue import literal, macros
from kdb.warehouse import current
from kdb.warehouse.manifest import Files
from kdb.warehouse.paging import column_types
from kdb.warehouse.schema import OLDER_ROWS, PARTITIONS, SCHEMA_VERSION, TABLES, column_names, sql_type

if TYPE_CHECKING:
    from sqlalchemy import Table


def view_statements(
    files: Files | None = None, *, with_current: bool = True, needed_by: str | None = None
) -> list[str]:
    """Return the SQL that creates a view for every table, schema `current`, and the macros of the saved queries.

    Views show the runs listed in the variable `kdb_runs`; if it is not set, as in a shell, they show all. They are
    globs in the folders that the variable `kdb_lake` names at the time of a query, or read the given `files` of each
    table. With `needed_by`, macros that this statement does not need are left out.
    """

    def rows(table: Table) -> str:
        if files is not None:
            return _select_of_versions(table, files)
        return select_rows(table, f"getvariable('kdb_lake') || '/{table.name}/*.parquet'")

    return create_statements(rows, macros(needed_by), with_current=with_current)


def create_statements(rows: Callable[[Table], str], shared: str, *, with_current: bool = True) -> list[str]:
    """Return the statements that create the views and macros of every database of kdb."""
    views = [_create_view(name, rows(table)) for name, table in TABLES.items()]
    return [*current.stubs(), shared, *views] if with_current else [*views, shared]


def _select_of_versions(table: Table, files: Files) -> str:
    """Return the SELECT of a table's rows in files of several schemas; columns missing in older ones are NULL."""
    selects = [
        select_rows(table, literal(tuple(tables[table.name])), version=version)
        for version, tables in sorted(files.items(), reverse=True)
        if tables.get(table.name)
    ]
    return " UNION ALL ".join(selects) if selects else select_rows(table, "[]")


def runs_glob(lake: Path) -> str:
    """Return the glob of all runs' folders."""
    return f"{escape_glob(lake)}/*/*/*"


def _create_view(name: str, rows: str) -> str:
    """Return the SQL of a table's view, which replaces its stub."""
    visible = "getvariable('kdb_runs') IS NULL OR contains(getvariable('kdb_runs')::VARCHAR, ',' || run || ',')"
    return f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM ({rows}) WHERE {visible}"


def select_rows(
    table: Table, files: str, *, name_of: str = "{}", version: int = SCHEMA_VERSION, union: bool = False
) -> str:
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
    rows = (
        f"SELECT {', '.join([*names, *columns])} "
        f"FROM read_parquet({files}, hive_partitioning = true, hive_types = {{{types}}}"
        f"{', union_by_name = true' if union else ''})"
    )
    return _as_today(table, rows) if union or version < SCHEMA_VERSION else rows


def _as_today(table: Table, rows: str) -> str:
    """Return the SELECT of rows of an older schema, with the names of today."""
    changed = [f"{sql} AS {_quoted(name)}" for name, sql in OLDER_ROWS.get(table.name, {}).items()]
    return f"SELECT * REPLACE ({', '.join(changed)}) FROM ({rows})" if changed else rows


def _quoted(name: str) -> str:
    return f'"{name}"'


def comments() -> list[str]:
    """Return the SQL of the comments on all views."""
    return list(map(_comments_on, TABLES.values()))


def _comments_on(table: Table) -> str:
    """Return SQL comments with the meanings of a table and its columns, for `duckdb_columns()` in a shell."""
    meanings = {**PARTITIONS, **{column.name: column.comment for column in table.columns}}
    lines = []
    for view in (table.name, f"{current.SCHEMA}.{table.name}"):
        lines.append(f"COMMENT ON VIEW {view} IS {literal(table.comment)};")
        lines += [f'COMMENT ON COLUMN {view}."{name}" IS {literal(text)};' for name, text in meanings.items()]
    return "\n".join(lines)


def escape_glob(folder: Path) -> str:
    """Return the folder's absolute path, as a DuckDB glob that matches only this folder."""
    return re.sub(r"[\[*?{]", r"[\g<0>]", str(folder.resolve()))
