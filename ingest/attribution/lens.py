"""The logit lens: what the model would say if it stopped after each part of a block (table ``lens_readouts``).

nostalgebraist 2020, "interpreting GPT: the logit lens": the final norm, with its scale computed anew, and the
unembedding are applied to the residual stream before and after every part of a block. The last readout is the model's
own output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdb.ingest.forward.activation_cache import ActivationCache
from kdb.ingest.forward.decomposition import Decomposition
from kdb.ingest.prompts import Prompt
from kdb.warehouse.schema import arrow_schema

if TYPE_CHECKING:
    import torch

TOKENS = 5
"""Number of tokens that each readout stores."""


def lens_rows(
    ids: NDArray[np.int32], decomposition: Decomposition, cache: ActivationCache, chunk: Sequence[Prompt]
) -> pa.Table:
    """Rows of ``lens_readouts`` at the last position of each prompt; ``ids`` (prompt) are their numbers."""
    import torch

    dtype = getattr(torch, decomposition.loaded.dtype)
    text = functools.cache(lambda token: decomposition.loaded.tokenizer.decode([token]))
    final = log_probabilities(cache.logits)
    rival = rivals(final, chunk)
    rows = []
    for layer, place, resid in _residuals(decomposition, cache):
        logits = decomposition.structure.readout(resid.to(dtype)).float()
        read = readouts(logits, final, chunk, rival, text)
        for number, last, row in zip(ids.tolist(), cache.last.tolist(), read, strict=True):
            rows.append({"prompt_id": number, "layer": layer, "place": place, "position": last, "lens": "logit"} | row)
    return pa.Table.from_pylist(rows, arrow_schema("lens_readouts"))


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (prompt, vocab) whose exponentials add up to 1 better than those of ``log_softmax``.

    In float32, these miss 1 by 1e-5 at usual logits, which a divergence of 100 nats makes 1e-3.
    """
    import torch

    log_p = logits.float().log_softmax(-1)
    return log_p - log_p.exp().sum(-1, keepdim=True, dtype=torch.float64).log().to(log_p)


def rivals(log_p: torch.Tensor, chunk: Sequence[Prompt]) -> list[int]:
    """The rival of each prompt, the other answer with the largest logit; −1 without one. ``log_p`` (prompt, vocab)."""
    found = []
    for row, prompt in zip(log_p, chunk, strict=True):
        others = list(prompt.rivals)
        found.append(others[int(row[others].argmax())] if others else -1)
    return found


def readouts(
    logits: torch.Tensor,
    final: torch.Tensor,
    chunk: Sequence[Prompt],
    rival: Sequence[int],
    text: Callable[[int], str],
) -> Iterator[dict[str, Any]]:
    """The columns of ``lens_readouts`` for one readout (prompt, vocab) of each prompt.

    ``final`` (prompt, vocab) are the log-probabilities of the model's own output.
    """
    import torch

    log_q = logits.log_softmax(-1)
    every = torch.arange(len(logits), device=logits.device)
    target = torch.tensor([prompt.target for prompt in chunk], device=logits.device)
    other = torch.tensor([max(token, 0) for token in rival], device=logits.device)
    best = log_q.topk(min(TOKENS, log_q.shape[1]), dim=1)
    columns = {
        "target_rank": 1 + (logits > logits[every, target, None]).sum(1),
        "target_logp": log_q[every, target].double(),
        "rival_rank": 1 + (logits > logits[every, other, None]).sum(1),
        "rival_logp": log_q[every, other].double(),
        "entropy": -(log_q.exp() * log_q).sum(1, dtype=torch.float64),
        "kl": (final.exp() * (final - log_q)).sum(1, dtype=torch.float64).clamp_min(0),
        "tokens": best.indices,
        "logps": best.values,
    }
    lists = {name: values.tolist() for name, values in columns.items()}
    for i, token in enumerate(rival):
        row = {name: values[i] for name, values in lists.items()}
        row["tokens"] = [text(one) for one in row["tokens"]]
        yield row if token >= 0 else row | {"rival_rank": None, "rival_logp": None}


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
