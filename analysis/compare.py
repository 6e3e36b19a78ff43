"""Differences between two runs: settings, versions, and measured numbers.

Rows are matched by the key that ``warehouse/schema.py`` declares for each table, so new tables need no change here.

    moved_numbers(kdb.open("kdb-warehouse"), "1f0c9a3b5d7e2468", "a2b3c4d5e6f70819")
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import polars as pl
from sqlalchemy import Boolean, Float, Integer

from kdb.analysis.uncertainty import mcnemar
from kdb.errors import QueryError, UnknownNameError
from kdb.warehouse.schema import TABLES, has_vectors

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

_DESCRIBED = ("models", "datasets", "runs")
"""Tables with one row per run, whose columns are settings."""

_NUMBERS = (Integer, Float, Boolean)
"""Column types whose values are compared; lists, such as a probe's weights, are not."""

_TIMES = {"started_at", "finished_at", "seconds", "tables"}


def find_runs(wh: Warehouse, *named: str) -> list[str]:
    """Return the full ids of runs that are given by their ids or first digits.

    Raises UnknownNameError for a run that is not stored, QueryError if several begin with the digits.
    """
    stored = wh.sql("SELECT run FROM runs ORDER BY run")["run"].to_list()
    matches = []
    for name in named:
        runs = [run for run in stored if run.startswith(name)]
        if not runs:
            raise UnknownNameError("run", name, stored, "`kdb runs` lists them.")
        if len(runs) > 1:
            raise QueryError(f"Several runs begin with {name!r}: {', '.join(runs)}. Give more digits.")
        matches += runs
    return matches


def differing_settings(wh: Warehouse, run_a: str, run_b: str) -> pl.DataFrame:
    """Return the settings that differ between the two runs: columns setting, a, b (as text)."""
    a, b = _settings(wh, run_a), _settings(wh, run_b)
    rows = [(name, a.get(name), b.get(name)) for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]
    return pl.DataFrame(rows, schema=dict.fromkeys(("setting", "a", "b"), pl.String), orient="row")


def _settings(wh: Warehouse, run: str) -> dict[str, str]:
    """Return all settings of a run by name."""
    settings: dict[str, Any] = {}
    for table in _DESCRIBED:
        settings |= wh.sql(f"SELECT * FROM {table} WHERE run = ?", [run]).row(0, named=True)
    settings |= json.loads(settings.pop("settings") or "{}")
    return {name: str(value) for name, value in settings.items() if name not in _TIMES and value is not None}


def moved_numbers(wh: Warehouse, run_a: str, run_b: str) -> pl.DataFrame:
    """Return all measured numbers that differ between the two runs, the largest change first.

    Columns: table, key (such as 'layer=3 site=resid_post'), column, a, b, difference (b − a), and change_percent, the
    difference in percent of the largest value of the column in either run. Raises QueryError if the runs have no table
    in common.
    """
    parts = [part for table in _compared(wh, run_a, run_b) for part in _moved(wh, table, run_a, run_b)]
    schema = {"table": pl.String, "key": pl.String, "column": pl.String}
    empty = pl.DataFrame(schema=schema | dict.fromkeys(("a", "b", "difference", "change_percent"), pl.Float64))
    moved = pl.concat([empty, *parts])
    return moved.sort("change_percent", descending=True, nulls_last=True, maintain_order=True)


def compared_rows(wh: Warehouse, run_a: str, run_b: str) -> pl.DataFrame:
    """Return the number of matched and unmatched rows of each table: columns table, rows, only_a, only_b."""
    counts = [
        (table, len(rows), *(rows.select(pl.col(f"{side}_there").is_null().sum()).item() for side in "ba"))
        for table in _compared(wh, run_a, run_b)
        for rows in (_matched(wh, table, run_a, run_b),)
    ]
    return pl.DataFrame(
        [(table, n - only_a - only_b, only_a, only_b) for table, n, only_a, only_b in counts],
        schema=["table", "rows", "only_a", "only_b"],
        orient="row",
    )


