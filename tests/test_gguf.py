"""A GGUF file is measured as what it says, or refused by the name of what would be left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from kdb.errors import ModelError
from kdb.ingest.models import gguf as reading
from kdb.ingest.models.find import find_model
from kdb.ingest.models.load import load_config, load_model
from kdb.ingest.models.provenance import provenance

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, CONTEXT = 64, 2, 4, 2, 96, 256
TOKENS = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ri", "st"]
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXT = "The river runs below the old mill, and the mill has stood there for two hundred years."

ROUNDING = 1e-4
"""Largest relative difference of logits that rounding explains."""

Change = Callable[[gguf.GGUFWriter], None]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def llama(rope: dict[str, Any] = PLAIN, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        rope_parameters=dict(rope),
        **{"tie_word_embeddings": True, "rms_norm_eps": 1e-6} | changes,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def metadata(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 2))
    writer.add_token_merges(["r i", "s t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def tensors(model: Any) -> dict[str, NDArray[np.float32]]:
    """A Llama's weights under llama.cpp's names, with the rows of queries and keys in its order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    found = {}
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                rows = array.reshape(heads, 2, -1, array.shape[-1])
                array = rows.swapaxes(1, 2).reshape(array.shape)
        if name != "lm_head.weight":
            found[names.get_name(name, (".weight", ".bias"))] = np.ascontiguousarray(array)
    return found


