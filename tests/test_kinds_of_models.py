"""Hidden states of models beyond the usual ones: without attention, with eager attention alone, inside a wrapper.

Each is compared with what transformers reports for one prompt at a time. The models are real and tiny.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import HIDDEN, VOCAB, loaded, prompts
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from kdb.errors import ModelError
from kdb.ingest.forward.capture import Capture
from kdb.ingest.forward.checks import check_capture
from kdb.ingest.models.structure import find_structure

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 4
SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
NO_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

KINDS: dict[str, dict[str, Any]] = {
    # without attention, or with it in some blocks
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": HIDDEN, "intermediate_size": 48},
    "recurrent_gemma": HEADS | {"lru_width": HIDDEN, "block_types": ["recurrent", "attention"]},
    "lfm2": HEADS | {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48},
    "falcon_h1": HEADS | MAMBA | {"mamba_d_ssm": 64},
    "qwen3_next": HEADS | LINEAR | EXPERTS | {"head_dim": 8, "shared_expert_intermediate_size": 16},
    "minimax": HEADS | {"head_dim": 8, "block_size": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
    "nemotron_h": HEADS
    | {"layers_block_type": ["mamba", "moe", "attention", "mamba"], "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    # with eager attention alone
    "gptj": {"n_head": 4, "rotary_dim": 4, "n_inner": 48},
    "bloom": {"n_head": 4},
    "mpt": {"n_heads": 4, "expansion_ratio": 2},
    "openai-gpt": {"n_head": 4},
    "gpt_oss": HEADS | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    # with further modules between the last block and the logits, or none
    "modernbert-decoder": {"num_attention_heads": 4, "intermediate_size": 48},
    "minicpm3": HEADS
    | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    | {"v_head_dim": 8, "dim_model_base": 8},
    "roberta": {"num_attention_heads": 4, "intermediate_size": 48, "is_decoder": True},
    # with several residual streams
    "gemma3n_text": HEADS
    | {"head_dim": 8, "activation_sparsity_pattern": [0.0] * LAYERS, "intermediate_size": [48] * LAYERS}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "laurel_rank": 4}
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0},
}

WITHOUT_EMBEDDING = ("mamba", "mamba2", "rwkv")
"""Models whose reported states begin with the first block's output, not with the embedding."""

WITHOUT_FFN = {"mamba": [0, 1, 2, 3], "mamba2": [0, 1, 2, 3], "nemotron_h": [0, 2, 3], "gemma3n_text": [0, 1, 2, 3]}


def random_weights(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.3, generator=generator)
    return model.eval().requires_grad_(False)


@cache
def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        config = AutoConfig.for_model(kind, **SIZES | NO_TOKENS | KINDS[kind])
        return random_weights(AutoModelForCausalLM.from_config(config))


def reported(model: Any, kind: str, ids: Sequence[int]) -> NDArray[np.float32]:
    """The last token's state after each block but the last, as transformers reports it for a prompt alone."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    first = 0 if kind in WITHOUT_EMBEDDING else 1
    found = states[first : first + LAYERS - 1]
    # Gemma 3n has four streams, which stand first.
    return np.stack([(s[:, 0, -1] if s.ndim == 4 else s[0, -1]).flatten().numpy() for s in found])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [0, 6])
def test_states_are_those_that_transformers_reports_for_one_prompt(kind: str, prefix: int) -> None:
    model = tiny(kind)
    capture, ids = Capture(loaded(model)), prompts([3, 1, 20, 9, 3], prefix)
    vectors = capture.vectors(ids, ids[0][:prefix])[:, :, 0]
    expected = np.stack([reported(model, kind, row) for row in ids])
    off = np.linalg.norm(vectors[:, :-1] - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert off.max() < 1e-4
    # The last state is proved right by the logits that it gives.
    rows = check_capture(capture, ids, ids[0][:prefix], [5, 9])
    assert all(row["passed"] and row["value"] < 1e-4 for row in rows), rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_without_ffn_has_no_vector_of_its_input(kind: str) -> None:
    capture = Capture(loaded(tiny(kind)))
    missing = np.isnan(capture.vectors(prompts([3, 5]))).any(axis=(0, 3))
    assert missing[:, 1].nonzero()[0].tolist() == WITHOUT_FFN.get(kind, [])
    assert not missing[:, 0].any()
    assert capture.lacking == {(layer, "ffn_norm") for layer in WITHOUT_FFN.get(kind, [])}


def test_the_text_model_of_a_wrapper_is_not_taken_for_its_vision_tower() -> None:
    tower = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama"} | SIZES | HEADS,
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14} | tower,
    )
    with torch.no_grad():
        model = random_weights(AutoModelForImageTextToText.from_config(config))
    structure = find_structure(model)
    assert structure.blocks == tuple(model.model.language_model.layers)
    assert structure.final_norm is model.model.language_model.norm
    ids = prompts([3, 1, 20], prefix=6)
    assert all(row["passed"] for row in check_capture(Capture(loaded(model)), ids, ids[0][:6]))


def test_a_cache_that_holds_a_state_is_not_shared() -> None:
    assert not any(Capture(loaded(tiny(kind))).caches_prefixes for kind in ("mamba", "lfm2", "qwen3_next", "minimax"))
    assert all(Capture(loaded(tiny(kind))).caches_prefixes for kind in ("gptj", "gpt_oss", "minicpm3"))


def test_a_router_that_gives_nan_is_one_message() -> None:
    config = AutoConfig.for_model("mixtral", num_local_experts=4, num_experts_per_tok=2, **SIZES, **HEADS)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.model.layers[1].mlp.gate.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="values that are not finite numbers"):
        check_capture(Capture(loaded(model)), prompts([3, 9]))
