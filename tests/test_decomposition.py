"""A model's residual stream, taken apart, is what plain hooks, the model's cache and its own logits say it is.

The models are tiny ones of every architecture that the design names, and two real ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, BLOCKS, HIDDEN, VOCAB, loaded, prompts, tiny_model
from transformers import DynamicCache

from kdb.errors import ModelError
from kdb.ingest.forward.activation_cache import ActivationCache, check_decomposition, run_with_cache
from kdb.ingest.forward.attention import ATTENTION
from kdb.ingest.forward.decomposition import Decomposition, decompose
from kdb.ingest.models.find import LoadedModel

pytestmark = pytest.mark.usefixtures("one_thread")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

DTYPES = ("float32", "bfloat16", "float16")
SUMS = {"residual_sum", "head_sum", "ffn_sum", "value_keys", "frozen_readout", "logits", "logits_kl"}
IDS = prompts([3, 1, 20, 9])

NO_BIASES = {"use_bias": False, "num_key_value_heads": 1}
MULTIPLIED = {"attention_multiplier": 0.3, "embedding_multiplier": 12.0}
CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0}

# Settings that change what a block consists of, beyond those of ARCHITECTURES.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1}),
    ("mistral", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen2", {"num_key_value_heads": 1}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("gemma", {"num_key_value_heads": 1, "attention_bias": True}),
    ("gemma2", {"attention_bias": True, "tie_word_embeddings": False}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3_text", CAPPED | {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    ("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    ("phi", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("phi", {"qk_layernorm": True}),
    ("phi3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("olmo", {"attention_bias": True, "tie_word_embeddings": True}),
    ("olmo2", {"attention_bias": True}),
    ("opt", {"enable_bias": False}),
    ("opt", {"layer_norm_elementwise_affine": False, "tie_word_embeddings": False}),
    ("starcoder2", {"use_bias": False}),
    ("starcoder2", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    ("cohere", {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False}),
    ("glm4", {"attention_bias": True, "tie_word_embeddings": True}),
    ("granite", MULTIPLIED | {"attention_bias": True, "mlp_bias": True}),
    ("stablelm", {"use_parallel_residual": True}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True}),
]
variants = pytest.mark.parametrize(
    ("architecture", "changes"),
    [(name, {}) for name in ARCHITECTURES] + VARIANTS,
    ids=[*ARCHITECTURES, *("-".join((name, *changes)) for name, changes in VARIANTS)],
)


def measured(architecture: str, dtype: str, **changes: Any) -> dict[str, float]:
    """The value of each check, for a tiny model. Half precision gets weights with which nothing overflows."""
    model = tiny_model(architecture, std=0.3 if dtype == "float32" else 0.1, **changes)
    return values(loaded(model, dtype))


def values(model: LoadedModel) -> dict[str, float]:
    return {row["check"]: row["value"] for row in check_decomposition(decompose(model), IDS)}


@variants
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parts_add_up(architecture: str, changes: dict[str, Any], dtype: str) -> None:
    found = measured(architecture, dtype, **changes)
    assert found.keys() >= SUMS
    assert dtype != "float32" or max(found.values()) < 1e-5


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_the_parts_of_real_models_add_up(name: str, request: pytest.FixtureRequest) -> None:
    assert max(values(request.getfixturevalue(name.replace("-", "_"))).values()) < 1e-4


# What the plain model says ---------------------------------------------------------------------------------------

# The module whose output a block adds to its residual, written down here and not asked of the code that is tested.
ADDS_ATTENTION = {
    "gpt2": "attn",
    "gpt_neox": "attention",
    "glm4": "post_self_attn_layernorm",
    **dict.fromkeys(["gemma2", "gemma3_text", "olmo2"], "post_attention_layernorm"),
}
ADDS_FFN = {
    "opt": "fc2",
    "glm4": "post_mlp_layernorm",
    **dict.fromkeys(["gemma2", "gemma3_text", "olmo2"], "post_feedforward_layernorm"),
}
# The projection whose rows are the FFN neurons' keys; where it is fused with the gate, the gate comes first.
FIRST = {
    "gpt2": "mlp.c_fc",
    "gpt_neox": "mlp.dense_h_to_4h",
    "opt": "fc1",
    "phi": "mlp.fc1",
    "phi3": "mlp.gate_up_proj",
    "starcoder2": "mlp.c_fc",
    "glm4": "mlp.gate_up_proj",
}
CENTRED = {"gpt2", "gpt_neox", "phi", "olmo", "opt", "starcoder2", "cohere", "stablelm"}
NO_NORM_BEFORE = {"olmo2"}
PARALLEL = {"gpt_neox", "phi", "cohere"}


class Plain:
    """One prompt through the untouched model: what hooks, its cache and its outputs tell. Shapes (l, t, …)."""

    def __init__(self, architecture: str, model: Any, token_ids: list[int]) -> None:
        self.heard: dict[str, list[torch.Tensor]] = {"attn": [], "ffn": [], "first": [], "block": []}
        handles = []
        for block in model.get_submodule(BLOCKS.get(architecture, "model.layers")):
            for name, module in (
                ("attn", block.get_submodule(ADDS_ATTENTION.get(architecture, "self_attn"))),
                ("ffn", block.get_submodule(ADDS_FFN.get(architecture, "mlp"))),
                ("first", block.get_submodule(FIRST.get(architecture, "mlp.up_proj"))),
                ("block", block),
            ):
                handles.append(module.register_forward_hook(lambda _m, _i, out, name=name: self._hear(name, out)))
        cache, ids = DynamicCache(), torch.tensor([token_ids])
        with torch.no_grad():
            output = model(ids, past_key_values=cache, output_hidden_states=True)
            for handle in handles:
                handle.remove()
            usual = model.config._attn_implementation
            model.set_attn_implementation("eager")
            attentions = model(ids, output_attentions=True, use_cache=False).attentions
            model.set_attn_implementation(usual)
        self.resid_pre = torch.stack([state[0] for state in output.hidden_states[:-1]])
        self.resid_post = torch.stack(self.heard["block"])
        factor = getattr(model.config, "residual_multiplier", 1.0)
        self.attn, self.ffn = torch.stack(self.heard["attn"]) * factor, torch.stack(self.heard["ffn"]) * factor
        self.first = torch.stack(self.heard["first"])
        self.values = torch.stack([layer.values[0] for layer in cache.layers])  # l, kv head, t, entry
        self.attention = torch.stack([weights[0, :, -1] for weights in attentions])  # l, h, t
        self.logits = output.logits[0, -1]

    def _hear(self, name: str, output: Any) -> None:
        written = output[0] if isinstance(output, tuple) else output
        self.heard[name].append(written.reshape(-1, written.shape[-1]))


@cache
def decomposition_of(architecture: str) -> Decomposition:
    return decompose(loaded(tiny_model(architecture)))


@cache
def recording_of(architecture: str) -> ActivationCache:
    return run_with_cache(decomposition_of(architecture), IDS)


@cache
def plain_of(architecture: str) -> list[Plain]:
    return [Plain(architecture, decomposition_of(architecture).loaded.model, ids) for ids in IDS]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest distance of two vectors, relative to the longest of those expected."""
    return float((found - expected).norm(dim=-1).max() / expected.norm(dim=-1).max())


