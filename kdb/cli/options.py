"""Options and output that commands share."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from kdb.cli.completion import DEFAULT_WAREHOUSE, STORED, stored
from kdb.errors import QueryError, UnknownNameError
from kdb.queries.catalogue import Param
from kdb.tables import View, draw
from kdb.text import markdown_table, one_line, visible

if TYPE_CHECKING:
    import polars as pl

Command = TypeVar("Command", bound=Callable[..., Any])

FORMATS = ("table", "csv", "json", "markdown", "parquet", "xlsx")
_BINARY = ("parquet", "xlsx")
_CLICK_TYPES: dict[str, click.ParamType[Any]] = {
    "text": click.STRING,
    "texts": click.STRING,
    "integer": click.INT,
    "number": click.FLOAT,
    "boolean": click.BOOL,
}
_SUFFIXES = {
    ".csv": "csv",
    ".json": "json",
    ".md": "markdown",
    ".parquet": "parquet",
    ".xlsx": "xlsx",
    ".txt": "table",
    "": "table",
}
_WIDTH = 100
"""Width of a table that is not printed on a terminal."""
_DEFAULT_VIEW = View()
_ENTRIES = 4
"""Maximum number of entries of a list that a Markdown table shows."""


class Location(click.Path):
    """A folder, as a Path, or a URL such as s3://bucket/prefix, as text."""

    name = "location"

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a URL unchanged, since a Path would remove a slash, and anything else as a Path."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


class PlanFile(click.Path):
    """An existing file with a plan of runs."""

    name = "plan"

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path of the file; fail if there is none."""
        if not Path(value).exists() or Path(value).is_dir():
            self.fail(
                f"there is no plan {str(value)!r}. A plan is a YAML file of runs. Models and datasets are named by "
                "options: --model NAME --dataset NAME.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class PlanCommand(click.Command):
    """A command with an optional plan, which is not confused with a value given to an option that takes none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Fail at a word that follows a switch, such as ``--noise 0.5``, unless a file has this name."""
        switches = {
            name for one in self.params if getattr(one, "is_flag", False) for name in (*one.opts, *one.secondary_opts)
        }
        for option, word in itertools.pairwise(args):
            if option in switches and not word.startswith("-") and not Path(word).exists():
                raise click.UsageError(f"Option '{option}' takes no value. Remove {word!r}.", ctx)
        return super().parse_args(ctx, args)


def warehouse_option(command: Command) -> Command:
    """``--warehouse DIR`` or a URL; defaults to $KDB_WAREHOUSE, then to ./kdb-warehouse."""
    return click.option(
        "--warehouse",
        type=Location(),
        envvar="KDB_WAREHOUSE",
        default=DEFAULT_WAREHOUSE,
        show_default=True,
        help="Folder of the warehouse, or its URL (s3://, gs://, az://); defaults to $KDB_WAREHOUSE.",
    )(command)


def table_options(command: Command) -> Command:
    """``--wide``, ``--columns``, ``--vertical`` and ``--no-pager``, which the command receives as its `view`."""

    @functools.wraps(command)
    def viewed(*args: Any, wide: bool, columns: str | None, vertical: bool, no_pager: bool, **kwargs: Any) -> Any:
        names = tuple(filter(None, map(str.strip, (columns or "").split(","))))
        if columns is not None and not names:
            raise click.UsageError("--columns needs names, separated by commas: --columns layer,accuracy.")
        if vertical and kwargs.get("format_") not in (None, "table"):
            raise click.UsageError("--vertical is for tables. Leave it out, or leave --format out.")
        return command(*args, view=View(wide, names, vertical, paged=not no_pager), **kwargs)

    for option in (
        click.option("--no-pager", is_flag=True, help="Print a long table without a pager."),
        click.option("--vertical", is_flag=True, help="Table with a line for each value, one row after the other."),
        click.option("--columns", metavar="A,B", help="Only these columns, in this order."),
        click.option("--wide", is_flag=True, help="Table with all columns and whole texts, however wide."),
    ):
        viewed = option(viewed)
    return cast("Command", viewed)


def output_options(command: Command) -> Command:
    """``--format`` and ``-o``, checked before the command does anything, and those of tables."""

    @functools.wraps(command)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if kwargs["output"] is not None:
            check_output(kwargs["output"], None if kwargs["format_"] else _SUFFIXES)
        return command(*args, **kwargs)

    with_format: Command = click.option(
        "--format",
        "format_",
        type=click.Choice(FORMATS),
        help="Output format; defaults to the file ending of -o, then to table.",
    )(table_options(cast("Command", checked)))
    return click.option(
        "-o",
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        help="File to write; defaults to the terminal.",
    )(with_format)


def check_output(output: Path, endings: Iterable[str] | None) -> None:
    """Raise QueryError if the file's folder does not exist, or its name has none of the endings."""
    if endings is not None and output.suffix.lower() not in endings:
        raise QueryError(f"-o {output.name!r}: expected a file that ends in {', '.join(filter(None, endings))}.")
    if not output.parent.is_dir():
        raise QueryError(
            f"Cannot write {str(output)!r}: there is no folder {str(output.parent)!r}. Create it, or name another file."
        )


def output_path(command: Command) -> Command:
    """``-o FILE``, which is required."""
    return click.option(
        "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write."
    )(command)


