"""Warehouses that grow: 81 runs, nine models on nine datasets, of as many neuron scores, vectors or folders as asked.

The numbers are invented; all is written through the real lake, in the order in which ingest writes it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.synthetic import (
    CATEGORIES,
    NINE_CONCEPTS,
    NINE_MODELS,
    SITES,
    Concept,
    Model,
    describe,
    rng_of,
    score_rows,
)

from kdb.ingest.rows import arrow_rows
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.manifest import run_id
from kdb.warehouse.run_folders import partitions
from kdb.warehouse.schema import arrow_schema
from kdb.warehouse.staged_run import StagedRun
from kdb.warehouse.sums import write_neuron_sums
from kdb.warehouse.vectors import activation_groups

HIDDEN = 32
"""Entries of a vector: a hundredth of a real model's, so that ten million fit."""

RUN = {"study": "knowledge", "variant": "default", "settings": "{}", "seed": 42, "kdb_version": "0"}
TOP_K = 300
POOL = 8192
"""Neurons of a component that are ever among a run's best."""


def build(folder: Path, rows: int) -> Path:
    """A warehouse of that many neuron scores, half of them FFN neurons', unless it is there already."""
    each = rows // (len(NINE_MODELS) * len(NINE_CONCEPTS))
    n_prompts = max(len(CATEGORIES), each // (2 * TOP_K))
    for model, concept, staged in _runs(folder):
        for table, part in _tables(model, concept, n_prompts, max(1, each // (2 * n_prompts))):
            staged.write(table, "part", [part])
        write_neuron_sums(staged)
    return folder


def build_vectors(folder: Path, rows: int) -> Path:
    """A warehouse of about that many activation vectors."""
    layers = sum(model.n_layers for model in NINE_MODELS) * len(NINE_CONCEPTS)
    ids = np.arange(max(1, rows // (len(SITES) * layers)))
    for model, concept, staged in _runs(folder):
        shape = (len(ids), model.n_layers, len(SITES), HIDDEN)
        vectors = rng_of(model.name, concept.name, "vectors").normal(0, 1, shape).astype(np.float32)
        staged.write("activations", "part", activation_groups(ids.tolist(), SITES, vectors))
    return folder


def build_folders(folder: Path, runs: int) -> Path:
    """A warehouse of that many tiny runs: the first one's files under other names."""
    model = NINE_MODELS[0]
    scores = arrow_rows("layer_scores", {"prompt_id": 0, "layer": np.arange(model.n_layers), "score": 1.0})
    for _, _, staged in _runs(folder):
        staged.write("layer_scores", "part", [scores])
    lake = FolderStorage(folder)
    first = lake.run_folders()[0].path
    for i in range(len(lake.run_folders()), runs):
        target = lake.local.lake / partitions(model.name, f"copy-{i}", run_id({"copy": i}))
        for file in filter(Path.is_file, first.rglob("*")):
            (target / file.relative_to(first)).parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target / file.relative_to(first))
    return folder


def _runs(folder: Path) -> Iterator[tuple[Model, Concept, StagedRun]]:
    """The 81 runs that do not stand yet, each committed once it is filled."""
    lake = FolderStorage.create(folder)
    for model in NINE_MODELS:
        for concept in NINE_CONCEPTS:
            run = run_id({"model": model.name, "dataset": concept.name})
            with lake.stage(run, model.name, concept.name) as staged:
                if not staged.committed:
                    describe(staged, model, "knowledge")
                    yield model, concept, staged
                    staged.commit(RUN)


def _tables(model: Model, concept: Concept, n_prompts: int, k: int) -> Iterator[tuple[str, pa.Table]]:
    """Yield the tables of a run of the knowledge study, and the probe scores of a concept run."""
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
        "expert": pa.nulls(total, pa.int16()),
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
