"""Weight-only int8: torchao on the CPU, bitsandbytes on CUDA."""

from __future__ import annotations

from typing import Any

from kdb.errors import ModelError


def bitsandbytes_config() -> Any:
    """Return the setting with which transformers loads weights as int8 on CUDA."""
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401  (else transformers would report it later, in its own words)
    except ImportError as error:
        raise ModelError("--quantize int8 needs bitsandbytes on CUDA: `pip install 'kdb-lm[int8]'`.") from error
    return BitsAndBytesConfig(load_in_8bit=True)


def quantize_on_cpu(model: Any, name: str) -> None:
    """Convert the matrices of all blocks to int8, with one scale per row.

    Embedding and unembedding are not quantized, as with bitsandbytes.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError("--quantize int8 needs torchao on the CPU: `pip install 'kdb-lm[int8]'`.") from error
    body = model.base_model
    stacks = [of for of, weight in body.named_parameters() if weight.ndim > 2]
    if stacks:
        raise ModelError(
            f"{name} cannot be quantized: {stacks[0]!r} is not one matrix but a stack. Leave --quantize out."
        )
    _conv1d_to_linear(body)
    quantize_(body, Int8WeightOnlyConfig())


def _conv1d_to_linear(body: Any) -> None:
    """Convert GPT-2's matrices, which are transposed in their own class, since torchao would ignore that class."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for parent in list(body.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf, device="meta")
                linear.weight, linear.bias = nn.Parameter(child.weight.T.contiguous()), child.bias
                setattr(parent, name, linear)
