"""Unpack a GGUF file, or the parts of one, into a folder of safetensors, and check that nothing was lost.

transformers reads the weights and a part of the metadata, and silently ignores the rest. So every metadata key must
agree with the loaded config, and every weight must have a place in the model; otherwise the file is refused, and the
message names the key or weight. RoPE scaling, which transformers does not read, is added to the config first
(``rope.py``).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from kdb.errors import ModelError
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.rope import FACTORS, set_rope
from kdb.ingest.models.structure import ffn_width

log = logging.getLogger(__name__)

READER_VERSION = 2
"""Version of the unpacked copies. Raise it by hand when this module or ``rope.py`` reads files in another way."""

STAMP = "kdb.json"
"""File beside the unpacked weights with the versions that unpacked them and the description of the GGUF file."""

_COMPARED_ROWS = 512

_SAME_ROW = 0.97
"""Cosine of two copies of a row, quantized to 2 bits or more in different ways."""

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def gguf_parts(folder: Path) -> list[Path]:
    """List the parts of the split GGUF file in a folder, in order; empty if there is no such file.

    Raises ModelError if a part is missing, or if the folder has parts of several files.
    """
    named = {file: match for file in sorted(folder.glob("*.gguf")) if (match := _PART.search(file.name))}
    if not named:
        return []
    files = {(file.name[: match.start()], match[2]) for file, match in named.items()}
    if len(files) > 1:
        raise ModelError(f"{str(folder)!r} holds parts of {len(files)} GGUF files: keep only the parts of one model.")
    [(stem, count)] = files
    there = {int(match[1]) for match in named.values()}
    missing = [i for i in range(1, int(count) + 1) if i not in there]
    if missing:
        name = f"{stem}-{missing[0]:05}-of-{count}.gguf"
        raise ModelError(f"{str(folder)!r} lacks {name!r}, part {missing[0]} of {int(count)} of a model.")
    return list(named)


def refuse_part(file: Path) -> None:
    """Raise ModelError for a file whose name is that of one part of a split GGUF file."""
    if match := _PART.search(file.name):
        raise ModelError(
            f"{file.name!r} is part {int(match[1])} of {int(match[2])} of a model: give --model the folder that holds "
            "all of its parts."
        )


def unpacked(files: Sequence[Path], revision: str) -> Path:
    """Return the folder of safetensors in the user's cache; unpack the files unless the same versions have done it.

    transformers parses a GGUF file's vocabulary in Python, three times: 14 s for SmolLM2-135M and 42 s for Gemma 3
    270M, against 5 s and 6 s from the unpacked folder.
    """
    folder = user_cache_path("kdb") / "models" / revision[:16]
    if _stamp(folder).get("read_by") != _read_by():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _unpack(files, partial)
            _put(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def what_it_says(folder: Path) -> dict[str, Any]:
    """Read the description of an unpacked file: parameters by tensor type, and some metadata."""
    says: dict[str, Any] = _stamp(folder)["says"]
    return says


def _read_by() -> dict[str, Any]:
    import transformers

    return {"reader": READER_VERSION, "transformers": transformers.__version__}


def _stamp(folder: Path) -> dict[str, Any]:
    try:
        stamp: dict[str, Any] = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp


def _put(partial: Path, folder: Path) -> None:
    """Move a folder to its name, and replace one that another version made."""
    old = folder.with_name(f"{partial.name}-old")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if _stamp(folder).get("read_by") != _read_by():  # unless another process was faster
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


# Unpacking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """The metadata of a GGUF file by key, and the types and sizes of its tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[str, int]]
    factors: Any
    """Divisors of the RoPE frequencies, if the file has them."""

    @property
    def architecture(self) -> str:
        """Prefix of all keys about the model."""
        return str(self.metadata.get("general.architecture"))


