"""A warehouse of realistic size with invented numbers: nine models, nine datasets, both studies.

Written through the real lake, so that it is read as any other. Numbers come from a seed and the names alone, and look
like measured ones: accuracies that rise as a sigmoid, scores that few layers, heads and neurons carry.

    build(Path("synthetic"))    # 120 MiB of Parquet, in half a minute
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdb.ingest.concept.metrics import wilson_interval
from kdb.ingest.rows import arrow_rows
from kdb.warehouse.checksums import file_record
from kdb.warehouse.files import write_json
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.manifest import MANIFEST, Manifest, run_id
from kdb.warehouse.run_folders import PLACEHOLDER
from kdb.warehouse.staged_run import StagedRun
from kdb.warehouse.store import Warehouse
from kdb.warehouse.sums import write_neuron_sums

CATEGORIES = ("language", "color", "number", "capital", "country", "month")
METHODS = (
    *("log_prob_increase", "log_prob", "prob_increase", "norm", "coefficient", "rank"),
    *("coefficient_norm", "coefficient_rank"),
)
SITES = ("resid_post", "ffn_norm")


@dataclass(frozen=True)
class Model:
    """A model's name, family and shape."""

    name: str
    family: str
    n_params: int
    n_layers: int
    n_heads: int


@dataclass(frozen=True)
class Concept:
    """A dataset's name, its prompts, and the best accuracy that a probe reaches on it."""

    name: str
    n_prompts: int
    best: float


NINE_MODELS = (
    Model("gemma-2b", "gemma", 2_500_000_000, 18, 8),
    Model("gemma-7b", "gemma", 8_500_000_000, 28, 16),
    Model("llama-7b", "llama", 6_700_000_000, 32, 32),
    Model("llama-13b", "llama", 13_000_000_000, 40, 40),
    Model("qwen-0.5b", "qwen", 500_000_000, 24, 16),
    Model("qwen-1.8b", "qwen", 1_800_000_000, 24, 16),
    Model("qwen-4b", "qwen", 4_000_000_000, 40, 20),
    Model("qwen-7b", "qwen", 7_700_000_000, 32, 32),
    Model("qwen-14b", "qwen", 14_000_000_000, 40, 40),
)
NINE_CONCEPTS = (
    Concept("cities", 1496, 0.97),
    Concept("common_claim", 6000, 0.70),
    Concept("counterfact", 4000, 0.78),
    Concept("hateeval", 6000, 0.82),
    Concept("stsa", 6920, 0.93),
    Concept("imdb", 2000, 0.95),
    Concept("sarcasm", 6000, 0.92),
    Concept("strategyqa", 2290, 0.74),
    Concept("coinflip", 500, 0.85),
)


def build(
    folder: Path,
    models: Sequence[Model] = NINE_MODELS,
    concepts: Sequence[Concept] = NINE_CONCEPTS,
    prompts_per_category: int = 45,
    top_k: int = 300,
    more_facts: Mapping[str, int] | None = None,
) -> Warehouse:
    """Write the warehouse and open it; ``prompts_per_category`` of 0 leaves the knowledge study out.

    ``more_facts`` are further datasets with the same categories: their prompts per category.
    """
    lake = FolderStorage.create(folder)
    for model in models:
        for concept in concepts:
            _write(lake, model, concept.name, "concept", _concept_tables(model, concept, concepts))
        for dataset, n in {"knowledge": prompts_per_category, **(more_facts or {})}.items():
            if n:
                _write(lake, model, dataset, "knowledge", _knowledge_tables(model, n, top_k))
    return Warehouse(folder)


def _write(lake: FolderStorage, model: Model, dataset: str, study: str, tables: Iterator[tuple[str, pa.Table]]) -> None:
    with lake.stage(run_id({"model": model.name, "dataset": dataset}), model.name, dataset) as staged:
        if staged.committed:
            return
        describe(staged, model, study)
        for table, rows in tables:
            staged.write(table, "part", [rows])
        if study == "knowledge":
            write_neuron_sums(staged)
        staged.commit({"study": study, "variant": "default", "settings": "{}", "seed": 42, "kdb_version": "0"})


