"""Columns of the answers to saved queries, found by asking an empty warehouse.

    columns = answer_columns()["top-heads"]    # each with name, type, unit and meaning

A meaning is that of `kdb.queries.columns`, or the one that the warehouse's tables give to the name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kdb.queries.catalogue import SavedQuery, Value, literal, load_catalogue
from kdb.queries.columns import MEANINGS, UNITS
from kdb.warehouse.connection import connect
from kdb.warehouse.schema import PARTITIONS, TABLES
from kdb.warehouse.store import Warehouse

if TYPE_CHECKING:
    import duckdb

_EXAMPLES: dict[str, Value] = {"text": "", "integer": 0}
"""A value for each type of a required parameter."""


@dataclass(frozen=True)
class AnswerColumn:
    """One column of an answer; ``meaning`` is empty if it is not declared anywhere, or differs among tables."""

    name: str
    type: str
    unit: str
    meaning: str


@cache
def answer_columns() -> dict[str, list[AnswerColumn]]:
    """Return the columns of each saved query."""
    with tempfile.TemporaryDirectory() as folder:
        Warehouse.create(folder)
        with connect(Path(folder) / "lake") as connection:
            return {name: list(_columns(connection, saved)) for name, saved in load_catalogue().items()}


def _columns(connection: duckdb.DuckDBPyConnection, saved: SavedQuery) -> Iterator[AnswerColumn]:
    for param in saved.params:
        value = _EXAMPLES[param.type] if param.required else param.default
        connection.execute(f"SET VARIABLE {param.name} = {literal(value)}")
    for name, type_, *_ in connection.execute(f"DESCRIBE {saved.sql}").fetchall():
        unit, meaning = declared(name)
        yield AnswerColumn(name, type_, unit, meaning)


def declared(name: str) -> tuple[str, str]:
    """Return unit and meaning of a column of an answer; each is empty if it is unknown, or differs among tables."""
    stored = [column for table in TABLES.values() for column in table.columns if column.name == name]
    comments = {str(column.comment) for column in stored} | ({PARTITIONS[name]} if name in PARTITIONS else set())
    meaning = MEANINGS.get(name) or (comments.pop() if len(comments) == 1 else "")
    units = {column.info["unit"] for column in stored}
    if name.endswith("percent") and not name.startswith("accuracy_at"):
        return "%", meaning
    return UNITS.get(name) or (units.pop() if len(units) == 1 else ""), meaning
