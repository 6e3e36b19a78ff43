"""Find a model's blocks, norms and unembedding by their structure, not by the model's name.

transformers is not patched: hooks on these modules read the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError
from kdb.ingest.models.parts import ffn_of, setting, text_blocks
from kdb.ingest.models.trace import BlockOutput, Trace, can_pad, trace

if TYPE_CHECKING:
    import torch
    from torch import nn

_ROWS = 8192
"""Rows of the unembedding that are converted at once: few enough for a copy of any width."""


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of the soft cap of logits in configs."""


@dataclass(frozen=True)
class ModelStructure:
    """The modules of a decoder that a measurement reads.

    ``decoder`` runs everything except the unembedding; ``ffns[i]`` is the module of block i whose input is the
    normalised state before the FFN, or None. ``final_norm`` is all that stands between the last block and the
    unembedding; an identity if there is nothing. ``last_state`` is the part of it that the last hidden state which
    transformers reports has been through, ``after_last_state`` the rest. ``hidden_size`` is the width of the residual
    stream. ``layout`` finds the states in a block's output; ``first_state`` is the place of the first block's output
    among the states that transformers reports. ``can_pad``: whether tokens after a text leave its states as they are.
    """

    decoder: nn.Module
    blocks: tuple[nn.Module, ...]
    ffns: tuple[nn.Module | None, ...]
    final_norm: nn.Module
    unembed: nn.Module
    logit_scale: float
    logit_softcap: float | None
    hidden_size: int
    layout: BlockOutput
    last_state: nn.Module
    after_last_state: nn.Module
    first_state: int
    can_pad: bool

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
    """Find the modules of a causal language model, by one short forward pass.

    Raises ModelError, naming the part, if one is not found.
    """
    from torch import nn

    name, unembed = type(model).__name__, model.get_output_embeddings()
    if model.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder: kdb measures causal language models.")
    if not isinstance(unembed, nn.Module):
        raise ModelError(f"{name} has no unembedding: kdb measures causal language models.")
    config, blocks = model.config.get_text_config(decoder=True), text_blocks(model)
    ffns = tuple(map(ffn_of, blocks))
    seen = trace(model, blocks, ffns, unembed)
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
    last_state, after = _norms(model, blocks[-1], unembed, seen)
    return ModelStructure(
        decoder=_decoder(model, blocks[0]),
        blocks=blocks,
        ffns=tuple(ffn if seen.reads_state(ffn) else None for ffn in ffns),
        final_norm=_chained(last_state, after),
        unembed=unembed,
        logit_scale=seen.logit_scale(_logit_scale(config), softcap),
        logit_softcap=softcap,
        hidden_size=seen.hidden_size,
        layout=seen.layout,
        last_state=last_state,
        after_last_state=after,
        first_state=seen.first_state,
        can_pad=can_pad(model, blocks, seen),
    )


def _decoder(model: Any, block: nn.Module) -> nn.Module:
    """The module that runs everything except the unembedding. Llama 4 names no base model."""
    base: nn.Module = model.base_model
    return next(m for m in model.children() if block in set(m.modules())) if base is model else base


def _norms(model: Any, block: nn.Module, unembed: nn.Module, seen: Trace) -> tuple[nn.Module, nn.Module]:
    """Return what stands between the last block and the last state that the model reports, and what stands after it."""
    from torch import nn

    if seen.path is None:
        from kdb.ingest.models.rerun import Rerun

        whole = Rerun(model, block, unembed, seen.layout)
        raw = seen.last_state is not None and seen.is_raw
        return (nn.Identity(), whole) if raw else (whole, nn.Identity())
    modules = [module for module, _read, _written in seen.path]
    n = len(modules) if seen.n_reported is None else seen.n_reported
    return _chained(*modules[:n]), _chained(*modules[n:])


def _chained(*modules: nn.Module) -> nn.Module:
    """Return modules as one: none as an identity, one as itself."""
    from torch import nn

    some = [module for module in modules if not isinstance(module, nn.Identity)]
    return some[0] if len(some) == 1 else nn.Sequential(*some) if some else nn.Identity()


def ffn_width(text: Any) -> int:
    """Number of FFN neurons per layer, from a text config, whatever the architecture calls it."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "feed_forward_length")
    # GPT-2's n_inner is null if the width is four times the hidden size.
    return next(filter(None, (largest(setting(text, name)) for name in names)), 4 * int(text.hidden_size))


def largest(value: Any) -> int:
    """Return a number of a config, or the largest of a list with one for each layer; 0 for anything else."""
    numbers = value if isinstance(value, list | tuple) else [value]
    return max((int(number) for number in numbers if isinstance(number, int)), default=0)


def _logit_scale(config: Any) -> float:
    """Cohere multiplies its logits by ``logit_scale``, Granite divides them by ``logits_scaling``."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
