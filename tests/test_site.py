"""The pages that `make site` generates, and what they say of columns."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from kdb.analysis.figures import FIGURES
from kdb.cli import main
from kdb.queries.catalogue import load_catalogue
from kdb.queries.columns import MEANINGS, UNITS
from kdb.warehouse.answer_columns import answer_columns

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="the site is built with the dependency group docs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_every_column_that_a_query_returns_has_one_meaning() -> None:
    found = answer_columns()
    assert set(found) == set(load_catalogue())
    assert {column.name for columns in found.values() for column in columns if not column.meaning} == set()


def test_no_meaning_is_of_a_column_that_no_query_returns() -> None:
    returned = {column.name for columns in answer_columns().values() for column in columns}
    assert {*MEANINGS, *UNITS} <= returned


def test_the_pages_have_every_command_query_figure_and_column(hooks: ModuleType) -> None:
    headings = re.findall(
        r"^#{2,3} (?:kdb )?(.*)$", "\n".join([hooks.commands(), hooks.queries(), hooks.figures()]), re.M
    )
    assert {*load_catalogue(), *FIGURES} <= set(headings)
    groups = [(name, command) for name, command in main.commands.items()]
    runs = [
        f"runs {name}"
        for name, command in groups
        if name == "runs" and isinstance(command, click.Group)
        for name in command.commands
    ]
    assert {*main.commands, *runs} <= set(headings)
    returned = {column.name for columns in answer_columns().values() for column in columns}
    assert set(re.findall(r"^\| `(\w+)` \|", hooks.columns(), re.M)) == returned


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(hooks: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("material")
    packages = tmp_path / "packages/kdb"
    packages.mkdir(parents=True)
    for part in [*(ROOT / "kdb").iterdir(), *(ROOT / name for name in ("ingest", "analysis", "queries", "warehouse"))]:
        (packages / part.name).symlink_to(part)
    settings = (ROOT / "mkdocs.yml").read_text().replace("paths: [.types]", f"paths: [{packages.parent}]")
    settings = settings.replace("docs_dir: docs", f"docs_dir: {ROOT}/docs").replace(
        "[docs/hooks.py]", f"[{ROOT}/docs/hooks.py]"
    )
    (tmp_path / "mkdocs.yml").write_text(settings)
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    pages = [page.read_text() for page in (tmp_path / "site").rglob("*.html")]
    assert len(pages) > 20
    loaded = [tag for page in pages for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", page)]
    assert [
        tag for tag in loaded if re.search(r"""(src|href)=["']?(https?:)?//""", tag) and "canonical" not in tag
    ] == []
