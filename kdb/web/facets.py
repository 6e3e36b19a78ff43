"""Facets of an answer: how often each value of a column occurs, with the addresses that filter by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import polars as pl

from kdb.errors import QueryError, UnknownNameError
from kdb.web.cells import cell

COLUMNS = (
    *("model", "dataset", "category", "study", "variant", "site", "classifier", "split", "component", "part", "role"),
    *("sign", "check", "passed", "kept", "label", "correct", "is_default", "place", "lens", "replacement", "method"),
    *("effect_method", "direction", "activates", "baseline", "best", "converged"),
)
"""Columns that can be facets, in the order in which a page shows them."""

_MOST = 14
"""Maximum number of values of a facet."""


class Choice(NamedTuple):
    """One value of a facet: its text, number of rows, the address that adds or removes it, and whether it is set."""

    text: str
    n: int
    address: str
    taken: bool


class Facet(NamedTuple):
    """A column and its values."""

    column: str
    choices: list[Choice]


def facets(
    counts: Iterable[tuple[str, list[tuple[Any, int]]]], filters: Sequence[str], address: Callable[[list[str]], str]
) -> list[Facet]:
    """Return the facets of columns with their ``counts``; ``address`` is that of the page with other filters.

    A column with a single value is no facet, unless it is filtered by.
    """
    found = []
    for column, values in counts:
        choices = [_choice(column, value, count, filters, address) for value, count in values]
        if len(choices) <= _MOST and (len(choices) > 1 or any(one.taken for one in choices)):
            found.append(Facet(column, choices))
    return found


def _choice(column: str, value: Any, count: int, filters: Sequence[str], address: Callable[[list[str]], str]) -> Choice:
    own = condition(column, value)
    others = [one for one in filters if one != own]
    taken = own in filters
    return Choice(cell(value), count, address(others if taken else [*filters, own]), taken)


def condition(column: str, value: Any) -> str:
    """Return the filter for a value, as the API writes it."""
    if value is None:
        return f"{column} is null"
    return f"{column}={str(value).lower() if isinstance(value, bool) else value}"


def counts_of(frame: pl.DataFrame) -> list[tuple[str, list[tuple[Any, int]]]]:
    """Return how often each value of a column that can be a facet occurs in a frame, if it has few of them."""
    names = [name for name in COLUMNS if name in frame.columns and not frame.schema[name].is_nested()]
    few = [name for name in names if frame[name].n_unique() <= _MOST]
    return [(name, frame[name].value_counts(sort=True, name="n of kdb").rows()) for name in few]


def filtered(frame: pl.DataFrame, filters: Sequence[str]) -> pl.DataFrame:
    """Return the rows for which all filters ``COLUMN=VALUE`` hold. Raises KdbError for an unknown column."""
    for text in filters:
        column, equal, value = text.partition("=")
        null = text.endswith(" is null")
        column = text.removesuffix(" is null") if null else column
        if not equal and not null:
            raise QueryError(f"filter: expected COLUMN=VALUE or COLUMN is null, found {text!r}")
        _known(frame, column)
        frame = frame.filter(pl.col(column).is_null() if null else pl.col(column).cast(pl.String) == value)
    return frame


def ordered(frame: pl.DataFrame, sort: str | None) -> pl.DataFrame:
    """Return the rows in the order of a column; descending with ``-`` before its name."""
    if sort is None:
        return frame
    column = sort.removeprefix("-")
    _known(frame, column)
    return frame.sort(column, descending=sort.startswith("-"), nulls_last=True, maintain_order=True)


def _known(frame: pl.DataFrame, column: str) -> None:
    if column not in frame.columns or frame.schema[column].is_nested():
        raise UnknownNameError("column", column, frame.columns, "The head of the table names the columns.")
