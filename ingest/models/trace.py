"""Run a few tokens through a model, to see what happens between its last block and its logits.

trace(model, blocks, ffns, model.get_output_embeddings()).path
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

_TEXT = (1, 2, 3)
N_TOKENS = len(_TEXT)

_SAME = 0.02
"""Largest relative difference of two vectors that are one: rounding to half precision explains it."""

_ROUNDING, _ROUNDING_IN_HALF = (1e-4, 1e-3), (0.05, 0.3)
"""Largest relative differences of states that rounding explains: in texts of one length, and of different lengths."""

Step = tuple["nn.Module", "torch.Tensor", "torch.Tensor"]
"""A module that ran, its input and its output."""

Match = Callable[["torch.Tensor", "torch.Tensor"], bool]


@dataclass(frozen=True)
class BlockOutput:
    """How the blocks of a model arrange the states that they pass on: (prompt, position, hidden) in most models.

    ``n_before`` positions stand before those of the tokens. With several residual streams, ``streams_first`` is
    whether they stand first, as in Gemma 3n, or after the positions, as in DeepSeek-V4. OPT flattens prompt and
    position.
    """

    n_before: int = 0
    streams_first: bool = False

    def states(self, output: torch.Tensor, n_rows: int) -> torch.Tensor:
        """Return the states (prompt, position, hidden) of the tokens; several streams become one wide one."""
        return self.reported(output).reshape(n_rows, -1, output.shape[-1] * self._n_streams(output))[:, self.n_before :]

    def reported(self, state: torch.Tensor) -> torch.Tensor:
        """Return a state that the model reports, with several streams as one; it has no further positions."""
        if state.ndim != 4:
            return state
        return (state.permute(1, 2, 0, 3) if self.streams_first else state).flatten(2)

    def _n_streams(self, output: torch.Tensor) -> int:
        return 1 if output.ndim != 4 else int(output.shape[0 if self.streams_first else 2])

    def replaced(self, output: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return an output in which every position has the state (prompt, hidden) of its prompt."""
        if output.ndim == 4:
            parts = states.view(len(states), -1, output.shape[-1])
            parts = parts.transpose(0, 1)[:, :, None] if self.streams_first else parts[:, None]
            return parts.to(output.dtype).expand(output.shape)
        every = output.reshape(len(states), -1, output.shape[-1])
        return states[:, None].to(output.dtype).expand(every.shape).reshape(output.shape)


