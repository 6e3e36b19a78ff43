"""How a text becomes tokens, in both studies alike: with what the tokenizer puts before it, without what it appends.

token_ids = read_texts(tokenizer, ["The capital of France is", "The sky is"])
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

_PROBES = ("a", "0", ".", "the", "é", "的")
"""Texts that show what a tokenizer puts around a text; the first that has tokens is used."""


def read_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text as the model reads it.

    Special tokens that the tokenizer puts before a text stay. Those that it appends, such as an end-of-text token, are
    removed: hidden states, cues and answers are those of the text, and nothing stands between.
    """
    _before, after = _around(tokenizer)
    return [list(ids[: len(ids) - after]) for ids in tokenizer(list(texts))["input_ids"]]


def bare(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text alone, without any that the tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _around(tokenizer: Any) -> tuple[int, int]:
    """How many tokens the tokenizer puts before each text, and how many it appends."""
    for probe in _PROBES:
        ids, text = list(tokenizer(probe)["input_ids"]), bare(tokenizer, probe)
        for start in range(len(ids) - len(text) + 1) if text else ():
            if ids[start : start + len(text)] == text:
                return start, len(ids) - start - len(text)
    return 0, 0


# Special tokens that a text spells -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spelled:
    """Prompts, of ``n_prompts``, whose text spells what a tokenizer is meant to add.

    ``doubled`` begin with the token that the tokenizer puts there, and with the same token spelled by the text.
    ``special`` spell any other special token. ``tokens`` are the special tokens spelled, the most frequent first.
    """

    n_prompts: int
    doubled: int
    special: int
    tokens: tuple[str, ...]

    def tell(self, dataset: str) -> None:
        """Log what a user may not have meant."""
        named = ", ".join(map(repr, self.tokens[:3]))
        if self.doubled:
            log.warning(
                "%d of %d prompts of %s begin with the beginning-of-text token twice: the tokenizer adds it, and the "
                "text or the template spells it (%s). Leave it out there.",
                *(self.doubled, self.n_prompts, dataset, named),
            )
        if self.special:
            log.warning(
                "%d of %d prompts of %s spell a special token (%s): the model reads it as a control, not as text.",
                *(self.special, self.n_prompts, dataset, named),
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of ``checks``: counts, which have no tolerance and fail no run."""
        told = f"; a count, of {self.n_prompts} prompts, that fails no run"
        found = {
            "doubled_bos": (self.doubled, "prompts that begin with the beginning-of-text token twice"),
            "special_tokens_in_text": (self.special, "prompts whose text or template spells another special token"),
        }
        return [{"check": name, "value": float(n), "detail": detail + told} for name, (n, detail) in found.items()]


def count_spelled(tokenizer: Any, token_ids: Sequence[Sequence[int]]) -> Spelled:
    """Count the prompts, read by :func:`read_texts`, whose text spells special tokens."""
    before, _after = _around(tokenizer)
    special, doubled, other = _special(tokenizer), 0, 0
    tokens: Counter[int] = Counter()
    for ids in token_ids:
        twice = 0 < before < len(ids) and ids[before] == ids[before - 1]
        spelled = [token for token in ids[before + twice :] if token in special]
        doubled, other = doubled + twice, other + bool(spelled)
        tokens.update([ids[before]] * twice + spelled)
    named = tokenizer.convert_ids_to_tokens([token for token, _n in tokens.most_common()])
    return Spelled(len(token_ids), doubled, other, tuple(named))


def _special(tokenizer: Any) -> set[int]:
    """The ids of a tokenizer's special tokens, but for that of an unknown word, which no text needs to spell."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {number for number, token in added.items() if token.special}
    return {*marked, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
