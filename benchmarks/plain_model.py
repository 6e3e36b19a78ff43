"""One prompt at a time through plain transformers: its states, and what each layer adds to the residual.

Nothing here uses kdb, or knows an architecture by its name. Hooks record what every module reads and writes; a layer's
contributions are those outputs that, added to its input, give its output.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

_SAME = 1e-5
"""Largest relative distance of two float32 tensors that are the same but for rounding."""


class NoReferenceError(Exception):
    """A part of the model of which no reference can be computed; the message says which."""


class WrongRowError(Exception):
    """A stored row of something that the model does not have or use."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its input and output, each (token, entry), in the model's dtype.

    ``routed``: what a module of experts is given: states and, except in Llama 4, the chosen experts and their weights.
    """

    name: str
    module: nn.Module
    read: torch.Tensor | None
    written: torch.Tensor | None
    routed: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Part:
    """A contribution to the residual: ``factor`` × what the module ``name`` writes; ``base`` are the parts before it.

    ``component`` is attn, ffn or mixer; ``beside`` is another module whose output is part of the same sum, such as that
    of a shared expert.
    """

    name: str
    component: str
    factor: float
    base: tuple[str, ...]
    beside: Part | None = None


class Plain:
    """One prompt alone through a model: what every module read and wrote, and the logits of the last position."""

    def __init__(self, model: Any, token_ids: Sequence[int]) -> None:
        self.model, self.n_tokens = model, len(token_ids)
        self.calls: list[Call] = []
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for name, module in model.named_modules():
                note = functools.partial(self._note, name)
                hooks.enter_context(module.register_forward_hook(note, with_kwargs=True))
            output = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False, output_hidden_states=True)
        self.logits = output.logits[0, -1].double()
        self.hidden = getattr(output, "hidden_states", None)

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        read = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        given = [x.detach().clone() if isinstance(x, torch.Tensor) else None for x in (*args, *kwargs.values())]
        holds = isinstance(getattr(module, "down_proj", None), nn.Parameter)
        routed = tuple(given) if holds and len(given) in (1, 3) else ()
        self.calls.append(Call(name, module, self._states(read), self._states(output), routed))

    def _states(self, x: Any) -> torch.Tensor | None:
        """Return a copy of states as (token, entry); None for what is no tensor of this prompt's tokens."""
        first = x[0] if isinstance(x, tuple | list) and x else x
        if not isinstance(first, torch.Tensor) or not first.is_floating_point() or first.numel() % self.n_tokens:
            return None
        if first.ndim == 4 and first.shape[:3] == (len(first), 1, self.n_tokens):  # Gemma 3n's streams come first
            first = first.permute(1, 2, 0, 3)
        return first.detach().reshape(self.n_tokens, -1).clone()

    def call(self, name: str) -> Call:
        """Return the last call of a module. Raises NoReferenceError if it was not called."""
        found = [call for call in self.calls if call.name == name]
        if not found:
            raise NoReferenceError(f"{name} was not called")
        return found[-1]

    @functools.cached_property
    def blocks(self) -> list[str]:
        """Names of the blocks: the longest list of modules whose outputs are the hidden states of transformers."""
        called = {call.name for call in self.calls}
        lists = [
            # Mllama calls some of its blocks only for images.
            [one for i in range(len(module)) if (one := f"{name}.{i}") in called]
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList)
        ]
        found = [names for names in lists if len(names) > 1 and self._are_states(names)]
        if not found:
            raise NoReferenceError("no list of blocks writes the hidden states")
        return max(found, key=len)

    def _are_states(self, names: Sequence[str]) -> bool:
        written = [self.call(name).written for name in names]
        if self.hidden is None or len(self.hidden) != len(names) + 1:
            return all(w is not None and w.shape == written[0].shape for w in written)
        states = [self._states(x) for x in self.hidden]
        # Before the last block, as most models give them, or after every block, as Mamba does.
        return any(
            all(w is not None and e is not None and same(w, e) for w, e in zip(written, expected, strict=False))
            for expected in (states[1:-1], states[:-1])
        )

    @property
    def states(self) -> torch.Tensor:
        """Output (layer, hidden) of every block at the last position."""
        return torch.stack([self.call(name).written[-1].float() for name in self.blocks])


def same(a: torch.Tensor, b: torch.Tensor, rtol: float = _SAME) -> bool:
    """Whether two tensors are equal but for rounding."""
    return a.shape == b.shape and bool((a.double() - b.double()).norm() <= rtol * b.double().norm())


