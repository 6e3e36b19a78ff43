"""What a question costs as a warehouse grows: 1, 10 and 100 million neuron scores in 81 runs, nine models on nine datasets.

    python benchmarks/scale.py --rows 1000000 --rows 10000000 --rows 100000000 --keep DIR

The numbers are invented, written through the real lake in the order that ingest writes them. ``--keep`` leaves the
warehouses in DIR (8 GB), and reads those that are there. Each question is asked four times in a process of its
own: the first time, the median of the other three, and the peak of its memory are printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from synthetic import CATEGORIES, NINE_CONCEPTS, NINE_MODELS, SITES, Concept, Model, describe, rng_of, score_rows

from kdb.ingest.describe import arrow_rows
from kdb.warehouse.lake import Lake, run_id
from kdb.warehouse.schema import arrow_schema
from kdb.warehouse.store import Warehouse

TOP_K = 300
POOL = 8192
"""Neurons of a component that are ever among a run's best."""

DICT = pa.dictionary(pa.int8(), pa.string())


def build(folder: Path, rows: int) -> Warehouse:
    """A warehouse of that many neuron scores, half of them FFN neurons', unless it is there already."""
    lake = Lake.create(folder)
    for model in NINE_MODELS:
        for concept in NINE_CONCEPTS:
            _write_run(lake, model, concept, rows // (len(NINE_MODELS) * len(NINE_CONCEPTS)))
    return Warehouse(folder)


def _write_run(lake: Lake, model: Model, concept: Concept, rows: int) -> None:
    n_prompts = max(len(CATEGORIES), rows // (2 * TOP_K))
    with lake.stage(run_id({"model": model.name, "dataset": concept.name}), model.name, concept.name) as staged:
        if staged.committed:
            return
        describe(staged, model, "knowledge")
        for table, part in _tables(model, concept, n_prompts, max(1, rows // (2 * n_prompts))):
            staged.write(table, "part", [part])
        staged.commit({"study": "knowledge", "variant": "default", "settings": "{}", "seed": 42, "kdb_version": "0"})


def _tables(model: Model, concept: Concept, n_prompts: int, k: int) -> Iterator[tuple[str, pa.Table]]:
    """What a run of the knowledge study stores, and a concept run's probe scores."""
    rng = rng_of(model.name, concept.name, "scale")
    ids = np.arange(n_prompts)
    texts = np.array([f"Fact {i} of {concept.name} is" for i in ids], dtype=object)
    categories = np.array(CATEGORIES, dtype=object)[ids % len(CATEGORIES)]
    known = {"prompt_id": ids, "text": texts, "category": categories, "kept": True, "target_prob": 0.5}
    yield "prompts", arrow_rows("prompts", known | {"target_rank": 1, "target_token": " right", "n_tokens": 4})
    yield "neuron_scores", pa.concat_tables(_neurons(model, ids, k, c, rng) for c in ("ffn", "attn"))
    yield "neuron_tokens", pa.concat_tables(_tokens(model, c) for c in ("ffn", "attn"))
    layers = np.arange(model.n_layers)
    place = {"prompt_id": ids[:, None], "layer": layers}
    shape = (n_prompts, model.n_layers)
    yield (
        "layer_scores",
        pa.concat_tables(
            arrow_rows("layer_scores", place | {"component": c, "score": rng.random(shape)}) for c in ("attn", "ffn")
        ),
    )
    place = {"prompt_id": ids[:, None, None], "layer": layers[:, None], "head": np.arange(model.n_heads)}
    yield "head_scores", arrow_rows("head_scores", place | {"score": rng.random((*shape, model.n_heads))})
    correct = rng.random((model.n_layers, 800)) < 0.9 - 0.4 * np.exp(-layers / 4)[:, None]
    where = [{"site": site, "classifier": "logistic", "split": "paper"} for site in SITES]
    yield (
        "probe_scores",
        pa.concat_tables(score_rows(place | {"layer": layers}, correct, model.n_layers) for place in where),
    )


def _neurons(model: Model, ids: NDArray[Any], k: int, component: str, rng: np.random.Generator) -> pa.Table:
    """The k best neurons of each prompt, rank by rank; a few neurons are among nearly every prompt's of a category.

    The j-th is drawn from the j-th of k slices of the pool, whose widths grow exponentially: so none comes twice.
    """
    n = len(ids)
    common = np.arange(k) + ((POOL - k) ** ((np.arange(k) + rng.random((n, k))) / k)).astype(np.int64)
    score = rng.gamma(2.0, 0.05, (n, k)) / np.sqrt(common)
    order = np.argsort(-score, axis=1)
    score, common = np.take_along_axis(score, order, 1).ravel(), np.take_along_axis(common, order, 1)
    layer, head, neuron = places(model, component, ((common + 1361 * (ids % len(CATEGORIES))[:, None]) % POOL).ravel())
    total, ffn = n * k, component == "ffn"
    columns = {
        "prompt_id": np.repeat(ids, k),
        "component": pa.DictionaryArray.from_arrays(np.zeros(total, np.int8), [component]),
        "layer": layer,
        "head": pa.nulls(total, pa.int16()) if ffn else head,
        "neuron": neuron,
        "position": pa.nulls(total, pa.int16()) if ffn else rng.integers(2, 4, total),
        "coefficient": rng.normal(0, 3, total).astype(np.float32),
        "score": score,
        "lower": score,
        "upper": score,
        "exact": np.ones(total, np.bool_),
        "rank": np.tile(np.arange(1, k + 1), n),
    }
    schema = arrow_schema("neuron_scores")
    return pa.table([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema)


def places(model: Model, component: str, number: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Layer, head and neuron of each member of a component's pool."""
    spread = number * 48271 % 2**20  # 48271 is odd: no two members of the pool meet
    width = 2**20 // model.n_layers + 1
    within = spread % width
    if component == "ffn":
        return spread // width, np.zeros_like(number), within
    return spread // width, within % model.n_heads, within // model.n_heads


def _tokens(model: Model, component: str) -> pa.Table:
    """Ten tokens at both ends of every neuron of a pool."""
    layer, head, neuron = (a[:, None, None] for a in places(model, component, np.arange(POOL)))
    words = np.array([f" word{i}" for i in range(1000)], dtype=object)
    ranks, signs = np.arange(1, 11), np.array(["top", "bottom"], dtype=object)[:, None]
    cells = {"component": component, "layer": layer, "neuron": neuron, "sign": signs, "rank": ranks}
    if component == "attn":
        cells["head"] = head
    token = words[(neuron * 7 + ranks * 31 + (signs == "top") * 13) % len(words)]
    return arrow_rows("neuron_tokens", cells | {"token": token, "logit": 1.0 / ranks})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    for rows in args.rows:
        build(args.keep / str(rows), rows)


if __name__ == "__main__":
    main()
