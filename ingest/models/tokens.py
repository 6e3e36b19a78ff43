"""Tokenize texts, in the same way in both studies: with special tokens before the text, without those after it.

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
"""Texts that reveal what a tokenizer puts around a text, or before it; the first one that has tokens is used."""


def read_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text as the model reads it.

    Special tokens that the tokenizer puts before a text are kept. Those that it appends, such as an end-of-text token,
    are removed, so that the last token is the text's own, and cues and answers follow it directly.
    """
    _before, after = _around(tokenizer)
    return [list(ids[: len(ids) - after]) for ids in tokenizer(list(texts))["input_ids"]]


def bare(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def following(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text that follows another: without the space that some tokenizers put before texts."""
    for before in ("\n", *_PROBES):
        first, both = bare(tokenizer, before), bare(tokenizer, before + text)
        if first and both[: len(first)] == first and len(both) > len(first):
            return both[len(first) :]
    return bare(tokenizer, text)


def _around(tokenizer: Any) -> tuple[int, int]:
    """Count the tokens that the tokenizer puts before each text, and those that it appends."""
    for probe in _PROBES:
        ids, text = list(tokenizer(probe)["input_ids"]), bare(tokenizer, probe)
        for start in range(len(ids) - len(text) + 1) if text else ():
            if ids[start : start + len(text)] == text:
                return start, len(ids) - start - len(text)
    return 0, 0


# Special tokens that a text spells -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spelled:
    """Numbers of prompts, of ``n_prompts``, whose text contains special tokens.

    ``doubled`` prompts begin twice with the beginning-of-text token: once from the tokenizer, once from the text.
    ``special`` prompts contain another special token. ``tokens`` are the special tokens in texts, most frequent first.
    """

    n_prompts: int
    doubled: int
    special: int
    tokens: tuple[str, ...]

    def warn(self, dataset: str) -> None:
        """Warn of special tokens that a user may not have intended."""
        named = ", ".join(map(repr, self.tokens[:3]))
        if self.doubled:
            log.warning(
                "%d of %d prompts of %s begin with the beginning-of-text token twice: the tokenizer adds it, and the "
                "text or the template contains it (%s). Remove it from the text or the template.",
                *(self.doubled, self.n_prompts, dataset, named),
            )
        if self.special:
            log.warning(
                "%d of %d prompts of %s contain a special token (%s): the model reads it as a control, not as text.",
                *(self.special, self.n_prompts, dataset, named),
            )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of ``checks``: counts, which have no tolerance, so no run fails by them."""
        note = f"; a count, of {self.n_prompts} prompts, that fails no run"
        counts = {
            "doubled_bos": (self.doubled, "prompts that begin with the beginning-of-text token twice"),
            "special_tokens_in_text": (self.special, "prompts whose text or template spells another special token"),
        }
        return [{"check": name, "value": float(n), "detail": detail + note} for name, (n, detail) in counts.items()]


def count_spelled(tokenizer: Any, token_ids: Sequence[Sequence[int]]) -> Spelled:
    """Count the prompts, tokenized by :func:`read_texts`, whose text contains special tokens."""
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
    """Ids of a tokenizer's special tokens, except the unknown token, which ordinary words may become."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {number for number, token in added.items() if token.special}
    return {*marked, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
