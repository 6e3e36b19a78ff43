"""Tables as Polars LazyFrames, which read the Parquet files of a lake without DuckDB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from kdb.warehouse.run_folders import PLACEHOLDER
from kdb.warehouse.schema import OLDER_ROWS, PARTITIONS, TABLES, Vector, arrow_schema


def scan(lake: Path, table: str, runs: Sequence[str] | None = None) -> pl.LazyFrame:
    """Return a table as a Polars LazyFrame with the view's columns; only the rows of `runs`, if given.

    Vectors are lists of Float32, whatever their length and storage format.
    """
    columns = TABLES[table].columns
    vectors = [pl.col(c.name).cast(pl.List(pl.Float32)) for c in columns if isinstance(c.type, Vector)]
    typed = pl.DataFrame(arrow_schema(table).empty_table()).with_columns(vectors).lazy()
    folders = [
        folder
        for folder in sorted(lake.glob(f"model=*/dataset=*/run=*/{table}"))
        if runs is None or folder.parent.name.removeprefix("run=") in {*runs, PLACEHOLDER}
    ]
    # One scan per run, because Polars reads fixed-size vectors as arrays, whose lengths differ between models.
    frames = [_scan_files(sorted(folder.glob("*.parquet"))).with_columns(vectors) for folder in folders]
    # Columns missing in an older schema are NULL.
    rows = pl.concat([*frames, typed], how="diagonal").select(*PARTITIONS, *columns.keys())
    return as_today(table, rows)


def as_today(table: str, rows: pl.LazyFrame) -> pl.LazyFrame:
    """Return the rows of a table, those of an older schema with the names of today."""
    return rows.with_columns(pl.sql_expr(sql).alias(name) for name, sql in OLDER_ROWS.get(table, {}).items())


def _scan_files(files: list[Path]) -> pl.LazyFrame:
    # Without glob=False, Polars would take [ in a folder's name for a pattern.
    return pl.scan_parquet(files, glob=False, hive_partitioning=True, hive_schema=dict.fromkeys(PARTITIONS, pl.String))
