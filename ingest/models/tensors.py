"""Describe the tensors of safetensors files, from their headers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdb.ingest.models.guard import model_errors


@dataclass(frozen=True)
class Tensor:
    """A tensor's number format, as safetensors names it, its shape, and its size in the file."""

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensors_of(files: Sequence[Path]) -> dict[str, Tensor]:
    """Read the tensors' descriptions by name. Raises ModelError for a file that is not safetensors."""
    from safetensors import safe_open

    tensors = {}
    for file in files:
        with model_errors(f"Cannot read the weights in {file.name!r}"), safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dictionary)
                part = opened.get_slice(name)
                shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
                tensors[name] = Tensor(dtype, shape, math.prod(shape) * _bits(dtype) // 8)
    return tensors


def _bits(dtype: str) -> int:
    """Bits of a number in this format: BF16 has 16, F8_E4M3 8, BOOL 8."""
    digits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return int(digits) if digits else 8
