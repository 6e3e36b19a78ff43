"""Warehouses of one invented probe curve."""

from __future__ import annotations

from pathlib import Path

from helpers.stored import Rows, add_run, create_lake
from helpers.synthetic import write_manifests
from kdb.warehouse.schema import SCHEMA_VERSION
from kdb.warehouse.store import Warehouse

PAPER = {"site": "resid_post", "classifier": "logistic-raw", "split": "paper"}


def curve_rows(accuracies: list[float], **place: str) -> Rows:
    """probe_scores of one curve, by default that of the paper's probe, which queries then show."""
    place = PAPER | place
    default = {"is_default": place == PAPER, "n_test": 100}
    return [
        {"layer": i, "accuracy": a, "accuracy_low": a - 0.05, "accuracy_high": a + 0.05} | place | default
        for i, a in enumerate(accuracies)
    ]


def prediction_rows(correct: list[list[int]]) -> Rows:
    """probe_predictions: a list for each layer, 1 for each test prompt that is right."""
    return [
        {"prompt_id": prompt, "layer": layer, "predicted": right, "correct": bool(right)} | PAPER
        for layer, rights in enumerate(correct)
        for prompt, right in enumerate(rights)
    ]


def baseline_rows(correct: list[int]) -> dict[str, Rows]:
    """baselines and baseline_predictions of one baseline on the paper's split, 1 for each test prompt that is right."""
    place = {"baseline": "words", "split": "paper"}
    predictions = [
        {"prompt_id": i, "predicted": right, "correct": bool(right)} | place for i, right in enumerate(correct)
    ]
    return {
        "baselines": [place | {"accuracy": sum(correct) / len(correct), "n_test": len(correct)}],
        "baseline_predictions": predictions,
    }


def warehouse_of(
    folder: Path, curves: Rows, predictions: Rows, n_layers: int, n_positive: int = 50, **more: Rows
) -> Warehouse:
    add_run(
        create_lake(folder),
        "m",
        "d",
        "e" * 16,
        models=[{"n_layers": n_layers, "family": "f", "n_params": 1000}],
        datasets=[{"study": "concept", "n_prompts": 100, "n_positive": n_positive}],
        probe_scores=curves,
        probe_predictions=predictions,
        **more,
    )
    (folder / "warehouse.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}}}')
    write_manifests(folder)
    return Warehouse(folder)
