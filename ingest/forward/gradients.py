"""Gradients of a target's log-probability by what each part of the model writes: attribution patching.

One forward and one backward pass estimate the effect of every replacement at once: the gradient times the difference
between the replacement and the value (AtP: Nanda 2023; Syed et al. 2023, arXiv 2310.10348). RelP replaces the gradient
by the coefficients of layer-wise relevance propagation (Jafari et al. 2025, arXiv 2508.21258): norms keep their scale
(LN rule), attention keeps its weights (AH rule), an activation is a fixed factor (identity rule), and the product of a
gate and its projection is divided in equal halves (half rule). In code, all four are gradients of a pass in which a
factor is detached.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError
from kdb.ingest.forward.attention import watched_attention
from kdb.ingest.forward.blocks import Block
from kdb.ingest.forward.decomposition import Decomposition
from kdb.ingest.forward.ffn import Dense
from kdb.ingest.forward.length_classes import forget_longest
from kdb.ingest.forward.linear import Norm
from kdb.ingest.forward.memory import tokens_at_once
from kdb.ingest.forward.patching import Pass, same_length, touched, width

if TYPE_CHECKING:
    import torch
    from torch import nn

_SHARE = 4
"""A pass with gradients keeps about so many times the states of one without."""


def gradients(
    decomposition: Decomposition,
    passes: Sequence[Pass],
    components: Sequence[str],
    method: str = "atp",
) -> list[dict[str, torch.Tensor]]:
    """Return for each pass the gradients of the target's log-probability, and of its logit minus the rival's.

    Each is (2, layer, position, width) by component, float32 on the CPU; the second is NaN without a rival. Raises
    ModelError for a model whose gradients cannot be had.
    """
    import torch

    found: list[dict[str, torch.Tensor]] = [{} for _ in passes]
    most = max(1, tokens_at_once(decomposition.loaded) // _SHARE)
    for rows in same_length([p.token_ids for p in passes], most):
        some = [passes[i] for i in rows]
        with torch.enable_grad(), _linear(decomposition, method):
            by_component = _batch(decomposition, some, components)
        for row, (i, one) in enumerate(zip(rows, some, strict=True)):
            at = list(one.positions)
            found[i] = {c: torch.stack([g[:, row, at] for g in pair]) for c, pair in by_component.items()}
            if one.rival < 0:
                for values in found[i].values():
                    values[1] = torch.nan
    return found


def _batch(
    decomposition: Decomposition, passes: Sequence[Pass], components: Sequence[str]
) -> dict[str, list[torch.Tensor]]:
    """Gradients (layer, row, position, width) of both measures, by component."""
    import torch

    device, structure = decomposition.loaded.device, decomposition.structure
    ids = torch.tensor([list(p.token_ids) for p in passes], device=device)
    shape, kept = (ids.shape[0], ids.shape[1]), list[tuple[str, int, "torch.Tensor"]]()

    def keep(component: str, layer: int, states: torch.Tensor) -> torch.Tensor:
        # The model continues with a copy, which it may change in place: else this tensor would have no gradient.
        kept.append((component, layer, states))
        return states.clone()

    forget_longest(decomposition.loaded)
    with (
        structure.blocks[0].register_forward_pre_hook(_as_input, with_kwargs=True),
        touched(decomposition, components, shape, keep),
    ):
        hidden = structure.decoder(ids, use_cache=False)[0][:, -1]
    log_p = structure.unembed_normed(hidden).float().log_softmax(-1)
    every = torch.arange(len(passes), device=device)
    own = log_p[every, torch.tensor([p.target for p in passes], device=device)]
    rival = log_p[every, torch.tensor([max(p.rival, 0) for p in passes], device=device)]
    flat = [states for _component, _layer, states in kept]
    try:
        both = [torch.autograd.grad(m.sum(), flat, retain_graph=m is own) for m in (own, own - rival)]
    except RuntimeError as error:
        raise ModelError(
            f"{decomposition.loaded.source.name}: gradients of this model cannot be had ({error}). Use --method exact, "
            "or measure it without --quantize."
        ) from error
    return {c: [_by_layer(decomposition, c, kept, grads) for grads in both] for c in components}


def _by_layer(decomposition: Decomposition, component: str, kept: Sequence[Any], grads: Sequence[Any]) -> torch.Tensor:
    """Gradients (layer, row, position, width) of one component, from those of all states; 0 where it has none."""
    import torch

    found: list[Any] = [None] * len(decomposition.blocks)
    for (own, layer, _states), grad in zip(kept, grads, strict=True):
        if own == component:
            found[layer] = grad if found[layer] is None else found[layer] + grad
    rows, positions = kept[0][2].shape[:2]
    zeros = torch.zeros(rows, positions, width(decomposition, component), device=kept[0][2].device)
    return torch.stack([zeros if grad is None else grad.float() for grad in found]).cpu()


def _as_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Let gradients be recorded from the first block's input on."""
    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}
    return (args[0].detach().requires_grad_(), *args[1:]), kwargs


