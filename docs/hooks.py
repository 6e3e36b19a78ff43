"""Pages that ``make site`` adds to those in docs/, as a hook of MkDocs.

    python -m mkdocs build --strict

Commands come from click, saved queries from their catalogue, Python from docstrings. CONTRIBUTING.md and CHANGELOG.md
are in the root of the repository, where GitHub looks for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

from kdb.cli import _GROUPS as COMMANDS
from kdb.queries.catalogue import SavedQuery, load_catalogue

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
WIDTH = 100


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    made = {"commands.md": commands(), "queries.md": queries(), "api.md": API}
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
    for heading, members in COMMANDS.items():
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
API = "# Python\n\n::: kdb\n\n::: kdb.warehouse.store.Warehouse\n\n::: kdb.warehouse.probes.Probe\n"
def queries(): return "# Saved queries\n"
