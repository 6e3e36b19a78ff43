"""The neurons of a block's FFN: where their coefficients are, and what each adds to the residual stream.

An FFN is a sum of sources: one dense projection, or the experts of a router and further projections beside them, such
as a shared expert. The coefficient of a neuron contains all that multiplies its column, except for the scale of a norm
behind the whole FFN: the routing weight, the gate of a shared expert, a constant factor.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError
from kdb.ingest.forward.experts import Experts, Watch, experts, is_experts
from kdb.ingest.forward.layout import FfnLayout
from kdb.ingest.forward.linear import Call, Linear, Norm, flat, is_linear, is_norm, matrix, n_inputs, read_norm, same

if TYPE_CHECKING:
    import torch
    from torch import nn

_FITS = 2e-2
"""Largest relative error of a sum of sources that half precision explains; ``check_decomposition`` is stricter."""

_IS_ONE = 1e-3
"""Largest difference from 1 of a factor that is taken for 1."""


class Dense:
    """The neurons of one projection.

    ``key`` is the projection whose rows activate them (the up projection if the FFN is gated), ``key_rows`` its rows
    within a fused projection. ``activation`` is the module that computes the activation function, None if there is no
    such module.
    """

    n_experts = 1

    def __init__(
        self, module: nn.Module, key: nn.Module, key_rows: slice, activation: nn.Module | None, gated: bool
    ) -> None:
        self.module, self.key, self.key_rows, self.activation, self.gated = module, key, key_rows, activation, gated

    @property
    def size(self) -> int:
        """Number of neurons."""
        return n_inputs(self.module)

    def columns(self) -> torch.Tensor:
        """The output of one unit of each neuron, (neurons, entries), float32."""
        return matrix(self.module).float().T

    def keys(self) -> torch.Tensor:
        """The row that activates each neuron, (neurons, entries), float32."""
        return matrix(self.key)[self.key_rows].float()

    def biases(self) -> torch.Tensor | None:
        """The output without neurons, (1, entries), float32; None if that is 0."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.float()[None]

    def read(self, states: torch.Tensor, _expert: int) -> torch.Tensor:
        """Products (…, neurons) of the keys with states (…, entries)."""
        rows: torch.Tensor = self.key(states)[..., self.key_rows].float()
        return rows

    def output(self, written: torch.Tensor) -> torch.Tensor:
        """The output (token, entries) of a call of the module."""
        return flat(written)

    def watched(self, watch: Watch) -> Any:
        """Let ``watch`` see the coefficients (token, neuron), and replace them."""

        def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            new = watch(flat(args[0]))
            return None if new is None else (new.reshape(args[0].shape).to(args[0].dtype), *args[1:])

        return self.module.register_forward_pre_hook(before)


@dataclass(frozen=True)
class Router:
    """The module that chooses experts.

    ``at``: which of its outputs are the logits (token, expert), ``scores``: the function of them that is a share.
    ``weights_at``: which output is the weight of every expert, 0 if it is not chosen, where the experts do not say.
    """

    module: nn.Module
    at: int
    scores: Callable[[torch.Tensor], torch.Tensor]
    weights_at: int | None = None

    def probs(self, output: Any) -> torch.Tensor:
        """The share (token, expert) of each expert, from the output of a call; a token's add up to 1."""
        scores = self.scores(_tensors(output)[self.at].float())
        return scores / scores.sum(-1, keepdim=True)

    def weights(self, output: Any) -> torch.Tensor:
        """The weight (token, expert) of each expert, from the output of a call."""
        assert self.weights_at is not None
        return _tensors(output)[self.weights_at].float()


