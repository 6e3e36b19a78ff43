"""Keeping: list, remove, shrink and verify runs, and rebuild the shell's file."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

import kdb
from kdb.cli.options import Location, check_output, output_options, say, show, warehouse_option
from kdb.errors import QueryError
from kdb.text import visible

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
        for left in opened.lake.interrupted():
            names = f"{left.begun['model']} on {left.begun['dataset']} (run {left.begun['run']})"
            state = "Being measured" if left.in_progress else "Interrupted"
            say(f"{state}: {names}, {left.bytes / 1e6:,.1f} MB in staging.", err=True)
        for left in opened.lake.leftovers():
            say(f"Dropped and not deleted: {left.path}, {left.bytes / 1e6:,.1f} MB. `kdb clean` deletes it.", err=True)


@runs.command()
@click.argument("run", required=False)
@click.option(
    "--older-than", metavar="AGE", help="Runs that ended before: 90d, 12h, or a date such as 2026-01-31 (UTC)."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--warehouse", type=Location(), help="Folder of the warehouse, or its URL.")
@click.pass_obj
def remove(
    parent_warehouse: Path | str, run: str | None, older_than: str | None, yes: bool, warehouse: Path | str | None
) -> None:
    """Delete a run for good, or every run that is older than some age, after asking for confirmation.

    \b
    kdb runs remove 1f0c9a3b5d7e2468
    kdb runs remove --older-than 90d
    """
    if (run is None) == (older_than is None):
        raise click.UsageError("Name one run, or an age with --older-than.")
    opened = kdb.open(warehouse or parent_warehouse)
    if run and not yes:
        folder = opened.lake.find(run)  # by its names: who has its id alone may mean another warehouse's
        click.confirm(visible(f"Remove run {run} ({folder.model} on {folder.dataset}) for good?"), abort=True, err=True)
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
        say(" ".join(map(str, row)), err=True)
    if not yes:
        click.confirm(f"Remove {_count(len(old), 'run')} for good?", abort=True, err=True)
    return old["run"].to_list()


@runs.command("keep-vectors")
@click.argument("which", type=click.Choice(["none", "sampled"]))
@click.option("--run", "chosen", multiple=True, help="Run (`kdb runs`); repeatable.")
@click.option("--model", "models", multiple=True, help="Every run of this model; repeatable.")
@click.option("--older-than", metavar="AGE", help="Of these (else of all), runs that ended before: 90d, 12h, a date.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--warehouse", type=Location(), help="Folder of the warehouse.")
@click.pass_obj
def keep_vectors(
    parent_warehouse: Path | str,
    which: str,
    chosen: tuple[str, ...],
    models: tuple[str, ...],
    older_than: str | None,
    yes: bool,
    warehouse: Path | str | None,
) -> None:
    """Drop the hidden states of runs, and keep what was worked out from them.

    They are most of a warehouse's bytes. `sampled` keeps those of 100 prompts. To have them all again, remove the run
    and measure it again.

    \b
    kdb runs keep-vectors none --older-than 90d
    kdb runs keep-vectors sampled --model smollm2-135m
    """
    from kdb.warehouse import compaction

    opened = kdb.open(warehouse or parent_warehouse)
    wanted = _having_vectors(opened, chosen, models, older_than)
    if not wanted:
        click.echo("No such run has vectors.", err=True)
        return
    if not yes:
        click.confirm(f"Drop the vectors of {_count(len(wanted), 'run')} for good?", abort=True, err=True)
    for run in wanted:
        compaction.keep_vectors(opened.lake, opened.lake.find(run), which)
        click.echo(f"Dropped vectors of run {run}.")


def _having_vectors(
    opened: Warehouse, chosen: tuple[str, ...], models: tuple[str, ...], older_than: str | None
) -> list[str]:
    """The runs that are meant and have vectors. Raises UnknownNameError for a name that is not there."""
    from kdb.warehouse.values import check_known

    before = moment(older_than, datetime.now(UTC)).isoformat() if older_than else None
    stored = opened.sql("SELECT DISTINCT model FROM runs")["model"].to_list()
    check_known("model", models, stored, "`kdb runs` lists what is stored.")
    rows = opened.sql(
        "SELECT run, model FROM runs WHERE list_contains(tables, 'activations') "
        "AND ($1 IS NULL OR finished_at < $1::TIMESTAMPTZ) ORDER BY finished_at, run",
        [before],
    ).to_dicts()
    for run in chosen:
        opened.lake.find(run)
    return [r["run"] for r in rows if r["run"] in chosen or r["model"] in models or not (chosen or models)]


@click.command()
@click.option("--run", "chosen", multiple=True, help="Run (`kdb runs`); repeatable. Else every one.")
@warehouse_option
def compact(chosen: tuple[str, ...], warehouse: Path | str) -> None:
    """Merge the small files of committed runs: a file for each table of a run.

    Nothing else changes, and nobody who asks meanwhile notices.

    \b
    kdb compact
    """
    from kdb.warehouse import compaction

    lake = kdb.open(warehouse).lake
    found = chosen or [folder.run for folder in lake.run_folders()]
    fewer = sum(compaction.compact(lake, run) for run in found)
    click.echo(f"{_count(fewer, 'file')} fewer in {_count(len(found), 'run')}.")


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


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
@click.option("--yes", is_flag=True, help="Do not ask.")
@warehouse_option
def clean(yes: bool, warehouse: Path | str) -> None:
    """Delete what killed commands left in staging: dropped files, and runs that were begun and not finished.

    A run that a process is measuring now is left alone. An unfinished run that is deleted begins anew when it is
    measured again.

    \b
    kdb clean
    """
    lake = kdb.open(warehouse).lake
    begun = lake.interrupted()
    unfinished = [left for left in begun if not left.in_progress]
    for left in begun:
        state = "Being measured, left alone" if left.in_progress else "Interrupted"
        say(f"{state}: {left.begun['model']} on {left.begun['dataset']}, {left.bytes / 1e6:,.1f} MB.", err=True)
    swept = lake.sweep()
    if unfinished and not yes:
        click.confirm(f"Delete {_count(len(unfinished), 'interrupted run')}?", abort=True, err=True)
    for left in unfinished:
        if lake.discard(left):
            swept += left.bytes
        else:
            click.echo(f"Run {left.begun['run']} is being measured now: left alone.", err=True)
    click.echo(f"Deleted {swept / 1e6:,.1f} MB from staging.")


@click.command()
@warehouse_option
def migrate(warehouse: Path | str) -> None:
    """Rewrite, in this kdb's schema, the runs that an older kdb measured.

    Rows and run ids stay as they are. Each run is replaced in one step, after its new files were compared with the old
    ones; interrupted, the same command continues with the runs that are left. Queries read older runs without it, more
    slowly.

    \b
    kdb migrate
    """
    from kdb.warehouse import migration
    from kdb.warehouse.store import Warehouse

    opened = Warehouse.create(kdb.open(warehouse).lake.location)
    missing: dict[str, None] = {}
    left = migration.older(opened.lake)
    for number, folder in enumerate(left, start=1):
        missing |= dict.fromkeys(migration.migrate(opened.lake, folder))
        click.echo(f"{number} of {len(left)}: {folder.model} on {folder.dataset} (run {folder.run}).")
    stored = len(opened.lake.run_folders())
    if not left:
        click.echo(f"Nothing to migrate: {_count(stored, 'run')} stored, all in this kdb's schema.")
    else:
        click.echo(f"{_count(len(left), 'run')} migrated.")
    if missing:
        click.echo(f"NULL until the model is measured again: {', '.join(missing)}.", err=True)
    if "://" not in opened.lake.location:
        opened.lake.mark(older_runs=None)
        opened.rebuild()


@click.command()
@warehouse_option
def verify(warehouse: Path | str) -> None:
    """Check every file against the checksums of its commit.

    Exits with 1 where something is damaged, and names it.
    """
    lake = kdb.open(warehouse).lake
    damages = list(lake.verify())
    for damage in damages:
        say(f"{damage.path}: {damage.problem}")
    if damages:
        damaged = " ".join(sorted({damage.run for damage in damages}))
        click.echo(f"Damaged runs: {damaged}. Remove each (`kdb runs remove`) and measure it again.", err=True)
        raise SystemExit(1)
    click.echo(f"All files of {_count(len(lake.run_folders()), 'run')} are as they were committed.")


@click.command()
@click.option("--url", help="Where anyone reads the warehouse's folder, such as https://example.org/shared.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write, with --url: .duckdb, .ddb or .db.",
)
@warehouse_option
def rebuild(url: str | None, output: Path | None, warehouse: Path | str) -> None:
    """Write kdb.duckdb, the DuckDB shell's file, anew.

    With --url, write a file to publish beside the folder instead: its views read the Parquet files by their URLs, those
    that the folder has now. Nothing is fetched, and the folder need not be there yet.

    \b
    kdb rebuild
    kdb rebuild --url https://example.org/shared -o paper.duckdb
    """
    if output is not None:
        check_output(output, (".duckdb", ".ddb", ".db"))  # so that no other file is overwritten by mistake
    opened = kdb.open(warehouse)
    if (url is None) != (output is None):
        raise click.UsageError("--url and -o go together: kdb rebuild --url https://example.org/shared -o paper.duckdb")
    if url is None or output is None:
        click.echo(f"Wrote {opened.rebuild()}.")
        return
    opened.publish(url, output)
    click.echo(f"Wrote {output}, over {url}.")
