"""Asking: saved queries, SQL, and the data dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import kdb
from kdb.cli.options import output_options, show, warehouse_option
from kdb.queries.catalogue import Param, SavedQuery, find_query, load_catalogue

_CLICK_TYPES: dict[str, click.ParamType[Any]] = {"text": click.STRING, "integer": click.INT, "number": click.FLOAT}


class _SavedQueries(click.Group):
    """A command for each saved query, with an option for each of its parameters."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(load_catalogue())

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        return _command(find_query(name))


@click.group(cls=_SavedQueries, subcommand_metavar="NAME [--PARAMETER VALUE]...")
def query() -> None:
    """Answer a saved query.

    \b
    kdb query concept-depth --model smollm2-135m
    kdb query layer-accuracy --dataset cities --format csv -o cities.csv
    """


def _command(saved: SavedQuery) -> click.Command:
    def answer(warehouse: Path, format_: str | None, output: Path | None, **params: Any) -> None:
        given = {name: value for name, value in params.items() if value is not None}
        show(kdb.open(warehouse).query(saved.name, **given), format_, output)

    command = click.Command(
        saved.name,
        params=[_option(param) for param in saved.params],
        callback=output_options(warehouse_option(answer)),
        help=f"{saved.title}.\n\n{saved.description}\n\nPaper: {saved.reference}",
        short_help=saved.title,
    )
    command.params += getattr(answer, "__click_params__", [])
    return command


def _option(param: Param) -> click.Option:
    return click.Option(
        [f"--{param.name.replace('_', '-')}", param.name],
        type=_CLICK_TYPES[param.type],
        required=param.required,
        help=param.meaning + ("" if param.default is None else f"  [default: {param.default}]"),
    )


@click.command()
@click.argument("name", required=False)
def queries(name: str | None) -> None:
    """List the saved queries, or print one for the DuckDB shell.

    \b
    kdb queries
    kdb queries concept-depth | duckdb kdb-warehouse/kdb.duckdb
    """
    if name is not None:
        click.echo(find_query(name).shell_script())
        return
    for saved in load_catalogue().values():
        click.echo(f"{saved.name}: {saved.title}\n    {saved.reference}")
        for param in saved.params:
            default = "required" if param.required else f"default {param.default or 'all'}"
            click.echo(f"    --{param.name.replace('_', '-')} ({param.type}, {default}): {param.meaning}")


@click.command()
@click.argument("text", metavar="SELECT")
@warehouse_option
@output_options
def sql(text: str, warehouse: Path, format_: str | None, output: Path | None) -> None:
    """Answer one SELECT; it can read the warehouse and nothing else.

    \b
    kdb sql "SELECT layer, accuracy FROM probe_scores WHERE dataset = 'cities' ORDER BY layer"
    """
    show(kdb.open(warehouse).sql(text), format_, output)


@click.command()
def schema() -> None:
    """Print the data dictionary: tables, columns, units, meanings."""
    from kdb.warehouse.schema import data_dictionary

    click.echo(data_dictionary(), nl=False)
