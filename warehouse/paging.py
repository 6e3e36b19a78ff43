"""Pages of a table: filtered, sorted, and continued after the previous page.

    page = Page.of("layer_scores", filters=["layer>=12", "component=ffn"], sort=["-score"], limit=100)

A cursor holds the values at the end of its page, and the next page starts after them. So no row is skipped or repeated
when new runs appear in between.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from kdb.errors import QueryError, UnknownNameError
from kdb.warehouse.schema import PARTITIONS, TABLES, sql_type

_FILTER = re.compile(r"(\w+)(?:(<=|>=|!=|=|<|>)(.*)|\s+((?i:is(?:\s+not)?\s+null)))", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A page of one table: SQL with ``?`` for its ``params``, and the data to continue after it.

    ``order`` are the columns of the order. Only a page with a limit has an order; a whole table is read unordered.
    """

    sql: str
    params: tuple[Any, ...]
    order: tuple[str, ...]

    @classmethod
    def of(
        cls,
        table: str,
        *,
        filters: Sequence[str] = (),
        sort: Sequence[str] = (),
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Self:
        """Return the page for ``filters`` (``layer>=12``, ``head is null``), ``sort`` (``-score``: descending) etc.

        Raises UnknownNameError for an unknown table or column, QueryError for a wrong filter or cursor.
        """
        types = column_types(table)
        where, params = [], []
        for text in filters:
            condition, values = _condition(text, types)
            where.append(condition)
            params += values
        order = _order(table, sort, types) if limit is not None or sort else {}
        if cursor is not None:
            if limit is None:
                raise QueryError("cursor: needs a limit. Use that of the previous page")
            condition, values = _after(order, _values(cursor, order), types)
            where.append(condition)
            params += values
        sql = f"SELECT {', '.join(map(_quoted, types))} FROM {table}"
        if where:
            sql += " WHERE " + " AND ".join(f"({condition})" for condition in where)
        if order:
            directions = {True: "DESC", False: "ASC"}
            sql += " ORDER BY " + ", ".join(f"{_quoted(n)} {directions[d]} NULLS LAST" for n, d in order.items())
        if limit is not None:
            sql += f" LIMIT {limit + 1}"  # one more row shows whether there is a next page
        return cls(sql, tuple(params), tuple(order))

    def cursor(self, last: Mapping[str, Any]) -> str:
        """Return the cursor of the page after the one that ends with this row."""
        values = [last[name] for name in self.order]
        plain = [value.isoformat() if isinstance(value, datetime) else value for value in values]
        return base64.urlsafe_b64encode(json.dumps([list(self.order), plain]).encode()).decode().rstrip("=")


def column_types(table: str) -> dict[str, str]:
    """Return the columns of a table with their DuckDB types, those from its path first. Raises UnknownNameError."""
    if table not in TABLES:
        raise UnknownNameError("table", table, TABLES, "/schema lists the tables.")
    own = {column.name: sql_type(column) for column in TABLES[table].columns}
    return {**dict.fromkeys(PARTITIONS, "VARCHAR"), **own}


def _quoted(name: str) -> str:
    return f'"{name}"'


def _column(name: str, types: Mapping[str, str]) -> str:
    if name not in types:
        raise UnknownNameError("column", name, types, f"The columns are {', '.join(types)}.")
    if types[name].endswith("[]"):
        raise QueryError(f"column {name}: filters and orders by a list are not supported. Choose another column")
    return name


def _condition(text: str, types: Mapping[str, str]) -> tuple[str, list[str]]:
    match = _FILTER.fullmatch(text)
    if match is None:
        raise QueryError(f"filter: expected COLUMN=VALUE, with = != < <= > >=, or COLUMN is null, found {text!r}")
    name, operator, value, null = match.groups()
    column = _quoted(_column(name, types))
    if null:
        return f"{column} {null}", []
    return f"{column} {operator} CAST(? AS {types[name]})", [value]


def _order(table: str, sort: Sequence[str], types: Mapping[str, str]) -> dict[str, bool]:
    """Return the columns of the order, and whether each is descending: those given, then those that identify a row."""
    order = {}
    for text in sort:
        order[_column(text.removeprefix("-"), types)] = text.startswith("-")
    for name in (*PARTITIONS, *TABLES[table].info["key"]):
        order.setdefault(name, False)
    return order


def _values(cursor: str, order: Mapping[str, bool]) -> list[Any]:
    try:
        names, values = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        if list(names) != list(order) or len(values) != len(order):
            raise ValueError
        if not all(value is None or isinstance(value, str | int | float) for value in values):
            raise ValueError
        "".join(
            value for value in values if isinstance(value, str)
        ).encode()  # half of a surrogate pair is not a character
    except (ValueError, TypeError, RecursionError):
        raise QueryError("cursor: does not belong to this table and order. Use that of the previous page") from None
    return list(values)


def _after(order: Mapping[str, bool], values: Sequence[Any], types: Mapping[str, str]) -> tuple[str, list[Any]]:
    """Return the condition that a row comes after the one with these values. NULL is last in any direction."""
    cases: list[str] = []
    equal: list[str] = []
    params: list[Any] = []
    equal_params: list[Any] = []
    for (name, falls), value in zip(order.items(), values, strict=True):
        column, typed = _quoted(name), f"CAST(? AS {types[name]})"
        text = None if value is None else str(value)
        if text is not None:
            beyond = f"({column} {'<' if falls else '>'} {typed} OR {column} IS NULL)"
            cases.append(" AND ".join([*equal, beyond]))
            params += [*equal_params, text]
        equal.append(f"{column} IS NOT DISTINCT FROM {typed}")
        equal_params.append(text)
    return " OR ".join(f"({case})" for case in cases) or "false", params
