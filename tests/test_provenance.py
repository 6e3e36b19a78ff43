"""The stored facts about a model are read from its files, not from the options of the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

import kdb
from kdb.ingest.models.find import REGISTRY, find_model
from kdb.ingest.models.provenance import provenance

RunKdb = Callable[..., Result]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "mine"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def store(folder: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Write the weights anew, each as what ``change`` makes of it."""
    held: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        held |= change(name, weight)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def formats(folder: Path) -> tuple[str, str | None]:
    found = provenance(find_model(str(folder)))
    return found["weights_dtype"], found["quantization"]


def test_full_precision_is_not_quantized(folder: Path) -> None:
    assert formats(folder) == ("float32", None)


def test_several_plain_formats_are_named_by_how_much_there_is_of_each(folder: Path) -> None:
    store(folder, lambda name, weight: {name: weight if "norm" in name else weight.bfloat16()})
    assert formats(folder) == ("bfloat16, float32", None)


def test_fp8_says_so_whatever_the_forward_pass_runs_in(folder: Path) -> None:
    def change(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if "_proj" not in name:
            return {name: weight}
        return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}

    store(folder, change)
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    weights_dtype, quantization = formats(folder)
    assert weights_dtype == "F32, F8_E4M3"
    assert quantization == "fp8: F32 64 %, F8_E4M3 36 %"


@pytest.mark.parametrize(
    ("settings", "packed", "kind", "share"),
    [
        ({"quant_method": "gptq", "bits": 4}, torch.int32, "I32", 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, torch.uint8, "U8", 2),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, torch.int8, "I8", 1),
    ],
)
def test_packed_weights_count_for_as_many_as_they_hold(
    folder: Path, settings: dict[str, Any], packed: torch.dtype, kind: str, share: int
) -> None:
    def change(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if "_proj" not in name:
            return {name: weight}
        rows = torch.zeros(weight.shape[0] * weight.shape[1] // share, dtype=packed)
        return {name: rows, f"{name}.absmax": torch.zeros(9)}

    store(folder, change)
    change_config(folder, quantization_config=settings)
    _formats, quantization = formats(folder)
    assert quantization == f"{settings['quant_method']}: F32 64 %, {kind} 36 %"


def test_weights_that_kdb_quantizes_say_so_with_what_they_were(folder: Path) -> None:
    source = find_model(str(folder))
    assert provenance(source, "int8")["quantization"] == "int8"
    change_config(folder, quantization_config={"quant_method": "fp8"})
    assert provenance(find_model(str(folder)), "int8")["quantization"] == "int8 of fp8: F32 100 %"


@pytest.mark.parametrize(
    ("name", "instruct"),
    [
        ("SmolLM2-135M-Instruct", True),
        ("gemma-3-1b-it", True),
        ("Llama-2-7b-chat-hf", True),
        ("gemma-3-1b-pt", None),
        ("chattering-italian", None),
        ("Qwen2-0.5B", None),
    ],
)
def test_instruct_is_what_a_name_says_and_else_open(folder: Path, name: str, instruct: bool | None) -> None:
    assert provenance(find_model(str(folder.rename(folder.with_name(name)))))["instruct"] is instruct


def test_a_chat_template_alone_says_nothing(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert provenance(find_model(str(folder)))["instruct"] is None


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ("---\nbase_model: maker/base-1b\n---\n# It\n", "maker/base-1b"),
        ("---\nbase_model:\n- maker/base-1b\n- other/x\n---\n", "maker/base-1b"),
        ("---\nlicense: mit\n---\n", None),
        ("---\nbase_model: [\n---\n", None),
        ("---\nbase_model: 7\n---\n", None),
        ("---\nbase_model: /home/me/base\n---\n", None),
        ("no front matter", None),
    ],
)
def test_the_base_model_is_the_one_that_the_card_names(folder: Path, card: str, base: str | None) -> None:
    (folder / "README.md").write_text(card)
    assert provenance(find_model(str(folder)))["base_model"] == base


@pytest.mark.parametrize(
    ("path", "base"), [("maker/base-1b", "maker/base-1b"), ("/home/me/model", None), ("./x", None), ("mine", None)]
)
def test_the_base_model_is_where_the_config_came_from_if_that_is_on_the_hub(
    folder: Path, path: str, base: str | None
) -> None:
    change_config(folder, _name_or_path=path)
    assert provenance(find_model(str(folder)))["base_model"] == base


@pytest.mark.parametrize("name", [model.name for model in REGISTRY.values() if model.package])
def test_the_registry_says_what_the_packaged_file_is(name: str) -> None:
    model = REGISTRY[name]
    if not model.is_installed:
        pytest.skip(f"{name} would be a download: the package {model.package} is not installed")
    found = provenance(find_model(name))
    assert model.packaged is not None
    assert "_".join(model.packaged.split("_")[:2]) in found["quantization"]
    assert bool(found["instruct"]) == model.instruct


def test_what_the_files_are_is_stored_and_asked_for(
    folder: Path, user_dataset: Path, tmp_path: Path, run_kdb: RunKdb
) -> None:
    store(folder, lambda name, weight: {name: weight.bfloat16()})
    named = folder.rename(folder.with_name("tiny-instruct"))
    for options in ((), ("--noise",)):
        done = run_kdb(
            *("ingest", "--model", named, "--dataset", user_dataset, "--warehouse", tmp_path / "w", *options)
        )
        assert done.exit_code == 0, done.output
    [row] = kdb.open(tmp_path / "w").query("models").rows(named=True)
    assert (row["model"], row["dtype"], row["weights_dtype"]) == ("tiny-instruct", "float32", "bfloat16")
    assert (row["quantization"], row["instruct"], row["n_runs"]) == (None, True, 2)
    assert row["revision"] == find_model(str(named)).revision


def test_kdb_models_says_which_files_a_short_name_stands_for(run_kdb: RunKdb) -> None:
    lines = {line.split()[0]: line for line in run_kdb("models").stdout.splitlines()}
    assert "instruct" in lines["llama-2-7b-chat"]
    assert "base" in lines["gpt2"]
    if REGISTRY["smollm2-135m"].is_installed:
        assert "GGUF, quantized (Q4_1)" in lines["smollm2-135m"]
        assert "instruct" in lines["smollm2-135m"]
