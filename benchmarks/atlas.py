"""Measure four real, 4-bit models into one warehouse: the atlas.

    python benchmarks/assemble.py qwen2.5-coder-0.5b models
    python benchmarks/assemble.py qwen2.5-coder-1.5b models
    python benchmarks/atlas.py --models models --data-dir data --warehouse atlas
    python benchmarks/reduce_atlas.py atlas kdb/web/demo.zip

Each model is measured on the built-in concept datasets, on those of the paper's nine whose files are in --data-dir, and
in the knowledge study. Then its heads and layers are patched and ablated, every position is read by the logit lens, and
probes are transferred between datasets. Of large datasets, only some prompts are measured; what a run counts is in its
`datasets` row. The same command resumes: a stored run is skipped. No step begins after --minutes.

The plan that is printed first multiplies kdb's own estimates, which rest on this machine's speed, by factors that were
measured once; after each step, the remaining time is corrected by the time that the steps so far took.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from assemble import MODELS as ASSEMBLED

from kdb.errors import KdbError
from kdb.ingest.cost import cost
from kdb.ingest.datasets import Dataset, load_dataset
from kdb.ingest.datasets.answers import check_answers
from kdb.ingest.datasets.base import Example
from kdb.ingest.datasets.builtin import BUILT_IN
from kdb.ingest.datasets.fetch import find_file
from kdb.ingest.datasets.knowledge import KNOWLEDGE
from kdb.ingest.datasets.paper import PAPER_DATASETS
from kdb.ingest.execution.local import LocalEngine
from kdb.ingest.job import Job
from kdb.ingest.measure import ingest_on
from kdb.ingest.models.find import LoadedModel, ModelSource, find_model
from kdb.ingest.models.load import load_model, pick_device
from kdb.ingest.settings import Attributing, Measuring, Probing
from kdb.ingest.speed import calibrated
from kdb.warehouse.store import Warehouse

PROMPTS = 200
"""Prompts of each class that are measured of a dataset of the paper."""

FEWER = {"imdb": 60}
"""Prompts of each class of datasets whose texts are long."""

FACTS = 16
"""Prompts of each category in the knowledge study, spread over its relations."""

MINUTES = 140.0
"""Minutes after which no step begins."""

HEADS = 5
"""Heads that are ablated together: those with the largest mean score, at most one of a layer, so that the others of the
same layers can be their controls."""

DERIVED_SHARE = 0.2
"""Time of a model's derived runs over that of its knowledge run."""


@dataclass(frozen=True)
class AtlasModel:
    """A model of the atlas: the name under which it is stored, and what `kdb ingest --model` takes."""

    name: str
    spec: str


@dataclass(frozen=True)
class Step:
    """A run of the atlas: ``seconds`` is its estimated time, ``do`` measures it, ``done`` says whether it is stored."""

    model: str
    what: str
    kind: str
    seconds: float
    done: bool
    do: Callable[[], None]


@dataclass(frozen=True)
class Limits:
    """Numbers of prompts: of each class of a paper's dataset, and of each category of the knowledge study.

    ``built_in`` are those of each class of a built-in dataset; None means all.
    """

    prompts: int = PROMPTS
    facts: int = FACTS
    built_in: int | None = None

    def of(self, dataset: str) -> int | None:
        """Return the number of prompts of each class of a dataset of the concept study; None means all."""
        return self.built_in if dataset in BUILT_IN else min(self.prompts, FEWER.get(dataset, self.prompts))


def atlas_models(folder: Path) -> list[AtlasModel]:
    """Return the four models, the smallest first; two are files in ``folder``, made by assemble.py."""
    sizes = (("0.5b", "qwen2.5-coder-0.5b"), ("1.5b", "qwen2.5-coder-1.5b"))
    return [
        AtlasModel("smollm2-135m", "smollm2-135m"),
        AtlasModel("gemma-3-270m", "gemma-3-270m"),
        *(
            AtlasModel(f"qwen2.5-coder-{size}-instruct-q4", str(folder / ASSEMBLED[model].file))
            for size, model in sizes
        ),
    ]


# Datasets --------------------------------------------------------------------------------------------------------


def concept_datasets(data_dir: Path | None, limits: Limits) -> list[Dataset]:
    """Return the datasets whose texts are here, the one with the longest texts last; none is downloaded."""
    here = [name for name, paper in PAPER_DATASETS.items() if data_dir and find_file(paper.file, data_dir)]
    names = sorted([*BUILT_IN, *here], key=lambda name: name in FEWER)
    return [_first(load_dataset(name, data_dir=data_dir, limit=limits.of(name), download=False)) for name in names]


def knowledge_dataset(facts: int) -> Dataset:
    """Return some facts of each category of the built-in dataset, taken in turn from the relations of the category."""
    whole = load_dataset(KNOWLEDGE)
    chosen = {id(example) for example in _spread(whole.examples, facts)}
    fewer = replace(whole, examples=tuple(example for example in whole.examples if id(example) in chosen))
    check_answers(fewer)
    return _named(fewer, whole, f"{facts} prompts of each category")


