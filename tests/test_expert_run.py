"""A run of a small mixture of experts: what is stored of its neurons, experts and routers, against transformers."""

from __future__ import annotations

import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import Result
from helpers.tiny_models import loaded, prompts, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kdb
from kdb.ingest.attribution.score_rows import expert_rows, layouts_of, neuron_rows, router_rows
from kdb.ingest.attribution.scores import Attribution
from kdb.ingest.forward.activation_cache import run_with_cache
from kdb.ingest.forward.decomposition import decompose
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

N_EXPERTS, WIDTH, DENSE_WIDTH, CHOSEN = 6, 8, 32, 2
VARIANT = "top-k=40 ablate-k=3 no-effects"
TEXTS = {"sky": ["The sky of Rome is", "The sky of Bern is", "The sky is"], "sea": ["The sea of Oslo is", "The sea is"]}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A Qwen3-MoE of three layers, of which the first is dense, with the tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("models") / "mixture"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"intermediate_size": DENSE_WIDTH, "moe_intermediate_size": WIDTH, "num_key_value_heads": 1}
    sizes |= {"num_experts": N_EXPERTS, "num_experts_per_tok": CHOSEN, "mlp_only_layers": [0], "norm_topk_prob": True}
    sizes |= {"max_position_embeddings": 128, "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(mixture: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(mixture: Path) -> Any:
    return AutoTokenizer.from_pretrained(mixture)


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, run_kdb: Callable[..., Result], mixture: Path, plain: Any, tokenizer: Any
) -> Warehouse:
    """A warehouse with a run in which the model knows all answers but those of the last prompt of each category."""

    def letters(text: str) -> list[str]:
        logits = plain(torch.tensor([tokenizer(f"{text} ")["input_ids"]])).logits[0, -1]
        ids = tokenizer.convert_tokens_to_ids(list(string.ascii_letters))
        return [string.ascii_letters[i] for i in logits[ids].argsort(descending=True).tolist()]

    lines = ["prompt,answer,category"]
    for kind, texts in TEXTS.items():
        lines += [f"{text},{letters(text)[0]}x,{kind}" for text in texts]
        lines.append(f"What {kind} is,{letters(f'What {kind} is')[-1]}x,{kind}")
    folder = tmp_path_factory.mktemp("experts")
    (folder / "facts.csv").write_text("\n".join(lines) + "\n")
    given = ("--model", mixture, "--dataset", folder / "facts.csv", "--top-k", "40", "--ablate-k", "3", "--no-effects")
    result = run_kdb("ingest", *given, "--device", "cpu", "--warehouse", folder / "w")
    assert result.exit_code == 0, result.output
    return Warehouse(folder / "w")


def kept_prompts(measured: Warehouse) -> list[dict[str, Any]]:
    rows = measured.sql("SELECT prompt_id, token_ids, target_token_id FROM prompts WHERE kept ORDER BY ALL")
    assert len(rows) > 2
    return rows.to_dicts()


def routed(plain: Any, token_ids: list[int]) -> list[torch.Tensor]:
    """The probabilities of the experts at the last position, of each layer with experts, by transformers."""
    logits = plain(torch.tensor([token_ids]), output_router_logits=True).router_logits
    return [layer.view(len(token_ids), N_EXPERTS)[-1].softmax(-1) for layer in logits if layer is not None]


def test_the_layout_of_the_layers_is_stored(measured: Warehouse) -> None:
    rows = measured.sql("SELECT layer, expert, shared, n_neurons FROM experts ORDER BY ALL").rows()
    of_experts = [(layer, expert, False, WIDTH) for layer in (1, 2) for expert in range(N_EXPERTS)]
    assert rows == [(0, None, None, DENSE_WIDTH), *of_experts]


def test_the_stored_routing_is_that_of_transformers(measured: Warehouse, plain: Any) -> None:
    for one in kept_prompts(measured):
        of_prompt = pl.col("prompt_id") == one["prompt_id"]
        router = measured.sql("SELECT * FROM router ORDER BY layer, rank").filter(of_prompt)
        entropies = measured.sql("SELECT * FROM routing ORDER BY layer").filter(of_prompt)["entropy"].to_list()
        assert set(router["layer"]) == {1, 2}
        for layer, p, entropy in zip((1, 2), routed(plain, one["token_ids"]), entropies, strict=True):
            stored = router.filter(layer=layer)
            best = p.topk(min(CHOSEN + 4, N_EXPERTS))
            assert stored["expert"].to_list() == best.indices.tolist()
            assert stored["chosen"].to_list() == [True] * CHOSEN + [False] * (len(stored) - CHOSEN)
            assert stored["probability"].to_list() == pytest.approx(best.values.tolist(), abs=1e-5)
            weights = best.values[:CHOSEN] / best.values[:CHOSEN].sum()
            assert stored["weight"].to_list() == pytest.approx(
                [*weights.tolist(), *[0] * (len(stored) - CHOSEN)], abs=1e-5
            )
            assert entropy == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)


