"""An adapter beside base weights is merged by peft before anything is measured, or refused with one message."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdb.errors import ModelError
from kdb.ingest.models import adapters
from kdb.ingest.models.files import fingerprint
from kdb.ingest.models.find import find_model
from kdb.ingest.models.load import load_model

peft = pytest.importorskip("peft")


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a LoRA adapter beside it, whose weights are far from zero."""
    return with_adapter(tiny_model, tmp_path / "mine", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def with_adapter(base: Path, folder: Path, config: Any) -> Path:
    shutil.copytree(base, folder)
    torch.manual_seed(1)
    model = peft.get_peft_model(load_model(find_model(str(base))).model, config)
    for name, weights in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as refused:
        load_model(find_model(str(folder)), **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_an_adapter_is_merged_into_the_weights_that_are_measured(folder: Path, tiny_model: Path) -> None:
    base, found = load_model(find_model(str(tiny_model))), load_model(find_model(str(folder)))
    lora = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    scale = 8 / 2  # lora_alpha / r
    delta = scale * lora[f"{prefix}.lora_B.weight"] @ lora[f"{prefix}.lora_A.weight"]
    before = base.model.model.layers[1].mlp.down_proj.weight
    after = found.model.model.layers[1].mlp.down_proj.weight
    assert delta.abs().max() > 0.5
    torch.testing.assert_close(after, before + delta)
    torch.testing.assert_close(
        found.model.model.layers[1].mlp.up_proj.weight, base.model.model.layers[1].mlp.up_proj.weight
    )
    assert type(found.model) is type(base.model)
    assert not any(p.requires_grad for p in found.model.parameters())


def test_the_adapter_is_part_of_what_tells_two_models_apart(folder: Path, tiny_model: Path) -> None:
    with_it = fingerprint(folder)
    assert with_it != fingerprint(tiny_model)
    change(folder / "adapter_config.json", base_model_name_or_path="elsewhere", inference_mode=False)
    assert fingerprint(folder) == with_it
    change(folder / "adapter_config.json", lora_alpha=16)
    assert fingerprint(folder) != with_it
    lora = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * weights for name, weights in lora.items()}, folder / "adapter_model.safetensors")
    assert fingerprint(folder) != with_it
    assert find_model(str(folder)).source == "mine + adapter_model.safetensors"


def test_without_peft_an_adapter_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda _name: None)
    found = refusal(folder)
    assert found.startswith(f"'{folder}' holds an adapter (adapter_config.json) beside its base weights: install peft")
    assert "merge it first (peft's merge_and_unload" in found


def test_an_adapter_of_another_base_is_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    lora = load_file(file)
    save_file({name.replace("layers.1.", "layers.7."): weights for name, weights in lora.items()}, file)
    assert "adapter_model.safetensors does not fit the base weights beside it: 8 of its weights" in refusal(folder)
    save_file({name: weights.repeat(2, 2) for name, weights in lora.items()}, file)
    assert refusal(folder).startswith("Cannot merge the adapter of mine: ")


def test_an_adapter_of_modules_that_the_base_lacks_is_refused(folder: Path) -> None:
    change(folder / "adapter_config.json", target_modules=["c_attn"])
    assert "Cannot merge the adapter of mine: " in refusal(folder)


def test_an_adapter_without_weights_to_merge_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    folder = with_adapter(tiny_model, tmp_path / "mine", config)
    assert "it is of type PROMPT_TUNING, which has no weights to merge." in refusal(folder)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    assert "kdb reads adapter_config.json and adapter_model.safetensors, both, and never pickles" in refusal(folder)


def test_an_adapter_saved_as_a_pickle_is_never_loaded(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    assert "never pickles" in refusal(folder)
    assert not (tmp_path / "sprung").exists()


def test_an_adapter_alone_is_refused(folder: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    assert f"'{folder}' holds an adapter but no base weights: add config.json" in refusal(folder)


def test_weights_that_are_no_numbers_are_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: weights * torch.nan for name, weights in load_file(file).items()}, file)
    assert refusal(folder).startswith("Cannot merge the adapter of mine: ")


def test_a_quantized_gpu_model_takes_no_adapter(folder: Path) -> None:
    with pytest.raises(
        ModelError, match="which cannot be merged into weights that are quantized on a GPU: merge it first"
    ):
        adapters.check_adapter([folder / "adapter_config.json"], "int8", "cuda:0")


class _Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return Path.touch, (self.sprung,)
