"""One run, from prompts to commit: describe, capture, probe, make visible.

Each stage writes parts into staging and reads what the stage before it stored; so whatever is finished when a
run is cut off is not computed again, and probes refit without the model (``derived.py``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from kdb.ingest.attribution import study as knowledge
from kdb.ingest.concept.zero_shot import pose
from kdb.ingest.datasets import Dataset
from kdb.ingest.describe import arrow_rows, check_length, describe_run, made_by, read_parts, table_files
from kdb.ingest.execution.local import Engine, Here, Shard, write_behind, write_part
from kdb.ingest.job import Job, Probing, begin
from kdb.ingest.models.find import LoadedModel, training_step
from kdb.ingest.models.guard import told
from kdb.ingest.models.load import load_config, load_tokenizer
from kdb.ingest.models.structure import SITES
from kdb.ingest.models.tokens import check_spelled, read_texts
from kdb.ingest.progress import progress
from kdb.warehouse.lake import Lake, StagedRun
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.schema import DEFAULT_PROBE
from kdb.warehouse.vectors import prompts_per_part, read_states, read_vectors

if TYPE_CHECKING:
    from kdb.ingest.concept.probes import ProbeScore, Split

log = logging.getLogger(__name__)

Key = tuple[int, str]
"""A layer and a site."""

_PROBE_MEMORY = 4 * 2**30
_MATRIX_COPIES = 4
"""Copies of a layer's matrix in float64 that fitting holds at its peak."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``committed`` now, or ``exists`` from before."""

    run: str
    status: str


def ingest(lake: Lake, job: Job, load: Callable[[], LoadedModel], *, batch_tokens: int | None = None) -> Outcome:
    """Measure one model on one dataset in this process, and commit the run; a no-op where that run exists.

    ``load`` loads the model and is called only if something is still to be captured.
    Raises DatasetError, ModelError or WarehouseError; what is finished stays in staging, and the same job
    goes on from there.
    """
    return ingest_on(lake, job, Here(load, batch_tokens))


def ingest_on(lake: Lake, job: Job, engine: Engine) -> Outcome:
    """The same, with the model where the engine has it. This process alone writes."""
    with begin(lake, job.identity, job.source.name, job.dataset.name) as staged:
        if staged.committed:
            return Outcome(job.run, "exists")
        _tell_of_namesakes(lake, job)
        if job.study == "knowledge":
            knowledge.measure(staged, job, engine)
        else:
            _measure_concept(staged, job, engine)
        staged.commit(_run_row(job, staged.facts.get("device")))
    return Outcome(job.run, "committed")


def _tell_of_namesakes(lake: Lake, job: Job) -> None:
    """Say so where the model's name is taken by another one, the first time that this one is measured."""
    source, others = job.source, dict[str, int]()
    mark = f"revision={source.pinned}" if source.pinned else ""
    for folder in lake.run_folders():
        if folder.model != source.name:
            continue
        with contextlib.suppress(OSError, LookupError, pa.ArrowException):  # removed a moment ago, or damaged
            variant = _value(folder, "runs", "variant").split(" ")[0]
            if (variant if variant.startswith("revision=") else "") == mark:
                revision = _value(folder, "models", "revision")
                others[revision] = others.get(revision, 0) + 1
    if others and source.revision not in others:
        found = "; ".join(f"revision {revision[:12]}…, {n} run{'s' * (n > 1)}" for revision, n in others.items())
        log.warning(
            "%r is stored already with other weights, config or tokenizer, or by an older kdb (%s). This run is kept "
            "apart by its revision, %s…; to give it a name of its own, add --name.",
            *(source.name, found, source.revision[:12]),
        )


def _value(folder: RunFolder, table: str, column: str) -> str:
    return str(read_parts(table_files(folder.path, table))[column][0].as_py())


def _measure_concept(staged: StagedRun, job: Job, engine: Engine) -> None:
    if not staged.has("prompts", "part"):
        with told(f"Cannot read the prompts of {job.dataset.name} with {job.source.name}"):
            _describe(staged, job)
    shards = _shards(staged)
    missing = [shard for shard in shards if not staged.has("activations", shard.name)]
    if missing:
        _capture(staged, job, missing, engine)
    if not staged.has("checks", "stored"):
        _check_stored(staged, job, shards, engine)
    probe_layers(staged, staged.parts("prompts"), staged.parts("activations"), job.probing, job.measuring.seed)


def _describe(staged: StagedRun, job: Job) -> None:
    """Write the small tables of a run; whatever is wrong with the prompts is found here, before any work."""
    config, tokenizer, texts = load_config(job.source), load_tokenizer(job.source), job.texts
    begun = time.monotonic()
    token_ids = read_texts(tokenizer, texts)
    check_length(job, token_ids, config, n_cue=len(pose(tokenizer, job.dataset).cue))
    examples = job.dataset.examples
    _splits(
        [e.label for e in examples if e.label is not None], [e.group for e in examples], job.probing, job.measuring.seed
    )
    check_spelled(staged, job, tokenizer, token_ids)
    describe_run(staged, job, config)
    rows = list(_prompt_rows(job.dataset, texts, token_ids))
    staged.write_rows("prompts", "part", rows, seconds=time.monotonic() - begun)


def _splits(labels: ArrayLike, groups: Sequence[str | None], probing: Probing, seed: int) -> list[Split]:
    """The splits that a run probes; by group too where every prompt has one."""
    from kdb.ingest.concept.probes import make_splits

    known = [group for group in groups if group is not None]
    grouped = known if len(known) == len(groups) else None
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


