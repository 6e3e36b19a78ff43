"""Replacing a part of a model, many at a time and from a cache, gives what a plain forward pass with one hook gives.

The reference is written here, with the names of the modules that transformers gives them: one prompt at a time, every
token and every block, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import HIDDEN, LAYERS, loaded, prompts, tiny_model

from kdb.errors import ModelError
from kdb.ingest.forward import patching
from kdb.ingest.forward.decomposition import Decomposition, decompose
from kdb.ingest.forward.gradients import gradients
from kdb.ingest.forward.patching import Part, Pass, Patch, entries, patched, recorded
from kdb.queries.domains import PARTS

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = ("llama", "gemma3_text", "gpt2", "gpt_neox")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
IDS = prompts([7, 9, 7, 4])
HEADS = 4

# Of each architecture: the blocks, and within a block the module of each component, "<" where it is its input.
LLAMA = {"head": "<self_attn.o_proj", "attn": "self_attn.o_proj", "ffn": "mlp", "ffn_neuron": "<mlp.down_proj"}
NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("model.layers", LLAMA),
    "gemma3_text": (
        "model.layers",
        LLAMA | {"attn": "post_attention_layernorm", "ffn": "post_feedforward_layernorm"},
    ),
    "gpt2": (
        "transformer.h",
        {"head": "<attn.c_proj", "attn": "attn.c_proj", "ffn": "mlp", "ffn_neuron": "<mlp.c_proj"},
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {"head": "<attention.dense", "attn": "attention.dense", "ffn": "mlp", "ffn_neuron": "<mlp.dense_4h_to_h"},
    ),
}


@cache
def made(architecture: str) -> Decomposition:
    return decompose(loaded(tiny_model(architecture)))


@cache
def double(architecture: str) -> Any:
    return copy.deepcopy(made(architecture).loaded.model).double()


# The reference ---------------------------------------------------------------------------------------------------


def touching(architecture: str, model: Any, component: str, layer: int, touch: Callable[[Any], Any]) -> Any:
    """Hook ``touch`` to what a component writes in a layer; what it returns, if anything, takes its place."""
    blocks, names = NAMES[architecture]
    block = model.get_submodule(blocks)[layer]
    name = names.get(component, "")
    if name.startswith("<"):

        def before(_module: Any, args: Any) -> Any:
            new = touch(args[0])
            return None if new is None else (new, *args[1:])

        return block.get_submodule(name[1:]).register_forward_pre_hook(before)

    def after(_module: Any, _args: Any, output: Any) -> Any:
        new = touch(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    return block.get_submodule(name).register_forward_hook(after)


def written(architecture: str, ids: Sequence[int], component: str, layer: int) -> torch.Tensor:
    """What a component writes (position, width) in one prompt."""
    found: list[torch.Tensor] = []
    hook = touching(
        architecture, double(architecture), component, layer, lambda states: found.append(states.reshape(len(ids), -1))
    )
    with torch.inference_mode():
        double(architecture)(torch.tensor([ids]), use_cache=False)
    hook.remove()
    return found[0].float()


def log_p(architecture: str, run: Pass, patch: Patch | None = None) -> torch.Tensor:
    """Log-probabilities after one prompt, with a replacement."""
    model, hooks = double(architecture), []
    if patch is not None:
        size = {"head": slice(patch.part.head * width(architecture), (patch.part.head + 1) * width(architecture))}
        size["ffn_neuron"] = slice(patch.part.neuron, patch.part.neuron + 1)

        def put(states: torch.Tensor) -> torch.Tensor:
            new = states.clone()
            flat = new.view(len(run.token_ids), -1)
            flat[list(run.positions), size.get(patch.part.component, slice(None))] = patch.values.double()
            return new

        hooks.append(touching(architecture, model, patch.part.component, patch.part.layer, put))
    with torch.inference_mode():
        found = model(torch.tensor([list(run.token_ids)]), use_cache=False).logits[0, -1].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    return found


def width(architecture: str) -> int:
    return 4 if architecture == "gemma3_text" else HIDDEN // HEADS


def by_hand(architecture: str, run: Pass, patch: Patch) -> tuple[float, float, float]:
    before, after = log_p(architecture, run), log_p(architecture, run, patch)
    changed = after - before
    diff = changed[run.target] - changed[run.rival] if run.rival >= 0 else torch.tensor(torch.nan)
    return float(changed[run.target]), float(diff), float((before.exp() * -changed).sum())


def positions(role: str, n: int) -> tuple[int, ...]:
    return {"last": (n - 1,), "middle": (n // 2,), "all": tuple(range(n)), "two": (1, n - 2)}[role]


def passes(role: str) -> list[Pass]:
    return [Pass(ids, positions(role, len(ids)), 3 + i, 40 - i if i != 1 else -1) for i, ids in enumerate(IDS)]


def part_of(component: str, layer: int, number: int) -> Part:
    return Part(
        component, layer, number % HEADS if component == "head" else -1, number if component == "ffn_neuron" else -1
    )


def random_patches(architecture: str, runs: Sequence[Pass], components: Sequence[str]) -> list[Patch]:
    """A patch of every component, layer and pass, in an order that mixes them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for component in components:
        for layer in range(LAYERS):
            for of, run in enumerate(runs):
                size = {"head": width(architecture), "ffn_neuron": 1}.get(component, HIDDEN)
                values = torch.randn(len(run.positions), size, generator=generator)
                found.append(Patch(of, part_of(component, layer, 5 * layer + of), values))
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


