"""Command that compares two runs."""

from __future__ import annotations

from pathlib import Path

import click

import kdb
from kdb.cli.options import output_options, show, warehouse_option


@click.command()
@click.argument("run_a")
@click.argument("run_b")
@click.option(
    "--limit",
    type=click.IntRange(0, 10**9),
    default=20,
    show_default=True,
    help="Number of changes to show, largest first.",
)
@warehouse_option
@output_options
def compare(
    run_a: str, run_b: str, limit: int, warehouse: Path | str, format_: str | None, output: Path | None
) -> None:
    """Show the settings, versions and numbers that differ in two runs.

    Give the ids of the runs (`kdb runs`), or the first digits. A change is in percent of the largest value of its
    column. If both runs probed the same texts, McNemar's test says whether their accuracies differ. With -o, all
    numbers that changed are written to the file.

    \b
    kdb compare 1f0c9a 77aa01
    kdb compare 1f0c9a 77aa01 -o moved.csv
    """
    import polars as pl

    from kdb.analysis import compare as compared

    with kdb.open(warehouse).snapshot() as wh:
        a, b = compared.find_runs(wh, run_a, run_b)
        moved = compared.moved_numbers(wh, a, b)
        if output is not None:
            show(moved, format_, output)
            return
        settings, rows = compared.differing_settings(wh, a, b), compared.compared_rows(wh, a, b)
        tests = compared.accuracy_differences(wh, a, b)
        differ = tests.filter(pl.col("only_a") + pl.col("only_b") > 0).sort("p_value") if len(tests) else tests
    for title, frame in (
        (f"Settings that differ: {len(settings)}", settings),
        ("Matched rows", rows),
        (f"Numbers that changed: {len(moved):,}", moved.head(limit)),
        ("Accuracies that differ, by the p-value of McNemar's test", differ.head(limit)),
    ):
        if len(frame):
            click.echo(title)
            show(frame, format_, None)
    if moved.is_empty():
        click.echo("No number changed.")
