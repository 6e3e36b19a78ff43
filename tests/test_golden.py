"""A slice of benchmarks/golden.py: each real model on one dataset, every layer of both sites."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kdb.warehouse.store import Warehouse

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import golden  # benchmarks/golden.py: what is compared is written there, once


@pytest.mark.parametrize(("model", "dataset"), [("smollm2", "cities"), ("gemma3", "cities")])
def test_every_layer_agrees_with_the_golden_values(
    model: str, dataset: str, shared: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue({"smollm2": "smollm2_135m", "gemma3": "gemma_3_270m"}[model])  # skips if absent
    warehouse = Warehouse.create(tmp_path / "w")
    run = golden.measure(warehouse, model, dataset, shared / "golden", shared / "data/concept_depth")
    expected = json.loads((shared / f"golden/concept_depth_{model}.json").read_text())
    for site in golden.SITES:
        found = golden.compare(warehouse, run, expected, model, dataset, site)
        assert found.problems == (), found
