"""Load a model that was found: its config, its tokenizer and its weights.

Weights come from safetensors or GGUF, never from pickles, and code beside them is never run. A file is refused if it
lacks weights of the model, or has weights without a place in it; the message names one of them.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdb.errors import ModelError
from kdb.ingest.models.adapters import check_adapter, merged
from kdb.ingest.models.files import CONFIG, adapter_files, model_files, only, read_json
from kdb.ingest.models.find import LoadedModel, ModelSource
from kdb.ingest.models.gguf import unpacked, what_it_says
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.parts import setting
from kdb.ingest.models.quantize import bitsandbytes_config, quantize_on_cpu
from kdb.ingest.models.shape import N_EXPERTS, TOP_K, first_number, shape_of
from kdb.ingest.models.tensors import Tensor, tensors_of
from kdb.ingest.settings import Measuring


def pick_device(device: str | None) -> str:
    """Return ``device`` if given, else CUDA if available, else the CPU; raise ModelError for a missing device."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        if not torch.cuda.is_available():
            raise ModelError("--device auto spreads a model over GPUs, and this machine has none: use --device cpu.")
        return device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"This machine has no device {device!r}: leave --device out, or use cpu.") from error
    return device


def folder_of(source: ModelSource) -> Path:
    """Return the folder of safetensors to load a model from: its own, or the unpacked copy of a GGUF file."""
    files = source.gguf_files
    if files:
        _quieten()
        return unpacked(files, source.revision)
    return source.path


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer of a model."""
    from transformers import AutoTokenizer

    with _seen(source, f"Cannot load the tokenizer of {source.name}") as folder:
        return AutoTokenizer.from_pretrained(folder, **_OURS_ALONE)


def load_config(source: ModelSource) -> Any:
    """Load the config of a model, without its weights. Raises ModelError for impossible sizes."""
    from transformers import AutoConfig

    with _seen(source, f"Cannot read the config of {source.name}") as folder:
        config = AutoConfig.from_pretrained(folder, **_OURS_ALONE)
        _refuse_kind(source, config)
        config._attn_implementation = _attention(config)
        _check_sizes(source, config, _tensors(folder))
    return config


def load_model(
    source: ModelSource, *, device: str = "cpu", dtype: str = Measuring.dtype, quantize: str | None = None
) -> LoadedModel:
    """Load a model's weights; raise ModelError if transformers cannot, or would ignore some.

    ``quantize='int8'`` quantizes only the weights: by torchao on the CPU, bitsandbytes on CUDA. ``device='auto'``
    spreads the blocks over all GPUs, for a model that is larger than one of them. An adapter beside the weights is
    merged into them.
    """
    import torch

    pick_device(device)
    adapter = [] if source.is_gguf else adapter_files(source.path)
    check_adapter(adapter, quantize, device)
    tokenizer, config = load_tokenizer(source), load_config(source)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": _attention(config)}
    on_cuda = device.startswith("cuda") or device == "auto"
    if on_cuda:
        # Bounds need float32 products with float32 rounding, whatever the process had set before.
        torch.set_float32_matmul_precision("highest")
    if quantize and on_cuda:
        options["quantization_config"] = bitsandbytes_config()
    if device == "auto" or (quantize and on_cuda):
        options["device_map"] = device
    with _seen(source, f"Cannot load {source.name}") as folder:
        model, info = _class_for(config).from_pretrained(
            folder, config=config, use_safetensors=True, **_TELL_MISFITS, **_OURS_ALONE, **options
        )
        _refuse_misfit(source, model, info, _tensors(folder))
        if adapter:
            model = merged(model, adapter, source.name)
        if quantize and not on_cuda:
            quantize_on_cpu(model, source.name)
        if "device_map" not in options:
            model.to(device)
    model.eval().requires_grad_(False)
    first = next(model.parameters()).device if device == "auto" else torch.device(device)
    return LoadedModel(source, model, tokenizer, dtype, first, quantize)


# Kinds of models ------------------------------------------------------------------------------------------------

_OTHER_KINDS = {
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier of tokens",
    "ForMultipleChoice": "a classifier",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMaskedLM": "a masked language model",
    "ForImageClassification": "a vision model",
    "ForObjectDetection": "a vision model",
    "ForCTC": "a speech recognizer",
}
"""Endings of model classes that are no causal language models, with what they are."""


def _refuse_kind(source: ModelSource, config: Any) -> None:
    """Raise ModelError for a model that is no causal language model, by its config; say what it is."""
    named = (config.architectures or [type(config).__name__])[0]
    kinds = (kind for ending, kind in _OTHER_KINDS.items() if named.endswith(ending))
    kind = "an encoder-decoder" if config.is_encoder_decoder else next(kinds, None)
    if kind is None and _class_for(config) is None:
        kind = f"of the type {config.model_type!r}, which transformers does not list as one"
    if kind is not None:
        raise ModelError(
            f"{source.name} cannot be measured: it is {kind} ({named}), and kdb measures causal language models."
        )


def _class_for(config: Any) -> Any:
    """Return the class of transformers that loads a model with this config; None for one that generates no text.

    A wrapper that also reads images or sound is listed as such, not among causal language models. The text model of
    some wrappers is not listed at all, and is found by the name in its config.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    named, kind = config.architectures or [], type(config)
    for several in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if kind in several._model_mapping:
            listed = several._model_mapping[kind]
            classes = listed if isinstance(listed, tuple) else (listed,)
            return next((one for one in classes if one.__name__ in named), classes[0])
    found = getattr(transformers, next((name for name in named if name.endswith("ForCausalLM")), ""), None)
    return found if getattr(found, "config_class", None) is kind else None


