"""Lookup by which the views of `kdb.duckdb` find the folder that contains the file, even after a copy or move.

SQL cannot tell in which file a view is stored. But `read_parquet` accepts a setting of DuckDB: `temp_directory`
defaults to the path of the file that was opened, with `.tmp` added. If that is no help (the file is attached, or the
setting was changed), views read the folder for which the file was written. In both cases, a condition of every view
compares the result with the path of the open file; if they differ, the view raises an error.

To identify the open file, each file has a type that is named after its folder. A macro is bound in the session's
default database, even if it is from another file. It also refers to the type, and so fails in the database of another
warehouse.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdb.queries.catalogue import literal

SHELL_FILE = "kdb.duckdb"

_TEMPORARY = "coalesce(current_setting('temp_directory'), '')"
_IS_OPENED = rf"regexp_matches({_TEMPORARY}, '(^|[/\\]){re.escape(SHELL_FILE)}\.tmp$')"
_OPENED = f"left({_TEMPORARY}, -{len(SHELL_FILE + '.tmp')})"

_TABLE_MACRO = re.compile(r"^(CREATE MACRO \w+\([^;]*?\) AS TABLE)\n(.*?);$", re.MULTILINE | re.DOTALL)


class Home:
    """The folder of a warehouse, as found by the SQL in its `kdb.duckdb`."""

    def __init__(self, warehouse: Path) -> None:
        self._written_for = str(warehouse.resolve()).rstrip("/") + "/"
        self.name = _name("warehouse", self._written_for)
        self._sql = f"CASE WHEN {_IS_OPENED} THEN {_OPENED} ELSE {literal(self._written_for)} END"

    def files(self, table: str) -> str:
        """Return SQL for the glob of a table's files."""
        return rf"regexp_replace({self._sql}, '[\[*?{{]', '[\0]', 'g') || 'lake/*/*/*/{table}/*.parquet'"

    @property
    def is_here(self) -> str:
        """Return SQL that is true if `files` are those beside the open file, and otherwise raises an error."""
        return (
            f"(SELECT CASE WHEN {self._is_sure} THEN true ELSE error({self._refusal}) END FROM duckdb_databases() "
            "WHERE database_name = 'temp' OR database_name IN "
            f"(SELECT database_name FROM duckdb_types() WHERE type_name = {literal(self.name)}))"
        )

    @property
    def _is_sure(self) -> str:
        """SQL over the rows of one open file and `temp`: whether it has the type and is in the folder of `files`."""
        folder = r"max(regexp_replace(path, '[^/\\]*$', ''))"
        relative = rf"NOT regexp_matches({self._sql}, '^([/\\]|\w+:)')"
        # The shell of 1.5 has an absolute path. The setting may be its end, for the database that was opened first.
        first = "min(database_oid) FILTER (NOT internal) < min(database_oid) FILTER (internal)"
        end = rf"ends_with({folder}, '/' || regexp_replace({self._sql}, '^(.*[/\\])?\.\.?[/\\]', ''))"
        return (
            # DuckDB would look for a relative path in file_search_path.
            f"count(*) FILTER (NOT internal) = 1 AND ({folder} = {self._sql} OR {relative} AND {first} AND {end}) "
            f"AND NOT ({relative} AND current_setting('file_search_path') <> '')"
        )

    @property
    def _refusal(self) -> str:
        written = literal(f"This {SHELL_FILE} was written for {self._written_for}, and is open as ")
        what_to_do = literal(
            f". Its views cannot tell which warehouse to read. Open only that path, unchanged. To attach "
            f"{SHELL_FILE}, run `kdb rebuild --warehouse FOLDER` once and use the file's absolute path."
        )
        return f"{written} || coalesce(string_agg(path, ' and '), 'a copy in memory') || {what_to_do}"


def name_of_files(urls: Mapping[str, Sequence[str]]) -> str:
    """Return the name of the type of a file whose views read these URLs of each table."""
    every = sorted(url for files in urls.values() for url in files)
    return _name("files of", "".join(every[:1]).partition("/lake/")[0], *every)


def create_type(name: str) -> str:
    """Return the SQL that creates the type of a file."""
    return f"CREATE TYPE {_quoted(name)} AS BOOLEAN"


def bound_to(name: str, macros: str) -> str:
    """Return the SQL of macros; those that read tables fail in a database without the type."""
    # DuckDB looks up the type in the same database as the tables; a condition on rows could be optimised away.
    return _TABLE_MACRO.sub(rf"\1\nSELECT * FROM (\n\2\n) WHERE NULL::{_quoted(name)} IS NULL;", macros)


def _name(kind: str, subject: str, *more: str) -> str:
    # With a hash, because names in DuckDB are case-insensitive.
    return f"kdb {kind} {subject} ({hashlib.sha256(chr(10).join([subject, *more]).encode()).hexdigest()[:8]})"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
