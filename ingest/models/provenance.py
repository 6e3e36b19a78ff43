"""Read the origin of a model from its files: number formats, quantization, base model, instruction tuning.

All values are read from the files, not from the user's options, except for quantization by kdb itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdb.ingest.models.files import CONFIG, read_json, weight_files
from kdb.ingest.models.find import ModelSource
from kdb.ingest.models.gguf import what_it_says
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.load import folder_of
from kdb.ingest.models.tensors import Tensor, tensors_of

_PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Number formats that are not quantized, with their names in torch."""

_OF_QUANTIZATION = re.compile(
    r"(scales?|scale_inv|zeros|zero_point|g_idx|absmax|quant_map|quant_state\.\w+|SCB|weight_format|weight_shape)$"
)
"""Suffixes of the names of tensors that are not parameters, but scales and zero points of quantized ones."""

_INSTRUCT = re.compile(r"(?:^|[-_. ])(instruct|it|chat)(?:[-_. ]|$)", re.IGNORECASE)


def provenance(source: ModelSource, quantize: str | None = None) -> dict[str, Any]:
    """Return the columns of ``models`` about the model's files. Raises ModelError.

    ``quantize`` is how kdb itself quantizes the weights when it loads them.
    """
    with model_errors(f"Cannot read the number formats of {source.name}"):
        description = _of_gguf(source) if source.is_gguf else _of_folder(source)
    if quantize is not None:
        description["quantization"] = (
            f"{quantize} of {description['quantization']}" if description["quantization"] else quantize
        )
    return description


def _of_gguf(source: ModelSource) -> dict[str, Any]:
    says = what_it_says(folder_of(source))
    metadata = says["metadata"]
    names = [source.source, *(metadata.get(f"general.{key}", "") for key in ("name", "finetune"))]
    base = [metadata.get(f"general.base_model.0.{key}") for key in ("repo_url", "name")]
    return _columns(Counter(says["types"]), names, _hub_id(next(filter(None, base), None)))


def _of_folder(source: ModelSource) -> dict[str, Any]:
    config = read_json(source.path / CONFIG)
    quantized = config.get("quantization_config") or config.get("compression_config") or {}
    sizes = _sizes(tensors_of(weight_files(source.path)), quantized)
    before = config.get("_name_or_path") or ""
    own = before if re.fullmatch(r"\w[\w.-]*/[\w.-]+", before) else ""
    base = _card_base(source.path) or (own if own != source.source else "")
    return _columns(sizes, [source.source, own], base or None, str(quantized.get("quant_method", "")))


def _columns(sizes: Counter[str], names: Iterable[str], base: str | None, method: str = "") -> dict[str, Any]:
    kinds = [kind for kind, _size in sizes.most_common()]
    quantized = bool(method) or any(kind not in _PLAIN for kind in kinds)
    shares = ", ".join(f"{kind} {_share(sizes[kind] / sizes.total())}" for kind in kinds)
    return {
        "weights_dtype": ", ".join(kinds if quantized else (_PLAIN[kind] for kind in kinds)),
        "quantization": f"{method}: {shares}".removeprefix(": ") if quantized else None,
        "base_model": base,
        "instruct": True if any(_INSTRUCT.search(name) for name in names) else None,
    }


def _share(part: float) -> str:
    """Format a share in whole percent; 0 % and 100 % only if they are exact."""
    whole = round(100 * part)
    return "<1 %" if whole == 0 else ">99 %" if whole == 100 and part < 1 else f"{whole} %"


def _sizes(tensors: Mapping[str, Tensor], quantized: Mapping[str, Any]) -> Counter[str]:
    """Count the parameters in each number format. Weights of few bits are packed, several into one integer."""
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if not _OF_QUANTIZATION.search(name):
            packed = _packed(name, tensor.dtype, quantized)
            sizes[tensor.dtype] += tensor.n_elements * packed
    return sizes


def _packed(name: str, dtype: str, quantized: Mapping[str, Any]) -> int:
    """Number of weights in one integer: with 4 bits, 2 in a byte and 8 in an int32."""
    width = {"U8": 8, "I8": 8, "I32": 32}.get(dtype)
    four = quantized.get("load_in_4bit") or quantized.get("quant_method") == "mxfp4" or name.endswith("_blocks")
    bits = 4 if four else int(quantized.get("bits") or quantized.get("w_bit") or 8)
    return max(1, width // bits) if width and quantized else 1


def _card_base(folder: Path) -> str | None:
    """Read the base model from the model card beside the weights."""
    import yaml

    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
        front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
        named = (yaml.safe_load(front[1]) or {}).get("base_model") if front else None
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return None  # cards are written by hand, so a missing or invalid one is no error
    first = named[0] if isinstance(named, list) and named else named
    # A path on another machine is of no use here.
    if isinstance(first, str) and re.fullmatch(r"(https://huggingface\.co/)?\w[\w.-]*(/\w[\w.-]*)?", first):
        return _hub_id(first)
    return None


def _hub_id(name: str | None) -> str | None:
    return name and name.removeprefix("https://huggingface.co/")
