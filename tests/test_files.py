"""The fingerprint of a model covers every file and setting that determines its results; no other file is loaded."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file

import kdb
from kdb.errors import ModelError
from kdb.ingest.models.files import HARMLESS_FIELDS, fingerprint, model_files
from kdb.ingest.models.find import find_model
from kdb.ingest.models.load import load_config, load_model, load_tokenizer

pytestmark = pytest.mark.slow

RunKdb = Callable[..., Result]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "mine"))


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(folder: Path) -> dict[str, Any]:
    """Split the weights over two files that an index names; returns the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {name: files[i % 2] for i, name in enumerate(sorted(weights))}
    for file in files:
        save_file({n: w for n, w in weights.items() if where[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def refusal(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(ModelError) as refused:
        call(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# The fingerprint -------------------------------------------------------------------------------------------------


def swap_two_letters(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))


DETERMINES: dict[str, Callable[[Path], Any]] = {
    "a norm's epsilon": lambda folder: change(folder / "config.json", rms_norm_eps=0.5),
    "an activation": lambda folder: change(folder / "config.json", hidden_act="relu"),
    "RoPE": lambda folder: change(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 9.0}),
    "the vocabulary": swap_two_letters,
    "special tokens": lambda folder: change(folder / "tokenizer_config.json", add_bos_token=True, bos_token="a"),
    "a file of added tokens": lambda folder: (folder / "added_tokens.json").write_text('{"<x>": 7}'),
    "sentencepiece": lambda folder: (folder / "tokenizer.model").write_bytes(b"1"),
    "merges": lambda folder: (folder / "merges.txt").write_text("a b"),
    "weights": lambda folder: save_file(
        {name: weight + 1 for name, weight in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
    ),
}


@pytest.mark.parametrize("what", DETERMINES)
def test_the_revision_changes_with_whatever_determines_the_result(folder: Path, what: str) -> None:
    before = find_model(str(folder)).revision
    DETERMINES[what](folder)
    assert find_model(str(folder)).revision != before


def test_the_revision_changes_with_where_an_index_finds_the_weights(folder: Path) -> None:
    index = shard(folder)
    before = fingerprint(folder)
    names = sorted(index["weight_map"])
    files = index["weight_map"]
    swapped = files | {names[0]: files[names[1]], names[1]: files[names[0]]}
    (folder / INDEX).write_text(json.dumps({"weight_map": swapped}))
    assert fingerprint(folder) != before


@pytest.mark.parametrize("field", HARMLESS_FIELDS)
def test_the_revision_stays_where_a_field_changes_nothing(folder: Path, field: str) -> None:
    before = fingerprint(folder)
    for name in ("config.json", "tokenizer_config.json"):
        change(folder / name, **{field: "other"})
    assert fingerprint(folder) == before


def test_the_revision_stays_where_only_layout_and_other_files_change(folder: Path) -> None:
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    (folder / "README.md").write_text("about it")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "generation_config.json").write_text('{"temperature": 2}')
    assert fingerprint(folder) == before


# An index --------------------------------------------------------------------------------------------------------


def test_weights_in_shards_are_loaded(folder: Path) -> None:
    whole = load_model(find_model(str(folder))).model.state_dict()
    shard(folder)
    found = load_model(find_model(str(folder))).model.state_dict()
    assert all((found[name] == weight).all() for name, weight in whole.items())


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("pytorch_model.bin", "never from pickles"),
        ("../mine/model.safetensors", "in the model's own folder"),
        ("/tmp/model.safetensors", "in the model's own folder"),
        ("part/model.safetensors", "in the model's own folder"),
        ("gone.safetensors", "there is no such file"),
        ("pipe.safetensors", "there is no such file"),
        ("link.safetensors", "a link to a file outside of the folder"),
    ],
)
def test_an_index_names_safetensors_in_the_folder_and_nothing_else(folder: Path, named: str, why: str) -> None:
    index = shard(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    os.mkfifo(folder / "pipe.safetensors")
    (folder.parent / "elsewhere.safetensors").write_bytes(b"")
    (folder / "link.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")
    index["weight_map"][sorted(index["weight_map"])[0]] = named
    (folder / INDEX).write_text(json.dumps(index))
    message = refusal(find_model, str(folder))
    assert f"names {named!r}: " in message
    assert why in message


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_that_is_none_is_refused(folder: Path, content: str) -> None:
    shard(folder)
    (folder / INDEX).write_text(content)
    assert INDEX in refusal(find_model, str(folder))


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    shard(folder)
    snapshot = tmp_path / "models--a--b/snapshots/abc"
    snapshot.mkdir(parents=True)
    blobs = Path(shutil.move(folder, tmp_path / "models--a--b/blobs"))
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert load_config(find_model(str(snapshot))).model_type == "llama"


# Nothing else is loaded ------------------------------------------------------------------------------------------


class _Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return Path.touch, (self.sprung,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "weights.bin"])
def test_a_config_that_names_another_weights_file_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    change(folder / "config.json", transformers_weights=name)
    find = refusal(find_model, str(folder))
    assert "holds an adapter" in find if name.startswith("adapter") else f"a weights file of its own, {name!r}" in find
    assert not (tmp_path / "sprung").exists()


def test_pickles_beside_the_weights_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    trap = pickle.dumps(_Trap(tmp_path / "sprung"))
    # The last three are what transformers takes for a checkpoint that was saved by several processes.
    for name in ("pytorch_model.bin", "training_args.bin", "vocab.pkl", ".metadata", "__0_0.distcp", "__1_0.distcp"):
        (folder / name).write_bytes(trap)
    load_model(find_model(str(folder)))
    assert not (tmp_path / "sprung").exists()


def test_loading_sees_the_files_of_the_fingerprint_alone(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"temperature": 2.0}')
    loaded = load_model(find_model(str(folder)))
    assert loaded.tokenizer.chat_template is None
    assert loaded.model.generation_config.temperature != 2.0
    names = {file.name for file in model_files(folder)}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_folder_whose_weights_have_other_names_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert "has neither model.safetensors nor" in refusal(find_model, str(folder))


# Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ingest(run_kdb: RunKdb, user_dataset: Path, tmp_path: Path) -> Callable[..., Result]:
    def run(model: Path, *options: str) -> Result:
        return run_kdb(
            *("ingest", "--model", model, "--dataset", user_dataset, "--warehouse", tmp_path / "w", *options)
        )

    return run


def test_another_config_in_the_same_folder_is_measured_anew(
    folder: Path, ingest: Callable[..., Result], tmp_path: Path, caplog: Any
) -> None:
    assert "stored (run" in ingest(folder).stdout
    assert "is stored already" in ingest(folder).stdout
    change(folder / "config.json", rms_norm_eps=0.5)
    assert "is stored already" not in ingest(folder).stdout
    assert "Another model is stored as 'mine': its weights, config or tokenizer differ" in caplog.text
    revisions = kdb.open(tmp_path / "w").sql("SELECT DISTINCT revision FROM models")
    assert len(revisions) == 2


def test_a_namesake_is_told_of_once(folder: Path, ingest: Callable[..., Result], caplog: Any) -> None:
    ingest(folder)
    change(folder / "config.json", rms_norm_eps=0.5)
    ingest(folder)
    caplog.clear()
    ingest(folder, "--noise")
    assert "Another model is stored" not in caplog.text


def test_another_name_is_no_namesake(folder: Path, ingest: Callable[..., Result], caplog: Any) -> None:
    ingest(folder)
    change(folder / "config.json", rms_norm_eps=0.5)
    ingest(folder, "--name", "other")
    assert "Another model is stored" not in caplog.text


def test_checkpoints_of_one_training_are_no_namesakes(
    folder: Path, ingest: Callable[..., Result], caplog: Any, tmp_path: Path
) -> None:
    training = tmp_path / "training"
    for step in (1, 2):
        shutil.copytree(folder, training / f"checkpoint-{step}")
        change(training / f"checkpoint-{step}/config.json", rms_norm_eps=0.1 * step)
        assert ingest(training, "--revision", f"checkpoint-{step}").exit_code == 0
    assert "Another model is stored" not in caplog.text


def test_a_failed_attempt_leaves_nothing_to_the_corrected_one(
    folder: Path, ingest: Callable[..., Result], tmp_path: Path
) -> None:
    right = (folder / "config.json").read_text()
    change(folder / "config.json", max_position_embeddings=8, num_key_value_heads=2)
    assert ingest(folder).exit_code == 2
    change(folder / "config.json", max_position_embeddings=128)
    assert ingest(folder).exit_code == 2
    (folder / "config.json").write_text(right)
    assert ingest(folder).exit_code == 0
    found = kdb.open(tmp_path / "w").sql("SELECT n_kv_heads, revision FROM models").rows()
    assert found == [(1, find_model(str(folder)).revision)]


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused(folder: Path, ingest: Callable[..., Result]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {token: number + 300 for token, number in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))
    refused = ingest(folder)
    assert refused.exit_code == 2
    assert "and the embedding of mine has 256 rows, numbered from 0. Its tokenizer is of another" in refused.stderr


def test_a_token_beyond_the_embedding_is_named_with_its_prompt_before_anything_is_measured(
    folder: Path, ingest: Callable[..., Result], tmp_path: Path
) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"id": 300, "content": "Day 39", "special": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append(token | {"single_word": False, "normalized": False})
    path.write_text(json.dumps(content))
    refused = ingest(folder)
    assert refused.exit_code == 2
    assert re.search(r"Prompt 39 of .*Day 39.* has token 256, and the embedding of mine has 256 rows", refused.stderr)
    assert "Traceback" not in refused.stderr


def test_a_tokenizer_of_one_letter_is_refused(folder: Path, ingest: Callable[..., Result]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {"q": 0}
    path.write_text(json.dumps(content))
    assert load_tokenizer(find_model(str(folder)))("Day")["input_ids"] == []
    refused = ingest(folder)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
