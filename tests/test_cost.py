"""The cost of a run is counted in operations and bytes before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kdb.ingest import cost as costs
from kdb.ingest.datasets import load_dataset
from kdb.ingest.job import Job
from kdb.ingest.models.find import find_model
from kdb.ingest.models.load import count_params, load_config
from kdb.ingest.settings import Attributing, Measuring, Probing


def test_the_cost_of_attribution_counts_forward_passes_and_rows_of_the_vocabulary(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "gemm_rate", lambda *_: 1e9)
    source = find_model(str(tiny_model))
    attributing = Attributing(ablate_k=0, effects=False)
    job = Job(source, load_dataset("knowledge", limit=3), Measuring(), Probing(), attributing=attributing)
    found = costs.cost(job, "cpu")
    vocab, hidden, layers, heads, passes = 256, 16, 2, 2, 3
    # Each prompt runs to be judged, to be attributed, and for the candidates of its category.
    blocks = count_params(load_config(source)) - vocab * hidden
    lens = 1 + 2 * layers
    candidates = layers + 2 * 64
    readouts = 6 * layers + lens + layers * heads + 2 * 300 + candidates + 2
    flops = 2 * blocks * found.n_tokens + 2 * vocab * hidden * readouts * found.n_prompts
    assert found.n_prompts == 18
    assert found.n_tokens % passes == 0
    assert found.phases["Attributing"] == pytest.approx(flops / 0.35e9)
    assert found.disk_bytes == (80 * 2 * (300 + 64) + 120 * lens) * found.n_prompts
    with_effects = costs.cost(replace(job, attributing=Attributing(ablate_k=0)), "cpu")
    # Six more passes of each prompt, and ten of its last token.
    assert with_effects.n_tokens == found.n_tokens // passes * (passes + 6) + 10 * found.n_prompts
    more = 2 * blocks * (with_effects.n_tokens - found.n_tokens) + 2 * vocab * hidden * 16 * found.n_prompts
    assert with_effects.seconds - found.seconds == pytest.approx(more / 0.35e9)
    assert found.seconds == found.phases["Loading"] + found.phases["Attributing"]
