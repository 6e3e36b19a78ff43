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
from kdb.ingest import corpus
from kdb.ingest.attribution.effects import Known
from kdb.ingest.attribution.lens import lens_rows
from kdb.ingest.attribution.read_prompts import prompt_rows
from kdb.ingest.attribution.targets import Target
from kdb.ingest.forward import lens_training
from kdb.ingest.forward.activation_cache import run_with_cache
from kdb.ingest.forward.decomposition import Decomposition, decompose
from kdb.ingest.forward.readouts import places, residuals
from kdb.ingest.forward.tuned_lens import Fit, fit
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.structure import find_structure
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
def facts(tmp_path_factory: pytest.TempPathFactory, best: Callable[[str], str]) -> Path:
    """Eight prompts in two categories; the model's own best letters are the answers."""
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


def test_a_run_without_a_kept_prompt_has_nothing_to_read_or_patch(
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
    named = ("--dataset", "facts", "--variant", "ablate-k=0 no-effects", "--warehouse", tmp_path / "w")
    message = refusal(run_kdb("patch", "--model", tiny_model, *named))
    assert "has no scores. Either no prompt is kept" in message


# Stored vectors --------------------------------------------------------------------------------------------------


def test_the_lens_map_of_a_text_with_a_label_names_no_answer(copied: Path, lens: Callable[..., Result]) -> None:
    answer(lens(copied, dataset="labelled"))
    drawn = figures.chart(Warehouse(copied), "lens-map", dataset="labelled", prompt=0).to_json()
    assert "None" not in json.dumps(json.loads(drawn)["title"])


def test_stored_vectors_are_read_without_running_the_model(
    copied: Path, lens: Callable[..., Result], tiny_loaded: LoadedModel
) -> None:
    assert "stored" in answer(lens(copied, dataset="labelled"))
    opened = Warehouse(copied)
    rows = opened.sql(
        "SELECT r.*, text, n_tokens, label FROM lens_readouts AS r JOIN prompts AS p ON r.prompt_id = p.prompt_id "
        "AND r.dataset = p.dataset WHERE r.dataset = 'labelled' ORDER BY r.prompt_id, r.layer"
    ).to_dicts()
    assert [(row["prompt_id"], row["layer"], row["place"]) for row in rows] == [
        (i, layer, "resid_post") for i in range(32) for layer in range(2)
    ]
    for before, last in zip(rows[::2], rows[1::2], strict=True):
        with torch.inference_mode():
            ids = tiny_loaded.tokenizer(last["text"])["input_ids"]
            output = tiny_loaded.model(torch.tensor([ids]), output_hidden_states=True)
            p = output.logits[0, -1].log_softmax(-1)
            q = tiny_loaded.model.lm_head(tiny_loaded.model.model.norm(output.hidden_states[1][0, -1])).log_softmax(-1)
        assert last["position"] == last["n_tokens"] - 1 == len(ids) - 1
        assert last["token"] == tiny_loaded.tokenizer.decode(ids[-1:])
        assert last["kl"] == pytest.approx(0, abs=1e-6)
        assert last["logps"] == pytest.approx(p.topk(5).values.tolist(), abs=1e-4)
        assert before["kl"] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-4)
        assert before["entropy"] == pytest.approx(-(q.exp() * q).sum().item(), abs=1e-4)
        spelled = [
            {tiny_loaded.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in words}
            for words in (("no", "No", " no", " No"), ("yes", "Yes", " yes", " Yes"))
        ]
        tokens = [sorted(spelled[i] - spelled[1 - i]) for i in (last["label"], 1 - last["label"])]
        assert (last["target_logp"], last["rival_logp"]) == pytest.approx(
            [max(p[t].item() for t in some) for some in tokens], abs=1e-4
        )
    story = opened.query("lens-story", prompt=0, dataset="labelled")
    assert story["layer"].to_list() == [0, 1]
    words = ["no", "yes"]
    label = opened.sql("SELECT label FROM prompts WHERE prompt_id = 0 AND dataset = 'labelled'").item()
    assert story.select("target_token", "rival_token").unique().row(0) == (words[label], words[1 - label])
    assert opened.query("lens-story", prompt=0, dataset="labelled", position=0).is_empty()


