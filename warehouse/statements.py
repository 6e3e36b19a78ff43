"""Checks of a statement before it runs.

The locked connection still lets COPY write inside the lake, and lets SELECT call functions that write logs there. Its
catalog also reveals the path of the lake. So DuckDB itself parses a statement, the whole tree is checked, and exactly
the parsed text is run. Kinds of statements, parts of a SELECT, and functions are allowed by name; all others are
refused.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from kdb.errors import EngineError, QueryError
from kdb.queries.catalogue import macros
from kdb.warehouse.functions import COMPUTE, LOCAL
from kdb.warehouse.schema import TABLES

_EXPLAIN = re.compile(r"[ \t\r\n]*EXPLAIN[ \t\r\n]+(ANALYZE[ \t\r\n]+)?", re.IGNORECASE)
"""The beginning of an EXPLAIN, followed by the statement that it explains."""

_VIEWS = {*TABLES, *re.findall(r"CREATE VIEW (?:\w+\.)?(\w+)", macros())}
_SCHEMAS = {"", "main", "current"}
_CATALOG = {"tables", "columns", "schemata"}
"""Views of information_schema that clients of the server may read: those that reveal no path."""

_MACROS = frozenset(name.lower() for name in re.findall(r"CREATE MACRO (?:\w+\.)?(\w+)", macros()))
_TABLE_FUNCTIONS = {"generate_series", "json_each", "json_tree", "range", "repeat", "repeat_row", "unnest", *_MACROS}

_PARTS = {
    *("SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"),
    *("BASE_TABLE", "EMPTY", "EXPRESSION_LIST", "JOIN", "PIVOT", "SHOW_REF", "SUBQUERY", "TABLE_FUNCTION"),
}
_EXPRESSIONS = {
    *("BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "DEFAULT"),
    *("FUNCTION", "LAMBDA", "LAMBDA_REF", "OPERATOR", "PARAMETER", "POSITIONAL_REFERENCE", "STAR", "SUBQUERY"),
    *("TYPE", "WINDOW"),
}
_CRASHING_TYPES = {"VARIANT", "AGGREGATE_STATE"}
"""Types whose functions cause internal errors in DuckDB 1.5 on ordinary arguments."""

_SHOWN = {"tables", "__show_tables_expanded"}
"""Lists that SHOW may return to clients of the server."""


def check_reads(connection: duckdb.DuckDBPyConnection, text: str) -> duckdb.Statement:
    """Return the one statement in the text. Raises QueryError unless it can only read."""
    statement, select = _parsed(connection, text)
    for node in _nodes(_tree(connection, select)):
        _check_part(node, LOCAL)
    return statement


def check_public(connection: duckdb.DuckDBPyConnection, text: str) -> duckdb.Statement:
    """Return the statement as ``check_reads``, for a client of the server: it may read only the views."""
    statement, select = _parsed(connection, text)
    if statement.type.name != "SELECT":
        raise QueryError("Only SELECT is allowed here, not EXPLAIN")
    nodes = list(_nodes(_tree(connection, select)))
    named = {entry["key"].lower() for node in nodes for entry in node.get("cte_map", {}).get("map", ())}
    for node in nodes:
        _check_part(node, COMPUTE)
        if node.get("type") == "BASE_TABLE":
            _check_table(node, named)
        elif node.get("type") == "TABLE_FUNCTION":
            _check_table_function(node["function"]["function_name"])
        elif node.get("type") == "SHOW_REF":
            _check_show(node)
    return statement


def _parsed(connection: duckdb.DuckDBPyConnection, text: str) -> tuple[duckdb.Statement, str]:
    """Return the one statement of the text, SELECT or EXPLAIN, and the text of its SELECT."""
    _check_characters(text)
    with reported():
        statements = connection.extract_statements(text)
    kinds = [statement.type.name for statement in statements]
    if len(kinds) != 1:
        hint = " PIVOT needs its values: PIVOT … ON column IN (…)." if kinds == ["CREATE", "SELECT"] else ""
        raise QueryError(f"SQL runs one statement at a time, found {len(kinds)}.{hint}")
    if kinds[0] not in ("SELECT", "EXPLAIN"):
        raise QueryError(f"SQL only reads here: {kinds[0]} is refused")
    if kinds[0] == "SELECT":
        return statements[0], text
    # Only at the beginning of the text, because EXPLAIN ANALYZE runs the rest. After a comment, or with options in
    # brackets, the text does not parse as a SELECT.
    beginning = _EXPLAIN.match(text)
    return statements[0], text[beginning.end() :] if beginning else text


def _check_characters(text: str) -> None:
    """Refuse NUL, which ends a text for some parsers, and invalid Unicode."""
    if "\0" in text:
        raise QueryError("The statement contains a NUL character. Remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"The statement is not valid Unicode at character {error.start + 1}") from error


def _check_part(node: dict[str, Any], functions: frozenset[str]) -> None:
    """Refuse a part of the tree that is of an unknown kind, or calls a function that is not listed."""
    part = node.get("type") if "sample" in node or "cte_map" in node else None
    if (part and part not in _PARTS) or ("class" in node and node["class"] not in _EXPRESSIONS):
        raise QueryError(f"SQL only reads here: {part or node['class']} is refused")
    name = node.get("function_name", "").lower()
    if name and name not in functions and name not in _MACROS:
        raise QueryError(f"SQL only reads and computes here: the function {name} is refused")
    if node.get("export_state"):
        raise QueryError("SQL only reads and computes here: EXPORT_STATE is refused")
    kind = str(node.get("name" if node.get("type") == "UNBOUND_TYPE_INFO" else "id")).upper()
    if kind in _CRASHING_TYPES:
        raise QueryError(f"The type {kind} is refused, because it causes internal errors in DuckDB")


def _check_table(node: dict[str, Any], named: set[str]) -> None:
    catalog, schema, name = (node[key].lower() for key in ("catalog_name", "schema_name", "table_name"))
    if catalog in ("", "memory") and schema in _SCHEMAS and name in _VIEWS:
        return
    if catalog in ("", "memory") and schema == "current" and name in TABLES:
        return
    if schema == "information_schema" and name in _CATALOG:
        return
    # A name defined by the statement itself; elsewhere, DuckDB may take it for its own name or for a file.
    if not (catalog or schema) and name in named and not re.match(r"duckdb_|pragma_|pg_|sqlite_|.*[^\w ]", name):
        return
    shown = ".".join(node[key] for key in ("catalog_name", "schema_name", "table_name") if node[key])
    raise QueryError(f"There is no table {shown!r} here. The tables are {', '.join(sorted(_VIEWS))}")


def _check_table_function(name: str) -> None:
    if name.lower() not in _TABLE_FUNCTIONS:
        allowed = ", ".join(sorted(_TABLE_FUNCTIONS - _MACROS))
        raise QueryError(f"The table function {name} is refused. Allowed are {allowed} and the macros of saved queries")


def _check_show(node: dict[str, Any]) -> None:
    """Refuse SHOW of variables, databases and other lists of the server; DESCRIBE and SUMMARIZE contain a query."""
    shown = node["table_name"].strip('"').lower()
    if node["query"] is None and shown not in _SHOWN:
        raise QueryError("SHOW is refused here, except SHOW TABLES; DESCRIBE shows the columns of a table")


def _tree(connection: duckdb.DuckDBPyConnection, select: str) -> dict[str, Any]:
    """Return the statement as parsed by DuckDB. Raises QueryError unless it is a SELECT."""
    # In hex, which no parser changes. Not bound: DuckDB would import pandas, and ignore Ctrl-C during the import.
    text = f"decode(unhex('{select.encode().hex()}'))"
    try:
        with reported():
            row = connection.execute(f"SELECT json_serialize_sql({text})").fetchone()
        tree: dict[str, Any] = json.loads(row[0]) if row else {"error": True}
    except RecursionError as error:
        raise QueryError("The statement is nested too deeply") from error
    if tree["error"] or len(tree["statements"]) != 1:
        raise QueryError(
            "SQL only reads here: a statement that is not a SELECT is refused (EXPLAIN is allowed, without options)"
        )
    return tree


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects of the tree, without recursion: a statement may be nested deeper than Python's stack."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


_EXCERPTS = re.compile(r"\n\n(LINE |At:\n|Stack Trace:|This error signals)|\nStack Trace|Stack Trace:")
"""The end of DuckDB's message, after which an excerpt of SQL, Python, or its stack begins."""


