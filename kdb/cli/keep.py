"""Commands of maintenance: list, remove, shrink and verify runs, and rebuild the file for the DuckDB shell."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

import kdb
from kdb.cli.completion import stored
from kdb.cli.options import Location, check_output, output_options, say, show, warehouse_option
from kdb.errors import KdbError, QueryError
from kdb.faults import explain
from kdb.tables import View
from kdb.text import visible

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


@click.group(invoke_without_command=True)
@warehouse_option
@output_options
@click.pass_context
def runs(ctx: click.Context, warehouse: Path | str, format_: str | None, output: Path | None, view: View) -> None:
    """List the runs in the warehouse, or remove some.

    \b
    kdb runs
    kdb runs remove 1f0c9a3b
    kdb runs remove --older-than 90d
    """
    ctx.obj = warehouse
    if ctx.invoked_subcommand is None:
        opened = kdb.open(warehouse)
        show(opened.query("runs"), format_, output, view)
        staging = opened.storage.local.staging
        for left in staging.unfinished_runs():
            names = f"{left.begun['model']} on {left.begun['dataset']} (run {left.begun['run']})"
            state = "Being measured" if left.in_progress else "Interrupted"
            say(f"{state}: {names}, {left.bytes / 1e6:,.1f} MB in staging.", err=True)
        for left in staging.leftovers():
            say(f"Leftover files: {left.path}, {left.bytes / 1e6:,.1f} MB. `kdb clean` deletes them.", err=True)


@runs.command()
@click.argument("run", required=False, shell_complete=stored("run"))
@click.option(
    "--older-than",
    metavar="AGE",
    help="Remove the runs that finished earlier than this: 90d, 12h, or a date such as 2026-01-31 (UTC).",
)
@click.option("--yes", is_flag=True, help="Skip the confirmation.")
@click.option("--warehouse", type=Location(), help="Folder of the warehouse, or its URL.")
@click.pass_obj
def remove(
    parent_warehouse: Path | str, run: str | None, older_than: str | None, yes: bool, warehouse: Path | str | None
) -> None:
    """Delete a run permanently, or all runs older than some age, after asking for confirmation.

    RUN is the run's id (`kdb runs`), or its first digits: four or more, as many as tell it from the others.

    \b
    kdb runs remove 1f0c9a3b
    kdb runs remove --older-than 90d
    """
    if (run is None) == (older_than is None):
        raise click.UsageError("Give either one run, or an age with --older-than.")
    opened = kdb.open(warehouse or parent_warehouse)
    for chosen in _confirmed(opened, str(older_than), yes) if run is None else [_confirmed_run(opened, run, yes)]:
        opened.storage.remove(chosen)
        click.echo(f"Removed run {chosen}.")


def _confirmed_run(opened: Warehouse, digits: str, yes: bool) -> str:
    """Return the run that begins with these digits, after asking for confirmation."""
    folder = opened.storage.named(digits)
    if not yes:  # with its names: the id alone might be meant for another warehouse
        named = f"{folder.run} ({folder.model} on {folder.dataset})"
        click.confirm(visible(f"Remove run {named} permanently?"), abort=True, err=True)
    return folder.run


def _confirmed(opened: Warehouse, older_than: str, yes: bool) -> list[str]:
    """Return the runs that finished earlier, after listing them and asking for confirmation; none if there are none."""
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
        click.confirm(f"Remove {_count(len(old), 'run')} permanently?", abort=True, err=True)
    return old["run"].to_list()


@runs.command("keep-vectors")
@click.argument("which", type=click.Choice(["none", "sampled"]))
@click.option("--run", "chosen", multiple=True, help="Run (`kdb runs`); repeatable.", shell_complete=stored("run"))
@click.option(
    "--model", "models", multiple=True, help="Every run of this model; repeatable.", shell_complete=stored("model")
)
@click.option(
    "--older-than", metavar="AGE", help="Only runs that finished earlier than this: 90d, 12h, or a date (UTC)."
)
@click.option("--yes", is_flag=True, help="Skip the confirmation.")
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
    """Delete the hidden states of runs, and keep everything computed from them.

    Hidden states take most of a warehouse's space. `sampled` keeps those of 100 prompts. To restore all of them, remove
    the run and measure it again.

    \b
    kdb runs keep-vectors none --older-than 90d
    kdb runs keep-vectors sampled --model smollm2-135m
    """
    from kdb.warehouse import compaction

    opened = kdb.open(warehouse or parent_warehouse)
    wanted = _having_vectors(opened, chosen, models, older_than)
    if not wanted:
        click.echo("None of these runs has vectors.", err=True)
        return
    if not yes:
        click.confirm(f"Delete the vectors of {_count(len(wanted), 'run')} permanently?", abort=True, err=True)
    for run in wanted:
        compaction.keep_vectors(opened.storage, opened.storage.listed(run), which)
        click.echo(f"Deleted vectors of run {run}.")


def _having_vectors(
    opened: Warehouse, chosen: tuple[str, ...], models: tuple[str, ...], older_than: str | None
) -> list[str]:
    """Return the chosen runs that have vectors. Raises UnknownNameError for a name that is not stored."""
    from kdb.warehouse.values import check_known

    before = moment(older_than, datetime.now(UTC)).isoformat() if older_than else None
    stored = opened.sql("SELECT DISTINCT model FROM runs")["model"].to_list()
    check_known("model", models, stored, "`kdb runs` lists what is stored.")
    rows = opened.sql(
        "SELECT run, model FROM runs WHERE list_contains(tables, 'activations') "
        "AND ($1 IS NULL OR finished_at < $1::TIMESTAMPTZ) ORDER BY finished_at, run",
        [before],
    ).to_dicts()
    named = [opened.storage.named(digits).run for digits in chosen]
    return [r["run"] for r in rows if r["run"] in named or r["model"] in models or not (chosen or models)]


@click.command()
@click.option(
    "--run", "chosen", multiple=True, help="Run (`kdb runs`); repeatable.  [default: all]", shell_complete=stored("run")
)
@warehouse_option
def compact(chosen: tuple[str, ...], warehouse: Path | str) -> None:
    """Merge the small files of committed runs.

    Each table of a run becomes one file. Nothing else changes, and running queries are not affected.

    \b
    kdb compact
    """
    from kdb.warehouse import compaction

    storage = kdb.open(warehouse).storage
    runs = [storage.named(digits).run for digits in chosen] or [folder.run for folder in storage.run_folders()]
    fewer = sum(compaction.compact(storage, run) for run in runs)
    click.echo(f"Reduced the number of files by {fewer:,} in {_count(len(runs), 'run')}.")


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def moment(older_than: str, now: datetime) -> datetime:
    """Return the time meant by an age (90d, 12h) or a date. Raises QueryError for any other text."""
    with contextlib.suppress(ValueError, OverflowError):
        if age := re.fullmatch(r"(\d+)([dh])", older_than):
            return now - timedelta(hours=int(age[1]) * (24 if age[2] == "d" else 1))
        return datetime.combine(date.fromisoformat(older_than), time(), UTC)
    raise QueryError(
        f"--older-than: expected an age such as 90d or 12h, or a date such as 2026-01-31, found {older_than!r}."
    )


@click.command()
@click.option("--yes", is_flag=True, help="Skip the confirmation.")
@warehouse_option
def clean(yes: bool, warehouse: Path | str) -> None:
    """Delete the leftovers of killed commands: unused files, unfinished runs.

    A run that a process is measuring now is not deleted. A deleted unfinished run starts from the beginning when it is
    measured again.

    \b
    kdb clean
    """
    staging = kdb.open(warehouse).storage.local.staging
    begun = staging.unfinished_runs()
    unfinished = [left for left in begun if not left.in_progress]
    for left in begun:
        state = "Being measured, not deleted" if left.in_progress else "Interrupted"
        say(f"{state}: {left.begun['model']} on {left.begun['dataset']}, {left.bytes / 1e6:,.1f} MB.", err=True)
    n_bytes = staging.delete_leftovers()
    if unfinished and not yes:
        click.confirm(f"Delete {_count(len(unfinished), 'interrupted run')}?", abort=True, err=True)
    for left in unfinished:
        if staging.delete_unfinished(left):
            n_bytes += left.bytes
        else:
            click.echo(f"Run {left.begun['run']} is being measured now and was not deleted.", err=True)
    click.echo(f"Deleted {n_bytes / 1e6:,.1f} MB from staging.")


@click.command()
@warehouse_option
def migrate(warehouse: Path | str) -> None:
    """Rewrite older runs in the schema of this kdb.

    These are runs that an older kdb measured. Rows and run ids do not change; names do: what was called logistic is
    logistic-raw now, the split paper is label-0-first. Each run is replaced in one step, after its new files were
    compared with the old ones. Then the probes of today are fitted to stored vectors, as runs of their own. After an
    interruption, run the same command again to continue. Without migration, queries also read older runs, but more
    slowly.

    \b
    kdb migrate
    """
    from kdb.warehouse import migration
    from kdb.warehouse.store import Warehouse

    opened = Warehouse.create(kdb.open(warehouse).storage.location)
    missing: dict[str, None] = {}
    left = migration.older(opened.storage)
    for number, folder in enumerate(left, start=1):
        missing |= dict.fromkeys(migration.migrate(opened.storage, folder))
        click.echo(f"{number} of {len(left)}: {folder.model} on {folder.dataset} (run {folder.run}).")
    stored = len(opened.storage.run_folders())
    if not left:
        click.echo(f"Nothing to migrate: {_count(stored, 'run')} stored, all in the schema of this kdb.")
    else:
        click.echo(f"{_count(len(left), 'run')} migrated.")
    if missing:
        click.echo(f"NULL until the model is measured again: {', '.join(missing)}.", err=True)
    migration.finish(opened.storage)
    _fit_again(Warehouse(opened.storage.location))


_WITHOUT_WEIGHTS = """
SELECT run FROM runs
WHERE study = 'concept' AND source_run IS NULL AND list_contains(tables, 'activations')
    AND run NOT IN (SELECT coalesce(source_run, run) FROM runs WHERE list_contains(tables, 'probe_weights'))