def test_texts_of_which_nothing_is_asked_have_no_answer_to_rank(
    tmp_path: Path, run_kdb: RunKdb, tiny_model: Path, labelled: Path, lens: Callable[..., Result]
) -> None:
    given = ("--model", tiny_model, "--dataset", labelled, "--warehouse", tmp_path / "w")
    assert run_kdb("ingest", *given).exit_code == 0
    answer(lens(tmp_path / "w", dataset="labelled"))
    counted = "SELECT count(*), count(target_rank), count(rival_logp), count(entropy) FROM lens_readouts"
    assert Warehouse(tmp_path / "w").sql(counted).row(0) == (64, 0, 0, 64)


# The tuned lens --------------------------------------------------------------------------------------------------


def passages_of(n: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(3, VOCAB, size=(n, 17)).tolist()


def fitted(architecture: str, seed: int = 1) -> list[Fit]:
    model = loaded(tiny_model(architecture))
    return fit(model, find_structure(model.model), passages_of(64), passages_of(16, seed=1), seed=seed)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "granite", "opt"])
def test_a_tuned_lens_is_closer_to_the_output_on_held_out_text_and_the_identity_at_the_end(architecture: str) -> None:
    *others, last = fitted(architecture)
    assert [one.place for one in [*others, last]] == places(LAYERS)
    for one in others:
        assert one.is_better
        assert one.kl_tuned.mean() < 0.9 * one.kl_logit.mean()
        assert one.kl_tuned.shape == one.passage.shape == (16 * 16,)
    assert last.is_better
    assert float(last.translator.weight.abs().max()) == float(last.translator.bias.abs().max()) == 0
    assert max(last.kl_tuned) == pytest.approx(0, abs=1e-6)


def test_the_divergences_of_a_fit_are_those_of_the_translated_states() -> None:
    model = loaded(tiny_model("llama"))
    structure = find_structure(model.model)
    [one] = [f for f in fitted("llama") if f.place == (1, "resid_post")]
    held = passages_of(16, seed=1)
    with torch.inference_mode():
        output = model.model(torch.tensor(held), output_hidden_states=True)
        p = output.logits.double().log_softmax(-1)
        for kl, translate in ((one.kl_logit, lambda h: h), (one.kl_tuned, one.translator)):
            q = structure.readout(translate(output.hidden_states[2])).double().log_softmax(-1)
            expected = (p.exp() * (p - q)).sum(-1)[:, 1:].flatten()  # but at the first token
            assert kl == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-5)
    row = one.row()
    gain = row["kl_logit"] - row["kl_tuned"]
    assert row["gain_low"] < gain < row["gain_high"]
    assert (row["n_tokens"], row["n_passages"]) == (256, 16)


def test_steps_that_are_too_large_make_no_lens_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lens_training, "_RATE", 100.0)
    for one in fitted("llama"):
        assert one.kl_tuned.mean() <= 1.05 * one.kl_logit.mean()


