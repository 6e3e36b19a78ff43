"""Baselines predict labels without the model: from the majority, the words, and the number of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from kdb.ingest.concept.baselines import BASELINES, Baseline, fit_baselines, tokens_of
from kdb.ingest.concept.probing import BELOW_CHANCE
from kdb.ingest.concept.splits import make_splits, make_task
from kdb.ingest.datasets import load_dataset, prompts
from kdb.ingest.datasets.builtin import BUILT_IN


def fitted(texts: list[str], labels: list[int], groups: list[str] | None = None) -> dict[tuple[str, str], Baseline]:
    task = make_task(labels, make_splits(labels, groups=groups), groups=groups)
    lengths = [len(text.split()) for text in texts]
    return {(one.baseline, one.split): one for one in fit_baselines(texts, lengths, task)}


LABELS = [i % 2 for i in range(80)]


def test_words_that_tell_the_label_are_found() -> None:
    found = fitted([f"number {i} is {'odd' if i % 2 else 'even'}" for i in range(80)], LABELS)
    assert found["words", "paper"].accuracy == found["words", "paper"].auc == 1.0
    assert found["words", "paper"].auc_low < 1.0
    assert found["token-count", "paper"].accuracy < 0.7


def test_a_length_that_tells_the_label_is_found_and_words_that_do_not_are_not() -> None:
    found = fitted(["so " * (3 + i % 2) + f"{i}" for i in range(80)], LABELS)
    assert found["token-count", "paper"].accuracy == 1.0


def test_the_majority_is_that_of_the_training_part() -> None:
    labels = [int(i % 4 == 0) for i in range(80)]
    found = fitted([f"text {i}" for i in range(80)], labels)["majority", "paper"]
    (split,) = make_splits(labels)
    assert set(found.predicted) == {0}
    assert found.accuracy == np.mean(np.array(labels)[split.test] == 0)
    assert (found.balanced_accuracy, found.auc) == (0.5, 0.5)


def test_what_training_teaches_wrongly_is_below_chance() -> None:
    """Each country is as often true as false: one seen true in training is false in the test part."""
    countries = [f"land{i // 4}" for i in range(80)]
    texts = [f"town{i // 2} is in {country}" for i, country in enumerate(countries)]
    labels = [(i + i // 2) % 2 for i in range(80)]
    found = fitted(texts, labels, [f"town{i // 2}" for i in range(80)])
    below = {name: one.below_chance_p for name, one in found.items()}
    assert found["words", "paper"].accuracy < 0.5
    assert all(p >= BELOW_CHANCE for name, p in below.items() if name[0] == "majority")


@pytest.mark.parametrize(("text", "tokens"), [("巴黎在法国。", 6), ("Paris, in FRANCE!", 5), ("7 × 8 = 56", 5)])
def test_texts_without_spaces_have_tokens(text: str, tokens: int) -> None:
    assert len(tokens_of(text)) == tokens
    assert tokens_of("FRANCE") == tokens_of("france")


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_baseline_tells_the_label_of_a_built_in_dataset(name: str) -> None:
    dataset = load_dataset(name)
    groups = [example.group for example in dataset.examples]
    known = None if None in groups else [str(group) for group in groups]
    found = fitted(prompts(dataset), [int(example.label or 0) for example in dataset.examples], known)
    for baseline in BASELINES:
        one = found[baseline, "grouped" if known else "paper"]
        assert one.accuracy_low <= 0.5 <= one.accuracy_high, one
        assert one.below_chance_p > BELOW_CHANCE
