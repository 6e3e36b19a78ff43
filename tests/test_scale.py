"""The benchmark of large warehouses, at a size that takes seconds: its answers are kdb's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import grown
import scale

pytestmark = pytest.mark.slow

ROWS = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse of 20,000 scores in 81 runs, with what it is compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grown, "POOL", 512)  # fewer neurons, whose tokens are most of the rows here
        built = scale.build(tmp_path_factory.mktemp("scale") / "lake", ROWS)
    scale.write_one_file(built)
    return built


def test_every_way_names_the_same_best_neurons(folder: Path) -> None:
    answers = [
        scale.QUESTIONS[name](folder)().select("model", "category", "component", "layer", "head", "neuron")
        for name in (
            "top-neurons, one model",
            "one model, bare Parquet",
            "one model, from one file",
            "one model, Polars",
        )
    ]
    rows = [sorted(answer.rows(), key=str) for answer in answers]
    assert len(rows[0]) == 6 * 2 * 10
    assert rows[1:] == rows[:-1]


def test_a_question_is_measured_and_the_model_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale.print_answers(["open, list runs"], {ROWS: folder}, "scores")
    scale.print_model(scale.sizes_of(folder))
    printed = capsys.readouterr().out
    assert f"| {ROWS:,} | open, list runs |" in printed
    assert "neuron_scores, --top-k 300 | 600 |" in printed


def test_many_runs_are_seen(tmp_path: Path) -> None:
    folder = scale.build_folders(tmp_path / "many", 90)
    assert len(scale.FOLDERS["list run folders"](folder)()) == 90
    assert scale.FOLDERS["count(*) of layer_scores"](folder)().item() == 90 * 18
