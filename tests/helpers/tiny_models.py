"""Tiny random models of every architecture that the design names, for the tests of what reads a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdb.ingest.models.find import LoadedModel, ModelSource

VOCAB, LAYERS, HIDDEN, WINDOW = 64, 3, 32, 5

GROUPED = {"num_key_value_heads": 2}
SLIDING = {"sliding_window": WINDOW}
NARROW = {"head_dim": 4}  # heads that do not add up to the hidden size

# What each architecture is set to beyond the common sizes: whatever could trip a capture is switched on.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | SLIDING,
    "qwen2": GROUPED,
    "qwen3": GROUPED | NARROW,
    "gemma": GROUPED | NARROW,
    "gemma2": GROUPED | NARROW | SLIDING | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0},
    "gemma3_text": GROUPED | NARROW | SLIDING | {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "gpt2": {},
    "gpt_neox": {"use_parallel_residual": True},
    "phi": GROUPED,
    "phi3": GROUPED | SLIDING,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
    "starcoder2": GROUPED | SLIDING,
    "cohere": GROUPED | {"logit_scale": 0.25},
    "glm4": GROUPED | NARROW,
    "granite": GROUPED | {"logits_scaling": 8.0, "residual_multiplier": 0.22},
    "stablelm": GROUPED,
}

# Where blocks sit, written down here and not asked of the code that is tested; elsewhere they are model.layers.
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


def tiny_config(architecture: str, **changes: Any) -> Any:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if architecture != "gpt2":  # it has no such setting: its FFN is four times as wide as the model
        sizes["intermediate_size"] = 48
    return AutoConfig.for_model(architecture, **sizes | ARCHITECTURES.get(architecture, {}) | changes)


def tiny_model(architecture: str, std: float = 0.3, **changes: Any) -> Any:
    """A model whose attention and biases matter: the usual initial weights leave both next to nothing."""
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.normal_(0 if weight.ndim > 1 else 1, std, generator=generator)
    return model


def loaded(model: Any, dtype: str = "float32") -> LoadedModel:
    source = ModelSource("tiny", None, "tiny", "0", Path())
    model = model.to(getattr(torch, dtype))
    return LoadedModel(source, model, None, dtype, torch.device("cpu"), None)


def prompts(lengths: Sequence[int], prefix: int = 0) -> list[list[int]]:
    """Random prompts that begin with the same ``prefix`` tokens, which ``lengths`` do not count."""
    rng = np.random.default_rng(0)
    first = rng.integers(VOCAB, size=prefix).tolist()
    return [first + rng.integers(VOCAB, size=length).tolist() for length in lengths]
