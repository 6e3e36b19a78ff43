"""Tiny random models of any architecture that transformers lists, each as a folder that ``--model`` accepts.

The sizes come from one rule: start from the type's default config, and make every size-like setting small. A type whose
settings are tied to each other in its own way has a line in ``OVERRIDES``; a type that cannot be built has one in
``CANNOT_BE_BUILT``, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, HEADS, EXPERTS = 4, 32, 4, 4
PLACEHOLDERS = 24
"""Tokens that stand for images, sounds and the like, which no text contains."""

CANNOT_BE_BUILT = {
    "gemma3n": "its vision tower is a timm model, which transformers builds only with timm and Pillow",
    "gemma4_assistant": "a drafter: it reads the states of another model, and cannot run alone",
    "gemma4_unified_assistant": "a drafter: it reads the states of another model, and cannot run alone",
    "musicgen": "its decoder is listed under the config of the whole, from which transformers does not build it",
    "musicgen_melody": "its decoder is listed under the config of the whole, from which transformers does not build it",
}
"""Types that are skipped, with the reason."""

_MIXED = ["linear_attention", "full_attention"] * 2
_SPARSE_ATTENTION = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": LAYERS},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {"text_config": {"head_dim": 20}, "audio_config": {"adapter_input_size": HIDDEN}},
    "dots3_note_text": {"head_dim": 20},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "granitemoehybrid": {"layer_types": _MIXED},
    "granitemoeshared": {"shared_intermediate_size": 16},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16},
    "qwen4_exp": {"text_config": _SPARSE_ATTENTION},
    "qwen4_exp_text": _SPARSE_ATTENTION,
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
}
"""Settings of a type beyond the general rule; those of a part of its config are in a dictionary under its name."""

_SIZES: Sequence[tuple[str, int]] = (
    (r".*(moe|expert|shared)_.*(intermediate|ffn_hidden)_size(_mlp)?|expert_ffn_hidden_size|moe_ffn.*", 16),
    (r".*(intermediate|ffn_hidden|feed_forward)_size.*|(.*_)?ffn_dim|d_ff|dff|dim_ff|d_inner|mlp_dim|n_inner", 64),
    (
        r"(.*_)?hidden_size(_global)?|d_model|n_embd|emb_dim|embed_dim|(.*_)?embedding_(size|dim)|dim_model|"
        r"word_embed_proj_dim|lru_width|attention_hidden_size|.*_output_dim|out_hidden_size|.*_input_dim|adapter_.*_dim",
        HIDDEN,
    ),
    (r"((num|n)_)?(.*_)?(kv|key_value|query)_?(heads?|groups?|n_heads)|num_query_groups|linear_num_key_heads", 2),
    (r".*attention_heads|(.*_)?n_heads?|(.*_)?num_(.*_)?heads|n_mamba_heads", HEADS),
    (r"mamba_(d_head|headdim)|qk_head_dim", 16),
    (r".*(head_dim|dim_head|d_head|headdim|head_size|kv_channels|d_kv|rotary_dim|head_dim_.*|d_rel)", 8),
    (r".*(lora_rank|_rank|lowrank)|hidden_size_per_layer_input", 8),
    (r".*(num|n)_(local_|routed_)?experts|zero_expert_num|num_codebooks", EXPERTS),
    (r".*experts?_per_tok(en)?|moe_k|moe_top_?k|top_?k_experts", 2),
    (r".*(num|n)_shared_experts", 1),
    (r"n_group|num_expert_group|n_groups|mamba_n_?groups", 2),
    (r"topk_group", 1),
    (r".*max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|.*rel_extent", 256),
    (
        r".*sliding_window(_size)?|attention_window_size|window_size|local_attention.*|(attention|mamba)?_?chunk_size",
        16,
    ),
    (r"keep_window_size|index_topk|floor_scale", 256),
    (r"(ssm_|mamba_d_)?state(_size)?|time_step_rank|mamba_dt_rank", 8),
    (r"image_size|crop_size", 28),
    (r".*patch_size", 14),
    (r"num_nextn_predict_layers|mtp_.*_layers|num_kv_shared_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (
        r".*period|.*interval|.*_sliding_window_pattern|sliding_window_pattern|layer_group_size|full_attention_interval",
        2,
    ),
    (r".*_offset", 1),
    (r".*layers|n_layer|num_blocks|depth|.*layers_per_stack|max_window_layers", LAYERS),
)
"""Names of settings and their small values; the first that matches the whole name counts."""

_PLACES = re.compile(r".*(layers|layer_ids|ind[ei]c?x?(es|ices)|idxs)")
"""Names of settings that list layers by number."""


def letters() -> list[str]:
    """Return the vocabulary: two special tokens, placeholders, and the 256 bytes."""
    from tokenizers import pre_tokenizers

    places = [f"<place{i}>" for i in range(PLACEHOLDERS)]
    return ["<s>", "</s>", *places, *sorted(pre_tokenizers.ByteLevel.alphabet())]


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of bytes, which adds no special token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.add_special_tokens({"additional_special_tokens": letters()[2 : 2 + PLACEHOLDERS]})
    made.save_pretrained(folder)


# Configs ---------------------------------------------------------------------------------------------------------


def tiny_config(kind: str) -> Any:
    """Return the config of a tiny model of this type."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    settings = merged(_shrunk(made().to_dict()), OVERRIDES.get(kind, {}))
    return made(**{name: value for name, value in settings.items() if name not in ("model_type", "architectures")})


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the changes, those of nested settings too."""
    nested = {name: merged(settings.get(name) or {}, x) for name, x in changes.items() if isinstance(x, Mapping)}
    return {**settings, **changes, **nested}


def _shrunk(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make the settings of a config, or of a part of it, small."""
    places, n = _chosen_layers(settings), _n_layers(settings)
    tokens = [name for name in settings if re.fullmatch(r".*(token_id|token_index)", name)]
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found[name] = _shrunk(value) if all(isinstance(key, str) for key in value) else value
        elif isinstance(value, list):
            found[name] = _short(name, value, places if len(value) == n else ())
        else:
            found[name] = _token(name, value, tokens.index(name)) if name in tokens else _small(name, value)
    return found | _tied(settings, found, places)


