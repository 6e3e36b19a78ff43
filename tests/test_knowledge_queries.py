"""The second study's saved queries, on a warehouse small enough to reckon by hand.

``alpha`` has three layers of two heads. Of its seven prompts four are kept: two of language, one of capital, one of
``zoo``, a category of the user's own; month has none that is. Prompts that are not kept have scores of 100, which
would change every answer. ``beta`` has one layer and one prompt, and a run that lacks most tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import Result
from helpers.knowledge_rows import (
    ALPHA,
    HURT,
    ablation_rows,
    add_knowledge,
    effect_rows,
    ffn_rows,
    head_rows,
    layer_rows,
    lens_rows,
    prompt,
    router_rows,
    token_rows,
)
from helpers.stored import NOON, Rows, add_run, assert_same_in_the_shell, create_lake, needs_shell
from scipy.stats import binomtest, hypergeom

import kdb
from kdb.errors import QueryError, UnknownNameError
from kdb.queries.catalogue import load_catalogue
from kdb.warehouse.database import Database
from kdb.warehouse.folder_storage import FolderStorage

pytestmark = pytest.mark.slow

LATER = NOON + timedelta(hours=1)
REQUIRED: dict[str, dict[str, Any]] = {
    "prompt-story": {"prompt": 0},
    "lens-story": {"prompt": 0},
    "head-by-category": {"layer": 1, "head": 0},
    "head-in-prompts": {"layer": 1, "head": 0},
    "neuron-by-category": {"neuron": "f0_3"},
    "neuron-in-prompts": {"neuron": "f0_3"},
    "neuron-tokens": {"neuron": "f0_3"},
}
KNOWLEDGE = [name for name, query in load_catalogue().items() if query.group == "knowledge"]
KNOWLEDGE.remove("scores-by-step")  # of checkpoints, which test_plan_file.py has


BETA: dict[str, Rows] = {
    "models": [{"n_layers": 1, "dtype": "bfloat16"}],
    "prompts": [prompt(0, "language")],
    "layer_scores": layer_rows(0, attn=[2.0], ffn=[3.0]),
    "head_scores": head_rows(0, [7.0]),
    "neuron_scores": ffn_rows(0, (0, 1, 1.0)),
}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lake = create_lake(tmp_path_factory.mktemp("warehouse"))
    add_knowledge(lake, "alpha", "facts", "a" * 16, ALPHA, device="cpu")
    add_knowledge(lake, "beta", "facts", "b" * 16, BETA, device="cuda")
    failed = [{"check": "logits", "value": 3.0, "tolerance": 0.0, "passed": False}]
    noted = {"checks": failed, "models": [{"n_layers": 3, "dtype": "float16", "quantization": "int8"}]}
    add_knowledge(lake, "alpha", "facts", "c" * 16, noted, variant="int8", device="cpu")
    near = [{"check": "resid_post", "value": 0.9, "tolerance": 1.0, "passed": True}]
    add_run(lake, "alpha", "facts", "d" * 16, checks=near, prompts=[{"prompt_id": 0}], runs=[{"finished_at": LATER}])
    return lake


@pytest.fixture(scope="module")
def database(lake: Path) -> Database:
    return Database(lake)


def test_top_layers(database: Database) -> None:
    rows = database.query("top-layers", model="alpha")
    assert rows.columns[:6] == ["model", "dataset", "category", "rank", "layer_name", "component"]
    assert rows.select("category", "rank", "layer_name", "score", "n_prompts").rows() == [
        ("language", 1, "a0", 2.0, 2),
        ("language", 2, "f1", 1.5, 2),
        ("language", 3, "a1", 1.0, 2),
        ("language", 4, "f0", 0.5, 2),
        *(("capital", rank, name, 1.0, 1) for rank, name in enumerate(["a0", "f0", "a1", "f1"], start=1)),
        *(("zoo", 1, "a0", 1.0, 1), ("zoo", 2, "a1", 0.0, 1), ("zoo", 3, "f1", 0.0, 1), ("zoo", 4, "f0", -1.0, 1)),
    ]
    assert database.query("top-layers", k=1, category="language").select("model", "layer_name").rows() == [
        ("alpha", "a0"),
        ("beta", "f0"),
    ]


def test_top_heads(database: Database) -> None:
    rows = database.query("top-heads", model="alpha", category=["capital", "language"])
    assert rows.select("category", "rank", "head_name", "layer", "head", "score", "n_prompts").rows() == [
        ("language", 1, "a1.0", 1, 0, 3.0, 2),
        ("language", 2, "a0.0", 0, 0, 1.0, 2),
        ("language", 3, "a1.1", 1, 1, 1.0, 2),
        ("language", 4, "a0.1", 0, 1, 0.0, 2),
        ("capital", 1, "a1.0", 1, 0, 5.0, 1),
        ("capital", 2, "a0.1", 0, 1, 1.0, 1),
        ("capital", 3, "a0.0", 0, 0, 0.0, 1),
        ("capital", 4, "a1.1", 1, 1, 0.0, 1),
    ]


def test_top_experts_count_as_0_where_they_are_not_used(database: Database) -> None:
    rows = database.query("top-experts", model="alpha", category=["capital", "language"])
    assert rows.select("category", "rank", "expert_name", "layer", "expert", "score", "n_used", "n_prompts").rows() == [
        ("language", 1, "f2.0", 2, 0, 2.0, 2, 2),
        ("language", 2, "f2.1", 2, 1, 1.0, 1, 2),
        ("capital", 1, "f2.0", 2, 0, 0.5, 1, 1),
        ("capital", 2, "f2.1", 2, 1, 0.25, 1, 1),
    ]


def test_the_share_of_prompts_in_which_an_expert_is_chosen_has_its_wilson_interval(database: Database) -> None:
    rows = database.query("router-by-category", model="alpha", category="language")
    ends = binomtest(1, 2).proportion_ci(method="wilson")
    shares = [50.0, pytest.approx(100 * ends.low), pytest.approx(100 * ends.high)]
    columns = ("layer", "rank", "expert_name", "expert", "weight", "entropy", "n_prompts")
    assert rows.select(columns).rows() == [(2, 1, "f2.0", 0, 0.5, 0.125, 2), (2, 2, "f2.1", 1, 0.5, 0.125, 2)]
    assert rows.select("chosen_percent", "chosen_percent_low", "chosen_percent_high").rows() == [tuple(shares)] * 2
    assert database.query("router-by-category", model="alpha", k=1)["expert_name"].to_list() == ["f2.0", "f2.1", "f2.2"]


def test_attribution_methods(database: Database) -> None:
    rows = database.query("attribution-methods")
    assert rows.drop("logp_controls", "n_controls", "n_independent", "control_ratio", "p", "held_out").rows() == [
        ("alpha", "facts", "o", "none", 0, "zero", 0.5, pytest.approx(30), -2.0, 3),
        ("alpha", "facts", "a", "log_prob_increase", 5, "zero", 0.5, pytest.approx(30), -2.0, 3),
        ("alpha", "facts", "a", "log_prob_increase", 10, "zero", pytest.approx(1 / 3), pytest.approx(10), -4.0, 3),
        ("alpha", "facts", "d", "norm", 10, "zero", 0.5, pytest.approx(30), -2.0, 3),
    ]
    assert database.query("attribution-methods", k=5)["method"].to_list() == ["none", "log_prob_increase"]
    language = database.query("attribution-methods", positions="all", category="language")
    assert language.select("letter", "mrr", "n_prompts").rows() == [("o", 0.625, 2), ("d", 0.375, 2)]


def test_methods_beyond_the_papers_come_last(lake: Path, tmp_path: Path) -> None:
    names = ["random", "coefficient_rank", "mine", "log_prob", "prob_increase", "coefficient", "rank"]
    names += ["coefficient_norm", "norm", "log_prob_increase"]
    rows = [row for name in names for row in ablation_rows(name, 10, {0: HURT[0]})]
    lake = create_lake(tmp_path)
    tables = {"prompts": [prompt(0, "language")], "ablations": rows}
    add_knowledge(lake, "alpha", "facts", "a" * 16, tables, variant="ablate")
    with Database(lake) as database:
        assert database.query("attribution-methods").is_empty()
        found = database.query("attribution-methods", variant="ablate")
        assert "".join(letter or "-" for letter in found["letter"]) == "oabcdefgh--"
        assert found["method"].to_list()[-2:] == ["mine", "random"]
        assert found.equals(database.query("attribution-methods", run="a" * 16))


def test_value_neurons_by_layer(database: Database) -> None:
    rows = database.query("value-neurons-by-layer", model="alpha")
    assert set(rows.filter(category="language")["n_prompts"]) == {2}
    assert rows.drop("model", "dataset", "n_prompts").rows() == [
        ("language", "attn", 0, 1.0, 50.0, 1.2),
        ("language", "attn", 1, 1.0, 50.0, 0.75),
        ("language", "attn", 2, 0.0, 0.0, 0.0),
        ("language", "ffn", 0, 1.0, 50.0, 3.0),
        ("language", "ffn", 1, 1.0, 50.0, 2.5),
        ("language", "ffn", 2, 0.0, 0.0, 0.0),
        ("capital", "ffn", 0, 1.0, 50.0, 1.0),
        ("capital", "ffn", 1, 1.0, 50.0, 1.0),
        ("capital", "ffn", 2, 0.0, 0.0, 0.0),
    ]
    best = database.query("value-neurons-by-layer", k=1, component="ffn", category="capital")
    assert best["neurons"].to_list() == [0.0, 1.0, 0.0]
    assert database.query("value-neurons-by-layer", model="beta")["layer"].to_list() == [0]


def test_top_neurons(database: Database) -> None:
    rows = database.query("top-neurons", model="alpha")
    assert rows.select("category", "component", "rank", "neuron_name", "score", "n_prompts", "n_kept").rows() == [
        ("language", "attn", 1, "a0.0_4", 1.2, 2, 2),
        ("language", "attn", 2, "a1.1_5", 0.75, 1, 2),
        ("language", "ffn", 1, "f0_3", 3.0, 2, 2),
        ("language", "ffn", 2, "f1_7", 2.0, 1, 2),
        ("language", "ffn", 3, "f1_9", 0.5, 1, 2),
        ("capital", "ffn", 1, "f0_3", 1.0, 1, 1),
        ("capital", "ffn", 2, "f1_9", 1.0, 1, 1),
    ]
    best = database.query("top-neurons", model="alpha", component="ffn", k=1)
    assert best["neuron_name"].to_list() == ["f0_3", "f0_3"]


def test_a_candidates_mean_counts_every_prompt_and_its_proved_rank_comes_before_sums_of_lists(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    candidate = [
        {"prompt_id": i, "component": "ffn", "layer": 0, "neuron": 3, "score": score}
        for i, score in ((0, 2.0), (1, -1.0))
    ]
    tables: dict[str, Rows] = {
        "models": [{"n_layers": 2}],
        "prompts": [prompt(0, "language"), prompt(1, "language")],
        "neuron_scores": ffn_rows(0, (1, 7, 4.0), (0, 3, 2.0)),
        "candidate_scores": candidate,
    }
    add_knowledge(lake, "alpha", "facts", "a" * 16, tables)
    with Database(lake) as database:
        ranked = database.query("top-neurons").select("rank", "neuron_name", "score", "exact", "n_prompts", "n_kept")
        assert ranked.rows() == [(1, "f0_3", 0.5, True, 2, 2), (2, "f1_7", 2.0, False, 1, 2)]
        assert database.query("neuron-scores").select("prompt_id", "neuron_name", "score").rows() == [
            *((0, "f1_7", 4.0), (0, "f0_3", 2.0)),
            (1, "f0_3", -1.0),
        ]
        found = database.query("neuron-by-category", neuron="f0_3").select("score", "n_prompts", "n_kept").rows()
        assert found == [(0.5, 2, 2)]
        found = database.query("neuron-in-prompts", neuron="f0_3").select("prompt_id", "score", "rank").rows()
        assert found == [(0, 2.0, 2), (1, -1.0, None)]


def test_tokens_of_a_neuron_are_one_text(database: Database) -> None:
    rows = database.query("top-neurons", model="alpha", category="language")
    tokens = {name: texts for name, *texts in rows.select("neuron_name", "top_tokens", "bottom_tokens").rows()}
    top = r'" Paris", "\n", "say \"hi\"", "d", "e", "f", "g", "h", "i", "j"'
    assert tokens["f0_3"] == [top, '"it\'s", " ü"']
    assert tokens["a0.0_4"] == ['" a"', None]
    assert tokens["f1_7"] == [None, None]


def test_query_neurons(database: Database) -> None:
    rows = database.query("query-neurons")
    assert rows.select("category", "activates", "rank", "neuron_name", "score", "n_prompts", "n_kept").rows() == [
        ("language", "attn", 1, "f0_8", 0.375, 2, 2),
        ("language", "attn", 2, "f0_3", 0.25, 1, 2),
        ("language", "ffn", 1, "f1_2", 0.25, 1, 2),
    ]
    assert rows["bottom_tokens"].to_list() == [None, '"it\'s", " ü"', None]
    assert database.query("query-neurons", activates="ffn")["neuron"].to_list() == [2]
    assert database.query("query-neurons", k=1)["neuron"].to_list() == [8, 2]


def test_one_neuron_by_category_and_prompt(database: Database) -> None:
    rows = database.query("neuron-by-category", neuron="f0_3", model="alpha")
    assert rows.select("category", "role", "score", "n_prompts", "n_kept").rows() == [
        ("language", "value neuron", 3.0, 2, 2),
        ("capital", "value neuron", 1.0, 1, 1),
        ("language", "query neuron of attn", 0.25, 1, 2),
    ]
    whole = database.query("attention-vs-ffn", model="alpha").select("category", sums=pl.sum_horizontal("^.*_score$"))
    shares = rows.join(whole, on="category", how="left", maintain_order="left").to_dicts()
    assert [row["layers_percent"] for row in shares[:2]] == pytest.approx(
        [100 * row["score"] / row["sums"] for row in shares[:2]]
    )
    assert shares[2]["layers_percent"] is None
    rows = database.query("neuron-in-prompts", neuron="f0_3", model="alpha")
    assert rows.select("role", "prompt_id", "score", "rank").rows() == [
        ("value neuron", 1, 4.0, 1),
        ("value neuron", 0, 2.0, 2),
        ("value neuron", 3, 1.0, 2),
        ("query neuron of attn", 0, 0.5, 1),
    ]


def test_an_attention_neurons_positions_are_added_up(database: Database) -> None:
    rows = database.query("neuron-in-prompts", neuron="a1.1_5", model="alpha")
    assert rows.select("prompt_id", "score", "rank").rows() == [(0, 1.5, 1)]
    assert database.query("neuron-in-prompts", neuron="a1.0_5", model="alpha").is_empty()


@pytest.mark.parametrize("name", ["", "f0", "f0_", "0_3", "f0_3; DROP", "a0_3", "f0.1.2_3", "f999999_0", "'", "é"])
def test_what_names_no_neuron_is_refused(database: Database, name: str) -> None:
    for query in ("neuron-by-category", "neuron-in-prompts", "neuron-tokens"):
        with pytest.raises(QueryError, match="parameter neuron: expected a name such as f29_1234"):
            database.query(query, neuron=name)


def test_the_tokens_of_one_neuron(database: Database) -> None:
    rows = database.query("neuron-tokens", neuron="f0_3", model="alpha").filter(rank=1)
    assert rows.select("sign", "token").rows() == [("top", '" Paris"'), ("bottom", '"it\'s"')]
    assert database.query("neuron-tokens", neuron="a0.0_4", model="alpha")["token"].to_list() == ['" a"']


def test_one_head_by_category_and_prompt(database: Database) -> None:
    rows = database.query("head-by-category", layer=1, head=0, model="alpha")
    assert rows.select("category", "rank", "score", "n_prompts").rows() == [
        ("language", 1, 3.0, 2),
        ("capital", 1, 5.0, 1),
        ("zoo", 2, 4.0, 1),
    ]
    rows = database.query("head-in-prompts", layer=1, head=0, model="alpha", k=3)
    assert rows.select("prompt_id", "score", "reads").rows() == [(3, 5.0, None), (1, 4.0, '" Spain"'), (6, 4.0, None)]
    assert set(rows["n_prompts"]) == {4}, "three of the four kept prompts"


def test_query_layers(database: Database) -> None:
    rows = database.query("query-layers")
    assert rows.select("category", "activates", "rank", "layer_name", "layer", "score", "n_prompts").rows() == [
        ("language", "attn", 1, "embed", None, 0.5, 2),
        ("language", "attn", 2, "a0", 0, 0.5, 2),
        ("language", "attn", 3, "f0", 0, 0.25, 2),
    ]
    assert database.query("query-layers", activates="ffn").is_empty()


def test_head_overlap(database: Database) -> None:
    rows = database.query("head-overlap", k=2)
    assert rows.select("model", "dataset", "category_a", "category_b", "shared", "jaccard").rows() == [
        ("alpha", "facts", "language", "capital", 1, pytest.approx(1 / 3)),
        ("alpha", "facts", "language", "zoo", 2, 1.0),
        ("alpha", "facts", "capital", "zoo", 1, pytest.approx(1 / 3)),
    ]
    assert rows.select("n_prompts_a", "n_prompts_b").rows() == [(2, 1), (2, 1), (1, 1)]
    assert database.query("head-overlap", k=1)["shared"].to_list() == [1, 0, 0]
    assert database.query("head-overlap")["jaccard"].to_list() == [1.0, 1.0, 1.0]  # all four heads


def test_neuron_overlap(database: Database) -> None:
    rows = database.query("neuron-overlap")
    assert rows.select("category_a", "category_b", "shared", "jaccard", "n_prompts_a", "n_prompts_b").rows() == [
        ("language", "capital", 2, pytest.approx(2 / 3), 2, 1),
    ]
    assert database.query("neuron-overlap", k=1).select("shared", "jaccard").rows() == [(1, 1.0)]
    assert database.query("neuron-overlap", component="attn").is_empty()


def test_attention_vs_ffn(database: Database) -> None:
    assert database.query("attention-vs-ffn").rows() == [
        ("alpha", "facts", "language", 3.0, 2.0, None, 60.0, 40.0, None, 2),
        ("alpha", "facts", "capital", 2.0, 2.0, None, 50.0, 50.0, None, 1),
        ("alpha", "facts", "zoo", 1.0, -1.0, None, None, None, None, 1),
        ("beta", "facts", "language", 2.0, 3.0, None, 40.0, 60.0, None, 1),
    ]


def test_kept_prompts(database: Database) -> None:
    assert database.query("kept-prompts", model="alpha").rows() == [
        ("alpha", "facts", "language", 3, 2, pytest.approx(200 / 3), 1, 0, 0),
        ("alpha", "facts", "capital", 2, 1, 50.0, 0, 0, 1),
        ("alpha", "facts", "month", 1, 0, 0.0, 1, 0, 0),
        ("alpha", "facts", "zoo", 1, 1, 100.0, 0, 0, 0),
    ]


def test_position_attention(database: Database) -> None:
    rows = database.query("position-attention")
    assert rows.drop("model", "dataset", "category").rows() == [
        (1, "a1.0", " Spain", 1, 0.25, 3.0),
        (1, "a1.0", " France", 1, 0.5, 2.0),
        (1, "a1.0", " of", 1, 0.25, 0.5),  # as much as the next: by token
        (1, "a1.0", " the", 2, 0.5, 0.5),
        (2, "a0.0", " the", 1, 1.0, 1.0),
    ]
    assert database.query("position-attention", tokens=1)["token"].to_list() == [" Spain", " the"]
    assert database.query("position-attention", min_prompts=2)["token"].to_list() == [" the"]


def test_heads_are_asked_for_by_rank_or_by_number(database: Database) -> None:
    def heads(**params: int) -> list[str]:
        return database.query("position-attention", **params)["head_name"].unique(maintain_order=True).to_list()

    assert heads(k=1) == ["a1.0"]
    assert heads(k=1, layer=0) == ["a0.0"]
    assert heads(k=1, head=0) == ["a1.0", "a0.0"]
    assert heads(layer=1, head=1) == []


def test_checks_of_both_studies_and_all_variants_with_those_that_did_not_pass_first(database: Database) -> None:
    rows = database.query("checks")
    assert rows.select("model", "dtype", "quantization", "device", "study", "variant", "check").rows() == [
        ("alpha", "float16", "int8", "cpu", "knowledge", "int8", "logits"),
        ("alpha", None, None, None, "concept", "default", "resid_post"),
        ("alpha", "float32", None, "cpu", "knowledge", "default", "logits"),
        ("alpha", "float32", None, "cpu", "knowledge", "default", "ffn_sum"),
    ]
    assert database.query("checks", study="concept")["value"].to_list() == [0.9]
    assert database.query("checks", variant="int8")["passed"].to_list() == [False]
    assert database.query("checks", model="beta").is_empty()


def test_runs(database: Database) -> None:
    assert database.query("runs")["run"].to_list() == [letter * 16 for letter in "abcd"]
    assert database.query("runs", model="alpha", study="knowledge")["variant"].to_list() == ["default", "int8"]


def test_several_models_stand_side_by_side(database: Database) -> None:
    def models(**params: object) -> list[str]:
        return database.query("top-heads", **params)["model"].unique(maintain_order=True).to_list()

    assert models() == models(model="all") == models(model=["beta", "alpha"]) == ["alpha", "beta"]
    assert models(model="beta") == ["beta"]
    assert models(model="beta", category="month") == []
    for given in ({"model": ["beta", "absent"]}, {"category": "absent"}, {"dataset": "absent"}):
        with pytest.raises(UnknownNameError, match="'absent'"):
            models(**given)


def test_a_list_of_models_is_repeated_on_the_command_line(tmp_path: Path, run_kdb: Callable[..., Result]) -> None:
    for number, model in enumerate(("alpha", "beta", "gamma")):
        with FolderStorage.create(tmp_path / "w").stage(f"{number:016x}", model, "facts") as staged:
            for table, rows in BETA.items():
                staged.write_rows(table, "part", rows)
            staged.commit({"study": "knowledge", "variant": "default"})

    def models(*options: str) -> list[str]:
        result = run_kdb("query", "top-heads", *options, "--warehouse", tmp_path / "w", "--format", "json")
        assert result.exit_code == 0, result.output
        return [row["model"] for row in json.loads(result.stdout)]

    assert models("--model", "gamma", "--model", "alpha") == ["alpha", "gamma"]
    assert models("--model", "beta", "--category", "language") == ["beta"]
    assert models() == models("--model", "all") == ["alpha", "beta", "gamma"]
    asked = kdb.open(tmp_path / "w").query("top-heads", model=("beta", "gamma"))
    assert asked["model"].to_list() == ["beta", "gamma"]


def test_wrong_lists_are_query_errors(database: Database) -> None:
    for given in ([], 7, ["alpha", 7]):
        with pytest.raises(QueryError, match="parameter model: expected one or several texts"):
            database.query("top-heads", model=given)


@pytest.mark.parametrize("name", KNOWLEDGE)
def test_a_run_is_asked_for_by_name(database: Database, name: str) -> None:
    given = REQUIRED.get(name, {})
    assert database.query(name, run="a" * 16, **given).equals(database.query(name, model="alpha", **given))
    for unknown in ({"run": "f" * 16}, {"variant": "absent"}):
        with pytest.raises(UnknownNameError):
            database.query(name, **unknown, **given)


@pytest.mark.parametrize("name", sorted(set(KNOWLEDGE) - set(REQUIRED)))
def test_every_answer_is_in_the_papers_order_of_categories(tmp_path: Path, name: str) -> None:
    order = ["language", "color", "number", "capital", "country", "month", "animal", "zoo"]
    ids = range(len(order))
    score = {"prompt_id": 0, "layer": 0, "head": 0, "neuron": 0, "score": 1.0, "rank": 1}
    kinds = {"component": "ffn", "activates": "ffn", "token": "x", "attention": 1.0, "method": "norm", "k": 1}
    after = {"positions": "last", "rank_before": 1, "rank_after": 1}
    rows = [score | kinds | after | {"prompt_id": i} for i in ids]
    scored = [table for table in ALPHA if table.endswith("_scores")]
    tables: dict[str, Rows] = dict.fromkeys((*scored, "ablations"), rows)
    tables["effects"] = [row for i in ids for row in effect_rows(i, 1.0, 2.0)]
    tables["lens_readouts"] = [row for i in ids for row in lens_rows(i, 1)]
    tables["router"] = [row for i in ids for row in router_rows(i, 0, 0, 1.0)]
    tables["models"] = [{"n_layers": 1}]
    tables["prompts"] = [prompt(i, category) for i, category in zip(ids, reversed(order), strict=True)]
    lake = create_lake(tmp_path)
    add_knowledge(lake, "m", "d", "a" * 16, tables)
    with Database(lake) as database:
        found = database.query(name)
    if "category" in found.columns:
        assert found["category"].unique(maintain_order=True).to_list() == order
        assert len(found["category"].rle()) == len(order), "no category is taken up again"
    elif "category_a" in found.columns:
        pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
        assert found.select("category_a", "category_b").rows() == pairs
    else:
        assert found["n_prompts"].to_list() == [8, 8]


# Several datasets ------------------------------------------------------------------------------------------------


MORE: dict[str, Rows] = {
    "models": [{"n_layers": 1}],
    "prompts": [prompt(0, "language"), prompt(1, "language")],
    "layer_scores": [*layer_rows(0, attn=[5.0], ffn=[0.0]), *layer_rows(1, attn=[5.0], ffn=[0.0])],
}


def test_datasets_with_the_same_category_are_added_up_only_with_pool(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    add_knowledge(lake, "beta", "facts", "b" * 16, BETA)
    add_knowledge(lake, "beta", "more", "c" * 16, MORE)
    with Database(lake) as database:
        assert database.query("top-layers").select("dataset", "rank", "layer_name", "score", "n_prompts").rows() == [
            *(("facts", 1, "f0", 3.0, 1), ("facts", 2, "a0", 2.0, 1)),
            *(("more", 1, "a0", 5.0, 2), ("more", 2, "f0", 0.0, 2)),
        ]
        pooled = database.query("top-layers", pool=True)
        assert pooled.select("dataset", "rank", "layer_name", "score", "n_prompts").rows() == [
            ("facts + more", 1, "a0", 4.0, 3),
            ("facts + more", 2, "f0", 1.0, 3),
        ]
        assert database.query("top-layers", pool=True, dataset="facts")["dataset"].unique().to_list() == ["facts"]
        # The other dataset has no neuron_scores: its prompts do not count as ones that lack the neuron.
        assert database.query("top-neurons", pool=True).select("dataset", "score", "n_kept").rows() == [
            ("facts", 1.0, 1)
        ]
        assert database.query("value-neurons-by-layer", pool=True)["neurons"].to_list() == [1.0]


POOLING = [name for name in KNOWLEDGE if "pool" in [param.name for param in load_catalogue()[name].params]]
OF_SINGLE_PROMPTS = {
    "ablation-effects",
    "expert-scores",
    "head-scores",
    "layer-scores",
    "neuron-scores",
    "prompts",
    "prompt-story",
    "lens-story",
}
HALVES = {"one": (0, 2, 4, 5), "two": (1, 3, 6)}


def part_of(tables: dict[str, Rows], prompts: tuple[int, ...]) -> dict[str, Rows]:
    """Return the rows of some prompts, and those of no prompt."""
    return {name: [row for row in rows if row.get("prompt_id", prompts[0]) in prompts] for name, rows in tables.items()}


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prompts of alpha as two datasets; both have kept prompts of language."""
    lake = create_lake(tmp_path_factory.mktemp("halved"))
    for number, (dataset, prompts) in enumerate(HALVES.items()):
        add_knowledge(lake, "alpha", dataset, f"{number}" * 16, part_of(ALPHA, prompts))
    return lake


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lake = create_lake(tmp_path_factory.mktemp("whole"))
    add_knowledge(lake, "alpha", "one + two", "f" * 16, ALPHA)
    return lake


