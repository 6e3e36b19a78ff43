"""Imports go in the directions that CONTRIBUTING.md draws, and commands import no library that they do not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest
from helpers.tiny_llama import ASK_OPTIONS

REPOSITORY = Path(__file__).parents[1]

# Each package, and the ones that it may import. The front doors, kdb itself and kdb.cli, may import all of them.
MAY_IMPORT = {
    "errors": {"errors"},
    "queries": {"queries", "errors"},
    "warehouse": {"warehouse", "queries", "errors"},
    "ingest": {"ingest", "warehouse", "queries", "errors"},
    "analysis": {"analysis", "warehouse", "queries", "errors"},
    "front door": {"front door", "ingest", "analysis", "warehouse", "queries", "errors"},
}
BOTTOM = {"errors", "faults", "numbers", "text", "wording"}
"""Modules of kdb itself that every package may import."""

FOLDERS = ("analysis", "ingest", "queries", "warehouse")


def package_of(module: str) -> str:
    """The package of a module of kdb: ``kdb.ingest.concept.study`` is in ingest, ``kdb.cli.ask`` is a front door."""
    second = module.split(".")[1:2]
    if second and second[0] in BOTTOM:
        return "errors"
    return second[0] if second and second[0] in MAY_IMPORT else "front door"


def modules() -> Iterator[tuple[str, Path]]:
    """Every module with its package."""
    for folder in FOLDERS:
        yield from ((folder, path) for path in (REPOSITORY / folder).rglob("*.py"))
    for path in (REPOSITORY / "kdb").rglob("*.py"):
        yield "errors" if path.parent.name == "kdb" and path.stem in BOTTOM else "front door", path


def imports(path: Path, *, types: bool = True) -> Iterator[str]:
    """Every name that a file imports anywhere, inside functions too, and with ``types`` for type checkers alone."""
    for node in nodes(ast.parse(path.read_text()), types=types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it points"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def nodes(node: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    """Every node of a file; without ``types``, those under ``if TYPE_CHECKING`` are left out."""
    for child in ast.iter_child_nodes(node):
        if types or not (isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"):
            yield child
            yield from nodes(child, types=types)


IMPORTS = [(package, path.relative_to(REPOSITORY), name) for package, path in modules() for name in imports(path)]


def test_every_package_is_looked_at() -> None:
    assert {package for package, _ in modules()} == set(MAY_IMPORT)


def test_modules_import_downwards_only() -> None:
    ours = [(package, path, name) for package, path, name in IMPORTS if name.split(".")[0] == "kdb"]
    assert len(ours) > 20
    assert [(path, name) for package, path, name in ours if package_of(name) not in MAY_IMPORT[package]] == []


def test_only_the_warehouse_imports_duckdb() -> None:
    importers = {package for package, _, name in IMPORTS if name.split(".")[0] in ("duckdb", "duckdb_engine")}
    assert importers == {"warehouse"}


def test_nothing_but_the_command_line_imports_the_command_line() -> None:
    importers = {path for _, path, name in IMPORTS if name.startswith("kdb.cli")}
    assert {path for path in importers if path.parent != Path("kdb/cli")} == {Path("kdb/__main__.py")}


MATHEMATICS = {
    "ingest/concept/baselines.py",
    "ingest/concept/logistic.py",
    "ingest/concept/metrics.py",
    "ingest/concept/probes.py",
    "ingest/concept/splits.py",
    "ingest/attribution/bounds.py",
    "analysis/curves.py",
    "analysis/uncertainty.py",
}
"""Files that take arrays and return frozen results: they know no model, no runner and no database."""

ABOVE_MATHEMATICS = (
    "kdb.ingest.",
    "kdb.warehouse.",
    "kdb.queries.",
    "kdb.analysis.",
    "torch.nn",
    "transformers",
    "duckdb",
)

ROOMS = {
    "models": {"models"},
    "forward": {"forward", "models"},
    "datasets": {"datasets"},
    "execution": {"execution", "models"},
}
"""The rooms of ingest below its studies, and the rooms that each may import."""


STORAGE_KINDS = {"folder_storage", "bucket_storage"}
"""The two kinds of storage, which know nothing of each other."""

STORAGE = STORAGE_KINDS | {
    "bucket",
    "checksums",
    "commits",
    "files",
    "inspection",
    "local_folder",
    "manifest",
    "mirror",
    "parquet",
    "run_copy",
    "run_folders",
    "staged_run",
    "staging",
    "storage",
    "verification",
}
"""Files of the warehouse that keep runs: they know no SQL and no query."""

OPENERS = {"store", "hub"}
"""Files of the warehouse that choose a kind of storage; all others take any `Storage`."""


def warehouse_imports(name: str) -> set[str]:
    """The modules of the warehouse that one of its files imports."""
    names = imports(REPOSITORY / "warehouse" / f"{name}.py")
    return {n.split(".")[2] for n in names if n.startswith("kdb.warehouse.")}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "warehouse").glob("*.py")), ids=lambda path: path.stem)
def test_one_kind_of_storage_is_not_mentioned_by_the_other_or_by_those_who_use_it(path: Path) -> None:
    allowed = STORAGE_KINDS if path.stem in OPENERS else set()
    assert warehouse_imports(path.stem) & STORAGE_KINDS <= allowed


def test_front_doors_and_studies_take_any_storage() -> None:
    kinds = tuple(f"kdb.warehouse.{kind}" for kind in STORAGE_KINDS)
    assert [(path, name) for package, path, name in IMPORTS if package != "warehouse" and name.startswith(kinds)] == []


def test_a_folder_and_a_bucket_are_siblings() -> None:
    from kdb.warehouse.bucket_storage import BucketStorage
    from kdb.warehouse.folder_storage import FolderStorage
    from kdb.warehouse.storage import Storage

    assert FolderStorage.__bases__ == BucketStorage.__bases__ == (Storage,)


@pytest.mark.parametrize("name", sorted(STORAGE))
def test_storage_knows_no_sql(name: str) -> None:
    names = set(imports(REPOSITORY / "warehouse" / f"{name}.py"))
    assert {n for n in names if n.startswith("duckdb")} == set()
    assert warehouse_imports(name) & {"connection", "database", "views", "limits", "shell_file", "store"} == set()


@pytest.mark.parametrize("path", sorted(MATHEMATICS))
def test_mathematics_imports_no_model_no_runner_and_no_database(path: str) -> None:
    others = tuple("kdb." + other.removesuffix(".py").replace("/", ".") + "." for other in MATHEMATICS)
    others = tuple(f"kdb.{file.removesuffix('.py').replace('/', '.')}" for file in MATHEMATICS)
    names = {name for name in imports(REPOSITORY / path, types=False) if name.startswith(ABOVE_MATHEMATICS)}
    assert {name for name in names if not name.startswith(others)} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_only(room: str) -> None:
    files = list((REPOSITORY / "ingest" / room).rglob("*.py"))
    assert files
    entered = {
        (path.name, name)
        for path in files
        for name in imports(path, types=False)
        for other in [name.removeprefix("kdb.ingest.").split(".")[0]]
        if name.startswith("kdb.ingest.") and (REPOSITORY / "ingest" / other).is_dir() and other not in ROOMS[room]
    }
    assert entered == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    files = dict(module_files())
    graph = {
        module: {m for name in imports(path, types=False) for m in found(name, files)} for module, path in files.items()
    }
    assert len(graph) > 100
    while leaves := [module for module, below in graph.items() if not (below - {module}) & graph.keys()]:
        for module in leaves:
            del graph[module]
    # What is left imports something that is left: a circle, or what leads to one.
    circle = {module for module in graph if any(module in graph[other] - {other} for other in graph)}
    assert circle == set()


def module_files() -> Iterator[tuple[str, Path]]:
    """Every module's dotted name, with its file."""
    for package, path in modules():
        top = REPOSITORY if package in ("front door", "errors") else REPOSITORY / package
        parts = path.relative_to(top).with_suffix("").parts
        parts = parts if package in ("front door", "errors") else ("kdb", package, *parts)
        yield ".".join(part for part in parts if part != "__init__"), path


