"""Pages that ``make site`` adds to those in docs/, as a hook of MkDocs.

    python -m mkdocs build --strict

Commands come from click, saved queries and figures from their catalogues, Python from docstrings. CONTRIBUTING.md and
CHANGELOG.md are in the root of the repository, where GitHub looks for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

from kdb.analysis.figures import FIGURES, Figure
from kdb.cli import GROUPS
from kdb.queries.catalogue import Param, SavedQuery, load_catalogue
from kdb.warehouse.answer_columns import AnswerColumn, answer_columns

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
WIDTH = 100
"""Columns of a command's help."""
STUDIES = {"concept": "Concept depth", "knowledge": "Knowledge attribution", "runs": "Runs and models"}
"""Headings of the groups of saved queries."""
DOCUMENTED = (
    "kdb",
    "kdb.warehouse.store.Warehouse",
    "kdb.warehouse.probes.Probe",
    "kdb.analysis.figures.frame",
    "kdb.analysis.figures.chart",
    "kdb.ingest.datasets.catalogue.load_dataset",
    "kdb.errors",
)
"""Objects of the page on Python, whose docstrings it shows."""


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    made = {"commands.md": commands(), "queries.md": queries(), "figures.md": figures(), "columns.md": columns()}
    made["api.md"] = "\n\n".join(["# Python reference", *(f"::: {name}" for name in DOCUMENTED)])
    made |= {page: (ROOT / name).read_text() for name, page in FROM_ROOT.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links between docs/ and the root lead to the pages of the site."""
    if page.file.src_uri in FROM_ROOT.values():
        markdown = markdown.replace("](docs/", "](")
    for name, target in FROM_ROOT.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(name)}", f"]({target}", markdown)
    return markdown


def commands() -> str:
    """Return the page of all commands, with the text that ``--help`` prints."""
    lines = ["# Commands", "", "What `kdb COMMAND --help` prints. Options follow the command in any order.", ""]
    for heading, members in GROUPS.items():
        lines += [f"## {heading}", ""]
        for command in members:
            lines += _command(command, f"kdb {command.name}")
    return "\n".join(lines)


def _command(command: click.Command, path: str) -> Iterator[str]:
    """Yield the help of a command and of its subcommands."""
    context = click.Context(command, info_name=path, max_content_width=WIDTH, terminal_width=WIDTH)
    yield from (f"### {path}", "", "```text", command.get_help(context), "```", "")
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        found = command.get_command(context, name)
        assert found is not None
        yield from _command(found, f"{path} {name}")


def queries() -> str:
    """Return the page of all saved queries, with their parameters and the columns of their answers."""
    found, of = load_catalogue().values(), answer_columns()
    lines = ["# Saved queries", "", "`kdb query NAME` runs one. An option may follow for each parameter.", ""]
    for group in dict.fromkeys(saved.group for saved in found):
        lines += [f"## {STUDIES[group]}", ""]
        for saved in (one for one in found if one.group == group):
            lines += _query(saved, of[saved.name])
    return "\n".join(lines)


def _query(saved: SavedQuery, found: Sequence[AnswerColumn]) -> Iterator[str]:
    yield from (f"### {saved.name}", "", f"**{saved.title}.**", "", saved.description, "", f"*{saved.reference}*", "")
    yield from _parameters(saved.params)
    rows = [(f"`{one.name}`", one.type, one.unit, one.meaning) for one in found]
    yield from _table(("column", "type", "unit", "meaning"), rows)


def _parameters(params: Sequence[Param]) -> Iterator[str]:
    if params:
        options = [(f"`--{p.name.replace('_', '-')}`", p.type, _default(p), p.meaning) for p in params]
        yield from _table(("option", "type", "default", "meaning"), options)


def _default(param: Param) -> str:
    return "required" if param.required else param.shown_default


def figures() -> str:
    """Return the page of all figures, with the query that each draws and its parameters."""
    lines = ["# Figures", "", "`kdb plot NAME -o FILE` draws one. An option may follow for each parameter.", ""]
    for figure in FIGURES.values():
        lines += _figure(figure)
    return "\n".join(lines)


def _figure(figure: Figure) -> Iterator[str]:
    query = f"[`{figure.query}`](queries.md#{figure.query})"
    yield from (f"## {figure.name}", "", f"**{figure.title}** It draws the rows of {query}.", "", figure.marks, "")
    yield from _parameters(figure.params)


def columns() -> str:
    """Return the page of all columns that saved queries return."""
    used: dict[str, list[str]] = {}
    meaning: dict[str, AnswerColumn] = {}
    for query, found in answer_columns().items():
        for one in found:
            used.setdefault(one.name, []).append(f"[{query}](queries.md#{query})")
            meaning[one.name] = one
    rows = [(f"`{name}`", meaning[name].unit, meaning[name].meaning, ", ".join(used[name])) for name in sorted(used)]
    note = "Every column that a [saved query](queries.md) returns. [Tables](schema.md) have more."
    return "\n".join(["# Column names", "", note, "", *_table(("column", "unit", "meaning", "queries"), rows)])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, and an empty one."""
    for cells in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
