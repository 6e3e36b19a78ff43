"""Control sets: for each unit of a set, another one of the same kind and layer that writes about as much.

    drawn = controls(units, shape, sizes, 19, seed=42)

The size of a neuron is |coefficient| × length of its column, that of a head or expert the length of its output: at the
last position, as a mean over the prompts measured. Random neurons are no control, because most are close to 0.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdb.errors import QueryError
from kdb.ingest.attribution.units import Shape, Unit

if TYPE_CHECKING:
    import torch

    from kdb.ingest.attribution.effects import Category
    from kdb.ingest.forward.decomposition import Decomposition

Place = tuple[str, int]
"""Kind of a unit (head, attn, ffn, expert), and its layer."""

Sizes = Mapping[Place, NDArray[np.float64]]
"""The size of every unit of a kind and layer."""

_TRIES = 50
"""Draws for each control set that is still missing, after which it is left out."""


def controls(units: Sequence[Unit], shape: Shape, sizes: Sizes, n: int, seed: int) -> list[list[Unit]]:
    """Draw ``n`` distinct control sets of ``units``, or as many as there are; each is sorted and has none of ``units``.

    They share no unit where a layer has enough of them: then the set and its controls can be told apart by chance only.
    """
    rng = random.Random(seed)
    places = _places(units, shape)
    candidates = {p: sorted(set(range(shape.count(*p))) - set(some)) for p, some in places.items()}
    if n and n_distinct(units, shape, n) < n:
        drawn = _all_sets(places, candidates)
    else:
        near = {p: _nearest(some, candidates[p], sizes[p], n) for p, some in places.items()}
        drawn = _distinct(places, candidates, near, n, rng)
    return [sorted(shape.unit(kind, layer, number) for (kind, layer), number in one) for one in drawn]


def check_controls(units: Sequence[Unit], shape: Shape) -> None:
    """Raise QueryError if a layer has too few other units for any control set."""
    for (kind, layer), some in _places(units, shape).items():
        others = shape.count(kind, layer) - len(some)
        if others < len(some):
            raise QueryError(
                f"Layer {layer} has {others} other {_NAMES[kind]}, too few for a control set of {len(some)}: name "
                "fewer units, or give --controls 0."
            )


_NAMES = {"head": "heads", "attn": "attention neurons", "ffn": "FFN neurons", "expert": "experts"}


def n_distinct(units: Sequence[Unit], shape: Shape, enough: int) -> int:
    """Return the number of distinct control sets, at most ``enough``."""
    n = 1
    for place, some in _places(units, shape).items():
        n = min(enough, n * math.comb(shape.count(*place) - len(some), len(some)))
    return n


def size_ratio(mine: float, control: float) -> float:
    """Return the size of a set over that of its control, each the sum over its units."""
    return mine / control if control else math.inf if mine else 1.0


def unit_size(unit: Unit, shape: Shape, sizes: Sizes) -> float:
    """Return the size of a unit."""
    return float(sizes[unit.kind, unit.layer][shape.number(unit)])


def _places(units: Sequence[Unit], shape: Shape) -> dict[Place, list[int]]:
    places: dict[Place, list[int]] = {}
    for unit in units:
        places.setdefault((unit.kind, unit.layer), []).append(shape.number(unit))
    return places


def _nearest(some: Sequence[int], candidates: Sequence[int], sizes: NDArray[np.float64], n: int) -> list[list[int]]:
    """Give each unit its own nearest candidates by ratio of sizes, in turn: ``n``, or as many as there are for each."""
    logs = np.log(np.maximum(sizes, np.finfo(float).tiny))
    free = np.array(candidates)
    own: list[list[int]] = [[] for _ in some]
    for _ in range(min(n, len(candidates) // len(some))):
        for mine, unit in zip(own, some, strict=True):
            best = int(np.abs(logs[free] - logs[unit]).argmin())
            mine.append(int(free[best]))
            free = np.delete(free, best)
    return own


_Set = frozenset[tuple[Place, int]]


def _all_sets(places: Mapping[Place, Sequence[int]], candidates: Mapping[Place, Sequence[int]]) -> list[_Set]:
    choices = [[(p, one) for one in itertools.combinations(candidates[p], len(some))] for p, some in places.items()]
    return [frozenset((p, i) for p, one in chosen for i in one) for chosen in itertools.product(*choices)]


def _distinct(
    places: Mapping[Place, Sequence[int]],
    candidates: Mapping[Place, Sequence[int]],
    near: Mapping[Place, Sequence[Sequence[int]]],
    n: int,
    rng: random.Random,
) -> list[_Set]:
    """Deal every unit's own candidates to the sets; draw anew, from more candidates, those that are dealt twice."""
    dealt = [(p, _dealt(own, n, rng)) for p, some in near.items() for own in some]
    found = dict.fromkeys(frozenset((p, hand[j]) for p, hand in dealt) for j in range(n))
    for _ in range(_TRIES * n):
        if len(found) == n:
            break
        found[_drawn(places, candidates, near, n, rng)] = None
    return list(found)


