"""Watch what attention does: an attention function of our own, registered in transformers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

ATTENTION = "kdb"
"""Name under which our attention function is registered in transformers."""

Watcher = Callable[..., None]
_watching: list[Watcher] = []


@contextlib.contextmanager
def watched_attention(model: Any, watcher: Watcher, *, frozen: bool = False) -> Iterator[None]:
    """Run ``model`` with our attention function, which calls ``watcher(module, query, value, weights)``.

    ``frozen`` attention lets no gradient through its weights.

    query and value (batch, heads or key-value heads, position, entry) are as the attention used them, after any
    rotation; weights (batch, heads, position, position) are after softmax.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, functools.partial(_attention, frozen=frozen))
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    _watching.append(watcher)
    try:
        yield
    finally:
        _watching.remove(watcher)
        model.set_attn_implementation(before)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    *,
    frozen: bool,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Compute softmax attention in plain steps, since a fused kernel would not return the weights that it used."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores + attention_mask[..., : keys.shape[-2]]
    weights = scores.float().softmax(-1).to(query.dtype)
    weights = weights.detach() if frozen else weights
    for watcher in _watching:
        watcher(module, query, value, weights)
    return (weights @ values).transpose(1, 2).contiguous(), None
