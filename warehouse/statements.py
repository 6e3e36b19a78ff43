"""What a statement may do, known before it runs.

The locked connection still lets COPY write inside the lake, and lets SELECT call functions that write logs there; and
its catalog tells where the lake lies. So a statement is parsed by DuckDB itself and looked at first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import duckdb

from kdb.errors import QueryError
from kdb.queries.catalogue import macros
from kdb.warehouse.schema import TABLES

_REFUSED_FUNCTIONS = re.compile(r"enable_\w+|query|json_execute_serialized_sql", re.IGNORECASE)
"""Functions of a SELECT that write files (logs, profiles), and those that hide such a call in a text."""

_EXPLAIN = re.compile(r"\s*EXPLAIN\s+(ANALYZE\s+)?", re.IGNORECASE)

_VIEWS = {*TABLES, *re.findall(r"CREATE VIEW (\w+)", macros())}
_MACROS = set(re.findall(r"CREATE MACRO (\w+)", macros()))
_CATALOG = {"tables", "columns", "schemata"}
"""Views of information_schema that strangers may read: those that tell no path."""

_TABLE_FUNCTIONS = {"range", "generate_series", "unnest", "repeat", "repeat_row", *_MACROS}
_PRIVATE_FUNCTIONS = {
    *("current_setting", "getenv", "getvariable", "which_secret", "write_log", "query", "query_table"),
    *("nextval", "currval", "txid_current", "json_execute_serialized_sql", "sleep_ms"),
}
"""Functions of no table that tell of the server, or do more than compute."""


def check_reads(connection: duckdb.DuckDBPyConnection, text: str) -> duckdb.Statement:
    """The one statement in the text, if all it can do is read; else QueryError."""
    try:
        statements = connection.extract_statements(text)
    except duckdb.Error as error:
        raise QueryError(message(error)) from error
    kinds = [statement.type.name for statement in statements]
    if len(kinds) != 1:
        hint = " Give PIVOT its values: PIVOT … ON column IN (…)." if kinds == ["CREATE", "SELECT"] else ""
        raise QueryError(f"kdb sql runs one statement at a time, found {len(kinds)}.{hint}")
    if kinds[0] not in ("SELECT", "EXPLAIN"):
        raise QueryError(f"kdb sql only reads: {kinds[0]} is refused")
    # EXPLAIN ANALYZE runs what it explains.
    tree = _tree(connection, _EXPLAIN.sub("", text, count=1) if kinds[0] == "EXPLAIN" else text)
    for name in (node["function_name"] for node in _nodes(tree) if "function_name" in node):
        if _REFUSED_FUNCTIONS.fullmatch(name):
            raise QueryError(f"kdb sql only reads: the function {name} is refused")
    return statements[0]


def check_public(connection: duckdb.DuckDBPyConnection, text: str) -> duckdb.Statement:
    """As ``check_reads``, for a stranger's statement: the views, and nothing of the machine that they lie on."""
    statement = check_reads(connection, text)
    if statement.type.name != "SELECT":
        raise QueryError("Only SELECT is answered here: EXPLAIN is refused")
    nodes = list(_nodes(_tree(connection, text)))
    named = {entry["key"].lower() for node in nodes for entry in node.get("cte_map", {}).get("map", ())}
    for node in nodes:
        if node.get("type") == "BASE_TABLE":
            _check_table(node, named)
        elif node.get("type") == "TABLE_FUNCTION":
            _check_table_function(node["function"]["function_name"])
        elif node.get("function_name", "").lower() in _PRIVATE_FUNCTIONS:
            raise QueryError(f"The function {node['function_name']} is refused: it does more than compute")
    return statement


def _check_table(node: dict[str, Any], named: set[str]) -> None:
    catalog, schema, name = (node[key].lower() for key in ("catalog_name", "schema_name", "table_name"))
    if catalog in ("", "memory") and schema in ("", "main") and name in _VIEWS:
        return
    if catalog in ("", "memory") and schema == "current" and name in TABLES:
        return
    if schema == "information_schema" and name in _CATALOG:
        return
    # A name that the statement itself gave; but DuckDB may take it for one of its own, or for a file, elsewhere in it.
    if not (catalog or schema) and name in named and not re.match(r"duckdb_|pragma_|pg_|sqlite_|.*[^\w ]", name):
        return
    shown = ".".join(node[key] for key in ("catalog_name", "schema_name", "table_name") if node[key])
    raise QueryError(f"There is no table {shown!r} here: the tables are {', '.join(sorted(_VIEWS))}")


def _check_table_function(name: str) -> None:
    if name.lower() not in _TABLE_FUNCTIONS:
        allowed = ", ".join(sorted(_TABLE_FUNCTIONS - _MACROS))
        raise QueryError(f"The table function {name} is refused: there are {allowed} and the macros of saved queries")


def _tree(connection: duckdb.DuckDBPyConnection, select: str) -> dict[str, Any]:
    """The statement as DuckDB parses it; QueryError for what is no SELECT."""
    row = connection.execute("SELECT json_serialize_sql(?)", [select]).fetchone()
    tree: dict[str, Any] = json.loads(row[0]) if row else {"error": True}
    if tree["error"]:
        raise QueryError("kdb sql only reads: what is not a SELECT is refused")
    return tree


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of the tree. Without recursion: a statement may be nested deeper than Python's stack."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def message(error: duckdb.Error) -> str:
    """DuckDB's message, or ours that passed through it, without the excerpt of SQL or Python that follows it."""
    return str(error).split("\n\nLINE ")[0].split("\n\nAt:\n")[0].removeprefix("WarehouseError: ").strip()
