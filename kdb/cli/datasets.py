"""Commands about datasets: list those that have a name, and download their published files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdb.cli.completion import measurable
from kdb.cli.options import output_options, say, show
from kdb.errors import DatasetError
from kdb.tables import View

if TYPE_CHECKING:
    from kdb.ingest.datasets.fetch import File

_DATA_DIR = click.Path(path_type=Path)


@click.group(invoke_without_command=True)
@click.option(
    "--data-dir",
    type=_DATA_DIR,
    envvar="KDB_DATA_DIR",
    help="Folder with the files of datasets; defaults to $KDB_DATA_DIR, then to the cache folder.",
)
@output_options
@click.pass_context
def datasets(ctx: click.Context, data_dir: Path | None, format_: str | None, output: Path | None, view: View) -> None:
    """List the datasets that have a name, and whether each is available here; or download their files.

    A file of your own needs no entry here: name it with `kdb ingest --dataset my.csv`.

    \b
    kdb datasets
    kdb datasets fetch cities known-1000
    """
    import polars as pl

    from kdb.ingest.datasets import available_datasets

    ctx.obj = data_dir
    if ctx.invoked_subcommand is None:
        rows = [(i.name, i.study, i.status, i.size, i.source, i.where or None) for i in available_datasets(data_dir)]
        names = ["name", "study", "here", "prompts", "source", "folder"]
        show(pl.DataFrame(rows, dict.fromkeys(names, pl.String), orient="row"), format_, output, view)


@datasets.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=measurable("dataset"))
@click.option(
    "--data-dir", type=_DATA_DIR, help="Folder for the files, made if needed; defaults to that of `kdb datasets`."
)
@click.pass_obj
def fetch(parent_dir: Path | None, names: tuple[str, ...], data_dir: Path | None) -> None:
    """Download the published files of datasets, verified by their SHA-256; without NAME, of all datasets.

    Files that are in the folder already are verified, and not downloaded again. For a file that cannot be downloaded,
    the message says where it is published, and where to put it.

    \b
    kdb datasets fetch cities known-1000
    kdb datasets fetch --data-dir papers
    """
    from kdb.ingest.datasets.catalogue import available_datasets, published_files
    from kdb.ingest.datasets.fetch import cache_dir

    folder = data_dir or parent_dir or cache_dir()
    chosen = dict.fromkeys(names or (info.name for info in available_datasets()))
    files = {name: published_files(name) for name in chosen}  # find wrong names before any download
    failed = []
    for name in files:
        try:
            _fetch(name, files[name], folder, named=bool(names))
        except DatasetError as error:
            failed.append(f"{name}: {error}")
    if failed:
        n_datasets = sum(map(bool, files.values()))
        raise DatasetError("\n  ".join([f"{len(failed)} of {n_datasets} datasets were not fetched.", *failed]))


def _fetch(name: str, files: Sequence[File], folder: Path, *, named: bool) -> None:
    """Download or verify the files of a dataset, and print what was done; raise DatasetError at the first failure.

    A file that nobody publishes as one is an error only if the user `named` the dataset.
    """
    from kdb.ingest.datasets.fetch import fetch_file

    fetched = 0
    for file in files:
        try:
            fetched += fetch_file(file, folder)
        except DatasetError as error:
            message = f"{error} The file belongs at {folder / file.name}."
            if named or file.url_path is not None:
                raise DatasetError(message) from error
            say(f"{name}: {message}", err=True)
            return
    if files:
        done = f"{fetched} downloaded, all verified" if fetched else "verified, all there already"
        say(f"{name}: {len(files)} file{'s' * (len(files) > 1)} in {folder}, {done}.")
    elif named:
        say(f"{name} is built in, and needs no file.")