def _unpack(files: Sequence[Path], folder: Path) -> None:
    with model_errors(f"Cannot read the GGUF file {files[0].name!r}"), _one_file(files, folder) as file:
        says = _contents(file)
        _refuse_kind(says, file.name)
        log.info("Unpacking %s into the cache; this happens once.", files[0].name)
        config = _config(says, file)
        model, tokenizer, info = _load(file, config)
        _refuse_left_over(says, model, info, file.name)
        _check_tokenizer(says, tokenizer, file.name)
    # The weights are plain float32 now, but transformers would not save a model that is marked as quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with model_errors(f"Cannot unpack {files[0].name!r} into {str(folder.parent)!r}"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        says_of_weights = _says(says) | {"tied": _is_tied(model)}
        (folder / STAMP).write_text(json.dumps({"read_by": _read_by(), "says": says_of_weights}))


def _contents(file: Path) -> Contents:
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError) as error:
        if "magic" in str(error):  # it never was one
            raise
        raise ModelError(
            f"Cannot read the GGUF file {file.name!r}: it ends too early, or is damaged. Copy or download it again."
        ) from error
    metadata = {
        # Reading a vocabulary takes seconds, and only its size is needed.
        key: len(field.data) if key.startswith("tokenizer.ggml.") and len(field.data) > 1 else field.contents()
        for key, field in reader.fields.items()
    }
    tensors = {t.name: (t.tensor_type.name, int(t.n_elements)) for t in reader.tensors}
    factors = next((t.data.astype(float) for t in reader.tensors if t.name == FACTORS), None)
    return Contents(metadata, tensors, factors)


def _says(says: Contents) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for name, (kind, size) in says.tensors.items():
        sizes[kind] += size if name != FACTORS else 0
    named = {k: v for k, v in says.metadata.items() if k.startswith("general.") and isinstance(v, str)}
    return {"types": dict(sizes.most_common()), "metadata": named}


