"""Decompose the residual stream into a sum: find the modules that add to it, and their linear maps.

The modules are found from one short forward pass, not from names of models: the attention function identifies the
module that calls it, and equal tensors show which module feeds which. All linear maps have one form: the norms before
and after a projection, their centring, the residual multiplier and the scale of the logits are folded into the
matrices. So no other code depends on the architecture.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError
from kdb.ingest.forward.attention import (
    Attended,
    Attention,
    find_attention,
    states_of,
    watched_attention,
    with_sources,
)
from kdb.ingest.forward.blocks import Block, find_block
from kdb.ingest.forward.head_values import measured_values, positions_known
from kdb.ingest.forward.layout import FfnLayout
from kdb.ingest.forward.linear import Call, Norm, flat, matrix, read_norm
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.guard import not_finite
from kdb.ingest.models.structure import ModelStructure, find_structure

if TYPE_CHECKING:
    import torch
    from torch import nn

_TRACE_TOKENS = 5


@dataclass(frozen=True)
class Readout:
    """Readout with frozen final norm: logits are table @ x · s + constant at scale s, then the soft cap."""

    table: torch.Tensor
    constant: torch.Tensor
    softcap: float | None

    @functools.cached_property
    def longest(self) -> torch.Tensor:
        """Tokens by falling distance of their row from the mean row: those most likely to have large logits."""
        lengths: torch.Tensor = (self.table - self.table.mean(0)).norm(dim=1)
        return lengths.argsort(descending=True)


class Decomposition:
    """A model and the decomposition of its residual stream.

    :func:`decompose` makes it, and raises ModelError for a model with other parts.
    """

    def __init__(
        self, loaded: LoadedModel, structure: ModelStructure, blocks: tuple[Block, ...], multiplier: float
    ) -> None:
        self.loaded = loaded
        self.structure = structure
        self.blocks = blocks
        self.multiplier = multiplier
        heads = [block.heads for block in blocks if block.heads is not None]
        self.n_heads = max((one.n_heads for one in heads), default=0)
        self.head_size = max((one.head_size for one in heads), default=0)
        self.hidden_size = structure.hidden_size
        self.has_positions = all(one.positions for one in heads)
        self.final_norm = read_norm(structure.final_norm, self.hidden_size)

    @functools.cached_property
    def readout(self) -> Readout:
        """The unembedding with the final norm folded in, in float32: table (vocab, hidden), constant (vocab)."""
        import torch

        unembed, norm = self.structure.unembed, self.final_norm
        rows = matrix(unembed).float()
        bias = getattr(unembed, "bias", None)
        constant = rows @ norm.bias + (torch.zeros(()) if bias is None else bias.float()).to(rows.device)
        table = norm.before(rows) * self.structure.logit_scale
        return Readout(table, constant * self.structure.logit_scale, self.structure.logit_softcap)

    def heads_in(self, layer: int) -> int:
        """Number of heads of a layer's attention; 0 if it has none."""
        heads = self.blocks[layer].heads
        return 0 if heads is None else heads.n_heads

    def head_size_in(self, layer: int) -> int:
        """Number of entries of each head of a layer; 0 if it has none."""
        heads = self.blocks[layer].heads
        return 0 if heads is None else heads.head_size

    @functools.cached_property
    def with_mixer(self) -> tuple[int, ...]:
        """The layers that have a mixer."""
        return tuple(i for i, block in enumerate(self.blocks) if block.has("mixer"))

    @functools.cached_property
    def is_uniform(self) -> bool:
        """Whether all layers have attention with heads of one number and size, of which nothing must be computed."""
        shapes = {None if b.heads is None else (b.heads.n_heads, b.heads.head_size) for b in self.blocks}
        plain = all(b.heads is not None and b.heads.watched and not b.heads.gated for b in self.blocks)
        return len(shapes) == 1 and plain and self.has_positions

    @functools.cached_property
    def can_resume(self) -> bool:
        """Whether a pass may begin behind cached tokens and behind the first blocks: a block needs no more."""
        heads = [b.heads for b in self.blocks]
        return all(one is not None and one.watched and one.values_of == i for i, one in enumerate(heads)) and not (
            self.with_mixer
        )

    def attn_columns(self, layer: int) -> torch.Tensor:
        """Contribution of one unit of each head dimension to the residual: (heads · head size, hidden), float32.

        Rows of heads and entries that the layer lacks are zero.
        """
        block = self.blocks[layer]
        if block.attn_out is None:
            return self.final_norm.weight.new_zeros(self.n_heads * self.head_size, self.hidden_size)
        return self._padded(self._columns(block.attn_out, block.attn_post, block.additions.multipliers["attn"]), layer)

    def _padded(self, rows: torch.Tensor, layer: int) -> torch.Tensor:
        """Rows (heads · head size of the layer, …) with zeros for the heads and entries that the layer lacks."""
        import torch

        n, size = self.heads_in(layer), self.head_size_in(layer)
        if (n, size) == (self.n_heads, self.head_size):
            return rows
        lacking = (0, 0, 0, self.head_size - size, 0, self.n_heads - n)
        return torch.nn.functional.pad(rows.view(n, size, -1), lacking).flatten(0, 1)

    @functools.cached_property
    def n_slots(self) -> int:
        """Number of slots of every layer's FFN: the neurons of the widest layer."""
        return max(block.ffn.layout.size for block in self.blocks)

    @functools.cached_property
    def n_experts(self) -> int:
        """Number of experts, shared ones included, of the layer that has most; 0 if all layers are dense."""
        return max(len(block.ffn.layout.starts) for block in self.blocks)

    def ffn_layout(self, layer: int) -> FfnLayout:
        """Return which of a layer's slots are the neurons of which expert."""
        return self.blocks[layer].ffn.layout

    def ffn_columns(self, layer: int) -> torch.Tensor:
        """Contribution of one unit of each FFN neuron to the residual: (slots, hidden), float32; 0 without a neuron."""
        return self._slots(layer, [self._behind_ffn(layer, s.columns()) for s in self.blocks[layer].ffn.sources])

    def ffn_keys(self, layer: int) -> torch.Tensor:
        """Direction of the residual that activates each FFN neuron: (slots, hidden), float32; 0 without a neuron."""
        return self._slots(layer, [source.keys() for source in self.blocks[layer].ffn.sources])

    def expert_biases(self, layer: int) -> torch.Tensor | None:
        """Contribution of each expert of weight 1 without its neurons: (experts, hidden), float32; None if all are 0.

        A dense FFN counts as one expert.
        """
        import torch

        sources = self.blocks[layer].ffn.sources
        if all(source.biases() is None for source in sources):
            return None
        device = self.loaded.device
        rows = [torch.zeros(s.part.n_experts, self.hidden_size, device=device) for s in sources]
        own = [zeros if (bias := s.biases()) is None else bias for s, zeros in zip(sources, rows, strict=True)]
        return self._behind_ffn(layer, torch.cat(own))

    def _slots(self, layer: int, parts: list[torch.Tensor]) -> torch.Tensor:
        """The rows of all sources (slots, hidden), with zeros where the layer has no neuron."""
        import torch

        missing = self.n_slots - self.ffn_layout(layer).size
        if missing or not parts:
            parts = [*parts, torch.zeros(missing, self.hidden_size, device=self.loaded.device)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _behind_ffn(self, layer: int, vectors: torch.Tensor) -> torch.Tensor:
        block = self.blocks[layer]
        return self._behind(vectors, block.ffn_post, block.additions.multipliers.get("ffn", 0.0))

    def value_keys(self, layer: int) -> torch.Tensor:
        """Direction of the residual that produces each value entry: (heads · head size, hidden), float32.

        The residual is the input of the layer whose values the layer uses: its own, unless layers share them.
        """
        heads = self.blocks[layer].heads
        if heads is None:
            return self.attn_columns(layer)  # zeros
        rows = _folded(self.value_rows[layer][0].float(), self.blocks[heads.values_of].attn_norm)
        return self._padded(rows, layer)

    def _columns(self, projection: nn.Module, post: Norm | None, multiplier: float) -> torch.Tensor:
        return self._behind(matrix(projection).float().T, post, multiplier)

    def _behind(self, columns: torch.Tensor, post: Norm | None, multiplier: float) -> torch.Tensor:
        folded = post.after(columns) if post is not None else columns
        return folded * multiplier if multiplier != 1 else folded

    @functools.cached_property
    def value_rows(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Value projection of each layer with attention: rows (heads · head size, hidden), bias (heads · head size).

        It is measured by unit vectors, so that it may be fused in any way. A norm within it counts without its scale.
        """
        heads = {i: block.heads for i, block in enumerate(self.blocks) if block.heads is not None}
        return measured_values(self.loaded, self.structure.decoder, heads, self.hidden_size)


def _folded(rows: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return norm.before(rows) if norm is not None else rows


# Decomposing -----------------------------------------------------------------------------------------------------


def decompose(loaded: LoadedModel) -> Decomposition:
    """Find the parts of every block by watching one forward pass.

    Raises ModelError, naming the part, if a part is not found, because the model adds to its residual stream in another
    way. :func:`kdb.ingest.forward.activation_cache.check_decomposition` then checks that the parts add up.
    """
    import torch

    if len({parameter.device for parameter in loaded.model.parameters()}) > 1:
        raise ModelError(
            f"{loaded.source.name} is spread over several devices, and attribution needs it on one: use "
            "--quantize int8, --dtype bfloat16, or a device with more memory."
        )
    structure = find_structure(loaded.model)
    size = structure.hidden_size
    if getattr(structure.unembed, "in_features", None) != size:
        raise ModelError(
            f"{loaded.source.name} cannot be decomposed: the unembedding of {type(loaded.model).__name__} is not "
            f"one linear map of its {size} hidden entries."
        )
    calls: dict[int, list[Call]] = {i: [] for i in range(len(structure.blocks))}
    attended = Attended()
    ids = torch.arange(_TRACE_TOKENS, device=loaded.device)[None]
    with contextlib.ExitStack() as hooks, watched_attention(loaded.model, attended.watch), torch.inference_mode():
        for i, block in enumerate(structure.blocks):
            for module in block.modules():
                hook = functools.partial(_note, calls[i])
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(attended.note))
        states = structure.decoder(ids, use_cache=False)[0]
    if not states.isfinite().all():
        raise not_finite(loaded.source.name, loaded.dtype, "the first pass")
    multiplier = float(getattr(loaded.model.config.get_text_config(), "residual_multiplier", None) or 1.0)
    attentions = [_attention_of(loaded, i, block, calls[i], attended) for i, block in enumerate(structure.blocks)]
    blocks = tuple(
        find_block(_where(loaded, i), module, ffn, calls[i], attention, multiplier)
        for i, (module, ffn, attention) in enumerate(
            zip(structure.blocks, structure.ffns, with_sources(attentions, attended), strict=True)
        )
    )
    found = Decomposition(loaded, structure, blocks, multiplier)
    known = positions_known(found, calls, attended)
    return found if known else Decomposition(loaded, structure, tuple(map(_without_positions, blocks)), multiplier)


def _without_positions(block: Block) -> Block:
    return block if block.heads is None else replace(block, heads=replace(block.heads, positions=False))


def _where(loaded: LoadedModel, layer: int) -> str:
    return f"{loaded.source.name} cannot be decomposed: block {layer} of {type(loaded.model).__name__}"


def _attention_of(
    loaded: LoadedModel, layer: int, block: nn.Module, calls: list[Call], attended: Attended
) -> Attention | None:
    return find_attention(_where(loaded, layer), set(block.modules()), calls, attended)


def _note(calls: list[Call], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    read = states_of(args, kwargs)
    written = output[0] if isinstance(output, tuple | list) else output
    if hasattr(read, "shape") and hasattr(written, "shape"):
        # Cloned, since some modules add to what others returned (the experts of Llama 4).
        calls.append(Call(module, flat(read).clone(), flat(written).clone(), args, kwargs, output))