def test_a_seed_makes_a_tuned_lens_reproducible() -> None:
    first, again, other = (fitted("llama", seed)[0].translator.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_tuned_lens_is_stored_with_its_fits_and_shown_when_it_is_asked_for(
    copied: Path, lens: Callable[..., Result]
) -> None:
    before = Warehouse(copied).query("lens-story", prompt=0, variant=VARIANT)
    assert "stored" in answer(lens(copied, "--lens", "tuned", "--positions", "last"))
    opened = Warehouse(copied)
    fits = opened.query("lens-fits", variant=VARIANT).to_dicts()
    assert [(row["layer"], row["place"]) for row in fits] == [(0, "resid_pre"), (0, "resid_post"), (1, "resid_post")]
    assert fits[-1]["kl_tuned"] == pytest.approx(0, abs=1e-6)
    kept = [(row["layer"], row["place"]) for row in fits if row["kept"]]
    assert len(kept) > 1
    tuned = opened.query("lens-story", prompt=0, variant=VARIANT, lens="tuned")
    assert tuned.select("layer", "place").rows() == kept
    logit = opened.query("lens-story", prompt=0, variant=VARIANT)
    assert logit.rows() == before.rows()
    last = {"layer": 1, "place": "resid_post"}
    assert tuned.filter(**last)["target_logp"].item() == pytest.approx(
        logit.filter(**last)["target_logp"].item(), abs=1e-5
    )
    [settings] = opened.sql("SELECT settings FROM runs WHERE list_contains(tables, 'lens_fits')").to_series()
    assert {key: json.loads(settings)[key] for key in ("lens", "corpus", "seed")} == {
        "lens": "tuned",
        "corpus": "kdb",
        "seed": 42,
    }
    drawn = figures.chart(opened, "lens-map", prompt=0, variant=VARIANT, lens="tuned").to_dict()
    assert "lens: tuned" in drawn["title"]["subtitle"]


def test_a_layer_at_which_the_tuned_lens_is_worse_has_no_readouts(
    copied: Path, lens: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchecked(self: Any, _loss: Any, _states: Any) -> None:
        self.best = self.map.clone()

    monkeypatch.setattr(lens_training, "_RATE", 100.0)
    monkeypatch.setattr(lens_training._Map, "check", unchecked)
    answer(lens(copied, "--lens", "tuned"))
    opened = Warehouse(copied)
    fits = opened.query("lens-fits", variant=VARIANT).to_dicts()
    assert [row["kept"] for row in fits[1:]] == [False, True]
    assert [row["kept"] for row in fits] == [row["kl_tuned"] <= row["kl_logit"] for row in fits]
    read = opened.query("lens-story", prompt=0, variant=VARIANT, lens="tuned")
    assert set(read.select("layer", "place").rows()) == {(f["layer"], f["place"]) for f in fits if f["kept"]}
    n_tokens = opened.sql("SELECT n_tokens FROM prompts WHERE prompt_id = 0 AND kept").item()
    assert read["position"].unique().to_list() == list(
        range(1, n_tokens)
    )  # states at the first position are unlike all others


def test_a_corpus_of_ones_own_is_another_run(copied: Path, lens: Callable[..., Result], tmp_path: Path) -> None:
    own = corpus.OWN.read_text().splitlines(keepends=True)
    (tmp_path / "pages.txt").write_text("".join(reversed(own)))
    answer(lens(copied, "--lens", "tuned", "--positions", "last"))
    answer(lens(copied, "--lens", "tuned", "--positions", "last", "--corpus", tmp_path / "pages.txt"))
    assert "is stored already" in answer(lens(copied, "--lens", "tuned", "--positions", "last"))
    corpora = Warehouse(copied).sql(
        "SELECT settings ->> '$.corpus' FROM runs WHERE list_contains(tables, 'lens_fits') ORDER BY ALL"
    )
    assert corpora.to_series().to_list() == ["kdb", "pages.txt"]


CORPORA: dict[str, tuple[bytes | None, str]] = {
    "no file": (None, "Cannot read the corpus"),
    "not UTF-8": ("über".encode("latin-1") * 9000, "is not UTF-8 text (byte 0)"),
    "empty": (b" \n\n", "is empty"),
    "one sentence": (b"The old ferry left the harbour at noon. " * 3000, "The corpus 'pages.txt' repeats itself"),
    "too small": (b"One page.", "The corpus 'pages.txt' is too small for a tuned lens"),
}


@pytest.mark.parametrize("what", CORPORA)
def test_a_corpus_that_cannot_be_used_is_refused_and_stores_nothing(
    plain: Path, lens: Callable[..., Result], tmp_path: Path, what: str
) -> None:
    content, message = CORPORA[what]
    if content is not None:
        (tmp_path / "pages.txt").write_bytes(content)
    before = Warehouse(plain).storage.run_folders()
    assert message in refusal(lens(plain, "--lens", "tuned", "--corpus", tmp_path / "pages.txt"))
    storage = Warehouse(plain).storage
    assert storage.run_folders() == before
    assert storage.local.staging.unfinished_runs() == []


def test_a_long_corpus_is_read_from_its_beginning_even_within_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MOST_BYTES", 5)
    (tmp_path / "pages.txt").write_text("aaaaéb")
    assert corpus.read_corpus(tmp_path / "pages.txt").text == "aaaa"


def test_a_passage_is_either_trained_on_or_held_out(tiny_loaded: LoadedModel) -> None:
    train, held_out = corpus.passages(tiny_loaded.tokenizer, corpus.read_corpus(None))
    assert 6 * len(held_out) < len(train) < 9 * len(held_out)
    assert {len(one) for one in (*train, *held_out)} == {len(train[0])}
    text = "".join(map(tiny_loaded.tokenizer.decode, held_out))
    assert "The old ferry" in text
    assert "The old ferry" not in "".join(map(tiny_loaded.tokenizer.decode, train))


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
