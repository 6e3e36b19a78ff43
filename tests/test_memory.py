"""Batch sizes: from the free memory on a GPU, constant on a CPU; a batch that does not fit is halved."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import GemmaConfig, LlamaConfig

from kdb.errors import ModelError
from kdb.ingest.forward.capture import Capture
from kdb.ingest.forward.memory import CPU_TOKENS, GPU_TOKENS, fitting_tokens, token_bytes, tokens_at_once
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.load import pick_device

LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


def test_a_token_of_llama_7b_takes_its_keys_and_values_and_a_block() -> None:
    keys_and_values = 2 * 32 * 4096
    assert token_bytes(LLAMA_7B, 2) == 2 * (keys_and_values + 3 * 11008 + 6 * 4096 + 4 * 4096)
    shared = GemmaConfig(hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4)
    shared.num_key_value_heads, shared.head_dim = 1, 256
    assert token_bytes(shared, 4) == 4 * (2 * 18 * 256 + 3 * 2048 + 6 * 640 + 4 * 4 * 256)


@pytest.mark.parametrize(("gigabytes", "expected"), [(0, 256), (1, 1526), (8, 12210), (1000, GPU_TOKENS)])
def test_a_batch_grows_with_free_memory_within_bounds(gigabytes: int, expected: int) -> None:
    each = token_bytes(LLAMA_7B, 2)
    assert fitting_tokens(gigabytes * 2**30, each) == pytest.approx(expected, rel=0.2)


def test_a_cpu_takes_what_its_cache_holds(tiny_loaded: LoadedModel) -> None:
    assert tokens_at_once(tiny_loaded) == CPU_TOKENS


@pytest.fixture
def prompts(tiny_loaded: LoadedModel) -> list[list[int]]:
    return [tiny_loaded.tokenizer("a" * n)["input_ids"] for n in range(3, 30)]


def test_a_batch_that_does_not_fit_is_halved_and_nothing_changes(
    tiny_loaded: LoadedModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, run, sizes = Capture(tiny_loaded).vectors(prompts), Capture._run, []

    def small(capture: Capture, token_ids: list[list[int]], *rest: object) -> object:
        sizes.append(len(token_ids))
        if len(token_ids) > 5:
            raise torch.OutOfMemoryError
        return run(capture, token_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Capture, "_run", small)
    found = Capture(tiny_loaded).vectors(prompts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert max(sizes) == len(prompts)


def test_a_prompt_that_does_not_fit_alone_is_one_message(
    tiny_loaded: LoadedModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Callable[[], None]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Capture, "_run", never)
    with pytest.raises(ModelError, match="A prompt of 29 tokens does not fit"):
        Capture(tiny_loaded).vectors(prompts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_model_is_spread_over_gpus_only_where_there_are_any() -> None:
    with pytest.raises(ModelError, match="spreads a model over GPUs"):
        pick_device("auto")
