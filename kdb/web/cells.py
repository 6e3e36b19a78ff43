"""The rows of a page, as values for a template."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from kdb.errors import QueryError
from kdb.formats import read
from kdb.warehouse.frames import CAST, first_line


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
