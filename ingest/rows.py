"""Rows that a stage yields, built from dictionaries or arrays with the schema of their table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from kdb.warehouse.schema import arrow_schema


@dataclass(frozen=True)
class Rows:
    """Rows of one table; each Arrow table becomes a row group. ``seconds`` is the time that measuring them took."""

    table: str
    groups: list[pa.Table]
    seconds: float = 0.0


def timed(table: str, groups: list[pa.Table], begun: float) -> Rows:
    """Build rows whose measurement began at ``begun``, by the monotonic clock."""
    return Rows(table, groups, time.monotonic() - begun)


def rows_of(table: str, rows: Sequence[Mapping[str, Any]], begun: float | None = None) -> Rows:
    """Build rows from dictionaries, with the time since ``begun`` if it is given; absent columns are NULL."""
    _check_columns(table, {column for row in rows for column in row})
    groups = [pa.Table.from_pylist(list(rows), schema=arrow_schema(table))]
    return Rows(table, groups) if begun is None else timed(table, groups, begun)


def arrow_rows(table: str, columns: dict[str, Any]) -> pa.Table:
    """Build rows of a table from arrays of one shape, or of shapes that broadcast; absent columns are NULL.

    So are the masked entries of a NumPy array that has the shape of the whole.
    """
    _check_columns(table, set(columns))
    arrays = {k: np.asanyarray(v.cpu() if hasattr(v, "cpu") else v) for k, v in columns.items() if v is not None}
    shape = np.broadcast_shapes(*(a.shape for a in arrays.values()))
    n = int(np.prod(shape))
    schema = arrow_schema(table)
    return pa.table(
        [
            pa.array(_filling(arrays[f.name], shape).ravel()).cast(f.type) if f.name in arrays else pa.nulls(n, f.type)
            for f in schema
        ],
        schema=schema,
    )


def _filling(array: Any, shape: tuple[int, ...]) -> Any:
    return array if array.shape == shape else np.broadcast_to(array, shape)


def _check_columns(table: str, names: set[str]) -> None:
    """Raise AssertionError for a name that is no column: it would be dropped, and the column left NULL."""
    unknown = names - set(arrow_schema(table).names)
    if unknown:
        raise AssertionError(f"{table} has no column {', '.join(sorted(unknown))}")
