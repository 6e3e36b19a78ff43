"""Mixtures of experts in the knowledge study: each neuron of each expert against the model's own modules."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from helpers.tiny_experts import MIXTURES, decomposed, mixture
from helpers.tiny_models import HIDDEN, LAYERS, loaded
from hypothesis import given
from hypothesis import strategies as st

from kdb.ingest.attribution.rankings import METHODS, best_neurons
from kdb.ingest.attribution.scores import Attribution
from kdb.ingest.forward.ablation import Silenced, Trial, run_trials
from kdb.ingest.forward.activation_cache import check_decomposition, expert_vectors, run_with_cache
from kdb.ingest.forward.decomposition import Decomposition, decompose
from kdb.ingest.forward.experts import Routing
from kdb.ingest.forward.ffn import factors_in
from kdb.ingest.forward.gradients import gradients
from kdb.ingest.forward.patching import Part, Pass, Patch, patched, recorded

IDS = [[5, 9, 3, 22, 40, 7], [1, 2, 3], [11, 60, 8, 8, 2, 31, 4, 17, 52]]
TARGETS = [3, 44, 20]
EXACT = 2e-5
"""Largest difference of a float32 score from its float64 definition, in nats."""

mixtures = pytest.mark.parametrize("architecture", MIXTURES)
shared_kinds = pytest.mark.parametrize(
    "architecture", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3", "llama4_text"]
)


@cache
def attribution(architecture: str) -> Attribution:
    cached = run_with_cache(decomposed(architecture), IDS)
    return Attribution(decomposed(architecture), cached, torch.tensor(TARGETS))


@cache
def in_float64(architecture: str) -> Any:
    model = copy.deepcopy(decomposed(architecture).loaded.model).double()
    model.set_experts_implementation("eager")  # the default has no float64
    return model


def block_of(model: Any, layer: int) -> Any:
    return model.base_model.layers[layer] if hasattr(model.base_model, "layers") else model.model.layers[layer]


def changes(model: Any, layer: int, ids: list[int], edit: Any) -> torch.Tensor:
    """What a block's output (hidden) at the last position loses when ``edit`` changes the block's own weights."""
    outputs = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).reshape(-1, HIDDEN)[len(ids) - 1].clone())

    with torch.inference_mode(), block_of(model, layer).register_forward_hook(keep):
        model(torch.tensor([ids]))
        undo = edit(block_of(model, layer))
        model(torch.tensor([ids]))
        undo()
    return outputs[0] - outputs[1]


def column(block: Any, decomposition: Decomposition, layer: int, slot: int) -> torch.Tensor:
    """A view of the weights that a slot's neuron writes with, in the block of a copy of the model."""
    layout, start = decomposition.ffn_layout(layer), 0
    expert, neuron = int(layout.experts([slot])[0]), int(layout.neurons([slot])[0])
    for source in decomposition.blocks[layer].ffn.sources:
        part = source.part
        if slot < start + part.size:
            break
        start += part.size
    names = {module: name for name, module in decomposition.blocks[layer].module.named_modules()}
    own = block.get_submodule(names[part.module])
    if not hasattr(own, "down_proj"):
        return own.weight[:, slot - start]
    down = own.down_proj[expert]
    return down[neuron] if down.shape[1] == HIDDEN and down.shape[0] != HIDDEN else down[:, neuron]


def without(decomposition: Decomposition, layer: int, slots: list[int]) -> Any:
    def edit(block: Any) -> Any:
        views = [column(block, decomposition, layer, slot) for slot in slots]
        before = [view.clone() for view in views]
        for view in views:
            view.zero_()

        def undo() -> None:
            for view, own in zip(views, before, strict=True):
                view.copy_(own)

        return undo

    return edit


def firing(a: Attribution, prompt: int, layer: int) -> list[int]:
    assert a.fires is not None
    return a.fires[prompt, layer].nonzero()[:, 0].tolist()


# The decomposition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@mixtures
def test_all_sums_add_up_to_the_residual_stream(architecture: str, dtype: str) -> None:
    if (architecture, dtype) == ("phimoe", "bfloat16"):
        pytest.skip("rounding changes which experts are chosen: weights jump with the gap of two logits")
    rows = check_decomposition(decomposed(architecture, dtype), IDS)
    assert all(row["passed"] for row in rows)
    assert {"ffn_sum", "ffn_keys", "residual_sum"} <= {row["check"] for row in rows}