# Misfits ---------------------------------------------------------------------------------------------------------

HARMLESS_WEIGHTS = {
    r"rotary_emb\.inv_freq$": "RoPE's frequencies, which transformers computes from the config",
    r"(^|\.)position_ids$": "the numbers 0, 1, 2, …",
    r"\.(attn|attention)\.(masked_)?bias$": "the causal mask as older versions saved it, which is computed today",
    r"(^|\.)mtp\.": "predicts tokens after the next one, and takes no part in the next one's",
    r"(^|\.)(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|embed_vision|embed_audio)\.": (
        "reads images or sound, and kdb gives text"
    ),
}
"""Weights without a place in the model that cannot change its answer to a text, with reasons."""


def _refuse_misfit(source: ModelSource, model: Any, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError for missing and surplus weights: transformers invents or ignores them, and only logs it."""
    made_up = sorted({*info["missing_keys"], *(name for name, *_shapes in info["mismatched_keys"])})
    if made_up:
        raise ModelError(
            f"The files of {source.name} do not fit its config: {len(made_up)} of its weights are not there, or "
            f"have another shape, such as {made_up[0]!r}."
        )
    left_over = sorted({*info["unexpected_keys"], *_passed_over(model, tensors)})
    left_over = [name for name in left_over if not _is_harmless(name, tensors)]
    if left_over:
        raise ModelError(
            f"The files of {source.name} do not fit its config: {len(left_over)} of their weights have no place in a "
            f"{type(model).__name__}, such as {left_over[0]!r}. Take the config.json that belongs to them."
        )


def _passed_over(model: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Weights that the model's class tells transformers not to report."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    placed = set(model.state_dict())
    return [name for name in tensors if name not in placed and any(re.search(of, name) for of in patterns)]


def _is_harmless(name: str, tensors: Mapping[str, Tensor]) -> bool:
    pattern = next((pattern for pattern in HARMLESS_WEIGHTS if re.search(pattern, name)), None)
    # A real bias is a vector; the mask is a square matrix or one number.
    is_bias = pattern is not None and "masked_" in pattern and name in tensors and len(tensors[name].shape) == 1
    return pattern is not None and not is_bias


_MOST_PER_BYTE = 8
"""Largest number of parameters that one byte of the files can hold."""

_COUNTS = re.compile(r"(num|n)_.*(layers?|blocks?|experts?|labels)$")
"""Fields of a config that determine how many parts are built, even before they hold weights."""


def _check_counts(source: ModelSource, content: Any, n_weights: int) -> None:
    """Raise ModelError for a config with more parts than the files have weights.

    Called before transformers reads the config, also for a tokenizer: a config with a billion layers or labels would
    take hours and all memory.
    """
    for name, value in content.items() if isinstance(content, dict) else ():
        _check_counts(source, value, n_weights)
        if _COUNTS.match(name) and isinstance(value, int | float) and value > max(n_weights, 1024):
            raise ModelError(f"The config of {source.name} has {name} = {value:,}, and its files {n_weights} weights.")


def _check_sizes(source: ModelSource, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError for a config whose sizes are impossible, or far too large for the files."""
    text = config.get_text_config(decoder=True)
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        value = setting(text, name, 1)  # a state-space model has no heads
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"The config of {source.name} has {name} = {value!r}: expected a whole number from 1.")
    heads, kv_heads = setting(text, "num_attention_heads"), setting(text, "num_key_value_heads")
    if heads and kv_heads is not None and (not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads):
        raise ModelError(
            f"The config of {source.name} has num_key_value_heads = {kv_heads!r}, which does not divide its "
            f"{heads} heads."
        )
    _check_experts(source, text)
    held = sum(tensor.n_bytes for tensor in tensors.values())
    with model_errors(f"Cannot load {source.name}"):
        n_params = count_params(config)
    if not 0 < n_params <= _MOST_PER_BYTE * held:
        raise ModelError(
            f"The files of {source.name} do not fit its config: the config needs {n_params:,} parameters, and the "
            f"files hold {held:,} bytes."
        )


