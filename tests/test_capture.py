"""Captured states are those of the plain model: one prompt, no padding, no cache, hooks of this file's own.

The models are real and tiny: every architecture of transformers that the design names, with random weights.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from helpers.plain import assert_same, plain
from helpers.tiny_models import ARCHITECTURES, VOCAB, WINDOW, loaded, prompts, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from kdb.errors import ModelError
from kdb.ingest.forward.capture import Capture, batches, shared_prefix
from kdb.ingest.forward.checks import check_capture
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.structure import find_structure

pytestmark = pytest.mark.usefixtures("one_thread")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@cache
def capture_of(architecture: str) -> Capture:
    return Capture(loaded(tiny_model(architecture)))


# States of every architecture ------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("prefix", [0, WINDOW, 12])
def test_states_equal_those_of_one_prompt_at_a_time(architecture: str, prefix: int) -> None:
    capture = capture_of(architecture)
    capture.batch_tokens = 20
    ids = prompts([3, 1, 20, 9, WINDOW, WINDOW + 1], prefix)
    expected = np.stack([plain(capture.loaded.model, architecture, row) for row in ids])
    assert_same(capture.vectors(ids, ids[0][:prefix]), expected)


@every_architecture
@pytest.mark.parametrize("prefix", [0, 12])
def test_a_cue_changes_no_state_and_ends_where_the_model_would_go_on(architecture: str, prefix: int) -> None:
    capture, cue = capture_of(architecture), [5, 9, 2]
    capture.batch_tokens = 20
    ids = prompts([3, 1, 20, WINDOW], prefix)
    vectors, ends = capture.vectors_and_ends(ids, ids[0][:prefix], cue)
    model = capture.loaded.model
    assert_same(vectors, np.stack([plain(model, architecture, row) for row in ids]))
    assert_same(ends, np.stack([plain(model, architecture, row + cue)[-1, 0] for row in ids]))


@every_architecture
def test_every_architecture_passes_the_checks(architecture: str) -> None:
    ids = prompts([3, 1, 20, 9], prefix=7)
    rows = check_capture(capture_of(architecture), ids, ids[0][:7])
    assert [row["check"] for row in rows] == ["resid_post", "final_norm", "readout", "readout_kl"]
    assert all(row["passed"] and row["value"] < 1e-5 for row in rows)


@st.composite
def prompt_sets(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    token = st.integers(0, VOCAB - 1)
    prefix = draw(st.lists(token, max_size=12))
    rest = draw(st.lists(st.lists(token, min_size=1, max_size=16), min_size=1, max_size=5))
    return [prefix + ids for ids in rest], len(prefix)


@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt2", "opt"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(prompt_sets(), st.integers(1, 80))
def test_batches_order_padding_and_prefix_change_nothing(
    architecture: str, drawn: tuple[list[list[int]], int], budget: int
) -> None:
    ids, n_prefix = drawn
    capture = capture_of(architecture)
    capture.batch_tokens = budget
    expected = np.stack([plain(capture.loaded.model, architecture, row) for row in ids])
    assert_same(capture.vectors(ids), expected)
    assert_same(capture.vectors(ids, ids[0][:n_prefix]), expected)
    assert_same(capture.vectors(ids[::-1], ids[0][:n_prefix]), expected[::-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt"])
def test_half_precision_is_off_by_its_rounding_alone(architecture: str, dtype: str) -> None:
    ids = prompts([3, 1, 20, 9], prefix=7)
    model = tiny_model(architecture, std=0.1)
    exact = Capture(loaded(model)).vectors(ids)
    capture = Capture(loaded(model, dtype))
    assert all(row["passed"] for row in check_capture(capture, ids, ids[0][:7]))
    off = np.linalg.norm(capture.vectors(ids) - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 0 < off.max() < {"bfloat16": 0.1, "float16": 0.02}[dtype]


def test_on_batch_is_told_every_token_once() -> None:
    capture, told = capture_of("llama"), []
    capture.batch_tokens = 8
    capture.vectors_and_ends(prompts([3, 1, 20, 9]), on_batch=told.append)
    assert told == [20, 9, 4]


def test_nothing_stays_attached_to_the_model() -> None:
    capture = Capture(loaded(tiny_model("llama")))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in capture.loaded.model.modules()]
    capture.vectors(prompts([3, 1]))
    with pytest.raises(IndexError):
        capture.vectors([[VOCAB]])
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in capture.loaded.model.modules()]
    assert not any(m._forward_pre_hooks for m in capture.loaded.model.modules())


# Models that are refused -----------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_refused() -> None:
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": VOCAB}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    with pytest.raises(ModelError) as refused:
        find_structure(BartForConditionalGeneration(BartConfig(**sizes, **layers)))
    assert str(refused.value) == (
        "BartForConditionalGeneration is an encoder-decoder: kdb measures causal language models."
    )


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta", "electra"])
def test_a_masked_model_is_told_by_what_it_does(architecture: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()
    with pytest.raises(ModelError, match="is no causal language model: the state of a token depends on the tokens aft"):
        find_structure(model)
    model.config.is_decoder = True
    causal = AutoModelForCausalLM.from_config(model.config).eval()
    assert find_structure(causal).can_pad


def test_a_model_whose_blocks_run_several_times_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(ModelError, match="its 3 blocks do not run one after the other, once each"):
        find_structure(model)


def test_a_model_without_unembedding_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = None
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM has no unembedding"):
        find_structure(model)


def test_a_readout_that_does_not_give_the_logits_is_refused_with_its_error() -> None:
    capture = Capture(loaded(tiny_model("llama")))
    capture.structure = replace(capture.structure, logit_scale=1.5)
    with pytest.raises(ModelError, match=r"^tiny cannot be measured: readout is off by 0\.5, and float32 explains"):
        check_capture(capture, prompts([3, 9]))


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(ModelError, match="the state of a token depends on the tokens after it"):
        Capture(loaded(tiny_model("gemma3_text", use_bidirectional_attention=True)))


def test_one_prompt_that_overflows_is_enough_to_be_refused() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight[7] = torch.inf
    with pytest.raises(ModelError, match=r"values that are not finite numbers \(found by the check resid_post\)"):
        check_capture(Capture(loaded(model)), [[1, 2, 3], [7]])


# Prefix and batches ----------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6))
def test_shared_prefix_is_the_longest_that_leaves_every_prompt_a_token(ids: list[list[int]]) -> None:
    n = shared_prefix(ids)
    assert all(row[:n] == ids[0][:n] and len(row) > n for row in ids)
    longer = {tuple(row[: n + 1]) for row in ids}
    assert len(longer) > 1 or any(len(row) == n + 1 for row in ids)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_take_each_prompt_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    lengths = sorted(lengths, reverse=True)
    found = list(batches(lengths, budget, lambda _: 0))
    assert [place for batch in found for place in batch] == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= budget


# A real model ----------------------------------------------------------------------------------------------------


def test_smollm2_in_batches_is_smollm2_one_prompt_at_a_time(smollm2_135m: LoadedModel) -> None:
    facts = ["Paris.", "The city of Paris is in France.", "Two and two are four, and two and four are six."]
    texts = [f"Is it true? {fact * n}" for fact in facts for n in (1, 2, 3, 7)]
    ids = smollm2_135m.tokenizer(texts)["input_ids"]
    capture = Capture(smollm2_135m, batch_tokens=100)
    vectors = capture.vectors(ids, ids[0][: shared_prefix(ids)])
    assert vectors.shape == (12, 30, 2, 576)
    assert_same(vectors, np.stack([plain(smollm2_135m.model, "llama", row) for row in ids]), rtol=1e-3)
