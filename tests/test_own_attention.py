"""Attention that transformers' interface does not reach, gates and sinks, shared values, and layers with a mixer."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import HIDDEN, LAYERS, VOCAB, loaded, prompts
from transformers import AutoConfig, AutoModelForCausalLM

from kdb.errors import ModelError
from kdb.ingest.attribution.patch import ESTIMATED, Patched, Patching, _possible
from kdb.ingest.attribution.score_rows import head_rows, layer_rows, query_layer_rows
from kdb.ingest.attribution.scores import Attribution
from kdb.ingest.forward.activation_cache import ActivationCache, check_decomposition, head_vectors, run_with_cache
from kdb.ingest.forward.decomposition import Decomposition, decompose

IDS = prompts((9, 5, 7))

SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SIZES | {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
GPTJ = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "n_inner": 48}

OWN: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4},
    "codegen": GPTJ,
    "falcon": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "alibi": True},
    "gpt_neo": {"hidden_size": HIDDEN, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": GPTJ,
    "mpt": {"d_model": HIDDEN, "n_heads": 4, "n_layers": LAYERS, "expansion_ratio": 2, "max_seq_len": 64},
}
"""Families whose modules compute attention themselves, and return its weights."""

STATES = {"state_size": 8, "expand": 2, "num_hidden_layers": LAYERS, "hidden_size": HIDDEN}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
MIXED: dict[str, dict[str, Any]] = {
    "mamba": STATES,
    "falcon_h1": LLAMA | MAMBA2 | {"mamba_d_ssm": 64, "attention_out_multiplier": 0.5, "ssm_out_multiplier": 2.0},
    "lfm2": LLAMA
    | {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
}
"""Families with a mixer: alone in each block, beside attention, and instead of it."""

SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_oss": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * LAYERS},
    "qwen3_5_text": LLAMA
    | {"layer_types": ["linear_attention", "full_attention", "full_attention"], "linear_num_key_heads": 2}
    | {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "gemma4_text": LLAMA
    | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    | {"global_head_dim": 16, "num_kv_shared_layers": 2}
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
}
"""Attention with sinks, with gates, and with head sizes by layer and shared values."""

every_own = pytest.mark.parametrize("family", OWN)
every_mixed = pytest.mark.parametrize("family", MIXED)


def model_of(family: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(family, **SIZES | (OWN | MIXED | SPECIAL)[family] | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1 or weight.numel() == HIDDEN:
            weight.normal_(0 if weight.ndim > 1 else 1, 0.3, generator=generator)
    return model


@cache
def decomposition_of(family: str) -> Decomposition:
    return decompose(loaded(model_of(family)))


@cache
def recording_of(family: str) -> ActivationCache:
    with torch.inference_mode():
        return run_with_cache(decomposition_of(family), IDS)


def attribution_of(family: str) -> Attribution:
    r = recording_of(family)
    return Attribution(decomposition_of(family), r, r.logits.argmax(1))


def heads_read(family: str, layer: int, ids: list[int]) -> torch.Tensor:
    """What the linear map after the heads reads at the last token, by a hook on the untouched model."""
    decomposition, found = decomposition_of(family), []
    out = decomposition.blocks[layer].attn_out
    assert out is not None
    with out.register_forward_hook(lambda _m, args, _o: found.append(args[0][0, -1])), torch.no_grad():
        decomposition.loaded.model(torch.tensor([ids]), use_cache=False)
    return found[0]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("family", [*OWN, *MIXED, *SPECIAL])
def test_the_parts_add_up(family: str) -> None:
    assert all(row["passed"] for row in check_decomposition(decomposition_of(family), IDS))


@every_own
def test_the_weights_are_those_that_the_model_returns(family: str) -> None:
    r, model = recording_of(family), decomposition_of(family).loaded.model
    for row, ids in enumerate(IDS):
        with torch.no_grad():
            own = model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
        expected = torch.stack([weights[0, :, -1] for weights in own])
        assert torch.allclose(r.attention[:, row, :, : len(ids)], expected, atol=1e-6)


@pytest.mark.parametrize("family", [*OWN, *SPECIAL])
def test_weights_times_values_are_what_the_heads_write(family: str) -> None:
    decomposition, r = decomposition_of(family), recording_of(family)
    for layer, block in enumerate(decomposition.blocks):
        if block.heads is None:
            continue
        n, size = decomposition.heads_in(layer), decomposition.head_size_in(layer)
        columns = decomposition.attn_columns(layer).view(decomposition.n_heads, decomposition.head_size, -1)
        vectors = head_vectors(decomposition, r, layer)
        for row, ids in enumerate(IDS):
            read = heads_read(family, layer, ids).view(n, size)
            scale = r.attn_scale[layer, row, len(ids) - 1]
            expected = torch.einsum("he,hed->hd", read, columns[:n, :size]) * scale
            assert off(vectors[row, :n], expected) < 1e-5
            assert not vectors[row, n:].any()


def brute(family: str, row: int, x: torch.Tensor, v: torch.Tensor) -> float:
    """log p(w|x+v) − log p(w|x), with the final norm's scale frozen, in float64."""
    decomposition, r = decomposition_of(family), recording_of(family)
    readout, w = decomposition.readout, int(r.logits[row].argmax())
    table, scale = readout.table.double(), r.final_scale[row].double()

    def log_p(state: torch.Tensor) -> torch.Tensor:
        return (table @ state.double() * scale + readout.constant.double()).log_softmax(0)[w]

    return float(log_p(x + v) - log_p(x))


