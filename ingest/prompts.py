"""Put a job's texts into the template and tokenize them, once per run and in the same way for both studies.

posed = pose(job, load_tokenizer(job.source))
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kdb.errors import DatasetError, ModelError
from kdb.ingest.attribution.targets import Target, check_candidates, find_targets, with_own
from kdb.ingest.datasets.rows import excerpt
from kdb.ingest.job import Job
from kdb.ingest.models.find import ModelSource
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.load import model_row
from kdb.ingest.models.provenance import provenance
from kdb.ingest.models.tokens import count_spelled, read_texts
from kdb.ingest.rows import Rows, rows_of
from kdb.ingest.stages import RunInProgress, Shard, StoredStage, single

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt in the model's tokens.

    In the knowledge study, ``answer`` are its answer, the text before it, and the other answers of its category.
    """

    number: int
    token_ids: list[int]
    answer: Target | None = None

    @property
    def target(self) -> int:
        """The first token of the answer; −1 without one."""
        return self.answer.first if self.answer else -1

    @property
    def rivals(self) -> tuple[int, ...]:
        """The first tokens of the other answers in the category."""
        return self.answer.rivals if self.answer else ()


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
    targets = targets_of(job, tokenizer)
    whole = job.attributing.answer_tokens == "all"
    check_candidates(targets, [e.category or "" for e in job.dataset.examples], whole=whole)
    _warn_of_shared(job, sum(target.is_shared for target in targets))
    for number, target in enumerate(targets):
        yield Prompt(number, target.token_ids, target)


def targets_of(job: Job, tokenizer: Any) -> list[Target]:
    """Return the target of each prompt. Raises DatasetError for an answer that cannot be one."""
    examples, wanted = job.dataset.examples, job.attributing
    asked = [(text, e.answer or "", e.category or "") for text, e in zip(job.texts, examples, strict=True)]
    prefixes = [e.answer_prefix if wanted.answer_prefix is None else wanted.answer_prefix for e in examples]
    return [
        with_own(
            tokenizer, text, e.answer or "", target, e.rival, e.corrupt and text.replace(e.text.strip(), e.corrupt)
        )
        for (text, *_), e, target in zip(asked, examples, find_targets(tokenizer, asked, prefixes), strict=True)
    ]


def _warn_of_shared(job: Job, n_shared: int) -> None:
    """Warn of answers that begin with the same token as another answer of their category."""
    if not n_shared:
        return
    what = f"The answers to {n_shared} of {len(job.texts)} prompts of {job.dataset.name} begin with the same token as"
    if job.attributing.answer_tokens == "first":
        log.warning(
            "%s another answer of their category. One token cannot tell these apart, so the prompts are not kept. Use "
            "--answer-tokens all to compare whole answers.",
            what,
        )
    else:
        log.warning("%s another answer of their category. Scores explain this token, not the whole answer.", what)


def check_length(
    job: Job, token_ids: Sequence[Sequence[int]], config: Any, *, n_cue: int = 0, n_answer: int = 0
) -> None:
    """Raise DatasetError for a prompt with no tokens, or with too many for the model; cue and answer count too.

    Raise ModelError for a tokenizer of another model, which gives tokens that this model does not have.
    """
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    for number, ids in enumerate(token_ids):
        if ids and max(ids) >= text.vocab_size:
            raise ModelError(
                f"{_named(job, number)} has token {max(ids):,}, and the embedding of {job.source.name} has "
                f"{text.vocab_size:,} rows, numbered from 0. Its tokenizer is of another model, or tokens were added "
                "to it and not to the weights."
            )
    for number, ids in enumerate(token_ids):
        if limit is not None and 0 <= limit < len(ids) + n_cue + n_answer:  # XLNet's is −1: there is none
            cue = f" and {n_cue} of its cue" if n_cue else f" and up to {n_answer:,} of an answer" if n_answer else ""
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
        shape = model_row(job.source, config, job.measuring.dtype) | {"n_tokens": len(tokenizer)}
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
