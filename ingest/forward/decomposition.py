"""Decompose the residual stream into a sum: find the modules that add to it, and their linear maps.

The modules are found from one short forward pass, not from names of models: the attention function identifies the
module that calls it, and equal tensors show which module feeds which. All linear maps have one form: the norms before
and after a projection, their centring, the residual multiplier and the scale of the logits are folded into the
matrices. So no other code depends on the architecture.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError
from kdb.ingest.forward.additions import Additions, find_additions, find_order
from kdb.ingest.forward.attention import (
    Attended,
    Attention,
    find_attention,
    states_of,
    watched_attention,
    with_sources,
)
from kdb.ingest.forward.ffn import find_key
from kdb.ingest.forward.head_values import measured_values, positions_known
from kdb.ingest.forward.layout import FfnLayout
from kdb.ingest.forward.linear import Call, Norm, flat, is_linear, is_norm, matrix, n_inputs, read_norm, same
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.structure import ModelStructure, find_structure

if TYPE_CHECKING:
    import torch
    from torch import nn

_TRACE_TOKENS = 5


@dataclass(frozen=True)
class Block:
    """The parts of one block. A part is None if the block has none.

    ``heads`` describes the attention, ``attn_out`` is the linear map that reads the heads. ``mixer`` is the module that
    writes what the block adds beside attention and FFN: a state-space model, linear attention, a convolution. ``key``
    is the projection whose rows activate the FFN neurons (the up projection if the FFN is gated), ``key_rows`` its rows
    within a fused projection. ``activation`` is the module that computes the activation function. ``additions`` are the
    multipliers and the order of what is added.
    """

    module: nn.Module
    heads: Attention | None
    attn_out: nn.Module | None
    mixer: nn.Module | None
    ffn_out: nn.Module | None
    key: nn.Module | None
    key_rows: slice
    activation: nn.Module | None
    gated: bool
    attn_norm: Norm | None
    ffn_norm: Norm | None
    attn_post: Norm | None
    ffn_post: Norm | None
    additions: Additions

    def has(self, component: str) -> bool:
        """Whether the block adds something of this component (attn, ffn, mixer) to the residual stream."""
        return component in self.additions.multipliers

    def before(self, component: str) -> tuple[str, ...]:
        """The components that the residual contains already when this one is added to it."""
        return self.additions.before.get(component, ())

    @property
    def parallel(self) -> bool:
        """Whether two components are added to one residual, rather than one after the other."""
        return sorted(len(self.before(c)) for c in self.additions.multipliers) != list(
            range(len(self.additions.multipliers))
        )

    @property
    def middle(self) -> tuple[str, ...]:
        """The components that are added before the FFN; if there are any, the block has a place ``resid_mid``."""
        return self.before("ffn") if self.has("ffn") else ()


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
        self.hidden_size = int(loaded.model.config.get_text_config().hidden_size)
        self.has_positions = all(one.positions for one in heads)
        self.n_slots = max(self.ffn_layout(i).size for i in range(len(blocks)))
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

    def ffn_columns(self, layer: int) -> torch.Tensor:
        """Contribution of one unit of each FFN neuron to the residual: (neurons, hidden), float32."""
        block = self.blocks[layer]
        if block.ffn_out is None:
            return self.final_norm.weight.new_zeros(self.n_slots, self.hidden_size)
        return self._columns(block.ffn_out, block.ffn_post, block.additions.multipliers["ffn"])

    def ffn_layout(self, layer: int) -> FfnLayout:
        """Return which of a layer's slots are the neurons of which expert."""
        out = self.blocks[layer].ffn_out
        return FfnLayout(0 if out is None else n_inputs(out))

    def ffn_keys(self, layer: int) -> torch.Tensor:
        """Direction of the residual that activates each FFN neuron: (neurons, hidden), float32."""
        block = self.blocks[layer]
        if block.key is None:
            return self.ffn_columns(layer)  # zeros
        return _folded(matrix(block.key)[block.key_rows].float(), block.ffn_norm)

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
        columns = matrix(projection).float().T
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
    size = int(loaded.model.config.get_text_config().hidden_size)
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
        structure.decoder(ids, use_cache=False)
    multiplier = float(getattr(loaded.model.config.get_text_config(), "residual_multiplier", None) or 1.0)
    attentions = [_attention_of(loaded, i, block, calls[i], attended) for i, block in enumerate(structure.blocks)]
    blocks = tuple(
        _block(loaded, i, module, ffn, calls[i], attention, multiplier)
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
    written = output[0] if isinstance(output, tuple) else output
    if hasattr(read, "shape") and hasattr(written, "shape"):
        calls.append(Call(module, flat(read), flat(written)))


def _block(
    loaded: LoadedModel,
    layer: int,
    module: nn.Module,
    ffn: nn.Module | None,
    calls: list[Call],
    attention: Attention | None,
    multiplier: float,
) -> Block:
    """Find one block's parts among its calls, given in the order in which they ended."""
    where = _where(loaded, layer)
    by_module = {call.module: call for call in calls}
    whole = by_module[module]
    norms = [call for call in calls if is_norm(call.module)]
    size = whole.read.shape[-1]

    def normed(**wanted: torch.Tensor) -> Call | None:
        return next((c for c in norms if all(same(getattr(c, k), v) for k, v in wanted.items())), None)

    def norm(call: Call | None) -> Norm | None:
        return None if call is None else read_norm(call.module, size)

    def source(read: torch.Tensor) -> torch.Tensor:
        """What is read before the norm, if there is one."""
        before = normed(written=read)
        return read if before is None else before.read

    written: dict[str, torch.Tensor] = {}
    sources: dict[str, torch.Tensor] = {}
    of_attention = set(attention.module.modules()) if attention is not None else set()
    outside = [c for c in calls if c.module not in of_attention and c.module is not module]
    attn_out = by_module[attention.out] if attention is not None else None
    attn_post = normed(read=attn_out.written) if attn_out is not None else None
    if attention is not None and attn_out is not None:
        written["attn"] = (attn_post or attn_out).written
        sources["attn"] = source(by_module[attention.module].read)
    linear = [c for c in outside if is_linear(c.module) and c.read.shape[:1] == whole.read.shape[:1]]
    of_ffn = _of_ffn(ffn, linear)
    ffn_post = normed(read=of_ffn[-1].written) if of_ffn else None
    if of_ffn and ffn is not None:
        written["ffn"] = (ffn_post or of_ffn[-1]).written
        sources["ffn"] = source(by_module[ffn].read)
    multipliers, mixer = find_additions(whole, written, outside, multiplier)
    if mixer is not None:
        written["mixer"] = mixer.written
        sources["mixer"] = source(mixer.read)
    has_ffn = "ffn" in multipliers
    if has_ffn and not of_ffn[:-1]:
        raise ModelError(f"{where} has no linear map in its FFN.")
    found = find_key(where, of_ffn[:-1], outside, of_ffn[-1].read) if has_ffn else (None, slice(0), None, False)
    added = {c: written[c] * a for c, a in multipliers.items()}
    order = find_order(whole.read, {c: sources[c] for c in added}, added)
    has_attn = "attn" in multipliers
    return Block(
        module=module,
        heads=attention if has_attn else None,
        attn_out=attn_out.module if attn_out is not None and has_attn else None,
        mixer=mixer.module if mixer is not None else None,
        ffn_out=of_ffn[-1].module if has_ffn else None,
        key=found[0],
        key_rows=found[1],
        activation=found[2],
        gated=found[3],
        attn_norm=norm(normed(written=by_module[attention.module].read)) if attention is not None else None,
        ffn_norm=norm(normed(written=by_module[ffn].read)) if has_ffn and ffn is not None else None,
        attn_post=norm(attn_post),
        ffn_post=norm(ffn_post) if has_ffn else None,
        additions=Additions(multipliers, mixer.module if mixer is not None else None, order),
    )


def _of_ffn(ffn: nn.Module | None, linear: Sequence[Call]) -> list[Call]:
    """The linear maps of an FFN: those in its module, or in the block if the module is only the first of them."""
    if ffn is None:
        return []
    inside = set(ffn.modules())
    return [c for c in linear if c.module in inside] if len(inside) > 1 else list(linear)