@dataclass(frozen=True)
class Source:
    """Neurons whose output is added to the FFN's, with the maps before and behind them.

    ``is_scaled``: whether a gate or a factor multiplies the output.
    """

    part: Dense | Experts
    before: tuple[Norm | Linear, ...]
    behind: Norm | Linear | None = None
    is_scaled: bool = False
    router: Router | None = None

    def columns(self) -> torch.Tensor:
        """The columns (neuron, hidden), behind the source's own map, without its scale."""
        columns = self.part.columns()
        return columns if self.behind is None else self.behind.after(columns)

    def keys(self) -> torch.Tensor:
        """The keys (neuron, hidden), as directions of the residual."""
        keys = self.part.keys()
        for of in reversed(self.before):
            keys = of.before(keys)
        return keys

    def biases(self) -> torch.Tensor | None:
        """The output (expert, hidden) of each expert without its neurons, as :meth:`columns`; None if that is 0."""
        biases = self.part.biases()
        return biases if biases is None or self.behind is None else self.behind.after(biases)


@dataclass(frozen=True)
class Ffn:
    """The FFN of a block: its sources, experts first.

    ``total`` is the module whose output is the sum of the sources or, if ``is_read``, whose input is; None if the block
    adds them up.
    """

    sources: tuple[Source, ...]
    total: nn.Module | None
    is_read: bool = False

    @property
    def layout(self) -> FfnLayout:
        """Which slots are the neurons of which expert."""
        starts, size, n_routed = [], 0, 0
        for source in self.sources:
            part = source.part
            starts += [size + e * part.size // part.n_experts for e in range(part.n_experts)]
            size += part.size
            n_routed += part.n_experts if isinstance(part, Experts) else 0
        return FfnLayout(size, tuple(starts) if n_routed else (), n_routed)

    @property
    def dense(self) -> Dense | None:
        """The only source, if it is a dense projection."""
        only = self.sources[0].part if len(self.sources) == 1 else None
        return only if isinstance(only, Dense) else None


Before = Callable[["torch.Tensor"], tuple[Norm | Linear, ...]]
"""Finds the maps between the residual and a state that a projection reads."""


# Finding ---------------------------------------------------------------------------------------------------------


def find_ffn(
    where: str,
    block: nn.Module,
    calls: Sequence[Call],
    read: torch.Tensor,
    before: Before,
    added: torch.Tensor,
) -> tuple[Ffn, torch.Tensor]:
    """Find an FFN among the calls of its block, which are those outside of attention, in the order they ended.

    ``read`` is what the FFN's first module reads, ``added`` what the block adds besides attention, both (token,
    hidden). Return the FFN, and its output before a norm. Raises ModelError, with ``where``, if parts are not found.
    """
    linear = [c for c in calls if is_linear(c.module)]
    routed = [c for c in calls if is_experts(c.module)]
    if not routed:
        if not linear:
            raise ModelError(f"{where} has no linear map in its FFN.")
        last = linear[-1]
        part = Dense(last.module, *find_key(where, linear[:-1], list(calls), last.read))
        return Ffn((Source(part, before(read)),), last.module), last.written
    return _mixture(where, block, calls, routed, read, before, added)


def _mixture(
    where: str,
    block: nn.Module,
    calls: Sequence[Call],
    routed: Sequence[Call],
    read: torch.Tensor,
    before: Before,
    added: torch.Tensor,
) -> tuple[Ffn, torch.Tensor]:
    """Find the sources of an FFN with experts, and what multiplies them in its output."""
    parts: list[tuple[Call, Dense | Experts, torch.Tensor]] = [(c, experts(c.module), c.read) for c in routed]
    for first, last in _dense_parts(block, calls, added.shape[-1]):
        parts.append((last, Dense(last.module, *find_key(where, first, list(calls), last.read)), first[0].read))
    found = []
    for call, part, own in parts:
        output = part.output(call.written)
        behind = _behind(calls, output) if len(parts) > 1 or output.shape[-1] != added.shape[-1] else None
        router = _router(calls, call, part) if isinstance(part, Experts) else None
        source = Source(
            part, before(own) or before(read), None if behind is None else _map(behind.module, added.shape[-1])
        )
        found.append((replace(source, router=router), output if behind is None else behind.written))
    return _summed(where, block, calls, found, added)


def _dense_parts(block: nn.Module, calls: Sequence[Call], size: int) -> list[tuple[list[Call], Call]]:
    """The first projections and the last one of every dense part: linear maps that one module holds."""
    parent = {child: module for module in block.modules() for child in module.children()}
    held: dict[nn.Module, list[Call]] = {}
    for call in calls:
        if is_linear(call.module) and parent[call.module] is not block:
            held.setdefault(parent[call.module], []).append(call)
    return [(some[:-1], some[-1]) for some in held.values() if len(some) > 1 and some[-1].written.shape[-1] == size]


def _behind(calls: Sequence[Call], output: torch.Tensor) -> Call | None:
    """The norm or linear map that reads the output of one source alone."""
    return next((c for c in calls if (is_norm(c.module) or is_linear(c.module)) and same(c.read, output)), None)


def _map(module: nn.Module, size: int) -> Norm | Linear:
    return Linear(module) if is_linear(module) else read_norm(module, size)


Found = tuple[Source, "torch.Tensor"]
"""A source, and its output (token, hidden) in the traced pass."""


def _summed(
    where: str, block: nn.Module, calls: Sequence[Call], found: Sequence[Found], added: torch.Tensor
) -> tuple[Ffn, torch.Tensor]:
    """Find where the sources are added up: the last tensor that is a sum of all, each times a factor."""
    for module, is_read, total in reversed([(None, False, added), *_totals(block, calls, found)]):
        factors = factors_in(total, [output for _source, output in found]) if total.shape == added.shape else None
        if factors is not None and bool((factors.abs() > _IS_ONE).all()):
            scaled = (factors - 1).abs().amax(0) > _IS_ONE
            sources = [replace(s, is_scaled=bool(x)) for (s, _output), x in zip(found, scaled, strict=True)]
            return Ffn(tuple(sources), module, is_read), total
    raise ModelError(f"{where} has experts whose outputs do not add up to that of its FFN.")


def _totals(
    block: nn.Module, calls: Sequence[Call], found: Sequence[Found]
) -> Iterator[tuple[nn.Module | None, bool, torch.Tensor]]:
    """Tensors that may be the sum of all sources: outputs of modules, and inputs of norms."""
    parts = {source.part.module: source.part for source, _output in found}
    inside = {m for module in parts for m in module.modules()} - set(parts)
    for call in calls:
        if call.module in parts:
            yield call.module, False, parts[call.module].output(call.written)
        elif is_norm(call.module):
            yield call.module, True, call.read
        elif call.module is not block and call.module not in inside:
            yield call.module, False, call.written


def factors_in(total: torch.Tensor, parts: Sequence[torch.Tensor], known: Sequence[bool] = ()) -> torch.Tensor | None:
    """Factors (token, part) whose sum of factor · part is ``total`` (token, hidden), by least squares.

    Those that are ``known`` are 1. None if there is no such sum.
    """
    import torch

    whole, every = total.double(), torch.stack([part.double() for part in parts], dim=2)
    factors = torch.ones(len(whole), len(parts), dtype=torch.float64, device=whole.device)
    fixed = [i for i in range(len(parts)) if known and known[i]]
    fitted = [i for i in range(len(parts)) if i not in fixed]
    if fitted:
        some = every[..., fitted]
        goal = some.mT @ (whole - every[..., fixed].sum(2))[..., None]
        factors[:, fitted] = (torch.linalg.pinv(some.mT @ some, hermitian=True) @ goal)[..., 0]
    off = (every @ factors[..., None])[..., 0] - whole
    return factors.float() if bool((off.norm(dim=1) <= _FITS * whole.norm(dim=1)).all()) else None


# Routers ---------------------------------------------------------------------------------------------------------


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors in what a module returns, each (token, entries)."""
    outputs = output if isinstance(output, tuple | list) else (output,)
    return [flat(x) for x in outputs if hasattr(x, "shape") and x.ndim > 1]


def _root_softplus(logits: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.softplus(logits).sqrt()


def _scores() -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
    """Functions of a router's output that weights may be shares of; the first is for probabilities."""
    import torch

    return (torch.Tensor.clone, functools.partial(torch.softmax, dim=-1), torch.sigmoid, _root_softplus)


def _router(calls: Sequence[Call], call: Call, part: Experts) -> Router | None:
    """Find the module that chose the experts of a call, and the function of its output that the weights are shares of.

    If they are shares of none that kdb knows (the sparse mixer of PhiMoE), it is the softmax. None if no module has one
    output for each expert.
    """
    weight, chosen = part.routed(call)
    outputs = [
        (c.module, i, x.float())
        for c in calls[: calls.index(call)]
        for i, x in enumerate(_tensors(c.output))
        if x.shape == chosen.shape
    ]
    at = None
    if weight is None:
        given = next(((m, i, x) for m, i, x in outputs if same(x != 0, chosen)), None)
        if given is None:
            return None
        router, at, weight = given
        outputs = [(m, i, x) for m, i, x in outputs if m is router]
    for module, i, x in outputs:
        for scores in _scores():
            if _are_shares(weight, chosen, scores(x)):
                return Router(module, i, scores, at)
    return Router(*outputs[0][:2], _scores()[1], at) if outputs else None


def _are_shares(weight: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor) -> bool:
    """Whether the weights of the chosen experts are the scores, times a constant or a factor of each token."""
    if not (scores > 0).all():
        return False
    ratio = (weight / scores).masked_fill(~chosen, float("nan"))
    of_token = ratio / ratio.nanmean(1, keepdim=True)
    is_share = [bool((x - x.mean()).abs().max() <= _FITS * x.mean().abs()) for x in (ratio[chosen], of_token[chosen])]
    return is_share[0] or (is_share[1] and bool((chosen.sum(1) > 1).all()))


def find_key(
    where: str, first: list[Call], calls: list[Call], coefficient: torch.Tensor
) -> tuple[nn.Module, slice, nn.Module | None, bool]:
    """Find the projection whose output gives the neurons' coefficients, by multiplication with a gate or by activation.

    Return it, its rows, the module of the activation, and whether there is a gate.

    The outputs of the first projections are split into pieces with one entry per neuron. The gate is the piece that the
    activation reads; the other is the up projection. Without a gate, the only piece is the key.
    """
    import torch

    n, coefficient = coefficient.shape[-1], coefficient.float()
    pieces = [
        (c.module, slice(i, i + n), c.written[:, i : i + n].float())
        for c in first
        for i in range(0, c.written.shape[-1], n)
        if c.written.shape[-1] % n == 0
    ]
    functions = [c for c in calls if c.written.shape == coefficient.shape and _is_function(c.module)]
    if len(pieces) == 1:
        # A dropout, which changes nothing here, has the same output as the activation.
        activation = next((c.module for c in functions if not same(c.read, c.written)), None)
        return *pieces[0][:2], activation, False
    for call in functions:
        for module, rows, piece in pieces:
            if torch.allclose(call.written.float() * piece, coefficient, rtol=1e-2, atol=1e-5):
                return module, rows, call.module, True
    for (_gate, _rows, gate), (module, rows, piece) in itertools.permutations(pieces, 2):
        if any(torch.allclose(f(gate) * piece, coefficient, rtol=1e-2, atol=1e-5) for f in _functions()):
            return module, rows, None, True
    raise ModelError(f"{where} has an FFN whose neurons are not an activation times a linear map of its input.")


def _functions() -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
    """Activation functions that a model may compute without a module."""
    import torch.nn.functional as f

    return f.silu, f.gelu, functools.partial(f.gelu, approximate="tanh"), f.relu, f.sigmoid


def _is_function(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None