def write(path: Path, held: dict[str, NDArray[np.float32]], change: Change = lambda writer: None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    metadata(writer)
    change(writer)
    for name, array in held.items():
        writer.add_tensor(name, array)
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return model(torch.tensor([list(ids)])).logits[0, -1]


def off(path: Path, model: Any) -> float:
    """Largest relative difference of the logits: the model that was read from the file, and the one written to it."""
    loaded = load_model(find_model(str(path)))
    ids = loaded.tokenizer(TEXT)["input_ids"]
    assert len(ids) > 64  # beyond what was the context before RoPE was scaled
    own = logits(model, ids)
    return float(((logits(loaded.model, ids) - own).abs() / (1 + own.abs())).max())


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as refused:
        load_config(find_model(str(path)))
    message = str(refused.value)
    assert "\n" not in message
    return message


# RoPE ------------------------------------------------------------------------------------------------------------


def divisors(model: Any) -> NDArray[np.float32]:
    """The tensor rope_freqs.weight that llama.cpp's converter writes for a model with Llama 3's RoPE."""
    plain = 1.0 / 10000.0 ** (torch.arange(0, HIDDEN // HEADS, 2).float() / (HIDDEN // HEADS))
    return np.asarray((plain / model.model.rotary_emb.inv_freq).numpy(), dtype=np.float32)


def test_a_plain_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = llama()
    assert off(write(tmp_path / "m.gguf", tensors(model)), model) < ROUNDING


def test_the_rope_of_llama_3_is_found_again_in_its_divisors(tmp_path: Path) -> None:
    model = llama(LLAMA3)
    path = write(tmp_path / "m.gguf", tensors(model) | {"rope_freqs.weight": divisors(model)})
    assert off(path, model) < ROUNDING
    assert load_config(find_model(str(path))).rope_parameters == LLAMA3
    assert off(path, llama()) > ROUNDING  # the difference can be seen


def scaled(kind: gguf.RopeScalingType, factor: float, original: int | None = None) -> Change:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        if original is not None:
            writer.add_rope_scaling_orig_ctx_len(original)

    return change


def test_linear_scaling_is_read(tmp_path: Path) -> None:
    model = llama(PLAIN | {"rope_type": "linear", "factor": 4.0})
    assert off(write(tmp_path / "m.gguf", tensors(model), scaled(gguf.RopeScalingType.LINEAR, 4.0)), model) < ROUNDING


def test_yarn_is_read(tmp_path: Path) -> None:
    model = llama(PLAIN | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    assert off(write(tmp_path / "m.gguf", tensors(model), scaled(gguf.RopeScalingType.YARN, 4.0, 64)), model) < ROUNDING


def test_no_scaling_is_no_scaling(tmp_path: Path) -> None:
    model = llama()
    assert off(write(tmp_path / "m.gguf", tensors(model), scaled(gguf.RopeScalingType.NONE, 4.0)), model) < ROUNDING


def test_divisors_that_are_not_llama_3s_are_refused(tmp_path: Path) -> None:
    odd = np.linspace(1, 3, HIDDEN // HEADS // 2, dtype=np.float32) ** 2
    path = write(tmp_path / "m.gguf", tensors(llama()) | {"rope_freqs.weight": odd})
    assert "'m.gguf' divides RoPE's frequencies (rope_freqs.weight)" in refusal(path)


# What nobody reads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.sliding_window", 16),
        ("llama.attn_logit_softcapping", 50.0),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.logit_scale", 0.25),
        ("llama.expert_count", 8),
        ("llama.attention.scale", 0.5),
        ("llama.attention.key_length", 8),
        ("llama.embedding_scale", 12.0),
        ("llama.pooling_type", 1),
        ("tokenizer.ggml.normalizer.lowercase", True),
        ("somebody.wrote_this", 1),
    ],
)
def test_a_key_that_the_model_would_not_do_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    kinds = {int: "add_uint32", float: "add_float32", bool: "add_bool"}
    path = write(tmp_path / "m.gguf", tensors(llama()), lambda w: getattr(w, kinds[type(value)])(key, value))
    assert refusal(path).startswith(f"'m.gguf' says {key} = ")


@pytest.mark.parametrize(
    "change",
    [
        scaled(gguf.RopeScalingType.LONGROPE, 4.0, 64),
        scaled(gguf.RopeScalingType.YARN, 4.0),
        lambda writer: writer.add_rope_scaling_yarn_log_mul(0.1),
    ],
)
def test_a_rope_scaling_that_cannot_be_read_is_refused_by_name(tmp_path: Path, change: Change) -> None:
    assert "says rope.scaling." in refusal(write(tmp_path / "m.gguf", tensors(llama()), change))


def test_keys_that_change_nothing_are_passed_over(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_name("A name")
        writer.add_uint32("llama.expert_count", 0)
        writer.add_uint32("llama.attention.key_length", HIDDEN // HEADS)
        writer.add_uint32("tokenizer.ggml.eot_token_id", 1)
        writer.add_string("quantize.imatrix.file", "imatrix.dat")
        writer.add_chat_template("{{ messages }}")

    model = llama()
    assert off(write(tmp_path / "m.gguf", tensors(model), change), model) < ROUNDING


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.2.attn_norm.weight", "rope_factors_long.weight"])
def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "m.gguf", tensors(llama()) | {name: np.ones(HIDDEN, dtype=np.float32)})
    assert f"such as {name!r} are left over" in refusal(path)


def test_another_way_to_split_texts_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensors(llama()), lambda writer: writer.add_tokenizer_pre("of-tomorrow"))
    assert "tokenizer.ggml.pre = 'of-tomorrow'" in refusal(path)


@pytest.mark.parametrize("adds", [True, False])
def test_the_first_token_is_added_as_the_file_says(tmp_path: Path, adds: bool) -> None:
    path = write(tmp_path / "m.gguf", tensors(llama()), lambda writer: writer.add_add_bos_token(adds))
    ids = load_model(find_model(str(path))).tokenizer("ab")["input_ids"]
    assert (ids[0] == 0) == adds


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensors(llama()), lambda writer: writer.add_type("adapter"))
    assert "'m.gguf' is not a model but of the type 'adapter'" in refusal(path)


# Parts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A folder with a model in three parts."""
    folder, held = tmp_path / "whole", tensors(llama())
    folder.mkdir()
    for i in range(3):
        writer = gguf.GGUFWriter(folder / f"m-{i + 1:05}-of-00003.gguf", "llama")
        if i == 0:
            metadata(writer)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(held))
        for name in sorted(held)[i::3]:
            writer.add_tensor(name, held[name])
        finish(writer)
    return folder


def test_a_folder_with_all_parts_is_read(split: Path) -> None:
    assert off(split, llama()) < ROUNDING
    assert find_model(str(split)).name == "whole"


def test_a_part_says_that_it_is_one(split: Path) -> None:
    with pytest.raises(ModelError, match=r"part 2 of 3 of a model: give --model the folder"):
        find_model(str(split / "m-00002-of-00003.gguf"))


def test_a_part_under_another_name_says_that_it_is_one(split: Path, tmp_path: Path) -> None:
    renamed = (split / "m-00001-of-00003.gguf").rename(tmp_path / "all.gguf")
    assert "'all.gguf' is part 1 of 3 of a model" in refusal(renamed)


def test_a_missing_part_is_named(split: Path) -> None:
    (split / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match=r"lacks 'm-00002-of-00003.gguf', part 2 of 3"):
        find_model(str(split))


def test_parts_of_two_models_are_not_mixed(split: Path) -> None:
    (split / "n-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="parts of 2 GGUF files"):
        find_model(str(split))


# The copy in the cache -------------------------------------------------------------------------------------------


def test_a_copy_that_another_reader_made_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_model(str(write(tmp_path / "m.gguf", tensors(llama()))))
    load_config(found)
    [folder] = (tmp_path / "cache/kdb/models").iterdir()
    first = (folder / "model.safetensors").stat().st_ino
    load_config(found)
    assert (folder / "model.safetensors").stat().st_ino == first
    monkeypatch.setattr(reading, "READER_VERSION", 999)
    load_config(found)
    assert (folder / "model.safetensors").stat().st_ino != first
    assert json.loads((folder / "kdb.json").read_text())["read_by"]["reader"] == 999
    assert [path.name for path in (tmp_path / "cache/kdb/models").iterdir()] == [folder.name]


def test_a_copy_of_an_earlier_kdb_is_made_anew(tmp_path: Path) -> None:
    found = find_model(str(write(tmp_path / "m.gguf", tensors(llama()))))
    old = tmp_path / "cache/kdb/models" / found.revision[:16]
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    assert load_config(found).model_type == "llama"


# What it says of itself ------------------------------------------------------------------------------------------


def test_a_quantized_file_says_its_formats_and_their_shares(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "small-instruct.gguf", "llama")
    metadata(writer)
    writer.add_string("general.base_model.0.name", "Small 1B")
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/maker/small-1b")
    for name, array in tensors(llama()).items():
        if array.ndim > 1:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array)
    finish(writer)
    assert provenance(find_model(str(tmp_path / "small-instruct.gguf"))) == {
        "weights_dtype": "Q8_0, F32",
        "quantization": "Q8_0 >99 %, F32 <1 %",
        "base_model": "maker/small-1b",
        "instruct": True,
    }


def test_a_file_in_full_precision_is_not_quantized(tmp_path: Path) -> None:
    found = provenance(find_model(str(write(tmp_path / "plain.gguf", tensors(llama())))))
    assert found == {"weights_dtype": "float32", "quantization": None, "base_model": None, "instruct": None}
