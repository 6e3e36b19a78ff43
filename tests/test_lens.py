"""`kdb lens`: readouts at every position, of stored vectors, and through a tuned lens."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from helpers.command_line import answer, refusal
from helpers.knowledge_rows import add_knowledge, prompt
from helpers.stored import NOON, Rows, create_lake
from helpers.tiny_models import LAYERS, VOCAB, loaded, prompts, tiny_model

from kdb.analysis import figures
from kdb.ingest.attribution.effects import Known
from kdb.ingest.attribution.lens import lens_rows
from kdb.ingest.attribution.read_prompts import prompt_rows
from kdb.ingest.attribution.targets import Target
from kdb.ingest.forward.activation_cache import run_with_cache
from kdb.ingest.forward.decomposition import Decomposition, decompose
from kdb.ingest.forward.readouts import places, residuals
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.prompts import Prompt
from kdb.warehouse.database import Database
from kdb.warehouse.store import Warehouse

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

RunKdb = Callable[..., Result]

# Readouts at every position --------------------------------------------------------------------------------------

IDS = prompts([6, 6, 8, 6])
KNOWN = [Known(i, tuple(ids), 10 + i, "c", rival=30 if i else -1) for i, ids in enumerate(IDS)]
ARCHITECTURES = ("llama", "gemma3_text", "gemma2", "gpt2", "gpt_neox", "granite", "opt")


def with_words(model: Any) -> LoadedModel:
    """A loaded model whose tokens are written as numbers."""

    class Words:
        def decode(self, ids: list[int]) -> str:
            return str(ids[0])

    return replace(loaded(model), tokenizer=Words())


def read(decomposition: Decomposition, some: list[Known] = KNOWN, positions: str = "all") -> list[dict[str, Any]]:
    return [row for table in prompt_rows(decomposition, some, positions) for row in table.to_pylist()]


def at(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["prompt_id"], row["position"], row["layer"], row["place"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_readout_is_the_models_output_at_every_position(architecture: str) -> None:
    decomposition = decompose(with_words(tiny_model(architecture)))
    found = {at(row): row for row in read(decomposition)}
    for i, ids in enumerate(IDS):
        with torch.inference_mode():
            log_p = decomposition.loaded.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        for position, p in enumerate(log_p):
            row = found[i, position, LAYERS - 1, "resid_post"]
            assert row["target_logp"] == pytest.approx(p[10 + i].item(), abs=1e-4)
            assert row["entropy"] == pytest.approx(-(p.exp() * p).sum().item(), abs=1e-4)
            assert row["logps"] == pytest.approx(p.topk(5).values.tolist(), abs=1e-4)
            assert row["kl"] == pytest.approx(0, abs=1e-6)
            assert row["token"] == str(ids[position])
            assert (row["rival_logp"] is None) == (i == 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_readouts_at_the_last_position_are_those_of_a_knowledge_run(architecture: str) -> None:
    decomposition = decompose(with_words(tiny_model(architecture)))
    found = {at(row): row for row in read(decomposition, positions="last")}
    made = run_with_cache(decomposition, IDS)
    some = [Prompt(i, ids, Target(ids, " ", (10 + i,), ((30,),) if i else ())) for i, ids in enumerate(IDS)]
    expected = lens_rows(np.arange(4, dtype=np.int32), decomposition, made, some).to_pylist()
    assert len(expected) == len(found)
    for row in expected:
        numbers = [name for name, value in row.items() if isinstance(value, float)]
        assert {n: found[at(row)][n] for n in numbers} == pytest.approx({n: row[n] for n in numbers}, abs=1e-4)
        assert {**row, **dict.fromkeys(("tokens", "logps", *numbers))} == {
            **found[at(row)],
            **dict.fromkeys(("tokens", "logps", *numbers)),
        }


def test_other_prompts_in_the_batch_and_tokens_behind_a_position_change_no_readout() -> None:
    decomposition = decompose(with_words(tiny_model("llama")))
    together = {at(row): row for row in read(decomposition)}
    for i, one in enumerate(KNOWN):
        for row in read(decomposition, [one]):
            assert row["kl"] == pytest.approx(together[at(row)]["kl"], abs=1e-5)
            assert row["target_logp"] == pytest.approx(together[at(row)]["target_logp"], abs=1e-5)
        [*begun] = read(decomposition, [replace(one, token_ids=one.token_ids[:4])])
        assert {row["position"] for row in begun} == {0, 1, 2, 3}
        for row in begun:
            assert row["target_logp"] == pytest.approx(together[at(row)]["target_logp"], abs=1e-5)
            assert row["prompt_id"] == i


def test_the_residual_stream_is_read_before_after_and_between(one_thread: None) -> None:
    decomposition = decompose(loaded(tiny_model("llama")))
    states = residuals(decomposition.loaded, decomposition.structure, IDS[:2], decomposition.blocks)
    named = places(LAYERS, decomposition.blocks)
    assert named[:4] == [(0, "resid_pre"), (0, "resid_mid"), (0, "resid_post"), (1, "resid_mid")]
    with torch.inference_mode():
        output = decomposition.loaded.model(torch.tensor(IDS[:2]), output_hidden_states=True)
    for layer in range(LAYERS - 1):  # the final norm is applied to the last one
        torch.testing.assert_close(states[named.index((layer, "resid_post"))], output.hidden_states[layer + 1])
    torch.testing.assert_close(states[0], output.hidden_states[0])
    assert states.shape == (1 + 2 * LAYERS, 2, 6, 32)
    assert VOCAB > 30


# What the command stores -----------------------------------------------------------------------------------------

TOWNS = ("Bonn", "Jena", "Kiel", "Rome")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, tiny_loaded: LoadedModel) -> Path:
    """Eight prompts in two categories; the model's own best letters are the answers."""
    tokenizer = tiny_loaded.tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(string.ascii_letters))

    def best(text: str) -> str:
        with torch.inference_mode():
            logits = tiny_loaded.model(torch.tensor([tokenizer(f"{text} ")["input_ids"]])).logits[0, -1]
        return string.ascii_letters[int(logits[ids].argmax())]

    texts = [(kind, f"The {kind} of {town} is") for kind in ("sky", "sea") for town in TOWNS]
    path = tmp_path_factory.mktemp("datasets") / "facts.csv"
    lines = [f"{text},{best(text)}x,{kind}" for kind, text in texts]
    path.write_text("\n".join(["prompt,answer,category", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("datasets") / "labelled.csv"
    lines = [f"{town} is {word},{label}" for town in TOWNS * 4 for label, word in enumerate(("far", "near"))]
    path.write_text("\n".join(["text,label", *(f"{i} {line}" for i, line in enumerate(lines))]) + "\n")
    return path


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, run_kdb: RunKdb, tiny_model: Path, facts: Path, labelled: Path
) -> Path:
    """A warehouse with a knowledge run and a concept run."""
    folder = tmp_path_factory.mktemp("plain") / "w"
    given = ("--model", tiny_model, "--ablate-k", "0", "--no-effects", "--warehouse", folder)
    answer(run_kdb("ingest", *given, "--dataset", facts))
    asked = ("--ask", "Is it near?", "--answers", "no,yes")
    assert run_kdb("ingest", *given, "--dataset", labelled, *asked).exit_code == 0
    return folder


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "w"))


