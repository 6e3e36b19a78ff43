"""Messages about a stored run: how many prompts count, how long it took, and which commands to type next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdb.analysis.variants import PLAIN
from kdb.cli.completion import DEFAULT_WAREHOUSE
from kdb.cli.options import say
from kdb.numbers import data_size, duration

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

NOT_KEPT = {
    "not_in_top_ten": "whose answer is not among the ten best tokens",
    "shares_first_token": "whose answer begins as another answer of its category does",
    "beaten_by_another_answer": "with another answer of its category ahead",
}
"""Columns of the query ``kept-prompts`` that count prompts that are not kept, in words."""

NEXT = {
    "concept": (
        ("probe_scores", "kdb query concept-depth --model {model} --dataset {dataset}"),
        ("probe_scores", "kdb plot depth-curves -o depth.html"),
    ),
    "knowledge": (
        ("head_scores", "kdb query top-heads --model {model}"),
        ("expert_scores", "kdb query top-experts --model {model}"),
        ("head_scores", "kdb query head-effects --model {model}"),
        ("layer_scores", "kdb query top-layers --model {model}"),
    ),
}
"""Commands to continue with after a run of each study, with the table that each asks; two of them are shown."""


def report_outcome(outcome: Any, model: str, dataset: str) -> None:
    """Print whether a run was stored now, or before."""
    done = "is stored already" if outcome.status == "exists" else "stored"
    say(f"{model} on {dataset}: {done} (run {outcome.run})")


def report_measured(opened: Warehouse, outcome: Any, model: str, dataset: str, took: float) -> None:
    """Print the outcome of an ingest; of a run that was measured now, also what it holds, and what to type next.

    ``took`` is its time in seconds.
    """
    report_outcome(outcome, model, dataset)
    if outcome.status == "exists":
        return
    for line in counted(opened, outcome.run):
        say(f"  {line}")
    n_tables, n_bytes = _stored(opened, outcome.run)
    say(f"  {n_tables} tables, {data_size(n_bytes)}, measured in {duration(took)}")
    say_next(opened, outcome.run)


def counted(opened: Warehouse, run: str) -> Iterator[str]:
    """Yield how many prompts of a run count, and why the others do not."""
    kept = opened.query("kept-prompts", run=run).sum().to_dicts()[0]
    if not kept["n_prompts"]:
        row = opened.sql("SELECT n_prompts, n_positive FROM datasets WHERE run = ?", [run]).to_dicts()[0]
        yield f"{row['n_prompts']:,} prompts, {row['n_positive']:,} of them with label 1"
        return
    yield f"{kept['kept']:,} of {kept['n_prompts']:,} prompts kept"
    yield from (f"{kept[column]:,} not kept {why}" for column, why in NOT_KEPT.items() if kept[column])


def say_next(opened: Warehouse, run: str) -> None:
    """Print commands that show what a run holds."""
    rows = opened.sql("SELECT model, dataset, study, variant, tables FROM runs WHERE run = ?", [run]).to_dicts()
    where = str(opened.storage.location)
    here = "" if Path(where).resolve() == Path(DEFAULT_WAREHOUSE).resolve() else f" --warehouse {shlex.quote(where)}"
    say("Next:")
    for row in rows:
        quoted = {name: shlex.quote(str(value)) for name, value in row.items()}
        variant = "" if row["variant"] == PLAIN else f" --variant {quoted['variant']}"
        for command in [command for table, command in NEXT[row["study"]] if table in row["tables"]][:2]:
            say(f"  {command.format(**quoted)}{variant}{here}")
    say(f"  kdb serve{here}")


def _stored(opened: Warehouse, run: str) -> tuple[int, int]:
    """Return the number of tables of a run, and the size of its files in bytes."""
    folder = opened.storage.find(run)
    files = [path for path in folder.path.rglob("*.parquet") if path.is_file()]
    return len({path.parent for path in files}), sum(path.stat().st_size for path in files)
