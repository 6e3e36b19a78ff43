"""Options and output that commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kdb.queries.catalogue import Param

if TYPE_CHECKING:
    import polars as pl

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_WAREHOUSE = "kdb-warehouse"
FORMATS = ("table", "csv", "json", "markdown", "parquet")
_CLICK_TYPES: dict[str, click.ParamType[Any]] = {
    "text": click.STRING,
    "texts": click.STRING,
    "integer": click.INT,
    "number": click.FLOAT,
}
_SUFFIXES = {".csv": "csv", ".json": "json", ".md": "markdown", ".parquet": "parquet"}


class Location(click.Path):
    """A folder, as a Path, or a URL such as s3://bucket/prefix, as it is given."""

    name = "location"

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A URL is not a path: as one, it would lose a slash."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


def warehouse_option(command: Command) -> Command:
    """``--warehouse DIR`` or a URL, else $KDB_WAREHOUSE, else ./kdb-warehouse."""
    return click.option(
        "--warehouse",
        type=Location(),
        envvar="KDB_WAREHOUSE",
        default=DEFAULT_WAREHOUSE,
        show_default=True,
        help="Folder of the warehouse, or its URL (s3://, gs://, az://); else $KDB_WAREHOUSE.",
    )(command)


def output_options(command: Command) -> Command:
    """``--format`` and ``-o``."""
    command = click.option(
        "--format", "format_", type=click.Choice(FORMATS), help="Else by the ending of -o, else table."
    )(command)
    return click.option(
        "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write; else the terminal."
    )(command)


def output_path(command: Command) -> Command:
    """``-o FILE``, which has to be given."""
    return click.option(
        "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write."
    )(command)


def param_option(param: Param) -> click.Option:
    """The option for a parameter of a saved query or a figure."""
    several = param.type == "texts"
    default = "" if param.default is None else f"  [default: {param.default}]"
    return click.Option(
        [f"--{param.name.replace('_', '-')}", param.name],
        type=_CLICK_TYPES[param.type],
        multiple=several,
        required=param.required,
        help=param.meaning + "; repeatable" * several + default,
    )


@contextlib.contextmanager
def notes_shown() -> Iterator[None]:
    """Print on stderr what kdb notes beside its answers, each note once."""
    from kdb.warehouse.notes import noted

    found: list[str] = []
    try:
        with noted(found):
            yield
    finally:
        for note in found:
            click.echo(f"Note: {note}", err=True)


def show(frame: pl.DataFrame, format_: str | None, output: Path | None) -> None:
    """Write a frame as the user asked for it, and say on stderr if it has no rows."""
    format_ = format_ or _SUFFIXES.get(output.suffix if output else "", "table")
    if format_ == "parquet":
        if output is None:
            raise click.UsageError("--format parquet writes a file: name it with -o FILE.")
        _write(output, lambda path: frame.write_parquet(path))
    elif output is not None:
        _write(output, lambda path: path.write_text(_text(frame, format_) + "\n"))
    else:
        click.echo(_text(frame, format_))
    if frame.is_empty():
        click.echo("No rows. `kdb runs` shows what was measured.", err=True)


def _write(output: Path, write: Callable[[Path], object]) -> None:
    try:
        write(output)
    except OSError as error:
        raise click.UsageError(f"Cannot write {str(output)!r}: {error.strerror or error}.") from error


def _text(frame: pl.DataFrame, format_: str) -> str:
    from kdb.formats import flat

    if format_ == "csv":
        return flat(frame).write_csv().rstrip("\n")
    if format_ == "json":
        return frame.write_json()
    return _drawn(frame, format_)


def _drawn(frame: pl.DataFrame, format_: str) -> str:
    import polars as pl

    if format_ == "markdown":
        frame = frame.with_columns(pl.col(pl.String).str.replace_all("|", r"\|", literal=True))
    with pl.Config(
        tbl_formatting="ASCII_MARKDOWN" if format_ == "markdown" else "UTF8_FULL_CONDENSED",
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=-1,
        fmt_str_lengths=10_000,
        fmt_table_cell_list_len=4,
        tbl_hide_column_data_types=True,
        tbl_hide_dataframe_shape=True,
    ):
        return str(frame.with_columns(pl.col(pl.Float64, pl.Float32).round(4)))
