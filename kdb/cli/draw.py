"""Commands that show: a summary, the figures of both papers, and the report."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

import kdb
from kdb.cli.completion import stored
from kdb.cli.options import check_output, notes_shown, output_path, param_option, say, show, warehouse_option


class _Figures(click.Group):
    """A command for each figure, with an option for each of its parameters."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from kdb.analysis.figures import FIGURES

        return list(FIGURES)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from kdb.analysis.figures import FIGURES

        with formatter.section("Figures"):
            formatter.write_dl([(figure.name, figure.title) for figure in FIGURES.values()])

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        return _command(name)


@click.group(cls=_Figures, subcommand_metavar="NAME [--PARAMETER VALUE]... -o FILE")
def plot() -> None:
    """Draw a figure to a file.

    The file can be .html (works offline), .png, .svg, .pdf, or .json (Vega-Lite). A file name that ends in .csv or
    .parquet writes the figure's numbers instead; --data writes them beside the picture.

    \b
    kdb plot depth-curves --model smollm2-135m -o depth.html
    kdb plot top-heads --category capital -o heads.png
    kdb plot depth-robustness -o robustness.csv
    kdb plot top-layers --width 240 --height 120 --theme dark -o layers.svg --data layers.csv
    """


_NUMBERS = (".csv", ".parquet")
_PIXELS, _THEMES = (
    click.IntRange(20, 4000),
    click.Choice(["paper", "dark"]),
)  # as in kdb.analysis.themes, which loads Altair
_LOOKS = (
    click.Option(["--width"], type=_PIXELS, help="Width of a panel in pixels, the widest one if they differ."),
    click.Option(["--height"], type=_PIXELS, help="Height of a panel in pixels, the highest one if they differ."),
    click.Option(["--theme"], type=_THEMES, default="paper", show_default=True, help="Colors of page and words."),
    click.Option(
        ["--data"],
        type=click.Path(dir_okay=False, path_type=Path),
        help="File for the figure's numbers beside it: .csv or .parquet.",
    ),
    click.Option(
        ["--title/--no-title"],
        default=True,
        help="Title and notes in the picture, or printed for a caption.",
    ),
)


def _command(name: str) -> click.Command:
    from kdb.analysis.figures import find_figure

    figure = find_figure(name)

    def draw(
        warehouse: Path | str,
        output: Path,
        width: int | None,
        height: int | None,
        theme: str,
        data: Path | None,
        title: bool,
        **params: Any,
    ) -> None:
        from kdb.analysis import figures, save, themes

        check_output(output, (*save.FORMATS, *_NUMBERS))
        if data is not None:
            check_output(data, _NUMBERS)
        values = {key: value for key, value in params.items() if value not in (None, ())}
        as_numbers = output.suffix.lower() in _NUMBERS
        with notes_shown(), kdb.open(warehouse).snapshot() as opened:  # opened once for all queries of a figure
            if not as_numbers:
                drawn = figures.chart(opened, name, **values)
                words = [] if title else [drawn.title.text, *drawn.title.subtitle]
                if not title:
                    drawn = drawn.properties(title="")
                save.save(themes.resized(drawn, width=width, height=height, theme=theme), output)
                say(f"Wrote {output}.", err=True)
                for line in words:
                    say(line)
            for path in filter(None, [output if as_numbers else None, data]):
                show(figures.frame(opened, name, **values), None, path)

    command = click.Command(
        name,
        params=[param_option(param) for param in figure.params],
        callback=output_path(warehouse_option(draw)),
        help=f"{figure.title}\n\n{figure.marks}\n\n`kdb query {figure.query}` prints its numbers.",
        short_help=figure.title,
    )
    command.params += [*_LOOKS, *getattr(draw, "__click_params__", [])]
    return command


_models_option = click.option(
    "--model",
    "models",
    multiple=True,
    help="Name of a stored model; repeatable.  [default: all]",
    shell_complete=stored("model"),
)
"""``--model``, of which a command receives all as its `models`."""


@click.command()
@_models_option
@click.option(
    "--format",
    "format_",
    type=click.Choice(["html", "markdown"]),
    help="Format of the report; defaults to Markdown for a file that ends in .md, otherwise HTML.",
)
@warehouse_option
@output_path
def report(models: tuple[str, ...], format_: str | None, warehouse: Path | str, output: Path) -> None:
    """Write a page with the tables and figures of both studies.

    Models are shown side by side. The HTML page needs no other file and no network, and can be printed. Markdown has
    only the tables. The report lists what was not measured.

    \b
    kdb report --model smollm2-135m -o report.html
    kdb report --model smollm2-135m --model gemma-3-270m -o report.md
    """
    from kdb.analysis.report import build
    from kdb.analysis.save import write_whole

    check_output(output, None if format_ else (".html", ".md"))
    markdown = format_ == "markdown" or (format_ is None and output.suffix.lower() == ".md")
    with notes_shown():
        built = build(kdb.open(warehouse), models, pictures=not markdown)
    write_whole(output, (built.markdown() if markdown else built.html()).encode())
    say(f"Wrote {output}.", err=True)
    for line in built.missing:
        say(f"Missing: {line}", err=True)


@click.command()
@_models_option
@warehouse_option
def summary(models: tuple[str, ...], warehouse: Path | str) -> None:
    """Say in sentences what was learnt, and what to type next.

    \b
    kdb summary
    kdb summary --model smollm2-135m
    """
    from kdb.summary import summary as lines

    default = os.environ.get("KDB_WAREHOUSE") or "kdb-warehouse"
    options = "" if str(warehouse) == default else f" --warehouse {shlex.quote(str(warehouse))}"
    with notes_shown():
        for line in lines(kdb.open(warehouse), models, options=options):
            say(line)
