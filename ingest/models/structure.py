"""Find a model's blocks, norms and unembedding by their structure, not by the model's name.

transformers is not patched: hooks on these modules read the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

_ROWS = 8192
"""Rows of the unembedding that are converted at once: few enough for a copy of any width."""

_FFN_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1")


@dataclass(frozen=True)
class ModelStructure:
    """The modules of a decoder that a measurement reads.

    ``decoder`` runs everything except the unembedding; ``ffns[i]`` is the module of block i whose input is the
    normalised state before the FFN.
    """

    decoder: nn.Module
    blocks: tuple[nn.Module, ...]
    ffns: tuple[nn.Module, ...]
    final_norm: nn.Module
    unembed: nn.Module
    logit_scale: float
    logit_softcap: float | None

    def readout(self, resid_post: torch.Tensor) -> torch.Tensor:
        """Compute logits (…, vocab) from the last block's output (…, hidden): norm, unembedding, scale, soft cap."""
        return self.unembed_normed(self.final_norm(resid_post))

    def unembed_normed(self, normed: torch.Tensor) -> torch.Tensor:
        """Compute logits (…, vocab), in float32, from the output (…, hidden) of the final norm.

        In half precision, tokens of nearly equal probability would tie, and their ranks would say nothing.
        """
        logits = _unembedded(self.unembed, normed) * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * (logits / self.logit_softcap).tanh()
        return logits


def _unembedded(unembed: nn.Module, normed: torch.Tensor) -> torch.Tensor:
    """Apply an unembedding to states (…, hidden), in float32; a matrix in half precision is converted in parts."""
    import torch

    if type(unembed) is torch.nn.Linear and _is_half(unembed.weight, normed):
        weight, bias = unembed.weight, unembed.bias
        states = normed.to(weight.device).float()
        logits = torch.cat([states @ rows.float().T for rows in weight.split(_ROWS)], dim=-1)
        return (logits if bias is None else logits + bias.float()).to(normed.device)
    whole: torch.Tensor = unembed(normed)
    return whole.float()


def _is_half(weight: torch.Tensor, normed: torch.Tensor) -> bool:
    """Whether a plain, loaded matrix or the states are in half precision; a quantized one has its own class."""
    import torch

    plain = type(weight) is torch.nn.Parameter and weight.is_floating_point() and not weight.is_meta
    return plain and not weight.dtype == normed.dtype == torch.float32


def find_structure(model: Any) -> ModelStructure:
    """Find the modules of a causal language model; raise ModelError, naming the part, if one is not found."""
    from torch import nn

    config = model.config.get_text_config()
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder: kdb measures causal language models.")
    stack = _find_blocks(model.base_model, config.num_hidden_layers)
    if stack is None:
        raise ModelError(f"{name}: kdb found no list of {config.num_hidden_layers} blocks, so it cannot measure it.")
    parent, blocks = stack
    ffns = [next((block.get_submodule(n) for n in _FFN_NAMES if hasattr(block, n)), None) for block in blocks]
    if any(ffn is None for ffn in ffns):
        raise ModelError(f"{name}: block {ffns.index(None)} has no FFN called any of {', '.join(_FFN_NAMES)}.")
    norms = [child for child in parent.children() if "norm" in type(child).__name__.lower()]
    if not norms:
        raise ModelError(f"{name}: kdb found no norm after the last block, so it cannot compute logits.")
    unembed = model.get_output_embeddings()
    if not isinstance(unembed, nn.Module):
        raise ModelError(f"{name} has no unembedding: kdb measures causal language models.")
    return ModelStructure(
        decoder=model.base_model,
        blocks=tuple(blocks),
        ffns=tuple(ffn for ffn in ffns if ffn is not None),
        final_norm=norms[-1],  # BLOOM has one before the first block too
        unembed=unembed,
        logit_scale=_logit_scale(config),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def ffn_width(text: Any) -> int:
    """Number of FFN neurons per layer, from a text config, whatever the architecture calls it."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "feed_forward_length")
    # GPT-2's n_inner is null if the width is four times the hidden size.
    return int(next(filter(None, (getattr(text, name, None) for name in names)), 4 * text.hidden_size))


def _find_blocks(base: nn.Module, n_layers: int) -> tuple[nn.Module, nn.ModuleList] | None:
    from torch import nn

    for parent in base.modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers:
                return parent, child
    return None


def _logit_scale(config: Any) -> float:
    """Cohere multiplies its logits by ``logit_scale``, Granite divides them by ``logits_scaling``."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