def describe(staged: StagedRun, model: Model, study: str) -> None:
    structure = {
        "family": model.family,
        "source": model.name,
        "architecture": "Invented",
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "head_dim": 64,
        "hidden_size": 64 * model.n_heads,
        "intermediate_size": 64,
        "n_params": model.n_params,
        "dtype": "float32",
        "revision": "0",
    }
    staged.write_rows("models", "part", [structure])
    staged.write_rows("checks", "part", [{"check": "readout", "value": 1e-6, "tolerance": 1e-3, "passed": True}])
    if study == "knowledge":
        staged.write_rows("datasets", "part", [{"study": study, "source": "invented", "n_prompts": 0}])


def rng_of(*names: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(" ".join(map(str, names)).encode()))


# Concept depth ---------------------------------------------------------------------------------------------------


def _concept_tables(model: Model, concept: Concept, sources: Sequence[Concept] = ()) -> Iterator[tuple[str, pa.Table]]:
    n, rng = concept.n_prompts, rng_of(model.name, concept.name)
    labels = np.arange(n) % 2
    sizes = {"study": "concept", "source": "invented", "n_prompts": n, "n_positive": int(labels.sum())}
    yield "datasets", arrow_rows("datasets", {name: np.array([value]) for name, value in sizes.items()})
    texts = np.array([f"Statement {i} of {concept.name}." for i in range(n)], dtype=object)
    yield "prompts", arrow_rows("prompts", {"prompt_id": np.arange(n), "text": texts, "label": labels})
    yield from _baselines(concept, labels)
    scores, predictions = zip(*_probes(model, concept, labels, rng), strict=True)
    yield "probe_predictions", pa.concat_tables(predictions)
    yield "probe_scores", pa.concat_tables(scores)
    yes = np.clip(rng.normal(0.3 + 0.1 * labels, 0.15), 0, 0.7)
    predicted = (yes > 0.35).astype(np.int16)
    answers = {"prompt_id": np.arange(n), "positive": "yes", "negative": "no", "prob_positive": yes}
    answers |= {"prob_negative": 0.7 - yes, "predicted": predicted, "correct": predicted == labels}
    yield "zero_shot", arrow_rows("zero_shot", answers)
    yield "projections", _projections(model, labels[:400], rng)
    if sources:
        yield "probe_transfer", pa.concat_tables(_transferred(model, concept, source) for source in sources)


def _transferred(model: Model, concept: Concept, source: Concept) -> pa.Table:
    """Scores of the probes of one concept on another: they read their own best, and some read others backwards."""
    layers, own = np.arange(model.n_layers)[:, None], source == concept
    most = source.best if own else rng_of(source.name, concept.name).uniform(0.3, 0.8)
    auc = 0.5 + (most - 0.5) * layers / model.n_layers
    n = len(tested_prompts(concept)) if own else concept.n_prompts
    place = {"source_dataset": source.name, "probe_run": run_id({"model": model.name, "dataset": source.name})}
    place |= {"layer": layers, "site": np.array(SITES, dtype=object), "classifier": "logistic", "split": "grouped"}
    numbers = {"auc": auc, "auc_low": auc - 0.05, "auc_high": auc + 0.05, "accuracy": auc, "cosine": float(own)}
    return arrow_rows("probe_transfer", place | numbers | {"n": n, "n_left_out": 0})


