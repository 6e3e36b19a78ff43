"""Estimated time, memory and disk space of a run, printed before it starts and by ``kdb ingest --dry-run``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdb.ingest.attribution.candidates import FIRST
from kdb.ingest.attribution.patch import BEST_HEADS
from kdb.ingest.attribution.rankings import METHODS
from kdb.ingest.attribution.scores import BASES_BYTES
from kdb.ingest.concept.zero_shot import question_of
from kdb.ingest.forward.capture import gemm_rate, shared_prefix
from kdb.ingest.forward.memory import CHUNK_BYTES, CPU_TOKENS, GPU_TOKENS
from kdb.ingest.job import Job
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.load import load_config, load_tokenizer, model_row
from kdb.ingest.progress import ATTRIBUTING, CAPTURING, FITTING, LOADING
from kdb.ingest.prompts import pose
from kdb.numbers import data_size, duration
from kdb.queries.domains import SITES
from kdb.warehouse.vectors import PART_BYTES

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_CAPTURE_SHARE = 0.7
"""Share of a plain matrix product's speed that capture reaches; `benchmarks/capture.py` measures it."""

_ATTRIBUTION_SHARE = 0.35
"""Share of that speed that a knowledge run reaches, over all its phases."""

_PROBE_SECONDS = 2e-6
"""Seconds to probe one float of activations, and its control task, with both logistic probes on one core.

With fewer prompts than the states have entries, the probes are fitted in the space of the prompts, and it is less.
"""

_FIRST_SECONDS, _PARAMS_PER_SECOND = 6.0, 3e7
"""Seconds to import the libraries, and parameters that are read, unpacked and checked in a second."""

_RANKED = 600
"""Typical number of neurons per prompt whose rank of the target is counted, for two of the methods."""

_NEURON_BYTES = 80
"""Bytes on disk of a row of ``neuron_scores``, with its share of the other tables."""

_LENS_BYTES = 120
"""Bytes on disk of a row of ``lens_readouts``."""

_EFFECT_PASSES = 6
"""Forward passes whose time a run's own effects take: two without gradients, one with, and two backward ones."""

_PART_MEMORY = 3 * PART_BYTES
"""Bytes of a part in memory, with its copies in Arrow and in Parquet."""