def parallel(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one tensor is the other but for a factor, and rounding of half precision."""
    a, b = a.double().flatten(), b.double().flatten()
    return bool(torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def is_causal(model: Any, token_ids: Sequence[int]) -> bool:
    """Whether the logits of a position are those of the text up to there alone."""
    n = len(token_ids) // 2
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        part = model(input_ids=torch.tensor([list(token_ids[:n])]), use_cache=False).logits[0]
    return len(whole) == len(token_ids) and same(whole[n - 1], part[-1], 1e-3)


# Contributions ---------------------------------------------------------------------------------------------------


def find_parts(plain: Plain) -> list[list[Part]]:
    """Find the contributions to the residual in each block, in the order in which they are added."""
    return [_parts(plain, name) for name in plain.blocks]


def _parts(plain: Plain, block: str) -> list[Part]:
    whole = plain.call(block)
    within = [c for c in plain.calls if c.name.startswith(f"{block}.") and c.written is not None]
    if whole.read is None or whole.written is None or whole.read.shape != whole.written.shape:
        raise NoReferenceError(f"{block} has no residual stream")
    x, y = whole.read.double(), whole.written.double()
    outputs: list[Call] = []
    for call in within:
        if call.written.shape == y.shape and not any(same(call.written, other.written) for other in outputs):
            outputs.append(call)
    for size in (1, 2, 3):
        for some in itertools.combinations(outputs, size):
            factors = _factors(y - x, [call.written.double() for call in some])
            if factors is not None:
                return _ordered(plain, x, within, some, factors)
    raise NoReferenceError(f"{block} adds to its residual in another way")


def _factors(added: torch.Tensor, written: Sequence[torch.Tensor]) -> list[float] | None:
    """Return the factors with which outputs (token, hidden) add up to ``added``; None if they do not."""
    columns = torch.stack([w.flatten() for w in written], dim=1)
    found = torch.linalg.lstsq(columns, added.flatten()[:, None]).solution[:, 0]
    together = columns @ found
    scale = columns.norm(dim=0).max()
    close = (together - added.flatten()).norm() <= _SAME * scale and bool((found.abs() > 1e-6).all())
    return [round(float(f), 6) for f in found] if close else None


def _ordered(
    plain: Plain, x: torch.Tensor, within: Sequence[Call], some: Sequence[Call], factors: Sequence[float]
) -> list[Part]:
    parts: list[Part] = []
    reads = [c.read.double() for c in within if c.read is not None and c.read.shape == x.shape]
    so_far = x
    for call, factor in zip(some, factors, strict=True):
        serial = bool(parts) and any(same(read, so_far) for read in reads)
        base = tuple(part.name for part in parts) if serial else parts[-1].base if len(parts) > 1 else ()
        part = Part(call.name, _component(plain, within, call, last=call is some[-1]), factor, base)
        if parts and parts[-1].component == part.component and not serial:
            parts[-1] = replace(parts[-1], beside=part)
        else:
            parts.append(part)
        so_far = so_far + factor * call.written.double()
    return parts


_MIXERS = ("mamba", "mixer", "linearattn", "linearattention", "conv", "recurrent", "ssm", "delta", "lightning", "lstm")
_FFNS = ("mlp", "ffn", "feedforward", "moe", "expert", "fc2", "fcout", "dense4h")


def _component(plain: Plain, within: Sequence[Call], call: Call, *, last: bool) -> str:
    """Tell what a module is part of, by the names of the modules around it and of their classes."""
    if is_norm(call.module) and call.read is not None:
        before = [c for c in within if c.written is not None and c is not call and same(c.written, call.read)]
        call = before[-1] if before else call
    block = max((name for name in plain.blocks if call.name.startswith(f"{name}.")), key=len)
    path = call.name.removeprefix(f"{block}.").split(".")
    model = type(plain.model.config.get_text_config()).__name__.replace("TextConfig", "").replace("Config", "")
    owners = [plain.model.get_submodule(".".join([block, *path[:n]])) for n in range(1, len(path) + 1)]
    classes = [type(owner).__name__.replace(model, "").lower() for owner in owners]
    # Nemotron-H calls all its parts mixer, so only a class of that name is one.
    names = [name.replace("_", "") for name in path if name != "mixer"]
    return next(filter(None, map(_part_by_name, [*classes, *names])), "ffn" if last else "attn")


def _part_by_name(name: str) -> str | None:
    if any(word in name for word in _MIXERS):
        return "mixer"
    if "attn" in name or "attention" in name:
        return "attn"
    return "ffn" if any(word in name for word in _FFNS) else None
