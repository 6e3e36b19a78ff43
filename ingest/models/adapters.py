"""Merge an adapter, by peft, into the base weights beside it, before anything is measured."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdb.errors import ModelError
from kdb.ingest.models.files import ADAPTER_WEIGHTS, only
from kdb.ingest.models.guard import model_errors

_MERGE_FIRST = "merge it first (peft's merge_and_unload, then save_pretrained into a folder of its own)"


def check_adapter(files: Sequence[Path], quantize: str | None, device: str) -> None:
    """Raise ModelError if an adapter cannot be merged here; called before the weights are loaded.

    ``files`` are those of the adapter; empty if there is no adapter.
    """
    if not files:
        return
    holds = f"{str(files[0].parent)!r} holds an adapter ({files[0].name}) beside its base weights"
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{holds}: install peft (`pip install peft`), which merges them, or {_MERGE_FIRST}.")
    if quantize and device != "cpu":
        raise ModelError(f"{holds}, which cannot be merged into weights that are quantized on a GPU: {_MERGE_FIRST}.")


def merged(model: Any, files: Sequence[Path], name: str) -> Any:
    """Return the model with the adapter merged into its weights; raise ModelError if they do not belong together.

    peft merges the adapter (``merge_and_unload``), in the dtype in which the weights were loaded.
    """
    import peft

    what = f"Cannot merge the adapter of {name}"
    n_params = model.num_parameters()
    with model_errors(what), warnings.catch_warnings(), only(files) as folder:
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise ModelError(f"{what}: it is of type {config.peft_type.value}, which has no weights to merge.")
        config.inference_mode = True
        wrapped = peft.PeftModel(model, config)
        loaded = wrapped.load_adapter(str(folder), "default")
        astray = sorted([*loaded.unexpected_keys, *loaded.missing_keys])
        if astray:
            raise ModelError(
                f"{what}: {ADAPTER_WEIGHTS} does not fit the base weights beside it: {len(astray)} of its weights are "
                f"missing or have no place, such as {astray[0]!r}. Use the base model that it was trained on."
            )
        if not hasattr(wrapped.base_model, "merge_and_unload"):
            raise ModelError(f"{what}: peft cannot merge the type {config.peft_type.value}.")
        whole = wrapped.merge_and_unload(safe_merge=True)
    if whole.num_parameters() != n_params:
        raise ModelError(f"{what}: it changes the model's shape. {_MERGE_FIRST.capitalize()}.")
    return whole
