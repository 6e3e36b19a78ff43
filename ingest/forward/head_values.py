"""The values of attention: the projection that computes them, and the gates on what attention returns."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdb.ingest.forward.attention import Attended, Attention, attending_ones, feed, watched_attention
from kdb.ingest.forward.linear import Call, flat, is_norm, n_required, read_norm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdb.ingest.forward.decomposition import Decomposition
    from kdb.ingest.models.find import LoadedModel

_UNIT_ROWS = 16
"""Positions of one sequence of unit vectors: fewer than the context of any model."""

_EXPLAINED = 1e-2
"""Largest relative difference of heads from weights times values, in the trace, if both are known."""

ValueRows = tuple["torch.Tensor", "torch.Tensor"]
"""Rows (heads · head size, hidden) of a value projection, and its bias (heads · head size)."""


def measured_values(
    loaded: LoadedModel, decoder: nn.Module, heads: Mapping[int, Attention], size: int
) -> dict[int, ValueRows]:
    """Measure the value projection of each layer from passes with unit vectors, of ``size`` entries, as inputs.

    Attention functions show their values. A family with an attention of its own reads each vector as a text of one
    token: all its weight is on itself, so that the heads are its values.
    """
    found: dict[int, ValueRows] = {}
    for width in (_UNIT_ROWS, 1):
        some = {i: one for i, one in heads.items() if one.watched == (width > 1)}
        if some:
            found |= _measured(loaded, decoder, some, size, width)
    return found


def _measured(
    loaded: LoadedModel, decoder: nn.Module, heads: Mapping[int, Attention], size: int, width: int
) -> dict[int, ValueRows]:
    """Feed unit vectors to these attentions, in texts of ``width`` tokens."""
    import torch

    device, dtype = loaded.device, getattr(torch, loaded.dtype)
    n = -(-(size + 1) // width) * width  # at least one row of zeros, which gives the bias
    units = torch.nn.functional.pad(torch.eye(size, device=device, dtype=dtype), (0, 0, 0, n - size))
    units = units.view(-1, width, size)
    layer_of = {one.module: i for i, one in heads.items()}
    found: dict[int, ValueRows] = {}

    def keep(layer: int, values: torch.Tensor) -> None:
        rows = values[: size + 1].float()  # unit, entries of all heads
        found[layer] = (rows[:-1] - rows[-1]).T.to(dtype), rows[-1]

    def watch(module: nn.Module, query: torch.Tensor, value: torch.Tensor, _weights: torch.Tensor) -> None:
        if module in layer_of:
            every = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            keep(layer_of[module], every.transpose(1, 2).flatten(0, 1).flatten(1))

    def read(layer: int, _module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        keep(layer, flat(args[0]))

    ids = torch.zeros(units.shape[:2], dtype=torch.long, device=device)
    with contextlib.ExitStack() as hooks, watched_attention(loaded.model, watch), torch.inference_mode():
        for layer, one in heads.items():
            hooks.enter_context(feed(one.module, units))
            hooks.enter_context(_without_scales(one.module))
            if not one.watched:
                hooks.enter_context(one.out.register_forward_hook(functools.partial(read, layer)))
        decoder(ids, use_cache=False)
    return found


@contextlib.contextmanager
def _without_scales(attention: nn.Module) -> Iterator[None]:
    """Let the norms within an attention be linear: their scale is left out."""
    with contextlib.ExitStack() as hooks:
        for norm in inner_norms(attention):
            # A copy, because the norm itself calls the hook.
            hooks.enter_context(norm.register_forward_hook(functools.partial(_unscaled, copy.deepcopy(norm))))
        yield


def _unscaled(twin: nn.Module, _module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    norm = read_norm(twin, *args[0].shape)
    return (norm.after(args[0].float()) + norm.bias).to(output.dtype)


def inner_norms(attention: nn.Module) -> list[nn.Module]:
    """The norms within an attention: of queries and keys, or on the way to its values."""
    return [m for m in attention.modules() if is_norm(m) and n_required(m) == 1]


# Gates -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched_gates(heads: Mapping[int, Attention], keep: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call ``keep(layer, gate)`` with what multiplies the heads (batch, position, heads · head size) of each layer.

    Each attention with a gate runs twice: the second time, its attention function returns ones.
    """
    with contextlib.ExitStack() as hooks:
        for layer, one in heads.items():
            if one.gated:
                hook = functools.partial(_gate, one, layer, keep)
                hooks.enter_context(one.module.register_forward_hook(hook, with_kwargs=True))
        yield


def _gate(
    one: Attention,
    layer: int,
    keep: Callable[[int, torch.Tensor], None],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    _output: Any,
) -> None:
    seen: list[torch.Tensor] = []
    with one.out.register_forward_hook(lambda _m, read, _o: seen.append(read[0])), attending_ones():
        module.forward(*args, **kwargs)
    keep(layer, seen[0])


# Checking --------------------------------------------------------------------------------------------------------


def positions_known(decomposition: Decomposition, calls: Mapping[int, Sequence[Call]], attended: Attended) -> bool:
    """Whether weights times values, and times gates, are what the heads of the trace wrote.

    ``calls`` are those of each block in the trace, in which ``attended`` was seen.
    """
    heads = {i: block.heads for i, block in enumerate(decomposition.blocks) if block.heads is not None}
    return all(
        _off(_explained(decomposition, i, one, calls[i], attended), _read(one.out, calls[i])) < _EXPLAINED
        for i, one in heads.items()
        if not one.watched
    ) and _gates_hold(decomposition, {i: one for i, one in heads.items() if one.gated})


def _read(module: nn.Module, calls: Sequence[Call]) -> torch.Tensor:
    return next(c.read for c in calls if c.module is module)


def _explained(
    decomposition: Decomposition, layer: int, one: Attention, calls: Sequence[Call], attended: Attended
) -> torch.Tensor:
    """Heads (token, entries of all heads) by the weights that a module returned, and the values of its projection."""
    rows, bias = decomposition.value_rows[layer]
    values = (_read(one.module, calls).float() @ rows.float().T + bias).unflatten(-1, (one.n_heads, -1))
    mixed: torch.Tensor = attended.weights[one.module].float() @ values.transpose(0, 1)
    return mixed.transpose(0, 1).flatten(1)


def _gates_hold(decomposition: Decomposition, heads: Mapping[int, Attention]) -> bool:
    """Whether the heads are what attention functions return, times the gates that ones show."""
    import torch

    if not heads:
        return True
    attended, gates, reads = Attended(), dict[int, torch.Tensor](), dict[int, torch.Tensor]()
    ids = torch.arange(5, device=decomposition.loaded.device)[None]
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        hooks.enter_context(watched_attention(decomposition.loaded.model, attended.watch))
        for i, one in heads.items():
            hooks.enter_context(one.out.register_forward_hook(functools.partial(_keep_first, reads, i)))
        hooks.enter_context(watched_gates(heads, gates.__setitem__))
        decomposition.structure.decoder(ids, use_cache=False)
    return all(
        _off(attended.mixed[one.module].float() * flat(gates[i]).float(), flat(reads[i]).float()) < _EXPLAINED
        for i, one in heads.items()
    )


def _keep_first(found: dict[int, torch.Tensor], layer: int, _module: nn.Module, args: Any, _output: Any) -> None:
    found.setdefault(layer, args[0])


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
