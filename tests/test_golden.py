"""A slice of benchmarks/golden.py: each real model on one dataset, every layer of both sites, and on a few prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kdb.ingest.forward.decomposition import decompose
from kdb.warehouse.store import Warehouse

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import golden  # what is compared is written there and in its siblings, once
import golden_attribution
import golden_effects

pytestmark = pytest.mark.slow

FIXTURES = {"smollm2": "smollm2_135m", "gemma3": "gemma_3_270m"}


def test_every_layer_agrees_with_the_golden_values(gemma_3_270m: object, shared: Path, tmp_path: Path) -> None:
    del gemma_3_270m  # skips if absent
    warehouse = Warehouse.create(tmp_path / "w")
    run = golden.measure(warehouse, "gemma3", "cities", shared / "golden", shared / "data/concept_depth")
    expected = json.loads((shared / "golden/concept_depth_gemma3.json").read_text())
    for site in golden.SITES:
        found = golden.compare(warehouse, run, expected, "gemma3", "cities", site)
        assert found.problems == (), found


def test_every_layer_agrees_on_the_published_split(smollm2_135m: object, shared: Path, tmp_path: Path) -> None:
    del smollm2_135m  # skips if absent
    warehouse = Warehouse.create(tmp_path / "w")
    data = shared / "data/concept_depth"
    run = golden.measure(warehouse, "smollm2", "coinflip", shared / "golden", data, published=True)
    expected = json.loads((shared / "golden/published_split_smollm2.json").read_text())
    for site in golden.SITES:
        assert golden.compare_published(warehouse, run, expected, "coinflip", site) == []


@pytest.mark.parametrize(("model", "n"), [("smollm2", 3), ("gemma3", 2)])
def test_attribution_agrees_with_the_golden_values(
    model: str, n: int, shared: Path, request: pytest.FixtureRequest
) -> None:
    decomposition = decompose(request.getfixturevalue(FIXTURES[model]))
    expected = json.loads((shared / f"golden/attribution_{model}.json").read_text())
    found = golden_attribution.compare(
        decomposition, expected, n, n_ranked=1
    )  # rankings by rank are the expensive part
    assert [c for c in found if c.problems] == []
    assert sum(c.n_values for c in found) > 500 * n


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_effects_and_readouts_agree_with_the_golden_values(
    model: str, shared: Path, request: pytest.FixtureRequest
) -> None:
    decomposition = decompose(request.getfixturevalue(FIXTURES[model]))
    expected = json.loads((shared / f"golden/effects_{model}.json").read_text())
    found = golden_effects.compare(decomposition, expected, shared / "golden/effects_prompts.csv", n=1)
    assert [c for c in found if c.problems] == []
    assert sum(c.n_values for c in found) > 1000
