"""List the files of a model's folder that determine its results, and compute their fingerprint.

A model is loaded from these files alone (``only``). So a file outside the fingerprint cannot change a result, and
pickles and code in the same folder are not loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdb.errors import ModelError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.spm"),
)
"""All files from which transformers reads a tokenizer."""

HARMLESS_FIELDS = {
    "transformers_version": "names the version that wrote the file",
    "torch_dtype": "kdb sets the number format (--dtype)",
    "dtype": "kdb sets the number format (--dtype)",
    "_name_or_path": "names the place from which the files came",
    "name_or_path": "names the place from which the files came",
    "_commit_hash": "names the place from which the files came",
    "auto_map": "names code that kdb never runs",
    "use_cache": "a cache of keys and values changes speed alone",
    "initializer_range": "is for weights that are not in the files, and such models are refused",
    "output_attentions": "kdb asks for what it reads",
    "output_hidden_states": "kdb asks for what it reads",
    "task_specific_params": "are settings of generating text",
    "chat_template": "kdb gives a model plain text",
}
"""Fields of config.json and tokenizer_config.json that cannot change a forward pass or a token, with reasons."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)

HARMLESS_ADAPTER_FIELDS = {
    "base_model_name_or_path": "names the place of the base weights; kdb uses those beside the adapter",
    "revision": "names the place of the base weights",
    "auto_mapping": "names code that kdb never runs",
    "inference_mode": "kdb never trains",
    "peft_version": "names the version that wrote the file",
}
"""Fields of adapter_config.json that cannot change the merged weights, with reasons."""


def model_files(folder: Path) -> list[Path]:
    """List the files that a model in a folder is loaded from: config, weights, index, tokenizer.

    The files of an adapter are listed by `adapter_files`. Raises ModelError if the folder has no model.
    """
    adapter = adapter_files(folder)
    if not (folder / CONFIG).is_file() or not any(file not in adapter for file in folder.glob("*.safetensors")):
        if adapter:
            raise ModelError(
                f"{str(folder)!r} holds an adapter but no base weights: add config.json, tokenizer and weights of its "
                "base model, or merge it first (peft's merge_and_unload, then save_pretrained)."
            )
        raise ModelError(
            f"{str(folder)!r} holds no model that kdb reads: expected config.json and *.safetensors there, "
            "or name a .gguf file."
        )
    weights = weight_files(folder)
    index = [] if weights[0].name == WEIGHTS else [folder / INDEX]
    return [folder / CONFIG, *weights, *index, *_tokenizer_files(folder)]


def adapter_files(folder: Path) -> list[Path]:
    """List config and weights of the adapter in a model's folder; empty without an adapter.

    Raises ModelError if one of the two is missing, or the weights are a pickle.
    """
    names = [n for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE) if (folder / n).exists()]
    if not names:
        return []
    if names != [ADAPTER_CONFIG, ADAPTER_WEIGHTS]:
        raise ModelError(
            f"{str(folder)!r} holds an adapter ({', '.join(names)}): kdb reads {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, "
            "both, and never pickles. Save it as peft's save_pretrained does."
        )
    return [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS]


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors with a model's weights: one file, or those that its index names. Raises ModelError."""
    named = _field(folder / CONFIG, "transformers_weights")
    if named is not None:
        raise ModelError(
            f"{str(folder / CONFIG)!r} names a weights file of its own, {named!r} (transformers_weights): rename that "
            f"file {WEIGHTS} and remove the field."
        )
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(f"{str(folder)!r} has neither {WEIGHTS} nor {INDEX}: kdb cannot identify its weights.")
    shards = sorted({str(name) for name in _weight_map(folder / INDEX).values()})
    for shard in shards:
        _check_shard(folder, shard)
    return [folder / shard for shard in shards]


def fingerprint(folder: Path) -> str:
    """Compute the SHA-256 of everything in a model's folder that determines its tokens and its forward pass.

    JSON files are parsed, so that their layout and their harmless fields do not matter. Raises ModelError.
    """
    digests = {}
    for file in [*model_files(folder), *adapter_files(folder)]:
        if file.name == INDEX:
            digests[file.name] = _sha256_json(_weight_map(file))
        elif file.name == ADAPTER_CONFIG:
            digests[file.name] = _sha256_json(_without(read_json(file), HARMLESS_ADAPTER_FIELDS))
        elif file.name in (CONFIG, "tokenizer_config.json"):
            digests[file.name] = _sha256_json(_without(read_json(file), HARMLESS_FIELDS))
        else:
            digests[file.name] = sha256(file)
    return _sha256_json(digests)


@contextlib.contextmanager
def only(files: Sequence[Path]) -> Iterator[Path]:
    """Provide a temporary folder with links to these files and no others, to load a model from."""
    with tempfile.TemporaryDirectory(prefix="kdb-") as seen:
        for file in files:
            (Path(seen) / file.name).symlink_to(file.resolve())
        yield Path(seen)


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes. Raises ModelError if it cannot be read."""
    with _readable(file), file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_of(files: Sequence[Path]) -> str:
    """SHA-256 of one file's bytes, or of the SHA-256s of several files."""
    sums = [sha256(file) for file in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def read_json(file: Path) -> Any:
    """Parse a JSON file. Raises ModelError if it is missing or not valid."""
    with _readable(file):
        text = file.read_bytes()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{str(file)!r} is not a valid JSON file: {error}.") from error


def _tokenizer_files(folder: Path) -> list[Path]:
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(files)


def _check_shard(folder: Path, name: str) -> None:
    """Raise ModelError unless a file that an index names is a safetensors file in the folder itself."""
    problem = None
    if not re.fullmatch(r"[^/\\]+\.safetensors", name):
        problem = "kdb reads weights from safetensors in the model's own folder, never from pickles"
    elif not (folder / name).is_file():
        problem = "there is no such file"
    elif not _lies_in(folder, folder / name):
        problem = "it is a link to a file outside of the folder. Copy the file into the folder"
    if problem is not None:
        raise ModelError(f"{str(folder / INDEX)!r} names {name!r}: {problem}.")


def _lies_in(folder: Path, file: Path) -> bool:
    """Whether a file is in a folder. A snapshot in the hub's cache may link to files in the folder next to it."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]
    return file.resolve().is_relative_to(root)


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelError(f"{str(index)!r} is not an index of weights: it has no 'weight_map' of file names.")
    return weight_map


def _field(file: Path, name: str) -> Any:
    content = read_json(file)
    return content.get(name) if isinstance(content, dict) else None


def _without(content: Any, fields: Any) -> Any:
    """Copy JSON content without some fields, at any depth."""
    if isinstance(content, dict):
        return {key: _without(value, fields) for key, value in content.items() if key not in fields}
    return [_without(value, fields) for value in content] if isinstance(content, list) else content


def _sha256_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    if file.exists() and not file.is_file():
        raise ModelError(f"{str(file)!r} is not a regular file.")
    try:
        yield
    except OSError as error:
        raise ModelError(f"Cannot read {str(file)!r}: {error.strerror}.") from error
