"""What a block adds to the residual stream: which components, with which multipliers, and in which order.

A block's output minus its input is a sum of what its attention, its FFN and its mixer write (a mixer is any other part:
a state-space model, linear attention, a convolution). The sum is solved for the multipliers by least squares. So a
part that is found, but not added to the stream, is dropped, and one that is missing is looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from kdb.ingest.forward.linear import Call, is_norm, same

if TYPE_CHECKING:
    import torch
    from torch import nn

COMPONENTS = ("attn", "ffn", "mixer")

_BETTER = 0.5
"""A part or multiplier is accepted if it leaves less than this share of what was unexplained before."""

_ROUNDING = 4
"""Largest difference of a block's output from a sum that is accepted, in units of the dtype's rounding."""

_NOTHING = 1e-3
"""Largest share of a sum that a part may have which is not added at all."""


@dataclass(frozen=True)
class Additions:
    """What a block adds: the multiplier of each component, the mixer's module, and what each is added to.

    ``before``: for each component, those that the residual which it is added to contains already.
    """

    multipliers: Mapping[str, float]
    mixer: nn.Module | None = None
    before: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def find_additions(
    block: Call, known: Mapping[str, torch.Tensor], others: Sequence[Call], multiplier: float
) -> tuple[dict[str, float], Call | None]:
    """Return the multiplier of each component that a block adds, and the call of its mixer.

    ``known`` (tokens, hidden) is what attention and FFN write, ``others`` are calls that may be the mixer's, and
    ``multiplier`` is the config's.
    """
    import torch

    delta = (block.written.double() - block.read.double()).flatten()
    rounding = _ROUNDING * torch.finfo(block.written.dtype).eps * float(block.written.double().norm())
    usual, left = _usual(delta, known, multiplier)
    best: tuple[float, dict[str, float], Call | None] = (left, usual, None)
    candidates = [c for c in reversed(others) if _may_be_added(c, block, known)]  # the outermost module ends last
    for call in (None, *candidates):
        parts = known if call is None else {**known, "mixer": call.written}
        for found, rest in (_usual(delta, parts, multiplier), _fitted(delta, parts)):
            if rest < min(_BETTER * best[0], rounding):
                best = (rest, found, call if "mixer" in found else None)
    return best[1], best[2]


def _may_be_added(call: Call, block: Call, known: Mapping[str, torch.Tensor]) -> bool:
    """Whether a call may be the mixer's: it writes a state of its own, and does not only normalise the block's input."""
    if call.written.shape != block.written.shape or any(same(call.written, own) for own in known.values()):
        return False
    return not (is_norm(call.module) and same(call.read, block.read))


def _usual(delta: torch.Tensor, parts: Mapping[str, torch.Tensor], multiplier: float) -> tuple[dict[str, float], float]:
    """The config's multiplier for each part, and the length of what they leave."""
    rest = delta - sum((multiplier * own.double().flatten() for own in parts.values()), start=delta.new_zeros(()))
    return dict.fromkeys(parts, multiplier), float(rest.norm())


def _fitted(delta: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], float]:
    """The multipliers by least squares, without parts that are not added, and the length of what they leave."""
    import torch

    if not parts:
        return {}, float(delta.norm())
    columns = torch.stack([own.double().flatten() for own in parts.values()], dim=1)
    solved = torch.linalg.lstsq(columns.cpu(), delta[:, None].cpu()).solution[:, 0].to(delta.device)
    rest = float((delta - columns @ solved).norm())
    lengths = (columns * solved).norm(dim=0)
    least = _NOTHING * float(delta.norm())
    return {name: _rounded(float(a)) for name, a, b in zip(parts, solved, lengths, strict=True) if b > least}, rest


def _rounded(multiplier: float) -> float:
    return 1.0 if abs(multiplier - 1) < _NOTHING else multiplier


def find_order(
    read: torch.Tensor, sources: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, ...]]:
    """Return for each component the others that its source contains: the sum that is nearest to it.

    ``read`` is the block's input, ``sources`` what each component reads, before its norm, and ``written`` what each
    adds; all (tokens, hidden).
    """
    return {name: _contained(name, read, source, written) for name, source in sources.items()}


def _contained(
    name: str, read: torch.Tensor, source: torch.Tensor, written: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    others = [c for c in COMPONENTS if c in written and c != name]
    sets = [some for n in range(len(others) + 1) for some in combinations(others, n)]
    if same(source, read):
        return ()
    if source.shape != read.shape:
        return ()

    def distance(some: tuple[str, ...]) -> float:
        total = read.double() + sum((written[c].double() for c in some), start=read.new_zeros(()).double())
        return float((source.double() - total).norm())

    return min(sets, key=distance)
