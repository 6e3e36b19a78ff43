"""Keeping: list, remove and verify runs, and rebuild the shell's file."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

import kdb
from kdb.cli.options import Location, output_options, show, warehouse_option
from kdb.errors import QueryError

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


@click.group(invoke_without_command=True)
@warehouse_option
@output_options
@click.pass_context
def runs(ctx: click.Context, warehouse: Path | str, format_: str | None, output: Path | None) -> None:
    """List the runs in the warehouse, or remove some.

    \b
    kdb runs
    kdb runs remove 1f0c9a3b5d7e2468
    kdb runs remove --older-than 90d
    """
    ctx.obj = warehouse
    if ctx.invoked_subcommand is None:
        opened = kdb.open(warehouse)
        show(opened.query("runs"), format_, output)
        for begun in opened.lake.interrupted():
            click.echo(
                f"In progress or interrupted: {begun['model']} on {begun['dataset']} (run {begun['run']}).",
                err=True,
            )


@runs.command()
@click.argument("run", required=False)
@click.option(
    "--older-than", metavar="AGE", help="Runs that ended before: 90d, 12h, or a date such as 2026-01-31 (UTC)."
)
@click.option("--yes", is_flag=True, help="Do not ask, where several runs are removed.")
@click.option("--warehouse", type=Location(), help="Folder of the warehouse, or its URL.")
@click.pass_obj
def remove(
    parent_warehouse: Path | str, run: str | None, older_than: str | None, yes: bool, warehouse: Path | str | None
) -> None:
    """Delete a run for good, or every run that is older than some age.

    \b
    kdb runs remove 1f0c9a3b5d7e2468
    kdb runs remove --older-than 90d
    """
    if (run is None) == (older_than is None):
        raise click.UsageError("Name one run, or an age with --older-than.")
    opened = kdb.open(warehouse or parent_warehouse)
    for chosen in [run] if run else _confirmed(opened, str(older_than), yes):
        opened.lake.remove(str(chosen))
        click.echo(f"Removed run {chosen}.")


def _confirmed(opened: Warehouse, older_than: str, yes: bool) -> list[str]:
    """The runs that ended before that, once they were listed and whoever asks has agreed; none if there are none."""
    old = opened.sql(
        "SELECT run, model, dataset, variant, strftime(finished_at, '%Y-%m-%d %H:%M') AS finished_utc "
        "FROM runs WHERE finished_at < $1::TIMESTAMPTZ ORDER BY finished_at, run",
        [moment(older_than, datetime.now(UTC)).isoformat()],
    )
    if old.is_empty():
        click.echo("No run is that old.")
        return []
    for row in old.rows():
        click.echo(" ".join(map(str, row)), err=True)
    if not yes:
        click.confirm(f"Remove these {len(old)} runs for good?", abort=True, err=True)
    return old["run"].to_list()


def moment(older_than: str, now: datetime) -> datetime:
    """The moment that an age (90d, 12h) or a date names. Raises QueryError for what is neither."""
    with contextlib.suppress(ValueError, OverflowError):
        if age := re.fullmatch(r"(\d+)([dh])", older_than):
            return now - timedelta(hours=int(age[1]) * (24 if age[2] == "d" else 1))
        return datetime.combine(date.fromisoformat(older_than), time(), UTC)
    raise QueryError(
        f"--older-than: expected an age such as 90d or 12h, or a date such as 2026-01-31, found {older_than!r}."
    )


@click.command()
@warehouse_option
def verify(warehouse: Path | str) -> None:
    """Check every file against the checksums of its commit.

    Exits with 1 where something is damaged, and names it.
    """
    lake = kdb.open(warehouse).lake
    damages = list(lake.verify())
    for damage in damages:
        click.echo(f"{damage.path}: {damage.problem}")
    if damages:
        damaged = " ".join(sorted({damage.run for damage in damages}))
        click.echo(f"Damaged runs: {damaged}. Remove each (`kdb runs remove`) and measure it again.", err=True)
        raise SystemExit(1)
    click.echo(f"All files of {len(lake.run_folders())} runs are as they were committed.")


@click.command()
@warehouse_option
def rebuild(warehouse: Path | str) -> None:
    """Write kdb.duckdb, the DuckDB shell's file, anew."""
    click.echo(f"Wrote {kdb.open(warehouse).rebuild()}.")
