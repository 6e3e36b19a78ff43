"""Watch what attention does, and find its parts: the module, the linear map that reads its heads, its values.

Most families call an attention function of transformers' AttentionInterface: ours takes its place, and sees weights and
values. Some families compute attention themselves. Under eager attention their modules return the weights, and a text
of one token shows the values, since its only weight is 1. Where neither holds, heads are read as a whole: the input of
the linear map after them, without positions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError
from kdb.ingest.forward.linear import Call, flat, is_linear, n_inputs, same

if TYPE_CHECKING:
    import torch
    from torch import nn

ATTENTION = "kdb"
"""Name under which our attention function is registered in transformers."""

Watcher = Callable[..., None]
_watching: list[Watcher] = []
_ROUNDING = 0.02
"""Largest difference from 1 of a sum of weights, in half precision."""

_ones: list[bool] = []
"""Not empty while the attention function returns ones."""


@contextlib.contextmanager
def watched_attention(model: Any, watcher: Watcher, *, frozen: bool = False) -> Iterator[None]:
    """Run ``model`` with our attention function, which calls ``watcher(module, query, value, weights)``.

    ``frozen`` attention lets no gradient through its weights.

    query and value (batch, heads or key-value heads, position, entry) are as the attention used them, after any
    rotation; weights (batch, heads, position, position) are after softmax. A family with an attention of its own does
    not call it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, functools.partial(_attention, frozen=frozen))
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        # Falcon has its own attention, and asks the config whether to use a fused kernel, which shows no weights.
        model.config._attn_implementation = "eager"
    _watching.append(watcher)
    try:
        yield
    finally:
        _watching.remove(watcher)
        model.set_attn_implementation(before)
        model.config._attn_implementation = before


@contextlib.contextmanager
def attending_ones() -> Iterator[None]:
    """Let our attention function return ones, unwatched: what reaches the linear map after the heads is their gate."""
    _ones.append(True)
    try:
        yield
    finally:
        _ones.pop()


def is_asked_again() -> bool:
    """Whether an attention runs a second time, for its gate."""
    return bool(_ones)


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
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Compute softmax attention in plain steps, since a fused kernel would not return the weights that it used.

    ``s_aux`` (heads) or ``sinks`` (batch, heads, position, 1) are the scores of attention sinks, whose share of the
    softmax reads nothing.
    """
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    if _ones:
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        return value.new_ones(shape), None
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask[..., : keys.shape[-2]]
    weights = _softmax(scores, s_aux.reshape(1, -1, 1, 1) if s_aux is not None else sinks).to(query.dtype)
    weights = weights.detach() if frozen else weights
    for watcher in _watching:
        watcher(module, query, value, weights)
    return (weights @ values).transpose(1, 2).contiguous(), None


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    import torch

    if sinks is None:
        return scores.float().softmax(-1)
    together = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    return together.float().softmax(-1)[..., :-1]


def states_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states that a module is called with, positional or not; None if there are none."""
    return args[0] if args else kwargs.get("hidden_states")


def feed(module: nn.Module, hidden: torch.Tensor) -> Any:
    """Replace a module's input by these hidden states, positional or not."""

    def put(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    return module.register_forward_pre_hook(put, with_kwargs=True)


# Finding attention -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """The attention of one block.

    ``module`` calls the attention function (``watched``) or computes attention itself, and returns the weights.
    ``out`` is the linear map that reads the heads: ``n_heads`` of
    ``head_size`` entries. ``gated``: a gate multiplies the heads, entry by entry, before ``out`` reads them.
    ``values_of`` is the layer whose input the values are computed from. ``positions``: weights and values are known;
    otherwise heads are read as a whole.
    """

    module: nn.Module
    out: nn.Module
    n_heads: int
    head_size: int
    watched: bool
    gated: bool
    values_of: int
    positions: bool


@dataclass
class Attended:
    """Records of the attentions of all blocks in the trace, by module.

    ``mixed`` (tokens, heads · head size) is what the attention function returned, ``values`` its values, ``heads`` the
    number of heads, and ``weights`` (heads, token, token) what modules with an attention of their own returned.
    """

    mixed: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    values: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    heads: dict[nn.Module, int] = field(default_factory=dict)
    weights: dict[nn.Module, torch.Tensor] = field(default_factory=dict)

    def watch(self, module: nn.Module, query: torch.Tensor, value: torch.Tensor, weights: torch.Tensor) -> None:
        """Note one call of the attention function."""
        groups = weights.shape[1] // value.shape[1]
        together = weights @ value.repeat_interleave(groups, dim=1)
        self.mixed[module] = flat(together.transpose(1, 2).flatten(2))
        self.values[module], self.heads[module] = value, query.shape[1]

    def note(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Note the weights that a module returns, if it returns any."""
        weights = weights_returned(output)
        if weights is not None and _are_weights(weights):
            self.weights[module] = weights[0]


def weights_returned(output: Any) -> Any:
    """The first output of a module, after its states, that has the shape (batch, heads, position, position)."""
    import torch

    every = [one for one in (output[1:] if isinstance(output, tuple | list) else ()) if isinstance(one, torch.Tensor)]
    return next((one for one in every if one.ndim == 4 and one.shape[2] == one.shape[3]), None)


def _are_weights(found: torch.Tensor) -> bool:
    """Whether these are attention weights (…, position, position): of earlier tokens, with rows that sum to 1."""
    off = (found.float().sum(-1) - 1).abs().amax()
    return bool((found >= 0).all() & (off < _ROUNDING) & (found.triu(1) == 0).all())


def find_attention(where: str, inside: set[nn.Module], calls: Sequence[Call], attended: Attended) -> Attention | None:
    """Find the attention among a block's modules and calls; None if the block has none.

    Raises ModelError if no linear map reads the heads.
    """
    watched = next((m for m in attended.mixed if m in inside), None)
    module = watched or next((m for m in attended.weights if m in inside), None)
    if module is None:
        return None
    of_attention = set(module.modules())
    linear = [c for c in calls if is_linear(c.module) and c.module in of_attention]
    heads = attended.mixed.get(module)
    out = next((c for c in linear if heads is not None and same(c.read, heads)), None)
    gated = watched is not None and out is None
    width = None if heads is None else heads.shape[-1]
    out = out or next((c for c in reversed(linear) if width in (None, n_inputs(c.module))), None)
    if out is None:
        raise ModelError(f"{where} has no linear map that reads its heads.")
    n = attended.heads[module] if watched is not None else len(attended.weights[module])
    if n_inputs(out.module) % n:
        raise ModelError(f"{where} has no linear map that reads its heads.")
    return Attention(module, out.module, n, n_inputs(out.module) // n, watched is not None, gated, -1, positions=True)


def with_sources(attentions: Sequence[Attention | None], attended: Attended) -> list[Attention | None]:
    """Note of each layer which layer its values are computed from: an earlier one, if layers share them."""
    first: list[tuple[torch.Tensor, int]] = []
    found: list[Attention | None] = []
    for layer, one in enumerate(attentions):
        source = layer
        if one is not None and one.watched:
            value = attended.values[one.module]
            source = next((at for own, at in first if same(own, value)), layer)
            first.append((value, source))
        found.append(None if one is None else replace(one, values_of=source))
    return found
