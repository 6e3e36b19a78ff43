"""Where the FFN neurons of a layer stand: which of its slots belong to which expert.

A layer's FFN is a sum of columns, one for each slot. In a dense FFN, a slot is a neuron. In a mixture of experts, the
slots of expert 0 come first, then those of expert 1, and so on; shared experts follow the routed ones. Every layer of a
model has as many slots as its widest layer: those that it does not need have no neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        return np.asarray(slots) - first

    def slot(self, expert: int | None, neuron: int) -> int:
        """Return the slot of an expert's neuron; ``expert`` is None in a dense FFN."""
        return neuron if expert is None else self.starts[expert] + neuron
