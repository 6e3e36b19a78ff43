"""Runs in which answers share their first token, are given a prefix, or are compared whole."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.command_line import answer, refusal

from kdb.ingest.attribution import study as knowledge
from kdb.ingest.models.find import LoadedModel
from kdb.warehouse.store import Warehouse

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

Ingest = Callable[..., Result]
TOWNS = ("Bonn", "Jena", "Kiel", "Ulm", "Celle", "Trier", "Mainz", "Worms")
ANSWERS = ("ab", "ac", "ba", "bca", "c", "ca", "abc", "d")
"""Each begins with the token of another one, except d."""


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return write(
        tmp_path / "facts.csv", ((f"The sky of {t} is", a, "weather") for t, a in zip(TOWNS, ANSWERS, strict=True))
    )


def write(path: Path, rows: Iterable[Iterable[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "answer", "category"), *rows])
    return path


@pytest.fixture
def ingest(run_kdb: Ingest, tiny_model: Path, facts: Path, tmp_path: Path) -> Ingest:
    def ingest(*options: str, dataset: Path = facts) -> Result:
        few = ("--top-k", "3", "--query-values", "1", "--ablate-k", "0")
        return run_kdb(
            "ingest", "--model", tiny_model, "--dataset", dataset, *few, *options, "--warehouse", tmp_path / "w"
        )

    return ingest


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[str], list[Any]]:
    return lambda statement: Warehouse(tmp_path / "w").sql(statement).rows()


def total(loaded: LoadedModel, prompt: str, whole: str) -> float:
    """Log-probability of a text after a prompt, letter by letter: every letter is a token of the tiny model."""
    first = len(loaded.tokenizer(prompt)["input_ids"])
    ids = loaded.tokenizer(prompt + whole)["input_ids"]
    with torch.inference_mode():
        logp = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logp[i - 1, ids[i]].item() for i in range(first, len(ids)))


def test_answers_with_the_same_first_token_are_not_kept_and_counted(
    ingest: Ingest,
    opened: Any,
    monkeypatch: pytest.MonkeyPatch,
    run_kdb: Ingest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(knowledge, "KEPT_RANK", 256)
    assert ingest().exit_code == 0
    assert "The answers to 7 of 8 prompts of facts begin with the same token as another answer" in caplog.text
    found = opened("SELECT answer, kept, not_kept_because, shares_first_token FROM prompts ORDER BY prompt_id")
    assert found[:-1] == [(a, False, "shares_first_token", True) for a in ANSWERS[:-1]]
    assert found[-1][3] is False and found[-1][1] == (found[-1][2] is None)
    variant = ("--variant", "top-k=3 query-values=1 ablate-k=0")
    query = answer(run_kdb("query", "kept-prompts", *variant, "--format", "csv", "--warehouse", tmp_path / "w"))
    asked = query.splitlines()
    counted = dict(zip(asked[0].split(","), asked[1].split(","), strict=True))
    assert counted["shares_first_token"] == "7"
    assert opened("SELECT count(DISTINCT prompt_id) <= 1 FROM layer_scores") == [(True,)]


def test_whole_answers_are_kept_if_they_are_more_probable_than_every_other(
    ingest: Ingest, opened: Any, tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knowledge, "KEPT_RANK", 256)
    answer(ingest("--answer-tokens", "all"))
    columns = "text, answer, target_prob, kept, not_kept_because, target_rank, shares_first_token"
    found = opened(f"SELECT {columns} FROM prompts ORDER BY prompt_id")
    kept = 0
    for text, own, prob, is_kept, why, _rank, shared in found:
        logps = {whole: total(tiny_loaded, f"{text} ", whole) for whole in ANSWERS}
        assert prob == pytest.approx(math.exp(logps[own]), rel=1e-4)
        assert is_kept == (max(logps, key=lambda whole: logps[whole]) == own)
        assert why == (None if is_kept else "beaten_by_another_answer")
        assert shared == (own != "d")
        kept += is_kept
    assert opened("SELECT variant FROM runs") == [("answer-tokens=all top-k=3 query-values=1 ablate-k=0",)]
    assert opened("SELECT count(DISTINCT prompt_id) FROM layer_scores") == [(kept,)]
    assert opened("SELECT passed FROM checks WHERE \"check\" = 'stored_probs'") == [(True,)]


def test_of_two_answers_that_begin_alike_the_more_probable_one_is_kept(
    ingest: Ingest, opened: Any, tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(knowledge, "KEPT_RANK", 256)
    rows = [(f"The {what} of {t} is", a, t) for t in TOWNS for what, a in (("sky", "ab"), ("sea", "ac"))]
    answer(ingest("--answer-tokens", "all", dataset=write(tmp_path / "alike.csv", rows)))
    found = opened("SELECT text, answer, kept FROM prompts")
    for text, own, kept in found:
        logps = {whole: total(tiny_loaded, f"{text} ", whole) for whole in ("ab", "ac")}
        assert kept == (max(logps, key=lambda whole: logps[whole]) == own)
    assert {kept for *_, kept in found} == {True, False}


def test_one_category_whose_answers_all_begin_alike_does_not_stop_the_others(
    ingest: Ingest, opened: Any, tmp_path: Path
) -> None:
    rows = [("The sky is", "ab", "c"), ("The sea is", "ac", "c"), ("The bay is", "x", "d"), ("The bog is", "y", "d")]
    assert ingest(dataset=write(tmp_path / "alike.csv", rows)).exit_code == 0
    found = opened("SELECT category, shares_first_token, rival_token_id IS NULL FROM prompts ORDER BY prompt_id")
    assert found == [("c", True, True)] * 2 + [("d", False, False)] * 2


def test_answers_that_all_begin_alike_need_whole_answers(ingest: Ingest, tmp_path: Path) -> None:
    path = write(tmp_path / "alike.csv", [("The sky is", "ab", "c"), ("The sea is", "ac", "c")])
    assert "compare whole answers with --answer-tokens all" in refusal(ingest(dataset=path))
    answer(ingest("--answer-tokens", "all", dataset=path))


def test_the_prefix_is_stored_with_the_tokens_that_follow_it(
    ingest: Ingest, opened: Any, tiny_loaded: LoadedModel, tmp_path: Path
) -> None:
    rows = [("The tag is <", "hr", "c"), ("The sky is", "blue", "c"), ("The sea =", " green", "c"), ("x =", "\nz", "c")]
    answer(ingest(dataset=write(tmp_path / "tags.csv", rows)))
    ids = tiny_loaded.tokenizer.convert_tokens_to_ids
    columns = "answer_prefix, answer_token_ids, target_token_id, len(token_ids) = n_tokens, n_tokens - len(text)"
    found = opened(f"SELECT {columns} FROM prompts ORDER BY prompt_id")
    for (prefix, answer_ids, target, same, more), (_text, given, _c), expected in zip(
        found, rows, ("", " ", " ", "\n"), strict=True
    ):
        assert (prefix, answer_ids, target) == (expected, ids(list(given.strip())), answer_ids[0])
        assert same and more == len(expected)  # white space is a token of its own here: the prompt's last


def test_answer_prefix_wins_over_the_file_and_makes_a_variant(ingest: Ingest, opened: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "tags.csv", [("The tag is <", " h", "c"), ("The sky is", "b", "c")])
    answer(ingest("--answer-prefix", "", dataset=path))
    assert opened("SELECT DISTINCT answer_prefix, variant FROM prompts JOIN runs USING (run)") == [
        ("", "answer-prefix='' top-k=3 query-values=1 ablate-k=0")
    ]


def test_a_whole_answer_too_long_for_the_model_is_refused(ingest: Ingest, tmp_path: Path) -> None:
    path = write(tmp_path / "long.csv", [("The sky is", "a" * 5000, "c"), ("The sea is", "b", "c")])
    assert "and up to 4,999 of an answer" in refusal(ingest("--answer-tokens", "all", dataset=path))
