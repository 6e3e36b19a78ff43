"""One run, from prompts to commit: describe, capture, probe, make visible.

Each stage writes parts into staging and reads what the stage before it stored; so whatever is finished when a
run is cut off is not computed again, and probes refit without the model.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdb.errors import WarehouseError
from kdb.ingest import knowledge
from kdb.ingest.anatomy import SITES
from kdb.ingest.datasets import Dataset
from kdb.ingest.describe import check_length, describe_run, read_parts, table_files
from kdb.ingest.job import Job, Measuring, Probing
from kdb.ingest.models import LoadedModel, load_config, load_tokenizer
from kdb.ingest.progress import progress
from kdb.warehouse.lake import Lake, RunFolder, StagedRun, run_id
from kdb.warehouse.schema import arrow_schema
from kdb.warehouse.vectors import activation_groups, prompts_per_part, read_vectors

if TYPE_CHECKING:
    from kdb.ingest.probes import Split

log = logging.getLogger(__name__)

_PROBE_MEMORY = 4 * 2**30
_MATRIX_COPIES = 4
"""Copies of a layer's matrix in float64 that fitting holds at its peak."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``committed`` now, or ``exists`` from before."""

    run: str
    status: str


def ingest(lake: Lake, job: Job, load: Callable[[], LoadedModel], *, batch_tokens: int | None = None) -> Outcome:
    """Measure one model on one dataset and commit the run; a no-op where that run exists.

    ``load`` loads the model and is called only if something is still to be captured.
    Raises DatasetError, ModelError or WarehouseError; what is finished stays in staging, and the same job
    goes on from there.
    """
    with lake.stage(job.run, job.source.name, job.dataset.name) as staged:
        if staged.committed:
            return Outcome(job.run, "exists")
        if job.study == "knowledge":
            knowledge.measure(staged, job, load, batch_tokens)
        else:
            _measure_concept(staged, job, load, batch_tokens)
        staged.commit(_run_row(job, staged.facts.get("device")))
    return Outcome(job.run, "committed")


def _measure_concept(staged: StagedRun, job: Job, load: Callable[[], LoadedModel], batch_tokens: int | None) -> None:
    if not staged.has("prompts", "part"):
        _describe(staged, job)
    missing = _missing_parts(staged)
    if missing:
        _capture(staged, job, missing, load(), batch_tokens)
    _probe(staged, staged.parts("prompts"), staged.parts("activations"), job.probing, job.measuring.seed)


def refit(lake: Lake, source: RunFolder, probing: Probing, *, seed: int = Measuring.seed) -> Outcome:
    """Fit probes on the stored activations of a run, as a run of its own that names its source.

    Raises WarehouseError if the source run has no activations.
    """
    activations = table_files(source.path, "activations")
    if not activations:
        raise WarehouseError(f"Run {source.run} has no activations to fit probes on: `kdb ingest` stores them.")
    identity = {"source_run": source.run, "seed": seed, **asdict(probing)}
    with lake.stage(run_id(identity), source.model, source.dataset) as staged:
        if staged.committed:
            return Outcome(staged.run, "exists")
        for table in ("models", "datasets"):
            staged.write(table, "part", [read_parts(table_files(source.path, table))])
        _probe(staged, table_files(source.path, "prompts"), activations, probing, seed)
        row = read_parts(table_files(source.path, "runs")).to_pylist()[0]
        settings = json.loads(row["settings"]) | asdict(probing) | {"seed": seed}
        changed = {"source_run": source.run, "seed": seed, "settings": json.dumps(settings)}
        no_model = dict.fromkeys(("torch_version", "transformers_version", "device"))
        staged.commit(row | changed | no_model | {"kdb_version": importlib.metadata.version("kdb-lm")})
    return Outcome(staged.run, "committed")


def _describe(staged: StagedRun, job: Job) -> None:
    """Write the small tables of a run; whatever is wrong with the prompts is found here, before any work."""
    config, texts = load_config(job.source), job.texts
    token_ids = load_tokenizer(job.source)(texts)["input_ids"]
    check_length(job, token_ids, config)
    examples = job.dataset.examples
    _splits(
        [e.label for e in examples if e.label is not None], [e.group for e in examples], job.probing, job.measuring.seed
    )
    describe_run(staged, job, config)
    staged.write_rows("prompts", "part", list(_prompt_rows(job.dataset, texts, token_ids)))


def _splits(labels: Sequence[int], groups: Sequence[str | None], probing: Probing, seed: int) -> list[Split]:
    """The splits that a run probes; by group too where every prompt has one."""
    from kdb.ingest.probes import make_splits

    known = [group for group in groups if group is not None]
    grouped = known if len(known) == len(labels) else None
    return make_splits(labels, n_splits=probing.splits, groups=grouped, seed=seed)