def found(name: str, files: Container[str]) -> list[str]:
    """The module that a name is imported from, or is."""
    return [m for m in (name, name.rpartition(".")[0]) if m in files][:1]


# What a command loads --------------------------------------------------------------------------------------------

MODEL_LIBRARIES = {"torch", "transformers"}
MEASURING_LIBRARIES = MODEL_LIBRARIES | {"sklearn", "scipy"}
TABLE_LIBRARIES = {"duckdb", "polars", "pyarrow", "pandas", "sqlalchemy"}

COMMAND = """
import sys
from kdb.cli import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", *{name.partition(".")[0] for name in sys.modules})
"""


def loaded_by(*args: str | Path) -> set[str]:
    """Every library in memory when the command has ended."""
    process = subprocess.run([sys.executable, "-c", COMMAND, *args], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.rpartition("loaded: ")[2].split())


@pytest.mark.parametrize(
    "args", [["--help"], ["ingest", "--help"], ["query", "--help"], ["plot", "--help"], ["queries"]]
)
def test_help_and_catalogues_load_nothing_large(args: list[str]) -> None:
    assert loaded_by(*args) & (MEASURING_LIBRARIES | TABLE_LIBRARIES) == set()


@pytest.mark.parametrize("args", [["models"], ["datasets"]])
def test_tables_of_names_load_no_model_library_and_no_sklearn(args: list[str]) -> None:
    assert loaded_by(*args) & MEASURING_LIBRARIES == set()