ORDER BY model, dataset, run
"""


def _fit_again(opened: Warehouse) -> None:
    """Fit the probes of today to stored vectors of runs that have older probes; say why where that fails."""
    left = opened.sql(_WITHOUT_WEIGHTS)["run"].to_list()
    if not left:
        return
    from kdb.ingest.concept.derived import refit
    from kdb.ingest.settings import Probing

    for run in left:
        folder = opened.storage.find(run)
        try:
            outcome = refit(opened.storage, folder, Probing())
        except KdbError as error:
            click.echo(f"{folder.model} on {folder.dataset}: probes not fitted again. {error}", err=True)
            continue
        except ImportError as error:
            click.echo(f"Probes not fitted again: {explain(error, 'kdb migrate').message}", err=True)
            return
        click.echo(f"{folder.model} on {folder.dataset}: probes fitted again (run {outcome.run}).")


@click.command()
@warehouse_option
def verify(warehouse: Path | str) -> None:
    """Check every file against the checksums of its commit.

    If files are damaged, lists them and exits with status 1.
    """
    storage = kdb.open(warehouse).storage
    damages = list(storage.verify())
    for damage in damages:
        say(f"{damage.path}: {damage.problem}")
    if damages:
        damaged = " ".join(sorted({damage.run for damage in damages}))
        click.echo(f"Damaged runs: {damaged}. Remove each (`kdb runs remove`) and measure it again.", err=True)
        raise SystemExit(1)
    click.echo(f"All files of {_count(len(storage.run_folders()), 'run')} are as they were committed.")


@click.command()
@click.option("--url", help="Public address of the warehouse's folder, such as https://example.org/shared.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write if --url is given: .duckdb, .ddb or .db.",
)
@warehouse_option
def rebuild(url: str | None, output: Path | None, warehouse: Path | str) -> None:
    """Rewrite kdb.duckdb, the file to open in the DuckDB shell.

    With --url, write a file to publish together with the folder instead. Its views read the folder's current Parquet
    files by their URLs. Nothing is downloaded, and the folder need not be published yet.

    \b
    kdb rebuild
    kdb rebuild --url https://example.org/shared -o paper.duckdb
    """
    if output is not None:
        check_output(output, (".duckdb", ".ddb", ".db"))  # refuse to overwrite another kind of file by mistake
    opened = kdb.open(warehouse)
    if (url is None) != (output is None):
        raise click.UsageError(
            "--url and -o must be given together: kdb rebuild --url https://example.org/shared -o paper.duckdb"
        )
    if url is None or output is None:
        click.echo(f"Wrote {opened.rebuild()}.")
        return
    opened.publish(url, output)
    click.echo(f"Wrote {output}, which reads {url}.")