def param_option(param: Param) -> click.Option:
    """Return the option for a parameter of a saved query or a figure."""
    several, flag = param.type == "texts", param.type == "boolean"
    default = "" if param.default is None or flag else f"  [default: {param.shown_default}]"
    return click.Option(
        [f"--{param.name.replace('_', '-')}", param.name],
        type=_CLICK_TYPES[param.type],
        multiple=several,
        shell_complete=stored(param.name) if param.name in STORED else None,
        is_flag=flag or None,  # False would make the next word, such as -1, an option of its own
        required=param.required,
        help=param.meaning + "; repeatable" * several + default,
    )


@contextlib.contextmanager
def notes_shown() -> Iterator[None]:
    """Print kdb's notes about an answer on stderr, each note once."""
    from kdb.warehouse.notes import noted

    notes: list[str] = []
    try:
        with noted(notes):
            yield
    finally:
        for note in notes:
            click.echo(f"Note: {note}", err=True)


class FiniteRange(click.FloatRange):
    """A range of numbers that refuses NaN. Click accepts it, because every comparison with NaN is false."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number if it is within the range."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


def show(frame: pl.DataFrame, format_: str | None, output: Path | None, view: View = _DEFAULT_VIEW) -> None:
    """Write a frame in the requested format, and report on stderr if it has no rows.

    Raises UnknownNameError for a column of the view that the frame lacks.
    """
    format_ = format_ or (_SUFFIXES[output.suffix.lower()] if output else "table")
    frame = _chosen(frame, view.columns)
    if output is not None:
        from kdb.analysis.save import write_whole

        write_whole(output, _content(frame, format_, view))
        say(f"Wrote {len(frame):,} rows to {output}.", err=True)
    elif format_ in _BINARY:
        raise click.UsageError(f"--format {format_} needs a file. Name it with -o FILE.")
    elif format_ == "table":
        _show_table(frame, view)
    else:
        text = _text(frame, format_, view)
        say(text) if sys.stdout.isatty() else click.echo(text, color=True)
    if frame.is_empty():
        click.echo("No rows. `kdb runs` lists what was measured; with --help, a query says what it needs.", err=True)


def say(text: str, *, err: bool = False) -> None:
    """Print a text that may contain untrusted names; escape sequences in them do not reach the terminal."""
    click.echo(visible(text), err=err)


def _chosen(frame: pl.DataFrame, columns: tuple[str, ...]) -> pl.DataFrame:
    for name in columns:
        if name not in frame.columns:
            known = ", ".join(map(one_line, frame.columns))
            raise UnknownNameError("column", name, frame.columns, f"The columns are {known}.")
    return frame.select(list(dict.fromkeys(columns))) if columns else frame


def _show_table(frame: pl.DataFrame, view: View) -> None:
    """Print a table, in colour on a terminal, and by a pager if the screen is too small for it."""
    if not sys.stdout.isatty():
        click.echo(_table(frame, view, _WIDTH))
        return
    screen = shutil.get_terminal_size((_WIDTH, 24))
    text = _table(frame, view, screen.columns, bold=not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")
    if view.paged and os.environ.get("PAGER") != "cat" and text.count("\n") + 2 > screen.lines:
        os.environ.setdefault("LESS", "-RS")  # -S: a wide table scrolls sideways
        click.echo_via_pager(text)
    else:
        click.echo(text)


def _table(frame: pl.DataFrame, view: View, width: int, *, bold: bool = False) -> str:
    from kdb.formats import as_text

    return as_text(frame, "table", lambda rows: draw(rows, view, width=width, bold=bold))


def _content(frame: pl.DataFrame, format_: str, view: View) -> bytes:
    from kdb.formats import to_xlsx

    if format_ == "xlsx":
        return to_xlsx(frame)
    if format_ != "parquet":
        return f"{_text(frame, format_, view)}\n".encode()
    content = io.BytesIO()
    frame.write_parquet(content)
    return content.getvalue()


def _text(frame: pl.DataFrame, format_: str, view: View) -> str:
    from kdb.formats import as_text, to_csv, to_json

    if format_ == "csv":
        return to_csv(frame).rstrip("\n")
    if format_ == "json":
        return to_json(frame)
    return _table(frame, view, _WIDTH) if format_ == "table" else as_text(frame, format_, _markdown)


def _markdown(frame: pl.DataFrame) -> str:
    import polars as pl

    rounded = frame.with_columns(map(_rounded, frame.select(pl.col(pl.Float64, pl.Float32))))
    return "\n".join(markdown_table(frame.columns, ([_cell(one) for one in row] for row in rounded.rows())))


def _rounded(column: pl.Series) -> pl.Series:
    """Return numbers with four decimals; as text, with two significant digits, where small ones would read as 0."""
    import polars as pl

    small = (column != 0) & (column.abs() < _SMALLEST)
    if not small.any():
        return column.round(4)
    texts = [f"{x:.2g}" if x and abs(x) < _SMALLEST else str(round(x, 4)) for x in column.fill_null(0.0)]
    readable = pl.Series(column.name, texts)
    return readable.set(column.is_null(), None)


_SMALLEST = 0.001
"""Size below which a number is shown with an exponent, in a column that has one which four decimals do not show."""


def _cell(value: Any) -> str:
    """Return a value for a Markdown table; a long list is shortened as on the terminal."""
    if isinstance(value, list):
        shown = value if len(value) <= _ENTRIES else [*value[: _ENTRIES - 1], "…", value[-1]]
        return f"[{', '.join(map(_cell, shown))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
