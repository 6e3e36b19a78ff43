"""Which texts may share a batch: the rotary embedding (RoPE) of some models depends on how long a text is.

LongRoPE has one set of frequencies for texts up to a length, and one for longer texts. Dynamic RoPE has one for each
length beyond its limit. transformers looks at the longest row of a batch for all rows, so one long row would change the
others. A length class says which frequencies a text gets. Texts of one class share batches, and tokens in a cache serve
only texts of their own class.

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
    """Frequencies that change for texts of more than ``limit`` tokens; with ``each``, at every length from there."""

    limit: int
    each: bool

    def side(self, n_tokens: int) -> int:
        """0 up to the limit. Beyond it 1, or the length itself."""
        return 0 if n_tokens <= self.limit else n_tokens if self.each else 1


class LengthClasses:
    """The length class of a text in a model with this config; of an ordinary model, all texts have the same."""

    def __init__(self, config: Any) -> None:
        self._ropes = tuple(_changing(config.get_text_config()))

    def __call__(self, n_tokens: int) -> tuple[int, ...]:
        """The class of a text of so many tokens, with what follows it and what a cache holds of it."""
        return tuple(rope.side(n_tokens) for rope in self._ropes)

    @property
    def remembered(self) -> bool:
        """Whether the model keeps the frequencies of the longest text that it has read."""
        return any(rope.each for rope in self._ropes)


def _changing(text: Any) -> Iterator[_Rope]:
    """The RoPEs of a text config that depend on the length: one for the model, or one for each type of layer."""
    declared = getattr(text, "rope_parameters", None) or {}
    for rope in [value for value in declared.values() if isinstance(value, dict)] or [declared]:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        longest = getattr(text, "max_position_embeddings", None) or 0
        limit = rope.get("original_max_position_embeddings") or longest
        if kind == "longrope":
            yield _Rope(limit, each=False)
        elif "dynamic" in kind:
            yield _Rope(min(limit, longest), each=True)
        elif kind not in _FIXED:  # a type that is new to kdb: only texts of the same length are sure to be alike
            yield _Rope(0, each=True)


def forget_longest(loaded: LoadedModel) -> None:
    """Make the model forget the longest text that it has read, so that the next is read as if it were the first.

    Dynamic RoPE keeps the frequencies of that text, and transformers resets them only for a text below the limit: so
    one token is run. Models without such a RoPE run nothing.
    """
    import torch

    if LengthClasses(loaded.model.config).remembered:
        with torch.inference_mode():
            loaded.model(torch.zeros(1, 1, dtype=torch.long, device=loaded.device), use_cache=False)