def _prompt_rows(
    dataset: Dataset, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> Iterator[dict[str, Any]]:
    for number, example in enumerate(dataset.examples):
        yield {
            "prompt_id": number,
            "text": texts[number],
            "label": example.label,
            "group_id": example.group,
            "category": example.category,
            "relation": example.relation,
            "subject": example.subject,
            "n_tokens": len(token_ids[number]),
        }


def _missing_parts(staged: StagedRun) -> dict[str, list[int]]:
    """The parts of activations still to be captured, each with its prompts, longest first."""
    model = read_parts(staged.parts("models")).to_pylist()[0]
    n_tokens = read_parts(staged.parts("prompts"))["n_tokens"].to_pylist()
    order = sorted(range(len(n_tokens)), key=lambda i: -n_tokens[i])
    size = prompts_per_part(model["n_layers"], len(SITES), model["hidden_size"])
    parts = {f"part-{i // size:05}": order[i : i + size] for i in range(0, len(order), size)}
    return {name: ids for name, ids in parts.items() if not staged.has("activations", name)}


def _capture(
    staged: StagedRun,
    job: Job,
    missing: dict[str, list[int]],
    loaded: LoadedModel,
    batch_tokens: int | None,
) -> None:
    from kdb.ingest.capture import CHECK_PROMPTS, Capture, check_capture, shared_prefix
    from kdb.ingest.plan import estimate

    staged.remember(device=str(loaded.device))
    token_ids = loaded.tokenizer(job.texts)["input_ids"]
    prefix = token_ids[0][: shared_prefix(token_ids)]
    capture = Capture(loaded, batch_tokens=batch_tokens)
    if not staged.has("checks", "part"):
        staged.write_rows("checks", "part", check_capture(capture, token_ids[:CHECK_PROMPTS], prefix))
    cost = estimate(job, loaded.model.config, token_ids, str(loaded.device))
    log.info("%s on %s: %s", job.source.name, job.dataset.name, cost)
    total = sum(len(ids) for ids in token_ids)
    left = sum(len(token_ids[i]) for ids in missing.values() for i in ids)
    with progress("activations", total, "tokens", done=total - left) as shown:
        for name, ids in missing.items():
            begun = time.monotonic()
            vectors = capture.vectors([token_ids[i] for i in ids], prefix, on_batch=shown.advance)
            groups = activation_groups(ids, SITES, vectors, float16=job.measuring.store == "float16")
            staged.write("activations", name, groups, seconds=time.monotonic() - begun)


def _probe(
    staged: StagedRun, prompt_parts: Sequence[Path], activations: Sequence[Path], probing: Probing, seed: int
) -> None:
    """Fit every probe on every layer and site that has no finished part yet."""
    from kdb.ingest.probes import map_layers

    table = read_parts(prompt_parts)
    labels = table["label"].to_pylist()
    splits = _splits(labels, table["group_id"].to_pylist(), probing, seed)
    model = read_parts(staged.parts("models")).to_pylist()[0]
    keys = [(layer, site) for site in SITES for layer in range(model["n_layers"])]
    left = [key for key in keys if not staged.has("probe_scores", _part_name(key))]
    load = functools.partial(_load_layer, list(activations))
    n_jobs = _n_jobs(len(labels), model["hidden_size"])
    begun = time.monotonic()
    with progress("probes", len(keys), "layers", done=len(keys) - len(left)) as shown:
        for key, scores in map_layers(load, left, labels, splits, probing.classifiers, n_jobs):
            place = {"layer": key[0], "site": key[1], "depth": key[0] / model["n_layers"]}
            groups_ = [pa.Table.from_pylist([{**place, **asdict(s)} for s in scores], arrow_schema("probe_scores"))]
            staged.write("probe_scores", _part_name(key), groups_, seconds=time.monotonic() - begun)
            begun = time.monotonic()
            shown.advance(1)


def _load_layer(activations: list[Path], key: tuple[int, str]) -> Any:
    return read_vectors(activations, *key)


def _part_name(key: tuple[int, str]) -> str:
    return f"{key[1]}-{key[0]:04}"


def _n_jobs(n_prompts: int, hidden_size: int) -> int:
    """Probing processes: one per core, as long as their matrices fit into ``_PROBE_MEMORY``."""
    import joblib

    each = 8 * n_prompts * hidden_size * _MATRIX_COPIES
    return max(1, min(int(joblib.cpu_count()), _PROBE_MEMORY // each))


def _run_row(job: Job, device: str | None) -> dict[str, Any]:
    return {
        "study": job.study,
        "variant": job.variant,
        "settings": json.dumps(job.identity),
        "seed": job.measuring.seed,
        "noise": "aaa or bbb" if job.measuring.noise else None,
        "kdb_version": importlib.metadata.version("kdb-lm"),
        "torch_version": importlib.metadata.version("torch"),
        "transformers_version": importlib.metadata.version("transformers"),
        "device": device,
    }
