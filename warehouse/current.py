"""Schema `current`: a view of every table with the rows that a query usually needs.

    SELECT layer, accuracy FROM current.probe_scores WHERE model = 'smollm2-135m' AND dataset = 'world-cities'

These are the rows of the newest run, variant 'default', of each study, model and dataset, which `current_runs` in
``queries/macros.sql`` chooses. Of probes, only the default classifier and split are shown. The tables themselves, in
schema `main`, hold everything.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from kdb.queries.catalogue import literal
from kdb.warehouse.files import appears_whole
from kdb.warehouse.paging import column_types
from kdb.warehouse.schema import PARTITIONS, TABLES

SCHEMA = "current"


def stubs() -> list[str]:
    """Return the SQL of schema `current`, and of empty stubs of the tables that its views read.

    Creating a view reads its files, so the views are created over stubs, which the real tables then replace.
    """
    columns = {table: column_types(table) for table in TABLES}
    columns["current_runs"] = dict.fromkeys(("table_name", "variant", *PARTITIONS), "VARCHAR")
    made = [f"CREATE VIEW {name} AS SELECT {_typed(types)} WHERE false" for name, types in columns.items()]
    return [*made, f"CREATE SCHEMA {SCHEMA}", *map(_view, TABLES), "DROP VIEW current_runs"]


def default_rows(table: str) -> pl.Expr:
    """Return the condition for rows of the default probe or split; true if the table has none."""
    return pl.col("is_default") if _has_default(table) else pl.lit(value=True)


class KnownRuns:
    """The data that decide which runs are current, stored in a table of a connection whose runs never change.

    Without the table, a query would read them several times. For a query about some models, only theirs are read.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, remembered: Remembered | None = None) -> None:
        self._connection, self._remembered = connection, remembered
        # Models whose runs are in the table; None means all.
        self._models: frozenset[str] | None = None if remembered and remembered.is_known else frozenset()

    def keep(self, models: Collection[str] | None = None) -> None:
        """Read the runs of these models, or of all, unless they were already read."""
        if self._models is None or (models is not None and self._models.issuperset(models)):
            return
        wanted = frozenset(models) if models is not None and not self._models else None
        only = "" if wanted is None else f" WHERE model IN ({', '.join(map(literal, sorted(wanted)))})"
        self._connection.execute(f"CREATE OR REPLACE TABLE kept_runs AS FROM _known_runs{only}; {KEPT}")
        self._models = wanted
        if wanted is None and self._remembered:
            self._remembered.write(self._connection.execute("FROM kept_runs").to_arrow_table())


KEPT = "CREATE OR REPLACE VIEW known_runs AS FROM kept_runs"


@dataclass(frozen=True)
class Remembered:
    """The data that decide which runs are current, cached in a Parquet file of the user's cache.

    ``key`` changes when a run is added, removed or rewritten; a file written under another key is not read.
    """

    path: Path
    key: str

    @functools.cached_property
    def is_known(self) -> bool:
        """Whether the file holds these runs."""
        try:
            return (pq.read_schema(self.path).metadata or {}).get(b"kdb_runs") == self.key.encode()
        except (OSError, pa.ArrowException):
            return False

    @property
    def statement(self) -> str:
        """Return the SQL that loads the cached runs in a connection that may still read every file."""
        return f"CREATE TABLE kept_runs AS FROM read_parquet({literal(str(self.path))}); {KEPT}"

    def write(self, rows: pa.Table) -> None:
        """Cache the rows. If the cache cannot be written, they are read again next time."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with appears_whole(self.path) as partial:
                pq.write_table(rows.replace_schema_metadata({"kdb_runs": self.key}), partial)


def _typed(columns: Mapping[str, str]) -> str:
    return ", ".join(f'NULL::{kind} AS "{name}"' for name, kind in columns.items())


def _view(table: str) -> str:
    chosen = f"FROM main.current_runs WHERE table_name = '{table}' AND variant = 'default'"
    rows = f"FROM main.{table} SEMI JOIN ({chosen}) USING (model, dataset, run)"
    return f"CREATE VIEW {SCHEMA}.{table} AS {rows} {_default_rows(table)}".strip()


def _default_rows(table: str) -> str:
    return "WHERE is_default" if _has_default(table) else ""


def _has_default(table: str) -> bool:
    return "is_default" in TABLES[table].columns
