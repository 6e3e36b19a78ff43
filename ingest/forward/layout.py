"""Where the FFN neurons of a layer stand: which of its slots belong to which expert.

A layer's FFN is a sum of columns, one for each slot. In a dense FFN, a slot is a neuron. In a mixture of experts, the
slots of expert 0 come first, then those of expert 1, and so on; shared experts follow the routed ones. Every layer of a
model has as many slots as its widest layer: those that it does not need have no neuron.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Slots = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class FfnLayout:
    """The slots of one layer's FFN: ``size`` have a neuron, and expert e begins at ``starts[e]``.

    ``starts`` is empty in a dense FFN. The first ``n_routed`` experts are chosen by the router, the others are shared.
    """

    size: int
    starts: tuple[int, ...] = ()
    n_routed: int = 0

    def experts(self, slots: Slots) -> NDArray[np.int64]:
        """Return the expert of each slot; −1 in a dense FFN."""
        if not self.starts:
            return np.full(np.shape(slots), -1)
        return np.searchsorted(self.starts, slots, side="right") - 1

    def neurons(self, slots: Slots) -> NDArray[np.int64]:
        """Return the number of each slot's neuron within its expert; in a dense FFN, within the layer."""
        first = np.asarray((*self.starts, 0))[self.experts(slots)]  # the last is that of no expert, −1
        within: NDArray[np.int64] = np.asarray(slots) - first
        return within

    def slot(self, expert: int | None, neuron: int) -> int:
        """Return the slot of an expert's neuron; ``expert`` is None in a dense FFN."""
        return neuron if expert is None else self.starts[expert] + neuron

    def slots(self, expert: int) -> range:
        """Return the slots of an expert; of a dense FFN, all."""
        return range(*(*self.starts, self.size)[expert : expert + 2]) if self.starts else range(self.size)


def layout_rows(layouts: Sequence[FfnLayout]) -> list[dict[str, Any]]:
    """Return rows of the table ``experts``; none for a model without experts whose layers are equally wide."""
    if not any(layout.starts for layout in layouts) and len({layout.size for layout in layouts}) == 1:
        return []
    return [
        {"layer": layer, "expert": expert, "shared": expert >= layout.n_routed, "n_neurons": len(layout.slots(expert))}
        for layer, layout in enumerate(layouts)
        for expert in range(len(layout.starts))
    ] + [{"layer": layer, "n_neurons": layout.size} for layer, layout in enumerate(layouts) if not layout.starts]


def stored_layouts(model: Mapping[str, Any], experts: Sequence[Mapping[str, Any]]) -> tuple[FfnLayout, ...]:
    """Return the layout of each layer from the stored row of a model, and from its rows of ``experts``."""
    layouts = [FfnLayout(model["intermediate_size"] or 0)] * model["n_layers"]
    for layer in {row["layer"] for row in experts}:
        rows = sorted((row for row in experts if row["layer"] == layer), key=lambda row: row["expert"] or 0)
        widths = [row["n_neurons"] for row in rows]
        starts = itertools.accumulate(widths[:-1], initial=0) if rows[0]["expert"] is not None else ()
        n_routed = sum(row["shared"] is False for row in rows)
        layouts[layer] = FfnLayout(sum(widths), tuple(starts), n_routed)
    return tuple(layouts)


def named_slot(layout: FfnLayout, slot: int) -> dict[str, int | None]:
    """Return the expert, None in a dense layer, and the neuron of a slot."""
    [expert], [neuron] = layout.experts([slot]), layout.neurons([slot])
    return {"expert": int(expert) if layout.starts else None, "neuron": int(neuron)}


def named_slots(layouts: Sequence[FfnLayout], layer: Any, slot: Any) -> dict[str, Any]:
    """Return the expert and the neuron of FFN slots, given by layer and slot in arrays or tensors of one shape.

    The expert is masked in dense layers, and None if no slot has one. A slot without a neuron, or of layer −1, is not
    changed.
    """
    layer, neuron = (np.array(x.cpu() if hasattr(x, "cpu") else x) for x in (layer, slot))
    expert = np.full(neuron.shape, -1)
    for i in np.unique(layer[layer >= 0]):
        here = layer == i
        expert[here], neuron[here] = layouts[i].experts(neuron[here]), layouts[i].neurons(neuron[here])
    return {"expert": np.ma.masked_less(expert, 0) if (expert >= 0).any() else None, "neuron": neuron}
