"""Contributions of a block to the residual stream: which components, with which multipliers, and in which order.

A block's output minus its input is a sum of what its attention, its FFN and its mixer write (a mixer is any other part:
a state-space model, linear attention, a convolution). The sum is solved for the multipliers by least squares. So a
part that is found, but not added to the stream, is dropped, and one that is missing is looked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdb.ingest.forward.linear import Call, is_norm, same

if TYPE_CHECKING:
    import torch

COMPONENTS = ("attn", "ffn", "mixer")

_ROUNDING = 4
"""Largest difference of a block's output from a sum that is accepted, in units of the dtype's rounding."""

_NOTHING = 1e-3
"""Largest share of a sum that a part may have which is not added at all."""


@dataclass(frozen=True)
class Additions:
    """Contributions of a block: the multiplier of each component, and what each is added to.

    ``before``: for each component, those that the residual which it is added to contains already.
    """

    multipliers: Mapping[str, float]
    before: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Added:
    """The multiplier of each component, and the calls that write what mixer and FFN add; None without them.

    ``is_exact``: the sum is the block's output, but for rounding.
    """

    multipliers: Mapping[str, float]
    mixer: Call | None
    ffn: Call | None
    is_exact: bool = False


def find_added(
    total: Call, known: Mapping[str, torch.Tensor], ffns: Sequence[Call], others: Sequence[Call], multiplier: float
) -> Added:
    """Find what is added between the state that ``total`` read and the one that it wrote.

    ``known`` (tokens, hidden) is what attention writes. One of the calls ``ffns`` writes what the FFN adds, the most
    likely first, and one of ``others`` may be the mixer's. ``multiplier`` is the config's.
    """
    import torch

    delta = (total.written.double() - total.read.double()).flatten()
    states = (total.read, total.written, *known.values(), *(call.written for call in ffns))
    largest = max(float(state.double().norm()) for state in states)
    rounding = _ROUNDING * torch.finfo(total.written.dtype).eps * largest
    for ffn, mixer in _choices(total, known, ffns, others):
        parts = {**known}
        if ffn is not None:
            parts["ffn"] = ffn.written
        if mixer is not None:
            parts["mixer"] = mixer.written
        for found, rest in (_usual(delta, parts, multiplier), _fitted(delta, parts)):
            if rest < rounding:  # the first sum that is exact, without a mixer if there is one
                own = {name: one if name in found else None for name, one in (("mixer", mixer), ("ffn", ffn))}
                return Added(found, own["mixer"], own["ffn"], is_exact=True)
    usual = dict.fromkeys((*known, *(["ffn"] if ffns else [])), multiplier)
    return Added(usual, None, next(iter(ffns), None))


def _choices(
    total: Call, known: Mapping[str, torch.Tensor], ffns: Sequence[Call], others: Sequence[Call]
) -> Iterator[tuple[Call | None, Call | None]]:
    """Pairs of calls that may write what FFN and mixer add; those without a mixer come first."""
    mixers = [c for c in reversed(others) if _may_be_added(c, total, known)]  # the outermost module ends last
    for mixer, ffn in itertools.product((None, *mixers), ffns or (None,)):
        if mixer is None or ffn is None or not same(mixer.written, ffn.written):
            yield ffn, mixer


def _may_be_added(call: Call, total: Call, known: Mapping[str, torch.Tensor]) -> bool:
    """Whether a call may be the mixer's: it writes a state of its own, and not only normalises what came in."""
    if call.written.shape != total.written.shape or any(same(call.written, own) for own in known.values()):
        return False
    return not (is_norm(call.module) and same(call.read, total.read))


def _usual(delta: torch.Tensor, parts: Mapping[str, torch.Tensor], multiplier: float) -> tuple[dict[str, float], float]:
    """The config's multiplier for each part, and the length of what they leave."""
    rest = delta
    for own in parts.values():
        rest = rest - multiplier * own.double().flatten()
    return dict.fromkeys(parts, multiplier), float(rest.norm())


def _fitted(delta: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], float]:
    """The multipliers by least squares, without parts that are not added, and the length of what they leave."""
    import torch

    if not parts or any(own.numel() != len(delta) for own in parts.values()):
        return {}, float(delta.norm())
    columns = torch.stack([own.double().flatten() for own in parts.values()], dim=1)
    solved = torch.linalg.lstsq(columns.cpu(), delta[:, None].cpu()).solution[:, 0].to(delta.device)
    rest = float((delta - columns @ solved).norm())
    least = _NOTHING * float(delta.norm())
    lengths = (columns * solved).norm(dim=0)
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
    if same(source, read) or source.shape != read.shape:
        return ()
    others = [c for c in COMPONENTS if c in written and c != name]

    def distance(some: tuple[str, ...]) -> float:
        return float((source.double() - read.double() - sum(written[c].double() for c in some)).norm())

    return min((some for n in range(len(others) + 1) for some in itertools.combinations(others, n)), key=distance)