def test_every_query_of_means_over_prompts_can_pool() -> None:
    assert set(KNOWLEDGE) - set(POOLING) == OF_SINGLE_PROMPTS | {"kept-prompts", "neuron-tokens"}
    assert "pool" in [param.name for param in load_catalogue()["scores-by-step"].params]


@pytest.mark.parametrize("name", POOLING)
def test_pooled_datasets_answer_as_one_dataset_of_all_their_prompts(halved: Path, whole: Path, name: str) -> None:
    given = REQUIRED.get(name, {})
    with Database(halved) as parts, Database(whole) as union:
        pooled, expected = parts.query(name, pool=True, **given), union.query(name, **given)
        if "prompt_id" in expected.columns:  # a single prompt keeps the name of its dataset
            pooled, expected = pooled.drop("dataset"), expected.drop("dataset")
        assert not expected.is_empty()
        assert pooled.equals(expected)
        assert not parts.query(name, **given).drop("dataset").equals(expected.drop("dataset", strict=False))


@pytest.mark.parametrize("name", POOLING)
def test_the_answer_about_a_dataset_does_not_depend_on_the_others(halved: Path, name: str) -> None:
    given = REQUIRED.get(name, {})
    with Database(halved) as database:
        found = database.query(name, **given)
        for dataset in HALVES:
            assert found.filter(dataset=dataset).equals(database.query(name, dataset=dataset, **given))