@mixtures
def test_experts_add_up_to_the_ffn(architecture: str) -> None:
    a = attribution(architecture)
    rows = torch.arange(len(IDS))
    for layer in range(LAYERS):
        if a.decomposition.ffn_layout(layer).starts:
            whole = a.cache.ffn[layer, rows, a.cache.last]
            torch.testing.assert_close(
                expert_vectors(a.decomposition, a.cache, layer).sum(1), whole, rtol=1e-4, atol=1e-4
            )


@mixtures
def test_a_neuron_writes_what_the_block_loses_without_its_column(architecture: str) -> None:
    if architecture == "gemma4_text":
        pytest.skip("without a column, the norm behind it has another scale")
    a, model = attribution(architecture), in_float64(architecture)
    for layer in (0, LAYERS - 1):
        for prompt, slot in ((0, firing(a, 0, layer)[3]), (1, firing(a, 1, layer)[-2])):
            lost = changes(model, layer, IDS[prompt], without(a.decomposition, layer, [slot]))
            if a.cache.ffn_scale[layer].ne(1).any():
                continue
            written = (
                a.cache.coefficients[layer, prompt, a.cache.last[prompt], slot]
                * a.decomposition.ffn_columns(layer)[slot]
            )
            torch.testing.assert_close(written.double(), lost, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "architecture", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "qwen2_moe", "dots1"]
)
def test_the_routing_is_that_of_the_router_logits(architecture: str) -> None:
    a, model = attribution(architecture), a_model(architecture)
    r, decomposition = a.cache, a.decomposition
    for prompt, ids in enumerate(IDS):
        logits = router_logits(model, decomposition, ids)
        for layer, own in logits.items():
            share = own.softmax(-1) if architecture != "dots1" else own.sigmoid() / own.sigmoid().sum()
            n = decomposition.ffn_layout(layer).n_routed
            torch.testing.assert_close(r.router_probs[layer, prompt, :n], share, rtol=1e-4, atol=1e-6)
            assert int(r.chosen[layer, prompt, :n].sum()) == 2
            if architecture != "dots1":  # there, a bias and groups choose too
                best = own.topk(2).indices
                assert r.chosen[layer, prompt, best].all()
                weight = r.router_weight[layer, prompt, best]
                unscaled = architecture in ("qwen3_moe", "olmoe", "qwen2_moe")
                expected = share[best] if unscaled else share[best] / share[best].sum()
                torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
            assert (r.router_weight[layer, prompt, :n][~r.chosen[layer, prompt, :n]] == 0).all()


def a_model(architecture: str) -> Any:
    return decomposed(architecture).loaded.model


def router_logits(model: Any, decomposition: Decomposition, ids: list[int]) -> dict[int, torch.Tensor]:
    """The logits of the last token by layer, as transformers returns them or, if it does not, as the router does."""
    found: dict[int, torch.Tensor] = {}
    routed = [i for i in range(LAYERS) if decomposition.ffn_layout(i).starts]
    with torch.inference_mode():
        try:
            output = model(torch.tensor([ids]), output_router_logits=True).router_logits
            every = [x for x in output if x is not None]
            assert len(every) == len(routed)
            return {layer: x.reshape(-1, x.shape[-1])[-1].float() for layer, x in zip(routed, every, strict=True)}
        except (TypeError, AttributeError):
            for layer in routed:
                gate = block_of(model, layer).mlp.gate

                def keep(_m: Any, _a: Any, output: Any, layer: int = layer) -> None:
                    found[layer] = (output[0] if isinstance(output, tuple) else output).reshape(-1, 6)[-1].float()

                with gate.register_forward_hook(keep):
                    model(torch.tensor([ids]))
    return found


def test_dense_layers_have_no_routing() -> None:
    a = attribution("deepseek_v3")
    r = a.cache
    assert a.decomposition.ffn_layout(0).starts == ()
    assert r.router_probs is not None and r.chosen is not None and r.router_weight is not None
    assert r.router_probs[0].isnan().all() and not r.chosen[0].any() and (r.router_weight[0] == 0).all()
    assert run_with_cache(decompose(loaded(dense())), IDS).chosen is None