@dataclass(frozen=True)
class Cost:
    """Counts, bytes and seconds of a run; ``what`` is measured at each layer.

    Runs of one ``kind``, and more so those of one ``model``, take the same multiple of their estimated time.
    """

    kind: str
    model: str
    n_prompts: int
    n_tokens: int
    n_layers: int
    disk_bytes: int
    memory_bytes: int
    phases: Mapping[str, float]
    """Seconds from the beginning of each of these phases to that of the next one, or to the end."""
    what: str = f"{len(SITES)} sites"
    is_calibrated: bool = False
    """Whether ``phases`` are corrected by the time that another run took on this machine."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return sum(self.phases.values())

    def after(self, phase: str) -> Cost:
        """Return the cost of what follows a phase."""
        return replace(self, phases={name: seconds for name, seconds in self.phases.items() if name != phase})

    def __str__(self) -> str:
        """One line for the terminal."""
        first = "" if self.is_calibrated else " (a first guess)"
        return (
            f"{self.n_prompts:,} prompts, {self.n_layers} layers, {self.what}: about {duration(self.seconds)}{first}, "
            f"at most {data_size(self.disk_bytes)} on disk, {data_size(self.memory_bytes)} of memory"
        )


def cost(job: Job, device: str) -> Cost:
    """Estimate the cost of a job from its tokens and the measured speed of matrix products; loads no weights."""
    with model_errors(f"Cannot estimate the cost of {job.source.name} on {job.dataset.name}"):
        config, tokenizer = load_config(job.source), load_tokenizer(job.source)
        token_ids = [prompt.token_ids for prompt in pose(job, tokenizer)]
        if job.study == "knowledge":
            return attribution_cost(job, config, list(map(len, token_ids)), device)
        n_cue = len(question_of(tokenizer, job.dataset).cue)
        return concept_cost(job, config, token_ids, device, n_cue=n_cue)


def attribution_cost(job: Job, config: Any, lengths: Sequence[int], device: str) -> Cost:
    """Estimate the cost of a knowledge run from the lengths of its kept prompts: its readouts and forward passes."""
    m, wanted = job.measuring, job.attributing
    row = model_row(job.source, config, m.dtype)
    layers, hidden, vocab = row["n_layers"], row["hidden_size"], row["vocab_size"]
    n_heads, n_neurons = row["n_heads"] or 0, (row["intermediate_size"] or 0) * (row["n_experts"] or 1)
    trials = 2 + (2 * len(METHODS) + 1 if wanted.ablate_k else 0)
    lens = 1 + 2 * layers
    candidates = layers + 2 * FIRST  # the distributions of about half of the residuals, and a score of each
    readouts = 6 * layers + lens + layers * n_heads + 2 * wanted.top_k + candidates + _RANKED * bool(wanted.ablate_k)
    passes, patches = (_EFFECT_PASSES, BEST_HEADS) if wanted.effects else (0, 0)
    if wanted.ablate_k:  # each method's neurons at their mean: what they write, the untouched prompt, and a patch each
        passes, patches = passes + 2, patches + len(METHODS)
    entries = n_heads * (row["value_head_dim"] or 0)
    every = layers * (len(lengths) * n_neurons + sum(lengths) * entries)
    stored = every if wanted.all_neurons else 2 * wanted.top_k * len(lengths)
    rate = _ATTRIBUTION_SHARE * gemm_rate(hidden, row["intermediate_size"] or hidden, m.dtype, device)
    # A patch replaces the last token, and the tokens before it are cached.
    tokens = sum(lengths) * (1 + trials + passes) + patches * len(lengths)
    flops = 2 * (row["n_params"] - vocab * hidden) * tokens + 2 * vocab * hidden * (
        (readouts + trials + passes + patches) * len(lengths) + 256 / vocab * (every if wanted.all_neurons else 0)
    )
    weights = row["n_params"] * (1 if m.quantize else _DTYPE_BYTES[m.dtype])
    return Cost(
        kind=_kind(job, device),
        model=job.source.revision,
        n_prompts=len(lengths),
        n_tokens=tokens,
        n_layers=layers,
        disk_bytes=_NEURON_BYTES * (stored + 2 * FIRST * len(lengths)) + _LENS_BYTES * lens * len(lengths),
        memory_bytes=weights + 4 * vocab * hidden + 2 * BASES_BYTES + 2 * CHUNK_BYTES,
        phases=_loading(row) | {ATTRIBUTING: flops / rate},
        what=f"{n_heads} heads and {n_neurons:,} FFN neurons",
    )


def concept_cost(job: Job, config: Any, token_ids: Sequence[Sequence[int]], device: str, *, n_cue: int) -> Cost:
    """Estimate the cost of a concept run from a config and token ids; ``n_cue`` tokens follow each prompt."""
    row = model_row(job.source, config, job.measuring.dtype)
    prefix = shared_prefix(token_ids)
    n_tokens = sum(len(ids) - prefix + n_cue for ids in token_ids)
    floats = len(token_ids) * row["n_layers"] * len(SITES) * row["hidden_size"]
    tied = 1 if getattr(config.get_text_config(), "tie_word_embeddings", True) else 2
    width = row["intermediate_size"] or row["hidden_size"]
    unembedding = row["vocab_size"] * row["hidden_size"]
    block_params = row["n_params"] - tied * unembedding
    weight_bytes = _DTYPE_BYTES[job.measuring.dtype]
    batch = CPU_TOKENS if device == "cpu" else GPU_TOKENS
    working = 4 * batch * (4 * width + 8 * row["hidden_size"])
    rate = _CAPTURE_SHARE * gemm_rate(row["hidden_size"], width, job.measuring.dtype, device)
    return Cost(
        kind=_kind(job, device),
        model=job.source.revision,
        n_prompts=len(token_ids),
        n_tokens=n_tokens,
        n_layers=row["n_layers"],
        disk_bytes=floats * (2 if job.measuring.store == "float16" else 4),
        memory_bytes=row["n_params"] * (1 if job.measuring.quantize else weight_bytes) + working + _PART_MEMORY,
        phases=_loading(row)
        | {
            CAPTURING: 2 * (block_params * n_tokens + unembedding * len(token_ids)) / rate,
            FITTING: _PROBE_SECONDS * floats * job.probing.splits * min(1.0, len(token_ids) / row["hidden_size"]),
        },
    )


def _loading(row: Mapping[str, Any]) -> dict[str, float]:
    return {LOADING: _FIRST_SECONDS + row["n_params"] / _PARAMS_PER_SECOND}


def _kind(job: Job, device: str) -> str:
    return f"{job.study} {device.partition(':')[0]} {job.measuring.dtype}"