@dataclass
class Trace:
    """Tensors of a short forward pass: of every module outside the blocks, in the order in which they finished.

    ``outputs`` are those of the blocks, ``fed`` the FFNs that ran and the widths of their inputs. ``read`` and
    ``written`` are the unembedding's input and output, ``last_state`` is the last hidden state that the model reports.
    """

    name: str
    outputs: list[torch.Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    read: torch.Tensor | None = None
    written: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_state: torch.Tensor | None = None
    layout: BlockOutput = BlockOutput()
    first_state: int = 1
    fed: list[tuple[nn.Module, int]] = field(default_factory=list)

    def reads_state(self, ffn: nn.Module | None) -> bool:
        """Whether an FFN has run once, on vectors as wide as the residual stream."""
        return [width for module, width in self.fed if module is ffn] == [self.hidden_size]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream; of all of them together, if the model has several."""
        return int(self.layout.states(self.outputs[-1], 1).shape[-1])

    @functools.cached_property
    def path(self) -> list[Step] | None:
        """The modules that turn the last block's output into the unembedding's input, but for a factor.

        None if they do not: then something happens between them, or beside them.
        """
        if self.outputs[-1].ndim != 3:
            return None
        path = self._steps_from(self.outputs[-1], 0, _equal)
        return self._steps_from(self.outputs[-1], 0, _parallel) if path is None else path

    def _steps_from(self, state: torch.Tensor, begin: int, is_goal: Match) -> list[Step] | None:
        """Find the steps from a state to the unembedding's input; the largest modules first, and the longest way."""
        for i in reversed(range(begin, len(self.steps))):
            _module, read, written = self.steps[i]
            if _equal(read, state) and not _equal(written, state):
                rest = self._steps_from(written, i + 1, is_goal)
                if rest is not None:
                    return [self.steps[i], *rest]
        return [] if self.read is not None and is_goal(self.read, state) else None

    @property
    def is_raw(self) -> bool:
        """Whether the model's own last hidden state is the last block's output."""
        return self.last_state is not None and self.reports(self.last_state, -1)

    def reports(self, state: torch.Tensor, block: int) -> bool:
        """Whether a hidden state that the model reports is the output of a block."""
        own = self.layout.states(self.outputs[block], 1)[:, :N_TOKENS]
        return state.numel() == own.numel() and _equal(self.layout.reported(state), own)

    @property
    def n_reported(self) -> int | None:
        """Number of steps of the path that the model's own last hidden state has been through; None if unknown."""
        path, last = self.path or [], self.last_state
        states = [self.outputs[-1], *(written for _module, _read, written in path)]
        return next((i for i, state in enumerate(states) if last is not None and _equal(state, last)), None)

    def logit_scale(self, expected: float, softcap: float | None) -> float:
        """Return the factor between what the unembedding makes of the normalised state, and the logits.

        It is ``expected`` unless the pass shows another one.
        """
        import torch

        if self.written is None or self.logits is None or self.read is None:
            return expected
        before = self.logits if softcap is None else softcap * torch.atanh(self.logits / softcap)
        after, scaled = _ratio(before, self.written), self._input_ratio()
        if after is None or scaled is None or abs(after * scaled / expected - 1) < _SAME:
            return expected
        return after * scaled

    def _input_ratio(self) -> float | None:
        """Factor by which the unembedding's input differs from the output of the final norm."""
        if self.path is None or self.read is None:
            return 1.0
        return _ratio(self.read, self.path[-1][2] if self.path else self.outputs[-1])


def _layout(output: torch.Tensor, state: torch.Tensor | None) -> BlockOutput:
    """Find how blocks arrange what they pass on, from the first block's output and the state that the model reports."""
    streams = output.ndim == 4 and output.shape[0] > 1
    n_extra = output_tokens(output) - N_TOKENS
    matching = [k for k in range(n_extra + 1) if state is not None and _equal(output[:, k : k + N_TOKENS], state)]
    return BlockOutput(matching[0] if matching else n_extra, streams_first=streams)


def trace(model: Any, blocks: Sequence[nn.Module], ffns: Sequence[nn.Module | None], unembed: nn.Module) -> Trace:
    """Run ``N_TOKENS`` tokens. Raises ModelError if the blocks do not run one after the other, once each."""
    import torch

    seen = Trace(type(model).__name__)
    order: list[int] = []
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for handle in _hooks(model, blocks, ffns, unembed, seen, order):
            hooks.enter_context(handle)
        output = model(_tokens(model, *_TEXT), output_hidden_states=True, **without_cache(model))
    _check(seen, order, len(blocks))
    states = getattr(output, "hidden_states", None)
    reported = [_kept(state) for state in states or ()]
    seen.last_state = reported[-1] if reported else None
    seen.layout = _layout(seen.outputs[0], reported[1] if len(reported) > 1 else None)
    seen.first_state = next((i for i, state in enumerate(reported[:2]) if seen.reports(state, 0)), 1)
    seen.logits = _kept(output.logits) if _kept(output.logits).shape == getattr(seen.written, "shape", None) else None
    return seen


def can_pad(model: Any, blocks: Sequence[nn.Module], seen: Trace) -> bool:
    """Return whether the states of a text stay as they are if tokens follow it; padding is such tokens.

    Raises ModelError if they depend on which tokens follow, because then the model is not causal.
    """
    import torch

    alone = [seen.layout.states(output, 1)[:, :N_TOKENS] for output in seen.outputs]
    longer, other = (_outputs(model, blocks, seen, (*_TEXT, *after)) for after in ((0, 0), (4, 5)))
    is_whole = next(model.parameters()).dtype == torch.float32
    rounding, padding = _ROUNDING if is_whole else _ROUNDING_IN_HALF
    if any(_relative(a, b) > rounding for a, b in zip(longer, other, strict=True)):
        raise ModelError(
            f"{seen.name} is no causal language model: the state of a token depends on the tokens after it, as in "
            "masked language models."
        )
    return not any(_relative(a, b) > padding for a, b in zip(alone, longer, strict=True))


def _outputs(model: Any, blocks: Sequence[nn.Module], seen: Trace, text: Sequence[int]) -> list[torch.Tensor]:
    """Run a text; return what each block passes on at its first ``N_TOKENS`` tokens."""
    import torch

    kept: list[torch.Tensor] = []
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(lambda _m, _args, output: kept.append(_kept(output))))
        model(_tokens(model, *text), **without_cache(model))
    return [seen.layout.states(output, 1)[:, :N_TOKENS] for output in kept]


