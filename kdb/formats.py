"""Rows as JSON, CSV, Arrow or Parquet, written as they are read: what is in memory is one batch.

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
"""Each format's media type. JSON is one array of objects, a row each."""


def encode(reader: pa.RecordBatchReader, format_: str) -> Iterator[bytes]:
    """The rows in a format of MEDIA_TYPES, in chunks. Raises QueryError where a row cannot be computed or written.

    Columns of one name are told apart by a number, as in ``a`` and ``a_1``.
    """
    names = unique(reader.schema.names)
    schema = pa.schema(field.with_name(name) for field, name in zip(reader.schema, names, strict=True))
    batches = (pa.RecordBatch.from_arrays(batch.columns, schema=schema) for batch in read(reader))
    return _ENCODERS[format_](schema, (part for batch in batches for part in _parts(batch)))


def read(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """The batches of an answer. Raises QueryError where one cannot be computed."""
    with reported():
        yield from reader


def as_text(frame: pl.DataFrame, format_: str, write: Callable[[pl.DataFrame], str]) -> str:
    """The frame as `write` puts it. Raises QueryError naming the column that it cannot."""
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
    """CSV; lists and structures as JSON text, since CSV has none. Raises QueryError as `as_text` does."""
    return as_text(frame, "csv", lambda rows: _flat(rows).write_csv(include_header=header))


def to_json(frame: pl.DataFrame) -> str:
    """JSON: an array of objects. Raises QueryError as `as_text` does."""
    return as_text(frame, "json", lambda rows: rows.write_json())


_FAILURES = (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, ValueError, OverflowError)
"""Errors of Polars for a value or a type that it cannot write."""

_DAYS = 95_000_000
"""Days around 1970 that Polars can write: 260,000 years. DuckDB has more, and infinity."""
_SECOND = {"ms": 10**3, "us": 10**6}


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
    as_json = [
        pl.Series(name, [None if v is None else json.dumps(v, default=str) for v in frame[name].to_list()], pl.String)
        for name in nested
    ]
    return frame.with_columns(as_json)


def _lacking(column: pl.Series, format_: str) -> str | None:
    """How SQL calls what the column holds, where the format has no text for it."""
    for kind in _kinds(column.dtype):
        if isinstance(kind, pl.Binary | pl.Object) or kind.is_extension():
            return "BLOB"
        if isinstance(kind, pl.Duration):
            return "INTERVAL"
        if format_ == "json" and isinstance(kind, pl.Map) and not isinstance(kind.key, pl.String):
            return "MAP whose keys are no text"
    return None if _is_in_calendar(column) else "a date beyond the calendar"


def _kinds(kind: pl.DataType) -> Iterator[pl.DataType]:
    """The type, and every type within it."""
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
        return True  # nanoseconds do not reach beyond
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
"""Bytes of a batch that are written at once: vectors make 20,000 rows hundreds of megabytes of text."""


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    rows = max(1, batch.num_rows * _PART // max(batch.nbytes, 1))
    for first in range(0, batch.num_rows, rows):
        yield batch.slice(first, rows)


def _json(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    opening = "["
    to_json(_empty(schema))  # a type that cannot be written is refused before the answer begins
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
    """As Polars, with decimals (a sum of integers is one) as integers where they are, and else as floats."""
    frame = to_frame(pa.table(rows) if isinstance(rows, pa.RecordBatch) else rows)
    decimals = {name: kind for name, kind in frame.schema.items() if isinstance(kind, pl.Decimal)}
    try:
        return frame.with_columns(
            pl.col(name).cast(pl.Float64 if kind.scale else pl.Int64) for name, kind in decimals.items()
        )
    except pl.exceptions.InvalidOperationError:  # an integer beyond 64 bits
        return frame.with_columns(pl.col(name).cast(pl.Float64) for name in decimals)


class _Drain(io.RawIOBase):
    """A file that is emptied as it is written."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._parts.append(bytes(data))
        self._written += len(self._parts[-1])
        return len(self._parts[-1])

    def tell(self) -> int:
        return self._written

    def take(self) -> bytes:
        """What was written since this was last asked."""
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
