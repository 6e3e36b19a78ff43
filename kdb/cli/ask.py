"""Commands that query: saved queries, SQL, and the data dictionary."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import kdb
from kdb.cli import completion
from kdb.cli.options import notes_shown, output_options, param_option, show, warehouse_option
from kdb.queries.catalogue import SavedQuery, find_query, load_catalogue
from kdb.tables import View

if TYPE_CHECKING:
    from sqlalchemy import Table

_WIDEST = 100
"""Columns of a terminal that the entry of a table uses at most."""


def _grouped() -> Iterator[tuple[str, list[SavedQuery]]]:
    """The saved queries under headings, such as Concept and Knowledge."""
    for group, members in itertools.groupby(load_catalogue().values(), key=lambda saved: saved.group):
        yield group.capitalize(), list(members)


class _SavedQueries(click.Group):
    """A command for each saved query, with an option for each of its parameters."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(load_catalogue())

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, members in _grouped():
            with formatter.section(heading):
                formatter.write_dl([(saved.name, saved.title) for saved in members])

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        return _command(find_query(name))


@click.group(cls=_SavedQueries, subcommand_metavar="NAME [--PARAMETER VALUE]...")
def query() -> None:
    """Run a saved query.

    \b
    kdb query concept-depth --model smollm2-135m
    kdb query layer-accuracy --dataset cities --format csv -o cities.csv
    kdb query top-heads --model smollm2-135m --model gemma-3-270m --category capital
    """


def _command(saved: SavedQuery) -> click.Command:
    def answer(warehouse: Path | str, format_: str | None, output: Path | None, view: View, **params: Any) -> None:
        values = {name: value for name, value in params.items() if value not in (None, ())}
        with notes_shown():
            show(kdb.open(warehouse).query(saved.name, **values), format_, output, view)

    command = click.Command(
        saved.name,
        params=[param_option(param) for param in saved.params],
        callback=output_options(warehouse_option(answer)),
        help=f"{saved.title}.\n\n{saved.description}\n\nSource: {saved.reference}",
        short_help=saved.title,
    )
    command.params += getattr(answer, "__click_params__", [])
    return command


@click.command()
@click.argument("name", required=False, shell_complete=completion.queries())
def queries(name: str | None) -> None:
    """List the saved queries, or print one for the DuckDB shell.

    \b
    kdb queries
    kdb queries concept-depth | duckdb kdb-warehouse/kdb.duckdb
    """
    if name is not None:
        click.echo(find_query(name).shell_script())
        return
    for heading, members in _grouped():
        click.echo(f"{heading}\n")
        for saved in members:
            click.echo(_entry(saved) + "\n")


def _entry(saved: SavedQuery) -> str:
    """Return the lines that describe a saved query and its parameters."""
    lines = [f"{saved.name}: {saved.title}", f"    {saved.reference}"]
    for param in saved.params:
        default = "required" if param.required else f"default {param.shown_default}"
        lines.append(f"    --{param.name.replace('_', '-')} ({param.type}, {default}): {param.meaning}")
    return "\n".join(lines)


@click.command()
@click.argument("text", metavar="SELECT")
@warehouse_option
@output_options
def sql(text: str, warehouse: Path | str, format_: str | None, output: Path | None, view: View) -> None:
    """Run one SELECT statement.

    It can read the warehouse and nothing else. The tables hold everything: every variant, classifier, split and refit.
    Schema `current` has the same tables with only the newest run, variant 'default', of each study, model and dataset.
    Of probes, it has the default classifier and split.

    \b
    kdb sql "SELECT layer, accuracy FROM current.probe_scores WHERE dataset = 'cities' AND site = 'resid_post'"
    """
    with notes_shown():
        show(kdb.open(warehouse).sql(text), format_, output, view)


@click.command()
@click.argument("table", required=False, shell_complete=completion.tables())
def schema(table: str | None) -> None:
    """Print the data dictionary: tables, columns, units, meanings; or one table of it.

    \b
    kdb schema
    kdb schema probe_scores
    """
    from kdb.warehouse.schema import data_dictionary, find_table

    click.echo(data_dictionary() if table is None else _entry_of(find_table(table)), nl=False)


def _entry_of(table: Table) -> str:
    """Return the columns of a table, each with its meaning beside it, in the width of the terminal."""
    from kdb.warehouse.schema import PARTITIONS, sql_type

    formatter = click.HelpFormatter(width=min(shutil.get_terminal_size().columns, _WIDEST))
    formatter.write_text(f"{table.name}: one row per {table.comment}.")
    formatter.write_paragraph()
    rows = [(f"{name}  VARCHAR", f"{meaning}.") for name, meaning in PARTITIONS.items()]
    for column in table.columns:
        unit = f" Unit: {column.info['unit']}." if column.info["unit"] else ""
        rows.append((f"{column.name}  {sql_type(column)}", f"{column.comment}.{unit}"))
    formatter.write_dl(rows, col_max=40)
    return formatter.getvalue()