def frozen_scale(architecture: str, x: torch.Tensor) -> torch.Tensor:
    """The scale of a norm at x, by its definition."""
    config = decomposition_of(architecture).loaded.model.config
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    epsilon = next((getattr(config, name) for name in names if hasattr(config, name)), 1e-5)
    centred = x - x.mean(-1, keepdim=True) if architecture in CENTRED else x
    return (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()


@every_architecture
def test_input_attention_and_ffn_are_the_next_input(architecture: str) -> None:
    for plain in plain_of(architecture):
        assert off(plain.resid_pre + plain.attn + plain.ffn, plain.resid_post) < 1e-6
        assert torch.equal(plain.resid_post[:-1], plain.resid_pre[1:])


@every_architecture
def test_a_padded_batch_records_what_the_plain_model_does(architecture: str) -> None:
    r = recording_of(architecture)
    for row, (plain, ids) in enumerate(zip(plain_of(architecture), IDS, strict=True)):
        t = len(ids)
        assert r.last[row] == t - 1
        for name in ("resid_pre", "attn", "ffn"):
            assert off(getattr(r, name)[:, row, :t], getattr(plain, name)) < 1e-5
        assert off(r.values[:, row, :, :t], plain.values) < 1e-5
        assert off(r.attention[:, row, :, :t], plain.attention) < 1e-5
        assert off(r.resid_post[row], plain.resid_post[-1, -1]) < 1e-5
        assert off(r.logits[row], plain.logits) < 1e-5


@every_architecture
def test_the_frozen_linear_readout_gives_the_models_own_logits(architecture: str) -> None:
    readout = decomposition_of(architecture).readout
    for row, plain in enumerate(plain_of(architecture)):
        x = plain.resid_post[-1, -1]
        scale = frozen_scale(architecture, x)
        assert recording_of(architecture).final_scale[row] == pytest.approx(scale.item(), rel=1e-5)
        logits = readout.table @ x * scale + readout.constant
        if readout.softcap is not None:
            logits = readout.softcap * (logits / readout.softcap).tanh()
        assert off(logits, plain.logits) < 1e-5


@every_architecture
def test_an_ffn_key_times_what_it_reads_is_the_first_projections_output_but_for_a_bias(architecture: str) -> None:
    decomposition = decomposition_of(architecture)
    for plain in plain_of(architecture):
        for layer in range(len(decomposition.blocks)):
            x = plain.resid_pre[layer] + (0 if architecture in PARALLEL else plain.attn[layer])
            keys = decomposition.ffn_keys(layer)
            written = plain.first[layer][:, -len(keys) :]
            scale = 1 if architecture in NO_NORM_BEFORE else frozen_scale(architecture, x)
            bias = written - x @ keys.T * scale
            assert (bias - bias[-1:]).abs().max() < 1e-5 * written.abs().max()


@every_architecture
def test_a_value_key_times_what_it_reads_is_the_value_but_for_a_bias(architecture: str) -> None:
    decomposition = decomposition_of(architecture)
    for plain in plain_of(architecture):
        for layer, x in enumerate(plain.resid_pre):
            groups = decomposition.n_heads // plain.values.shape[1]
            written = plain.values[layer].repeat_interleave(groups, dim=0).transpose(0, 1).flatten(1)
            scale = 1 if architecture in NO_NORM_BEFORE else frozen_scale(architecture, x)
            bias = written - x @ decomposition.value_keys(layer).T * scale
            assert (bias - bias[-1:]).abs().max() < 1e-5 * written.abs().max()


@every_architecture
def test_parallel_blocks_are_told_from_serial_ones(architecture: str) -> None:
    assert {block.parallel for block in decomposition_of(architecture).blocks} == {architecture in PARALLEL}


@pytest.mark.parametrize(("architecture", "parallel"), [("gpt_neox", False), ("stablelm", True)])
def test_a_setting_decides_whether_blocks_are_parallel(architecture: str, parallel: bool) -> None:
    decomposition = decompose(loaded(tiny_model(architecture, use_parallel_residual=parallel)))
    assert {block.parallel for block in decomposition.blocks} == {parallel}


def test_a_step_along_its_key_moves_a_gated_neuron_most() -> None:
    """With the gate held, a neuron's coefficient is linear in what the up projection reads, and the key its slope."""
    decomposition, mlp = decomposition_of("llama"), decomposition_of("llama").loaded.model.model.layers[1].mlp
    x = recording_of("llama").resid_pre[1, 2, :20]
    gate, weight = mlp.act_fn(mlp.gate_proj(x)), decomposition.blocks[1].ffn_norm.weight
    keys = torch.nn.functional.normalize(decomposition.ffn_keys(1), dim=1)
    moved = gate[:, :, None] * ((keys * weight) @ mlp.up_proj.weight.T).T  # position, neuron, key stepped along
    assert torch.equal(moved.abs().argmax(2), torch.arange(len(keys)).expand(len(x), -1))


# Models that are refused -----------------------------------------------------------------------------------------


def refusal(model: Any, dtype: str = "float32") -> str:
    """Return the message of the ModelError that refuses the model; check that no hook stays attached."""
    before = model.config._attn_implementation
    with pytest.raises(ModelError) as refused:
        check_decomposition(decompose(loaded(model, dtype)), IDS)
    assert model.config._attn_implementation == before != ATTENTION
    return str(refused.value)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_that_adds_something_else_is_refused(architecture: str, dtype: str) -> None:
    model = tiny_model(architecture, std=0.1)

    def add(_module: Any, args: tuple[Any, ...], output: Any) -> Any:
        return (output[0] + args[0] / 2, *output[1:]) if isinstance(output, tuple) else output + args[0] / 2

    model.get_submodule(BLOCKS.get(architecture, "model.layers"))[1].register_forward_hook(add)
    assert "residual_sum is off by 0." in refusal(model, dtype)


class Squared(torch.nn.Linear):
    """A module that looks like a linear map and is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + y.square()


def squared(old: torch.nn.Linear) -> Squared:
    new = Squared(old.in_features, old.out_features, bias=False).requires_grad_(False)
    new.weight = old.weight
    return new


def test_an_unembedding_that_is_not_linear_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = squared(model.lm_head)
    assert "frozen_readout is off by" in refusal(model)


class Favoured(torch.nn.Linear):
    """A map that is linear but for the best token, whose logit it raises by a small part of the spread."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + 0.08 * (y - y.amin(-1, keepdim=True)) * (y == y.amax(-1, keepdim=True))


def test_a_readout_of_near_logits_and_another_distribution_is_refused_in_half_precision() -> None:
    model = tiny_model("llama", std=0.1, tie_word_embeddings=False)
    new = Favoured(HIDDEN, VOCAB, bias=False).requires_grad_(False)
    new.weight = model.lm_head.weight.mul_(8.0)
    model.lm_head = new
    assert "frozen_readout_kl is off by" in refusal(model, "bfloat16")


def test_an_unembedding_of_several_layers_is_refused() -> None:
    model = tiny_model("llama")
    layers = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, VOCAB)
    model.lm_head = torch.nn.Sequential(*layers)
    assert "unembedding" in refusal(model)


