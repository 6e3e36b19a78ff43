"""The stored answers of the model are those of the untouched model, run one prompt at a time."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kdb.ingest.concept import zero_shot
from kdb.ingest.concept.zero_shot import Question, answer_probabilities, question_of, zero_shot_rows
from kdb.ingest.datasets import Dataset, Example, load_dataset
from kdb.ingest.forward.capture import Capture
from kdb.ingest.job import Job
from kdb.ingest.measure import ingest
from kdb.ingest.models.find import LoadedModel
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.usefixtures("one_thread")

PLACES = ("Rome is in Italy.", "Rome is in Peru.", "Is Oslo, the capital of Norway, in Italy? Surely not.")


def dataset(*texts: str, answers: tuple[str, str] = ("false", "true"), template: str = "{text}") -> Dataset:
    return Dataset("places", "", template, tuple(Example(text, 0) for text in texts), answers=answers)


def asked(loaded: LoadedModel, question: Question, texts: tuple[str, ...] = PLACES) -> NDArray[np.float64]:
    capture = Capture(loaded, batch_tokens=40)
    _, ends = capture.vectors_and_ends(loaded.tokenizer(list(texts))["input_ids"], cue=question.cue)
    return answer_probabilities(capture, ends, question)


def untouched(loaded: LoadedModel, text: str, cue: str, spellings: list[str]) -> float:
    """Probability that the model goes on with the first token of a spelling, in one plain call."""
    tokenizer = loaded.tokenizer
    ids = tokenizer(text)["input_ids"] + tokenizer(cue, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        probs = loaded.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    first = {tokenizer(spelling, add_special_tokens=False)["input_ids"][0] for spelling in spellings}
    return float(probs[list(first)].sum())


# Against the untouched model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["{text}", "{text} True or false? Answer:"])
def test_smollm2_answers_as_it_does_untouched(smollm2_135m: LoadedModel, template: str) -> None:
    posed = dataset(*PLACES, template=template)
    found = asked(
        smollm2_135m, question_of(smollm2_135m.tokenizer, posed), tuple(template.replace("{text}", p) for p in PLACES)
    )
    for text, (negative, positive) in zip(PLACES, found, strict=True):
        prompt = template.replace("{text}", text)
        spellings = ["true", "True", " true", " True"], ["false", "False", " false", " False"]
        expected = [untouched(smollm2_135m, prompt, posed.cue, words) for words in spellings]
        assert (positive, negative) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("ask", "cue"), [("Did it rain?", "\nDid it rain?\nAnswer:"), ("Rain:", "\nRain:")])
def test_a_run_stores_what_the_model_answers_untouched(
    tmp_path: Path,
    run_kdb: Callable[..., Result],
    tiny_model: Path,
    user_dataset: Path,
    tiny_loaded: LoadedModel,
    ask: str,
    cue: str,
) -> None:
    run = ("ingest", "--model", tiny_model, "--dataset", user_dataset, "--ask", ask, "--answers", "no, yes")
    assert run_kdb(*run, "--warehouse", tmp_path / "w").exit_code == 0
    text = "SELECT text, label, z.* FROM zero_shot z JOIN prompts USING (run, prompt_id) ORDER BY prompt_id"
    rows = Warehouse(tmp_path / "w").sql(text).rows(named=True)
    assert len(rows) == 40
    for row in rows:
        # Its tokens are bytes, and those after a space begin both answers.
        for word, letters in (("positive", ["y", "Y"]), ("negative", ["n", "N"])):
            expected = untouched(tiny_loaded, row["text"], cue, letters)
            assert row[f"prob_{word}"] == pytest.approx(expected, rel=1e-4)
        assert (row["positive"], row["negative"]) == ("yes", "no")
        assert row["predicted"] == int(row["prob_positive"] > row["prob_negative"])
        assert row["correct"] == (row["predicted"] == row["label"])


def test_a_users_file_is_asked_nothing_unless_the_user_asks(
    tmp_path: Path,
    user_dataset: Path,
    tiny_job: Callable[..., Job],
    tiny_loaded: LoadedModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    unasked, opened = replace(tiny_job(), dataset=load_dataset(str(user_dataset))), Warehouse.create(tmp_path / "w")
    with caplog.at_level(logging.INFO, logger="kdb"):
        ingest(opened.storage, unasked, lambda: tiny_loaded)
    assert "No zero-shot answers: nothing is asked of 'weather'. --ask and --answers ask a question." in caplog.messages
    assert "zero_shot" not in opened.sql("SELECT tables FROM runs").item()
    assert opened.sql("SELECT count(*) FROM checks WHERE \"check\" = 'stored_answers'").item() == 0
    for template in (None, "Is it true? {text}", "{text} Is it true?"):
        loaded = load_dataset(str(user_dataset), template=template)
        assert (loaded.answers, loaded.cue) == (None, "")


def test_asking_changes_no_hidden_state(
    tmp_path: Path, measured: Path, user_dataset: Path, tiny_job: Callable[..., Job], tiny_loaded: LoadedModel
) -> None:
    opened = Warehouse.create(tmp_path / "w")
    dataset = load_dataset(str(user_dataset), ask="Was there any rain in that town?", answers="no,yes")
    ingest(opened.storage, replace(tiny_job(), dataset=dataset), lambda: tiny_loaded)
    text = "SELECT vector FROM activations ORDER BY prompt_id, layer, site"
    asked, plain = (np.array(w.sql(text)["vector"].to_list()) for w in (opened, Warehouse(measured)))
    np.testing.assert_allclose(asked, plain, rtol=1e-4, atol=1e-5)


# Which tokens count ----------------------------------------------------------------------------------------------


def test_a_token_that_begins_both_answers_counts_for_neither(tiny_loaded: LoadedModel) -> None:
    question = question_of(tiny_loaded.tokenizer, dataset(answers=("false", "far")))
    assert question.first_tokens == ((), ())
    assert not question.separates
    assert question.cue == ()
    first = [
        tiny_loaded.tokenizer.decode(tokens) for tokens in question_of(tiny_loaded.tokenizer, dataset()).first_tokens
    ]
    assert first == ["Ff", "Tt"]


def test_answers_that_begin_alike_are_not_asked_for_and_the_log_says_so(
    tmp_path: Path, tiny_job: Callable[..., Job], tiny_loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    job = tiny_job()
    opened = Warehouse.create(tmp_path / "warehouse")
    with caplog.at_level(logging.INFO, logger="kdb"):
        ingest(opened.storage, replace(job, dataset=replace(job.dataset, answers=("no", "nay"))), lambda: tiny_loaded)
    assert "No zero-shot answers: 'no' and 'nay' begin with the same tokens of this model." in caplog.messages
    assert "zero_shot" not in opened.sql("SELECT tables FROM runs").item()


# Laws ------------------------------------------------------------------------------------------------------------


def test_a_model_that_sees_only_the_cue_answers_every_prompt_alike(tiny_loaded: LoadedModel) -> None:
    model: Any = copy.deepcopy(tiny_loaded.model)
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()
    blind = replace(tiny_loaded, model=model)
    found = asked(blind, question_of(blind.tokenizer, dataset()))
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), rtol=1e-5)
    assert np.ptp(asked(tiny_loaded, question_of(blind.tokenizer, dataset())), axis=0).min() > 1e-4


def test_how_many_are_read_out_at_a_time_changes_nothing(
    tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = question_of(tiny_loaded.tokenizer, dataset())
    together = asked(tiny_loaded, question)
    monkeypatch.setattr(zero_shot, "_READOUT_ROWS", 2)
    np.testing.assert_allclose(asked(tiny_loaded, question), together, rtol=1e-5)


@given(st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5), st.integers(0, 1)), min_size=1))
def test_the_likelier_answer_is_the_models_and_a_tie_is_a_no(drawn: list[tuple[float, float, int]]) -> None:
    probabilities, labels = np.array([row[:2] for row in drawn]), np.array([row[2] for row in drawn])
    question = Question(("no", "yes"), (), ((0,), (1,)))
    rows = zero_shot_rows(range(len(drawn)), labels, probabilities, question).to_pylist()
    for row, (negative, positive, label) in zip(rows, drawn, strict=True):
        assert (row["prob_negative"], row["prob_positive"]) == (negative, positive)
        assert row["predicted"] == (1 if positive > negative else 0)
        assert row["correct"] == (row["predicted"] == label)
