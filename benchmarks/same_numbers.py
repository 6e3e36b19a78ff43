"""Compare two warehouses cell by cell: whether a change of kdb changed a number.

    python benchmarks/same_numbers.py OLD NEW

Both hold the same runs, measured before and after the change. Every table of every run must have the same rows: texts,
integers and ranks equal, floats equal to the last bit. Rows are compared in the order of their other columns, since the
order in which parts are written is no result. Left out is what says when, where and by which version a run was made.
Prints a line for each table that differs, with the largest difference, and exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import polars.selectors as cs

import kdb
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.schema import TABLES

CIRCUMSTANCES = (
    *("kdb_version", "torch_version", "transformers_version", "device", "started_at", "finished_at", "seconds"),
    *("imported_from", "imported_at", "preferred"),
)
"""Columns of ``runs`` that are no result."""


def runs(warehouse: Path) -> dict[str, Path]:
    """The folder of each committed run, by its id."""
    kdb.open(warehouse)  # says what is wrong with a folder that is no warehouse
    return {folder.run: folder.path for folder in FolderStorage(warehouse).run_folders()}


def rows(run: Path, table: str) -> pl.DataFrame | None:
    """The rows of a table of one run, in the order of all columns that are no floats; None if it has no such table."""
    files = sorted((run / table).glob("*.parquet"))
    if not files:
        return None
    frame = pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in files], how="diagonal")
    frame = frame.drop(CIRCUMSTANCES, strict=False).select(sorted(frame.drop(CIRCUMSTANCES, strict=False).columns))
    keys = frame.select(~cs.float() & ~cs.nested()).columns
    return frame.sort(keys, nulls_last=True, maintain_order=True) if keys else frame


def differences(old: pl.DataFrame | None, new: pl.DataFrame | None) -> Iterator[str]:
    """Describe what differs, a line for each column."""
    if old is None or new is None:
        if old is not new:
            yield "there before, not after" if new is None else "not there before, there after"
        return
    if old.schema != new.schema:
        yield f"columns {dict(set(old.schema.items()) ^ set(new.schema.items()))}"
    if len(old) != len(new):
        yield f"{len(old):,} rows before, {len(new):,} after"
        return
    for name in [column for column in old.columns if column in new.columns]:
        a, b = old[name], new[name]
        if a.dtype == pl.Array or a.dtype == pl.List:
            a, b = a.explode(empty_as_null=False), b.explode(empty_as_null=False)
        equal = a.eq_missing(b)
        if not equal.all():
            yield f"{name}: {(~equal).sum():,} of {len(a):,} differ{_largest(a, b)}"


def _largest(a: pl.Series, b: pl.Series) -> str:
    if not a.dtype.is_float():
        at = int((~a.eq_missing(b)).arg_max() or 0)
        return f", such as {a[at]!r} and {b[at]!r}"
    return f", by {(a - b).abs().max():.3g} at most; the largest value is {a.abs().max():.3g}"


def main() -> None:
    """Print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    old, new = runs(options.old), runs(options.new)
    found = [
        f"run {run}: only in {options.old if run in old else options.new}" for run in sorted(old.keys() ^ new.keys())
    ]
    n_cells = 0
    for run in sorted(old.keys() & new.keys()):
        for table in TABLES:
            before, after = rows(old[run], table), rows(new[run], table)
            n_cells += 0 if before is None else before.height * before.width
            found += [f"run {run}, {table}: {line}" for line in differences(before, after)]
    for line in found:
        print(line)
    verdict = f"{len(found)} differences" if found else "equal"
    print(f"{len(old.keys() & new.keys())} runs, {n_cells:,} cells: {verdict}")
    sys.exit(bool(found) or not old)


if __name__ == "__main__":
    main()
