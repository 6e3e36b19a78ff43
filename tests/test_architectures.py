"""One tiny architecture of each kind against plain transformers, and whether the comparison sees what is wrong.

benchmarks/architectures.py does the same with every architecture, and writes docs/architectures.md.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from kdb.errors import ModelError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import architectures
import measure_architecture
import tiny_architectures
from architectures import DTYPES, STUDIES, Worker, bound, faults, line, page
from measure_architecture import Outcome, Run, TinyModel, compare_concept, compare_knowledge, ingested, measure_type

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[1] / "docs/architectures.md"
KINDS = {
    "llama": "dense",
    "gptj": "dense, eager",
    "mixtral": "experts",
    "qwen3_5_text": "hybrid",
    "mamba": "state-space",
    "llava": "wrapper, dense",
    "mllama": "dense",  # no auto class lists it, and it calls some blocks only for images
}


# One of each kind ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_each_kind_is_measured_as_the_page_says(name: str) -> None:
    found: list[Outcome] = []
    measure_type(name, STUDIES, ["float32"], found.append)
    assert found[-1].kind == KINDS[name]
    assert not faults(found)
    documented = next(row for row in PAGE.read_text().splitlines() if row.startswith(f"| {name} |"))
    for run, cell in zip(found[-1].runs.values(), documented.split(" | ")[2:], strict=True):
        bounds = re.match(r"< (1e-\d+)", cell)
        assert bounds, f"{name} was measured, and {PAGE.name} says {cell!r}: run `make architectures`"
        assert max(run.differences.values()) < float(bounds[1])
        assert not run.missing


@pytest.mark.slow
def test_a_type_that_is_no_decoder_is_no_success() -> None:
    found: list[Outcome] = []
    measure_type("bert", ["concept"], ["float32"], found.append)
    assert found[-1].kind == "masked"
    assert found[-1].runs["concept float32"].status == "refused"


# Wrong numbers ---------------------------------------------------------------------------------------------------


class Changed:
    """A warehouse in which one column of one table is a little off."""

    def __init__(self, stored: Any, table: str, column: str) -> None:
        self.stored, self.table, self.column = stored, table, column

    def sql(self, query: str) -> pl.DataFrame:
        changed = f"(SELECT * REPLACE ({self.column} + 0.01 AS {self.column}) FROM {self.table})"
        frame: pl.DataFrame = self.stored.sql(query.replace(f"FROM {self.table}", f"FROM {changed}"))
        return frame


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("llama")
    return TinyModel(type(tiny_architectures.save_model("llama", folder)), folder, "float32")


@pytest.fixture(scope="module")
def attributed(llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ingested(llama, "knowledge", tmp_path_factory.mktemp("knowledge"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "column", "what"),
    [
        ("layer_scores", "score", "layers"),
        ("head_scores", "score", "heads"),
        ("neuron_scores", "score", "neurons"),
        ("neuron_scores", "coefficient", "coefficients"),
    ],
)
def test_a_wrong_score_is_a_fault(attributed: Any, llama: TinyModel, table: str, column: str, what: str) -> None:
    assert compare_knowledge(attributed, llama).status == "measured"
    run = compare_knowledge(Changed(attributed, table, column), llama)
    assert run.status == "fault"
    assert f"{what} differ by" in run.message


@pytest.mark.slow
def test_a_wrong_state_is_a_fault(llama: TinyModel, tmp_path: Path) -> None:
    stored = ingested(llama, "concept", tmp_path)
    assert compare_concept(stored, llama).status == "measured"

    class Off:
        def sql(self, query: str) -> pl.DataFrame:
            frame: pl.DataFrame = stored.sql(query)
            return (
                frame.with_columns(vector=pl.col("vector").list.eval(pl.element() * 1.01))
                if "vector" in query
                else frame
            )

    run = compare_concept(Off(), llama)
    assert (run.status, run.message) == ("fault", "states differ by 1.0e-02")


# Faults ----------------------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_a_fault_in_one_line(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: Any) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr(measure_architecture, "ingested", fails)
    run = measure_architecture.measure(llama, "concept", "dense")
    assert run.status == "fault"
    assert run.message.startswith("ValueError: two lines (test_architectures.py:")


@pytest.mark.parametrize(("cause", "status"), [(None, "refused"), (OSError(), "refused"), (TypeError(), "fault")])
def test_a_refusal_is_a_fault_if_a_mistake_is_behind_it(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, cause: Exception | None, status: str
) -> None:
    def refuses(*_args: Any) -> None:
        raise ModelError("tiny cannot be run: why") from cause

    monkeypatch.setattr(measure_architecture, "ingested", refuses)
    assert measure_architecture.measure(llama, "concept", "dense").status == status


def crashes(pipe: Any, _studies: Any, _dtypes: Any) -> None:
    pipe.send(Outcome(pipe.recv(), "dense", runs={"concept float32": Run("measured")}))
    os._exit(3)


def hangs(pipe: Any, _studies: Any, _dtypes: Any) -> None:
    pipe.send(Outcome(pipe.recv(), "dense"))
    time.sleep(600)


def test_a_crash_is_a_fault_of_the_run_in_which_it_happened() -> None:
    outcome = Worker(STUDIES, DTYPES, limit=100, work=crashes).outcome("llama")
    assert outcome.runs["concept float32"].status == "measured"
    assert outcome.runs["concept bfloat16"].message == "the process ended with exit code 3"
    assert [run.status for run in outcome.runs.values()] == ["measured", "fault", "fault", "fault"]


def test_a_hang_is_a_fault() -> None:
    outcome = Worker(["concept"], ["float32"], limit=20, work=hangs).outcome("llama")
    assert outcome.runs["concept float32"].message == "took more than 20 s"


def test_a_type_that_cannot_be_built_is_a_fault_unless_the_reason_is_known() -> None:
    found: list[Outcome] = []
    measure_type("no_such_type", ["concept"], ["float32"], found.append)
    assert faults(found[-1:]) == ["no_such_type: " + found[-1].message]
    measure_type("gemma4_assistant", ["concept"], ["float32"], found.append)
    assert not faults(found[-1:])


# The page --------------------------------------------------------------------------------------------------------


def run(status: str = "measured", message: str = "", **differences: float) -> Run:
    return Run(status, message, differences)


def test_a_line_of_the_page_says_what_was_measured_and_why_not() -> None:
    measured = Outcome("a", "dense", runs={"concept float32": run(states=1e-6), "concept bfloat16": run(states=0.01)})
    assert line(measured, ["concept"], DTYPES) == "| a | dense | < 1e-5, < 1e-1 |"
    no = run("refused", "tiny has | no norm.")
    refused = Outcome("b", "experts", runs={f"{study} {dtype}": no for study in STUDIES for dtype in DTYPES})
    assert line(refused, STUDIES, DTYPES) == "| b | experts | refused: It has / no norm. | the same |"


def test_a_bound_is_above_thrice_the_value() -> None:
    assert [bound(3.4e-6, "float32"), bound(3.3e-6, "float32"), bound(0.0, "float32")] == ["< 1e-4", "< 1e-5", "< 1e-6"]


def test_the_page_counts_decoder_types_alone() -> None:
    outcomes = [
        Outcome("a", "dense", runs={"concept float32": run(states=1e-6)}),
        Outcome("b", "hybrid", runs={"concept float32": run("refused", "No.")}),
        Outcome("c", "masked", runs={"concept float32": run("refused", "No.")}),
    ]
    assert "Concept study: 1 in float32 of 2 decoder types measured; 0 faults." in page(
        outcomes, ["concept"], ["float32"]
    )


def test_the_page_has_a_line_for_every_type_that_this_transformers_lists() -> None:
    listed = [row.split(" | ")[0].removeprefix("| ") for row in PAGE.read_text().splitlines() if row.startswith("| ")]
    import transformers

    if f"transformers {transformers.__version__} " in PAGE.read_text():
        assert listed[2:] == architectures.all_types()
