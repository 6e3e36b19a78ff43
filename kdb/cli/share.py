"""Commands that share: copy runs from one warehouse to another, which may be a dataset on the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

import kdb
from kdb.cli.completion import stored
from kdb.cli.options import Command, Location, say, warehouse_option
from kdb.errors import QueryError

if TYPE_CHECKING:
    from kdb.warehouse.manifest import RunFolder
    from kdb.warehouse.storage import Storage
    from kdb.warehouse.store import Warehouse


def chosen_options(command: Command) -> Command:
    """``--run``, ``--model`` and ``--dataset``, each repeatable, choose the runs to copy; all if none is given."""
    for option in (
        click.option(
            "--dataset",
            "datasets",
            multiple=True,
            help="Only runs on this dataset; repeatable.",
            shell_complete=stored("dataset"),
        ),
        click.option(
            "--model",
            "models",
            multiple=True,
            help="All runs of this model; repeatable.",
            shell_complete=stored("model"),
        ),
        click.option(
            "--run",
            "runs",
            multiple=True,
            shell_complete=stored("run"),
            help="Run (`kdb runs`), copied with the run that it was computed from; repeatable.",
        ),
    ):
        command = option(command)
    return command


def licence_option(command: Command) -> Command:
    """``--license ID``."""
    return click.option(
        "--license",
        "licence",
        metavar="ID",
        help="Licence of the data for the dataset card, such as cc-by-4.0; defaults to the card's, then to unknown.",
    )(command)


@click.command("export")
@click.argument("folder", type=Location(), metavar="FOLDER|URL")
@chosen_options
@licence_option
@warehouse_option
def export(
    folder: Path | str,
    runs: tuple[str, ...],
    models: tuple[str, ...],
    datasets: tuple[str, ...],
    licence: str | None,
    warehouse: Path | str,
) -> None:
    """Copy runs to another folder, which is also a warehouse.

    All runs are copied if none is named. Each file is checked against its recorded checksum. Runs that the folder
    already has are skipped. Its README.md is a dataset card with one config per table, so that `datasets.load_dataset`
    can read the folder.

    \b
    kdb export shared/ --model smollm2-135m
    kdb export shared/ --run 1f0c9a3b5d7e2468
    """
    from kdb.warehouse.dataset_card import write_card
    from kdb.warehouse.files import storage_errors
    from kdb.warehouse.store import Warehouse

    opened = kdb.open(warehouse)
    chosen = _chosen(opened, runs, models, datasets)
    target = Warehouse.create(folder)
    _copy(opened.storage, target.storage, chosen)
    if target.storage.is_remote:  # a bucket gets no card
        return
    with storage_errors(target.storage.local.path):
        readme = target.storage.local.path / "README.md"
        before = readme.read_text("utf-8") if readme.exists() else ""
        readme.write_text(write_card(target, str(folder), licence=licence, before=before), "utf-8")


@click.command()
@click.argument("url")
@chosen_options
@licence_option
@click.option("--private", is_flag=True, help="Make the dataset private when it is created.")
@warehouse_option
def push(
    url: str,
    runs: tuple[str, ...],
    models: tuple[str, ...],
    datasets: tuple[str, ...],
    licence: str | None,
    private: bool,
    warehouse: Path | str,
) -> None:
    """Add runs to a dataset on the Hugging Face hub.

    The dataset, with a card that describes it, is created if it does not exist. Runs that it already has are kept and
    not uploaded again. The new runs appear in one commit. Log in with `hf auth login`, or set HF_TOKEN.

    \b
    kdb push hf://datasets/OWNER/NAME --model smollm2-135m --license cc-by-4.0
    """
    from kdb.warehouse import hub

    hub.HubRepo.of(url)  # report a wrong URL before anything is read
    opened = kdb.open(warehouse)
    chosen = _chosen(opened, runs, models, datasets)
    pushed = hub.push(opened, chosen, url, licence=licence, private=private)
    for run in chosen:
        _tell(opened.storage.listed(run), "pushed" if run in pushed else "is already there")


def prefer_option(command: Command) -> Command:
    """``--prefer-imported`` and its opposite; None where neither is given."""
    return click.option(
        "--prefer-imported/--no-prefer-imported",
        default=None,
        help="Whether imported runs take precedence over local runs of the same model, dataset and variant. "
        "Also applies to runs that were imported before.",
    )(command)


@click.command()
@click.argument("url")
@prefer_option
@warehouse_option
def pull(url: str, prefer_imported: bool | None, warehouse: Path | str) -> None:
    """Copy all runs of a dataset on the Hugging Face hub.

    Each run is checked as by `kdb import`. Runs that are already stored are not downloaded again. A branch, tag or
    commit may follow the name: hf://datasets/OWNER/NAME@v1.

    \b
    kdb pull hf://datasets/OWNER/NAME
    """
    from kdb.warehouse import hub
    from kdb.warehouse.store import Warehouse

    hub.HubRepo.of(url)  # before a warehouse is created
    storage = Warehouse.create(warehouse).storage
    for run, copied in hub.pull(url, storage, preferred=bool(prefer_imported)):
        _tell_imported(storage, storage.listed(run), copied, prefer_imported)


@click.command("import")
@click.argument("folder", type=Location(), metavar="FOLDER|URL")
@prefer_option
@warehouse_option
def import_(folder: Path | str, prefer_imported: bool | None, warehouse: Path | str) -> None:
    """Copy all runs of another warehouse to this one.

    The other warehouse is, for example, an exported one. Each run is checked first: its files' checksums, columns and
    types, and that its id follows from its settings. A run is imported completely or not at all; one that is already
    stored is skipped. Table runs records the source and the time. Local runs take precedence over imported ones, unless
    --prefer-imported is given.

    \b
    kdb import shared/
    kdb import shared/ --prefer-imported
    """
    from kdb.warehouse.imports import Origin, import_run
    from kdb.warehouse.store import Warehouse, storage_at

    source = storage_at(folder)
    storage, origin = Warehouse.create(warehouse).storage, Origin(source.location, bool(prefer_imported))
    for listed in source.run_folders():
        _tell_imported(storage, listed, import_run(storage, source.downloaded(listed), origin), prefer_imported)


def _tell_imported(storage: Storage, folder: RunFolder, copied: bool, preferred: bool | None) -> None:
    """Print a line for an imported run; change the preference, if given, of a run that was imported before."""
    from kdb.warehouse.imports import prefer

    done = "copied" if copied else "is stored already"
    if not copied and preferred is not None and prefer(storage, storage.listed(folder.run), preferred):
        done += ", and now takes precedence" if preferred else ", and no longer takes precedence"
    _tell(folder, done)


def _chosen(opened: Warehouse, runs: tuple[str, ...], models: tuple[str, ...], datasets: tuple[str, ...]) -> list[str]:
    """Return the chosen runs, each after the run that it was computed from."""
    from kdb.warehouse.values import check_known

    rows = {row["run"]: row for row in opened.sql("SELECT run, model, dataset, source_run FROM runs").to_dicts()}
    stored = {"run": runs, "model": models, "dataset": datasets}
    for kind, names in stored.items():
        check_known(kind, names, {row[kind] for row in rows.values()}, "`kdb runs` lists what is stored.")
    wanted = [
        run
        for run, row in rows.items()
        if (run in runs or row["model"] in models or not (runs or models))
        and (row["dataset"] in datasets or not datasets)
    ]
    if not wanted:
        raise QueryError("No run of these models and datasets is stored. `kdb runs` lists what was measured.")
    chosen: dict[str, None] = {}
    for run in wanted:
        source = rows[run]["source_run"]
        if source in rows:
            chosen[source] = None
        chosen[run] = None
    return list(chosen)


def _copy(source: Storage, target: Storage, runs: Iterable[str]) -> None:
    from kdb.warehouse.run_copy import copy_run

    for run in runs:
        folder = source.find(run)
        _tell(folder, "copied" if copy_run(target, folder) else "is stored already")


def _tell(folder: RunFolder, done: str) -> None:
    say(f"{folder.model} on {folder.dataset}: {done} (run {folder.run})")
