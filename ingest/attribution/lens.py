"""The logit lens: what the model would say if it stopped after each part of a block (table ``lens_readouts``).

nostalgebraist 2020, "interpreting GPT: the logit lens": the final norm, with its scale computed anew, and the
unembedding are applied to the residual stream before and after every part of a block. The last readout is the model's
own output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdb.ingest.forward.activation_cache import ActivationCache
from kdb.ingest.forward.decomposition import Decomposition
from kdb.ingest.forward.readouts import Place, log_probabilities, positions_at_once, read, readouts, texts_of
from kdb.ingest.prompts import Prompt
from kdb.warehouse.schema import arrow_schema

if TYPE_CHECKING:
    import torch


def lens_rows(
    ids: NDArray[np.int32], decomposition: Decomposition, cache: ActivationCache, chunk: Sequence[Prompt]
) -> pa.Table:
    """Rows of ``lens_readouts`` at the last position of each prompt; ``ids`` (prompt) are their numbers."""
    import torch

    text = texts_of(decomposition.loaded.tokenizer)
    final = log_probabilities(cache.logits)
    target, rival = [prompt.target for prompt in chunk], rivals(final, chunk)
    read_at = [
        {"prompt_id": number, "position": last, "token": text(prompt.token_ids[last])}
        for number, last, prompt in zip(ids.tolist(), cache.last.tolist(), chunk, strict=True)
    ]
    places, residuals = zip(*_residuals(decomposition, cache), strict=True)
    states, rows = torch.stack(residuals).flatten(0, 1), []
    # Residuals of many places are read together: the unembedding is read from memory once for all of them.
    for some in torch.arange(len(states), device=states.device).split(positions_at_once(decomposition.loaded)):
        prompts = some % len(chunk)
        logits = read(decomposition.loaded, decomposition.structure, states[some])
        own = prompts.tolist()
        found = readouts(logits, final[prompts], [target[i] for i in own], [rival[i] for i in own], text)
        for number, row in zip(some.tolist(), found, strict=True):
            (layer, place), at = places[number // len(chunk)], read_at[number % len(chunk)]
            rows.append(at | {"layer": layer, "place": place, "lens": "logit"} | row)
    return pa.Table.from_pylist(rows, arrow_schema("lens_readouts"))


def rivals(log_p: torch.Tensor, chunk: Sequence[Prompt]) -> list[int]:
    """The rival of each prompt, the other answer with the largest logit; −1 without one. ``log_p`` (prompt, vocab)."""
    found = []
    for row, prompt in zip(log_p, chunk, strict=True):
        others = list(prompt.rivals)
        found.append(others[int(row[others].argmax())] if others else -1)
    return found


def _residuals(decomposition: Decomposition, cache: ActivationCache) -> Iterator[tuple[Place, torch.Tensor]]:
    """Place and residual (prompt, hidden) of every readout, in the order of the model."""
    import torch

    rows = torch.arange(len(cache.last), device=cache.last.device)
    last = len(decomposition.blocks) - 1
    for layer, block in enumerate(decomposition.blocks):
        before = cache.resid_pre[layer, rows, cache.last]
        if layer == 0:
            yield (layer, "resid_pre"), before
        if block.middle:  # attention and FFN of a parallel block add to the same residual: there is no middle
            yield (layer, "resid_mid"), before + sum(cache.added(c)[layer, rows, cache.last] for c in block.middle)
        after = cache.resid_post if layer == last else cache.resid_pre[layer + 1, rows, cache.last]
        yield (layer, "resid_post"), after
