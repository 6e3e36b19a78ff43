"""Differences between two runs: settings, versions, and measured numbers.

Rows are matched by the key that ``warehouse/schema.py`` declares for each table, so new tables need no change here.
Prompts are matched by the text of the dataset, whatever template or noise it was given in.

    moved_numbers(kdb.open("kdb-warehouse"), "1f0c9a3b5d7e2468", "a2b3c4d5e6f70819")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
from sqlalchemy import Boolean, Float, Integer

from kdb.errors import QueryError
from kdb.warehouse.run_folders import run_named
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
    stored = wh.sql("SELECT run, model || ' on ' || dataset FROM runs ORDER BY run").rows()
    return [run_named(name, dict(stored)) for name in named]


# Prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matched:
    """Prompts of two runs that have the same text, label and answer.

    ``pairs`` has the columns prompt_a and prompt_b; ``only_a`` and ``only_b`` are numbers of prompts without a partner.
    """

    pairs: pl.DataFrame
    only_a: int
    only_b: int


def matched_prompts(wh: Warehouse, run_a: str, run_b: str) -> Matched:
    """Match the prompts of two runs by text; of a text that stands several times, the first with the first."""
    a, b = (wh.sql("FROM example_texts(?)", [run]) for run in (run_a, run_b))
    key = ["text", "label", "answer", "copy"]
    both = a.join(b, on=key, nulls_equal=True, suffix="_b").sort("prompt_id")
    pairs = both.select(prompt_a="prompt_id", prompt_b="prompt_id_b")
    return Matched(pairs, len(a) - len(pairs), len(b) - len(pairs))


def described(wh: Warehouse, run_a: str, run_b: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return study, model, dataset, variant and n_layers of two runs."""
    about = wh.sql("SELECT run, study, model, dataset, variant, n_layers FROM known_runs")
    a, b = (about.row(by_predicate=pl.col("run") == run, named=True) for run in (run_a, run_b))
    return a, b


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any], matched: Matched) -> None:
    """Raise QueryError if two runs, as ``described``, are of different studies, or concept runs of different datasets.

    Two concept runs are of one dataset if at least half of the texts of the smaller one are in the other. The names of
    the datasets decide nothing: one file may be stored under two names, and two files under one.
    """
    if a["study"] != b["study"]:
        raise QueryError(
            f"Run {a['run']} is of the {a['study']} study, run {b['run']} of the {b['study']} study. {_ANOTHER}"
        )
    n, fewer = len(matched.pairs), len(matched.pairs) + min(matched.only_a, matched.only_b)
    if a["study"] == "concept" and 2 * n < max(fewer, 1):
        raise QueryError(
            f"Runs {a['run']} ({a['dataset']}) and {b['run']} ({b['dataset']}) are of two different datasets: they "
            f"share {n:,} of {fewer:,} texts. {_ANOTHER}"
        )


_ANOTHER = "Choose two runs of one study and dataset; `kdb runs` lists them."


# Settings and numbers --------------------------------------------------------------------------------------------


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
    tables, pairs = _compared(wh, run_a, run_b), matched_prompts(wh, run_a, run_b).pairs
    parts = [part for table in tables for part in _moved(table, _matched(wh, table, run_a, run_b, pairs))]
    schema = {"table": pl.String, "key": pl.String, "column": pl.String}
    empty = pl.DataFrame(schema=schema | dict.fromkeys(("a", "b", "difference", "change_percent"), pl.Float64))
    moved = pl.concat([empty, *parts])
    return moved.sort("change_percent", descending=True, nulls_last=True, maintain_order=True)


def compared_rows(wh: Warehouse, run_a: str, run_b: str) -> pl.DataFrame:
    """Return the number of matched and unmatched rows of each table: columns table, rows, only_a, only_b."""
    pairs = matched_prompts(wh, run_a, run_b).pairs
    counts = [
        (table, len(rows), *(rows.select(pl.col(f"{side}_there").is_null().sum()).item() for side in "ba"))
        for table in _compared(wh, run_a, run_b)
        for rows in (_matched(wh, table, run_a, run_b, pairs),)
    ]
    return pl.DataFrame(
        [(table, n - only_a - only_b, only_a, only_b) for table, n, only_a, only_b in counts],
        schema=["table", "rows", "only_a", "only_b"],
        orient="row",
    )


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


def _matched(wh: Warehouse, table: str, run_a: str, run_b: str, pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of both runs joined by the key, with numbers as a_… and b_…; NULL if a run lacks the row."""
    key, numbers = TABLES[table].info["key"], _measured(table)
    first, second = (
        wh.scan(table, everything=True)
        .filter(run=run)
        .select(*key, *(pl.col(name).cast(pl.Float64).alias(f"{side}_{name}") for name in numbers), _there(side))
        .collect()
        for side, run in (("a", run_a), ("b", run_b))
    )
    if "prompt_id" in key:
        partners = second.join(pairs, left_on="prompt_id", right_on="prompt_b", how="left", maintain_order="left")
        second = partners.with_columns(prompt_id="prompt_a").drop("prompt_a")
    return first.join(second, on=key, how="full", coalesce=True, nulls_equal=True, maintain_order="left_right")


def _there(side: str) -> pl.Expr:
    return pl.lit(True).alias(f"{side}_there")


def _moved(table: str, matched: pl.DataFrame) -> Iterator[pl.DataFrame]:
    rows = matched.filter("a_there", "b_there")
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
