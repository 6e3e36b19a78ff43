"""Models are found and loaded, or refused in one message that says what is wrong and what to do."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, T5Config

from kdb.errors import ModelError, UnknownNameError
from kdb.ingest.forward.capture import Capture
from kdb.ingest.forward.checks import check_capture
from kdb.ingest.models.files import fingerprint
from kdb.ingest.models.find import REGISTRY, ModelSource, find_model
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.load import load_config, load_model, load_tokenizer, model_row, pick_device

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install 'kdb-lm[int8]'"
)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_model, tmp_path / "mine"))


@pytest.fixture
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Return the message of the ModelError that the call raises; check that it is one line."""
    with pytest.raises(ModelError) as refused:
        call(*args, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> None:
    """Split the weights over two files that an index names."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    for file, some in halves.items():
        save_file({name: weights[name] for name in some}, folder / file, {"format": "pt"})
    where = {name: file for file, some in halves.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


# Finding ---------------------------------------------------------------------------------------------------------


def test_the_registry_has_the_models_of_both_studies_and_two_small_ones() -> None:
    assert [(model.name, model.family, model.size) for model in REGISTRY.values()] == [
        ("gemma-2b", "gemma", "2B"),
        ("gemma-7b", "gemma", "7B"),
        ("llama-7b", "llama", "7B"),
        ("llama-13b", "llama", "13B"),
        ("llama-2-7b-chat", "llama-2", "7B"),
        ("llama-2-13b-chat", "llama-2", "13B"),
        ("qwen-0.5b", "qwen", "0.5B"),
        ("qwen-1.8b", "qwen", "1.8B"),
        ("qwen-4b", "qwen", "4B"),
        ("qwen-7b", "qwen", "7B"),
        ("qwen-14b", "qwen", "14B"),
        ("gpt2", "gpt2", "124M"),
        ("gpt2-large", "gpt2", "774M"),
        ("smollm2-135m", "smollm2", "135M"),
        ("gemma-3-270m", "gemma-3", "270M"),
    ]


def test_a_folder_is_a_model_named_after_itself(folder: Path) -> None:
    found = find_model(str(folder))
    revision = fingerprint(folder)
    assert found == ModelSource("mine", None, "mine", revision, folder)
    assert find_model(str(folder), name="other") == ModelSource("other", None, "mine", revision, folder)


def test_a_folder_can_be_meant_by_a_dot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find_model(".").name == "mine"


def test_the_revision_of_a_sharded_model_changes_with_any_shard(folder: Path) -> None:
    shard(folder)
    first = find_model(str(folder)).revision
    (folder / "second.safetensors").write_bytes(b"b")
    assert len(first) == 64
    assert find_model(str(folder)).revision != first


def test_a_gguf_file_is_a_model_named_after_its_stem(tmp_path: Path) -> None:
    path = tmp_path / "small-q8.gguf"
    path.write_bytes(b"GGUF")
    found = find_model(str(path))
    assert (found.name, found.source, found.is_gguf) == ("small-q8", "small-q8.gguf", True)
    assert found.revision == hashlib.sha256(b"GGUF").hexdigest()


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"^Unknown model 'smollm-135m'\. Did you mean 'smollm2-135m'"):
        find_model("smollm-135m")


@pytest.mark.parametrize("spec", ["a/b/c", "gpt-5"])
def test_what_is_no_name_path_or_hub_id_is_unknown(spec: str) -> None:
    with pytest.raises(UnknownNameError, match=r"a hub id \(owner/name\), a folder or a \.gguf file works too"):
        find_model(spec)


@pytest.mark.parametrize("spec", ["./nothing", "/nothing/here", "~/nothing", "../a/b"])
def test_a_missing_folder_is_refused(spec: str) -> None:
    assert refusal(find_model, spec).startswith(
        f"No such folder: {spec!r}. --model takes a folder with a model's files"
    )


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    assert refusal(find_model, str(tmp_path / "no.gguf")).startswith(f"There is no file '{tmp_path}/no.gguf'")


@pytest.mark.parametrize("weights", [[], ["pytorch_model.bin"], ["model.ckpt", "model.pt"]])
def test_a_folder_of_pickles_or_without_weights_is_refused(folder: Path, weights: list[str]) -> None:
    (folder / "model.safetensors").unlink()
    for name in weights:
        (folder / name).write_bytes(b"pickle")
    assert refusal(find_model, str(folder)) == (
        f"'{folder}' holds no model that kdb reads: expected config.json and *.safetensors there, or name a .gguf file."
    )


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    assert "--revision is for models on the hub" in refusal(find_model, str(folder), revision="main")


# The hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | Exception], list[dict[str, Any]]]:
    """Make the hub give a folder or raise; returns the list of what it was asked for."""

    def answer(with_: Path | Exception) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def snapshot_download(repo_id: str, **options: Any) -> str:
            asked.append({"repo_id": repo_id} | options)
            if isinstance(with_, Exception):
                raise with_
            return str(with_)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return answer


def http_error(kind: type[errors.HfHubHTTPError]) -> Exception:
    return kind("from the hub", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]


def test_a_hub_model_is_pinned_to_the_commit_it_was_found_at(folder: Path, hub: Any) -> None:
    asked = hub(folder)
    assert find_model("owner/name") == ModelSource("owner/name", None, "owner/name", "mine", folder)
    pinned = find_model("qwen-0.5b", name="qwen", revision="v2")
    assert pinned == ModelSource("qwen", "qwen", "Qwen/Qwen1.5-0.5B", "mine", folder, pinned="v2")
    assert [(of["repo_id"], of["revision"]) for of in asked] == [("owner/name", None), ("Qwen/Qwen1.5-0.5B", "v2")]


def test_a_packaged_model_comes_from_the_hub_where_a_revision_is_asked_for(folder: Path, hub: Any) -> None:
    asked = hub(folder)
    find_model("smollm2-135m", revision="main")
    assert [of["repo_id"] for of in asked] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_neither_pickles_nor_code_are_downloaded(folder: Path, hub: Any) -> None:
    requests = hub(folder)
    find_model("owner/name")
    [asked] = requests
    files = ["config.json", "model.safetensors", "vocab.txt", "pytorch_model.bin", "modeling.py", "onnx/config.json"]
    wanted = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(wanted) == ["config.json", "model.safetensors", "vocab.txt"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(errors.GatedRepoError),
            "google/gemma-2b is gated: accept its licence at https://huggingface.co/google/gemma-2b, then log in "
            "with `hf auth login` or set HF_TOKEN.",
        ),
        (
            http_error(errors.RepositoryNotFoundError),
            "The hub has no model 'google/gemma-2b', or it is private: check the name, or log in with `hf auth login`.",
        ),
        (
            http_error(errors.RevisionNotFoundError),
            "google/gemma-2b has no revision 'v9': see its branches and tags on the hub.",
        ),
        (
            OSError(28, "No space left on device"),
            "Cannot download 'google/gemma-2b': [Errno 28] No space left on device",
        ),
        (RuntimeError("broken\nstream"), "Cannot download 'google/gemma-2b': broken stream"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(hub: Any, error: Exception, message: str) -> None:
    hub(error)
    assert refusal(find_model, "gemma-2b", revision="v9") == message


def test_offline_and_not_in_the_cache_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert refusal(find_model, "gpt2") == (
        "openai-community/gpt2 is not on this machine, and the hub cannot be reached: connect to the internet, or "
        "give --model the path of a folder or a .gguf file."
    )


def test_a_hub_model_without_safetensors_is_refused(tmp_path: Path, hub: Any) -> None:
    hub(tmp_path)
    message = "owner/name has no safetensors, the only weights on the hub that kdb reads."
    assert refusal(find_model, "owner/name") == message


def test_a_hub_id_with_odd_letters_is_refused() -> None:
    assert refusal(find_model, "a b/c?").startswith("Cannot download 'a b/c?': Repo id must use")


# Loading ---------------------------------------------------------------------------------------------------------


def test_a_folder_loads_ready_to_run(folder: Path) -> None:
    loaded = load_model(find_model(str(folder)), dtype="bfloat16")
    assert not loaded.model.training
    assert {(w.dtype, w.requires_grad) for w in loaded.model.parameters()} == {(torch.bfloat16, False)}
    assert loaded.tokenizer("Hi")["input_ids"] == loaded.tokenizer.convert_tokens_to_ids(["H", "i"])


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    message = "This machine has no device 'tpu9': leave --device out, or use cpu."
    assert refusal(pick_device, "tpu9") == message
    assert refusal(load_model, find_model(str(folder)), device="tpu9") == message


def test_code_that_comes_with_a_built_in_architecture_is_not_run(folder: Path) -> None:
    come_with_code(folder)
    loaded = load_model(find_model(str(folder)))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not (folder / "was-run").exists()


def test_a_model_that_needs_code_of_its_own_is_refused(folder: Path) -> None:
    come_with_code(folder)
    change_config(folder, model_type="mine")
    for load in (load_config, load_model):
        assert refusal(load, find_model(str(folder))).endswith(
            " mine: it needs custom code, which kdb does not run. Use a model whose class is part of transformers."
        )
    assert not (folder / "was-run").exists()


def come_with_code(folder: Path) -> None:
    (folder / "modeling.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')")
    code = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M", "AutoTokenizer": ["modeling.T", None]}
    change_config(folder, auto_map=code)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["modeling.T", None]}}))


def test_a_config_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    assert refusal(find_model, str(folder)).startswith(f"'{folder}/config.json' is not a valid JSON file: ")


def test_a_config_without_model_type_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    assert "Should have a `model_type` key" in refusal(load_config, find_model(str(folder)))


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert refusal(load_tokenizer, find_model(str(folder))).startswith("Cannot load the tokenizer of mine: ")


def test_a_model_without_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert refusal(load_model, find_model(str(folder))).startswith("Cannot load the tokenizer of mine: ")


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"junk" * 100, lambda data: b""])
def test_damaged_safetensors_are_refused(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    assert refusal(load_model, find_model(str(folder))).startswith(
        "Cannot read the weights in 'model.safetensors': Error while deserializing"
    )


def test_weights_that_a_file_lacks_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert refusal(load_model, find_model(str(folder))) == (
        "The files of mine do not fit its config: 1 of its weights are not there, or have another shape, such as "
        "'model.layers.1.mlp.up_proj.weight'."
    )


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=40)
    assert "do not fit its config: 6 of its weights" in refusal(load_model, find_model(str(folder)))


def keep(folder: Path, **more: torch.Tensor) -> None:
    """Write the weights with more of them."""
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",  # a bias that the config leaves out
        "model.layers.0.self_attn.q_norm.weight",  # a norm that another architecture has
        "model.layers.2.input_layernorm.weight",  # a layer beyond those of the config
        "v_head.weight",
    ],
)
def test_weights_without_a_place_are_refused_by_name(folder: Path, name: str) -> None:
    keep(folder, **{name: torch.ones(16)})
    assert refusal(load_model, find_model(str(folder))) == (
        "The files of mine do not fit its config: 1 of their weights have no place in a LlamaForCausalLM, such as "
        f"{name!r}. Take the config.json that belongs to them."
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.encoder.weight",
        "multi_modal_projector.linear.weight",
        "mtp.layers.0.mlp.up_proj.weight",
    ],
)
def test_weights_that_cannot_change_an_answer_may_be_left_over(folder: Path, name: str) -> None:
    keep(folder, **{name: torch.ones(4)})
    assert load_model(find_model(str(folder))).source.name == "mine"


@pytest.mark.parametrize(("shape", "refused"), [((1, 1, 8, 8), False), ((), False), ((16,), True)])
def test_a_mask_of_an_older_version_is_told_from_a_bias(folder: Path, shape: tuple[int, ...], refused: bool) -> None:
    (folder / "model.safetensors").unlink()
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    keep(folder, **{"transformer.h.0.attn.bias": torch.ones(shape)})
    if refused:
        assert "'transformer.h.0.attn.bias'" in refusal(load_model, find_model(str(folder)))
    else:
        load_model(find_model(str(folder)))


def test_weights_that_a_class_passes_over_in_silence_are_refused_too(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gpt_neox", vocab_size=256, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    keep(folder, **{"gpt_neox.layers.0.attention.bias": torch.ones(16)})
    assert "'gpt_neox.layers.0.attention.bias'" in refusal(load_model, find_model(str(folder)))


ODD: dict[str, dict[str, Any]] = {
    "no layers": {"num_hidden_layers": 0},
    "a billion layers": {"num_hidden_layers": 10**9},
    "negative heads": {"num_attention_heads": -1},
    "heads that do not divide": {"num_key_value_heads": 3},
    "no vocabulary": {"vocab_size": 0},
    "fewer experts than chosen": {"num_local_experts": 2, "num_experts_per_tok": 4},
    "a vocabulary without end": {"vocab_size": 10**12},
    "an infinite width": {"hidden_size": 1e308},
    "a text for a width": {"hidden_size": "x"},
    "a list for a width": {"intermediate_size": []},
    "no width": {"hidden_size": None},
    "an activation that nobody has": {"hidden_act": "nope"},
    "a RoPE that nobody has": {"rope_parameters": {"rope_type": "nope", "factor": 2, "rope_theta": 1.0}},
    "a number for RoPE": {"rope_parameters": 7},
    "labels without end": {"num_labels": 10**11},
    "experts without end": {"num_local_experts": 10**10},
    "nested layers without end": {"text_config": {"num_hidden_layers": 10**10}},
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_config_is_one_message(folder: Path, what: str) -> None:
    change_config(folder, **ODD[what])
    message = refusal(load_model, find_model(str(folder)))
    assert re.match(r"(Cannot|The config of|The files of)\b", message), message


def test_attention_that_would_be_downloaded_is_not_asked_for(folder: Path) -> None:
    change_config(folder, _attn_implementation="kernels-community/flash-attn")
    assert load_model(find_model(str(folder))).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("content", ["[]", "7", '"x"', "null"])
def test_a_config_that_is_no_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "something in it has the wrong type" in refusal(load_model, find_model(str(folder)))


def test_an_encoder_decoder_is_refused(folder: Path) -> None:
    T5Config().save_pretrained(folder)
    assert refusal(load_model, find_model(str(folder))) == (
        "mine cannot be measured: it is an encoder-decoder (T5Config), and kdb measures causal language models."
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "a classifier (LlamaForSequenceClassification)"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "a masked language model (BertForMaskedLM)"),
        ({"architectures": ["ViTModel"], "model_type": "vit"}, "of the type 'vit', which transformers does not list"),
    ],
)
def test_what_is_no_causal_language_model_is_named(folder: Path, changes: dict[str, Any], what: str) -> None:
    change_config(folder, **changes)
    message = refusal(load_model, find_model(str(folder)))
    assert message.startswith(f"mine cannot be measured: it is {what}"), message


def test_an_error_of_number_formats_says_which_one_works() -> None:
    said = r"mine cannot be run: expected .* `--dtype float32` avoids that\.$"
    with pytest.raises(ModelError, match=said), model_errors("mine cannot be run"):
        _ = torch.ones(2, 2) @ torch.ones(2, 2, dtype=torch.bfloat16)


# GGUF ------------------------------------------------------------------------------------------------------------

QWEN2 = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture
def qwen2() -> Any:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, tie_word_embeddings=False, **QWEN2))


def write_gguf(path: Path, model: Any, leave_out: str = "") -> Path:
    """A Qwen 2 as llama.cpp would write it, with a tokenizer of 31 letters and a pair."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(ord("A") + i) for i in range(31)] + ["AB"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 32)
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 1)
    for name, weight in model.state_dict().items():
        if name != leave_out:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_unpacked_once_into_the_weights_it_holds(tmp_path: Path, user_cache: Path, qwen2: Any) -> None:
    found = find_model(str(write_gguf(tmp_path / "small.gguf", qwen2)))
    loaded = load_model(found)
    assert all(torch.equal(w, qwen2.state_dict()[name]) for name, w in loaded.model.state_dict().items())
    [unpacked] = (user_cache / "kdb" / "models").iterdir()
    first = (unpacked / "model.safetensors").stat().st_mtime_ns
    load_model(found)
    assert (unpacked / "model.safetensors").stat().st_mtime_ns == first


