"""Length classes of texts: only texts of one class share a batch, since some rotary embeddings depend on the length.

LongRoPE has one set of frequencies for texts up to a length, and one for longer texts. Dynamic RoPE has one for each
length beyond its limit. transformers uses the longest row of a batch for all rows, so one long row would change the
others. Texts of one length class have the same frequencies. They share batches, and cached tokens are used only for
texts of their own class.

    length_class = LengthClasses(model.config)
    length_class(40) == length_class(5000)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdb.ingest.models.find import LoadedModel

_FIXED = ("default", "linear", "yarn", "llama3", "proportional", "axial")
"""Types of RoPE whose frequencies are the same for texts of all lengths."""


@dataclass(frozen=True)
class _Rope:
    """Frequencies that change for texts of more than ``limit`` tokens; with ``each``, they change at every length."""

    limit: int
    each: bool

    def side(self, n_tokens: int) -> int:
        """Return 0 up to the limit; beyond it 1, or the length itself with ``each``."""
        return 0 if n_tokens <= self.limit else n_tokens if self.each else 1


class LengthClasses:
    """Length classes of texts in a model with this config; in ordinary models, all texts are in one class."""

    def __init__(self, config: Any) -> None:
        self._ropes = tuple(_changing(config.get_text_config()))

    def __call__(self, n_tokens: int) -> tuple[int, ...]:
        """Return the class of a text of ``n_tokens`` tokens, counted with its cue and its cached prefix."""
        return tuple(rope.side(n_tokens) for rope in self._ropes)

    @property
    def remembered(self) -> bool:
        """Whether the model keeps the frequencies of the longest text that it has read."""
        return any(rope.each for rope in self._ropes)


def _changing(text: Any) -> Iterator[_Rope]:
    """Yield the RoPEs of a text config that depend on the length: one per model, or per type of layer."""
    declared = getattr(text, "rope_parameters", None) or {}
    for rope in [value for value in declared.values() if isinstance(value, dict)] or [declared]:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        longest = getattr(text, "max_position_embeddings", None) or 0
        limit = rope.get("original_max_position_embeddings") or longest
        if kind == "longrope":
            yield _Rope(limit, each=False)
        elif "dynamic" in kind:
            yield _Rope(min(limit, longest), each=True)
        elif kind not in _FIXED:  # unknown type: only texts of equal length surely agree
            yield _Rope(0, each=True)


def forget_longest(loaded: LoadedModel) -> None:
    """Reset the model's RoPE, so that the next text does not depend on earlier ones.

    Dynamic RoPE keeps the frequencies of the longest text so far, and transformers resets them only at a text below the
    limit: so one token is run. For other models, nothing is run.
    """
    import torch

    if LengthClasses(loaded.model.config).remembered:
        with torch.inference_mode():
            loaded.model(torch.zeros(1, 1, dtype=torch.long, device=loaded.device), use_cache=False)