def _check_experts(source: ModelSource, text: Any) -> None:
    """Raise ModelError for a config whose router chooses more experts than there are."""
    n_experts, chosen = (first_number(text, names, 0) for names in (N_EXPERTS, TOP_K))
    if 0 < n_experts < chosen:
        raise ModelError(
            f"The config of {source.name} chooses {chosen} experts per token, and has only {n_experts:,} experts."
        )


# Shape -----------------------------------------------------------------------------------------------------------


def model_row(source: ModelSource, config: Any, dtype: str) -> dict[str, Any]:
    """Build the row of ``models`` with a model's sizes, from its modules; allocates no memory for weights."""
    with model_errors(f"Cannot read the config of {source.name}"):
        shape = shape_of(skeleton(config))
    if source.is_gguf and what_it_says(folder_of(source)).get("tied"):
        shape["n_params"] -= shape["vocab_size"] * shape["hidden_size"]
    return shape | {
        "family": source.family or config.model_type,
        "source": source.source,
        "revision": source.revision,
        "architecture": (config.architectures or [type(config).__name__])[0],
        "dtype": dtype,
    }


def count_params(config: Any) -> int:
    """Count the parameters of a model with this config, tied weights once; allocates no memory for them."""
    return int(skeleton(config).num_parameters())


def skeleton(config: Any) -> Any:
    """Build the modules of a model with this config, without weights: every tensor is on the device ``meta``."""
    import torch

    with torch.device("meta"):
        return _class_for(config)._from_config(config, attn_implementation=_attention(config))


@contextlib.contextmanager
def _seen(source: ModelSource, what: str) -> Iterator[Path]:
    """Provide a folder with the files of a model and no others; convert an error within to a ModelError."""
    _quieten()
    with model_errors(what), only(model_files(folder_of(source))) as folder:
        _check_counts(source, read_json(folder / CONFIG), len(_tensors(folder)))
        yield folder


def _tensors(seen: Path) -> dict[str, Tensor]:
    """Safetensors of a model in a folder that has only its files."""
    return tensors_of(sorted(seen.glob("*.safetensors")))


def _quieten() -> None:
    """Silence messages of transformers and torchao, which would disturb a progress display."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


_OURS_ALONE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Options with which transformers downloads nothing and runs no code from a model's folder."""


def _attention(config: Any) -> str:
    """Attention of a model, whatever its config names: SDPA if its class has it, otherwise eager.

    Hidden states are the same, and other kinds may need downloads.
    """
    return "sdpa" if _class_for(config)._supports_sdpa else "eager"


_TELL_MISFITS: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
