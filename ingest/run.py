"""One run, from prompts to commit: plan, capture, probe, make visible.

Each stage writes parts into staging and reads what the stage before it stored; so whatever is finished when a
run is cut off is not computed again, and probes refit without the model.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdb.errors import DatasetError, WarehouseError
from kdb.ingest.anatomy import SITES
from kdb.ingest.datasets import Dataset, prompts
from kdb.ingest.models import LoadedModel, ModelSource, count_params, load_config, load_tokenizer, model_row
from kdb.ingest.progress import progress
from kdb.warehouse.lake import Lake, RunFolder, StagedRun, run_id
from kdb.warehouse.schema import arrow_schema
from kdb.warehouse.vectors import activation_groups, prompts_per_part, read_vectors

if TYPE_CHECKING:
    from kdb.ingest.probes import Split

log = logging.getLogger(__name__)

STUDY = "concept"
ALWAYS_FITTED = ("logistic", "logistic-paper")
"""Saved queries read ``logistic``, so every run has it; ``--classifier`` adds to these."""


@dataclass(frozen=True)
class Measuring:
    """What determines the hidden states of a run, beyond model, dataset and template.

    ``limit`` is already in the dataset's fingerprint; it is kept so that the run can say it.
    """

    dtype: str = "float32"
    quantize: str | None = None
    noise: bool = False
    seed: int = 42
    store: str = "float32"
    limit: int | None = None


@dataclass(frozen=True)
class Probing:
    """What determines the probe scores of a run, beyond its hidden states.

    ``splits`` counts the paper's split and the seeded stratified ones after it.
    """

    classifiers: tuple[str, ...] = ALWAYS_FITTED
    splits: int = 1


@dataclass(frozen=True)
class Job:
    """A run that was asked for: everything that determines its result, known before a model is loaded."""

    source: ModelSource
    dataset: Dataset
    measuring: Measuring
    probing: Probing
    custom_template: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What the run id is derived from."""
        return {
            "study": STUDY,
            "model": self.source.name,
            "revision": self.source.revision,
            "dataset": self.dataset.name,
            "fingerprint": self.dataset.fingerprint,
            "template": self.dataset.template,
            **asdict(self.measuring),
            **asdict(self.probing),
        }

    @property
    def run(self) -> str:
        """The run's id."""
        return run_id(self.identity)

    @property
    def variant(self) -> str:
        """What sets the run apart from the plain one, such as 'noise bfloat16'; 'default' if nothing does."""
        m = self.measuring
        template = hashlib.sha256(self.dataset.template.encode()).hexdigest()[:8]
        marks = [
            f"revision={self.source.pinned}" if self.source.pinned else "",
            f"limit={m.limit}" if m.limit else "",
            f"template={template}" if self.custom_template else "",
            ("noise" if m.seed == Measuring.seed else f"noise={m.seed}") if m.noise else "",
            m.dtype if m.dtype != Measuring.dtype else "",
            m.quantize or "",
            f"store={m.store}" if m.store != Measuring.store else "",
        ]
        return " ".join(filter(None, marks)) or "default"


@dataclass(frozen=True)
class Plan:
    """What a run will cost: said before it starts, and by ``--dry-run``."""

    n_prompts: int
    n_tokens: int
    n_layers: int
    disk_bytes: int
    memory_bytes: int
    seconds: float

    def __str__(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.n_prompts:,} prompts ({self.n_tokens:,} tokens to run) × {self.n_layers} layers × "
            f"{len(SITES)} sites: at most {_size(self.disk_bytes)} on disk, {_size(self.memory_bytes)} of memory, "
            f"about {_duration(self.seconds)}"
        )


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
        if not staged.has("prompts", "part"):
            _describe(staged, job)
        missing = _missing_parts(staged)
        if missing:
            _capture(staged, job, missing, load(), batch_tokens)
        _probe(staged, staged.parts("prompts"), staged.parts("activations"), job.probing, job.measuring.seed)
        staged.commit(_run_row(job, staged.facts.get("device")))
    return Outcome(job.run, "committed")


def refit(lake: Lake, source: RunFolder, probing: Probing, *, seed: int = Measuring.seed) -> Outcome:
    """Fit probes on the stored activations of a run, as a run of its own that names its source.

    Raises WarehouseError if the source run has no activations.
    """
    activations = _files(source.path, "activations")
    if not activations:
        raise WarehouseError(f"Run {source.run} has no activations to fit probes on: `kdb ingest` stores them.")
    identity = {"source_run": source.run, "seed": seed, **asdict(probing)}
    with lake.stage(run_id(identity), source.model, source.dataset) as staged:
        if staged.committed:
            return Outcome(staged.run, "exists")
        for table in ("models", "datasets"):
            staged.write(table, "part", [_read(_files(source.path, table))])
        _probe(staged, _files(source.path, "prompts"), activations, probing, seed)
        row = _read(_files(source.path, "runs")).to_pylist()[0]
        settings = json.loads(row["settings"]) | asdict(probing) | {"seed": seed}
        changed = {"source_run": source.run, "seed": seed, "settings": json.dumps(settings)}
        no_model = dict.fromkeys(("torch_version", "transformers_version", "device"))
        staged.commit(row | changed | no_model | {"kdb_version": importlib.metadata.version("kdb-lm")})
    return Outcome(staged.run, "committed")


def plan(job: Job, device: str) -> Plan:
    """What a job will cost, from its tokens and a moment of matrix products on this machine; loads no weights."""
    config = load_config(job.source)
    token_ids = load_tokenizer(job.source)(_texts(job))["input_ids"]
    return _plan(job, config, token_ids, device)


