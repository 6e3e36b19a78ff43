"""Put a job's texts into the template and tokenize them, once per run and in the same way for both studies.

posed = pose(job, load_tokenizer(job.source))
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kdb.errors import DatasetError, ModelError
from kdb.ingest.attribution.targets import check_candidates, target_token
from kdb.ingest.datasets.rows import excerpt
from kdb.ingest.job import Job
from kdb.ingest.models.find import ModelSource
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.load import count_params, model_row
from kdb.ingest.models.provenance import provenance
from kdb.ingest.models.tokens import count_spelled, read_texts
from kdb.ingest.rows import Rows, rows_of
from kdb.ingest.stages import RunInProgress, Shard, StoredStage, single

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt in the model's tokens.

    In the knowledge study, ``target`` is the first token of its answer, and ``rivals`` are the first tokens of the
    other answers in its category.
    """

    number: int
    token_ids: list[int]
    target: int = -1
    rivals: tuple[int, ...] = ()


@dataclass(frozen=True)
class Posed:
    """The prompts of a job, before its model is loaded."""

    job: Job
    prompts: tuple[Prompt, ...]

    @property
    def source(self) -> ModelSource:
        """The model that reads the prompts."""
        return self.job.source

    @property
    def token_ids(self) -> list[list[int]]:
        """The token ids of every prompt."""
        return [prompt.token_ids for prompt in self.prompts]


def pose(job: Job, tokenizer: Any) -> tuple[Prompt, ...]:
    """Tokenize a job's prompts and, in the knowledge study, their answers.

    Raises DatasetError for an answer that cannot be a target.
    """
    with model_errors(f"Cannot read the prompts of {job.dataset.name} with {job.source.name}"):
        if job.study == "concept":
            return tuple(Prompt(i, ids) for i, ids in enumerate(read_texts(tokenizer, job.texts)))
        return tuple(_with_targets(job, tokenizer))


def _with_targets(job: Job, tokenizer: Any) -> Iterator[Prompt]:
    examples = job.dataset.examples
    tokenized = [target_token(tokenizer, t, e.answer or "") for t, e in zip(job.texts, examples, strict=True)]
    targets, categories = [target for _ids, target in tokenized], [e.category or "" for e in examples]
    check_candidates(targets, categories)
    of_category: dict[str, set[int]] = {}
    for target, category in zip(targets, categories, strict=True):
        of_category.setdefault(category, set()).add(target)
    for i, ((ids, target), category) in enumerate(zip(tokenized, categories, strict=True)):
        yield Prompt(i, ids, target, tuple(sorted(of_category[category] - {target})))


def check_length(job: Job, token_ids: Sequence[Sequence[int]], config: Any, *, n_cue: int = 0) -> None:
    """Raise DatasetError for a prompt with no tokens, or with too many for the model; the cue's tokens count too.

    Raise ModelError for a tokenizer of another model, which gives tokens that this model does not have.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    largest = max((max(ids) for ids in token_ids if ids), default=0)
    if largest >= text.vocab_size:
        raise ModelError(
            f"The tokenizer of {job.source.name} does not belong to its weights: it gives token {largest:,}, and the "
            f"model has {text.vocab_size:,} tokens, numbered from 0. Use the tokenizer files of this model."
        )
    for number, ids in enumerate(token_ids):
        if limit is not None and len(ids) + n_cue > limit:
            cue = f" and {n_cue} of its cue" if n_cue else ""
            raise DatasetError(
                f"{_named(job, number)} has {len(ids):,} tokens{cue}, and {job.source.name} reads at most {limit:,}: "
                "shorten the text, or use a model with a longer context."
            )
        if not ids:
            raise DatasetError(f"{_named(job, number)} has no tokens in {job.source.name}: drop it.")


def _named(job: Job, number: int) -> str:
    """Name a prompt by its number, as ``prompt_id`` counts, and by the beginning of its text."""
    return f"Prompt {number} of {job.dataset.name!r}, {excerpt(job.dataset.examples[number].text)},"


def description(posed: Posed, tokenizer: Any, config: Any) -> StoredStage:
    """The stage that writes ``models``, ``datasets``, and the counts of special tokens in ``checks``."""

    def rows(_inputs: RunInProgress, _shard: Shard) -> list[Rows]:
        job, spelled = posed.job, count_spelled(tokenizer, posed.token_ids)
        spelled.warn(job.dataset.name)
        shape = model_row(job.source, config, count_params(config), job.measuring.dtype)
        dataset = {
            "study": job.study,
            "source": job.dataset.source,
            "fingerprint": job.dataset.fingerprint,
            "template": job.dataset.template,
            "n_prompts": len(job.dataset.examples),
            "n_positive": job.dataset.n_positive,
            "first_label": job.dataset.first_label if job.study == "concept" else None,
        }
        return [
            rows_of("checks", spelled.rows),
            rows_of("models", [shape | provenance(job.source, job.measuring.quantize)]),
            rows_of("datasets", [dataset]),
        ]

    return StoredStage(("checks", "models", "datasets"), single("texts"), rows)
