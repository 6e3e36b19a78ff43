"""The stages of the concept-depth study (arXiv 2404.07066): check, describe, capture, check stored values, probe.

    subject, stages = prepare(job)

Probes are fitted to stored vectors (``probing.py``), so ``derived.py`` can fit them again without the model.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdb.ingest.concept.probing import probing, task_of_labels
from kdb.ingest.concept.repeats import count_repeats
from kdb.ingest.concept.zero_shot import Question, answer_probabilities, check_answers, question_of, zero_shot_rows
from kdb.ingest.cost import Cost, concept_cost
from kdb.ingest.forward.capture import Capture, shared_prefix
from kdb.ingest.forward.checks import check_capture, check_stored, chosen_prompts
from kdb.ingest.forward.memory import CPU_TOKENS, GPU_TOKENS, most_per_shard
from kdb.ingest.job import Job
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.load import load_config, load_tokenizer
from kdb.ingest.progress import CAPTURING
from kdb.ingest.prompts import Posed, check_length, description, pose
from kdb.ingest.rows import Rows, rows_of, timed
from kdb.ingest.stages import Advance, ModelStage, RunInProgress, Shard, Stage, StoredStage, single
from kdb.queries.domains import SITES
from kdb.warehouse.vectors import (
    GPU_PART_BYTES,
    PART_BYTES,
    activation_groups,
    prompts_per_part,
    read_states,
)

if TYPE_CHECKING:
    from kdb.ingest.concept.splits import Split

log = logging.getLogger(__name__)


def prepare(job: Job) -> tuple[PosedQuestion, list[Stage]]:
    """Pose a job's prompts, and list the stages of its run.

    Raises DatasetError or ModelError for prompts that cannot be measured or probed, before any work.
    """
    config, tokenizer = load_config(job.source), load_tokenizer(job.source)
    with model_errors(f"Cannot read the prompts of {job.dataset.name} with {job.source.name}"):
        posed = PosedQuestion(job, pose(job, tokenizer), question_of(tokenizer, job.dataset))
        check_length(job, posed.token_ids, config, n_cue=len(posed.question.cue))
        examples, seed = job.dataset.examples, job.measuring.seed
        labels, groups = [e.label for e in examples if e.label is not None], [e.group for e in examples]
        task = task_of_labels(labels, groups, job.probing, seed, job.dataset.first_label)
    return posed, [
        ModelStage(("checks",), single("model"), _check, shown=("Checking the model", None)),
        description(posed, tokenizer, config),
        StoredStage(("prompts",), single(), functools.partial(_prompt_rows, posed)),
        StoredStage(("checks",), single("repeats"), functools.partial(_repeats, posed, task.splits)),
        ModelStage(
            (*(["zero_shot"] if posed.question.separates else []), "activations"),
            functools.partial(_capture_shards, posed),
            _captured,
            shown=(CAPTURING, "tokens"),
            announce=functools.partial(_announce, posed),
        ),
        ModelStage(("checks",), functools.partial(_stored_shards, posed), _check_stored),
        *probing(job.probing, seed),
    ]


# Prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PosedQuestion(Posed):
    """The prompts of a job, and the question that follows each."""

    question: Question

    def bind(self, loaded: LoadedModel, batch_tokens: int | None) -> Captured:
        """Combine the prompts with the model that reads them."""
        with model_errors(f"{loaded.source.name} cannot be run"):
            return Captured(self, Capture(loaded, batch_tokens=batch_tokens))


def _prompt_rows(posed: Posed, _inputs: RunInProgress, _shard: Shard) -> list[Rows]:
    rows = [
        {
            "prompt_id": prompt.number,
            "text": text,
            "label": example.label,
            "group_id": example.group,
            "category": example.category,
            "relation": example.relation,
            "subject": example.subject,
            "n_tokens": len(prompt.token_ids),
            "token_ids": prompt.token_ids,
        }
        for prompt, example, text in zip(posed.prompts, posed.job.dataset.examples, posed.job.texts, strict=True)
    ]
    return [rows_of("prompts", rows)]


def _repeats(posed: Posed, splits: Sequence[Split], _inputs: RunInProgress, _shard: Shard) -> list[Rows]:
    repeats = count_repeats([example.text for example in posed.job.dataset.examples], splits)
    repeats.warn(posed.job.dataset.name)
    return [rows_of("checks", repeats.rows)]


# What needs the model --------------------------------------------------------------------------------------------


class Captured:
    """The prompts of a job and the model whose hidden states are read."""

    def __init__(self, posed: PosedQuestion, capture: Capture) -> None:
        self.job, self.question, self.token_ids = posed.job, posed.question, posed.token_ids
        self.capture, self.loaded = capture, capture.loaded
        self.prefix = self.token_ids[0][: shared_prefix(self.token_ids)]

    @property
    def chosen(self) -> list[int]:
        """The prompts that the run is checked on."""
        return chosen_prompts(self.token_ids)


def _check(subject: Captured, _shard: Shard, _advance: Advance) -> Iterator[Rows]:
    """Compare some prompts with the untouched model. Raises ModelError if the difference is too large."""
    texts, begun = [subject.token_ids[i] for i in subject.chosen], time.monotonic()
    with model_errors(f"{subject.loaded.source.name} cannot be run"):
        rows = check_capture(subject.capture, texts, subject.prefix, subject.question.cue)
    yield rows_of("checks", rows, begun)


def _cost(subject: Captured, _shard: Shard, _advance: Advance) -> Iterator[Cost]:
    config, n_cue = subject.loaded.model.config, len(subject.question.cue)
    yield concept_cost(subject.job, config, subject.token_ids, str(subject.loaded.device), n_cue=n_cue)


def _capture_shards(posed: PosedQuestion, run: RunInProgress) -> list[Shard]:
    """Divide the prompts, longest first, into shards that fill a part or take a minute; sizes are in tokens."""
    n_tokens = [len(ids) for ids in posed.token_ids]
    parts = run.remembered("captured", lambda: _parts(n_tokens, run))
    return [Shard(f"part-{i:05}", ids, sum(n_tokens[j] for j in ids)) for i, ids in enumerate(parts)]


def _parts(n_tokens: Sequence[int], run: RunInProgress) -> list[list[int]]:
    model, on_gpu = run.table("models").to_pylist()[0], run.device.startswith("cuda")
    size = prompts_per_part(
        model["n_layers"], len(SITES), model["hidden_size"], GPU_PART_BYTES if on_gpu else PART_BYTES
    )
    most = max(GPU_TOKENS if on_gpu else CPU_TOKENS, most_per_shard(run.device, 2 * model["n_params"]))
    parts: list[list[int]] = [[]]
    tokens = 0
    for prompt in sorted(range(len(n_tokens)), key=lambda i: -n_tokens[i]):
        if len(parts[-1]) == size or (parts[-1] and tokens + n_tokens[prompt] > most):
            parts.append([])
            tokens = 0
        parts[-1].append(prompt)
        tokens += n_tokens[prompt]
    return parts


def _announce(posed: PosedQuestion, run: RunInProgress) -> Cost:
    if posed.job.dataset.answers is None:
        log.info(
            "No zero-shot answers: nothing is asked of %r. --ask and --answers ask a question.", posed.job.dataset.name
        )
    elif not posed.question.separates:
        log.info("No zero-shot answers: %r and %r begin with the same tokens of this model.", *posed.question.answers)
    return run.once(_cost, Shard("cost"))


def _captured(subject: Captured, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of ``zero_shot`` and ``activations``; advances by tokens."""
    begun, question, prompts = time.monotonic(), subject.question, shard.work
    texts = [subject.token_ids[i] for i in prompts]
    vectors, ends = subject.capture.vectors_and_ends(texts, subject.prefix, question.cue, on_batch=advance)
    if question.separates:
        labels = np.array([subject.job.dataset.examples[i].label for i in prompts])
        yield Rows(
            "zero_shot",
            [zero_shot_rows(prompts, labels, answer_probabilities(subject.capture, ends, question), question)],
        )
    narrow, lacking = subject.job.measuring.store == "float16", subject.capture.lacking
    groups = activation_groups(prompts, SITES, vectors, float16=narrow, lacking=lacking)
    yield timed("activations", list(groups), begun)


def _stored_shards(posed: PosedQuestion, run: RunInProgress) -> list[Shard]:
    """Stored values of the chosen prompts: states (prompt, layer, hidden), and probabilities (prompt, 2) or None."""
    chosen = chosen_prompts(posed.token_ids)
    parts = [
        run.staged.part("activations", shard.name)
        for shard in _capture_shards(posed, run)
        if not set(chosen).isdisjoint(shard.work)
    ]
    answers = None
    if posed.question.separates:
        rows = {row["prompt_id"]: row for row in run.table("zero_shot").to_pylist()}
        answers = np.array([[rows[i]["prob_negative"], rows[i]["prob_positive"]] for i in chosen])
    return [Shard("stored", (read_states(parts, chosen, SITES[0]), answers))]


def _check_stored(subject: Captured, shard: Shard, _advance: Advance) -> Iterator[Rows]:
    """Compare stored values with the untouched model, one prompt at a time. Raises ModelError for a difference."""
    (states, answers), begun = shard.work, time.monotonic()
    texts = [subject.token_ids[i] for i in subject.chosen]
    rows = check_stored(subject.capture, texts, states)
    if answers is not None:
        rows.append(check_answers(subject.capture, texts, answers, subject.question))
    yield rows_of("checks", rows, begun)
