"""Batch and shard sizes: from the free memory on a GPU; constants on a CPU, where its caches matter more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdb.ingest.models.parts import setting
from kdb.ingest.models.structure import ffn_width, largest

if TYPE_CHECKING:
    from kdb.ingest.models.find import LoadedModel

CPU_TOKENS = 1536
"""Tokens of a batch on a CPU, with padding: larger batches do not fit into its caches, and are slower."""

GPU_TOKENS = 65536
"""Largest number of tokens of a batch on a GPU; more tokens would not use it better."""

SHARD_FLOPS = {"cpu": 3e12, "cuda": 1e16}
"""Operations of one shard: about a minute of work, the most that is lost by an interruption.

A constant per kind of device, not its measured speed: another division into batches changes the last digits.
"""

CHUNK_BYTES = 512 * 2**20
"""Bytes of memory, on a CPU, for the activation cache of one chunk of prompts and for its scores."""

SHARE = 0.4
"""Share of a GPU's free memory for one batch, activation cache or block of distributions; the one before it may not
be freed yet."""


def tokens_at_once(loaded: LoadedModel) -> int:
    """Number of tokens of a batch in a forward pass, with padding."""
    if loaded.device.type != "cuda":
        return CPU_TOKENS
    size = next(loaded.model.parameters()).element_size()
    return fitting_tokens(room(loaded.device, 0), token_bytes(loaded.model.config, size))


def most_per_shard(device: str, flops: float) -> int:
    """Number of prompts, tokens or neurons that take about a minute on this device, at ``flops`` each. At least 1."""
    return max(1, int(SHARD_FLOPS["cuda" if device.startswith("cuda") else "cpu"] // max(1.0, flops)))


def fitting_tokens(free: int, each: int) -> int:
    """Number of tokens that fit into ``free`` bytes, at ``each`` bytes; at least 256, so that a prompt is tried."""
    return max(256, min(GPU_TOKENS, free // each))


def room(device: Any, otherwise: int) -> int:
    """Bytes that may be used at once on this device; ``otherwise`` if it is not a GPU."""
    import torch

    return int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else otherwise


def token_bytes(config: Any, size: int) -> int:
    """Bytes of a token in a forward pass: its keys and values in every layer, and the states of one block.

    ``size`` is the bytes of one number. Copies of a shared prefix are not counted; ``SHARE`` leaves room for them.
    """
    text = config.get_text_config(decoder=True)
    heads = largest(setting(text, "num_attention_heads")) or 1
    head_dim = largest(setting(text, "head_dim")) or text.hidden_size // heads
    kv_heads = largest(setting(text, "num_key_value_heads")) or heads
    kept = 2 * text.num_hidden_layers * kv_heads * head_dim
    return int(size * (kept + 3 * ffn_width(text) + 6 * text.hidden_size + 4 * heads * head_dim))