def _is_tied(model: Any) -> bool:
    """Whether unembedding and embedding are one matrix of which the file has two copies, quantized in different ways.

    llama.cpp keeps the copy that is read last in a finer format. Rows of two matrices would not point the same way.
    """
    import torch

    embedding, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is unembedding or embedding.shape != unembedding.shape:
        return False
    rows = slice(0, None, max(1, len(embedding) // _COMPARED_ROWS))
    cosines = torch.nn.functional.cosine_similarity(embedding[rows], unembedding[rows])
    return bool(cosines.median() > _SAME_ROW)


def _refuse_kind(says: Contents, name: str) -> None:
    kind = says.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{name!r} is not a model but of the type {kind!r} (general.type): kdb measures whole models.")
    count = says.metadata.get("split.count", 1)
    if count > 1:
        number = says.metadata.get("split.no", 0) + 1
        raise ModelError(
            f"{name!r} is part {number} of {count} of a model: give --model the folder that holds all of its parts, "
            f"named as they were, such as model-{number:05}-of-{count:05}.gguf."
        )


def _config(says: Contents, file: Path) -> Any:
    """Return the config of the file, with fields that transformers ignores; raise ModelError for a contradiction."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, **_OURS_ALONE)
    _set_attention_scale(config)
    set_rope(config, says.metadata, says.architecture, says.factors, file.name)
    _refuse_disagreement(says, config, file.name)
    return config


def _load(file: Path, config: Any) -> tuple[Any, Any, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with contextlib.redirect_stderr(io.StringIO()):  # transformers has no option to turn off its progress bar
        model, info = AutoModelForCausalLM.from_pretrained(
            **where, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
            **_OURS_ALONE,
        )  # fmt: skip
    return model, AutoTokenizer.from_pretrained(**where, **_OURS_ALONE), info


_OURS_ALONE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@contextlib.contextmanager
def _one_file(files: Sequence[Path], folder: Path) -> Iterator[Path]:
    """Provide one temporary file, beside ``folder``, with all parts joined; a file in one part is used as it is."""
    if len(files) == 1:
        yield files[0]
        return
    whole = folder / "whole.gguf"
    _join(files, whole)
    try:
        yield whole
    finally:
        whole.unlink()


def _join(parts: Sequence[Path], whole: Path) -> None:
    """Write the metadata of the first part and the tensors of all parts. Raises ModelError if tensors are missing."""
    import gguf

    readers = [gguf.GGUFReader(part) for part in parts]
    first = readers[0].fields
    expected, actual = first.get("split.tensors.count"), sum(len(reader.tensors) for reader in readers)
    if expected is not None and expected.contents() != actual:
        raise ModelError(f"The parts hold {actual} tensors, and the first says {expected.contents()}.")
    writer = gguf.GGUFWriter(whole, first["general.architecture"].contents())
    for key, field in first.items():
        if not key.startswith(("GGUF.", "split.")) and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for reader in readers:
        for t in reader.tensors:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


# Checks of the model against the file ----------------------------------------------------------------------------


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotated(config: Any) -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return float(_head_dim(config) * share)


def _theta(config: Any) -> Any:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope).get("rope_theta")


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _of(*names: str) -> Callable[[Any], Any]:
    return lambda config: _first(config, *names)


_AGREES: dict[str, Callable[[Any], Any]] = {
    "vocab_size": _of("vocab_size"),
    "context_length": _of("max_position_embeddings", "n_positions"),
    "embedding_length": _of("hidden_size"),
    "block_count": _of("num_hidden_layers"),
    "feed_forward_length": ffn_width,
    "use_parallel_residual": _of("use_parallel_residual"),
    "attention.head_count": _of("num_attention_heads"),
    "attention.head_count_kv": _of("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": _head_dim,
    "attention.value_length": _head_dim,
    "attention.layer_norm_rms_epsilon": _of("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": _of("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.causal": lambda _config: True,
    "attention.sliding_window": _of("sliding_window"),
    "attn_logit_softcapping": _of("attn_logit_softcapping"),
    "final_logit_softcapping": _of("final_logit_softcapping"),
    "logit_scale": _of("logit_scale"),
    "rope.freq_base": _theta,
    "rope.dimension_count": _rotated,
    "expert_count": _of("num_experts", "num_local_experts"),
    "expert_used_count": _of("num_experts_per_tok"),
    "expert_feed_forward_length": _of("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": _of("shared_expert_intermediate_size"),
}
"""Required config values for each key about the model. A file with any other key is refused."""

_READ_ELSEWHERE = (
    r"GGUF\..*|general\..*",  # describes the file, not the model
    r"split\.(no|count|tensors\.count)",  # of a file in one part
    r"quantize\.imatrix\..*",  # how the numbers were rounded
    r"[^.]+\.rope\.(scaling\..*|scale_linear)",  # set_rope adds them to the config, or refuses them
    r"[^.]+\.tensor_data_layout",  # llama.cpp and transformers read the same layout for any value
    r"tokenizer\.chat_template.*",  # kdb gives a model plain text
    r"tokenizer\.ggml\.(model|tokens|scores|token_type|merges)",  # the tokenizer is made of these
    r"tokenizer\.ggml\.\w+_token_ids?",  # names a token; which tokens are added to a text is checked below
    r"tokenizer\.ggml\.(add_bos_token|add_eos_token|add_space_prefix|pre)",  # checked below
)
"""Keys that do not affect the forward pass, or are checked against something other than the config."""

_ONLY_IF_TRUE = r"tokenizer\.ggml\.(add_sep_token|remove_extra_whitespaces|normalizer\.lowercase)"
"""Keys that change tokens only if they are set."""

_SPLITS_LIKE_GPT2 = ("gpt-2", "phi-2", "olmo", "mpt", "smollm", "starcoder", "refact", "command-r", "codeshell")
"""Pre-tokenizers that give the same tokens as GPT-2's: those that also split digits have no merges of digits."""


def _refuse_disagreement(says: Contents, config: Any, name: str) -> None:
    """Raise ModelError for a key that disagrees with the loaded config."""
    text = config.get_text_config()
    for key, value in says.metadata.items():
        if any(re.fullmatch(pattern, key) for pattern in _READ_ELSEWHERE):
            continue
        if re.fullmatch(_ONLY_IF_TRUE, key) and not value:
            continue
        kind, _, rest = key.partition(".")
        has = _AGREES[rest](text) if kind == says.architecture and rest in _AGREES else None
        if not _same(value, has):
            raise ModelError(
                f"{name!r} says {key} = {_shown(value)}, and transformers would run the model "
                f"{'without it' if has is None else f'with {has}'}: kdb would measure another model. take the model's "
                "safetensors."
            )


def _same(value: Any, has: Any) -> bool:
    if value == 0 and has is None:
        return True  # no experts, no window
    if isinstance(value, list):
        return bool(value) and all(_same(one, has) for one in value)  # one for each layer
    if isinstance(value, str) or has is None or isinstance(has, str):
        return bool(value == has)
    return math.isclose(value, has, rel_tol=1e-6)


def _shown(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)


def _set_attention_scale(config: Any) -> None:
    """Set the attention scale of Gemma's 27B models: no key holds it, and llama.cpp derives it from the layers."""
    if (config.model_type, config.num_hidden_layers) in (("gemma2", 46), ("gemma3_text", 62)):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _refuse_left_over(says: Contents, model: Any, info: dict[str, Any], name: str) -> None:
    """Raise ModelError unless the file and the model have the same weights."""
    made_up = sorted({*info["missing_keys"], *(key for key, *_shapes in info["mismatched_keys"])})
    if made_up:
        raise ModelError(
            f"{name!r} does not fit the config that it gives: {len(made_up)} of the model's weights are not there, or "
            f"have another shape, such as {made_up[0]!r}."
        )
    held = sum(size for tensor, (_kind, size) in says.tensors.items() if tensor != FACTORS)
    if held != model.num_parameters():
        over = [tensor for tensor in says.tensors if tensor not in {*_placed(says, model), FACTORS}]
        shown = f", such as {over[0]!r}" if over else ""
        raise ModelError(
            f"{name!r} holds {held:,} weights, and the model that transformers makes of it has "
            f"{model.num_parameters():,}: weights{shown} are left over. Take the model's safetensors."
        )


def _placed(says: Contents, model: Any) -> set[str]:
    """The GGUF names of a model's weights."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if says.architecture not in kinds:
        return set()
    names = gguf.get_tensor_name_map(kinds[says.architecture], model.config.num_hidden_layers)
    return {str(names.get_name(name, (".weight", ".bias"))) for name in model.state_dict()}


def _check_tokenizer(says: Contents, tokenizer: Any, name: str) -> None:
    """Raise ModelError if the tokenizer contradicts the file's metadata."""
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    first = str(tokenizer.convert_ids_to_tokens(bare)[0]) if bare else ""
    does = {
        "add_bos_token": len(ids) > len(bare) and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id,
        "add_space_prefix": first.startswith(("▁", "Ġ")),
    }
    for key, done in does.items():
        wanted = says.metadata.get(f"tokenizer.ggml.{key}", done)
        if bool(wanted) != done:
            raise ModelError(
                f"{name!r} says tokenizer.ggml.{key} = {wanted}, and transformers makes a tokenizer that does "
                f"{'' if done else 'not '}do that. Take the model's safetensors."
            )
    _check_split(says, name)


def _check_split(says: Contents, name: str) -> None:
    split = says.metadata.get("tokenizer.ggml.pre")
    if says.metadata.get("tokenizer.ggml.model") != "gpt2" or split in (None, *_SPLITS_LIKE_GPT2):
        return
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as KNOWN
    except ImportError:
        KNOWN = {}
    if split not in KNOWN:
        raise ModelError(
            f"{name!r} says tokenizer.ggml.pre = {split!r}, a way to split texts that transformers does not know: the "
            "tokens would be others. Take the model's safetensors."
        )