def test_an_unembedding_of_another_width_is_refused() -> None:
    assert "unembedding" in refusal(tiny_model("opt", word_embed_proj_dim=16))  # OPT projects to it first


@pytest.mark.parametrize(
    ("projection", "check"), [("mlp.down_proj", "ffn_sum"), ("self_attn.o_proj", "head_sum"), ("mlp.up_proj", "ffn")]
)
def test_a_projection_that_is_not_linear_is_refused(projection: str, check: str) -> None:
    model = tiny_model("llama")
    parent, _, name = projection.rpartition(".")
    for block in model.model.layers:
        owner = block.get_submodule(parent)
        setattr(owner, name, squared(getattr(owner, name)))
    assert check in refusal(model)


def test_values_that_are_clipped_are_refused() -> None:
    assert "value_keys is off by" in refusal(tiny_model("olmo", clip_qkv=0.5))


def test_a_model_that_overflows_is_refused() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight[IDS[1][0]] = torch.inf
    assert "computes values that are not finite numbers" in refusal(model)


def hooks_of_ours(module: Any) -> list[Any]:
    """The hooks on a module, but for one of transformers, which collects hidden states and stays."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")]


def test_nothing_stays_attached_to_the_model() -> None:
    decomposition = decompose(loaded(tiny_model("gemma3_text")))
    model = decomposition.loaded.model
    run_with_cache(decomposition, IDS)
    decomposition.value_keys(0)
    with pytest.raises(IndexError):
        run_with_cache(decomposition, [[VOCAB]])
    assert not any(map(hooks_of_ours, model.modules()))
    assert model.config._attn_implementation != ATTENTION
