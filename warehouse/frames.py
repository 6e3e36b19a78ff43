"""Conversion of DuckDB's Arrow answers to Polars, with a check for columns that Polars cannot hold.

Polars panics on some of them, which `except Exception` does not catch. Therefore types are checked first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl
import pyarrow as pa

from kdb.errors import QueryError


def to_frame(rows: pa.Table) -> pl.DataFrame:
    """Return the rows as a Polars frame. Raises QueryError naming the column whose type Polars cannot hold.

    Columns of the same name are numbered, as in ``a`` and ``a_1``.
    """
    check_types(rows.schema)
    try:
        return pl.DataFrame(rows.rename_columns(unique(rows.schema.names)))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise QueryError(f"Polars cannot read a column of the answer; {CAST}: {first_line(error)}") from error


def check_types(schema: pa.Schema) -> None:
    """Raise QueryError naming the column whose type Polars cannot hold."""
    for field in schema:
        for kind in _kinds(field.type):
            if lacking := _lacking(kind):
                raise QueryError(f"column {field.name}: {lacking} cannot be read into Polars; {CAST}")


CAST = "cast it, such as CAST(… AS VARCHAR)"


def unique(names: Sequence[str]) -> list[str]:
    """Return the names, with a number added to repeated ones."""
    taken: list[str] = []
    for name in names:
        number, free = 0, name
        while free in taken:
            number += 1
            free = f"{name}_{number}"
        taken.append(free)
    return taken


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().partition("\n")[0]


def _kinds(kind: pa.DataType) -> Iterator[pa.DataType]:
    """Yield the type, and every type nested in it."""
    yield kind
    for index in range(kind.num_fields):
        yield from _kinds(kind.field(index).type)


def _lacking(kind: pa.DataType) -> str | None:
    """Return the SQL name of a type that Polars lacks; None for any other type."""
    if pa.types.is_interval(kind):
        return "INTERVAL"
    if pa.types.is_union(kind):
        return "UNION"
    if pa.types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        return "STRUCT with repeated or empty field names" if len(set(names)) < len(names) else None
    return None