def message(error: BaseException) -> str:
    """Return the message of an error of DuckDB, Arrow or kdb, without the excerpts that follow it."""
    text = _EXCERPTS.split(str(error), maxsplit=1)[0]
    return re.sub(r"^(WarehouseError|Invalid Error: IOError): ", "", text).strip()


_PATH = re.compile(r"(?<![\w./:])/(?:[\w.@%+=,~-]+/)+[\w.@%+=,~-]*")


def public_message(text: str, lake: Path, asked: str) -> str:
    """Return the text without paths of this machine: relative to the lake, or unchanged if part of the statement."""
    for root in (lake.resolve(), lake):
        text = text.replace(str(root), "lake")
    return _PATH.sub(lambda match: match[0] if match[0] in asked else "PATH", text)


def refusal(error: BaseException) -> QueryError:
    """Return the error to raise for one of DuckDB or Arrow. Raises KeyboardInterrupt for Ctrl-C."""
    text = message(error)
    if text.startswith("INTERRUPT Error"):
        raise KeyboardInterrupt from error
    if re.match(r"(\w+Error: )?(INTERNAL|FATAL) Error", text):
        return EngineError(f"Internal error of DuckDB on this statement: {text.partition(chr(10))[0]}")
    return QueryError(text)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Convert errors of DuckDB and Arrow into QueryError, and DuckDB's error for Ctrl-C into KeyboardInterrupt."""
    try:
        yield
    except duckdb.InterruptException as error:
        raise KeyboardInterrupt from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # DuckDB's errors, some of them raised by Arrow
        raise refusal(error) from error
    except UnicodeDecodeError as error:  # DuckDB cut its message in the middle of a character
        raise QueryError(error.object.decode(errors="replace").partition("\n\n")[0].strip()) from error
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error
