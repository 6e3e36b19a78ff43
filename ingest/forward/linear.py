"""Linear maps and norms of a model: their matrices, and their calls in a forward pass."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from torch import nn

_AMPLITUDE = 128.0
"""Entries of the vectors that probe a norm: so large that its epsilon is negligible."""


@dataclass(frozen=True)
class Norm:
    """A norm with its scale frozen: y = weight · (x − mean, if centred) · scale + bias."""

    module: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor
    centred: bool

    def before(self, rows: torch.Tensor) -> torch.Tensor:
        """Fold the norm, without its scale, into the rows (…, hidden) of a projection that reads its output."""
        return self._centre(rows * self.weight)

    def after(self, columns: torch.Tensor) -> torch.Tensor:
        """Fold the norm, without its scale, into vectors (…, hidden) that it reads."""
        return self._centre(columns) * self.weight

    def scale(self, read: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Fit the scale (…) that maps ``read`` to ``written``, both (…, hidden), by least squares."""
        shape = self.after(read)
        return ((written - self.bias) * shape).sum(-1) / shape.square().sum(-1)

    def _centre(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True)
class Linear:
    """A linear map between two others, folded as a norm is, of scale 1: y = matrix · x + bias."""

    module: nn.Module

    @property
    def bias(self) -> torch.Tensor:
        """The bias, 0 if there is none."""
        import torch

        bias: torch.Tensor | None = getattr(self.module, "bias", None)
        return torch.zeros((), device=matrix(self.module).device) if bias is None else bias.float()

    def before(self, rows: torch.Tensor) -> torch.Tensor:
        """Fold the map into the rows (…, entries) of a projection that reads its output."""
        return rows @ matrix(self.module).float()

    def after(self, columns: torch.Tensor) -> torch.Tensor:
        """Apply the map, without its bias, to vectors (…, entries) that it reads."""
        return columns @ matrix(self.module).float().T

    def scale(self, read: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """1, for every vector (…, entries) that it reads."""
        return read.new_ones(read.shape[:-1])


@dataclass(eq=False)
class Call:
    """One call of a module: its first input and its first output, each (tokens, entries), and all of both."""

    module: nn.Module
    read: torch.Tensor
    written: torch.Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


def matrix(module: nn.Module) -> torch.Tensor:
    """Matrix (out, in) of a linear module: its plain weight, or else measured by unit vectors."""
    import torch
    from transformers.pytorch_utils import Conv1D

    weight: Any = module.weight
    if type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point():
        plain: torch.Tensor = weight.detach()
        return plain.T if isinstance(module, Conv1D) else plain
    with torch.inference_mode():
        # A quantized weight of any kind: its outputs define the matrix.
        units = torch.eye(cast(int, module.in_features), device=weight.device)
        rows: torch.Tensor = (module(units) - module(torch.zeros_like(units[:1]))).T
        return rows


def read_norm(module: nn.Module, *shape: int) -> Norm:
    """Measure a norm's weight and bias from its outputs, in float32, since architectures store them differently.

    ``shape`` is that of its input: the number of entries, or more where the norm needs more dimensions.
    """
    import torch

    twin = copy.deepcopy(module).float()
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    signs = torch.ones(shape, device=device)
    signs[..., 1::2] = -1
    x = signs * _AMPLITUDE
    with torch.inference_mode():
        up, down, shifted = (twin(y).float() for y in (x, -x, x + _AMPLITUDE))
    # Cloned, since some operations outside of inference mode refuse its tensors.
    weight, bias = ((up - down) / 2 * signs).clone(), ((up + down) / 2).clone()
    return Norm(module, weight, bias, centred=bool(torch.allclose(up, shifted, rtol=1e-3, atol=1e-5)))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map of one class or another."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def n_required(module: nn.Module) -> int:
    """Number of arguments without which a module cannot be called; Zaya's norm of queries and keys takes both."""
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(one.default is one.empty and one.kind == one.POSITIONAL_OR_KEYWORD for one in parameters)


def n_inputs(linear: Any) -> int:
    """Number of inputs of a linear module, quantized or not."""
    return int(linear.in_features if hasattr(linear, "in_features") else linear.weight.shape[0])  # or a Conv1D


def flat(x: torch.Tensor) -> torch.Tensor:
    """Reshape (batch, position, entries) to (tokens, entries), as OPT itself does before its FFN."""
    return x.reshape(-1, x.shape[-1])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape and in every entry."""
    import torch

    return a.shape == b.shape and torch.equal(a, b)