def test_only_chosen_experts_and_their_neurons_have_scores(measured: Warehouse) -> None:
    chosen = set(measured.sql("SELECT prompt_id, layer, expert FROM router WHERE chosen").rows())
    assert set(measured.sql("SELECT prompt_id, layer, expert FROM expert_scores").rows()) == chosen
    neurons = measured.sql("SELECT * FROM neuron_scores WHERE component = 'ffn'")
    assert set(neurons.filter(pl.col("layer") > 0).select("prompt_id", "layer", "expert").rows()) <= chosen
    assert neurons.filter(layer=0)["expert"].null_count() == neurons.filter(layer=0).height > 0
    assert neurons.filter(pl.col("layer") > 0)["neuron"].max() < WIDTH


def test_the_tokens_of_an_experts_neuron_are_those_of_its_column(
    measured: Warehouse, plain: Any, tokenizer: Any
) -> None:
    rows = measured.sql(
        "SELECT layer, expert, neuron, token_id, logit FROM neuron_tokens "
        "WHERE component = 'ffn' AND sign = 'top' AND rank = 1 ORDER BY ALL"
    )
    assert rows["expert"].n_unique() > 2
    table = plain.lm_head.weight * plain.model.norm.weight
    for layer, expert, neuron, token, logit in rows.rows():
        down = plain.model.layers[layer].mlp
        column = down.down_proj.weight if expert is None else down.experts.down_proj[expert]
        logits = table @ column[:, neuron]
        assert (int(logits.argmax()), float(logits.max())) == (token, pytest.approx(logit, abs=1e-4))


def test_saved_queries_answer_about_experts(measured: Warehouse) -> None:
    best = measured.query("top-experts", k=1_000, variant=VARIANT)
    assert best["expert_name"].str.contains(r"^f[12]\.\d$").all()
    assert (best["n_used"] <= best["n_prompts"]).all()
    means = measured.sql(
        "SELECT category, layer, expert, sum(score) / any_value(n) AS score FROM expert_scores "
        "JOIN prompts USING (prompt_id) "
        "JOIN (SELECT category, count(*) AS n FROM prompts WHERE kept GROUP BY ALL) USING (category) "
        "GROUP BY ALL"
    )
    assert best.join(means, on=["category", "layer", "expert"]).height == len(best) == len(means)
    found = best.join(means, on=["category", "layer", "expert"])
    assert found["score"].to_list() == pytest.approx(found["score_right"].to_list())
    name = measured.query("top-neurons", component="ffn", variant=VARIANT).filter(pl.col("expert").is_not_null())[
        "neuron_name"
    ][0]
    assert len(measured.query("neuron-tokens", neuron=name, variant=VARIANT)) == 20


@pytest.mark.parametrize("what", ["an expert", "a neuron of an expert"])
def test_an_ablation_of_an_expert_is_that_of_its_weights(
    measured: Warehouse, run_kdb: Callable[..., Result], mixture: Path, plain: Any, what: str
) -> None:
    layer, expert = measured.query("top-experts", k=1, variant=VARIANT).select("layer", "expert").row(0)
    neuron = "NULL" if what == "an expert" else "2"
    query = f"SELECT {layer} AS layer, 'ffn' AS component, NULL AS head, {expert} AS expert, {neuron} AS neuron"
    label = what.replace(" ", "-")
    given = ("--model", mixture, "--dataset", "facts", "--variant", VARIANT, "--label", label)
    options = ("--mode", "zero", "--positions", "all", "--no-held-out", "--controls", "2", "--device", "cpu")
    folder = measured.storage.local.path
    result = run_kdb("ablate", *given, *options, "--query", query, "--warehouse", folder)
    assert result.exit_code == 0, result.output
    name = f"f{layer}.{expert}" + ("" if neuron == "NULL" else "_2")
    assert f"Replaced: {name}\n" in result.stdout
    columns = plain.model.layers[layer].mlp.experts.down_proj
    before = columns[expert].clone()
    columns[expert][:, slice(None) if neuron == "NULL" else int(neuron)] = 0
    opened = Warehouse(folder)
    after = opened.sql('SELECT prompt_id, logp_after FROM ablations WHERE "method" = ?', [label])
    known = {one["prompt_id"]: one for one in kept_prompts(measured)}
    assert set(after["prompt_id"]) == set(known)
    for prompt_id, logp in after.rows():
        logits = plain(torch.tensor([known[prompt_id]["token_ids"]])).logits[0, -1]
        assert logp == pytest.approx(float(logits.log_softmax(-1)[known[prompt_id]["target_token_id"]]), abs=1e-4)
    columns[expert] = before