def _first(dataset: Dataset) -> Dataset:
    whole = load_dataset(dataset.name, download=False) if dataset.name in BUILT_IN else None
    n = {label: sum(example.label == label for example in dataset.examples) for label in (0, 1)}
    note = f"the first {n[1]} of label 1 and {n[0]} of label 0"
    return dataset if whole is not None and whole == dataset else replace(dataset, source=f"{dataset.source}; {note}")


def _named(fewer: Dataset, whole: Dataset, note: str) -> Dataset:
    return fewer if fewer == whole else replace(fewer, source=f"{whole.source}; {note}")


def _spread(examples: Sequence[Example], n: int) -> Iterator[Example]:
    """Yield the first ``n`` examples of each category if one is taken from each of its relations in turn."""
    relations: dict[Any, dict[Any, list[Example]]] = defaultdict(lambda: defaultdict(list))
    for example in examples:
        relations[example.category][example.relation].append(example)
    for of_category in relations.values():
        turns = zip_longest(*of_category.values())
        yield from [example for turn in turns for example in turn if example is not None][:n]


# Steps -----------------------------------------------------------------------------------------------------------


class Measurement:
    """The steps of one model. Its weights are loaded once for all that are ingested."""

    def __init__(self, warehouse: Warehouse, model: AtlasModel, source: ModelSource) -> None:
        self._warehouse, self._model, self._source = warehouse, model, source
        self._loaded: list[LoadedModel] = []

    def steps(self, concepts: Sequence[Dataset], knowledge: Dataset) -> list[Step]:
        """Return all steps in order: the knowledge study, then concepts, then what is computed from these."""
        facts = self._ingest(knowledge)
        ingested = [facts, *map(self._ingest, concepts)]
        seconds = max(60.0, DERIVED_SHARE * facts.seconds)
        return [*ingested, *self._derived([dataset.name for dataset in concepts], seconds)]

    def release(self) -> None:
        """Free the memory of the weights."""
        self._loaded.clear()
        gc.collect()

    def _ingest(self, dataset: Dataset) -> Step:
        job = Job(self._source, dataset, Measuring(), Probing(), attributing=Attributing())
        done = job.run in {folder.run for folder in self._warehouse.storage.run_folders()}
        seconds = 0.0 if done else _seconds(job)
        what = f"{dataset.name}, {len(dataset.examples)} prompts"
        return Step(self._model.name, what, job.study, seconds, done, functools.partial(self._measure, job))

    def _measure(self, job: Job) -> None:
        with LocalEngine(self._load) as engine:
            ingest_on(self._warehouse.storage, job, engine)

    def _load(self) -> LoadedModel:
        if not self._loaded:
            self._loaded.append(load_model(self._source, device=pick_device(None)))
        return self._loaded[0]

    def _derived(self, concepts: Sequence[str], seconds: float) -> Iterator[Step]:
        """Yield the steps that `kdb` commands compute from stored runs."""
        model = ("--model", self._model.spec, "--name", self._model.name)
        heads = (
            "SELECT layer, 'attn' AS component, arg_max(head, score) AS head, NULL AS neuron FROM ("
            "SELECT layer, head, avg(score) AS score FROM current.head_scores "
            f"WHERE model = '{self._model.name}' AND dataset = '{KNOWLEDGE}' GROUP BY ALL"
            f") GROUP BY layer ORDER BY max(score) DESC, layer LIMIT {HEADS}"
        )
        layers = ("--component", "attn", "--component", "ffn")
        ablate = ("ablate", *model, "--label", "best-heads", "--query", heads, "--mode", "mean")
        yield self._command("effects", (KNOWLEDGE,), seconds / 3, ("patch", *model, *layers))
        yield self._command("ablations", (KNOWLEDGE,), seconds / 3, ablate)
        yield self._command("lens_readouts", (KNOWLEDGE,), seconds / 3, ("lens", *model, "--dataset", KNOWLEDGE))
        named = ("--model", self._model.name)
        for dataset in (name for name in concepts if name in BUILT_IN):
            yield self._command("projections", (dataset,), 10, ("project", *named, "--dataset", dataset))
        given = [word for name in concepts for word in ("--dataset", name)]
        yield self._command("probe_transfer", concepts, 5 * len(concepts), ("transfer", *named, *given))

    def _command(self, table: str, datasets: Sequence[str], seconds: float, command: Sequence[str]) -> Step:
        """Return the step of a `kdb` command that writes ``table`` of a run of each dataset."""
        stored = self._warehouse.sql(
            "SELECT count(DISTINCT dataset) FROM runs WHERE model = $model AND source_run IS NOT NULL "
            "AND list_contains(tables, $table) AND list_contains($datasets, dataset)",
            {"model": self._model.name, "table": table, "datasets": list(datasets)},
        ).item()
        line = [*command, "--warehouse", str(self._warehouse.storage.location)]
        what = f"{command[0]} ({table})"
        return Step(self._model.name, what, "derived", seconds, stored == len(datasets), lambda: self._run(line))

    def _run(self, line: Sequence[str]) -> None:
        self.release()
        outcome = subprocess.run([sys.executable, "-m", "kdb", *line], capture_output=True, text=True)
        if outcome.returncode:
            why = outcome.stderr.strip().splitlines()[-1:] or [f"exit status {outcome.returncode}"]
            raise KdbError(f"kdb {line[0]}: {why[0]}")


