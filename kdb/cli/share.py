"""Sharing: copy runs from one warehouse into another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

import kdb
from kdb.cli.options import Location, warehouse_option
from kdb.errors import QueryError, UnknownNameError

if TYPE_CHECKING:
    from kdb.warehouse.lake import Lake
    from kdb.warehouse.store import Warehouse


@click.command("export")
@click.argument("folder", type=Location(), metavar="FOLDER|URL")
@click.option(
    "--run", "runs", multiple=True, help="Run (`kdb runs`); repeatable. Runs that it was computed from go along."
)
@click.option("--model", "models", multiple=True, help="Every run of this model; repeatable.")
@click.option("--dataset", "datasets", multiple=True, help="Of these, the runs on this dataset; repeatable.")
@warehouse_option
def export(
    folder: Path | str, runs: tuple[str, ...], models: tuple[str, ...], datasets: tuple[str, ...], warehouse: Path | str
) -> None:
    """Copy runs into a folder of their own, which is a warehouse too; all of them if none is named.

    Each file is checked against the checksum of its commit. Runs that are there already are left alone.

    \b
    kdb export shared/ --model smollm2-135m
    kdb export shared/ --run 1f0c9a3b5d7e2468
    """
    from kdb.warehouse.store import Warehouse

    opened = kdb.open(warehouse)
    chosen = _chosen(opened, runs, models, datasets)
    _copy(opened.lake, Warehouse.create(folder).lake, chosen)


@click.command("import")
@click.argument("folder", type=Location(), metavar="FOLDER|URL")
@warehouse_option
def import_(folder: Path | str, warehouse: Path | str) -> None:
    """Copy every run of another warehouse into this one, such as one that was exported.

    Each file is checked against the checksum of its commit; a run appears whole or not at all. Runs that are there
    already are left alone, so the same import again does nothing.

    \b
    kdb import shared/
    """
    from kdb.warehouse.store import Warehouse, lake_at

    source = lake_at(folder)
    _copy(source, Warehouse.create(warehouse).lake, [found.run for found in source.run_folders()])


def _chosen(opened: Warehouse, runs: tuple[str, ...], models: tuple[str, ...], datasets: tuple[str, ...]) -> list[str]:
    """The runs asked for, and those that they were computed from, which come first."""
    rows = {row["run"]: row for row in opened.sql("SELECT run, model, dataset, source_run FROM runs").to_dicts()}
    for run in runs:
        if run not in rows:
            raise UnknownNameError("run", run, rows, "`kdb runs` lists them.")
    wanted = [
        run
        for run, row in rows.items()
        if (run in runs or row["model"] in models or not (runs or models))
        and (row["dataset"] in datasets or not datasets)
    ]
    if not wanted:
        raise QueryError("No run is of these models and datasets. `kdb runs` shows what was measured.")
    chosen: dict[str, None] = {}
    for run in wanted:
        source = rows[run]["source_run"]
        if source in rows:
            chosen[source] = None
        chosen[run] = None
    return list(chosen)


def _copy(source: Lake, target: Lake, runs: Iterable[str]) -> None:
    for run in runs:
        folder = source.find(run)
        done = "copied" if target.adopt(folder) else "is stored already"
        click.echo(f"{folder.model} on {folder.dataset}: {done} (run {run})")
