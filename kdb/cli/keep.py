"""Keeping: list, remove and verify runs, and rebuild the shell's file."""

from __future__ import annotations

from pathlib import Path

import click

import kdb
from kdb.cli.options import Location, output_options, show, warehouse_option


@click.group(invoke_without_command=True)
@warehouse_option
@output_options
@click.pass_context
def runs(ctx: click.Context, warehouse: Path | str, format_: str | None, output: Path | None) -> None:
    """List the runs in the warehouse, or remove one.

    \b
    kdb runs
    kdb runs remove 1f0c9a3b5d7e2468
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
@click.argument("run")
@click.option("--warehouse", type=Location(), help="Folder of the warehouse, or its URL.")
@click.pass_obj
def remove(parent_warehouse: Path | str, run: str, warehouse: Path | str | None) -> None:
    """Delete a run for good.

    \b
    kdb runs remove 1f0c9a3b5d7e2468
    """
    kdb.open(warehouse or parent_warehouse).lake.remove(run)
    click.echo(f"Removed run {run}.")


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
@click.option("--url", help="Where anyone reads the warehouse's folder, such as https://example.org/shared.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write, with --url.")
@warehouse_option
def rebuild(url: str | None, output: Path | None, warehouse: Path | str) -> None:
    """Write kdb.duckdb, the DuckDB shell's file, anew.

    With --url, write a file to publish beside the folder instead: its views read the Parquet files by their URLs, those
    that the folder has now. Nothing is fetched, and the folder need not be there yet.

    \b
    kdb rebuild
    kdb rebuild --url https://example.org/shared -o paper.duckdb
    """
    opened = kdb.open(warehouse)
    if (url is None) != (output is None):
        raise click.UsageError("--url and -o go together: kdb rebuild --url https://example.org/shared -o paper.duckdb")
    if url is None or output is None:
        click.echo(f"Wrote {opened.rebuild()}.")
        return
    opened.publish(url, output)
    click.echo(f"Wrote {output}, over {url}.")
