"""Runs written row by row, without a model, and the DuckDB shell that reads them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from kdb.queries.catalogue import find_query, literal
from kdb.warehouse.database import Database
from kdb.warehouse.schema import TABLES, arrow_schema
from kdb.warehouse.shell_file import write_shell_file

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)

SHELL = shutil.which("duckdb", path=str(Path(sys.executable).parent)) or shutil.which("duckdb")

needs_shell = pytest.mark.skipif(SHELL is None, reason="duckdb-cli is not installed")

Rows = Sequence[Mapping[str, Any]]


def _is_default(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"is_default": (row.get("classifier"), row.get("split")) == ("logistic", "paper")}


OF_TODAY: dict[str, Any] = {
    "probe_scores": lambda row: {"f1_paper": 0.5, **_is_default(row)},
    "probe_predictions": _is_default,
}
"""Columns that distinguish rows of probes from those of an older kdb, whose names had another meaning."""


def of_today(table: str, rows: Rows) -> Rows:
    """The rows of a table, with what rows of probes have today."""
    return [OF_TODAY[table](row) | dict(row) for row in rows] if table in OF_TODAY else rows


def write_part(folder: Path, table: pa.Table) -> None:
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "0000.parquet")


def encoded(name: str) -> str:
    """A partition value as it stands in the path. DuckDB takes the word null for no value, if unencoded."""
    return name.replace("n", "%6E", 1) if name == "null" else quote(name, safe="")


def create_lake(warehouse: Path) -> Path:
    """A lake without runs: an empty typed file for each table."""
    for name in TABLES:
        folder = warehouse / "lake/model=__none__/dataset=__none__/run=__none__" / name
        write_part(folder, arrow_schema(name).empty_table())
    return warehouse / "lake"


def add_run(lake: Path, model: str, dataset: str, run: str, **tables: Rows) -> None:
    """Commit a run with these rows. `runs` gets its row, with what `runs=[…]` says."""
    info = {"study": "concept", "variant": "default", "tables": [*tables, "runs"], "finished_at": NOON}
    tables["runs"] = [info | dict(tables.get("runs", [{}])[0])]
    for name, rows in tables.items():
        rows = of_today(name, rows)
        folder = lake / f"model={encoded(model)}/dataset={encoded(dataset)}/run={run}" / name
        write_part(folder, pa.Table.from_pylist(rows, schema=arrow_schema(name)))


def shell(file: Path, sql: str) -> list[str]:
    """The lines that the DuckDB shell prints, as CSV without header."""
    command = [str(SHELL), "-readonly", "-csv", "-noheader", str(file), sql]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()


def assert_same_in_the_shell(lake: Path, database: Database, name: str, **params: Any) -> None:
    """The shell prints what the database answers, and that is something."""
    write_shell_file(lake.parent)
    script = find_query(name).shell_script()
    for variable, value in find_query(name).bind(params).items():
        script = re.sub(rf"(?<=SET VARIABLE {variable} = )[^;]*(?=;)", lambda _, v=value: literal(v), script)
    answer = database.query(name, **params)
    assert not answer.is_empty()
    csv: dict[str, Any] = {"has_header": False, "null_values": ["", "NULL"]}  # the shell prints NULL
    printed = pl.read_csv("\n".join(shell(lake.parent / "kdb.duckdb", script)).encode(), **csv)
    expected = pl.read_csv(answer.write_csv(include_header=False).encode(), **csv)
    ordered = "ORDER BY" in script
    assert_frame_equal(printed, expected, rel_tol=1e-5, check_row_order=ordered)