def test_a_gguf_file_that_lacks_weights_is_refused_and_leaves_nothing(
    tmp_path: Path, user_cache: Path, qwen2: Any
) -> None:
    path = write_gguf(tmp_path / "small.gguf", qwen2, leave_out="model.layers.0.mlp.up_proj.weight")
    assert "does not fit the config that it gives: 1 of the model's weights" in refusal(
        load_model, find_model(str(path))
    )
    assert list((user_cache / "kdb" / "models").iterdir()) == []


@pytest.mark.parametrize("keep", [0, 4, 100, -500])
@pytest.mark.usefixtures("user_cache")
def test_a_gguf_file_that_was_cut_off_is_refused(tmp_path: Path, qwen2: Any, keep: int) -> None:
    path = write_gguf(tmp_path / "small.gguf", qwen2)
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(load_config, find_model(str(path))) == (
        "Cannot read the GGUF file 'small.gguf': it ends too early, or is damaged. Copy or download it again."
    )


@pytest.mark.usefixtures("user_cache")
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_text("<html>not found</html>")
    assert "GGUF magic" in refusal(load_model, find_model(str(path)))


# What a config says ----------------------------------------------------------------------------------------------

SIZES = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "value_head_dim", "hidden_size", "intermediate_size")
TWO = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "llama": (TWO | {"num_key_value_heads": 2, "intermediate_size": 100, "head_dim": 8}, (2, 4, 2, 8, 8, 64, 100)),
    "gpt2": ({"n_embd": 64, "n_layer": 3, "n_head": 4}, (3, 4, 4, 16, 16, 64, 256)),
    "opt": (TWO | {"ffn_dim": 96, "word_embed_proj_dim": 64}, (2, 4, 4, 16, 16, 64, 96)),
    "ctrl": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 96}, (2, 4, 4, 16, 16, 64, 96)),
    "falcon": (TWO | {"multi_query": True}, (2, 4, 1, 16, 16, 64, 256)),
    "deepseek_v2": (
        TWO
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4, "v_head_dim": 6}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 80},
        (2, 4, 4, 12, 6, 64, 24),
    ),
    "mamba": ({"hidden_size": 64, "num_hidden_layers": 2}, (2, None, None, None, None, 64, None)),
}