def test_a_neuron_without_its_expert_is_refused(
    measured: Warehouse, run_kdb: Callable[..., Result], mixture: Path
) -> None:
    given = ("--model", mixture, "--dataset", "facts", "--variant", VARIANT, "--no-held-out")
    cases = {
        "1 AS layer, NULL AS expert, 2 AS neuron": "names no expert (0 to 5 exist)",
        "0 AS layer, 1 AS expert, 2 AS neuron": "names expert 1 of layer 0, which has none (use NULL)",
        "1 AS layer, 6 AS expert, NULL AS neuron": "names expert 6 (0 to 5 exist)",
        "1 AS layer, 5 AS expert, 8 AS neuron": "names FFN neuron 8 (0 to 7 exist)",
        "1 AS layer, 2 AS neuron": "the columns layer, component, head, neuron, expert; it lacks expert",
    }
    for columns, message in cases.items():
        query = f"SELECT 'ffn' AS component, NULL AS head, {columns}"
        result = run_kdb("ablate", *given, "--query", query, "--warehouse", measured.storage.local.path)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


OTHERS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    | {"shared_expert_intermediate_size": 12},
    "deepseek_v3": {"num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 2}
    | {"topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1}
    | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_a_shared_expert_has_a_score_and_is_not_routed(architecture: str) -> None:
    decomposition = decompose(loaded(tiny_model(architecture, **OTHERS[architecture])))
    cache = run_with_cache(decomposition, prompts([7, 7]))
    a, ids = Attribution(decomposition, cache, torch.tensor([3, 4])), np.array([5, 9])
    with torch.inference_mode():
        router, _routing = (pl.DataFrame(rows) for rows in router_rows(ids, a))
        scores = pl.DataFrame(expert_rows(ids, a))
        every = pl.DataFrame(neuron_rows(ids, layouts_of(decomposition), a.ffn_every(a.ffn_top(20))))
    n_routed = max(of.n_routed for of in layouts_of(decomposition))
    place = ["prompt_id", "layer", "expert"]
    chosen = router.filter("chosen").select(place).rows()
    shared = scores.filter(pl.col("expert") >= n_routed).select(place).rows()
    assert router["expert"].max() < n_routed
    assert len(shared) == len(scores.unique(["prompt_id", "layer"]))
    assert sorted(scores.select(place).rows()) == sorted([*chosen, *shared])
    # Every neuron that fires has a row, and ranks have no gaps.
    fires = every.drop_nulls("expert").select(place).unique().rows()
    assert sorted(fires) == sorted([*chosen, *shared])
    for _id, rows in every.group_by("prompt_id"):
        assert rows["rank"].to_list() == list(range(1, len(rows) + 1))
    # Chosen experts come first, even if groups or a bias preferred them to more probable ones.
    for _place, rows in router.group_by("prompt_id", "layer"):
        assert rows["chosen"].to_list() == [True] * 2 + [False] * 4
        assert rows["probability"].tail(4).is_sorted(descending=True)


def test_one_prompt_has_the_scores_and_weights_of_the_experts_that_are_used(mixture: Path) -> None:
    found = kdb.attribute(mixture, "The sky of Rome is", "a")
    assert found.experts["score"].is_sorted(descending=True)
    by_layer = found.experts.group_by("layer").agg(pl.len(), pl.col("weight").sum()).sort("layer")
    assert by_layer["layer"].to_list() == [1, 2] and set(by_layer["len"]) == {CHOSEN}
    assert by_layer["weight"].to_list() == pytest.approx([1, 1], abs=1e-6)
    assert "<th>expert</th>" in found._repr_html_()
