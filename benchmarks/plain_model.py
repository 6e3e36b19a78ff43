"""One prompt at a time through plain transformers: states, and scores by their definition in float64.

Nothing here uses kdb, or knows an architecture by its name. Hooks record what every module reads and writes; a layer's
contributions are those outputs that, added to its input, give its output. Scores are log-probability increases of the
target (arXiv 2312.12141, section 3.3), read at the last position with the final norm's scale frozen.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Sequence
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

    ``routed``: what a module of experts is given (states, experts chosen for each token, and their weights).
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
        routed = tuple(given) if len(given) == 3 and hasattr(module, "down_proj") else ()
        self.calls.append(Call(name, module, self._states(read), self._states(output), routed))

    def _states(self, x: Any) -> torch.Tensor | None:
        """Return a copy of states as (token, entry); None for what is no tensor of this prompt's tokens."""
        first = x[0] if isinstance(x, tuple | list) and x else x
        if not isinstance(first, torch.Tensor) or not first.is_floating_point() or first.numel() % self.n_tokens:
            return None
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
        lists = [
            [f"{name}.{i}" for i in range(len(module))]
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) > 1
        ]
        called = {call.name for call in self.calls}
        found = [names for names in lists if set(names) <= called and self._are_states(names)]
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


def _parallel(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one tensor is the other but for a factor, and rounding of half precision."""
    a, b = a.double().flatten(), b.double().flatten()
    return bool(torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999)


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
    if "norm" in type(call.module).__name__.lower() and call.read is not None:
        before = [c for c in within if c.written is not None and c is not call and same(c.written, call.read)]
        call = before[-1] if before else call
    block = max((name for name in plain.blocks if call.name.startswith(f"{name}.")), key=len)
    path = call.name.removeprefix(f"{block}.").split(".")
    model = type(plain.model.config.get_text_config()).__name__.replace("TextConfig", "").replace("Config", "")
    owners = [plain.model.get_submodule(".".join([block, *path[:n]])) for n in range(1, len(path) + 1)]
    classes = [type(owner).__name__.replace(model, "").lower() for owner in owners]
    # Nemotron-H calls all its parts mixer, so only a class of that name is one.
    for words in (classes, [name.replace("_", "") for name in path if name != "mixer"]):
        for word in words:
            if any(name in word for name in _MIXERS):
                return "mixer"
            if "attn" in word or "attention" in word:
                return "attn"
            if any(name in word for name in _FFNS):
                return "ffn"
    return "ffn" if last else "attn"


# Readout ---------------------------------------------------------------------------------------------------------


class FrozenNorm:
    """A norm as a linear map, with the scale that it has at one state: w · (x − mean, if centred) · s + b."""

    def __init__(self, module: nn.Module | None, at: torch.Tensor) -> None:
        self.module = None if module is None else copy.deepcopy(module).double()
        if self.module is None:
            return
        names = ("variance_epsilon", "eps", "epsilon", "norm_eps")
        self.epsilon = next((float(x) for x in (getattr(module, n, None) for n in names) if x is not None), 0.0)
        self.bias = self._apply(torch.zeros_like(at))
        self.centred = same(self._apply(at + 3), self._apply(at), 1e-4)
        self.scale = self._scale(at)

    def _apply(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.module(x.double()).double()

    def _scale(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True) if self.centred else x
        return (centred.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()

    def __call__(self, x: torch.Tensor, *, bias: bool = True) -> torch.Tensor:
        """Apply it to states or parts of states (…, hidden) in float64."""
        if self.module is None:
            return x
        linear = (self._apply(x) - self.bias) * self.scale / self._scale(x)
        return linear + self.bias if bias else linear


class Readout:
    """Log-probability of a target at parts of the residual, with the final norm and any soft cap frozen."""

    def __init__(self, plain: Plain) -> None:
        unembed = plain.model.get_output_embeddings()
        name = next(n for n, module in plain.model.named_modules() if module is unembed)
        self.rows = unembed.weight.detach().double()
        bias = getattr(unembed, "bias", None)
        self.constant = torch.zeros(len(self.rows)).double() if bias is None else bias.detach().double()
        end = plain.call(plain.blocks[-1]).written
        fed = plain.call(name).read
        if fed is None or fed.shape[-1] != end.shape[-1]:
            raise NoReferenceError("the unembedding reads states of another width")
        norm = None if same(fed, end[-len(fed) :]) else self._norm(plain, end, fed)
        self.norm = FrozenNorm(norm, end[-1].double())
        self._scale_and_cap(plain, end[-1].double())

    @staticmethod
    def _norm(plain: Plain, end: torch.Tensor, fed: torch.Tensor) -> nn.Module:
        inside = tuple(f"{name}." for name in plain.blocks)
        for call in plain.calls:
            if call.read is not None and call.written is not None and not call.name.startswith(inside):
                if same(call.read, end) and call.name not in plain.blocks and call.written.shape == end.shape:
                    if _parallel(call.written[-len(fed) :], fed):
                        return call.module
        raise NoReferenceError("no norm is between the last block and the unembedding")

    def _scale_and_cap(self, plain: Plain, end: torch.Tensor) -> None:
        """Find the factor of the logits, and their soft cap."""
        z = self.rows @ self.norm(end) + self.constant
        settings = plain.model.config.get_text_config().to_dict()
        caps = [v for k, v in settings.items() if "cap" in k and isinstance(v, int | float) and v > 0]
        fits = []
        for cap in (None, *caps):
            own = plain.logits if cap is None else cap * (plain.logits / cap).clamp(-1 + 1e-9, 1 - 1e-9).atanh()
            factor = float((own @ z) / (z @ z))
            fits.append((float((own - factor * z).norm() / own.norm()), factor, cap))
        off, self.factor, self.cap = min(fits, key=lambda fit: fit[0])
        self.real = self.factor * z
        if not off <= 5e-2:
            raise NoReferenceError("the logits are no multiple of the unembedding's output")

    def log_p(self, x: torch.Tensor, target: int) -> torch.Tensor:
        """Log-probability of the target at residuals (…, hidden)."""
        z = (self.norm(x) @ self.rows.T + self.constant) * self.factor
        if self.cap is not None:
            z = z * self.cap * (self.real / self.cap).tanh() / self.real
        return z.log_softmax(-1)[..., target]


# Scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """The linear map that writes a part: its input (entry) at the last position, and what each entry contributes.

    ``bias`` (hidden) is what it contributes without any input.
    """

    entries: torch.Tensor
    columns: torch.Tensor
    bias: torch.Tensor


class Scores:
    """Scores of one prompt, by definition; ``parts`` are those of the float32 model."""

    def __init__(self, plain: Plain, parts: Sequence[Sequence[Part]], target: int) -> None:
        self.plain, self.parts, self.target = plain, parts, target
        self.readout = Readout(plain)

    def part(self, layer: int, component: str) -> Part:
        """Return a layer's contribution of a component. Raises NoReferenceError if there is none."""
        found = [part for part in self.parts[layer] if part.component == component]
        if len(found) != 1:
            raise NoReferenceError(f"layer {layer} has {len(found)} contributions of component {component}")
        return found[0]

    def _vector(self, part: Part) -> torch.Tensor:
        own: torch.Tensor = part.factor * self.plain.call(part.name).written[-1].double()
        return own if part.beside is None else own + self._vector(part.beside)

    def base(self, layer: int, part: Part) -> torch.Tensor:
        """Residual (hidden) to which a part is added, at the last position."""
        x = self.plain.call(self.plain.blocks[layer]).read[-1].double()
        before = [self._vector(other) for other in self.parts[layer] if other.name in part.base]
        return x + sum(before) if before else x

    def of(self, layer: int, part: Part, vectors: torch.Tensor) -> torch.Tensor:
        """Scores (…) of vectors (…, hidden) that join the residual where a part does."""
        x = self.base(layer, part)
        return self.readout.log_p(x + vectors, self.target) - self.readout.log_p(x, self.target)

    def layer(self, layer: int, component: str) -> float:
        """Score of all that a component adds in a layer."""
        part = self.part(layer, component)
        return float(self.of(layer, part, self._vector(part)))

    @functools.cache  # noqa: B019  (as long as the prompt)
    def projection(self, layer: int, component: str) -> Projection:
        """Find the linear map whose output, perhaps through a norm, is a part."""
        part = self.part(layer, component)
        written, through = self._before_norm(layer, part)
        found = [c for c in self._within(layer) if _is_linear(c) and same(c.written, written, 1e-3)]
        if not found:
            raise NoReferenceError(f"layer {layer} has no linear map that writes {component}")
        return _projection(found[-1], lambda x: through(x) * part.factor)

    def _within(self, layer: int) -> list[Call]:
        return [c for c in self.plain.calls if c.name.startswith(f"{self.plain.blocks[layer]}.")]

    def _before_norm(self, layer: int, part: Part) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        """Return what a part is before a norm after it, (token, hidden), and the norm with its scale frozen."""
        whole = self.plain.call(part.name)
        inner = [c for c in self._within(layer) if c.name.startswith(f"{part.name}.") or _is_linear(c)]
        if (
            whole.read is None
            or whole.read.shape != whole.written.shape
            or "norm" not in part.name.lower()
            or any(same(c.written, whole.written, 1e-3) for c in inner if c.written is not None and c is not whole)
        ):
            return whole.written, lambda x: x
        norm = FrozenNorm(whole.module, whole.read[-1].double())
        return whole.read, functools.partial(norm, bias=False)

    def heads(self, layer: int, n_heads: int) -> torch.Tensor:
        """Scores (head) of a layer's heads."""
        of = self.projection(layer, "attn")
        per_head = (of.entries[:, None] * of.columns).unflatten(0, (n_heads, -1)).sum(1)
        return self.of(layer, self.part(layer, "attn"), per_head)

    @functools.cache  # noqa: B019  (as long as the prompt)
    def experts(self, layer: int) -> dict[int, Projection]:
        """Projections of the experts that the last token uses, by number; shared ones follow the routed ones."""
        part = self.part(layer, "ffn")
        routed = next((c for c in self._within(layer) if c.routed), None)
        if routed is None:
            raise NoReferenceError(f"layer {layer} has experts of another form")
        written, through = self._before_norm(layer, part)
        if part.beside is None:
            factor, shared = self._shared(layer, written[-1].double(), routed)
        else:
            factor = 1.0
            shared = [(self.plain.call(part.beside.name), part.beside.factor / part.factor)]
        found = _routed(routed, lambda x: through(x * factor) * part.factor)
        first = max(routed.module.down_proj.shape[0], 0)
        for i, (call, share) in enumerate(shared):
            found[first + i] = _projection(call, lambda x: through(x) * part.factor, share)
        return found

    def _shared(self, layer: int, written: torch.Tensor, routed: Call) -> tuple[float, list[tuple[Call, float]]]:
        """Find the factor of the routed experts in the FFN's output, and the shared experts with theirs."""
        own = routed.written[-1].double()
        linear = [c for c in self._within(layer) if _is_linear(c) and c.written.shape[-1] == len(written)]
        for some in [[], *([c] for c in linear)]:
            columns = torch.stack([own, *(c.written[-1].double() for c in some)], dim=1)
            factors = torch.linalg.lstsq(columns, written[:, None]).solution[:, 0]
            if (columns @ factors - written).norm() <= 1e-3 * columns.norm() and factors.abs().min() > 1e-6:
                return float(factors[0]), [(c, float(f)) for c, f in zip(some, factors[1:], strict=True)]
        raise NoReferenceError(f"the FFN of layer {layer} is no sum of routed and shared experts")

    def expert(self, layer: int, number: int) -> float:
        """Score of an expert's output."""
        of = self._expert(layer, number)
        vector = of.entries @ of.columns + of.bias
        return float(self.of(layer, self.part(layer, "ffn"), vector))

    def _expert(self, layer: int, number: int) -> Projection:
        experts = self.experts(layer)
        if number not in experts:
            raise WrongRowError(f"layer {layer} does not use expert {number}")
        return experts[number]

    def linear(self, layer: int, component: str, expert: int | None) -> Projection:
        """Return the projection that a neuron is an input of."""
        return self.projection(layer, component) if expert is None else self._expert(layer, expert)

    def neurons(self, layer: int, component: str, columns: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """Scores (n) of columns (n, hidden) of a component's projection, with these coefficients (n)."""
        return self.of(layer, self.part(layer, component), columns * coefficients.double()[:, None])


def _is_linear(call: Call) -> bool:
    """Whether a call is one of a linear map."""
    return _matrix(call.module) is not None and call.read is not None and call.written is not None


def _projection(call: Call, through: Callable[..., torch.Tensor], share: float = 1.0) -> Projection:
    """Read a linear map; ``through`` takes its output to the residual, ``share`` is a factor of its input."""
    matrix = _matrix(call.module)
    assert matrix is not None and call.read is not None
    bias = getattr(call.module, "bias", None)
    bias = torch.zeros(matrix.shape[1]) if bias is None else bias.detach()
    return Projection(call.read[-1].double() * share, through(matrix.double()), through(bias.double() * share))


def _routed(call: Call, through: Callable[..., torch.Tensor]) -> dict[int, Projection]:
    """Projections of the routed experts that the last token uses; a neuron's entry is weight × activation.

    The activations are read from a copy of the module, whose down projections hand through its neurons.
    """
    states, chosen, weights = (x[-1:] if x.dim() == 2 else x[:, -1] for x in call.routed)
    experts = copy.deepcopy(call.module).double()
    if hasattr(experts, "config"):
        experts.config._experts_implementation = "eager"  # others have no kernel for float64
    down = experts.down_proj.detach()  # expert, then hidden and neuron in either order
    hidden = states.shape[-1]
    if down.shape[1] != hidden or getattr(experts, "is_transposed", False):
        down = down.transpose(1, 2)
    found = {}
    for place, number in enumerate(chosen[0].tolist()):
        if number >= len(down):
            continue  # an expert that hands its input through, or none
        index, weight = chosen[:, place : place + 1], weights[:, place : place + 1].double()
        bias = _expert_output(experts, states, index, weight, torch.zeros_like(down))
        entries = [
            _expert_output(experts, states, index, weight, _handing_through(down, first)) - bias
            for first in range(0, down.shape[2], hidden)
        ]
        found[number] = Projection(torch.cat(entries)[: down.shape[2]], through(down[number].T), through(bias))
    together = sum(of.entries @ of.columns + of.bias for of in found.values())
    if not same(together, through(call.written[-1].double()), 5e-2):
        raise NoReferenceError(f"{call.name} is no sum of its experts")
    return found


def _handing_through(down: torch.Tensor, first: int) -> torch.Tensor:
    """Return down projections (expert, hidden, neuron) whose outputs are the neurons from ``first`` on."""
    n = min(down.shape[1], down.shape[2] - first)
    made = torch.zeros_like(down)
    made[:, torch.arange(n), first + torch.arange(n)] = 1
    return made


def _expert_output(
    experts: Any, states: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Output (hidden) of one expert with another down projection."""
    same_order = experts.down_proj.shape == down.shape and not getattr(experts, "is_transposed", False)
    experts.down_proj = nn.Parameter(down if same_order else down.transpose(1, 2).contiguous())
    with torch.no_grad():
        return experts(states.double(), index, weight)[0].double()


def _matrix(module: nn.Module) -> torch.Tensor | None:
    """Matrix (in, out) of a linear module; None for any other."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    return weight.detach() if type(module).__name__ == "Conv1D" else weight.detach().T
