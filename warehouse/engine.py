"""The SQLAlchemy engine of a warehouse, which adds to duckdb-engine what pandas and reflection need.

    pandas.read_sql_table("runs", kdb.open("kdb-warehouse").engine())

DuckDB converts times with a time zone by pytz, which kdb does not require; here they are converted by Arrow. A
warehouse has only views, so there are no keys, indexes and constraints, which SQLAlchemy would look up in PostgreSQL's
catalog.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import duckdb_engine
import pyarrow as pa
from sqlalchemy import Engine, create_engine
from sqlalchemy.dialects import registry
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.pool import NullPool
from sqlalchemy.types import NullType

_BATCH = 20_000


def open_engine(opened: Callable[[], duckdb.DuckDBPyConnection], check: Callable[[Any, str], object]) -> Engine:
    """Return an engine with a separate DuckDB for each connection; `check` raises for a statement it must not run."""
    registry.register("kdb", __name__, "Dialect")
    return create_engine("kdb://", creator=lambda: _Connection(opened(), check), poolclass=NullPool)


class _Connection(duckdb_engine.ConnectionWrapper):
    def __init__(self, opened: duckdb.DuckDBPyConnection, check: Callable[[Any, str], object]) -> None:
        super().__init__(opened)
        self._opened, self._check = opened, check

    def cursor(self) -> _Cursor:
        return _Cursor(self._opened, self, self._check)


class _Cursor(duckdb_engine.CursorWrapper):
    """A cursor that reads times with a time zone through Arrow, as Python datetimes in UTC."""

    def __init__(self, opened: Any, connection: _Connection, check: Callable[[Any, str], object]) -> None:
        super().__init__(opened, connection)
        self._opened, self._check = opened, check
        self._rows: Iterator[tuple[Any, ...]] | None = None
        self._columns: Any = None

    def execute(self, statement: str, parameters: Any = None, context: Any = None) -> None:
        self._check(self._opened, statement)
        super().execute(statement, parameters, context)
        self._rows, self._columns = None, self._opened.description
        if any("TIME ZONE" in str(column[1]) for column in self._columns or ()):
            self._rows = _rows(self._opened.to_arrow_reader(_BATCH))

    def executemany(self, statement: str, parameters: Any = None, context: Any = None) -> None:
        self._check(self._opened, statement)
        super().executemany(statement, parameters, context)

    @property
    def description(self) -> Any:
        return self._columns

    def fetchone(self) -> Any:
        return self._opened.fetchone() if self._rows is None else next(self._rows, None)

    def fetchmany(self, size: int | None = None) -> list[Any]:
        if self._rows is None:
            many: list[Any] = super().fetchmany(size)
            return many
        return list(itertools.islice(self._rows, size or 1))

    def fetchall(self) -> list[Any]:
        return list(self._opened.fetchall() if self._rows is None else self._rows)


def _rows(reader: pa.RecordBatchReader) -> Iterator[tuple[Any, ...]]:
    for batch in reader:
        yield from zip(*map(_values, batch.columns), strict=True)


def _values(column: pa.Array) -> list[Any]:
    values: list[Any] = column.to_pylist()
    whole = pa.types.is_decimal(column.type) and column.type.scale == 0  # DuckDB returns HUGEINT as this type
    return [None if value is None else int(value) for value in values] if whole else values


def _nothing(answer: Any) -> Callable[..., Any]:
    """Return a method of reflection with the same result for every view."""
    return lambda *_, **__: answer()


class Dialect(duckdb_engine.Dialect):
    """DuckDB's dialect, in which every reflected object is a view."""

    name = "duckdb"
    supports_statement_cache = False  # as in the base class; SQLAlchemy requires it here
    supports_comments = False
    ischema_names = {**duckdb_engine.Dialect.ischema_names, "list": NullType}  # noqa: RUF012  # avoids a warning

    get_pk_constraint = _nothing(lambda: {"constrained_columns": [], "name": None})
    get_foreign_keys = _nothing(list)
    get_unique_constraints = _nothing(list)
    get_check_constraints = _nothing(list)
    get_indexes = _nothing(list)
    get_table_comment = _nothing(lambda: {"text": None})

    # PostgreSQL's methods query its catalog for all tables at once; these call the methods above for each table.
    get_multi_pk_constraint = DefaultDialect.get_multi_pk_constraint  # type: ignore[assignment]  # SQLAlchemy's own, for all six
    get_multi_foreign_keys = DefaultDialect.get_multi_foreign_keys  # type: ignore[assignment]
    get_multi_unique_constraints = DefaultDialect.get_multi_unique_constraints  # type: ignore[assignment]
    get_multi_check_constraints = DefaultDialect.get_multi_check_constraints  # type: ignore[assignment]
    get_multi_indexes = DefaultDialect.get_multi_indexes  # type: ignore[assignment]
    get_multi_table_comment = DefaultDialect.get_multi_table_comment  # type: ignore[assignment]