@pytest.mark.parametrize("args", [["query", "concept-depth"], ["sql", "SELECT 1"], ["runs"], ["verify"]])
def test_asking_loads_no_model_library_and_no_sklearn(measured: Path, args: list[str]) -> None:
    assert loaded_by(*args, "--warehouse", measured) & MEASURING_LIBRARIES == set()


def test_a_stored_probe_predicts_without_a_model_library_and_sklearn(measured: Path) -> None:
    code = (
        "import sys, kdb, numpy\n"
        "probe = kdb.open(sys.argv[1]).probe(model='tiny', dataset='weather', layer=1)\n"
        "assert probe.predict(numpy.zeros((3, 16))).shape == (3,)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    process = subprocess.run([sys.executable, "-c", code, measured], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert set(process.stdout.split()) & MEASURING_LIBRARIES == set()


@pytest.mark.slow
@pytest.mark.parametrize("command", [["probe", "--splits", "2"], ["project"], ["transfer"]])
def test_computing_from_stored_activations_loads_no_model_library(warehouse: Path, command: list[str]) -> None:
    args = (*command, "--model", "tiny", "--dataset", "weather", "--warehouse", warehouse)
    assert loaded_by(*args) & MODEL_LIBRARIES == set()


@pytest.mark.slow
def test_drawing_and_comparing_load_no_model_library(measured: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert loaded_by("report", "-o", page, "--warehouse", measured) & (MODEL_LIBRARIES | {"sklearn"}) == set()


def test_an_ingest_that_was_done_before_loads_no_model_library(
    warehouse: Path, tiny_model: Path, user_dataset: Path
) -> None:
    args = ("ingest", "--model", tiny_model, "--dataset", user_dataset, *ASK_OPTIONS, "--warehouse", warehouse)
    assert loaded_by(*args) & MEASURING_LIBRARIES == set()


def test_what_tests_and_benchmarks_share_depends_on_neither() -> None:
    """Tests run slices of benchmarks, and both use tests/helpers: so helpers import neither, and benchmarks no test."""
    tests, benchmarks = (
        {path.stem for path in (REPOSITORY / folder).glob("*.py")} for folder in ("tests", "benchmarks")
    )
    for folder, forbidden in (("tests/helpers", tests | benchmarks), ("benchmarks", tests)):
        for path in (REPOSITORY / folder).glob("*.py"):
            assert not forbidden & {name.partition(".")[0] for name in imports(path)}, path