def dense() -> Any:
    from helpers.tiny_models import tiny_model

    return tiny_model("llama")


# Scores ----------------------------------------------------------------------------------------------------------


def log_p(a: Attribution, x: torch.Tensor, prompt: int) -> torch.Tensor:
    """Log-probability of the target at residuals (…, hidden), in float64, by definition."""
    readout = a.decomposition.readout
    logits = x.double() @ readout.table.double().T * a.cache.final_scale[prompt].double() + readout.constant.double()
    return logits.log_softmax(-1)[..., TARGETS[prompt]]


def before_ffn(a: Attribution, layer: int, prompt: int) -> torch.Tensor:
    block, at = a.decomposition.blocks[layer], int(a.cache.last[prompt])
    return a.cache.before(layer, block.middle)[prompt, at].double()


def brute(a: Attribution, layer: int, prompt: int) -> torch.Tensor:
    """The score (slot) of every slot of a layer, by definition; 0 where no neuron fires."""
    at = int(a.cache.last[prompt])
    m = (a.cache.coefficients[layer, prompt, at] * a.cache.ffn_scale[layer, prompt, at]).double()
    vectors = m[:, None] * a.decomposition.ffn_columns(layer).double()
    x = before_ffn(a, layer, prompt)
    return log_p(a, x + vectors, prompt) - log_p(a, x, prompt)


def brute_of(a: Attribution, prompt: int) -> torch.Tensor:
    return torch.cat([brute(a, layer, prompt) for layer in range(LAYERS)])


UNCAPPED = [name for name in MIXTURES if name != "gemma4_text"]


@pytest.mark.parametrize("architecture", UNCAPPED)
def test_the_best_neurons_are_those_of_chosen_experts_with_the_largest_scores(architecture: str) -> None:
    a = attribution(architecture)
    top = a.ffn_top(12)
    n = a.decomposition.n_slots
    assert a.fires is not None
    for prompt in range(len(IDS)):
        scores = brute_of(a, prompt)
        fires = a.fires[prompt].flatten()
        best = scores.where(fires, -torch.inf).topk(12)
        torch.testing.assert_close(top.score[prompt], best.values, rtol=1e-4, atol=EXACT)
        assert fires[top.layer[prompt] * n + top.neuron[prompt]].all()
        assert (top.most[prompt] >= scores - EXACT).where(a.exists, torch.tensor(data=True)).all()
        assert (top.most[prompt][a.exists & ~fires] == 0).all()
        assert (top.most[prompt][~a.exists] == -torch.inf).all()
        assert int(top.n_scored[prompt]) <= int(fires.sum())


@pytest.mark.parametrize("architecture", UNCAPPED)
def test_an_expert_scores_as_its_whole_output(architecture: str) -> None:
    a, model = attribution(architecture), in_float64(architecture)
    scores, r = a.expert_scores, a.cache
    assert scores is not None and r.chosen is not None
    assert (scores.isnan() == ~r.chosen.transpose(0, 1)).all()
    layer, prompt = LAYERS - 1, 0
    starts = [*a.decomposition.ffn_layout(layer).starts, a.decomposition.ffn_layout(layer).size]
    for expert in r.chosen[layer, prompt].nonzero()[:, 0].tolist():
        if a.cache.ffn_scale[layer].ne(1).any() or architecture == "gpt_oss":
            vector = expert_vectors(a.decomposition, r, layer)[prompt, expert].double()
        else:
            slots = list(range(starts[expert], starts[expert + 1]))
            vector = changes(model, layer, IDS[prompt], without(a.decomposition, layer, slots))
        x = before_ffn(a, layer, prompt)
        expected = log_p(a, x + vector, prompt) - log_p(a, x, prompt)
        assert abs(float(scores[prompt, layer, expert] - expected)) < EXACT


