"""Sizes of a model, read from its modules: what a config calls them, and whether it says them, does not matter.

    shape_of(model)["n_heads"]

The modules need no weights: ``load.skeleton`` builds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kdb.ingest.models.parts import attention_of, experts_of, ffn_of, mixer_of, setting, text_blocks

if TYPE_CHECKING:
    from torch import nn

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
_KEY_SIZE = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "dim_head")
_VALUE_SIZE = ("v_head_dim",)
TOP_K = (
    *("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "topk"),
    *("num_selected_experts", "top_k_experts"),
)
N_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", "num_routed_experts")
_STREAMS = ("hc_mult", "altup_num_inputs")

_OUT = re.compile(r"(^|\.)(o_proj|out_proj|out_lin|dense|c_proj|wo|o|out|linear_out|resid_proj)$")
_KEYS = re.compile(r"(^|\.)(k_proj|key|k_lin|wk|k)$")
_FUSED = re.compile(r"(qkv|c_attn$|query_key_value)", re.IGNORECASE)
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
_DOWN = re.compile(r"(down|w2|output|fc2|out)", re.IGNORECASE)


def shape_of(model: Any) -> dict[str, Any]:
    """Return the columns of ``models`` about sizes; where layers differ, the largest. What a model lacks is None."""
    text, blocks = model.config.get_text_config(decoder=True), text_blocks(model)
    hidden = int(text.hidden_size) * first_number(text, _STREAMS, 1)
    unembed = model.get_output_embeddings()
    experts = [experts for block in blocks if (experts := experts_of(block)) is not None]
    return {
        "architecture_kind": _kind(blocks, bool(experts)),
        "n_layers": len(blocks),
        **_largest(_attention_sizes(attention, text) for block in blocks if (attention := attention_of(block))),
        "hidden_size": hidden,
        "intermediate_size": _ffn_width(blocks, experts, int(text.hidden_size)),
        "n_experts": max(map(_n_experts, experts), default=None),
        "experts_per_token": _experts_per_token(blocks, text) if experts else None,
        "vocab_size": int(unembed.weight.shape[0]) if unembed is not None else int(text.vocab_size),
        "n_params": int(model.num_parameters()),
    }


def _kind(blocks: Sequence[nn.Module], has_experts: bool) -> str:
    mixers = any(mixer_of(block) is not None for block in blocks)
    if mixers:
        return "hybrid" if any(attention_of(block) is not None for block in blocks) else "state-space"
    return "experts" if has_experts else "dense"


def _largest(rows: Iterable[dict[str, int | None]]) -> dict[str, int | None]:
    """Return the largest value of each size over the layers."""
    several, names = list(rows), ("n_heads", "n_kv_heads", "head_dim", "value_head_dim")
    return {name: max((row[name] or 0 for row in several), default=0) or None for name in names}


# Attention -------------------------------------------------------------------------------------------------------


def _attention_sizes(attention: nn.Module, text: Any) -> dict[str, int | None]:
    maps = _maps(attention)
    n_heads = _first_inside(attention, _HEADS) or first_number(text, _HEADS, 0)
    read = next((width for name, (width, _out) in reversed(maps.items()) if _OUT.search(name)), None)
    size = _first_inside(attention, _VALUE_SIZE) or (read // n_heads if read and n_heads else None)
    key_size = _first_inside(attention, _KEY_SIZE) or size
    return {
        "n_heads": n_heads or None,
        "n_kv_heads": _kv_heads(maps, n_heads, key_size, size) or n_heads or None,
        "head_dim": key_size,
        "value_head_dim": size or key_size,
    }


def _kv_heads(maps: dict[str, tuple[int, int]], n_heads: int, key_size: int | None, size: int | None) -> int | None:
    """Number of key heads, by the rows of the projection that makes keys; a fused one makes queries and values, too."""
    keys = next((out for name, (_read, out) in maps.items() if _KEYS.search(name)), None)
    if keys and key_size:
        return keys // key_size
    fused = next((out for name, (_read, out) in maps.items() if _FUSED.search(name)), None)
    if fused and key_size and size:
        return (fused - n_heads * key_size) // (key_size + size)
    return None


# FFN -------------------------------------------------------------------------------------------------------------


def _ffn_width(blocks: Sequence[nn.Module], experts: Sequence[nn.Module], hidden: int) -> int | None:
    """Neurons of one expert, if there are experts, otherwise of an FFN; None without either."""
    if experts:
        return max(_expert_width(one, hidden) for one in experts) or None
    ffns = [ffn for block in blocks if (ffn := ffn_of(block)) is not None]
    return max((_dense_width(ffn, hidden) for ffn in ffns), default=0) or None


def _dense_width(ffn: nn.Module, hidden: int) -> int:
    maps = {name: sizes for name, sizes in _maps(ffn).items() if not _ROUTER.search(name)}
    down = [read for name, (read, out) in maps.items() if out == hidden and _DOWN.search(name)]
    back = [read for read, out in maps.values() if out == hidden]
    up = [out for read, out in maps.values() if read == hidden]
    return max(down or back or up, default=0)


def _n_experts(experts: nn.Module) -> int:
    from torch import nn

    if isinstance(experts, nn.ModuleList):
        return len(experts)
    stacked = [weight.shape[0] for weight in experts.parameters() if weight.ndim == 3]
    return int(max(stacked, default=0)) or _first_inside(experts, N_EXPERTS)


def _expert_width(experts: nn.Module, hidden: int) -> int:
    from torch import nn

    if isinstance(experts, nn.ModuleList):
        return max(_dense_width(expert, hidden) for expert in experts)
    stacked = {name: weight.shape[1:] for name, weight in experts.named_parameters() if weight.ndim == 3}
    down = [shape for name, shape in stacked.items() if _DOWN.search(name) and hidden in shape]
    # A square matrix has as many neurons as entries.
    return max((next((n for n in shape if n != hidden), hidden) for shape in down), default=0) or _first_inside(
        experts, ("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "expert_dim", "intermediate_dim")
    )


def _experts_per_token(blocks: Sequence[nn.Module], text: Any) -> int | None:
    return max((_first_inside(block, TOP_K) for block in blocks), default=0) or first_number(text, TOP_K, 0) or None


# Modules ---------------------------------------------------------------------------------------------------------


def _maps(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the numbers (read, written) of entries of the linear maps in a module, in order, by name."""
    return {name: sizes for name, part in module.named_modules() if (sizes := _map_size(part)) is not None}


def _map_size(module: nn.Module) -> tuple[int, int] | None:
    weight = getattr(module, "weight", None)
    if getattr(weight, "ndim", 0) != 2 or hasattr(module, "num_embeddings"):
        return None
    assert weight is not None
    # GPT-2's Conv1D keeps its matrix the other way round.
    first, second = (int(n) for n in weight.shape)
    return (first, second) if type(module).__name__ == "Conv1D" else (second, first)


def first_number(holder: Any, names: Sequence[str], otherwise: int) -> int:
    """Return the first whole number among the attributes of a module or config."""
    return next(_numbers(holder, names), otherwise)


def _numbers(holder: Any, names: Sequence[str]) -> Iterator[int]:
    for name in names:
        value = setting(holder, name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield value


def _first_inside(module: nn.Module, names: Sequence[str]) -> int:
    """Return the first whole number among the attributes of a module and its parts; 0 without one."""
    return next((value for part in module.modules() for value in _numbers(part, names)), 0)