def _shards(staged: StagedRun) -> list[Shard]:
    """The parts of activations, each with its prompts, longest first; sizes are in tokens."""
    model = read_parts(staged.parts("models")).to_pylist()[0]
    n_tokens = read_parts(staged.parts("prompts"))["n_tokens"].to_pylist()
    order = sorted(range(len(n_tokens)), key=lambda i: -n_tokens[i])
    size = prompts_per_part(model["n_layers"], len(SITES), model["hidden_size"])
    parts = {f"part-{i // size:05}": order[i : i + size] for i in range(0, len(order), size)}
    return [Shard(name, tuple(ids), sum(n_tokens[i] for i in ids)) for name, ids in parts.items()]


def _capture(staged: StagedRun, job: Job, missing: Sequence[Shard], engine: Engine) -> None:
    staged.remember(device=engine.ask(job, "device"))
    if not staged.has("checks", "part"):  # compared with the untouched model, once a run
        write_part(staged, engine.ask(job, "check"))
    question = pose(load_tokenizer(job.source), job.dataset)
    if not question.tells:
        log.info("No zero-shot answers: %r and %r begin with the same tokens of this model.", *question.answers)
    log.info("%s on %s: %s", job.source.name, job.dataset.name, engine.ask(job, "cost"))
    total = sum(read_parts(staged.parts("prompts"))["n_tokens"].to_pylist())
    with progress("activations", total, "tokens", done=total - sum(shard.size for shard in missing)) as shown:
        write_behind(staged, engine.measure(job, missing, shown.advance))


def _check_stored(staged: StagedRun, job: Job, shards: Sequence[Shard], engine: Engine) -> None:
    """Compare what is stored of some prompts with the model, one prompt at a time: the rest of the run's checks."""
    chosen: list[int] = engine.ask(job, "chosen")
    parts = [staged.part("activations", shard.name) for shard in shards if not set(chosen).isdisjoint(shard.prompts)]
    states, answers = read_states(parts, chosen, SITES[0]), None
    if staged.parts("zero_shot"):
        rows = {row["prompt_id"]: row for row in read_parts(staged.parts("zero_shot")).to_pylist()}
        answers = np.array([[rows[i]["prob_negative"], rows[i]["prob_positive"]] for i in chosen])
    write_part(staged, engine.ask(job, "check_stored", states, answers), "stored")


def probe_layers(
    staged: StagedRun, prompt_parts: Sequence[Path], activations: Sequence[Path], probing: Probing, seed: int
) -> None:
    """Fit every probe on every layer and site that has no finished part yet."""
    from kdb.ingest.concept.probes import control_labels, map_layers

    table = read_parts(prompt_parts)
    labels = np.array(table["label"].to_pylist())
    splits = _splits(labels, table["group_id"].to_pylist(), probing, seed)
    control = control_labels(labels, splits, seed)
    model = read_parts(staged.parts("models")).to_pylist()[0]
    keys = layer_keys(model)
    left = [key for key in keys if not staged.has("probe_scores", part_name(key))]
    load = functools.partial(read_layer, list(activations))
    n_jobs = _n_jobs(len(labels), model["hidden_size"])
    begun = time.monotonic()
    with progress("probes", len(keys), "layers", done=len(keys) - len(left)) as shown:
        for key, scores in map_layers(load, left, labels, control, splits, probing.classifiers, n_jobs):
            place = {"layer": key[0], "site": key[1], "depth": key[0] / model["n_layers"]}
            predictions = [_prediction_rows(key, score, splits, labels) for score in scores]
            staged.write("probe_predictions", part_name(key), [pa.concat_tables(predictions)])
            rows = [place | asdict(score) | {"is_default": _is_default(score)} for score in scores]
            staged.write_rows("probe_scores", part_name(key), rows, seconds=time.monotonic() - begun)
            begun = time.monotonic()
            shown.advance(1)


def _is_default(score: ProbeScore) -> bool:
    return {"classifier": score.classifier, "split": score.split} == DEFAULT_PROBE


def _prediction_rows(key: Key, score: ProbeScore, splits: Sequence[Split], labels: NDArray[Any]) -> pa.Table:
    """Rows of ``probe_predictions``; prompts are numbered in the order of their vectors."""
    test = next(split.test for split in splits if split.name == score.split)
    return arrow_rows(
        "probe_predictions",
        {
            "prompt_id": test,
            "layer": key[0],
            "site": key[1],
            "classifier": score.classifier,
            "split": score.split,
            "predicted": score.predicted,
            "correct": score.predicted == labels[test],
        },
    )


def layer_keys(model: Mapping[str, Any]) -> list[Key]:
    """Every layer of a model, site by site: what is probed, or projected, one at a time."""
    return [(layer, site) for site in SITES for layer in range(model["n_layers"])]


def read_layer(activations: list[Path], key: Key) -> NDArray[np.float32]:
    """The hidden states (prompt, hidden) of one layer and site, in the order of the prompts."""
    return read_vectors(activations, *key)


def part_name(key: Key) -> str:
    """The part that holds the rows of one layer and site."""
    return f"{key[1]}-{key[0]:04}"


def _n_jobs(n_prompts: int, hidden_size: int) -> int:
    """Probing processes: one per core, as long as their matrices fit into ``_PROBE_MEMORY``."""
    import joblib

    each = 8 * n_prompts * hidden_size * _MATRIX_COPIES
    return max(1, min(int(joblib.cpu_count()), _PROBE_MEMORY // each))


def _run_row(job: Job, device: str | None) -> dict[str, Any]:
    step = training_step(job.source.pinned)
    return {
        "study": job.study,
        "variant": job.variant,
        "settings": json.dumps(job.identity | ({} if step is None else {"step": step})),
        "seed": job.measuring.seed,
        "noise": "aaa or bbb" if job.measuring.noise else None,
        **made_by(device),
    }