def row_of(config: Any) -> dict[str, Any]:
    return model_row(ModelSource("mine", None, "owner/mine", "abc", Path()), config, "bfloat16")


@pytest.mark.parametrize("kind", ROWS)
def test_model_row_says_the_sizes_whatever_a_config_calls_them(kind: str) -> None:
    settings, sizes = ROWS[kind]
    config = AutoConfig.for_model(kind, vocab_size=40, **settings)
    row = row_of(config)
    assert tuple(row[name] for name in SIZES) == sizes
    assert row["n_params"] == AutoModelForCausalLM.from_config(config).num_parameters()
    assert (row["family"], row["source"], row["revision"]) == (kind, "owner/mine", "abc")
    assert (row["vocab_size"], row["dtype"]) == (40, "bfloat16")


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("dense", {}),
    "mixtral": ("experts", {"num_local_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 2}),
    "mamba2": ("state-space", {"num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1}),
    "rwkv": ("state-space", {"attention_hidden_size": 64}),
    "lfm2": ("hybrid", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    "falcon_h1": ("hybrid", {"num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_ssm": 128, "mamba_d_head": 32}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_an_architecture_is_that_of_its_modules(kind: str) -> None:
    expected, settings = KINDS[kind]
    sizes = {name: n for name, n in TWO.items() if not (kind in ("mamba2", "rwkv") and "heads" in name)}
    row = row_of(AutoConfig.for_model(kind, vocab_size=40, **sizes, **settings))
    experts = (6, 3) if kind == "mixtral" else (None, None)
    assert (row["architecture_kind"], row["n_experts"], row["experts_per_token"]) == (expected, *experts)


def test_family_and_architecture_are_those_of_the_registry_and_the_file(folder: Path) -> None:
    source = ModelSource("llama-7b", "llama-1", "owner/mine", "abc", folder)
    row = model_row(source, load_config(source), "float32")
    assert (row["family"], row["architecture"]) == ("llama-1", "LlamaForCausalLM")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_once(kind: str, tied: bool) -> None:
    config = AutoConfig.for_model(kind, vocab_size=40, tie_word_embeddings=tied, **ROWS[kind][0])
    own = {id(weight): weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters()}
    assert row_of(config)["n_params"] == sum(own.values())


# Weight-only int8 ------------------------------------------------------------------------------------------------


@needs_torchao
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_keeps_states_close_and_embeddings_whole(tiny_model: Path, dtype: str) -> None:
    source = find_model(str(tiny_model))
    exact, quantized = load_model(source), load_model(source, dtype=dtype, quantize="int8")
    ids = [list(range(5)), list(range(20)), [7]]
    expected, found = Capture(exact).vectors(ids), Capture(quantized).vectors(ids)
    off = ((found - expected) ** 2).sum(-1) / (expected**2).sum(-1)
    assert 1e-8 < off.max() < 0.05**2
    assert all(row["passed"] for row in check_capture(Capture(quantized), ids))
    assert quantized.quantization == "int8"
    layer = quantized.model.model.layers[0]
    assert layer.mlp.up_proj.weight.qdata.dtype == layer.self_attn.q_proj.weight.qdata.dtype == torch.int8
    assert type(quantized.model.lm_head.weight) is torch.nn.Parameter


@needs_torchao
def test_int8_reaches_gpt2_which_keeps_its_matrices_in_a_class_of_its_own(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=256, initializer_range=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    exact, quantized = (load_model(find_model(str(folder)), quantize=q) for q in (None, "int8"))
    expected, found = (Capture(of).vectors([[1, 2, 3]]) for of in (exact, quantized))
    assert 1e-8 < ((found - expected) ** 2).sum() / (expected**2).sum() < 0.05**2
    assert quantized.model.transformer.h[0].mlp.c_fc.weight.qdata.dtype == torch.int8


@needs_torchao
def test_int8_refuses_experts_which_it_would_pass_over(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("mixtral", num_key_value_heads=1, vocab_size=256, num_local_experts=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert refusal(load_model, find_model(str(folder)), quantize="int8") == (
        "mine cannot be quantized: 'layers.0.mlp.experts.gate_up_proj' is not one matrix but a stack. Leave "
        "--quantize out."
    )


@pytest.mark.parametrize(
    ("device", "where", "package"), [("cpu", "the CPU", "torchao"), ("cuda", "CUDA", "bitsandbytes")]
)
def test_int8_without_its_package_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, where: str, package: str
) -> None:
    monkeypatch.setattr("kdb.ingest.models.load.pick_device", lambda device: device)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = f"--quantize int8 needs {package} on {where}: `pip install 'kdb-lm[int8]'`."
    assert refusal(load_model, find_model(str(folder)), device=device, quantize="int8") == message


@pytest.mark.slow
@needs_torchao
def test_loading_prints_nothing(folder: Path) -> None:
    """torchao warns of what it does not need when transformers imports it; so this takes a fresh process."""
    code = "from kdb.ingest.models.load import load_model; from kdb.ingest.models.find import find_model; "
    code += f"load_model(find_model({str(folder)!r}), quantize='int8')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
