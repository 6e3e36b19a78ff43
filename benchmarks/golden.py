"""Compare kdb with the reference numbers of an independent implementation, on both real models.

    python benchmarks/golden.py [--study knowledge] [--study effects] [--model gemma3] [--golden DIR] [--sums 1]

Concept depth, for every layer of both sites: accuracy of `logistic` within two test prompts, AUC within 0.003; J and C
equal where no ratio that decides them is within 0.005 of its threshold; `logistic-paper` within the noise that
unconverged fits show (0.075). Knowledge attribution: every quantity of every prompt, see golden_attribution.py; the
sums over all neurons only where `--sums` asks for them. Causal effects and lens readouts: see golden_effects.py. Exits
with 1 where a comparison fails. Takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from golden_attribution import Comparison, compare_sums
from golden_attribution import compare as compare_attribution
from golden_effects import compare as compare_effects

from kdb.ingest.datasets import load_dataset
from kdb.ingest.forward.decomposition import decompose
from kdb.ingest.job import Job
from kdb.ingest.measure import ingest
from kdb.ingest.models.find import LoadedModel, find_model
from kdb.ingest.models.load import load_model
from kdb.ingest.settings import Measuring, Probing
from kdb.warehouse.store import Warehouse

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"smollm2": "smollm2-135m", "gemma3": "gemma-3-270m"}
LIMITS = {"cities": None, "coinflip": None, "stsa": 800}
SITES = ("resid_post", "ffn_norm")
PAPER_NOISE = 0.075


@dataclass(frozen=True)
class Difference:
    """Differences from the golden values of one model, dataset and site; ``problems`` is empty if they are small."""

    model: str
    dataset: str
    site: str
    prompts: float
    auc: float
    paper: float
    depth: str
    problems: tuple[str, ...]


def compare(warehouse: Warehouse, run: str, golden: dict[str, Any], model: str, dataset: str, site: str) -> Difference:
    """Compare a run's scores at one site with the golden file's entry for its dataset."""
    expected = golden["datasets"][dataset]["sites"][site]
    n_test = golden["datasets"][dataset]["n_test"]
    found = {
        name: warehouse.query("layer-accuracy", run=run, site=site, classifier=name, split="paper").sort("layer")
        for name in ("logistic-raw", "logistic-paper")
    }
    optimum = expected["plain_optimum"]
    prompts = n_test * _largest(found["logistic-raw"]["accuracy"], optimum["accuracy"])
    auc = _largest(found["logistic-raw"]["auc"], optimum["auc"])
    paper = _largest(found["logistic-paper"]["accuracy"], expected["plain"]["accuracy"])
    depth = warehouse.query("concept-depth", run=run, site=site, classifier="logistic-raw").row(0, named=True)
    problems = [
        f"accuracy off by {prompts:.1f} test prompts" if prompts > 2.01 else "",
        f"AUC off by {auc:.4f}" if auc > 0.003 else "",
        f"logistic-paper off by {paper:.3f}" if paper > PAPER_NOISE else "",
        "a fit did not converge" if not found["logistic-raw"]["converged"].all() else "",
        *(_depth_problem(optimum, depth, *which) for which in (("J", "jump_layer"), ("C", "converging_layer"))),
    ]
    layers = f"J {depth['jump_layer']}, C {depth['converging_layer']}"
    return Difference(model, dataset, site, prompts, auc, paper, layers, tuple(filter(None, problems)))


def compare_published(warehouse: Warehouse, run: str, golden: dict[str, Any], dataset: str, site: str) -> list[str]:
    """Return a text for each score of ``logistic-raw`` on the published split that is too far off at some layer."""
    whole = golden["datasets"][dataset]
    expected = whole["sites"][site]
    scores = warehouse.table("probe_scores", everything=True).filter(
        run=run, site=site, classifier="logistic-raw", split="paper"
    )
    scores = scores.sort("layer")
    allowed = {"accuracy": 2.01 / whole["n_test"], "auc": 0.003, "f1_paper": 0.01, "f1": 0.01}
    names = {"f1_paper": "f1_published", "f1": "f1_label_1"}
    off = {column: _largest(scores[column], expected[names.get(column, column)]) for column in allowed}
    return [f"{column} off by {off[column]:.4f}" for column in allowed if off[column] > allowed[column]]


def _largest(found: Any, expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def _depth_problem(optimum: dict[str, Any], depth: dict[str, Any], symbol: str, column: str) -> str:
    near = optimum[f"margin_{symbol}_decisive"] <= 0.005
    wanted = optimum[f"{symbol}_layer"]
    return "" if near or depth[column] == wanted else f"{symbol} at layer {depth[column]}, expected {wanted}"


def measure(
    warehouse: Warehouse, model: str, dataset: str, golden_dir: Path, data: Path, *, published: bool = False
) -> str:
    """Ingest one model on one dataset as the golden values were made; returns the run.

    Those of the published split have the published order, the others all prompts of label 0 first.
    """
    template = json.loads((golden_dir / "templates.json").read_text())[dataset]
    texts = load_dataset(dataset, data_dir=data, template=template, limit=LIMITS[dataset])
    # Without groups there is no grouped split, of which there are no golden values.
    texts = replace(texts, examples=tuple(replace(example, group=None) for example in texts.examples))
    texts = texts if published else replace(texts, first_label=0)
    probing = Probing(classifiers=("logistic-raw", "logistic-paper"))  # all that there are golden values of
    job = Job(find_model(MODELS[model]), texts, Measuring(limit=LIMITS[dataset]), probing, custom_template=True)
    return ingest(warehouse.storage, job, functools.partial(_load, model)).run


@functools.lru_cache(maxsize=1)
def _load(model: str) -> LoadedModel:
    return load_model(find_model(MODELS[model]))


def concept(model: str, golden_dir: Path, data: Path) -> bool:
    """Measure concept depth and print a row per dataset and site; return whether all agree."""
    golden = json.loads((golden_dir / f"concept_depth_{model}.json").read_text())
    agreed = True
    print(f"\n{model:8} {'dataset':9} {'site':11} {'test prompts':>12} {'AUC':>8} {'paper':>7}  J and C")
    with tempfile.TemporaryDirectory() as folder:
        warehouse = Warehouse.create(Path(folder) / "warehouse")
        for dataset in golden["datasets"]:
            run = measure(warehouse, model, dataset, golden_dir, data)
            for site in SITES:
                d = compare(warehouse, run, golden, model, dataset, site)
                agreed &= not d.problems
                verdict = "; ".join(d.problems) or "ok"
                numbers = f"{d.prompts:12.1f} {d.auc:8.5f} {d.paper:7.4f}"
                print(f"{model:8} {dataset:9} {site:11} {numbers}  {d.depth}  {verdict}", flush=True)
        agreed &= model != "smollm2" or _published(warehouse, golden_dir, data)
    return agreed


def _published(warehouse: Warehouse, golden_dir: Path, data: Path) -> bool:
    """Measure SmolLM2 on the published split and print a row per dataset and site; return whether all agree."""
    golden, agreed = json.loads((golden_dir / "published_split_smollm2.json").read_text()), True
    for dataset in golden["datasets"]:
        run = measure(warehouse, "smollm2", dataset, golden_dir, data, published=True)
        for site in SITES:
            problems = compare_published(warehouse, run, golden, dataset, site)
            agreed &= not problems
            print(f"smollm2  {dataset:9} {site:11} published split: {'; '.join(problems) or 'ok'}", flush=True)
    return agreed


def knowledge(model: str, golden_dir: Path, n: int | None, n_sums: int) -> bool:
    """Attribute the prompts and print a row per quantity; return whether all agree."""
    golden = json.loads((golden_dir / f"attribution_{model}.json").read_text())
    decomposition = decompose(_load(model))
    comparisons = compare_attribution(decomposition, golden, n)
    if n_sums:
        comparisons += compare_sums(decomposition, golden, n_sums)
    return _agree(model, comparisons)


def effects(model: str, golden_dir: Path, n: int | None) -> bool:
    """Measure causal effects and lens readouts and print a row per quantity; return whether all agree."""
    golden = json.loads((golden_dir / f"effects_{model}.json").read_text())
    return _agree(model, compare_effects(decompose(_load(model)), golden, golden_dir / "effects_prompts.csv", n))


def _agree(model: str, comparisons: Sequence[Comparison]) -> bool:
    """Print a row per quantity; return whether all agree."""
    heading = f"{'values':>7} {'largest difference':>19} {'in the same place':>18}"
    print(f"\n{model:8} {'quantity':28} {heading}", flush=True)
    for c in comparisons:
        largest = f"{c.largest:.1e}" if c.n_values else ""
        same = f"{c.n_same} of {c.n_places}" if c.n_places else ""
        verdict = f"{len(c.problems)} out: {'; '.join(c.problems[:3])}" if c.problems else "ok"
        print(f"{model:8} {c.quantity:28} {c.n_values or '':>7} {largest:>19} {same:>18}  {verdict}", flush=True)
    return not any(c.problems for c in comparisons)


def main() -> None:
    """Measure everything, print a row per comparison, exit with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared/golden")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/concept_depth")
    parser.add_argument("--model", choices=list(MODELS), action="append")
    parser.add_argument("--study", choices=["concept", "knowledge", "effects"], action="append")
    parser.add_argument("--prompts", type=int, help="attribute and patch the first so many prompts only")
    parser.add_argument("--sums", type=int, default=0, help="score every neuron of so many prompts: minutes for each")
    options = parser.parse_args()
    agreed = True
    for model in options.model or MODELS:
        for study in options.study or ("concept", "knowledge", "effects"):
            if study == "concept":
                agreed &= concept(model, options.golden, options.data)
            elif study == "effects":
                agreed &= effects(model, options.golden, options.prompts)
            else:
                agreed &= knowledge(model, options.golden, options.prompts, options.sums)
    sys.exit(not agreed)


if __name__ == "__main__":
    main()
