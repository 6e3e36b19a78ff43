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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_SAME = 1e-5
"""Largest relative distance of two float32 tensors that are the same but for rounding."""


class NoReferenceError(Exception):
    """A part of the model of which no reference can be computed; the message says which."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its input and output, each (token, entry), in the model's dtype."""

    name: str
    module: nn.Module
    read: torch.Tensor | None
    written: torch.Tensor | None


@dataclass(frozen=True)
class Part:
    """A contribution to the residual: ``factor`` × what the module ``name`` writes; ``base`` are the parts before it.

    ``component`` is attn, ffn or mixer.
    """

    name: str
    component: str
    factor: float
    base: tuple[str, ...]


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
        self.calls.append(Call(name, module, self._states(read), self._states(output)))

    def _states(self, x: Any) -> torch.Tensor | None:
        """Return a copy of states as (token, entry); None for what is no tensor of this prompt's tokens."""
        first = x[0] if isinstance(x, tuple) and x else x
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
        expected = [self._states(x) for x in self.hidden[1:-1]]
        return all(w is not None and w.shape == e.shape and same(w, e) for w, e in zip(written, expected, strict=False))

    @property
    def states(self) -> torch.Tensor:
        """Output (layer, hidden) of every block at the last position."""
        return torch.stack([self.call(name).written[-1].float() for name in self.blocks])


def same(a: torch.Tensor, b: torch.Tensor, rtol: float = _SAME) -> bool:
    """Whether two tensors are equal but for rounding."""
    return a.shape == b.shape and bool((a.double() - b.double()).norm() <= rtol * b.double().norm())


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
                return _ordered(x, within, some, factors)
    raise NoReferenceError(f"{block} adds to its residual in another way")


def _factors(added: torch.Tensor, written: Sequence[torch.Tensor]) -> list[float] | None:
    """Return the factors with which outputs (token, hidden) add up to ``added``; None if they do not."""
    columns = torch.stack([w.flatten() for w in written], dim=1)
    found = torch.linalg.lstsq(columns, added.flatten()[:, None]).solution[:, 0]
    together = columns @ found
    scale = columns.norm(dim=0).max()
    close = (together - added.flatten()).norm() <= _SAME * scale and bool((found.abs() > 1e-6).all())
    return [round(float(f), 6) for f in found] if close else None


def _ordered(x: torch.Tensor, within: Sequence[Call], some: Sequence[Call], factors: Sequence[float]) -> list[Part]:
    parts: list[Part] = []
    reads = [c.read.double() for c in within if c.read is not None and c.read.shape == x.shape]
    so_far = x
    for call, factor in zip(some, factors, strict=True):
        serial = bool(parts) and any(same(read, so_far) for read in reads)
        base = tuple(part.name for part in parts) if serial else ()
        parts.append(Part(call.name, _component(call.name, last=call is some[-1]), factor, base))
        so_far = so_far + factor * call.written.double()
    return parts


def _component(name: str, *, last: bool) -> str:
    tail = ".".join(name.split(".")[-3:]).lower()
    if any(word in tail for word in ("mamba", "mixer", "linear_attn", "conv", "recurrent", "temporal", "ssm", "xlstm")):
        return "mixer"
    if any(
        word in tail for word in ("mlp", "ffn", "feed_forward", "feedforward", "ff", "moe", "expert", "fc", "dense_4h")
    ):
        return "ffn"
    if "attn" in tail or "attention" in tail or not last:
        return "attn"
    return "ffn"


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
                    if same(call.written[-len(fed) :], fed, 0.05):
                        return call.module
        raise NoReferenceError("no norm is between the last block and the unembedding")

    def _scale_and_cap(self, plain: Plain, end: torch.Tensor) -> None:
        """Find the factor of the logits, and their soft cap."""
        z = self.rows @ self.norm(end) + self.constant
        caps = {k: v for k, v in vars(plain.model.config.get_text_config()).items() if "cap" in k and v}
        for cap in (None, *(v for v in caps.values() if isinstance(v, int | float))):
            own = plain.logits if cap is None else cap * (plain.logits / cap).clamp(-1 + 1e-9, 1 - 1e-9).atanh()
            factor = float((own @ z) / (z @ z))
            if (own - factor * z).norm() <= 5e-2 * own.norm():
                self.factor, self.cap, self.real = factor, cap, factor * z
                return
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
    """The linear map that writes a part: its input (entry) at the last position, and what each entry contributes."""

    entries: torch.Tensor
    columns: torch.Tensor


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
        return part.factor * self.plain.call(part.name).written[-1].double()

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
        whole = self.plain.call(part.name)
        within = [c for c in self.plain.calls if c.name.startswith(f"{self.plain.blocks[layer]}.")]
        linear = [c for c in within if _matrix(c.module) is not None and c.read is not None and c.written is not None]
        norm, written = None, whole.written
        if not any(same(c.written, written, 1e-3) for c in linear) and whole.read is not None:
            norm, written = FrozenNorm(whole.module, whole.read[-1].double()), whole.read
        found = [c for c in linear if same(c.written, written, 1e-3)]
        if not found:
            raise NoReferenceError(f"layer {layer} has no linear map that writes {component}")
        columns = _matrix(found[-1].module).double()
        columns = columns if norm is None else norm(columns, bias=False)
        return Projection(found[-1].read[-1].double(), columns * part.factor)

    def heads(self, layer: int, n_heads: int) -> torch.Tensor:
        """Scores (head) of a layer's heads."""
        of = self.projection(layer, "attn")
        per_head = (of.entries[:, None] * of.columns).unflatten(0, (n_heads, -1)).sum(1)
        return self.of(layer, self.part(layer, "attn"), per_head)

    def neurons(self, layer: int, component: str, entries: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """Scores (n) of entries (n) of the projection's input, with these coefficients (n)."""
        vectors = self.projection(layer, component).columns[entries] * coefficients.double()[:, None]
        return self.of(layer, self.part(layer, component), vectors)


def _matrix(module: nn.Module) -> torch.Tensor | None:
    """Matrix (in, out) of a linear module; None for any other."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    return weight.detach() if type(module).__name__ == "Conv1D" else weight.detach().T