# Rules of RelP ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _linear(decomposition: Decomposition, method: str) -> Iterator[None]:
    """Let gradients follow the rules of RelP; with ``atp`` they are those of the model."""
    if method == "atp":
        yield
        return
    _check_rules(decomposition)
    with contextlib.ExitStack() as hooks:
        for block in decomposition.blocks:
            for norm in (block.attn_norm, block.ffn_norm, block.attn_post, block.ffn_post):
                if norm is not None:
                    hooks.enter_context(norm.module.register_forward_hook(_frozen_scale(norm)))
            dense = _dense(decomposition, block)
            if dense.gated:
                hooks.enter_context(dense.module.register_forward_pre_hook(_halved))
            assert dense.activation is not None
            hooks.enter_context(dense.activation.register_forward_hook(_fixed_factor))
        final = decomposition.final_norm
        hooks.enter_context(final.module.register_forward_hook(_frozen_scale(final)))
        hooks.enter_context(watched_attention(decomposition.loaded.model, lambda *_: None, frozen=True))
        yield


def _check_rules(decomposition: Decomposition) -> None:
    """Raise ModelError for parts that no rule of RelP covers."""
    heads = [block.heads for block in decomposition.blocks if block.heads is not None]
    lacks = {
        "a mixer": bool(decomposition.with_mixer),
        "an attention of its own": any(not one.watched for one in heads),
        "gates on its heads": any(one.gated for one in heads),
    }
    if any(lacks.values()):
        what = next(name for name, is_so in lacks.items() if is_so)
        raise ModelError(
            f"{decomposition.loaded.source.name}: this model has {what}, which RelP has no rule for. Use --method atp "
            "or exact."
        )


def _dense(decomposition: Decomposition, block: Block) -> Dense:
    dense = block.ffn.dense
    if dense is None or dense.activation is None:
        lacks = "a dense FFN" if dense is None else "the activation function of the FFN as a module"
        raise ModelError(
            f"{decomposition.loaded.source.name}: RelP needs {lacks}, and this model has none. Use --method atp or "
            "exact."
        )
    return dense


def _frozen_scale(norm: Norm) -> Callable[..., torch.Tensor]:
    def hook(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        scale = norm.scale(args[0].detach().float(), output.detach().float())
        linear = norm.after(args[0].float()) * scale[..., None]
        return _with_gradient_of(linear.to(output.dtype), output)

    return hook


def _fixed_factor(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Identity rule: f(x) = x · (f(x) / x), with the fraction fixed."""
    x = args[0]
    safe = x.detach().where(x.detach().abs() > 1e-6, x.new_tensor(1e-6))
    return _with_gradient_of(x * (output.detach() / safe), output)


def _halved(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Half rule: both factors of a product get half of its relevance."""
    return (args[0] / 2 + args[0].detach() / 2, *args[1:])


def _with_gradient_of(linear: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return the values of ``output`` with the gradient of ``linear``."""
    return linear + (output - linear).detach()