def test_checkpoints_of_two_datasets_are_added_up_only_with_pool(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    of_step = {"variant": "revision=step1", "settings": '{"step": 1}'}
    for dataset, run, tables in (("facts", "b" * 16, BETA), ("more", "c" * 16, MORE)):
        revised = {"models": [{"n_layers": 1, "revision": "step1"}]}
        add_knowledge(lake, "beta", dataset, run, tables | revised, **of_step)
    with Database(lake) as database:
        apart, pooled = database.query("scores-by-step"), database.query("scores-by-step", pool=True)
    assert apart.select("dataset", "step", "component", "score", "n_prompts").rows() == [
        *(("facts", 1, "attn", 2.0, 1), ("facts", 1, "ffn", 3.0, 1)),
        *(("more", 1, "attn", 5.0, 2), ("more", 1, "ffn", 0.0, 2)),
    ]
    assert pooled.select("dataset", "step", "component", "score", "n_prompts").rows() == [
        ("facts + more", 1, "attn", 4.0, 3),
        ("facts + more", 1, "ffn", 1.0, 3),
    ]


@needs_shell
@pytest.mark.parametrize("name", POOLING)
def test_the_shell_pools_as_kdb_does(halved: Path, name: str) -> None:
    with Database(halved) as database:
        assert_same_in_the_shell(halved, database, name, pool=True, **REQUIRED.get(name, {}))


def test_every_answer_of_means_shows_dataset_and_number_of_prompts(halved: Path) -> None:
    with Database(halved) as database:
        for name in POOLING:
            columns = database.query(name, **REQUIRED.get(name, {})).columns
            assert "dataset" in columns, name
            assert {"n_prompts", "n_prompts_a"} & set(columns), name


@pytest.mark.parametrize("given", ["perhaps", 1, 0.5, ["yes"]])
def test_pool_is_yes_or_no(database: Database, given: object) -> None:
    with pytest.raises(QueryError, match="parameter pool: expected yes or no, found"):
        database.query("top-heads", pool=given)


def test_pool_is_a_flag_on_the_command_line(tmp_path: Path, run_kdb: Callable[..., Result]) -> None:
    for number, (dataset, tables) in enumerate((("facts", BETA), ("more", MORE))):
        with FolderStorage.create(tmp_path / "w").stage(f"{number:016x}", "beta", dataset) as staged:
            for table, rows in tables.items():
                staged.write_rows(table, "part", rows)
            staged.commit({"study": "knowledge", "variant": "default"})

    def datasets(*options: str) -> list[str]:
        result = run_kdb("query", "top-layers", *options, "--warehouse", tmp_path / "w", "--format", "json")
        assert result.exit_code == 0, result.output
        return [row["dataset"] for row in json.loads(result.stdout)]

    assert datasets() == ["facts", "facts", "more", "more"]
    assert datasets("--pool") == ["facts + more", "facts + more"]
    helped = run_kdb("query", "top-layers", "--help")
    assert "--pool" in helped.stdout


# Chance ----------------------------------------------------------------------------------------------------------


def test_overlaps_have_their_level_by_chance(database: Database) -> None:
    heads = database.query("head-overlap", k=2)  # two of the six heads of three layers
    assert heads["shared_by_chance"].to_list() == pytest.approx([2 * 2 / 6] * 3)
    # 0, 1 or 2 shared in 6, 8 and 1 of the 15 pairs.
    assert heads["jaccard_by_chance"].to_list() == pytest.approx([(8 * 1 / 3 + 1 * 1) / 15] * 3)
    neurons = database.query("neuron-overlap")  # 3 and 2 of the 3 × 16 FFN neurons
    assert neurons["shared_by_chance"].to_list() == pytest.approx([3 * 2 / 48])
    attn = database.query("neuron-overlap", component="attn", category="language")
    assert attn.is_empty()


@pytest.mark.parametrize(("a", "b", "n"), [(1, 1, 1), (10, 10, 270), (4, 7, 9), (300, 300, 46080), (5, 5, 5)])
def test_the_level_by_chance_is_the_mean_over_random_draws(database: Database, a: int, b: int, n: int) -> None:
    shared, jaccard = database.sql(f"SELECT shared_by_chance({a}, {b}, {n}), jaccard_by_chance({a}, {b}, {n})").row(0)
    chances = {x: hypergeom.pmf(x, n, a, b) for x in range(max(0, a + b - n), min(a, b) + 1)}
    assert shared == pytest.approx(sum(x * p for x, p in chances.items()))
    assert jaccard == pytest.approx(sum(x / (a + b - x) * p for x, p in chances.items()), rel=1e-6)


def test_there_is_no_level_by_chance_where_the_size_of_the_model_is_not_stored(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    add_knowledge(lake, "alpha", "facts", "a" * 16, ALPHA | {"models": [{"n_layers": 3}]})
    with Database(lake) as database:
        for name in ("head-overlap", "neuron-overlap"):
            rows = database.query(name)
            assert set(rows["shared_by_chance"]) == set(rows["jaccard_by_chance"]) == {None}


def test_a_neuron_stored_with_two_datasets_has_its_tokens_once(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    tokens = token_rows("top", [" a", " b"], component="ffn", layer=0, neuron=1)
    for dataset, run in (("facts", "a" * 16), ("more", "b" * 16)):
        add_knowledge(lake, "beta", dataset, run, BETA | {"neuron_tokens": tokens})
    with Database(lake) as database:
        rows = database.query("top-neurons", pool=True).select("neuron_name", "n_prompts", "top_tokens").rows()
        assert rows == [("f0_1", 2, '" a", " b"')]
        rows = database.query("top-neurons").select("dataset", "neuron_name", "n_prompts", "top_tokens").rows()
        assert rows == [("facts", "f0_1", 1, '" a", " b"'), ("more", "f0_1", 1, '" a", " b"')]


def test_a_derived_run_has_the_prompts_of_its_source(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    add_knowledge(lake, "alpha", "facts", "a" * 16, {"prompts": ALPHA["prompts"], "models": ALPHA["models"]})
    derived = {"ablations": ablation_rows("mine", 10, HURT)}
    add_knowledge(lake, "alpha", "facts", "b" * 16, derived, variant="mine", source_run="a" * 16)
    with Database(lake) as database:
        rows = database.query("attribution-methods", variant="mine").select("method", "n_prompts").rows()
        assert rows == [("none", 3), ("mine", 3)]


def test_a_newer_run_replaces_the_older_and_the_other_study_does_not(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    add_knowledge(lake, "beta", "facts", "f" * 16, BETA)
    newer = BETA | {"prompts": [prompt(0, "color")]}
    add_knowledge(lake, "beta", "facts", "a" * 16, newer, finished_at=LATER)
    last = [{"finished_at": LATER + timedelta(hours=1)}]
    add_run(lake, "beta", "facts", "e" * 16, prompts=[{"prompt_id": 0}, {"prompt_id": 1}], runs=last)
    with Database(lake) as database:
        assert database.query("top-heads")["category"].to_list() == ["color"]
        assert database.query("kept-prompts").select("category", "n_prompts", "kept").rows() == [("color", 1, 1)]


def test_means_that_differ_by_rounding_alone_are_ties(tmp_path: Path) -> None:
    lake = create_lake(tmp_path)
    tenths = [0.1, 0.2, 0.3]  # added up in this order, 0.6000000000000001; in the other, 0.6
    scores = [row for i in range(3) for row in head_rows(i, [tenths[2 - i], tenths[i]])]
    add_knowledge(lake, "m", "d", "a" * 16, {"prompts": [prompt(i, "color") for i in range(3)], "head_scores": scores})
    with Database(lake) as database:
        assert database.query("top-heads").select("head", "score").rows() == [(0, 0.2), (1, 0.2)]


@needs_shell
@pytest.mark.parametrize("name", [*KNOWLEDGE, "checks", "runs"])
def test_saved_query_answers_the_same_in_the_shell(lake: Path, database: Database, name: str) -> None:
    assert_same_in_the_shell(lake, database, name, **REQUIRED.get(name, {}))


@needs_shell
def test_a_list_is_set_in_the_shell(lake: Path, database: Database) -> None:
    assert_same_in_the_shell(lake, database, "top-heads", model=["beta", "alpha"], category="language")
