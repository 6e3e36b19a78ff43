"""Modules of experts: their neurons' keys and columns, and a forward pass that shows the neurons' coefficients.

A module of experts holds the matrices of all its experts, and is told for each token which of them to run, and with
which weights. Its neurons are those of its experts, one expert after another; an expert that was not chosen has
coefficients of 0.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError
from kdb.ingest.forward.linear import Call

if TYPE_CHECKING:
    import torch

Watch = Callable[["torch.Tensor"], "torch.Tensor | None"]
"""Takes coefficients (token, neuron), and returns those that replace them, or None."""


@dataclass(frozen=True)
class Routing:
    """For each token (t), the experts that run (t, k) and the weight of each (t, k)."""

    index: torch.Tensor
    weight: torch.Tensor

    def spread(self, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of every expert (t, n), 0 if it is not chosen, and whether it is chosen (t, n)."""
        import torch

        index = self.index.clamp_max(n_experts)  # a larger number stands for no expert
        weight = torch.zeros(len(index), n_experts + 1, device=index.device)
        weight.scatter_add_(1, index, self.weight.float())
        chosen = torch.zeros(weight.shape, dtype=torch.bool, device=index.device).scatter_(1, index, value=True)
        return weight[:, :n_experts], chosen[:, :n_experts]


