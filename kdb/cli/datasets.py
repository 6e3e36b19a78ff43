"""Commands about datasets: list those that have a name, and download their published files."""

from __future__ import annotations

from pathlib import Path

import click

from kdb.cli.options import output_options, show
from kdb.tables import View


@click.group(invoke_without_command=True)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
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
