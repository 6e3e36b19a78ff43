"""Both studies read a text as the same tokens: with the special tokens before it, without those after it."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.command_line import answer
from helpers.tiny_llama import ASK_OPTIONS, TOWNS
from helpers.tokenizers import tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from kdb.ingest.forward.checks import CHECK_PROMPTS, chosen_prompts
from kdb.ingest.models.find import LoadedModel, find_model
from kdb.ingest.models.load import load_model
from kdb.ingest.models.tokens import bare, count_spelled, read_texts
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.usefixtures("one_thread")

every_tokenizer = pytest.mark.parametrize("kind", ["bytes", "always", "first", "words"])


# Token ids -------------------------------------------------------------------------------------------------------


@every_tokenizer
@pytest.mark.parametrize("bos", [False, True])
def test_what_a_tokenizer_appends_is_removed_and_what_it_puts_before_stays(kind: str, bos: bool) -> None:
    made, texts = tokenizer(kind, bos=bos, eos=True), ["The capital of Italy is", "France", "8"]
    assert all(ids[-1] == made.eos_token_id for ids in made(texts)["input_ids"])
    assert read_texts(made, texts) == [[made.bos_token_id] * bos + bare(made, text) for text in texts]


@every_tokenizer
def test_a_tokenizer_that_appends_nothing_is_believed_as_it_is(kind: str) -> None:
    made, texts = tokenizer(kind, bos=True), ["The capital of Italy is", "a number </s>", ""]
    assert read_texts(made, texts) == made(texts)["input_ids"]


def test_an_end_that_the_text_spells_is_part_of_it() -> None:
    made = tokenizer("bytes", bos=True, eos=True)
    assert read_texts(made, ["</s>", "<s>"]) == [[made.bos_token_id, made.eos_token_id], [made.bos_token_id] * 2]


def test_a_tokenizer_with_few_letters_is_found_out_all_the_same() -> None:
    made = Tokenizer(BPE(vocab={"的": 0, "国": 1, "</s>": 2}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s> </s>", special_tokens=[("</s>", 2)])
    assert read_texts(PreTrainedTokenizerFast(tokenizer_object=made), ["国的", "abc"]) == [[1, 0], []]


# Special tokens that a text spells -------------------------------------------------------------------------------


def counted(made: Any, *texts: str) -> tuple[int, int, tuple[str, ...]]:
    found = count_spelled(made, read_texts(made, texts))
    return found.doubled, found.special, found.tokens


def test_special_tokens_that_a_text_spells_are_counted() -> None:
    made = tokenizer("bytes", bos=True)
    assert counted(made, "France is", "Italy") == (0, 0, ())
    assert counted(made, "<s>France is", "Italy", "<s>8") == (2, 0, ("<s>",))
    assert counted(made, "France </s> is", "Italy", "a <s> b </s> c </s>") == (0, 2, ("</s>", "<s>"))
    assert counted(made, "<s>France </s> is", "Italy") == (1, 1, ("<s>", "</s>"))


def test_without_a_token_before_each_text_none_is_doubled() -> None:
    assert counted(tokenizer("bytes"), "<s>France is", "Italy") == (0, 1, ("<s>",))


def test_an_unknown_word_is_no_special_token() -> None:
    assert counted(tokenizer("words", bos=True), "France is Bonn") == (0, 0, ())


# Runs ------------------------------------------------------------------------------------------------------------


def with_template(tiny_model: Path, folder: Path, template: str) -> Path:
    """The tiny model with a tokenizer that adds ``<s>`` and ``</s>``, in place of two rare bytes, by this template."""
    shutil.copytree(tiny_model, folder)
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:-2], "<s>", "</s>"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(BPE(vocab=ids, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [(piece, ids[piece]) for piece in pieces[-2:]]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ends_texts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return with_template(tiny_model, tmp_path_factory.mktemp("models") / "ends", "$A </s>")


@pytest.fixture(scope="module")
def begins_texts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return with_template(tiny_model, tmp_path_factory.mktemp("models") / "begins", "<s> $A")


def facts(path: Path) -> Path:
    with path.open("w", newline="") as file:
        rows = [(f"The sky of {town} is", ("blue", "green")[i % 2], "c") for i, town in enumerate(TOWNS)]
        csv.writer(file).writerows([("prompt", "answer", "category"), *rows])
    return path


def next_token(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def test_states_answers_and_targets_are_those_of_the_text_and_not_of_its_end(
    tmp_path: Path, run_kdb: Callable[..., Result], ends_texts: Path, user_dataset: Path
) -> None:
    for dataset, ask in (
        (user_dataset, ASK_OPTIONS),
        (facts(tmp_path / "facts.csv"), ()),
    ):
        answer(run_kdb("ingest", "--model", ends_texts, "--dataset", dataset, "--warehouse", tmp_path / "w", *ask))
    opened, loaded = Warehouse(tmp_path / "w"), load_model(find_model(str(ends_texts)))
    (text, n_tokens, prob, vector) = opened.sql(
        "SELECT text, n_tokens, prob_positive, vector FROM prompts JOIN zero_shot USING (run, prompt_id)"
        " JOIN activations USING (run, prompt_id) WHERE prompt_id = 3 AND layer = 0 AND site = 'resid_post'"
    ).row(0)
    ids = bare(loaded.tokenizer, text)
    assert n_tokens == len(ids) == len(text)
    with torch.inference_mode():
        state = loaded.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1]
    torch.testing.assert_close(torch.tensor(vector), state, rtol=1e-4, atol=1e-5)
    asked = next_token(loaded, ids + bare(loaded.tokenizer, "\nAnswer:"))
    yes = loaded.tokenizer.convert_tokens_to_ids(["y", "Y"])
    assert prob == pytest.approx(float(asked[yes].sum()), rel=1e-4)
    for text, n_tokens, target, prob in opened.sql(
        "SELECT text, n_tokens, target_token_id, target_prob FROM prompts WHERE dataset = 'facts'"
    ).rows():
        ids = bare(loaded.tokenizer, f"{text} ")
        assert (n_tokens, prob) == (len(ids), pytest.approx(float(next_token(loaded, ids)[target]), rel=1e-4))


@pytest.mark.parametrize("study", ["concept", "knowledge"])
def test_a_doubled_beginning_is_counted_and_said(
    tmp_path: Path,
    run_kdb: Callable[..., Result],
    begins_texts: Path,
    user_dataset: Path,
    caplog: pytest.LogCaptureFixture,
    study: str,
) -> None:
    dataset = user_dataset if study == "concept" else facts(tmp_path / "facts.csv")
    n = 40 if study == "concept" else 4
    with caplog.at_level(logging.INFO, logger="kdb"):
        command = ("ingest", "--model", begins_texts, "--dataset", dataset, "--warehouse", tmp_path / "w")
        answer(run_kdb(*command, "--template", "<s>Well</s> {text}"))
    said = "\n".join(caplog.messages)
    assert f"{n} of {n} prompts of {dataset.stem} begin with the beginning-of-text token twice" in said
    assert f"{n} of {n} prompts of {dataset.stem} contain a special token ('<s>', '</s>')" in said
    counts = "SELECT \"check\", value, tolerance, passed FROM checks WHERE detail LIKE '%fails no run' ORDER BY 1"
    found = Warehouse(tmp_path / "w").sql(counts).rows()
    assert [row for row in found if "text" not in row[0] or "special" in row[0]] == [
        ("doubled_bos", n, None, None),
        ("special_tokens_in_text", n, None, None),
    ]


def test_texts_without_special_tokens_leave_nothing_to_say(
    tmp_path: Path,
    run_kdb: Callable[..., Result],
    begins_texts: Path,
    user_dataset: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer(run_kdb("ingest", "--model", begins_texts, "--dataset", user_dataset, "--warehouse", tmp_path / "w"))
    assert not any("token" in message and "prompts of" in message for message in caplog.messages)
    told = run_kdb("query", "checks", "--warehouse", tmp_path / "w", "--format", "csv").stdout.splitlines()
    counts = ["doubled_bos", "repeated_texts", "special_tokens_in_text", "texts_on_both_sides_paper"]
    assert sorted(line.split(",")[7] for line in told[-4:]) == counts  # after all others


# Prompts that a run is checked on ----------------------------------------------------------------------------------


def test_checks_look_at_the_shortest_longest_last_and_rarest_prompt() -> None:
    ids = [[1, 2, 3]] * 30
    ids[20], ids[21], ids[22], ids[29] = [1, 9, 2], [1], [1, 2, 3, 1, 2, 3], [3, 2, 1]
    chosen = chosen_prompts(ids)
    assert set(chosen[:4]) == {20, 21, 22, 29}
    assert chosen[4:] == [0, 1, 2, 3]
    assert len(chosen) == CHECK_PROMPTS


def test_of_few_prompts_each_is_checked_once() -> None:
    assert sorted(chosen_prompts([[1], [2, 1], [3]])) == [0, 1, 2]


def test_a_rare_token_that_overflows_is_found_before_anything_is_stored(
    tmp_path: Path, run_kdb: Callable[..., Result], tiny_model: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "overflows"))
    loaded = load_model(find_model(str(folder)))
    (rare,) = bare(loaded.tokenizer, "~")
    loaded.model.get_input_embeddings().weight[rare] = torch.inf
    loaded.model.save_pretrained(folder)
    texts = [f"Day {i}: rain{'~' * (i == 25)},{i % 2}" for i in range(40)]
    dataset = tmp_path / "d.csv"
    dataset.write_text("\n".join(["text,label", *texts]))
    result = run_kdb("ingest", "--model", folder, "--dataset", dataset, "--warehouse", tmp_path / "w")
    assert result.exit_code == 2
    assert "not finite numbers (found by the check resid_post)" in result.stderr
