"""A frame as a table of text that fits a width: the tables of the command line.

    print(draw(frame, View(), width=100))

Columns that are equal in all rows are one line above the table. A column with an interval has it beside the number.
Columns that do not fit are left out, in the order that `LEFT_OUT_FIRST` declares, and named below the table.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

from kdb.numbers import is_symmetric, shown, with_interval
from kdb.text import in_line, one_line, shortened, text_width

if TYPE_CHECKING:
    import polars as pl

LEFT_OUT_FIRST = (
    # The name of a part says what these say.
    *("component", "head", "expert", "neuron", "layer", "n_layers"),
    # Where a number comes from.
    *("run", "source_run", "revision", "classifier", "split", "family", "finished_utc"),
    # A second measure of the same thing.
    *("first_within_one_se", "converged", "f1", "balanced_accuracy", "control_accuracy", "below_chance_p"),
    *("jump_layer", "converging_layer", "depth_90_layer", "bottom_tokens"),
    *("accuracy_at_25_percent", "accuracy_at_75_percent", "jump_percent", "converging_percent", "size_billions"),
)
"""Columns that a table leaves out before all others, in this order, if not all fit. Others follow from the last on."""

_NAMED = {"head_name", "expert_name", "layer_name", "neuron_name", "name"}
"""Columns that make those of `_OF_NAMES` superfluous."""
_OF_NAMES = {"component", "head", "expert", "neuron", "layer"}

_N = re.compile(r"n(_prompts|_test)?(_[ab])?")
"""Columns that are never left out: the number of prompts that a number was measured on."""
_N_NAMES = ("n_test", "n_prompts", "n")

_GAP = "  "
_CAPS = (sys.maxsize, 60, 48, 40, 32, 24)
"""Widths to which long texts are shortened, tried in this order."""
_LAST_CAPS = (16, 10, 6)
"""Widths that are tried when no column is left to leave out."""
_ENTRIES = 4
"""Maximum number of entries of a list that a table shows."""
_NULL = "–"


@dataclass(frozen=True)
class View:
    """Choices of the reader: every column, certain columns, rows as lines, and whether to use a pager."""

    wide: bool = False
    columns: tuple[str, ...] = ()
    vertical: bool = False
    paged: bool = True


@dataclass(frozen=True)
class _Column:
    """A column of the table: its values, which decide whether all rows are equal, and its cells, which are shown.

    `content` is the width of the widest cell.
    """

    name: str
    values: Sequence[Any] = field(repr=False)
    cells: Sequence[str] = field(repr=False)
    content: int
    is_number: bool
    wrapped: bool = False

    @property
    def head(self) -> list[str]:
        """Lines of the heading: the name, broken after underscores if `wrapped`."""
        name = one_line(self.name)
        return _broken(name, self.content) if self.wrapped else [name]

    @property
    def is_equal(self) -> bool:
        return all(one == other for one, other in pairwise(self.values))

    @property
    def is_n(self) -> bool:
        return bool(_N.fullmatch(self.name))

    def width(self, cap: int) -> int:
        """Width on the screen if texts are shortened to `cap`."""
        content = self.content if self.is_number else min(self.content, cap)
        return max(content, *map(text_width, self.head))


def draw(frame: pl.DataFrame, view: View, *, width: int, bold: bool = False) -> str:
    """Return the frame as text, at most `width` wide unless the view asks for all columns.

    With `bold`, escape sequences of a terminal mark the rows with rank 1 or ``best``. All other text is safe to print.
    """
    columns = _columns(frame, apart=view.wide)
    if view.vertical:
        return _vertical(columns, len(frame), width)
    above: list[_Column] = []
    fitted, cap, left_out = columns, _CAPS[0], list[str]()
    if not view.wide:
        above, columns = ([], columns) if view.columns else _shared(columns, len(frame))
        fitted, cap, left_out = _fitted(columns, width, keep=bool(view.columns))
        if len(frame) == 1 and left_out:  # one row is read as well from top to bottom, and then all of it
            return _vertical(columns, 1, width)
    marked = _marked(frame) if bold else frozenset()
    below = _below(fitted, cap, left_out, width) if len(frame) else []
    return "\n".join([*_above(above, width), *_lines(fitted, cap, marked), *below])


# Columns ---------------------------------------------------------------------------------------------------------


def _columns(frame: pl.DataFrame, *, apart: bool) -> list[_Column]:
    """Return the frame's columns, each with its interval beside the number unless `apart`."""
    n = _n_of_rows(frame)
    ends = {} if apart else dict(_intervals(frame))
    hidden = {end for pair in ends.values() for end in pair}
    return [_column(frame, name, n, ends.get(name)) for name in frame.columns if name not in hidden]


