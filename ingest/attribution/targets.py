"""Target token of a prompt: the first token that the answer adds after it.

token_ids, target = target_token(loaded.tokenizer, "The capital of France is the city of", "Paris")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdb.errors import DatasetError
from kdb.ingest.models.tokens import bare, read_texts


def target_token(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Return the prompt's token ids, and the id of the first token that the answer adds after them and a space.

    The ids are those of :func:`kdb.ingest.models.tokens.read_texts`. White space at the prompt's end is removed. Some
    tokenizers make the space before an answer a token of its own, mostly before a digit; it then becomes the prompt's
    last token.
    Raises DatasetError, naming prompt and answer, if the answer adds no token, or the token of unknown words.
    """
    prompt, answer = prompt.rstrip(), answer.strip()
    ids, added = read_texts(tokenizer, [prompt, f"{prompt} {answer}" if answer else prompt])
    merged = added[: len(ids)] != ids
    if merged:  # a token spans the border of prompt and answer: use the tokens of the answer alone
        added = [*ids, *bare(tokenizer, f" {answer}")]
    position = next((i for i in range(len(ids), len(added)) if not _is_space(tokenizer, added[i])), None)
    if position is None:
        raise DatasetError(f"{_which(prompt, answer)} adds no token to the prompt: use another answer.")
    if added[position] == tokenizer.unk_token_id:
        raise DatasetError(f"{_which(prompt, answer)} is unknown to the tokenizer. Use another one.")
    return (ids if merged else added[:position]), added[position]


def check_candidates(targets: Sequence[int], categories: Sequence[str]) -> None:
    """Raise DatasetError for a category with only one target token, since the target would have no rival."""
    by_category: dict[str, set[int]] = {}
    for target, category in zip(targets, categories, strict=True):
        by_category.setdefault(category, set()).add(target)
    for category, tokens in by_category.items():
        if len(tokens) == 1:
            raise DatasetError(
                f"All answers of the category {category!r} begin with the same token of this model. A target is "
                "compared with the other targets of its category: add different answers to it."
            )


def _is_space(tokenizer: Any, token: int) -> bool:
    """Whether a token is only white space, such as the single "▁" that sentencepiece puts before a digit."""
    return not tokenizer.decode([token]).strip()


def _which(prompt: str, answer: str) -> str:
    shown = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
    return f"The answer {answer!r} to the prompt {shown!r}"