def _baselines(concept: Concept, labels: NDArray[Any]) -> Iterator[tuple[str, pa.Table]]:
    """Yield the scores and predictions of two baselines on the test prompts of every split."""
    rng = rng_of(concept.name, "baselines")
    test = tested_prompts(concept)
    splits = np.array(["paper", "grouped"], dtype=object)
    rates = {"majority": 0.5, "words": 0.58}
    correct = np.stack([rng.random((2, len(test))) < rate for rate in rates.values()])
    place = {"baseline": np.array(list(rates), dtype=object)[:, None], "split": splits}
    accuracy = correct.mean(axis=2)
    numbers = {"accuracy": accuracy, "accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05}
    yield "baselines", arrow_rows("baselines", place | numbers | {"n_test": len(test)})
    predicted = np.where(correct, labels[test], 1 - labels[test])
    place = {name: values[..., None] for name, values in place.items()}
    cells = {"prompt_id": test, "predicted": predicted, "correct": correct}
    yield "baseline_predictions", arrow_rows("baseline_predictions", place | cells)


def tested_prompts(concept: Concept) -> NDArray[Any]:
    """Return the test prompts of every split, 40 % of all."""
    order = rng_of(concept.name, "test").permutation(concept.n_prompts)
    return np.sort(order[: round(0.4 * concept.n_prompts)])


def _probes(
    model: Model, concept: Concept, labels: NDArray[Any], rng: np.random.Generator
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Scores and predictions of every site, classifier and split; the scores count the predictions."""
    test = tested_prompts(concept)
    layers = np.arange(model.n_layers)
    middle, steep = rng.uniform(0.2, 0.5) * model.n_layers, rng.uniform(0.5, 1.5)
    curve = 0.5 + (concept.best - 0.5) / (1 + np.exp(-steep * (layers - middle)))
    for site in SITES:
        for classifier in ("logistic", "logistic-raw", "logistic-paper"):
            for split in ("paper", "grouped"):
                ease = rng.random(len(test))  # a prompt that is easy is so at every layer
                wobble = rng.normal(0, 0.05, (model.n_layers, len(test)))
                correct = ease + wobble < curve[:, None]
                place = {"layer": layers, "site": site, "classifier": classifier, "split": split}
                shown = {"is_default": (classifier, split) == ("logistic", "grouped")}
                yield score_rows(place | shown, correct, model.n_layers), _prediction_rows(place, correct, test, labels)


def score_rows(place: dict[str, Any], correct: NDArray[np.bool_], n_layers: int) -> pa.Table:
    n_test, right = correct.shape[1], correct.sum(axis=1)
    low, high = np.array([wilson_interval(r / n_test, n_test) for r in right]).T
    accuracy = right / n_test
    numbers = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "f1": accuracy, "auc": accuracy}
    numbers |= {"balanced_accuracy": accuracy, "auc_low": low, "auc_high": high}
    control = {"control_accuracy": np.full(n_layers, 0.5), "selectivity": accuracy - 0.5}
    counts = {"converged": True, "n_iter": 9, "n_train": round(n_test * 1.5), "n_test": n_test}
    return arrow_rows("probe_scores", place | {"depth": place["layer"] / n_layers} | counts | numbers | control)


def _prediction_rows(
    place: dict[str, Any], correct: NDArray[np.bool_], test: NDArray[Any], labels: NDArray[Any]
) -> pa.Table:
    predicted = np.where(correct, labels[test], 1 - labels[test])
    cells = {"prompt_id": test, "predicted": predicted, "correct": correct}
    return arrow_rows("probe_predictions", place | {"layer": place["layer"][:, None]} | cells)


def _projections(model: Model, labels: NDArray[Any], rng: np.random.Generator) -> pa.Table:
    layers = np.arange(model.n_layers)[:, None]
    apart = 3 * layers / model.n_layers * (2 * labels - 1)
    cells = {"prompt_id": np.arange(len(labels)), "pc1": apart + rng.normal(0, 1, apart.shape)}
    cells |= {"pc2": rng.normal(0, 1, apart.shape), "explained1": 0.4, "explained2": 0.1}
    return arrow_rows("projections", {"layer": layers, "site": "resid_post", "method": "pca"} | cells)


# Knowledge -------------------------------------------------------------------------------------------------------


def _knowledge_tables(model: Model, per_category: int, top_k: int) -> Iterator[tuple[str, pa.Table]]:
    rng = rng_of(model.name, "knowledge")
    n = per_category * len(CATEGORIES)
    ids, kept = np.arange(n), np.arange(n) % 10 != 9
    category = np.array(CATEGORIES, dtype=object)[ids % len(CATEGORIES)]
    texts = np.array([f"Fact {i} is" for i in ids], dtype=object)
    known = {"prompt_id": ids, "text": texts, "category": category, "kept": kept, "target_prob": rng.random(n)}
    known |= {"target_rank": np.where(kept, 1, 20), "target_token": " right", "answer": "right", "n_tokens": 4}
    yield "prompts", arrow_rows("prompts", known)
    ids = ids[kept]
    yield "layer_scores", _layer_scores(model, ids, rng)
    yield "expert_scores", _expert_scores(model, ids)
    yield "head_scores", _head_scores(model, ids, rng)
    yield "head_position_scores", _head_positions(model, ids, rng)
    yield "neuron_scores", pa.concat_tables(_neurons(model, ids, top_k, c, rng) for c in ("attn", "ffn"))
    yield "query_neuron_scores", pa.concat_tables(_queries(model, ids, top_k, c, rng) for c in ("attn", "ffn"))
    yield "query_layer_scores", _query_layers(model, ids, rng)
    yield "ablations", _ablations(ids, rng)
    yield "neuron_tokens", _tokens(model)
    yield "effects", pa.concat_tables(_effects(model, ids))
    yield "lens_readouts", _readouts(model, ids)


def _late(model: Model, rng: np.random.Generator, *shape: int) -> NDArray[np.float64]:
    """Scores that the layers three quarters of the way up carry; the last axis is the layer."""
    peak = np.exp(-0.5 * ((np.arange(model.n_layers) / model.n_layers - 0.75) / 0.1) ** 2)
    carried: NDArray[np.float64] = rng.gamma(2.0, 0.5, (*shape, model.n_layers)) * peak
    return carried


def _expert_scores(model: Model, ids: NDArray[Any]) -> pa.Table:
    """Scores of two of four experts in the last layer."""
    experts = (ids[:, None] + np.arange(2)) % 4
    scores = rng_of(model.name, "experts").normal(0.5, 0.2, experts.shape)
    places = {"prompt_id": ids[:, None], "layer": model.n_layers - 1, "expert": experts}
    return arrow_rows("expert_scores", places | {"score": scores})


def _layer_scores(model: Model, ids: NDArray[Any], rng: np.random.Generator) -> pa.Table:
    components = np.array(["attn", "ffn"], dtype=object)
    place = {"prompt_id": ids[:, None, None], "component": components[:, None], "layer": np.arange(model.n_layers)}
    return arrow_rows("layer_scores", place | {"score": _late(model, rng, len(ids), 2)})


def _head_scores(model: Model, ids: NDArray[Any], rng: np.random.Generator) -> pa.Table:
    heads = np.arange(model.n_heads)[:, None]
    carried = _late(model, rng, len(ids), model.n_heads) * rng_of(model.name, "heads").random((model.n_heads, 1))
    place = {"prompt_id": ids[:, None, None], "head": heads, "layer": np.arange(model.n_layers)}
    return arrow_rows("head_scores", place | {"score": carried / model.n_heads})


def _head_positions(model: Model, ids: NDArray[Any], rng: np.random.Generator) -> pa.Table:
    """Ten heads of each prompt at four positions."""
    heads = np.arange(10)[:, None]
    attention = rng.dirichlet(np.ones(4), (len(ids), 10))
    tokens = np.array(["Fact", " number", " one", " is"], dtype=object)
    place = {"prompt_id": ids[:, None, None], "layer": heads % model.n_layers, "head": heads % model.n_heads}
    cells = {"position": np.arange(4), "token": tokens, "attention": attention, "score": attention}
    return arrow_rows("head_position_scores", place | cells)


def _neurons(model: Model, ids: NDArray[Any], k: int, component: str, rng: np.random.Generator) -> pa.Table:
    score = -np.sort(-rng.pareto(2.0, (len(ids), k)) / 10, axis=1)
    where = rng.choice(
        model.n_layers, (len(ids), k), p=_late(model, rng_of("where"))[:] / _late(model, rng_of("where")).sum()
    )
    cells = {
        "prompt_id": ids[:, None],
        "component": component,
        "layer": where,
        "neuron": rng.integers(0, 64, (len(ids), k)),
    }
    if component == "attn":
        cells |= {"head": rng.integers(0, model.n_heads, (len(ids), k)), "position": 2}
    ends = {"coefficient": 1.0, "score": score, "lower": score, "upper": score, "exact": True}
    return arrow_rows("neuron_scores", cells | ends | {"rank": np.arange(1, k + 1)})


def _queries(model: Model, ids: NDArray[Any], k: int, activates: str, rng: np.random.Generator) -> pa.Table:
    score = -np.sort(-rng.pareto(2.0, (len(ids), k)) / 10, axis=1)
    layers = rng.integers(0, max(1, model.n_layers // 2), (len(ids), k))
    cells = {"prompt_id": ids[:, None], "activates": activates, "layer": layers, "neuron": np.arange(k)}
    return arrow_rows("query_neuron_scores", cells | {"score": score, "rank": np.arange(1, k + 1)})


def _query_layers(model: Model, ids: NDArray[Any], rng: np.random.Generator) -> pa.Table:
    components, activates = np.array(["attn", "ffn"], dtype=object), np.array(["attn", "ffn"], dtype=object)
    place = {"prompt_id": ids[:, None, None, None], "activates": activates[:, None, None]}
    place |= {"component": components[:, None], "layer": np.arange(model.n_layers)}
    return arrow_rows("query_layer_scores", place | {"score": _late(model, rng, len(ids), 2, 2)})


def _ablations(ids: NDArray[Any], rng: np.random.Generator) -> pa.Table:
    methods = np.array(METHODS, dtype=object)
    before = rng.uniform(0.3, 0.9, len(ids))[:, None]
    after = before * np.linspace(0.2, 1.0, len(METHODS)) * rng.uniform(0.8, 1.0, (len(ids), len(METHODS)))
    cells = {"prompt_id": ids[:, None], "method": methods, "k": 10, "positions": "last", "mode": "zero"}
    cells |= {"rank_before": 1, "rank_after": np.ceil(0.5 / after).astype(int), "prob_before": before}
    cells |= {"prob_after": after, "logp_before": np.log(before), "logp_after": np.log(after)}
    return arrow_rows("ablations", cells)


def _tokens(model: Model) -> pa.Table:
    ranks = np.arange(1, 11)
    words = np.array([f" word{rank}" for rank in ranks], dtype=object)
    place = {"component": "ffn", "layer": np.arange(model.n_layers)[:, None], "neuron": 0, "sign": "top"}
    return arrow_rows("neuron_tokens", place | {"rank": ranks, "token": words, "logit": 1.0 / ranks})


_REPLACED = {"role": "last", "replacement": "mean", "direction": "noising"}


def _effects(model: Model, ids: NDArray[Any]) -> Iterator[pa.Table]:
    """Yield estimates for all heads and layers, and exact effects of the heads of the layer that carries most."""
    rng, layers = rng_of(model.name, "effects"), np.arange(model.n_layers)
    weights = rng_of(model.name, "heads").random((model.n_heads, 1))
    lost = rng.normal(0, 0.01, (len(ids), model.n_heads, model.n_layers))
    lost -= _late(model, rng, len(ids), model.n_heads) * weights / model.n_heads
    place = {"prompt_id": ids[:, None, None], "head": np.arange(model.n_heads)[:, None], "layer": layers}
    numbers = {"logp": lost, "logit_diff": 2 * lost}
    yield arrow_rows("effects", place | {"component": "head", "method": "atp"} | _REPLACED | numbers)
    best = round(0.75 * model.n_layers)
    place = {"prompt_id": ids[:, None], "head": np.arange(model.n_heads), "layer": best}
    numbers = {"logp": 1.5 * lost[..., best], "kl": -lost[..., best]}
    yield arrow_rows("effects", place | {"component": "head", "method": "exact"} | _REPLACED | numbers)
    place = {"prompt_id": ids[:, None, None], "component": np.array(["attn", "ffn"], dtype=object)[:, None]}
    place |= {"layer": layers, "method": "atp"}
    yield arrow_rows("effects", place | _REPLACED | {"logp": -_late(model, rng, len(ids), 2)})


def _readouts(model: Model, ids: NDArray[Any]) -> pa.Table:
    """Readouts in which the answer becomes the first choice in one of the last layers."""
    first = rng_of(model.name, "readouts").integers(model.n_layers // 2, model.n_layers, len(ids))
    layers = np.arange(-1, 2 * model.n_layers)  # before the first block, then two places of each block
    places = np.where(layers < 0, "resid_pre", np.where(layers % 2 == 0, "resid_mid", "resid_post")).astype(object)
    known = layers // 2 >= first[:, None]
    logps = np.where(known, -0.1, -5.0)
    rows = {"prompt_id": ids[:, None], "layer": np.maximum(layers // 2, 0), "place": places, "position": 3}
    rows |= {"lens": "logit", "target_rank": np.where(known, 1, 40), "target_logp": logps, "entropy": 1.0}
    rows |= {"kl": -logps, "tokens": _lists(known, [" right", ","], [",", " right"])}
    return arrow_rows("lens_readouts", rows | {"logps": _lists(known, [-0.1, -5.0], [-0.3, -5.0])})


def _lists(known: NDArray[Any], then: list[Any], otherwise: list[Any]) -> NDArray[Any]:
    chosen = np.empty(known.shape, dtype=object)
    for place, value in np.ndenumerate(known):
        chosen[place] = then if value else otherwise
    return chosen


def write_manifests(warehouse: Path) -> None:
    """Make runs of Parquet files that were laid into a warehouse by hand."""
    for run in warehouse.glob("lake/model=*/dataset=*/run=*"):
        if PLACEHOLDER not in run.name:
            records = tuple(file_record(path, run) for path in sorted(run.rglob("*.parquet")))
            write_json(run / MANIFEST, Manifest(records).content())
