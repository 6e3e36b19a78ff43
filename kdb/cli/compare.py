"""Command that compares two runs."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import kdb
from kdb.analysis.captions import CAVEAT
from kdb.cli.completion import stored
from kdb.cli.options import output_options, say, show, warehouse_option
from kdb.queries.domains import CLASSIFIERS, SITES
from kdb.tables import View

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import polars as pl

    from kdb.analysis.compare import Matched
    from kdb.analysis.compare_depth import ByDepth
    from kdb.warehouse.store import Warehouse

    Shown = Iterator[tuple[str, pl.DataFrame | None]]
    """Sentences, each with the table to print below."""


@click.command()
@click.argument("run_a", shell_complete=stored("run"))
@click.argument("run_b", shell_complete=stored("run"))
@click.option(
    "--limit",
    type=click.IntRange(0, 10**9),
    default=20,
    show_default=True,
    help="Number of changes to show, largest first.",
)
@click.option(
    "--site",
    type=click.Choice(SITES),
    default="resid_post",
    show_default=True,
    help="Place where the hidden state is read.",
)
@click.option("--classifier", type=click.Choice(CLASSIFIERS), help="Kind of the probe; defaults to each run's own.")
@click.option("--split", help="Split of the probe; defaults to each run's own.")
@warehouse_option
@output_options
def compare(
    run_a: str,
    run_b: str,
    limit: int,
    site: str,
    classifier: str | None,
    split: str | None,
    warehouse: Path | str,
    format_: str | None,
    output: Path | None,
    view: View,
) -> None:
    """Show how two runs of one study differ: accuracies by depth, measures, settings and numbers.

    Give the ids of the runs (`kdb runs`), or the first digits. Prompts are matched by the text of the dataset, whatever
    the template or noise. Two concept runs must be of one dataset. Their accuracies are compared at the same depth,
    with McNemar's test, on the prompts that are in both test parts. With -o, these rows are written to the file; for
    other runs, all numbers that changed.

    \b
    kdb compare 1f0c9a 77aa01
    kdb compare 1f0c9a 77aa01 -o by-depth.csv
    """
    from kdb.analysis import compare as compared
    from kdb.analysis import compare_depth

    if view.columns and output is None:
        raise click.UsageError("The tables of a comparison have different columns. Use --columns with -o FILE.")
    chosen = {"site": site, "classifier": classifier, "split": split}
    probe = {name: value for name, value in chosen.items() if value is not None}
    with kdb.open(warehouse).snapshot() as wh:
        a, b = compared.find_runs(wh, run_a, run_b)
        about, matched = compared.described(wh, a, b), compared.matched_prompts(wh, a, b)
        compared.check_comparable(*about, matched)
        concept = about[0]["study"] == "concept"
        found = compare_depth.by_depth(wh, a, b, matched.pairs, **probe) if concept else None
        if output is not None:
            show(compared.moved_numbers(wh, a, b) if found is None else found.table, format_, output, view)
            return
        shown = [*_about(*about, matched)]
        if found is not None:
            shown += [*_by_depth(found), (_EACH, compare_depth.measures(wh, a, b, **probe))]
        elif concept:
            shown.append(("A run has no predictions of probes, so accuracies are not compared.", None))
        shown += _differing(wh, a, b, limit, numbers=found is None or about[0]["n_layers"] == about[1]["n_layers"])
    for sentences, frame in shown:
        say("\n".join(textwrap.fill(line, 80, break_on_hyphens=False) for line in sentences.splitlines()))
        if frame is not None:
            show(frame, format_, None, replace(view, paged=False))


_EACH = (
    "Measures of each run on its own test prompts. Intervals of accuracy and depth_90 are 95 %; J and C have the range "
    f"of resampled test prompts. Depths are in percent. {CAVEAT}"
)


def _about(a: Mapping[str, Any], b: Mapping[str, Any], matched: Matched) -> Shown:
    """Yield what the two runs are, and how many of their prompts have a partner."""
    for side, run in (("a", a), ("b", b)):
        yield f"{side}: {run['run']}, {run['model']} on {run['dataset']}, variant {run['variant']}", None
    n, only_a, only_b = len(matched.pairs), matched.only_a, matched.only_b
    yield f"Prompts with the same text: {n:,}. Without a partner: {only_a:,} of a, {only_b:,} of b.", None


def _by_depth(found: ByDepth) -> Shown:
    """Yield the accuracies by depth, with what they are measured on."""
    if not found.n:
        yield "No prompt is in both test parts. Measure both runs with the same --limit and --seed.", None
        return
    yield _sentences(found), _narrow(found.table)


def _sentences(found: ByDepth) -> str:
    """Say what the table holds, and where the largest difference is."""
    said = [
        f"Accuracy by depth on the {found.n:,} prompts that are in both test parts. Beside b - a is its 95 % interval, "
        "which is missing where too few prompts differ; p is McNemar's."
    ]
    if found.n_groups is not None:
        said.append(
            f"The prompts are in {found.n_groups:,} groups: the interval and the p of the largest difference keep them "
            "together, McNemar's p takes each prompt as independent."
        )
    place = max(found.table.to_dicts(), key=lambda row: abs(row["difference"]))
    said.append(
        "The accuracies are equal at every depth."
        if not place["difference"]
        else f"Largest difference: {place['difference']:+.3f} at {place['depth_percent']:.0f} % of depth, p = "
        f"{found.p_largest:.2g}, which allows for its choice among {len(found.table)} depths."
    )
    return "\n".join(said)


def _narrow(table: pl.DataFrame) -> pl.DataFrame:
    """Return the columns that fit a terminal."""
    import polars as pl

    return table.select(
        pl.col("depth_percent").alias("depth %"),
        pl.format("{}, {}", "layer_a", "layer_b").alias("layers"),
        pl.col("accuracy_a").alias("accuracy a"),
        pl.col("accuracy_b").alias("accuracy b"),
        pl.col("difference").alias("difference b - a"),
        *("low", "high"),
        p="p_value",
    )


_LONG_HASH = "^([0-9a-f]{12})[0-9a-f]{28,}$"
"""A commit or sha256, of which the first digits are shown."""


def _differing(wh: Warehouse, a: str, b: str, limit: int, *, numbers: bool) -> Shown:
    """Yield settings that differ and, with ``numbers``, the largest changes of numbers with the same key."""
    import polars as pl

    from kdb.analysis import compare as compared

    settings = compared.differing_settings(wh, a, b)
    short = settings.with_columns(pl.col("a", "b").str.replace(_LONG_HASH, "$1…"))
    yield f"Settings that differ: {len(settings)}", short if len(short) else None
    if not numbers:
        return
    moved = compared.moved_numbers(wh, a, b)
    yield "Matched rows", compared.compared_rows(wh, a, b)
    if moved.is_empty():
        yield "No number changed.", None
    else:
        yield f"Numbers that changed: {len(moved):,}", moved.head(limit)
