"""Sums of scores by category: what a run stores is what its parts add up to, however they were cut."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb.warehouse.parquet import write_parquet
from kdb.warehouse.schema import arrow_schema
from kdb.warehouse.sums import sum_neurons

Score = tuple[int, int | None, int, float]

CATEGORIES = ("capital", "color", "month")
scores = st.lists(
    st.tuples(st.integers(0, 8), st.sampled_from([None, 0, 1]), st.integers(0, 2), st.floats(-8, 8, width=16)),
    min_size=1,
    max_size=60,
)


def parts(folder: Path, found: list[Score], cuts: set[int]) -> list[Path]:
    """Files of scores (prompt, head, neuron, score), each with the prompts between two cuts."""
    made: dict[int, list[dict[str, object]]] = {}
    for prompt, head, neuron, score in found:
        row = {"prompt_id": prompt, "component": "ffn" if head is None else "attn", "layer": 1, "score": score}
        made.setdefault(sum(cut <= prompt for cut in cuts), []).append(row | {"head": head, "neuron": neuron})
    return [stored(folder / f"{part}.parquet", "neuron_scores", made[part]) for part in sorted(made)]


def stored(path: Path, table: str, rows: list[dict[str, object]]) -> Path:
    write_parquet(path, [pa.Table.from_pylist(rows, schema=arrow_schema(table))])
    return path


@given(found=scores, cuts=st.sets(st.integers(1, 8)))
@settings(deadline=None, max_examples=60)
def test_sums_are_those_of_the_kept_prompts_wherever_parts_are_cut(
    tmp_path_factory: pytest.TempPathFactory, found: list[Score], cuts: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("sums")
    category = {prompt: CATEGORIES[prompt % 3] for prompt in range(8)}  # the last one is not kept
    known = [{"prompt_id": i, "category": CATEGORIES[i % 3], "kept": i in category} for i in range(9)]
    prompts = [stored(folder / "prompts.parquet", "prompts", known)]
    rows = sum_neurons(parts(folder, found, cuts), [], prompts).to_pylist()
    expected: dict[tuple[str, int | None, int], tuple[float, set[int]]] = {}
    for prompt, head, neuron, score in found:
        if prompt in category:
            total, seen = expected.get((category[prompt], head, neuron), (0.0, set()))
            expected[category[prompt], head, neuron] = total + score, seen | {prompt}
    assert {(r["category"], r["head"], r["neuron"]): (r["total"], r["n_prompts"]) for r in rows} == {
        place: (pytest.approx(total, abs=1e-9), len(seen)) for place, (total, seen) in expected.items()
    }
    assert len(rows) == len(expected)
    assert {r["component"] for r in rows if r["head"] is None} <= {"ffn"}