def test_every_neuron_is_listed_once_and_none_of_experts_that_were_not_chosen() -> None:
    a = attribution("deepseek_v3")
    every = a.ffn_every(a.ffn_top(5))
    n = a.decomposition.n_slots
    assert a.fires is not None
    for prompt in range(len(IDS)):
        some = every.layer[prompt] >= 0
        flat = (every.layer[prompt] * n + every.neuron[prompt])[some]
        assert sorted(flat.tolist()) == a.fires[prompt].flatten().nonzero()[:, 0].tolist()
        assert some[: int(some.sum())].all()  # ranks have no gaps
        exact = brute_of(a, prompt)[flat]
        assert ((every.lower[prompt][some] - EXACT <= exact) & (exact <= every.upper[prompt][some] + EXACT)).all()


@shared_kinds
def test_all_methods_rank_neurons_that_fire(architecture: str) -> None:
    a = attribution(architecture)
    assert a.fires is not None
    for method, best in best_neurons(a, 10).items():
        assert method in METHODS
        assert (best >= 0).all() and a.fires.flatten(1).gather(1, best).all()
    norms = torch.cat([a.decomposition.ffn_columns(i).norm(dim=1) for i in range(LAYERS)])
    expected = norms.where(a.fires[0].flatten(), torch.tensor(-torch.inf)).topk(10).values
    if a.cache.ffn_scale.eq(1).all():
        torch.testing.assert_close(norms[best_neurons(a, 10)["norm"][0]], expected)


def few(architecture: str) -> Decomposition:
    model = mixture(architecture, num_hidden_layers=1, intermediate_size=3)
    model.set_experts_implementation("eager")  # the default needs widths of 4 and more
    return decompose(loaded(model))


def test_fewer_neurons_than_asked_for_leave_places_empty() -> None:
    decomposition = few("mixtral")
    a = Attribution(decomposition, run_with_cache(decomposition, IDS), torch.tensor(TARGETS))
    for best in best_neurons(a, 10).values():
        assert ((best >= 0).sum(1) == 2 * 3).all()
    assert ((a.ffn_top(10).layer >= 0).sum(1) == 2 * 3).all()


def test_a_neuron_that_was_not_chosen_scores_nothing_in_that_prompt() -> None:
    a = attribution("mixtral")
    assert a.fires is not None
    fires = a.fires.flatten(1)
    some = (fires.any(0) & ~fires.all(0)).nonzero()[:6, 0]
    score, error = a.ffn_nearly(some)
    assert (score[~fires[:, some]] == 0).all() and (error[~fires[:, some]] == 0).all()
    assert (score[fires[:, some]] != 0).any()


@shared_kinds
def test_query_neurons_are_those_whose_experts_were_chosen(architecture: str) -> None:
    a = attribution(architecture)
    values = a.ffn_top(8)
    q = a.ffn_queries(values)
    layer, prompt = 1, 0
    at = int(a.cache.last[prompt])
    m = (a.cache.coefficients[0, prompt, at] * a.cache.ffn_scale[0, prompt, at]).double()
    expected = torch.zeros(a.decomposition.n_slots, dtype=torch.float64)
    for i in range(8):
        layer = int(values.layer[prompt, i])
        if layer > 0:
            key = a.decomposition.ffn_keys(layer)[int(values.neuron[prompt, i])].double()
            total = key @ before_ffn(a, layer, prompt)
            expected += values.score[prompt, i] / total * (m * (a.decomposition.ffn_columns(0).double() @ key))
    fires = a.fires[prompt, 0] if a.fires is not None else None
    assert fires is not None
    torch.testing.assert_close(q.neurons[prompt, 0][fires].double(), expected[fires], rtol=1e-3, atol=1e-4)
    assert (q.neurons[prompt, 0][~fires] == -torch.inf).all()


# Interventions ---------------------------------------------------------------------------------------------------


def logp_of(model: Any, ids: list[int], target: int) -> float:
    with torch.inference_mode():
        return float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[target])


@mixtures
def test_zeroing_a_whole_expert_is_the_model_without_its_columns(architecture: str) -> None:
    a, model = attribution(architecture), in_float64(architecture)
    decomposition, layer = a.decomposition, 1
    layout = decomposition.ffn_layout(layer)
    assert a.cache.chosen is not None
    expert = int(a.cache.chosen[layer, 0].nonzero()[0])
    slots = list(range(layout.starts[expert], [*layout.starts, layout.size][expert + 1]))
    trials = [
        Trial(IDS[0], TARGETS[0], Silenced(ffn={layer: some}), everywhere=True) for some in (slots, slots[:1], [])
    ]
    effects = run_trials(decomposition, trials)
    for logp, some in zip(effects.logp, (slots, slots[:1], []), strict=True):
        undo = without(decomposition, layer, some)(block_of(model, layer))
        assert logp == pytest.approx(logp_of(model, IDS[0], TARGETS[0]), abs=1e-4)
        undo()