def _tokens(model: Any, *ids: int) -> torch.Tensor:
    import torch

    embedding = model.get_input_embeddings().weight
    return torch.tensor([ids], device=embedding.device) % len(embedding)


def without_cache(module: Any) -> dict[str, bool]:
    """Return the option with which a model keeps no cache, if it has one."""
    parameters = signature(module.forward).parameters.values()
    takes = any(p.name == "use_cache" or p.kind is Parameter.VAR_KEYWORD for p in parameters)
    return {"use_cache": False} if takes else {}


def first_tensor(value: Any) -> Any:
    """Return a tensor, or the first of a tuple or a model's output; None if there is none."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    many = value.values() if hasattr(value, "values") else value if isinstance(value, tuple | list) else ()
    return next((one for one in many if isinstance(one, torch.Tensor)), None)


def _hooks(
    model: Any,
    blocks: Sequence[nn.Module],
    ffns: Sequence[nn.Module | None],
    unembed: nn.Module,
    seen: Trace,
    order: list[int],
) -> Iterator[Any]:
    inside = {module for block in blocks for module in block.modules()}

    def ran(i: int, output: Any) -> None:
        order.append(i)
        seen.outputs.append(_kept(output))

    def step(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        read, written = (_kept(value) for value in (args or tuple(kwargs.values()), output))
        if module is unembed:
            seen.read, seen.written = read, written
        elif len(seen.outputs) >= len(blocks) and seen.read is None:
            seen.steps.append((module, read, written))

    def fed(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.fed.append((module, _kept(args or tuple(kwargs.values())).shape[-1]))

    for ffn in dict.fromkeys(ffns):
        if ffn is not None:
            yield ffn.register_forward_pre_hook(fed, with_kwargs=True)
    for i, block in enumerate(blocks):
        yield block.register_forward_hook(lambda _m, _a, output, i=i: ran(i, output))
    for module in model.modules():
        if module not in inside:
            yield module.register_forward_hook(step, with_kwargs=True)


def _check(seen: Trace, order: list[int], n_blocks: int) -> None:
    if order != list(range(n_blocks)):
        raise ModelError(
            f"{seen.name}: its {n_blocks} blocks do not run one after the other, once each, so it has no residual "
            "stream that kdb could measure layer by layer."
        )
    shapes = {tuple(output.shape) for output in seen.outputs}
    if len(shapes) > 1 or output_tokens(seen.outputs[-1]) < N_TOKENS:
        raise ModelError(
            f"{seen.name}: its blocks do not pass on one vector per token (shapes {sorted(shapes)} for {N_TOKENS} "
            "tokens), so it has no residual stream that kdb could measure."
        )
    if seen.read is None:
        raise ModelError(f"{seen.name}: its unembedding is not part of its forward pass, so kdb cannot measure it.")


def output_tokens(output: torch.Tensor) -> int:
    """Number of positions in a block's output for one prompt."""
    if output.ndim == 4:
        return int(output.shape[2 if output.shape[0] > 1 else 1])
    return int(output.numel() // max(1, output.shape[-1]))


def _kept(value: Any) -> torch.Tensor:
    import torch

    tensor = first_tensor(value)
    return torch.empty(0) if tensor is None else tensor.detach().float().cpu()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _parallel(a: torch.Tensor, b: torch.Tensor) -> bool:
    return _ratio(a, b) is not None


def _ratio(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Return the number by which ``b`` must be multiplied to give ``a``; None if there is none."""
    if a.shape != b.shape or not a.numel():
        return None
    if _equal(a, b):
        return 1.0
    ratio = float((a * b).sum() / (b * b).sum().clamp_min(1e-30))
    return ratio if ratio > 0 and float((a - ratio * b).norm()) <= _SAME * float(a.norm()) else None