@every_mixed
def test_layer_scores_are_increases_by_what_is_added(family: str) -> None:
    a, r = attribution_of(family), recording_of(family)
    for row in range(len(IDS)):
        last = len(IDS[row]) - 1
        for layer, block in enumerate(a.decomposition.blocks):
            x = r.resid_pre[layer, row, last]
            for component in ("attn", "mixer", "ffn"):
                if block.has(component):
                    parallel = family == "falcon_h1" and component == "mixer"
                    base = r.resid_pre[layer, row, last] if parallel else x
                    v = r.added(component)[layer, row, last]
                    found = float(a.layer_scores[component][row, layer])
                    assert found == pytest.approx(brute(family, row, base, v), abs=1e-5)
                    x = x + v


@every_mixed
def test_a_layer_has_rows_for_what_it_adds_and_no_others(family: str) -> None:
    a, ids = attribution_of(family), np.arange(len(IDS), dtype=np.int32)
    expected = {
        "mamba": {(i, "mixer") for i in range(LAYERS)},
        "falcon_h1": {(i, c) for i in range(LAYERS) for c in ("attn", "ffn", "mixer")},
        "lfm2": {(0, "mixer"), (1, "attn"), (2, "mixer"), *((i, "ffn") for i in range(LAYERS))},
    }[family]
    rows = layer_rows(ids, a).to_pylist()
    assert {(row["layer"], row["component"]) for row in rows} == expected and len(rows) == len(IDS) * len(expected)
    if a.decomposition.n_heads:
        queries = query_layer_rows(ids, a, "ffn", a.ffn_queries(a.ffn_top(10))).to_pylist()
        assert {(row["layer"], row["component"]) for row in queries} == expected | {(None, "embed")}
        heads = {row["layer"] for row in head_rows(ids, a).to_pylist()}
        assert heads == {layer for layer, component in expected if component == "attn"}


def test_a_multiplier_of_each_component_is_found() -> None:
    for block in decomposition_of("falcon_h1").blocks:
        assert block.additions.multipliers == pytest.approx({"attn": 0.5, "mixer": 2.0, "ffn": 1.0}, rel=1e-4)
        assert block.before("attn") == block.before("mixer") == () and block.middle == ("attn", "mixer")


def test_the_query_side_reads_the_layer_that_the_values_come_from() -> None:
    decomposition, a, r = decomposition_of("gemma4_text"), attribution_of("gemma4_text"), recording_of("gemma4_text")
    assert [block.heads.values_of for block in decomposition.blocks if block.heads] == [0, 1, 0, 1]
    assert [decomposition.head_size_in(i) for i in range(4)] == [8, 16, 8, 16]
    top = a.attn_top(200)
    assert not top.layer.lt(0).any()
    assert bool((top.neuron < torch.tensor([8, 16, 8, 16])[top.layer]).all())
    queries = a.attn_queries(top)
    # Everything that a shared value depends on lies before its own layer: nothing from there on has a score.
    assert queries.mixer is not None  # what Gemma 4 adds for each token and layer
    assert not any(of[:, 1:].any() for of in (queries.attn, queries.ffn, queries.mixer))
    total = queries.embed + queries.attn.sum(1) + queries.ffn.sum(1) + queries.mixer.sum(1)
    assert torch.allclose(total, top.score.sum(1), rtol=1e-3)
    assert r.gates is None


def test_a_sink_takes_weight_and_gives_nothing() -> None:
    sums = recording_of("gpt_oss").attention[:, 0].sum(-1)
    assert bool((sums <= 1 + 1e-6).all()) and bool((sums > 0).all())
    assert sums.min() < 0.95


def test_heads_without_weights_have_scores_without_positions() -> None:
    config = AutoConfig.for_model("diffllama", **LLAMA)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    decomposition = decompose(loaded(model))
    rows = {row["check"]: row for row in check_decomposition(decomposition, IDS)}
    assert rows["head_positions"]["value"] == LAYERS and rows["head_sum"]["value"] < 1e-5
    with torch.inference_mode():
        r = run_with_cache(decomposition, IDS)
        a = Attribution(decomposition, r, r.logits.argmax(1))
        assert a.head_scores.isfinite().all()
    assert r.attention.shape[-1] == 0


def test_attention_that_is_not_known_as_such_is_not_called_a_mixer() -> None:
    model = model_of("gptj")
    attention = model.transformer.h[1].attn

    def without_weights(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return super(type(self), self).forward(*args, **kwargs)[0], None

    attention.__class__ = type("Peculiar", (type(attention),), {"forward": without_weights})
    with pytest.raises(ModelError, match=r"block 1 of .* adds the output of a Peculiar, which kdb does not know"):
        decompose(loaded(model))


def test_weights_that_are_no_numbers_are_named_before_parts_are_looked_for() -> None:
    model = model_of("lfm2")
    model.model.layers[1].feed_forward.w2.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"computes values that are not finite numbers \(found by the first pass\)"):
        decompose(loaded(model))


def test_a_component_that_a_model_lacks_is_not_patched_in_silence() -> None:
    subject = Patched(decompose(loaded(model_of("mamba"))))
    asked = Patching(components=("head",), replacements=("zero",), methods=("exact",))
    with pytest.raises(ModelError, match="has nothing to replace of the component head: no layer has one"):
        _possible(subject, asked, {"head": []})
    own = _possible(subject, ESTIMATED, dict.fromkeys(ESTIMATED.components, ()))  # of a run, which asks for all
    assert own.components == ()