def _n_of_rows(frame: pl.DataFrame) -> list[Any]:
    for name in _N_NAMES:
        if name in frame.columns and frame.schema[name].is_integer():
            return frame[name].to_list()
    return [None] * len(frame)


def _intervals(frame: pl.DataFrame) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield each number that has an interval, with the names of the interval's ends.

    They are ``x_low`` and ``x_high`` of ``x``, or ``low`` and ``high`` of the number before them.
    """
    names = frame.columns
    for name in names:
        ends = f"{name}_low", f"{name}_high"
        if set(ends) <= set(names) and all(_may_be_number(frame[one]) for one in (name, *ends)):
            yield name, ends
    for before, low, high in zip(names, names[1:], names[2:], strict=False):
        if (low, high) == ("low", "high") and _encloses(frame, before):
            yield before, (low, high)


def _encloses(frame: pl.DataFrame, name: str) -> bool:
    rows = frame.select(name, "low", "high")
    return all(map(_may_be_number, rows)) and all(low <= x <= high for x, low, high in rows.drop_nulls().rows())


def _may_be_number(column: pl.Series) -> bool:
    return column.dtype.is_numeric() or column.null_count() == len(column)


def _column(frame: pl.DataFrame, name: str, n: Sequence[Any], ends: tuple[str, str] | None) -> _Column:
    column = frame[name]
    is_number = column.dtype.is_numeric()
    if ends is not None:
        rows = list(zip(*(frame[one].to_list() for one in (name, *ends)), strict=True))
        return _made(name, rows, _with_intervals(name, rows, n), is_number)
    values = column.to_list()
    return _made(name, values, [_cell(name, *pair) for pair in zip(values, n, strict=True)], is_number)


def _made(name: str, values: Sequence[Any], cells: Sequence[str], is_number: bool) -> _Column:
    return _Column(name, values, cells, max(map(text_width, cells), default=0), is_number)


def _with_intervals(name: str, rows: Sequence[tuple[Any, Any, Any]], n: Sequence[Any]) -> list[str]:
    known = [row for row in rows if None not in row]
    symmetric = all(is_symmetric(*row) for row in known)
    return [
        _cell(name, row[0], count) if None in row else with_interval(name, *row, count, symmetric=symmetric)
        for row, count in zip(rows, n, strict=True)
    ]


def _cell(name: str, value: Any, n: Any = None) -> str:
    if value is None:
        return _NULL
    if isinstance(value, float):
        return shown(name, value, n)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return _list(name, value)
    return in_line(json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, dict) else str(value))


def _list(name: str, values: Sequence[Any]) -> str:
    """Return a list in brackets. A long one is shortened: of numbers, only the count is shown."""
    if len(values) <= _ENTRIES:
        return f"[{', '.join(_cell(name, one) for one in values)}]"
    if all(isinstance(one, int | float) for one in values):
        return f"[{len(values)} numbers]"
    return f"[{', '.join(_cell(name, one) for one in values[: _ENTRIES - 1])}, … {len(values)} in all]"


# Fitting the width -----------------------------------------------------------------------------------------------


def _shared(columns: Sequence[_Column], n_rows: int) -> tuple[list[_Column], list[_Column]]:
    """Return the columns that are equal in all rows, and the others; none of the former if that would be all."""
    above = [column for column in columns if n_rows > 1 and column.is_equal]
    return ([], list(columns)) if len(above) == len(columns) else (above, [c for c in columns if c not in above])


def _fitted(columns: Sequence[_Column], width: int, *, keep: bool) -> tuple[list[_Column], int, list[str]]:
    """Return the columns that fit, the width of their texts, and the names of the others; with `keep`, all of them."""
    chosen, left_out = list(columns), list[str]()
    while True:
        for wrapped in (chosen, [replace(column, wrapped=True) for column in chosen]):
            for cap in _CAPS:
                if _total(wrapped, cap) <= width:
                    return wrapped, cap, _in_order(left_out, columns)
        least = None if keep else _least(chosen)
        if least is None:
            smallest = next((cap for cap in _LAST_CAPS if _total(wrapped, cap) <= width), _LAST_CAPS[-1])
            return wrapped, smallest, _in_order(left_out, columns)
        chosen.remove(least)
        left_out.append(least.name)


def _in_order(names: Sequence[str], columns: Sequence[_Column]) -> list[str]:
    return [column.name for column in columns if column.name in names]


def _total(columns: Sequence[_Column], cap: int) -> int:
    return sum(column.width(cap) for column in columns) + len(_GAP) * (len(columns) - 1)


def _least(columns: Sequence[_Column]) -> _Column | None:
    """Return the column to leave out next; None if all that are left must stay."""
    names = {column.name: column for column in columns[1:] if not column.is_n}
    superfluous = [name for name in LEFT_OUT_FIRST if name not in _OF_NAMES or _NAMED & names.keys()]
    first = next((names[name] for name in superfluous if name in names), None)
    return first or (list(names.values())[-1] if names else None)


def _broken(name: str, width: int) -> list[str]:
    """Return a name in lines, broken after underscores, as narrow as its parts and `width` allow."""
    parts = re.findall(r"[^_ ]*(?:[_ ]|$)", name)[:-1]
    widest = max(width, *map(len, parts)) if parts else width
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1] + part) > widest:
            lines.append("")
        lines[-1] += part
    return lines


# Writing ---------------------------------------------------------------------------------------------------------


def _above(columns: Sequence[_Column], width: int) -> Iterator[str]:
    """Yield the line of what all rows share, as ``model smollm2-135m · n_prompts 120``, in several if it is long."""
    known = [f"{one_line(c.name)} {shortened(c.cells[0], _CAPS[1])}" for c in columns if c.cells[0] != _NULL]
    empty = [one_line(column.name) for column in columns if column.cells[0] == _NULL]
    parts = known + ([f"without a value: {', '.join(empty)}"] if empty else [])
    line = ""
    for part in parts:
        if line and text_width(f"{line} · {part}") > width:
            yield line
            line = ""
        line = f"{line} · {part}" if line else part
    if line:
        yield from _filled(line, width)


def _lines(columns: Sequence[_Column], cap: int, marked: frozenset[int]) -> Iterator[str]:
    """Yield heading, rule and rows; those that are `marked` are bold."""
    widths = [column.width(cap) for column in columns]
    heads = [column.head for column in columns]
    for line in range(-max(map(len, heads), default=0), 0):
        yield _row(columns, widths, [head[line] if -line <= len(head) else "" for head in heads])
    yield _GAP.join("─" * width for width in widths)
    for number, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        row = _row(columns, widths, cells)
        yield click.style(row, bold=True) if number in marked else row


def _row(columns: Sequence[_Column], widths: Sequence[int], cells: Sequence[str]) -> str:
    texts = map(shortened, cells, widths)
    padded = (
        " " * (width - text_width(text)) + text if column.is_number else text + " " * (width - text_width(text))
        for column, width, text in zip(columns, widths, texts, strict=True)
    )
    return _GAP.join(padded).rstrip()


def _below(columns: Sequence[_Column], cap: int, left_out: Sequence[str], width: int) -> list[str]:
    """Return the line that says what the table does not show, and the options that show it; none if it shows all."""
    short = any(column.content > column.width(cap) for column in columns)
    said = [f"Not shown: {', '.join(map(one_line, left_out))}."] if left_out else []
    said += ["Long texts are shortened."] if short else []
    return _filled(" ".join([*said, "To see all: --wide or --vertical; --columns a,b chooses."]), width) if said else []


def _filled(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), break_on_hyphens=False)


def _vertical(columns: Sequence[_Column], n_rows: int, width: int) -> str:
    """Return rows as lines of name and value, with an empty line between rows."""
    indent = max((text_width(one_line(column.name)) for column in columns), default=0) + len(_GAP)
    rows = ([line for column in columns for line in _entry(column, row, indent, width)] for row in range(n_rows))
    return "\n\n".join("\n".join(lines) for lines in rows)


def _entry(column: _Column, row: int, indent: int, width: int) -> Iterator[str]:
    lines = _filled(column.cells[row], width - indent) or [""]
    yield (one_line(column.name).ljust(indent) + lines[0]).rstrip()
    yield from (" " * indent + line for line in lines[1:])


def _marked(frame: pl.DataFrame) -> frozenset[int]:
    """Return the numbers of the best rows: those of rank 1, or marked in the column ``best``; none if all are."""
    for name, best in (("rank", 1), ("best", True)):
        if name in frame.columns:
            rows = frozenset(number for number, value in enumerate(frame[name].to_list()) if value == best)
            return rows if len(rows) < len(frame) else frozenset()
    return frozenset()
