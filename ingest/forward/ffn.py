"""Find the parts of a block's FFN: the projections, the activation, and the slots of its neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass
class Call:
    """One call of a module: its input and its output, each (tokens, entries)."""

    module: nn.Module
    read: torch.Tensor
    written: torch.Tensor


def find_key(
    where: str, first: list[Call], calls: list[Call], coefficient: torch.Tensor
) -> tuple[nn.Module, slice, nn.Module | None, bool]:
    """Find the projection whose output gives the neurons' coefficients, by multiplication with a gate or by activation.

    Return it, its rows, the module of the activation, and whether there is a gate.

    The outputs of the first projections are split into pieces with one entry per neuron. The gate is the piece that the
    activation reads; the other is the up projection. Without a gate, the only piece is the key.
    """
    import torch

    n = coefficient.shape[-1]
    pieces = [
        (c.module, slice(i, i + n), c.written[:, i : i + n])
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
            if torch.allclose(call.written * piece, coefficient, rtol=1e-2, atol=1e-5):
                return module, rows, call.module, True
    raise ModelError(f"{where} has an FFN whose neurons are not an activation times a linear map of its input.")


def _is_function(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map of one class or another."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


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
