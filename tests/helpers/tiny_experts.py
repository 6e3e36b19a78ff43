"""Tiny random mixtures of experts, one for each way to route."""

from __future__ import annotations

from functools import cache
from typing import Any

from helpers.tiny_models import loaded, tiny_model
from kdb.ingest.forward.decomposition import Decomposition, decompose

SIZES = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 16}
TOP_TWO = {"num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
GROUPS = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"norm_topk_prob": False, "mlp_only_layers": [0]},
    "olmoe": {},
    "gpt_oss": {},
    "granitemoe": {"residual_multiplier": 0.5},
    "phimoe": {},
    "deepseek_v3": LATENT | GROUPS | {"head_dim": 4, "v_head_dim": 8, "routed_scaling_factor": 1.5},
    "glm4_moe": GROUPS,
    "dots1": GROUPS,
    "qwen2_moe": {"shared_expert_intermediate_size": 8, "decoder_sparse_step": 1},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "granitemoeshared": {"shared_intermediate_size": 8},
    "cohere2_moe": {"num_shared_experts": 1, "shared_expert_combination_strategy": "average"},
    "llama4_text": {"num_experts_per_tok": 2, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0}
    | {"vocab_size_per_layer_input": 64, "num_global_key_value_heads": 2, "global_head_dim": 8},
}
"""Beyond the common sizes: softmax before or after the choice, sigmoid with a bias and groups, shared experts with and
without a gate, dense layers before, weights on the inputs, a norm behind each part."""


def mixture(architecture: str, std: float = 0.3, **changes: Any) -> Any:
    """A model with experts. The bias that only chooses experts, which is no parameter, is random too."""
    import torch

    model = tiny_model(architecture, std, **SIZES | TOP_TWO | MIXTURES[architecture] | changes)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if "correction" in name:
            buffer.normal_(0, 0.1, generator=generator)
    return model


@cache
def decomposed(architecture: str, dtype: str = "float32") -> Decomposition:
    """The decomposition of a mixture."""
    return decompose(loaded(mixture(architecture), dtype))
