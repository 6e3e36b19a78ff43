"""Find the parts of a block's FFN: the projections, the activation, and the slots of its neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdb.errors import ModelError
from kdb.ingest.forward.linear import Call, same

if TYPE_CHECKING:
    import torch
    from torch import nn


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