VARIANT = "ablate-k=0 no-effects"


@pytest.fixture
def lens(run_kdb: RunKdb, tiny_model: Path) -> Callable[..., Result]:
    def lens(warehouse: Path, *options: str | Path, dataset: str = "facts") -> Result:
        variant = VARIANT if dataset == "facts" else "default"
        given = ("--model", tiny_model, "--dataset", dataset, "--variant", variant, "--warehouse", warehouse)
        return run_kdb("lens", *given, "--device", "cpu", *options)

    return lens


def test_every_position_is_stored_and_shown_beside_the_last(copied: Path, lens: Callable[..., Result]) -> None:
    before = Warehouse(copied).query("lens-story", prompt=0, variant=VARIANT)
    settled = Warehouse(copied).query("answer-by-layer", variant=VARIANT)
    assert before["position"].n_unique() == 1
    assert "stored" in answer(lens(copied))
    opened = Warehouse(copied)
    after = opened.query("lens-story", prompt=0, variant=VARIANT)
    n_tokens, text = opened.sql("SELECT n_tokens, text FROM prompts WHERE prompt_id = 0 AND kept").row(0)
    assert after["position"].unique().to_list() == list(range(n_tokens))
    assert len(after) == n_tokens * len(before)
    assert "".join(after.filter(layer=1, place="resid_post")["token"].to_list()).replace("▁", " ").startswith(text)
    last = after.filter(position=n_tokens - 1)
    assert last["tokens"].to_list() == before["tokens"].to_list()
    assert last["target_logp"].to_list() == pytest.approx(before["target_logp"].to_list(), abs=1e-5)
    assert opened.query("answer-by-layer", variant=VARIANT).rows() == settled.rows()
    assert "is stored already" in answer(lens(copied, "--positions", "all"))


def test_the_lens_map_has_a_column_for_each_position(copied: Path, lens: Callable[..., Result]) -> None:
    given = {"prompt": 0, "variant": VARIANT}
    assert columns(Warehouse(copied), **given) == 1
    answer(lens(copied))
    opened = Warehouse(copied)
    assert columns(opened, **given) == opened.sql("SELECT n_tokens FROM prompts WHERE prompt_id = 0 AND kept").item()


def columns(warehouse: Warehouse, **given: Any) -> int:
    drawn = json.loads(figures.chart(warehouse, "lens-map", **given).to_json())
    return max(len({row["at"] for row in rows}) for rows in drawn["datasets"].values())


