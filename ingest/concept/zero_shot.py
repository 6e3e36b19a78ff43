"""Read the model's own answer: the probabilities that its next token begins one answer or the other.

A prompt is followed by a question or a cue, such as "\\nAnswer:", unless it already ends by asking. A dataset that asks
nothing has no answers. An answer may begin with or without a capital, and with or without a space; the probabilities
of all these first tokens are summed.

    question = question_of(tokenizer, load_dataset("world-cities"))
    vectors, ends = capture.vectors_and_ends(token_ids, cue=question.cue)
    probabilities = answer_probabilities(capture, ends, question)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdb.ingest.datasets import Dataset
from kdb.ingest.models.tokens import bare
from kdb.ingest.rows import arrow_rows

if TYPE_CHECKING:
    from kdb.ingest.forward.capture import Capture

_READOUT_ROWS = 64
"""Prompts to read out together: their logits and probabilities take 128 MiB for a vocabulary of 262,144."""


@dataclass(frozen=True)
class Question:
    """The question that follows each prompt.

    ``answers`` are the words for label 0 and label 1; ``cue`` are the tokens that follow the prompt, and
    ``first_tokens`` the tokens that may begin each answer.
    """

    answers: tuple[str, str]
    cue: tuple[int, ...]
    first_tokens: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def separates(self) -> bool:
        """Whether the first token distinguishes the answers."""
        return all(self.first_tokens)


def question_of(tokenizer: Any, dataset: Dataset) -> Question:
    """Return the question of a dataset in a model's tokens. A token that may begin both answers is used for neither.

    If an answer has no other tokens, or if the dataset asks nothing, the question has no cue.
    """
    if dataset.answers is None:
        return Question(("", ""), (), ((), ()))
    tokens = first_tokens(tokenizer, dataset.answers)
    cue = bare(tokenizer, dataset.cue) if all(tokens) else []
    return Question(dataset.answers, tuple(cue), tokens)


def first_tokens(tokenizer: Any, answers: tuple[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that may begin each of two answers, and not the other."""
    negative, positive = (_first_tokens(tokenizer, word) for word in answers)
    return tuple(sorted(negative - positive)), tuple(sorted(positive - negative))


def _first_tokens(tokenizer: Any, word: str) -> set[int]:
    variants = (space + spelling for space in ("", " ") for spelling in (word, word.capitalize()))
    return {bare(tokenizer, variant)[0] for variant in variants}


def answer_probabilities(capture: Capture, ends: NDArray[np.float32], question: Question) -> NDArray[np.float64]:
    """Compute the probabilities (prompt, 2) that the next token begins the negative and the positive answer.

    ``ends`` (prompt, hidden) are the last block's outputs at the token before the answer.
    """
    import torch

    loaded, dtype = capture.loaded, getattr(torch, capture.loaded.dtype)
    probabilities = []
    with torch.inference_mode():
        for states in torch.from_numpy(ends).split(_READOUT_ROWS):
            probs = capture.structure.readout(states.to(loaded.device, dtype)).softmax(-1)
            probabilities.append(
                torch.stack([probs[:, list(first)].double().sum(-1) for first in question.first_tokens], -1)
            )
    return torch.cat(probabilities).cpu().numpy()


def check_answers(
    capture: Capture, token_ids: Sequence[Sequence[int]], stored: NDArray[np.float64], question: Question
) -> dict[str, Any]:
    """Compare stored probabilities (prompt, 2) with the untouched model's, one prompt and its cue at a time.

    Returns a row of ``checks``. Raises ModelError if a difference is larger than the weights' dtype explains.
    """
    from kdb.ingest.forward.checks import check_row, untouched_logits

    off: list[float] = []
    for ids, probabilities in zip(token_ids, stored, strict=True):
        logits = untouched_logits(capture.loaded, capture.structure, [*ids, *question.cue])
        probs = logits.double().softmax(-1)
        own = [float(probs[list(first)].sum()) for first in question.first_tokens]
        off += [abs(a - b) for a, b in zip(probabilities, own, strict=True)]
    return check_row("stored_answers", off, capture.loaded, len(token_ids))


def zero_shot_rows(
    prompt_ids: Sequence[int], labels: NDArray[Any], probabilities: NDArray[np.float64], question: Question
) -> pa.Table:
    """Build rows of ``zero_shot``: the predicted answer is the likelier one, or the negative one if equally likely."""
    negative, positive = question.answers
    predicted = probabilities[:, 1] > probabilities[:, 0]
    return arrow_rows(
        "zero_shot",
        {
            "prompt_id": np.asarray(prompt_ids),
            "positive": positive,
            "negative": negative,
            "prob_positive": probabilities[:, 1],
            "prob_negative": probabilities[:, 0],
            "predicted": predicted.astype(np.int16),
            "correct": predicted == labels,
        },
    )
