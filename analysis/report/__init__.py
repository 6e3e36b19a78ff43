"""The report: both studies for some models side by side, as one page of HTML or as Markdown tables.

    build(kdb.open("kdb-warehouse"), ["smollm2-135m"]).html()

Every table and figure is shown with the command that produces it. Missing data are listed and cause no error.
"""

from __future__ import annotations

import base64
import importlib.metadata
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from jinja2 import Environment, FileSystemLoader

from kdb.analysis import figures
from kdb.analysis.report.contents import CHAPTERS, Drawn, Remark, Tabled
from kdb.analysis.save import to_png, to_svg
from kdb.analysis.style import look_of
from kdb.errors import KdbError, QueryError
from kdb.text import markdown, markdown_code, markdown_table, visible
from kdb.warehouse.values import check_known

if TYPE_CHECKING:
    from kdb.analysis.style import Chart
    from kdb.warehouse.store import Warehouse


@dataclass(frozen=True)
class Item:
    """A table or a figure of the report: its title, its command, and its rows or picture."""

    title: str
    note: str
    command: str
    frame: pl.DataFrame | None = None
    picture: str | None = None

    @property
    def table(self) -> str:
        """Return the rows as a Markdown table."""
        if self.frame is None:
            return ""
        return "\n".join(markdown_table(self.frame.columns, (list(map(cell, row)) for row in self.frame.iter_rows())))


@dataclass
class Report:
    """The results for some models by chapter, and the missing data."""

    models: list[str]
    chapters: dict[str, list[Item]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def html(self) -> str:
        """Return the report as one HTML page that needs no other file."""
        return self._render("page.html.j2")

    def markdown(self) -> str:
        """Return the tables as Markdown."""
        return self._render("page.md.j2")

    def _render(self, template: str) -> str:
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=template.endswith(".html.j2"),
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=lambda value: visible(value) if isinstance(value, str) else value,  # before it is escaped
        )
        environment.filters |= {"cell": cell, "markdown": markdown, "code": markdown_code}
        version, now = importlib.metadata.version("kdb-lm"), datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        return environment.get_template(template).render(report=self, version=version, now=now)


def build(wh: Warehouse, models: Sequence[str] = (), *, pictures: bool = True) -> Report:
    """Query everything that the report shows about the given models, or about all if none is given.

    Raises UnknownNameError if a given model is not stored.
    """
    with wh.snapshot() as frozen:
        report = Report(_known(frozen, models))
        for title, contents in CHAPTERS.items():
            report.chapters[title] = list(_items(frozen, report, contents, pictures))
    return report


def _known(wh: Warehouse, models: Sequence[str]) -> list[str]:
    """Return the given models, or all stored ones. Raises UnknownNameError for one that is not stored."""
    names = list(look_of(wh).models)
    check_known("model", models, names, "`kdb runs` lists what is stored.")
    return [name for name in names if not models or name in models]


def _items(wh: Warehouse, report: Report, contents: Any, pictures: bool) -> Iterator[Item]:
    for wanted in contents(wh, report.models):
        if isinstance(wanted, Remark):
            report.missing.append(f"{wanted.title}: {wanted.text}")
            continue
        try:
            yield from _table(wanted) if isinstance(wanted, Tabled) else _figure(wh, wanted, pictures)
        except KdbError as error:
            report.missing.append(f"{wanted.title}: {error}")


def _table(wanted: Tabled) -> Iterator[Item]:
    frame = wanted.frame()
    if frame.is_empty():
        raise QueryError(wanted.hint)
    yield Item(wanted.title, wanted.note, command("query", wanted.query, wanted.params), frame=frame)


def _figure(wh: Warehouse, wanted: Drawn, pictures: bool) -> Iterator[Item]:
    if not pictures:
        return
    figure = figures.find_figure(wanted.figure)
    chart = figures.chart(wh, wanted.figure, **wanted.params)
    made = command("plot", wanted.figure, wanted.params) + f" -o {wanted.figure}.html"
    made += f"   # numbers: kdb query {figure.query}"
    yield Item(wanted.title, wanted.note, made, picture=_data_uri(chart))


_LARGE_SVG = 2_000_000
"""Characters above which a picture is embedded as PNG, because a page of SVG heat maps would be slow to open."""


def _data_uri(chart: Chart) -> str:
    """Return a picture as a data URI, because several inline SVGs in one page would mix up their clip paths."""
    kind, content = "svg+xml", to_svg(chart).encode()
    if len(content) > _LARGE_SVG:
        kind, content = "png", to_png(chart, scale=1)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def command(verb: str, name: str, params: dict[str, Any]) -> str:
    """Return the command line that produces a table or figure."""
    words = ["kdb", verb, name]
    for param, value in params.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [f"--{param.replace('_', '-')}", shlex.quote(str(one))]
    return " ".join(words)


def cell(value: Any) -> str:
    """Return a value as shown in the report's tables: numbers with four significant digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    return str(value)