BAD: dict[str, tuple[str, tuple[str, ...], str]] = {
    "a corpus without training": ("facts", ("--corpus", "pages.txt"), "--corpus needs --lens tuned."),
    "a seed without training": ("facts", ("--seed", "1"), "--seed needs --lens tuned."),
    "a dataset that is not stored": ("fact", (), "Unknown stored dataset 'fact'. Did you mean 'facts'?"),
    "a lens that does not exist": ("facts", ("--lens", "magic"), "Invalid value for '--lens'"),
    "every position of vectors": (
        "labelled",
        ("--positions", "all"),
        "labelled is a dataset of texts with labels, of which only the vectors of the last token are stored.",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wish_that_cannot_be_read_is_refused_and_stores_nothing(
    plain: Path, lens: Callable[..., Result], what: str
) -> None:
    dataset, options, message = BAD[what]
    before = Warehouse(plain).storage.run_folders()
    assert refusal(lens(plain, *options, dataset=dataset)).startswith(message)
    storage = Warehouse(plain).storage
    assert storage.run_folders() == before
    assert storage.local.staging.unfinished_runs() == []


def test_a_run_without_a_kept_prompt_has_nothing_to_read(
    tmp_path: Path, run_kdb: RunKdb, tiny_model: Path, lens: Callable[..., Result], tiny_loaded: LoadedModel
) -> None:
    """The answers are the model's least likely letters."""
    ids = tiny_loaded.tokenizer.convert_tokens_to_ids(list(string.ascii_letters))
    lines = ["prompt,answer,category"]
    for i, town in enumerate(TOWNS):
        with torch.inference_mode():
            asked = tiny_loaded.tokenizer(f"The sky of {town} is ")["input_ids"]
            logits = tiny_loaded.model(torch.tensor([asked])).logits[0, -1][ids]
        lines.append(f"The sky of {town} is,{string.ascii_letters[int(logits.argsort()[i % 2])]},sky")
    (tmp_path / "facts.csv").write_text("\n".join(lines) + "\n")
    given = ("--model", tiny_model, "--dataset", tmp_path / "facts.csv", "--ablate-k", "0", "--no-effects")
    assert run_kdb("ingest", *given, "--warehouse", tmp_path / "w").exit_code == 0
    assert "has no kept prompt, so there is nothing to read." in refusal(lens(tmp_path / "w"))


# Queries, on rows made by hand -----------------------------------------------------------------------------------


def readout(position: int, lens: str, rank: int, layer: int = 0, prompt_id: int = 0) -> dict[str, Any]:
    place = {"prompt_id": prompt_id, "layer": layer, "place": "resid_post", "position": position, "lens": lens}
    numbers = {"target_rank": rank, "target_logp": -1.0, "entropy": 1.0, "kl": 0.0}
    return place | numbers | {"token": "x", "tokens": ["a"], "logps": [-1.0]}


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """A run with the last position of the logit lens; later ones with all positions, and with two tuned lenses."""
    lake = create_lake(tmp_path_factory.mktemp("warehouse"))
    own: dict[str, Rows] = {
        "models": [{"n_layers": 2}],
        "prompts": [prompt(0, "language")],
        "lens_readouts": [readout(2, "logit", 4), readout(2, "logit", 1, layer=1)],
    }
    add_knowledge(lake, "alpha", "facts", "a" * 16, own)
    later = {
        "b": [readout(p, "logit", 5 - p, layer) for p in (0, 1) for layer in (0, 1)],
        "c": [readout(p, "tuned", 7, layer) for p in (1, 2) for layer in (0, 1)],
        "d": [readout(2, "tuned", 1, layer=1)],
    }
    for hour, (name, rows) in enumerate(later.items()):
        named = {"source_run": "a" * 16, "finished_at": NOON.replace(hour=14 + hour)}
        add_knowledge(lake, "alpha", "facts", name * 16, {"lens_readouts": rows}, **named)
    return Database(lake)


def test_positions_of_several_runs_are_shown_together_and_tuned_lenses_are_not_mixed(by_hand: Database) -> None:
    logit = by_hand.query("lens-story", prompt=0)
    assert logit.select("position", "layer", "target_rank").rows() == [
        *((0, 0, 5), (0, 1, 5), (1, 0, 4), (1, 1, 4), (2, 0, 4), (2, 1, 1)),
    ]
    tuned = by_hand.query("lens-story", prompt=0, lens="tuned")
    assert tuned.select("position", "layer", "target_rank").rows() == [(2, 1, 1)]
    older = by_hand.query("lens-story", prompt=0, lens="tuned", run="c" * 16)
    assert older["position"].to_list() == [1, 1, 2, 2]


def test_the_answer_is_looked_for_at_the_last_position_through_the_lens_that_is_asked_for(by_hand: Database) -> None:
    columns = ("median_layer", "n_settled", "n_prompts")
    assert by_hand.query("answer-by-layer").select(columns).rows() == [(1, 1, 1)]
    assert by_hand.query("answer-by-layer", lens="tuned", run="c" * 16).select(columns).rows() == [(None, 0, 1)]
