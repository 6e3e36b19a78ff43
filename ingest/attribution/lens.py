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
from kdb.ingest.forward.readouts import log_probabilities, read, readouts, texts_of
from kdb.ingest.prompts import Prompt
from kdb.warehouse.schema import arrow_schema

if TYPE_CHECKING:
    import torch


def lens_rows(
    ids: NDArray[np.int32], decomposition: Decomposition, cache: ActivationCache, chunk: Sequence[Prompt]
) -> pa.Table:
    """Rows of ``lens_readouts`` at the last position of each prompt; ``ids`` (prompt) are their numbers."""
    text = texts_of(decomposition.loaded.tokenizer)
    final = log_probabilities(cache.logits)
    target, rival = [prompt.target for prompt in chunk], rivals(final, chunk)
    read_at = [
        {"prompt_id": number, "position": last, "token": text(prompt.token_ids[last])}
        for number, last, prompt in zip(ids.tolist(), cache.last.tolist(), chunk, strict=True)
    ]
    rows = []
    for layer, place, resid in _residuals(decomposition, cache):
        logits = read(decomposition.loaded, decomposition.structure, resid)
        found = readouts(logits, final, target, rival, text)
        of_place = {"layer": layer, "place": place, "lens": "logit"}
        rows += [at | of_place | row for at, row in zip(read_at, found, strict=True)]
    return pa.Table.from_pylist(rows, arrow_schema("lens_readouts"))


def rivals(log_p: torch.Tensor, chunk: Sequence[Prompt]) -> list[int]:
    """The rival of each prompt, the other answer with the largest logit; −1 without one. ``log_p`` (prompt, vocab)."""
    found = []
    for row, prompt in zip(log_p, chunk, strict=True):
        others = list(prompt.rivals)
        found.append(others[int(row[others].argmax())] if others else -1)
    return found


def _residuals(decomposition: Decomposition, cache: ActivationCache) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Layer, place and residual (prompt, hidden) of every readout, in the order of the model."""
    import torch

    rows = torch.arange(len(cache.last), device=cache.last.device)
    last = len(decomposition.blocks) - 1
    for layer, block in enumerate(decomposition.blocks):
        before = cache.resid_pre[layer, rows, cache.last]
        if layer == 0:
            yield layer, "resid_pre", before
        if not block.parallel:  # attention and FFN of a parallel block add to the same residual: there is no middle
            yield layer, "resid_mid", before + cache.attn[layer, rows, cache.last]
        after = cache.resid_post if layer == last else cache.resid_pre[layer + 1, rows, cache.last]
        yield layer, "resid_post", after