def _tied(settings: Mapping[str, Any], small: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Settings that others determine."""
    found: dict[str, Any] = {}
    if settings.get("head_dim", 0) is None:
        found["head_dim"] = HIDDEN // HEADS
    if settings.get("num_key_value_heads", 0) is None:
        found["num_key_value_heads"] = HEADS // 2
    if settings.get("kv_lora_rank"):  # latent attention has no groups
        found["num_key_value_heads"] = HEADS
    if settings.get("per_layer_config"):
        found["per_layer_config"] = _layer_settings(settings, {**small, **found}, places)
    return found


def _layer_settings(settings: Mapping[str, Any], small: Mapping[str, Any], places: Sequence[int]) -> dict[int, Any]:
    """Settings of single layers, in the proportion that they have to those of the model."""
    given = {int(layer): changes for layer, changes in settings["per_layer_config"].items()}
    return {
        i: {name: small[name] * value // settings[name] for name, value in given[layer].items()}
        for i, layer in enumerate(places)
        if layer in given
    }


def _token(name: str, value: Any, used: int) -> Any:
    usual = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return usual.get(name, None if value is None else 2 + used % PLACEHOLDERS)


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if re.fullmatch(r".*vocab(_size.*)?|num_embeddings", name):
        return len(letters())
    return min(value, next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), value))


def _n_layers(settings: Mapping[str, Any]) -> int:
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")
    return next((settings[name] for name in names if isinstance(settings.get(name), int)), 0)


def _chosen_layers(settings: Mapping[str, Any]) -> list[int]:
    """Choose layers of the default config such that each kind of layer is among them, in their order."""
    n = _n_layers(settings)
    lists = [x for x in settings.values() if isinstance(x, list) and len(x) == n]
    own = {int(layer): changes for layer, changes in (settings.get("per_layer_config") or {}).items()}
    kinds = [repr([[x[i] for x in lists], own.get(i)]) for i in range(n)]
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:LAYERS]
    rest = [i for i in range(n) if i not in first]
    return sorted([*first, *rest[: LAYERS - len(first)]])


def _short(name: str, value: list[Any], places: Sequence[int]) -> list[Any]:
    if _PLACES.fullmatch(name) and all(isinstance(x, int) for x in value):
        return [x for x in value if x < LAYERS] or ([1] if value else [])
    if places:
        return [_small(name, value[i]) for i in places]
    if name == "mrope_section":
        return [2, 1, 1]
    return value


# Models ----------------------------------------------------------------------------------------------------------


def tiny_model(kind: str, seed: int = 0) -> Any:
    """Build a model of random weights: large enough that attention, biases and experts matter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    torch.manual_seed(seed)
    config = tiny_config(kind)
    listed = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model = (AutoModelForCausalLM if listed else AutoModelForImageTextToText).from_config(config)
    for weight in model.eval().requires_grad_(False).parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.2)
        else:  # a norm's scale or a bias stays near what it is
            weight.nan_to_num_(0, 0, 0).add_(torch.randn_like(weight), alpha=0.1)
    return model


def is_encoder_decoder(kind: str) -> bool:
    """Whether models of this type have an encoder."""
    from transformers import CONFIG_MAPPING

    return bool(getattr(CONFIG_MAPPING[kind](), "is_encoder_decoder", False))


def save_model(kind: str, folder: Path) -> Any:
    """Save a tiny model with a tokenizer as a user has it; return the model."""
    model = tiny_model(kind)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    if is_encoder_decoder(kind):  # the decoder alone says that it is none
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"is_encoder_decoder": True}))
    return model