def _seconds(job: Job) -> float:
    return calibrated(cost(job, pick_device(None))).seconds


def measure(
    warehouse: Path, models: Sequence[AtlasModel], datasets: Sequence[Dataset], minutes: float = MINUTES
) -> int:
    """Measure all models on the concept datasets and the facts among ``datasets``; returns the number of steps left.

    With negative ``minutes``, only the plan is printed.
    """
    knowledge = next(dataset for dataset in datasets if dataset.study == "knowledge")
    concepts = [dataset for dataset in datasets if dataset.study == "concept"]
    opened, sources = Warehouse.create(warehouse), [find_model(model.spec, name=model.name) for model in models]
    measured = [Measurement(opened, model, source) for model, source in zip(models, sources, strict=True)]
    planned = [one.steps(concepts, knowledge) for one in measured]
    _print_plan(planned, minutes)
    if minutes < 0:
        return sum(not step.done for steps in planned for step in steps)
    clock = Clock([step for steps in planned for step in steps if not step.done], minutes)
    for one, steps in zip(measured, planned, strict=True):
        for step in steps:
            clock.carry_out(step)
        one.release()
    return clock.finish()


def _print_plan(planned: Sequence[Sequence[Step]], minutes: float) -> None:
    for steps in planned:
        left = [step for step in steps if not step.done]
        took = sum(step.seconds for step in left) / 60
        print(f"{steps[0].model}: {len(steps) - len(left)} of {len(steps)} steps stored, about {took:.0f} min left")
    total = sum(step.seconds for steps in planned for step in steps if not step.done) / 60
    until = f"; no step begins after {minutes:.0f} min" if minutes >= 0 else ""
    print(f"In all about {total:.0f} min{until}.", flush=True)


class Clock:
    """Carries out steps until the time is over; a failed step is reported, and the others continue."""

    def __init__(self, left: Sequence[Step], minutes: float) -> None:
        self._left, self._begun, self._minutes = list(left), time.monotonic(), minutes
        self._planned = self._took = 0.0

    def carry_out(self, step: Step) -> None:
        """Carry out a step unless it is stored or the time is over, and print a line about it."""
        if step.done or self._passed > self._minutes:
            return
        begun = time.monotonic()
        try:
            step.do()
            outcome = "stored"
        except KdbError as error:
            outcome = f"failed: {error}"
        else:
            self._left.remove(step)
        took = time.monotonic() - begun
        self._planned, self._took = self._planned + step.seconds, self._took + took
        print(
            f"{self._passed:5.1f} min  {step.model}  {step.what}: {outcome}, {took:.0f} s "
            f"(planned {step.seconds:.0f} s); {len(self._left)} steps left, about {self._remaining:.0f} min",
            flush=True,
        )

    def finish(self) -> int:
        """Print what is left, and return the number of steps left."""
        for step in self._left:
            print(f"Left: {step.model}  {step.what}")
        print("All steps are stored." if not self._left else "Run the same command again to continue.")
        return len(self._left)

    @property
    def _passed(self) -> float:
        return (time.monotonic() - self._begun) / 60

    @property
    def _remaining(self) -> float:
        return sum(step.seconds for step in self._left) * self._took / max(self._planned, 1e-9) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"), help="Folder of the files of assemble.py.")
    parser.add_argument("--data-dir", type=Path, help="Folder with the papers' original files.")
    parser.add_argument("--warehouse", type=Path, default=Path("atlas"), help="Folder of the warehouse.")
    parser.add_argument("--only", action="append", help="Name of a model to measure; repeatable. Default: all four.")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="Prompts of each class of a dataset of the paper.")
    parser.add_argument("--facts", type=int, default=FACTS, help="Prompts of each category of the knowledge study.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="Minutes after which no step begins.")
    parser.add_argument("--dry-run", action="store_true", help="Print the plan, and stop.")
    options = parser.parse_args()
    logging.getLogger("kdb").setLevel(logging.WARNING)
    try:
        models = [one for one in atlas_models(options.models) if not options.only or one.name in options.only]
        limits = Limits(options.prompts, options.facts)
        datasets = [*concept_datasets(options.data_dir, limits), knowledge_dataset(limits.facts)]
        print(f"Datasets: {', '.join(f'{dataset.name} ({len(dataset.examples)})' for dataset in datasets)}")
        left = measure(options.warehouse, models, datasets, -1 if options.dry_run else options.minutes)
    except KdbError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(1 if left and not options.dry_run else 0)


if __name__ == "__main__":
    main()