# Exact patching --------------------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("role", ["last", "middle", "all", "two"])
def test_a_patch_changes_what_a_plain_pass_with_one_hook_changes(architecture: str, role: str) -> None:
    runs = passes(role)
    patches = random_patches(architecture, runs, PARTS)
    found = patched(made(architecture), runs, patches)
    expected = np.array([by_hand(architecture, runs[patch.of], patch) for patch in patches])
    measures = np.stack([found.logp, found.logit_diff, found.kl], axis=1)
    np.testing.assert_allclose(measures, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected[:, 0]).max() > 0.1
    assert (np.isnan(found.logit_diff) == [runs[p.of].rival < 0 for p in patches]).all()


@every_architecture
@pytest.mark.parametrize(("rows", "tokens"), [(1, 10**6), (3, 10**6), (64, 1), (64, 12)])
def test_a_patch_has_the_same_effect_in_any_batch(
    architecture: str, rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = passes("middle")
    patches = random_patches(architecture, runs, ("head", "ffn", "resid"))
    together = patched(made(architecture), runs, patches)
    monkeypatch.setattr(patching, "SMALL_ROWS", rows)
    monkeypatch.setattr(patching, "tokens_at_once", lambda _loaded: tokens)
    batches: list[int] = []
    changes = patching.Prompts.patched_logits
    counted = lambda self, rows, some: batches.append(len(rows)) or changes(self, rows, some)  # noqa: E731
    monkeypatch.setattr(patching.Prompts, "patched_logits", counted)
    apart = patched(made(architecture), runs, patches)
    for one, other in zip(vars(together).values(), vars(apart).values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert sum(batches) == len(patches)
    assert max(batches) == 1 or tokens > 1


@every_architecture
def test_a_part_replaced_by_its_own_value_changes_nothing(architecture: str) -> None:
    runs = passes("middle")
    values = recorded(made(architecture), IDS, [run.positions for run in runs], PARTS)
    patches = []
    for of in range(len(runs)):
        for component in PARTS:
            part = part_of(component, 1, 2)
            patches.append(Patch(of, part, values[of][component][1][:, entries(made(architecture), part)]))
    found = patched(made(architecture), runs, patches)
    assert np.abs(np.nan_to_num([found.logp, found.logit_diff, found.kl])).max() < 1e-4


@every_architecture
def test_what_parts_write_is_recorded_at_the_asked_positions(architecture: str) -> None:
    at = [positions("two", len(ids)) for ids in IDS]
    found = recorded(made(architecture), IDS, at, PARTS)
    for ids, places, one in zip(IDS, at, found, strict=True):
        for component in PARTS:
            expected = torch.stack([written(architecture, ids, component, layer) for layer in range(LAYERS)])
            torch.testing.assert_close(one[component], expected[:, list(places)], rtol=1e-4, atol=1e-4)


def hooks_of_ours(module: Any) -> list[Any]:
    """The hooks on a module, but for one of transformers, which collects hidden states and stays."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")]


@every_architecture
def test_the_model_is_afterwards_as_it_was(architecture: str) -> None:
    decomposition = made(architecture)
    model = decomposition.loaded.model
    ids = torch.tensor([IDS[0]])
    with torch.inference_mode():
        before = model(ids).logits
    attention = model.config._attn_implementation
    runs = passes("last")
    patched(decomposition, runs, random_patches(architecture, runs, PARTS))
    recorded(decomposition, IDS, [run.positions for run in runs], PARTS)
    for method in ("atp", "relp"):
        gradients(decomposition, runs, PARTS, method)
    for module in model.modules():
        assert not hooks_of_ours(module)
        assert "forward" not in vars(module)
    assert model.config._attn_implementation == attention
    assert all(p.grad is None for p in model.parameters())
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)


def test_an_error_in_a_pass_leaves_no_hook_behind() -> None:
    wrong = Patch(0, Part("attn", 2), torch.zeros(1, HIDDEN + 1))
    with pytest.raises(RuntimeError):
        patched(made("llama"), passes("last"), [wrong])
    for module in made("llama").loaded.model.modules():
        assert not hooks_of_ours(module)
        assert "forward" not in vars(module)


# Gradients -------------------------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("component", PARTS)
def test_a_gradient_is_the_slope_of_the_effect(architecture: str, component: str) -> None:
    run, layer, step = replace(passes("two")[0], positions=(1, 5, 6)), 1, 1e-2  # norms compute in float32
    [found] = gradients(made(architecture), [run], [component])
    part = part_of(component, layer, 2)
    own = written(architecture, run.token_ids, component, layer)[list(run.positions)]
    own = own[:, entries(made(architecture), part)].double()
    direction = torch.randn(own.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def measures(by: float) -> torch.Tensor:
        after = log_p(architecture, run, Patch(0, part, own + by * direction))
        return torch.stack([after[run.target], after[run.target] - after[run.rival]])

    expected = (measures(step) - measures(-step)) / (2 * step)
    slopes = found[component][:, layer][..., entries(made(architecture), part)].double()
    off = ((slopes * direction).sum((1, 2)) - expected).abs()
    assert (off <= 2e-3 * slopes.square().sum((1, 2)).sqrt()).all(), (off, expected)
    assert expected.abs().max() > 1e-3


@every_architecture
@pytest.mark.parametrize("method", ["atp", "relp"])
def test_gradients_are_the_same_in_any_batch(architecture: str, method: str) -> None:
    runs = passes("last")
    together = gradients(made(architecture), runs, PARTS, method)
    for run, one in zip(runs, together, strict=True):
        [alone] = gradients(made(architecture), [run], PARTS, method)
        for component in PARTS:
            torch.testing.assert_close(one[component], alone[component], rtol=1e-3, atol=1e-4, equal_nan=True)
            assert one[component][1].isnan().all() == (run.rival < 0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "qwen3"])
def test_relevance_is_conserved_from_layer_to_layer(architecture: str) -> None:
    """With the rules of RelP, a network without biases is linear: gradient times value adds up to the output."""
    model = tiny_model(architecture)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
    decomposition = decompose(loaded(model))
    run = passes("all")[0]
    [slopes] = gradients(decomposition, [run], ["resid"], "relp")
    [values] = recorded(decomposition, [run.token_ids], [run.positions], ["resid"])
    with torch.inference_mode():
        logits = model(torch.tensor([run.token_ids])).logits[0, -1]
    expected = (logits[run.target] - logits[run.rival]).expand(LAYERS)
    found = (slopes["resid"][1] * values["resid"]).sum((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    [plain] = gradients(decomposition, [run], ["resid"], "atp")
    assert ((plain["resid"][1] * values["resid"]).sum((1, 2)) - expected)[0].abs() > 1e-2


def test_relevance_through_the_final_norm_keeps_its_scale_and_neurons_get_all_of_it() -> None:
    """What a neuron adds is linear in its activation; only the two factors of the activation get halves."""
    decomposition = made("llama")
    last, run = LAYERS - 1, passes("last")[0]
    [relp] = gradients(decomposition, [run], ["resid", "ffn", "ffn_neuron"], "relp")
    [atp] = gradients(decomposition, [run], ["resid", "ffn", "ffn_neuron"], "atp")
    model = decomposition.loaded.model
    resid = written("llama", run.token_ids, "resid", last)[-1].float()
    scale = (resid.square().mean() + model.model.norm.variance_epsilon).rsqrt()
    rows = model.lm_head.weight[run.target] - model.lm_head.weight[run.rival]
    expected = rows * model.model.norm.weight * scale
    torch.testing.assert_close(relp["resid"][1, last, 0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(relp["ffn"][1, last], relp["resid"][1, last])
    down = model.model.layers[last].mlp.down_proj.weight
    torch.testing.assert_close(relp["ffn_neuron"][1, last, 0], expected @ down, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(relp["resid"], atp["resid"], rtol=1e-2)


def test_relp_of_a_model_without_an_activation_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    decomposition = made("llama")
    for block in decomposition.blocks:
        monkeypatch.setattr(block.ffn.dense, "activation", None)
    with pytest.raises(ModelError, match=r"^tiny: RelP needs the activation function .* Use --method atp or exact\.$"):
        gradients(decomposition, passes("last"), ["head"], "relp")


def test_a_model_whose_gradients_cannot_be_had_is_refused() -> None:
    decomposition = decompose(loaded(tiny_model("llama")))
    decomposition.blocks[-1].module.register_forward_hook(lambda _module, _args, output: output.detach())
    with pytest.raises(ModelError, match=r"^tiny: gradients of this model cannot be had .* Use --method exact"):
        gradients(decomposition, passes("last"), ["head"])
