"""RoPE that looks at the longest row of a batch changes nothing: every state is that of the prompt alone.

The models are real and tiny, with frequencies that differ so much that one wrong pass is far off. What is expected
comes from a fresh copy of the model for each prompt, since dynamic RoPE remembers what it has read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plain import assert_same, plain
from helpers.tiny_models import loaded, prompts, tiny_config, tiny_model
from numpy.typing import NDArray

from kdb.ingest.forward.ablation import Silenced, Trial, run_trials
from kdb.ingest.forward.activation_cache import check_decomposition
from kdb.ingest.forward.capture import Capture, batches
from kdb.ingest.forward.checks import check_capture, untouched
from kdb.ingest.forward.decomposition import decompose
from kdb.ingest.forward.length_classes import LengthClasses

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 16
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.1, 2.0, 8.0, 32.0], "rope_theta": 100.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 100.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"original_max_position_embeddings": LIMIT, "rope_parameters": LONG}),
    "dynamic": ("llama", {"max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC}),
    "dynamic in some layers": (
        "gemma3_text",
        {
            "head_dim": 8,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "max_position_embeddings": LIMIT,
            "rope_parameters": {"sliding_attention": PLAIN, "full_attention": DYNAMIC},
        },
    ),
}
every_model = pytest.mark.parametrize("kind", MODELS)

LENGTHS = [5, LIMIT, LIMIT + 1, 3, 30, LIMIT - 1, 30, LIMIT + 1, 7]
"""Lengths of prompts on both sides of the limit, at it, and next to it."""


@cache
def untouched_model(kind: str) -> Any:
    """The model as it was made, which nobody runs."""
    architecture, changes = MODELS[kind]
    return tiny_model(architecture, **copy.deepcopy(changes))


def fresh(kind: str) -> Any:
    return copy.deepcopy(untouched_model(kind))


def alone(kind: str, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    return np.stack([plain(fresh(kind), MODELS[kind][0], ids) for ids in token_ids])


def off(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float((np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


# Capture ---------------------------------------------------------------------------------------------------------


@every_model
def test_a_long_row_in_a_batch_would_change_the_short_ones(kind: str) -> None:
    """The fault that the other tests look for exists: without it they would pass with any code."""
    short, long = prompts([5, 30])
    padded = torch.tensor([short + [0] * 25, long])
    with torch.inference_mode():
        states = fresh(kind)(padded, output_hidden_states=True, use_cache=False).hidden_states[1:-1]
    batched = np.stack([state[0, 4].numpy() for state in states])
    assert off(batched, alone(kind, [short])[0, :-1, 0]) > 1e-2


@every_model
@pytest.mark.parametrize("prefix", [0, 3, LIMIT, LIMIT + 2])
@pytest.mark.parametrize("budget", [40, 1000])
def test_states_are_those_of_the_prompt_alone(kind: str, prefix: int, budget: int) -> None:
    ids = prompts([max(1, n - prefix) for n in LENGTHS], prefix)
    found = Capture(loaded(fresh(kind)), batch_tokens=budget).vectors(ids, ids[0][:prefix])
    assert_same(found, alone(kind, ids))


@every_model
@pytest.mark.parametrize("prefix", [0, 3])
def test_a_cue_that_crosses_the_limit_changes_no_state_and_is_read_as_the_model_reads_it(
    kind: str, prefix: int
) -> None:
    ids, cue, told = prompts([n - prefix for n in LENGTHS if n > prefix], prefix), [5, 9], []
    capture = Capture(loaded(fresh(kind)), batch_tokens=1000)
    vectors, ends = capture.vectors_and_ends(ids, ids[0][:prefix], cue, on_batch=told.append)
    assert_same(vectors, alone(kind, ids))
    assert_same(ends, alone(kind, [row + cue for row in ids])[:, -1, 0])
    assert sum(told) == sum(map(len, ids))


@every_model
def test_the_order_of_texts_does_not_matter(kind: str) -> None:
    ids = prompts(LENGTHS)
    capture, expected = Capture(loaded(fresh(kind)), batch_tokens=1000), alone(kind, ids)
    for order in ([4, 0], [0, 4], [1, 4, 1], [2, 4, 2, 0, 1]):  # one text a call: the model has read those before
        for i in order:
            assert_same(capture.vectors([ids[i]]), expected[i : i + 1])


@every_model
def test_the_untouched_model_is_asked_as_if_it_had_read_nothing(kind: str) -> None:
    ids, model = prompts([30, LIMIT, 20, 5]), loaded(fresh(kind))
    for row in ids:
        expected = untouched(loaded(fresh(kind)), row)
        for found, own in zip(untouched(model, row), expected, strict=True):
            torch.testing.assert_close(found, own)


@every_model
def test_checks_pass_with_prompts_on_both_sides_of_the_limit(kind: str) -> None:
    ids = prompts(LENGTHS)
    rows = check_capture(Capture(loaded(fresh(kind))), ids, (), [3, 4])
    assert all(row["value"] < 1e-5 for row in rows)


# Attribution -----------------------------------------------------------------------------------------------------


@every_model
def test_trials_are_those_of_each_prompt_alone(kind: str) -> None:
    ids = prompts(LENGTHS)
    found = run_trials(decompose(loaded(fresh(kind))), [Trial(row, 3, Silenced(), everywhere=False) for row in ids])
    with torch.inference_mode():
        logits = [fresh(kind)(torch.tensor([row])).logits[0, -1].double() for row in ids]
    np.testing.assert_allclose(found.logp, [row.log_softmax(-1)[3] for row in logits], rtol=1e-4)


@every_model
def test_what_is_recorded_adds_up_to_the_model_alone(kind: str) -> None:
    rows = check_decomposition(decompose(loaded(fresh(kind))), prompts(LENGTHS))
    assert all(row["value"] < 1e-4 for row in rows)


# Classes ---------------------------------------------------------------------------------------------------------


def classes(lengths: Sequence[int], architecture: str = "llama", **changes: Any) -> list[list[int]]:
    """The lengths that may share a batch."""
    of, found = LengthClasses(tiny_config(architecture, **changes)), {}
    for n in lengths:
        found.setdefault(of(n), []).append(n)
    return list(found.values())


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "llama3"])
def test_frequencies_that_depend_on_the_config_alone_make_one_class(rope_type: str) -> None:
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8, "factor": 4.0}
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **(more if rope_type != "default" else {})}
    assert classes([1, 8, 9, 64], rope_parameters=rope) == [[1, 8, 9, 64]]


def test_a_model_without_rope_makes_one_class() -> None:
    assert classes([1, 64], "gpt2") == [[1, 64]]


def test_two_sets_of_frequencies_make_two_classes() -> None:
    found = classes([1, LIMIT, LIMIT + 1, 64], "phi3", **copy.deepcopy(MODELS["longrope"][1]))
    assert found == [[1, LIMIT], [LIMIT + 1, 64]]


@pytest.mark.parametrize("kind", ["dynamic", "dynamic in some layers"])
def test_frequencies_of_each_length_make_a_class_of_each(kind: str) -> None:
    architecture, changes = MODELS[kind]
    assert classes([1, LIMIT, 17, 18], architecture, **copy.deepcopy(changes)) == [[1, LIMIT], [17], [18]]


def test_a_rope_that_nobody_knows_lets_only_like_lengths_meet() -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "of tomorrow"}
    of = LengthClasses(config)
    assert len({of(n) for n in (1, 2, 3, 2)}) == 3


def test_batches_end_where_the_class_does_and_hold_no_more_than_they_may() -> None:
    lengths = [9, 9, 8, 4, 4, 4, 4, 1]
    assert list(batches(lengths, 100, lambda n: n > 4)) == [[0, 1, 2], [3, 4, 5, 6, 7]]
    assert list(batches(lengths, 100, lambda n: n > 4, at_most=2)) == [[0, 1], [2], [3, 4], [5, 6], [7]]
