"""Target token of a prompt: the first token that the answer adds after it.

token_ids, target = target_token(loaded.tokenizer, "The capital of France is the city of", "Paris")
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdb.errors import DatasetError
from kdb.ingest.datasets.joining import answer_prefix
from kdb.ingest.models.tokens import following, read_texts

Ids = tuple[int, ...]


def target_token(tokenizer: Any, prompt: str, answer: str, prefix: str | None = None) -> tuple[list[int], int]:
    """Return the prompt's token ids, and the first of the answer's, as in :func:`answer_tokens`."""
    ids, answer_ids = answer_tokens(tokenizer, prompt, answer, prefix)
    return ids, answer_ids[0]


def answer_tokens(tokenizer: Any, prompt: str, answer: str, prefix: str | None = None) -> tuple[list[int], Ids]:
    """Return the prompt's token ids, and the ids of the tokens that the answer adds after them and the prefix.

    The prefix is the text between prompt and answer; :func:`kdb.ingest.datasets.joining.answer_prefix` chooses it if
    none is given. Ids are those of :func:`kdb.ingest.models.tokens.read_texts`. Other white space at the prompt's end
    is removed. Some tokenizers make the space before an answer a token of its own, mostly before a digit; it then
    becomes the prompt's last token, as does a prefix that is not white space.
    Raises DatasetError, naming prompt and answer, if the answer adds no token, or the token of unknown words.
    """
    answer = answer.strip()
    before = prompt.rstrip() + (answer_prefix(prompt, answer) if prefix is None else prefix)
    text = before.rstrip()
    ids, added = read_texts(tokenizer, [text, before + answer if answer else text])
    merged = added[: len(ids)] != ids
    if merged:  # a token spans the border of prompt and answer: use the tokens of the answer alone
        added = [*ids, *following(tokenizer, before[len(text) :] + answer)]
    position = next((i for i in range(len(ids), len(added)) if not _is_space(tokenizer, added[i])), None)
    if position is None:
        raise DatasetError(f"{_which(prompt, answer)} adds no token to the prompt: use another answer.")
    if added[position] == tokenizer.unk_token_id:
        raise DatasetError(f"{_which(prompt, answer)} is unknown to the tokenizer. Use another one.")
    return (ids if merged else added[:position]), tuple(added[position:])


@dataclass(frozen=True)
class Target:
    """A prompt's tokens, the ``prefix`` after its text, its answer's tokens, and those of its category's other answers.

    The other answers are joined to prompts by the same prefix. ``corrupt`` are the tokens of the prompt's corrupt text.
    """

    token_ids: list[int]
    prefix: str
    answer: Ids
    others: tuple[Ids, ...]
    corrupt: list[int] | None = None

    @property
    def first(self) -> int:
        """The target: the answer's first token."""
        return self.answer[0]

    @functools.cached_property
    def rivals(self) -> tuple[int, ...]:
        """The other answers' first tokens that are not the target."""
        return tuple(sorted({ids[0] for ids in self.others} - {self.first}))

    @property
    def is_shared(self) -> bool:
        """Whether another answer begins with the target, so that one token cannot tell them apart."""
        return any(ids[0] == self.first for ids in self.others)


def find_targets(
    tokenizer: Any, prompts: Sequence[tuple[str, str, str]], prefixes: Sequence[str | None]
) -> Iterator[Target]:
    """Yield the target of each prompt, given by text, answer and category, and by the prefix that is asked for."""
    used = [
        answer_prefix(text, answer) if prefix is None else prefix
        for (text, answer, _category), prefix in zip(prompts, prefixes, strict=True)
    ]
    read = [answer_tokens(tokenizer, text, answer, p) for (text, answer, _), p in zip(prompts, used, strict=True)]
    # Every answer of a category after every prefix that its prompts have, so that only answers are compared.
    known: dict[tuple[str, str], dict[str, Ids]] = {}
    for (_text, answer, category), prefix, (_ids, answer_ids) in zip(prompts, used, read, strict=True):
        known.setdefault((category, prefix), {}).setdefault(answer, answer_ids)
    answers: dict[str, set[str]] = {}
    for (category, _prefix), of in known.items():
        answers.setdefault(category, set()).update(of)
    for (category, prefix), of in known.items():
        for answer in sorted(answers[category] - set(of)):
            of[answer] = _alone(tokenizer, prefix, answer)

    @functools.cache
    def others(category: str, prefix: str, own: Ids) -> tuple[Ids, ...]:
        return tuple(sorted({ids for ids in known[category, prefix].values() if ids and ids != own}))

    for (_text, _answer, category), prefix, (ids, own) in zip(prompts, used, read, strict=True):
        yield Target(ids, prefix, own, others(category, prefix, own))


def with_own(
    tokenizer: Any, prompt: str, answer: str, target: Target, rival: str | None, corrupt: str | None
) -> Target:
    """Give a target the rival of its own, in place of the category's other answers, and its corrupt prompt.

    Raises DatasetError for a rival that has the same tokens as the answer.
    """
    others, ids = target.others, None
    if rival is not None:
        others = (answer_tokens(tokenizer, prompt, rival, target.prefix)[1],)
    if corrupt is not None:
        ids = answer_tokens(tokenizer, corrupt, answer, target.prefix)[0]
    if target.answer in others:
        raise DatasetError(f"{_which(prompt, answer)} has the same tokens as its rival {rival!r}: use another rival.")
    return replace(target, others=others, corrupt=ids)


def _alone(tokenizer: Any, prefix: str, answer: str) -> Ids:
    """Ids of an answer after white space, without the tokens that are only white space."""
    ids = following(tokenizer, prefix + answer)
    return tuple(ids[next((i for i, token in enumerate(ids) if not _is_space(tokenizer, token)), len(ids)) :])


def check_candidates(targets: Sequence[Target], categories: Sequence[str], *, whole: bool = False) -> None:
    """Raise DatasetError if no prompt could be kept, or if all answers of a category have the same tokens.

    ``whole``: whole answers are compared, not only their first tokens.
    """
    without = next((category for t, category in zip(targets, categories, strict=True) if not t.others), None)
    alike = categories[0] if not whole and all(target.is_shared for target in targets) else None
    if (category := without or alike) is not None:
        raise DatasetError(
            f"All answers of the category {category!r} begin with the same token of this model. A target is "
            "compared with the other targets of its category: add different answers to it, or compare whole "
            "answers with --answer-tokens all."
        )


def _is_space(tokenizer: Any, token: int) -> bool:
    """Whether a token is only white space, such as the single "▁" that sentencepiece puts before a digit."""
    return not tokenizer.decode([token]).strip()


def _which(prompt: str, answer: str) -> str:
    shown = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
    return f"The answer {answer!r} to the prompt {shown!r}"