def accuracy_differences(wh: Warehouse, run_a: str, run_b: str) -> pl.DataFrame:
    """Test whether the two runs' probes differ on the same test prompts, layer by layer, by McNemar's exact test.

    One row per layer, site, classifier and split that both have: accuracy_a, accuracy_b, only_a and only_b (prompts
    that only one of them predicts correctly), p_value. Empty if the runs used different texts.
    """
    if wh.sql("SELECT count(DISTINCT fingerprint) FROM datasets WHERE run IN (?, ?)", [run_a, run_b]).item() > 1:
        return pl.DataFrame()
    counts = wh.sql(
        """
        SELECT
            a.site, a.classifier, a.split, a.layer,
            avg(a.correct::INTEGER) AS accuracy_a, avg(b.correct::INTEGER) AS accuracy_b,
            count(*) FILTER (a.correct AND NOT b.correct) AS only_a,
            count(*) FILTER (b.correct AND NOT a.correct) AS only_b
        FROM probe_predictions AS a
        JOIN probe_predictions AS b USING (site, classifier, split, layer, prompt_id)
        WHERE a.run = ? AND b.run = ?
        GROUP BY ALL
        ORDER BY ALL
        """,
        [run_a, run_b],
    )
    p_values = [mcnemar(a, b) for a, b in counts.select("only_a", "only_b").iter_rows()]
    return counts.with_columns(p_value=pl.Series(p_values, dtype=pl.Float64))


def _compared(wh: Warehouse, run_a: str, run_b: str) -> list[str]:
    """Return the tables with a key in which both runs have rows, except tables of vectors."""
    shared = wh.sql("SELECT tables FROM runs WHERE run IN (?, ?)", [run_a, run_b])["tables"].to_list()
    tables = [name for name in TABLES if _measured(name) and all(name in tables for tables in shared)]
    if not tables:
        raise QueryError(f"Runs {run_a} and {run_b} have no table in common. `kdb runs` shows the study of each.")
    return tables


def _measured(table: str) -> list[str]:
    """Return the columns of a table that hold numbers and are not part of its key; none if it has no key."""
    declared = TABLES[table]
    if not declared.info["key"] or has_vectors(table):
        return []
    others = [column for column in declared.columns if column.name not in declared.info["key"]]
    return [column.name for column in others if isinstance(column.type, _NUMBERS)]


def _matched(wh: Warehouse, table: str, run_a: str, run_b: str) -> pl.DataFrame:
    """Return the rows of both runs joined by the key, with numbers as a_… and b_…; NULL if a run lacks the row."""
    key, numbers = TABLES[table].info["key"], _measured(table)
    frames = (
        wh.scan(table, everything=True)
        .filter(run=run)
        .select(*key, *(pl.col(name).cast(pl.Float64).alias(f"{side}_{name}") for name in numbers), _there(side))
        .collect()
        for side, run in (("a", run_a), ("b", run_b))
    )
    first, second = frames
    return first.join(second, on=key, how="full", coalesce=True, nulls_equal=True, maintain_order="left_right")


def _there(side: str) -> pl.Expr:
    return pl.lit(True).alias(f"{side}_there")


def _moved(wh: Warehouse, table: str, run_a: str, run_b: str) -> Iterator[pl.DataFrame]:
    rows = _matched(wh, table, run_a, run_b).filter("a_there", "b_there")
    key = TABLES[table].info["key"]
    parts = [pl.when(pl.col(name).is_not_null()).then(pl.format(f"{name}={{}}", name)) for name in key]
    for name in _measured(table):
        a, b = pl.col(f"a_{name}"), pl.col(f"b_{name}")
        largest = pl.max_horizontal(a.abs().max(), b.abs().max())
        yield (
            rows.with_columns(change_percent=100 * (b - a).abs() / largest)
            .filter(a.ne_missing(b))
            .select(
                pl.lit(table).alias("table"),
                pl.concat_str(parts, separator=" ", ignore_nulls=True).alias("key"),
                pl.lit(name).alias("column"),
                a.alias("a"),
                b.alias("b"),
                (b - a).alias("difference"),
                "change_percent",
            )
        )
