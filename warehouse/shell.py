"""How the views of `kdb.duckdb` find the folder that this file lies in, wherever it is copied or moved.

SQL cannot say in which file a view is stored. But `read_parquet` takes a setting of DuckDB: the default of
`temp_directory` is the path of the file that was opened, and `.tmp`. Where that says nothing (the file is attached, or
the setting was changed), views read the folder that the file was written for. Both are guesses until a condition of
every view has compared them with the path of the open file; where they differ, the view is an error.

To find the open file, each holds a type that is named after its folder. A macro is bound in the session's default
database, whichever file it is from; it names the type, too, and so is an error in the database of another warehouse.
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
    """The folder of a warehouse, as the SQL in its `kdb.duckdb` finds it."""

    def __init__(self, warehouse: Path) -> None:
        self._written_for = str(warehouse.resolve()).rstrip("/") + "/"
        self.name = _name("warehouse", self._written_for)
        self._sql = f"CASE WHEN {_IS_OPENED} THEN {_OPENED} ELSE {literal(self._written_for)} END"

    def files(self, table: str) -> str:
        """SQL for the glob of a table's files."""
        return rf"regexp_replace({self._sql}, '[\[*?{{]', '[\0]', 'g') || 'lake/*/*/*/{table}/*.parquet'"

    @property
    def is_here(self) -> str:
        """SQL that is true where `files` are those beside the open file, and else an error."""
        return (
            f"(SELECT CASE WHEN {self._is_sure} THEN true ELSE error({self._refusal}) END FROM duckdb_databases() "
            "WHERE database_name = 'temp' OR database_name IN "
            f"(SELECT database_name FROM duckdb_types() WHERE type_name = {literal(self.name)}))"
        )

    @property
    def _is_sure(self) -> str:
        """Whether one open file has the type, and lies where `files` are, over the rows of that file and `temp`."""
        folder = r"max(regexp_replace(path, '[^/\\]*$', ''))"
        relative = rf"NOT regexp_matches({self._sql}, '^([/\\]|\w+:)')"
        # The shell of 1.5 has an absolute path, of which the setting may be the end: of the database opened first.
        first = "min(database_oid) FILTER (NOT internal) < min(database_oid) FILTER (internal)"
        end = rf"ends_with({folder}, '/' || regexp_replace({self._sql}, '^(.*[/\\])?\.\.?[/\\]', ''))"
        return (
            f"count(*) FILTER (NOT internal) = 1 AND ({folder} = {self._sql} OR {relative} AND {first} AND {end}) "
            f"AND NOT ({relative} AND current_setting('file_search_path') <> '')"  # where DuckDB would look for it
        )

    @property
    def _refusal(self) -> str:
        written = literal(f"This {SHELL_FILE} was written for {self._written_for}, and is open as ")
        what_to_do = literal(
            f". Its views cannot tell which warehouse to read: open that path as it is, by itself. To attach "
            f"{SHELL_FILE}, run `kdb rebuild --warehouse FOLDER` once and give the file's absolute path."
        )
        return f"{written} || coalesce(string_agg(path, ' and '), 'a copy in memory') || {what_to_do}"


def name_of_files(urls: Mapping[str, Sequence[str]]) -> str:
    """The name of a file's type, whose views read these URLs of each table."""
    every = sorted(url for found in urls.values() for url in found)
    return _name("files of", "".join(every[:1]).partition("/lake/")[0], *every)


def create_type(name: str) -> str:
    """The SQL that creates the type of a file."""
    return f"CREATE TYPE {_quoted(name)} AS BOOLEAN"


def bound_to(name: str, macros: str) -> str:
    """The SQL of macros, where each that reads tables is an error in a database that lacks the type."""
    # DuckDB looks the type up where it looks up the tables; a condition of rows could be optimised away.
    return _TABLE_MACRO.sub(rf"\1\nSELECT * FROM (\n\2\n) WHERE NULL::{_quoted(name)} IS NULL;", macros)


def _name(kind: str, place: str, *more: str) -> str:
    # With a hash, as DuckDB does not tell upper from lower case in names.
    return f"kdb {kind} {place} ({hashlib.sha256(chr(10).join([place, *more]).encode()).hexdigest()[:8]})"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
