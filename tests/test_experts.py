"""Neurons of experts: two of one layer have the same number, and no query may take them for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers.knowledge_rows import add_knowledge, prompt
from helpers.stored import Rows, create_lake

from kdb.analysis import figures
from kdb.queries.catalogue import load_catalogue
from kdb.warehouse.database import Database
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.store import Warehouse
from kdb.warehouse.sums import write_neuron_sums
from kdb.web.views import render

KNOWLEDGE = [name for name, query in load_catalogue().items() if query.group == "knowledge"]
CATEGORIES = ("language", "capital")
PROMPTS = {0: "language", 1: "language", 2: "capital"}


def neurons(number: int) -> list[dict[str, Any]]:
    """A neuron of each of two experts of layer 0, of which the second has this number, and one of a dense layer."""
    return [
        {"layer": 0, "expert": 0, "neuron": 3},
        {"layer": 0, "expert": 1, "neuron": number},
        {"layer": 1, "expert": None, "neuron": 3},
    ]


def mixture(number: int) -> dict[str, Rows]:
    """The tables of a run whose rows are about these neurons, with other scores for each."""
    some = list(enumerate(neurons(number), start=1))
    key = {"role": "last", "replacement": "mean", "method": "exact", "direction": "noising"}
    return {
        "models": [
            {"n_layers": 2, "n_heads": 1, "n_experts": 2, "head_dim": 1, "intermediate_size": 8, "dtype": "float32"}
        ],
        "experts": [
            *({"layer": 0, "expert": expert, "shared": False, "n_neurons": 8} for expert in (0, 1)),
            {"layer": 1, "n_neurons": 8},
        ],
        "prompts": [
            prompt(i, category) | {"text": "The sky is", "target_token": " blue", "target_prob": 0.5}
            for i, category in PROMPTS.items()
        ],
        "layer_scores": [{"prompt_id": 0, "layer": 0, "component": "ffn", "score": 1.0}],
        "neuron_scores": [
            {"prompt_id": i, "component": "ffn", **one, "score": rank + 0.1 * i, "rank": rank}
            for i in PROMPTS
            for rank, one in some
        ],
        "candidate_scores": [
            {"prompt_id": i, "component": "ffn", **one, "score": rank + 0.1 * i} for i in PROMPTS for rank, one in some
        ],
        "query_neuron_scores": [
            {"prompt_id": i, "activates": "ffn", **one, "score": rank / 8, "rank": rank}
            for i in PROMPTS
            for rank, one in some
        ],
        "neuron_tokens": [
            {"component": "ffn", **one, "sign": "top", "rank": 1, "token": f"token {rank}"} for rank, one in some
        ],
        "effects": [
            {"prompt_id": i, "component": "ffn_neuron", **one, **key, "logp": -float(rank)}
            for i in PROMPTS
            for rank, one in some
        ],
        "expert_scores": [
            {"prompt_id": i, "layer": 0, "expert": expert, "score": 1.0 + expert} for i in PROMPTS for expert in (0, 1)
        ],
    }


ROUTED: dict[str, Rows] = {
    "router": [
        {"prompt_id": 0, "layer": 0, "expert": expert, "chosen": True, "weight": weight, "probability": weight}
        | {"rank": rank}
        for rank, (expert, weight) in enumerate([(1, 0.75), (0, 0.25)], start=1)
    ],
    "routing": [{"prompt_id": 0, "layer": 0, "entropy": 0.5}],
}


def mixed(folder: Path, number: int) -> Database:
    lake = create_lake(folder)
    add_knowledge(lake, "mix", "facts", "a" * 16, mixture(number))
    return Database(lake)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return mixed(tmp_path_factory.mktemp("alike"), 3)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return mixed(tmp_path_factory.mktemp("apart"), 4)


def renamed(answer: pl.DataFrame) -> pl.DataFrame:
    """An answer about neuron 4 of expert 1, as if it were neuron 3."""
    texts = [name for name, kind in answer.schema.items() if kind == pl.String]
    answer = answer.with_columns(pl.col(*texts).str.replace_all("f0.1_4", "f0.1_3", literal=True))
    if "expert" in answer.columns and "neuron" in answer.columns:
        of_expert = pl.col("expert").eq_missing(1) & pl.col("neuron").eq_missing(4)
        answer = answer.with_columns(
            neuron=pl.when(of_expert).then(3).otherwise("neuron").cast(answer.schema["neuron"])
        )
    return answer


def asked(database: Database, name: str, neuron: str) -> pl.DataFrame:
    needed = {"prompt": 0, "layer": 0, "head": 0, "neuron": neuron}
    given = {param.name: needed[param.name] for param in load_catalogue()[name].params if param.required}
    return database.query(name, **given)


OF_ONE_NEURON = [name for name in KNOWLEDGE if "neuron" in [param.name for param in load_catalogue()[name].params]]
ASKED = [(name, neuron) for name in OF_ONE_NEURON for neuron in ("f0.0_3", "f0.1_3", "f1_3")]
ASKED += [(name, "") for name in KNOWLEDGE if name not in OF_ONE_NEURON]


@pytest.mark.parametrize(("name", "neuron"), ASKED)
def test_an_answer_does_not_depend_on_whether_two_experts_have_a_neuron_of_the_same_number(
    alike: Database, apart: Database, name: str, neuron: str
) -> None:
    expected = renamed(asked(apart, name, neuron.replace("f0.1_3", "f0.1_4")))
    assert asked(alike, name, neuron).equals(expected)


@pytest.mark.parametrize("macro", ["mean_effects", "_effects"])
def test_effects_of_two_experts_neurons_of_the_same_number_are_apart(alike: Database, macro: str) -> None:
    given = "NULL, ['capital'], NULL, 'default', NULL, 'last', 'mean', 'exact', 'noising'"
    assert sorted(alike.sql(f"SELECT expert, neuron, logp FROM {macro}({given})").rows(), key=str) == [
        (0, 3, -1.0),
        (1, 3, -2.0),
        (None, 3, -3.0),
    ]


def test_neurons_of_experts_have_names_of_their_own(alike: Database) -> None:
    names = alike.query("top-neurons", category="language", k=5)
    assert names.select("neuron_name", "layer", "expert", "neuron", "top_tokens").rows() == [
        ("f1_3", 1, None, 3, '"token 3"'),
        ("f0.1_3", 0, 1, 3, '"token 2"'),
        ("f0.0_3", 0, 0, 3, '"token 1"'),
    ]
    assert alike.query("neuron-tokens", neuron="f0.1_3")["token"].to_list() == ['"token 2"']
    assert alike.query("neuron-tokens", neuron="f0_3").is_empty()


def test_the_neurons_of_all_experts_are_counted_for_what_is_shared_by_chance(alike: Database) -> None:
    sizes = alike.sql("SELECT n_ffn_neurons FROM sizes_of_models('neuron_sums', 'default', NULL)")
    assert sizes.item() == 8 + 8 + 8


def test_sums_of_two_experts_neurons_of_the_same_number_are_apart(tmp_path: Path) -> None:
    rows = mixture(3)
    del rows["candidate_scores"]  # of which exact sums would be computed
    wh = Warehouse(stored(tmp_path / "w", rows))
    sums = wh.sql(
        "SELECT expert, neuron, round(sum(total), 6) FROM neuron_sums WHERE layer = 0 GROUP BY ALL ORDER BY 1"
    )
    expected = [sum(rank + 0.1 * i for i in PROMPTS) for rank in (1, 2)]
    assert sums.rows() == [(0, 3, pytest.approx(expected[0])), (1, 3, pytest.approx(expected[1]))]


def test_tokens_are_those_of_the_neurons_that_are_asked_for(alike: Database) -> None:
    wanted = "SELECT {'model': 'mix', 'dataset': 'facts', 'run': 'aaaaaaaaaaaaaaaa', 'component': 'ffn', 'layer': 0, "
    wanted += "'head': NULL::INTEGER, 'expert': 1, 'neuron': 3}"
    found = alike.sql(f"SELECT neuron_name, top_tokens FROM tokens_of_neurons([({wanted})])")
    assert found.rows() == [("f0.1_3", '"token 2"')]


# Pages and figures -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    return Warehouse(stored(tmp_path_factory.mktemp("shown") / "w", mixture(3) | ROUTED))


def stored(folder: Path, tables: dict[str, Rows], variant: str = "default") -> Path:
    """Store the tables as a run, with its sums."""
    with FolderStorage.create(folder).stage("a" * 16, "mix", "facts") as staged:
        for table, rows in tables.items():
            staged.write_rows(table, "part", rows)
        write_neuron_sums(staged)
        staged.commit({"study": "knowledge", "variant": variant, "settings": "{}"})
    return folder


def page(wh: Warehouse, name: str, **params: str) -> str:
    return render(wh, name, {key: [value] for key, value in params.items()})


def test_pages_show_the_newest_variant_where_there_is_no_plain_run(tmp_path: Path) -> None:
    wh = Warehouse(stored(tmp_path / "w", mixture(3), variant="limit=20"))
    assert "f0.1_3" in page(wh, "model", model="mix")
    assert "variant=limit%3D20" in page(wh, "category", category="capital")


def test_pages_show_experts(shown: Warehouse) -> None:
    neuron = page(shown, "neuron", model="mix", neuron="f0.1_3")
    assert "layer 0</a>, expert 1" in neuron
    assert "token 2" in neuron and "token 1" not in neuron
    assert "-2.0" in neuron and "-1.0" not in neuron and "Effect of replacing the neuron" in neuron
    prompt_page = page(shown, "prompt", model="mix", dataset="facts", prompt="0")
    assert "router chooses" in prompt_page and "f0.1" in prompt_page
    model = page(shown, "model", model="mix")
    assert "/charts/expert-map" in model and "experts per layer" in model
    assert "How often each expert is chosen" in page(shown, "layer", model="mix", layer="0")
    assert "/neuron?model=mix&amp;neuron=f0.1_3" in page(shown, "search", q="token 2")
    assert "/neuron?model=mix&amp;neuron=f0.1_3" in page(shown, "search", q="f0.1_3")
    assert "/neuron?model=mix" not in page(shown, "search", q="f0.2_3")
    assert "/layer?model=mix&amp;layer=0" in page(shown, "search", q="f0.1")


def test_every_expert_is_on_the_map(shown: Warehouse) -> None:
    numbers = figures.frame(shown, "expert-map", category=["language"])
    assert numbers.select("expert_name", "score", "n_used", "n_prompts").rows() == [
        ("f0.1", 2, 2, 2),
        ("f0.0", 1, 2, 2),
    ]
    assert figures.chart(shown, "expert-map").to_dict()