@shared_kinds
def test_replacing_coefficients_by_their_own_changes_nothing(architecture: str) -> None:
    decomposition = decomposed(architecture)
    passes = [Pass(ids, (len(ids) - 1,), target) for ids, target in zip(IDS, TARGETS, strict=True)]
    values = recorded(decomposition, IDS, [p.positions for p in passes], ["ffn_neuron", "ffn"])
    slot = firing(attribution(architecture), 0, 1)[2]
    patches = [Patch(0, Part("ffn_neuron", 1, neuron=slot), values[0]["ffn_neuron"][1][:, slot : slot + 1])]
    patches.append(Patch(0, Part("ffn", 1), values[0]["ffn"][1]))
    assert abs(patched(decomposition, passes, patches).logp).max() < 1e-5
    patches = [Patch(0, Part("ffn_neuron", 1, neuron=slot), torch.zeros(1, 1))]
    zeroed = run_trials(decomposition, [Trial(IDS[0], TARGETS[0], Silenced(ffn={1: [slot]}), everywhere=False)])
    whole = run_trials(decomposition, [Trial(IDS[0], TARGETS[0], Silenced(), everywhere=False)])
    change = patched(decomposition, passes, patches).logp[0]
    assert change == pytest.approx(zeroed.logp[0] - whole.logp[0], abs=1e-5)


@shared_kinds
def test_gradients_of_coefficients_are_slopes_of_patches(architecture: str) -> None:
    decomposition = decomposed(architecture)
    passes = [Pass(IDS[0], (len(IDS[0]) - 1,), TARGETS[0])]
    slot = firing(attribution(architecture), 0, 1)[2]
    own = recorded(decomposition, IDS[:1], [passes[0].positions], ["ffn_neuron"])[0]["ffn_neuron"][1][
        :, slot : slot + 1
    ]
    slope = float(gradients(decomposition, passes, ["ffn_neuron"])[0]["ffn_neuron"][0, 1, 0, slot])
    step = 0.05
    patches = [Patch(0, Part("ffn_neuron", 1, neuron=slot), own + sign * step) for sign in (1, -1)]
    up, down = patched(decomposition, passes, patches).logp
    assert (up - down) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=1e-3)


def test_passes_leave_no_trace_in_the_model() -> None:
    decomposition = decomposed("mixtral")
    modules = [*decomposition.loaded.model.modules()]

    def attached() -> list[Any]:
        return [(vars(m).get("forward"), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]

    before = attached()
    with decomposition.blocks[0].ffn.sources[0].part.watched(lambda _fired: None):
        assert attached() != before
    run_with_cache(decomposition, IDS)
    assert attached() == before


# Parts -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 0.1), min_size=1, max_size=3), st.integers(0, 2**16))
def test_factors_of_a_sum_are_found(factors: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(4, 16, generator=generator) for _ in factors]
    total = sum((f * part for f, part in zip(factors, parts, strict=True)), torch.zeros(4, 16))
    found = factors_in(total, parts)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor(factors).expand(4, -1), rtol=1e-3, atol=1e-3)
    assert factors_in(torch.randn(4, 16, generator=generator) * 10, parts) is None


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**16))
def test_weights_are_spread_over_all_experts(n_experts: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(n_experts + 1, generator=generator)[:k] for _ in range(5)])  # n: no expert
    weight = torch.rand(index.shape, generator=generator)
    spread, chosen = Routing(index, weight).spread(n_experts)
    for token in range(5):
        own = {int(e): float(w) for e, w in zip(index[token], weight[token], strict=True) if e < n_experts}
        assert set(chosen[token].nonzero()[:, 0].tolist()) == set(own)
        assert {e: float(spread[token, e]) for e in own} == pytest.approx(own)
        assert int((spread[token] != 0).sum()) == len(own)
