"""Rows as JSON, CSV, Arrow or Parquet, written as they are read: what is in memory is one batch.

for chunk in encode(reader, "csv"):
    file.write(chunk)
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from kdb.errors import QueryError

MEDIA_TYPES = {
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "arrow": "application/vnd.apache.arrow.stream",
    "parquet": "application/vnd.apache.parquet",
}
"""Each format's media type. JSON is one array of objects, a row each."""

_NOT_TEXT = ("Binary", "Duration", "Object")


def encode(reader: pa.RecordBatchReader, format_: str) -> Iterator[bytes]:
    """The rows in a format of MEDIA_TYPES, in chunks. Raises QueryError where a row cannot be computed or written.

    Columns of one name are told apart by a number, as in ``a`` and ``a_1``.
    """
    schema = pa.schema(
        field.with_name(name) for field, name in zip(reader.schema, _unique(reader.schema.names), strict=True)
    )
    batches = (pa.RecordBatch.from_arrays(batch.columns, schema=schema) for batch in _read(reader))
    return _ENCODERS[format_](schema, batches)


def flat(frame: pl.DataFrame) -> pl.DataFrame:
    """Lists and structures as JSON text, since CSV has none."""
    nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
    as_text = [
        pl.Series(name, [None if v is None else json.dumps(v, default=str) for v in frame[name].to_list()], pl.String)
        for name in nested
    ]
    return frame.with_columns(as_text)


def _unique(names: list[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        number, free = 0, name
        while free in taken:
            number += 1
            free = f"{name}_{number}"
        taken.append(free)
    return taken


def _read(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    try:
        yield from reader
    except (pa.ArrowException, OSError) as error:  # as which DuckDB's errors come through Arrow
        raise QueryError(str(error).split("\n\nLINE ")[0].strip()) from error


def _json(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    _check_text(schema)
    opening = "["
    for batch in batches:
        if batch.num_rows:
            # Without its brackets, so that batches join to one array.
            yield (opening + _frame(batch).write_json()[1:-1]).encode()
            opening = ",\n"
    yield b"[]" if opening == "[" else b"]"


def _csv(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    _check_text(schema)
    yield flat(_frame(schema.empty_table())).write_csv().encode()
    for batch in batches:
        yield flat(_frame(batch)).write_csv(include_header=False).encode()


def _check_text(schema: pa.Schema) -> None:
    for field in schema:
        if pa.types.is_interval(field.type) or any(kind in str(_polars_type(field)) for kind in _NOT_TEXT):
            raise QueryError(
                f"column {field.name}: {field.type} cannot be written as text; cast it, such as to VARCHAR"
            )


def _polars_type(field: pa.Field) -> pl.DataType:
    try:
        return pl.Series(pa.array([], field.type)).dtype
    except (pl.exceptions.PolarsError, ValueError, TypeError) as error:
        raise QueryError(f"column {field.name}: {field.type} cannot be written as text; cast it") from error


def _frame(rows: pa.RecordBatch | pa.Table) -> pl.DataFrame:
    """As Polars, with decimals (a sum of integers is one) as integers where they are, and else as floats."""
    frame = pl.DataFrame(pa.table(rows) if isinstance(rows, pa.RecordBatch) else rows)
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


def _parquet(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    drain = _Drain()
    try:
        writer = pq.ParquetWriter(drain, schema, compression="zstd")
    except pa.ArrowException as error:
        raise QueryError(f"Parquet cannot hold a column's type; cast it, such as to VARCHAR: {error}") from error
    with writer:
        waiting: list[pa.RecordBatch] = []
        for batch in batches:
            waiting.append(batch)
            if sum(map(len, waiting)) >= _ROW_GROUP:
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