def _dealt(own: Sequence[int], n: int, rng: random.Random) -> list[int]:
    rounds = [rng.sample(own, len(own)) for _ in range(-(-n // len(own)))] if own else []
    return list(itertools.chain.from_iterable(rounds))[:n]


def _drawn(
    places: Mapping[Place, Sequence[int]],
    candidates: Mapping[Place, Sequence[int]],
    near: Mapping[Place, Sequence[Sequence[int]]],
    n: int,
    rng: random.Random,
) -> _Set:
    chosen: list[tuple[Place, int]] = []
    for p, some in places.items():
        is_enough = all(len(own) >= n for own in near[p])
        one = [rng.choice(own) for own in near[p]] if is_enough else rng.sample(candidates[p], len(some))
        chosen += [(p, i) for i in one]
    return frozenset(chosen)


def measured_sizes(
    decomposition: Decomposition, categories: Iterable[tuple[Category, Sequence[int]]], wanted: Iterable[Place]
) -> dict[Place, NDArray[np.float64]]:
    """Return the size of every unit of the wanted kinds and layers, as a mean over some prompts of each category."""
    import torch

    sums: dict[Place, torch.Tensor] = {place: torch.zeros((), dtype=torch.float64) for place in sorted(set(wanted))}
    n = 0
    for category, indices in categories:
        n += len(indices)
        for place in sums:
            sums[place] = sums[place] + _lengths(decomposition, category, indices, place).sum(0)
    return {place: (total / n).numpy() for place, total in sums.items()}


def _lengths(decomposition: Decomposition, category: Category, indices: Sequence[int], place: Place) -> torch.Tensor:
    """Lengths (prompt, unit) of what the units of one kind and layer add to the residual at the last position."""
    import torch

    kind, layer = place
    in_ffn = kind in ("ffn", "expert")
    component, whole = ("ffn_neuron", "ffn") if in_ffn else ("head", "attn")
    columns = (decomposition.ffn_columns if in_ffn else decomposition.attn_columns)(layer).cpu()
    values = category.values("last", component)
    m = torch.stack([values[i][layer, 0] for i in indices])
    if kind == "head":
        parts = columns.view(decomposition.n_heads, -1, columns.shape[1])
        lengths = torch.einsum("phe,hed->phd", m.view(len(m), *parts.shape[:2]), parts).norm(dim=2)
    elif kind == "expert":
        layout = decomposition.ffn_layout(layer)
        experts = [list(layout.slots(e)) for e in range(len(layout.starts))]
        lengths = torch.stack([(m[:, one] @ columns[one]).norm(dim=1) for one in experts], dim=1)
    else:
        lengths = m.abs() * columns.norm(dim=1)
    block = decomposition.blocks[layer]
    if (block.ffn_post if in_ffn else block.attn_post) is not None:  # a norm behind it scales all units alike
        written = category.values("last", whole)
        reached = torch.stack([written[i][layer, 0] for i in indices]).norm(dim=1)
        lengths = lengths * (reached / (m @ columns).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))[:, None]
    doubled: torch.Tensor = lengths.double()
    return doubled