def _plan(job: Job, config: Any, token_ids: Sequence[Sequence[int]], device: str) -> Plan:
    from kdb.ingest.capture import BATCH_TOKENS, gemm_rate, shared_prefix

    row = model_row(job.source, config, count_params(config), job.measuring.dtype, job.measuring.quantize)
    prefix = shared_prefix(token_ids)
    n_tokens = sum(len(ids) - prefix for ids in token_ids)
    floats = len(token_ids) * row["n_layers"] * len(SITES) * row["hidden_size"]
    tied = 1 if config.get_text_config().tie_word_embeddings else 2
    block_params = row["n_params"] - tied * row["vocab_size"] * row["hidden_size"]
    weight_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[job.measuring.dtype]
    batch = BATCH_TOKENS.get(device.partition(":")[0], BATCH_TOKENS["cpu"])
    working = 4 * batch * (4 * row["intermediate_size"] + 8 * row["hidden_size"])
    rate = _CAPTURE_SHARE * gemm_rate(row["hidden_size"], row["intermediate_size"], job.measuring.dtype, device)
    return Plan(
        n_prompts=len(token_ids),
        n_tokens=n_tokens,
        n_layers=row["n_layers"],
        disk_bytes=floats * (2 if job.measuring.store == "float16" else 4),
        memory_bytes=row["n_params"] * (1 if job.measuring.quantize else weight_bytes) + working + _PART_MEMORY,
        seconds=2 * block_params * n_tokens / rate + _PROBE_SECONDS * floats * job.probing.splits,
    )


_CAPTURE_SHARE = 0.7
"""Share of a plain matrix product's speed that capture reaches; `benchmarks/capture.py` measures it."""

_PROBE_SECONDS = 5e-7
"""Seconds to probe one float of activations with both logistic probes on one core."""

_PART_MEMORY = 3 * 64 * 2**20


def _texts(job: Job) -> list[str]:
    return prompts(job.dataset, noise=job.measuring.noise, seed=job.measuring.seed)


def _describe(staged: StagedRun, job: Job) -> None:
    """Write the small tables of a run; whatever is wrong with the prompts is found here, before any work."""
    config, texts = load_config(job.source), _texts(job)
    token_ids = load_tokenizer(job.source)(texts)["input_ids"]
    _check_length(job, token_ids, config)
    examples = job.dataset.examples
    _splits([e.label for e in examples], [e.group for e in examples], job.probing, job.measuring.seed)
    m = job.measuring
    staged.write_rows("models", "part", [model_row(job.source, config, count_params(config), m.dtype, m.quantize)])
    dataset = {
        "study": STUDY,
        "source": job.dataset.source,
        "fingerprint": job.dataset.fingerprint,
        "template": job.dataset.template,
        "n_prompts": len(texts),
        "n_positive": job.dataset.n_positive,
    }
    staged.write_rows("datasets", "part", [dataset])
    staged.write_rows("prompts", "part", list(_prompt_rows(job.dataset, texts, token_ids)))


def _check_length(job: Job, token_ids: Sequence[Sequence[int]], config: Any) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    for number, ids in enumerate(token_ids):
        if limit is not None and len(ids) > limit:
            raise DatasetError(
                f"Prompt {number} of {job.dataset.name!r} has {len(ids):,} tokens, and {job.source.name} reads "
                f"at most {limit:,}: shorten the text, or take a model with a longer context."
            )
        if not ids:
            raise DatasetError(f"Prompt {number} of {job.dataset.name!r} has no tokens for {job.source.name}.")


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
    model = _read(staged.parts("models")).to_pylist()[0]
    n_tokens = _read(staged.parts("prompts"))["n_tokens"].to_pylist()
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

    staged.remember(device=str(loaded.device))
    token_ids = loaded.tokenizer(_texts(job))["input_ids"]
    prefix = token_ids[0][: shared_prefix(token_ids)]
    capture = Capture(loaded, batch_tokens=batch_tokens)
    if not staged.has("checks", "part"):
        staged.write_rows("checks", "part", check_capture(capture, token_ids[:CHECK_PROMPTS], prefix))
    log.info(
        "%s on %s: %s",
        job.source.name,
        job.dataset.name,
        _plan(job, loaded.model.config, token_ids, str(loaded.device)),
    )
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

    table = _read(prompt_parts)
    labels = table["label"].to_pylist()
    splits = _splits(labels, table["group_id"].to_pylist(), probing, seed)
    model = _read(staged.parts("models")).to_pylist()[0]
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


_PROBE_MEMORY = 4 * 2**30
_MATRIX_COPIES = 4
"""Copies of a layer's matrix in float64 that fitting holds at its peak."""


def _run_row(job: Job, device: str | None) -> dict[str, Any]:
    return {
        "study": STUDY,
        "variant": job.variant,
        "settings": json.dumps(job.identity),
        "seed": job.measuring.seed,
        "noise": "aaa or bbb" if job.measuring.noise else None,
        "kdb_version": importlib.metadata.version("kdb-lm"),
        "torch_version": importlib.metadata.version("torch"),
        "transformers_version": importlib.metadata.version("transformers"),
        "device": device,
    }


def _files(run: Path, table: str) -> list[Path]:
    return sorted((run / table).glob("*.parquet"))


def _read(parts: Sequence[Path]) -> pa.Table:
    return pa.concat_tables(pq.ParquetFile(part).read() for part in parts)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
