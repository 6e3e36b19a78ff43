"""Rows as JSON, CSV, Arrow or Parquet, written as they are read: only one batch is in memory.

for chunk in encode(reader, "csv"):
    file.write(chunk)
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from kdb.errors import QueryError
from kdb.warehouse.frames import CAST, check_types, first_line, to_frame, unique
from kdb.warehouse.statements import reported

MEDIA_TYPES = {
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "arrow": "application/vnd.apache.arrow.stream",
    "parquet": "application/vnd.apache.parquet",
}
"""Each format's media type. JSON is one array with an object for each row."""


def encode(reader: pa.RecordBatchReader, format_: str) -> Iterator[bytes]:
    """Yield the rows in a format of MEDIA_TYPES, in chunks.

    Columns of the same name are numbered, as in ``a`` and ``a_1``. Raises QueryError where a row cannot be computed or
    written.
    """
    names = unique(reader.schema.names)
    schema = pa.schema(field.with_name(name) for field, name in zip(reader.schema, names, strict=True))
    batches = (pa.RecordBatch.from_arrays(batch.columns, schema=schema) for batch in read(reader))
    return _ENCODERS[format_](schema, (part for batch in batches for part in _parts(batch)))


def read(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an answer. Raises QueryError where one cannot be computed."""
    with reported():
        yield from reader


def as_text(frame: pl.DataFrame, format_: str, write: Callable[[pl.DataFrame], str]) -> str:
    """Return the frame as text, made by `write`. Raises QueryError naming a column that it cannot write."""
    for name in frame.columns:
        if lacking := _lacking(frame[name], format_):
            raise _unwritable(name, lacking, format_)
    try:
        return write(frame)
    except _FAILURES as error:
        for name, kind in frame.schema.items():
            if not _can(write, frame.select(name)):
                raise _unwritable(name, str(kind), format_) from error
        raise QueryError(f"The answer cannot be written as {format_}: {first_line(error)}") from error


def to_csv(frame: pl.DataFrame, *, header: bool = True) -> str:
    """Return the frame as CSV, with lists and structures as JSON text. Raises QueryError as `as_text` does."""
    return as_text(frame, "csv", lambda rows: _flat(rows).write_csv(include_header=header))


def to_json(frame: pl.DataFrame) -> str:
    """Return the frame as JSON, an array of objects. Raises QueryError as `as_text` does."""
    return as_text(frame, "json", lambda rows: rows.write_json())


def to_xlsx(frame: pl.DataFrame) -> bytes:
    """Return the frame as an Excel workbook, with lists and structures as JSON text. Numbers keep all their digits.

    Raises QueryError for more rows or longer texts than a sheet holds, and as `as_text` does.
    """
    import xlsxwriter  # noqa: F401  # without it, Polars would not name the extra of kdb that brings it

    if len(frame) > _SHEET_ROWS:
        many = f"{len(frame):,} rows; a sheet of Excel holds {_SHEET_ROWS:,}"
        raise QueryError(f"The answer has {many}. Write a .csv or .parquet file, or limit the rows.")
    content = io.BytesIO()
    as_text(frame, "xlsx", lambda rows: _write_sheet(_flat(rows), content))
    return content.getvalue()


def _write_sheet(frame: pl.DataFrame, content: io.BytesIO) -> str:
    for name, column in frame.select(pl.col(pl.String).str.len_chars().max()).to_dict(as_series=False).items():
        if (column[0] or 0) > _CELL_CHARACTERS:
            raise _unwritable(name, f"a text of {column[0]:,} characters", "xlsx")
    as_they_are: dict[Any, str] = {kind: "General" for kind in frame.dtypes if kind.is_numeric()}
    frame.write_excel(content, dtype_formats=as_they_are, autofit=True)
    return ""


_CELL_CHARACTERS = 32_767
"""Characters of a cell of Excel, which would cut longer texts."""
_SHEET_ROWS = 2**20 - 1
"""Rows of an Excel sheet below its heading."""

_FAILURES = (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, ValueError, OverflowError)
"""Errors that Polars raises for a value or a type that it cannot write."""

_DAYS = 95_000_000
"""Days before or after 1970 that Polars can write: 260,000 years. DuckDB's range is wider and includes infinity."""
_SECOND = {"ms": 10**3, "us": 10**6}


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
    as_json = [
        pl.Series(name, [None if v is None else json.dumps(v, default=str) for v in frame[name].to_list()], pl.String)
        for name in nested
    ]
    return frame.with_columns(as_json)


def _lacking(column: pl.Series, format_: str) -> str | None:
    """Return the SQL name of a type in the column that the format cannot represent; None if there is none."""
    for kind in _kinds(column.dtype):
        if isinstance(kind, pl.Binary | pl.Object) or kind.is_extension():
            return "BLOB"
        if isinstance(kind, pl.Duration):
            return "INTERVAL"
        if format_ == "json" and isinstance(kind, pl.Map) and not isinstance(kind.key, pl.String):
            return "a MAP whose keys are not text"
    return None if _is_in_calendar(column) else "a date out of range"


def _kinds(kind: pl.DataType) -> Iterator[pl.DataType]:
    """Yield the type, and every type nested in it."""
    yield kind
    for inner in _within(kind):
        yield from _kinds(inner)


def _within(kind: Any) -> list[Any]:
    if isinstance(kind, pl.List | pl.Array):
        return [kind.inner]
    if isinstance(kind, pl.Struct):
        return [field.dtype for field in kind.fields]
    return [kind.key, kind.value] if isinstance(kind, pl.Map) else []


def _is_in_calendar(column: pl.Series) -> bool:
    kind = column.dtype
    if not isinstance(kind, pl.Date | pl.Datetime) or (isinstance(kind, pl.Datetime) and kind.time_unit == "ns"):
        return True  # the range of nanoseconds is smaller
    unit = 1 if isinstance(kind, pl.Date) else 86400 * _SECOND[kind.time_unit]
    numbers = column.to_physical()
    return bool(numbers.is_between(-_DAYS * unit, _DAYS * unit).all())


def _can(write: Callable[[pl.DataFrame], str], frame: pl.DataFrame) -> bool:
    try:
        write(frame)
    except _FAILURES:
        return False
    return True


def _unwritable(name: str, kind: str, format_: str) -> QueryError:
    return QueryError(f"column {name}: {kind} cannot be written as {format_}; {CAST}")


_PART = 2**22
"""Bytes of a batch to write at a time: 20,000 rows with vectors would be hundreds of megabytes of text."""


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    rows = max(1, batch.num_rows * _PART // max(batch.nbytes, 1))
    for first in range(0, batch.num_rows, rows):
        yield batch.slice(first, rows)


def _json(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    opening = "["
    to_json(_empty(schema))  # refuse a type that cannot be written before the answer begins
    for batch in batches:
        # Without its brackets, so that batches join to one array.
        yield (opening + to_json(_frame(batch))[1:-1]).encode()
        opening = ",\n"
    yield b"[]" if opening == "[" else b"]"


def _csv(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    yield to_csv(_empty(schema)).encode()
    for batch in batches:
        yield to_csv(_frame(batch), header=False).encode()


def _empty(schema: pa.Schema) -> pl.DataFrame:
    check_types(schema)  # first: Arrow makes no empty column of some types either
    return _frame(schema.empty_table())


def _frame(rows: pa.RecordBatch | pa.Table) -> pl.DataFrame:
    """Return a Polars frame. Decimals, such as a sum of integers, become integers if they are whole, else floats."""
    frame = to_frame(pa.table(rows) if isinstance(rows, pa.RecordBatch) else rows)
    decimals = {name: kind for name, kind in frame.schema.items() if isinstance(kind, pl.Decimal)}
    try:
        return frame.with_columns(
            pl.col(name).cast(pl.Float64 if kind.scale else pl.Int64) for name, kind in decimals.items()
        )
    except pl.exceptions.InvalidOperationError:  # an integer beyond 64 bits
        return frame.with_columns(pl.col(name).cast(pl.Float64) for name in decimals)


class _Drain(io.RawIOBase):
    """A file-like buffer that is emptied while it is written."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]  # of bytes alone
        self._parts.append(bytes(data))
        self._written += len(self._parts[-1])
        return len(self._parts[-1])

    def tell(self) -> int:
        return self._written

    def take(self) -> bytes:
        """Return the bytes written since the last call."""
        taken, self._parts = b"".join(self._parts), []
        return taken


def _arrow(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    drain = _Drain()
    with pa.ipc.new_stream(drain, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            yield drain.take()
    yield drain.take()


_ROW_GROUP = 100_000
_ROW_GROUP_BYTES = 2**26


def _parquet(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    drain = _Drain()
    try:
        writer = pq.ParquetWriter(drain, schema, compression="zstd")
    except pa.ArrowException as error:
        raise QueryError(f"A column of the answer cannot be written as parquet; {CAST}: {first_line(error)}") from error
    with writer:
        waiting: list[pa.RecordBatch] = []
        for batch in batches:
            waiting.append(batch)
            if sum(map(len, waiting)) >= _ROW_GROUP or sum(part.nbytes for part in waiting) >= _ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(waiting, schema))
                waiting = []
                yield drain.take()
        writer.write_table(pa.Table.from_batches(waiting, schema))
    yield drain.take()


_ENCODERS: dict[str, Callable[[pa.Schema, Iterator[pa.RecordBatch]], Iterator[bytes]]] = {
    "json": _json,
    "csv": _csv,
    "arrow": _arrow,
    "parquet": _parquet,
}
