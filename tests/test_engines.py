"""Other engines read the warehouse: the scripts of docs/engines.md agree, and columns have their types."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import test_knowledge_run as knowledge
from click.testing import Result

import kdb
from kdb.errors import UnknownNameError

pytestmark = pytest.mark.cluster

PAGE = Path(__file__).parents[1] / "docs/engines.md"
ODD = "org/tiny 50%"
"""A model's name that no folder can have."""

NUMBER = "007"
"""A model's name that is text and looks like none."""

facts, known, ranked = knowledge.facts, knowledge.known, knowledge.ranked  # fixtures

TYPES = {
    "DuckDB": "dict(zip(table(name).columns, map(str, table(name).types)))",
    "Polars": "{column: str(kind) for column, kind in of_one_model(name).collect().schema.items()}",
    "Spark": "dict(table(name).dtypes)",
    "Ray Data": "{column: str(kind) for column, kind in zip(table(name).schema().names, table(name).schema().types)}",
}
"""For each engine, the expression that gives the column types of a table that it reads."""

SHOW_TYPES = """
import json

def of_one_model(name):
    model = "tiny" if name == "activations" else "*"
    return pl.scan_parquet(f"kdb-warehouse/lake/model={model}/*/*/{name}/*.parquet")

for name in ("head_scores", "activations"):
    print(json.dumps(TYPES))
"""


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    measured: Path,
    tiny_model: Path,
    facts: Path,
    run_kdb: Callable[..., Result],
) -> Path:
    """A folder with a ``kdb-warehouse``: two runs with scores of heads, one of a model with an odd name, and vectors.

    Files hold model, dataset and run as columns of their own, beside those of the path.
    """
    folder = tmp_path_factory.mktemp("engines")
    warehouse = Path(shutil.copytree(measured, folder / "kdb-warehouse"))
    ingest = ("ingest", "--model", tiny_model, "--dataset", facts, "--warehouse", warehouse)
    for options in (["--name", NUMBER], ["--name", ODD, "--limit", "9"]):
        result = run_kdb(*ingest, *options)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> Callable[[str], list[str]]:
    """The lines that an engine's script prints: those of the page, and the types."""

    def run(engine: str) -> list[str]:
        result = _run(_script(engine) + SHOW_TYPES.replace("TYPES", TYPES[engine]), folder)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run


def _script(engine: str) -> str:
    (script,) = re.findall(rf"## {engine}\n\n```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return str(script)


def _run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(script)
    environment = {**os.environ, "RAY_ADDRESS": "local"}  # not the cluster of another test
    return subprocess.run([sys.executable, path.name], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[str]:
    """The ten best heads, by kdb's own views."""
    rows = kdb.open(folder / "kdb-warehouse").sql("""
        SELECT s.model, category, layer, head, round(avg(score), 6) AS mean
        FROM head_scores s JOIN prompts USING (run, prompt_id)
        GROUP BY ALL ORDER BY mean DESC, model, category, layer, head LIMIT 10
    """)
    assert {*rows["model"]} == {NUMBER, ODD}
    return [" ".join(map(str, row)) for row in rows.rows()]


@pytest.mark.parametrize(
    ("engine", "types"),
    [
        ("DuckDB", ("INTEGER", "SMALLINT", "DOUBLE", "FLOAT[]", "VARCHAR")),
        ("Polars", ("Int32", "Int16", "Float64", "Array(Float32, shape=(16,))", "String")),
        ("Spark", ("int", "smallint", "double", "array<float>", "string")),
        ("Ray Data", ("int32", "int16", "double", "fixed_size_list<element: float>[16]", "string")),
    ],
)
def test_an_engine_finds_the_same_heads(
    engine: str, types: tuple[str, ...], printed: Callable[[str], list[str]], expected: list[str]
) -> None:
    if engine == "Spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed")
    *lines, scores, activations = printed(engine)
    assert lines == expected
    integer, small, double, vector, text = types
    places = dict.fromkeys(("model", "dataset", "run"), text)
    assert json.loads(scores) == {"prompt_id": integer, "layer": small, "head": small, "score": double, **places}
    assert json.loads(activations) == {
        "prompt_id": integer,
        "layer": small,
        "site": text,
        "vector": vector,
        **places,
    }


def test_the_files_of_a_table_are_those_of_the_manifests(folder: Path) -> None:
    warehouse = kdb.open(folder / "kdb-warehouse")
    files = warehouse.files("head_scores")
    assert len(files) == 2
    stray = Path(files[0]).with_name("stray.parquet")
    shutil.copyfile(files[0], stray)
    assert warehouse.files("head_scores") == files
    stray.unlink()
    with pytest.raises(UnknownNameError):
        warehouse.files("heads")


def test_the_page_has_no_other_script() -> None:
    assert re.findall(r"## (.*)\n\n```python", PAGE.read_text()) == list(TYPES)
    assert PAGE.read_text().count("```python") == len(TYPES)
