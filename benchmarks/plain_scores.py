"""Scores by their definition, in float64, from what one prompt alone does in plain transformers.

A score is the log-probability increase of the target (arXiv 2312.12141, section 3.3), read at the last position with
the scale of the final norm frozen. Nothing here uses kdb, or knows an architecture by its name.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from plain_model import Call, NoReferenceError, Part, Plain, WrongRowError, is_norm, parallel, same
from torch import nn

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
        outside = [c for c in plain.calls if c.read is not None and not f"{c.name}.".startswith(inside)]
        alike = [c for c in outside if same(c.read, end) and c.written is not None and c.written.shape == end.shape]
        found = [c.module for c in alike if parallel(c.written[-len(fed) :], fed)]
        if found:
            return found[0]
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
        if whole.read is None or whole.read.shape != whole.written.shape or not is_norm(whole.module):
            return whole.written, lambda x: x
        return whole.read, functools.partial(FrozenNorm(whole.module, whole.read[-1].double()), bias=False)

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
        factor, shared = self._shared(layer, written[-1].double(), routed, part)
        found = _routed(routed, lambda x: through(x * factor) * part.factor)
        for i, (call, share) in enumerate(shared):
            number = len(routed.module.down_proj) + i
            found[number] = _projection(call, lambda x: through(x) * part.factor, share)
        return found

    def _shared(
        self, layer: int, written: torch.Tensor, routed: Call, part: Part
    ) -> tuple[float, list[tuple[Call, float]]]:
        """Find the factor of the routed experts in the FFN's output, and the shared expert with its own."""
        if part.beside is not None:
            return 1.0, [(self.plain.call(part.beside.name), part.beside.factor / part.factor)]
        own = _last_token(routed)
        linear = [c for c in self._within(layer) if _is_linear(c) and c.written.shape[-1] == len(written)]
        off, factor = _fitted(written, [own])
        if off <= 1e-4:
            return factor[0], []
        fits = [(*_fitted(written, [own, c.written[-1].double()]), c) for c in linear]
        off, factor, call = min(fits, key=lambda fit: fit[0])
        if off > 2e-2:
            raise NoReferenceError(f"the FFN of layer {layer} is no sum of routed and shared experts")
        return factor[0], [(call, factor[1])]

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


def _fitted(written: torch.Tensor, parts: Sequence[torch.Tensor]) -> tuple[float, list[float]]:
    """Factors with which parts (hidden) add up to ``written``, and how far, relative to them, they are from it."""
    columns = torch.stack(list(parts), dim=1)
    factors = torch.linalg.lstsq(columns, written[:, None]).solution[:, 0]
    return float((columns @ factors - written).norm() / columns.norm()), factors.tolist()


def _last_token(call: Call) -> torch.Tensor:
    """Output (hidden) of a module of experts at the last token; Llama 4's has a row for each expert and token."""
    if len(call.routed) == 1:
        n = len(call.module.down_proj)
        return call.written.reshape(n, -1, call.routed[0].shape[-1])[:, -1].double().sum(0)
    return call.written[-1].double()


def _routed(call: Call, through: Callable[..., torch.Tensor]) -> dict[int, Projection]:
    """Projections of the routed experts that the last token uses; a neuron's entry is weight × activation.

    The activations are read from a copy of the module, whose down projections hand through its neurons.
    """
    down, use = _opened(call)
    found = {}
    for number, arguments in _chosen(call, len(down)).items():
        bias = use(torch.zeros_like(down), number, arguments)
        starts = range(0, down.shape[2], down.shape[1])
        entries = torch.cat([use(_handing_through(down, first), number, arguments) - bias for first in starts])
        found[number] = Projection(entries[: down.shape[2]], through(down[number].T), through(bias))
    together = sum(of.entries @ of.columns + of.bias for of in found.values())
    if not same(together, through(_last_token(call)), 5e-2):
        raise NoReferenceError(f"{call.name} is no sum of its experts")
    return found


def _chosen(call: Call, n: int) -> dict[int, tuple[torch.Tensor, ...]]:
    """Arguments with which a module of ``n`` experts uses only one, for each that the last token uses."""
    if len(call.routed) == 1:
        states = call.routed[0].reshape(n, -1, call.routed[0].shape[-1])[:, -1].double()
        return {i: (states,) for i in range(n) if states[i].any()}
    states, chosen, weights = (x[-1:] if x.dim() == 2 else x[:, -1] for x in call.routed)
    one = [slice(i, i + 1) for i in range(chosen.shape[1])]
    found = {int(chosen[0, i]): (states.double(), chosen[:, i], weights[:, i].double()) for i in one}
    return {number: arguments for number, arguments in found.items() if number < n}  # others have no weights


def _opened(call: Call) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """Down projections (expert, hidden, neuron), and a function that gives an expert's output with others."""
    experts = copy.deepcopy(call.module).double()
    if hasattr(experts, "config"):
        experts.config._experts_implementation = "eager"  # others have no kernel for float64
    down, hidden = experts.down_proj.detach(), call.routed[0].shape[-1]
    turned = down.shape[1] != hidden or getattr(experts, "is_transposed", False)
    down = down.transpose(1, 2) if turned else down

    def use(other: torch.Tensor, number: int, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        experts.down_proj = nn.Parameter(other.transpose(1, 2).contiguous() if turned else other)
        with torch.no_grad():
            out: torch.Tensor = experts(*arguments).double()
        return out[number if len(arguments) == 1 else 0]

    return down, use


def _handing_through(down: torch.Tensor, first: int) -> torch.Tensor:
    """Return down projections (expert, hidden, neuron) whose outputs are the neurons from ``first`` on."""
    n = min(down.shape[1], down.shape[2] - first)
    made = torch.zeros_like(down)
    made[:, torch.arange(n), first + torch.arange(n)] = 1
    return made


def _matrix(module: nn.Module) -> torch.Tensor | None:
    """Matrix (in, out) of a linear module; None for any other."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    return weight.detach() if type(module).__name__ == "Conv1D" else weight.detach().T
