"""Rows of a page: the values of a reader, and the text, meaning and shade of a cell."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

import pyarrow as pa

from kdb.errors import QueryError
from kdb.formats import read
from kdb.numbers import is_symmetric, shown, with_interval
from kdb.warehouse.answer_columns import declared
from kdb.warehouse.frames import CAST, first_line
from kdb.warehouse.schema import PARTITIONS, TABLES

_SHORT_LIST = 4
"""Entries of a list that a cell shows; of a longer list of numbers it shows the count only."""

_SHADES = 10
"""Number of shades of a cell, in the style sheet."""


def rows_of_page(reader: pa.RecordBatchReader, first: int, count: int) -> tuple[list[str], list[tuple[Any, ...]], bool]:
    """Return the column names, ``count`` rows starting at ``first``, and whether more follow. Reads no further."""

    def rows() -> Iterator[tuple[Any, ...]]:
        for batch in read(reader):
            yield from zip(*map(_cells, reader.schema.names, batch.columns), strict=True)

    wanted = list(islice(rows(), first, first + count + 1))
    return list(reader.schema.names), wanted[:count], len(wanted) > count


def _cells(name: str, column: pa.Array) -> list[Any]:
    try:
        cells: list[Any] = column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:  # for example a date outside Python's range
        raise QueryError(f"column {name}: {column.type} cannot be shown; {CAST}: {first_line(error)}") from error
    return cells


# Text ------------------------------------------------------------------------------------------------------------


def cell(value: Any, name: str = "", row: Mapping[str, Any] | None = None) -> str:
    """Return a value of the column ``name`` as text: numbers with digits that mean something, and their interval."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, list | tuple):
        return _list(value, name)
    if isinstance(value, dict):
        return json.dumps(value, default=str, ensure_ascii=False)
    return _number(value, name, row or {}) if isinstance(value, float) else str(value)


def _number(value: float, name: str, row: Mapping[str, Any]) -> str:
    name = "logp" if name.startswith("effect (") else name
    n = next((row[key] for key in ("n_test", "n_prompts", "n") if isinstance(row.get(key), int)), None)
    for low, high in _ends(name):
        least, most = row.get(low), row.get(high)
        if isinstance(least, float) and isinstance(most, float):
            return with_interval(name, value, least, most, n, symmetric=is_symmetric(value, least, most))
    return shown(name, value, n)


def _ends(name: str) -> list[tuple[str, str]]:
    """Return the names that the ends of a number's interval may have."""
    return [(f"{name}_low", f"{name}_high")] + ([("low", "high")] if name in _HAS_PLAIN_ENDS else [])


_HAS_PLAIN_ENDS = ("score", "logp", "first_percent", "share", "effect", "mean")
"""Columns whose interval is named ``low`` and ``high``."""


def without_ends(names: Sequence[str]) -> list[str]:
    """Return the columns without the ends of intervals, which stand beside their number."""
    beside = {end for name in names for pair in _ends(name) if set(pair) <= set(names) for end in pair}
    return [name for name in names if name not in beside]


def _list(values: Sequence[Any], name: str) -> str:
    if len(values) <= _SHORT_LIST or not all(isinstance(one, int | float) for one in values):
        return f"[{', '.join(cell(one, name) for one in values[:20])}{', …' * (len(values) > 20)}]"
    return f"[{len(values):,} {'floats' if isinstance(values[0], float) else 'integers'}]"


@functools.cache
def meaning(column: str, table_name: str | None = None) -> str:
    """Return the meaning and unit of a column of a table, or of an answer; empty if it is unknown."""
    if column in PARTITIONS:
        return PARTITIONS[column]
    if table_name is None:
        unit, about = declared(column)
    else:
        found = TABLES[table_name].columns.get(column)
        unit, about = ("", "") if found is None else (found.info["unit"], str(found.comment))
    return f"{about} ({unit})" if about and unit else about


def shade(value: float | None, most: float) -> str:
    """Return the class of a cell's colour: blue for positive numbers, orange for negative, stronger up to ``most``."""
    if not value or not most:
        return "s0"
    strength = min(_SHADES, max(1, round(_SHADES * abs(value) / most)))
    return f"{'s' if value > 0 else 'm'}{strength}"
