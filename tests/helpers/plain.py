"""Hidden states of one prompt at a time: no padding, no cache, hooks of this file's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from helpers.tiny_models import BLOCKS

# Where the FFN sits, written down here and not asked of the code that is tested.
FFN = {"opt": "fc1"}


def plain(model: Any, architecture: str, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Block outputs and FFN inputs (layer, site, hidden) of the last token, the prompt being run alone."""
    found: dict[tuple[int, int], torch.Tensor] = {}

    def keep(layer: int, site: int, value: Any) -> None:
        hidden = value[0] if isinstance(value, tuple) else value
        found[layer, site] = hidden.reshape(len(token_ids), -1)[-1].float()

    handles = []
    blocks = model.get_submodule(BLOCKS.get(architecture, "model.layers"))
    for layer, block in enumerate(blocks):
        ffn = block.get_submodule(FFN.get(architecture, "mlp"))
        handles += [
            block.register_forward_hook(lambda _m, _i, output, layer=layer: keep(layer, 0, output)),
            ffn.register_forward_pre_hook(lambda _m, inputs, layer=layer: keep(layer, 1, inputs)),
        ]
    with torch.no_grad():
        model(torch.tensor([token_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack([[found[layer, site].numpy() for site in (0, 1)] for layer in range(len(blocks))])


def assert_same(vectors: NDArray[np.float32], expected: NDArray[np.float32], rtol: float = 1e-5) -> None:
    """Every vector has the length and the direction it should have."""
    lengths = np.linalg.norm(expected, axis=-1)
    assert (np.linalg.norm(vectors - expected, axis=-1) / lengths).max() < rtol
    cosines = (vectors * expected).sum(axis=-1, dtype=np.float64) / lengths / np.linalg.norm(vectors, axis=-1)
    assert cosines.min() >= 0.99999
