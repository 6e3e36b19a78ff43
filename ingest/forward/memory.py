"""How much is computed at once: on a GPU by what it has free, on a CPU by constants, since its caches matter more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdb.ingest.models.find import LoadedModel

CPU_TOKENS = 1536
"""Tokens of a batch on a CPU, padding included: more would leave the cache, and cost speed and memory."""

GPU_TOKENS = 65536
"""On a GPU, at most: more would make it no busier."""

SHARD_FLOPS = {"cpu": 3e12, "cuda": 1e16}
"""Operations of one shard: about a minute, which is what an interruption costs.

A constant of the kind of device and not of its speed: how prompts fall into batches shows in the last digits.
"""

CHUNK_BYTES = 512 * 2**20
"""Memory for the activation cache of one chunk of prompts, and for what is worked out from it, on a CPU."""

SHARE = 0.4
"""Of a GPU's free memory, for one batch, recording or block of distributions: another may be on its way out."""


def tokens_at_once(loaded: LoadedModel) -> int:
    """Tokens of a batch in a forward pass, padding included."""
    if loaded.device.type != "cuda":
        return CPU_TOKENS
    size = next(loaded.model.parameters()).element_size()
    return fitting_tokens(room(loaded.device, 0), token_bytes(loaded.model.config, size))


def most_per_shard(device: str, flops: float) -> int:
    """How many prompts, tokens or neurons take about a minute on this device; ``flops`` for each. At least 1."""
    return max(1, int(SHARD_FLOPS["cuda" if device.startswith("cuda") else "cpu"] // max(1.0, flops)))


def fitting_tokens(free: int, each: int) -> int:
    """Tokens that ``free`` bytes hold, at ``each`` bytes; at least 256, so that a prompt is tried at all."""
    return max(256, min(GPU_TOKENS, free // each))


def room(device: Any, otherwise: int) -> int:
    """Bytes that may be used at once on this device; ``otherwise`` where it is no GPU."""
    import torch

    return int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else otherwise


def token_bytes(config: Any, size: int) -> int:
    """Bytes that a token takes in a forward pass: its keys and values in every layer, and one block's own states.

    ``size`` is that of a number. Of a prefix that prompts share, each has a copy, which ``SHARE`` leaves room for.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return int(size * (kept + 3 * wide + 6 * text.hidden_size + 4 * heads * head_dim))
