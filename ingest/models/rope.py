"""Add the RoPE scaling of a GGUF file to the config, in the form that transformers expects.

transformers does not read it. llama.cpp writes it in two ways: as metadata (linear, YaRN), or, for Llama 3.1 and
later, as a tensor of divisors, one for each frequency. From these, this module computes the four settings of 'llama3'.
The frequencies that transformers computes from the settings must equal the file's to float32 precision, else the file
is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdb.errors import ModelError

FACTORS = "rope_freqs.weight"
"""Name of the tensor with the divisors of the RoPE frequencies."""

_INSTEAD = "take the model's safetensors"

_PRECISION = 5e-6
"""Relative difference of a frequency that float32 rounding explains."""

_HARMLESS = ("finetuned",)
"""Keys of ``rope.scaling`` that change no result: whether the model was finetuned with the scaling."""


def set_rope(
    config: Any, metadata: Mapping[str, Any], architecture: str, factors: NDArray[Any] | None, name: str
) -> None:
    """Add a GGUF file's RoPE scaling to its config. Raises ModelError for a scaling that cannot be expressed."""
    scaling = _scaling(metadata, architecture)
    changed = _from_metadata(scaling, name)
    if factors is not None:
        if changed:
            raise ModelError(f"{name!r} has both {FACTORS} and {architecture}.rope.scaling: kdb knows no such model.")
        changed = _from_factors(config, factors.ravel(), name)
    if not changed:
        return
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ModelError(f"{name!r} scales RoPE, but {config.model_type} has no RoPE in transformers.")
    # Gemma 3 has two RoPEs; llama.cpp scales the one of full attention.
    parameters.get("full_attention", parameters).update(changed)


def _scaling(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    prefix = f"{architecture}.rope.scaling."
    scaling = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if "factor" not in scaling and f"{architecture}.rope.scale_linear" in metadata:
        scaling["factor"] = metadata[f"{architecture}.rope.scale_linear"]
    return scaling


def _from_metadata(scaling: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the RoPE parameters of linear scaling or YaRN; empty if nothing is scaled."""
    kind, factor = scaling.get("type", "linear"), scaling.get("factor", 0.0)
    known = {"type", "factor", "original_context_length", *_HARMLESS}
    unknown = sorted(set(scaling) - known)
    if unknown:
        raise ModelError(f"{name!r} says rope.scaling.{unknown[0]}, which kdb cannot read: {_INSTEAD}.")
    if kind == "none" or factor in (0.0, 1.0):  # llama.cpp reads 0 as no scaling
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    original = scaling.get("original_context_length")
    if kind == "yarn" and original:
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(original)}
    raise ModelError(f"{name!r} says rope.scaling.type = {kind!r}, which kdb cannot read: {_INSTEAD}.")


def _from_factors(config: Any, factors: NDArray[Any], name: str) -> dict[str, Any]:
    """Return the RoPE parameters that divide the frequencies by these factors."""
    if np.all(factors == 1):
        return {}
    if np.all(factors == factors[0]):
        return {"rope_type": "linear", "factor": float(factors[0])}
    rope = getattr(config, "rope_parameters", None) or {}
    plain = 1.0 / rope.get("rope_theta", 10000.0) ** (np.arange(len(factors)) / len(factors))
    for llama3 in _llama3(plain, factors):
        if np.allclose(_divisors(plain, **llama3), factors, rtol=_PRECISION, atol=0):
            _check_transformers(config, rope, llama3, plain / factors, name)
            return {"rope_type": "llama3"} | _spelled(llama3)
    raise ModelError(
        f"{name!r} divides RoPE's frequencies ({FACTORS}) in another way than Llama 3, which kdb cannot read: "
        f"{_INSTEAD}."
    )


def _spelled(llama3: Mapping[str, float]) -> dict[str, Any]:
    return {
        "factor": llama3["factor"],
        "low_freq_factor": llama3["low"],
        "high_freq_factor": llama3["high"],
        "original_max_position_embeddings": int(llama3["original"]),
    }


def _llama3(plain: NDArray[Any], factors: NDArray[Any]) -> Iterator[dict[str, float]]:
    """Yield settings that may have produced the factors: first Llama's own, then a fit to the intermediate factors."""
    factor = float(factors.max())
    for power in (13, *range(5, 18)):
        yield {"factor": factor, "low": 1.0, "high": 4.0, "original": float(2**power)}
    between = (factors > 1) & (factors < factor)
    if between.sum() < 2:
        return
    # There, a share s of the frequency is not divided: 1 / f = (1 - s) / factor + s, and s is linear in the frequency.
    share = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    slope, at_zero = np.polyfit(plain[between] / (2 * math.pi), share, 1)
    low = 1.0
    if at_zero < 0 < slope:
        yield {
            "factor": factor,
            "low": low,
            "high": round(float(low - low / at_zero), 3),
            "original": float(round(-slope * low / at_zero)),
        }


def _divisors(plain: NDArray[Any], *, factor: float, low: float, high: float, original: float) -> NDArray[Any]:
    """Divisors of Llama 3's frequencies: 1 for high ones, ``factor`` for low ones, and smooth in between."""
    share = np.clip((original * plain / (2 * math.pi) - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - share) / factor + share))


def _check_transformers(
    config: Any, rope: Mapping[str, Any], llama3: Mapping[str, float], wanted: NDArray[Any], name: str
) -> None:
    """Raise ModelError unless transformers computes these frequencies from the fitted settings."""
    import copy

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tried = copy.deepcopy(config)
    tried.rope_parameters = dict(rope) | {"rope_type": "llama3"} | _spelled(llama3)
    inv_freq, _scale = ROPE_INIT_FUNCTIONS["llama3"](tried, "cpu")
    if not np.allclose(inv_freq.numpy(), wanted, rtol=_PRECISION, atol=0):
        raise ModelError(f"{name!r}: transformers computes other RoPE frequencies than the file has ({FACTORS}).")