class Experts:
    """A module of experts that is called with hidden states, the experts of each token, and their weights."""

    def __init__(self, module: Any) -> None:
        """Raises ModelError for experts that are not two projections with an activation between them."""
        self.module = module
        parts = _parts(module)
        self.first: torch.Tensor = parts.first
        self.down: torch.Tensor = parts.down
        self.first_bias, self.down_bias, self.activate = parts.first_bias, parts.down_bias, parts.activate
        self.n_experts, self.width = len(self.down), self.down.shape[2]
        self.key_rows = self._key_rows()

    @property
    def size(self) -> int:
        """Number of neurons of all experts."""
        return self.n_experts * self.width

    def columns(self) -> torch.Tensor:
        """The output of one unit of each neuron, (neurons, entries), float32."""
        return self.down.transpose(1, 2).flatten(0, 1).float()

    def keys(self) -> torch.Tensor:
        """The row that activates each neuron, (neurons, entries), float32."""
        return self.first[:, self.key_rows].flatten(0, 1).float()

    def biases(self) -> torch.Tensor | None:
        """The output of each expert without its neurons, (experts, entries), float32; None if that is 0."""
        return None if self.down_bias is None else self.down_bias.float()

    def read(self, states: torch.Tensor, expert: int) -> torch.Tensor:
        """Products (…, neurons of the expert) of one expert's keys with states (…, entries)."""
        rows = states @ self.first[expert].T
        return (rows if self.first_bias is None else rows + self.first_bias[expert])[..., self.key_rows].float()

    def routing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing | None:
        """The routing that a call of the module was given; None if the call does not say."""
        _states, index, weight = self._given(args, kwargs)
        return Routing(index.reshape(-1, index.shape[-1]), weight.reshape(-1, index.shape[-1]))

    def routed(self, call: Call) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The weight of every expert (token, expert) in a call, None if it does not say, and whether it is chosen."""
        routing = self.routing(call.args, call.kwargs)
        assert routing is not None
        return routing.spread(self.n_experts)

    def output(self, written: torch.Tensor) -> torch.Tensor:
        """The sum over experts (token, entries) of what a call of the module returned."""
        return written.reshape(-1, written.shape[-1])

    @contextlib.contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Let the module compute its output from coefficients that ``watch`` sees and may replace."""

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            return self._run(watch, args, kwargs)

        before = vars(self.module).get("forward")
        self.module.forward = forward
        try:
            yield
        finally:
            if before is None:
                del self.module.forward
            else:
                self.module.forward = before

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The hidden states, experts and weights of a call, by position or by name."""
        names = list(inspect.signature(type(self.module).forward).parameters)[1:4]
        if len(names) < 3:
            raise ModelError(
                f"{type(self.module).__name__} takes {' and '.join(names)}, and kdb measures experts that take hidden "
                "states, chosen experts and their weights."
            )
        given = dict(zip(names, args, strict=False)) | kwargs
        return tuple(given[name] for name in names)

    def _run(self, watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        import torch

        states, routing = self._given(args, kwargs)[0], self.routing(args, kwargs)
        assert routing is not None
        flat, runs = states.reshape(-1, states.shape[-1]), []
        coefficients = torch.zeros(len(flat), self.n_experts, self.width, device=flat.device)
        for expert in routing.index.unique().tolist():
            if expert < self.n_experts:
                token, k = (routing.index == expert).nonzero(as_tuple=True)
                fired, weight = self._fired(flat[token], expert), routing.weight[token, k, None]
                coefficients[token, expert] = fired.float() * weight.float()
                runs.append((expert, token, fired, weight))
        new = watch(coefficients.flatten(1))
        total = torch.zeros_like(flat)
        for expert, token, fired, weight in runs:
            if new is not None and torch.is_grad_enabled():
                out = self._project(new[token, expert * self.width : (expert + 1) * self.width].to(flat.dtype), expert)
                out = out if self.down_bias is None else out + self.down_bias[expert] * weight
            else:
                out = self._project(fired, expert)
                out = (out if self.down_bias is None else out + self.down_bias[expert]) * weight
            total = total.index_add(0, token, out.to(flat.dtype))
        if new is not None and not torch.is_grad_enabled():
            total += self._change(new - coefficients.flatten(1)).to(flat.dtype)
        return total.reshape(states.shape)

    def _fired(self, states: torch.Tensor, expert: int) -> torch.Tensor:
        """Activations (token, neuron) of one expert."""
        first = states @ self.first[expert].T
        return self.activate(first if self.first_bias is None else first + self.first_bias[expert])

    def _project(self, fired: torch.Tensor, expert: int) -> torch.Tensor:
        return fired @ self.down[expert].T

    def _change(self, difference: torch.Tensor) -> torch.Tensor:
        """Change of the output that a change (token, neuron) of coefficients causes; exactly 0 without one."""
        import torch

        parts = difference.view(len(difference), self.n_experts, self.width)
        out = torch.zeros(len(difference), self.down.shape[1], device=difference.device)
        for expert in parts.any(2).any(0).nonzero()[:, 0].tolist():
            out += parts[:, expert] @ self.down[expert].float().T
        return out

    def _key_rows(self) -> slice:
        """The rows of the first projection in which the activations are linear: the up projections, or all."""
        import torch

        n, w = self.first.shape[1], self.width
        if n == w:
            return slice(None)
        x = torch.linspace(-1, 1, 2 * n, device=self.first.device, dtype=self.first.dtype).view(2, n).sin()
        for rows in (slice(w, 2 * w), slice(0, w), slice(1, None, 2), slice(0, None, 2)):
            plus, zero, minus = x.clone(), x.clone(), x.clone()
            zero[:, rows], minus[:, rows] = 0, -x[:, rows]
            ends, middle = (self.activate(plus) + self.activate(minus)).float(), 2 * self.activate(zero).float()
            if torch.allclose(ends, middle, rtol=1e-2, atol=1e-2 * float(self.activate(plus).abs().max())):
                return rows
        raise ModelError(f"{type(self.module).__name__} has experts whose gate kdb does not know.")


class ScaledInputs(Experts):
    """Experts that are given the states once for each of them, times its weight (Llama 4): (experts · token, entries).

    A coefficient is the activation of the scaled state. Experts that were not chosen are given 0.
    """

    def routing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing | None:
        """None: the weights are part of the states."""
        return None

    def output(self, written: torch.Tensor) -> torch.Tensor:
        """The sum over experts (token, entries) of what a call of the module returned."""
        return written.view(self.n_experts, -1, written.shape[-1]).sum(0)

    def routed(self, call: Call) -> tuple[torch.Tensor | None, torch.Tensor]:
        """None, and which experts (token, expert) were given a state."""
        return None, call.read.reshape(self.n_experts, -1, call.read.shape[-1]).any(2).T

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return (args[0] if args else kwargs["hidden_states"],)

    def _run(self, watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        import torch

        states = self._given(args, kwargs)[0]
        by_expert = states.view(self.n_experts, -1, states.shape[-1])
        fired = torch.stack([self._fired(x, expert) for expert, x in enumerate(by_expert)])
        coefficients = fired.transpose(0, 1).flatten(1)  # token, neuron
        new = watch(coefficients.float())
        used = coefficients if new is None else new.to(coefficients.dtype)
        parts = used.view(len(used), self.n_experts, self.width).transpose(0, 1)
        out = torch.stack([self._project(x, expert) for expert, x in enumerate(parts)])
        return out.view(-1, states.shape[-1])


def is_experts(module: Any) -> bool:
    """Whether a module holds the matrices of several experts."""
    return getattr(getattr(module, "down_proj", None), "ndim", 0) == 3 or hasattr(getattr(module, "mlp", None), "w2")


def experts(module: Any) -> Experts:
    """The experts of a module; raises ModelError if kdb does not know their form."""
    n_inputs = len(inspect.signature(type(module).forward).parameters) - 1
    return ScaledInputs(module) if n_inputs == 1 else Experts(module)


@dataclass(frozen=True)
class _Parts:
    """First projections (expert, row, entry), last ones (expert, entry, neuron), their biases, and the activation."""

    first: torch.Tensor
    down: torch.Tensor
    first_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activate: Callable[[torch.Tensor], torch.Tensor]


def _parts(module: Any) -> _Parts:
    if getattr(module, "has_post_expert_norm", False) or not hasattr(module, "down_proj"):
        return _stacked(module)
    gated = hasattr(module, "gate_up_proj")
    name, down = "gate_up_proj" if gated else "up_proj", module.down_proj
    first = getattr(module, name)
    plain = first.shape[2] == down.shape[1] and first.shape[1] in (down.shape[2], 2 * down.shape[2])
    if not getattr(module, "is_transposed", not plain):
        first, down = first.detach(), down.detach()
    else:
        first, down = first.detach().transpose(1, 2), down.detach().transpose(1, 2)
    act: Any = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)  # gpt-oss has none

    def gate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        product: torch.Tensor = act(a) * b
        return product

    biases = getattr(module, f"{name}_bias", None), getattr(module, "down_proj_bias", None)
    return _Parts(first, down, *biases, getattr(module, "_apply_gate", gate) if gated else act)


def _stacked(module: Any) -> _Parts:
    """The parts of experts whose rows stand one expert after another in one matrix (DBRX)."""
    import torch

    mlp: Any = getattr(module, "mlp", None)
    if not all(hasattr(mlp, name) for name in ("w1", "v1", "w2")):
        raise ModelError(f"{type(module).__name__} has experts of a form that kdb does not know.")
    n = module.num_experts
    w1, v1, w2 = (getattr(mlp, name).detach().view(n, -1, module.hidden_size) for name in ("w1", "v1", "w2"))

    def gate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        product: torch.Tensor = mlp.activation_fn(a) * b
        return product

    return _Parts(torch.cat([w1, v1], dim=1), w2.transpose(1, 2), None, None, gate)
