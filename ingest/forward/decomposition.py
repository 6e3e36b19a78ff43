"""Decompose the residual stream into a sum: find the modules that add to it, and their linear maps.

The modules are found from one short forward pass, not from names of models: the attention function identifies the
module that calls it, and equal tensors show which module feeds which. All linear maps have one form: the norms before
and after a projection, their centring, the residual multiplier and the scale of the logits are folded into the
matrices. So no other code depends on the architecture.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError
from kdb.ingest.forward.attention import watched_attention
from kdb.ingest.forward.ffn import Ffn, find_ffn
from kdb.ingest.forward.layout import FfnLayout
from kdb.ingest.forward.linear import Call, Linear, Norm, flat, is_linear, matrix, read_norm, same
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.structure import ModelStructure, find_structure

if TYPE_CHECKING:
    import torch
    from torch import nn

_TRACE_TOKENS = 5
_UNIT_ROWS = 16
"""Positions of one sequence of unit vectors: fewer than the context of any model."""


@dataclass(frozen=True)
class Block:
    """The parts of one block. A norm is None if the architecture has no norm there.

    ``attention`` is the module that calls the attention function. ``ffn_norm`` is the norm before the FFN's first
    module, ``ffn_post`` the one behind the whole FFN. ``parallel``: attention and FFN both read the block's input.
    """

    module: nn.Module
    attention: nn.Module
    attn_out: nn.Module
    ffn: Ffn
    attn_norm: Norm | None
    ffn_norm: Norm | None
    attn_post: Norm | None
    ffn_post: Norm | None
    parallel: bool


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
        text = loaded.model.config.get_text_config()
        self.n_heads = int(text.num_attention_heads)
        self.hidden_size = int(text.hidden_size)
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

    def attn_columns(self, layer: int) -> torch.Tensor:
        """Contribution of one unit of each head dimension to the residual: (heads · head size, hidden), float32."""
        return self._columns(self.blocks[layer].attn_out, self.blocks[layer].attn_post)

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
        if missing:
            parts = [*parts, torch.zeros(missing, self.hidden_size, device=self.loaded.device)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _behind_ffn(self, layer: int, vectors: torch.Tensor) -> torch.Tensor:
        return self._behind(vectors, self.blocks[layer].ffn_post)

    def value_keys(self, layer: int) -> torch.Tensor:
        """Direction of the residual that produces each value entry: (heads · head size, hidden), float32."""
        return _folded(self._value_rows[layer].float(), self.blocks[layer].attn_norm)

    def _columns(self, projection: nn.Module, post: Norm | None) -> torch.Tensor:
        return self._behind(matrix(projection).float().T, post)

    def _behind(self, columns: torch.Tensor, post: Norm | None) -> torch.Tensor:
        folded = post.after(columns) if post is not None else columns
        return folded * self.multiplier if self.multiplier != 1 else folded

    @functools.cached_property
    def _value_rows(self) -> list[torch.Tensor]:
        """The value projection of each layer, measured by unit vectors, so that it may be fused in any way."""
        import torch

        device, dtype = self.loaded.device, getattr(torch, self.loaded.dtype)
        units = torch.eye(self.hidden_size, device=device, dtype=dtype)
        n = -(-(self.hidden_size + 1) // _UNIT_ROWS) * _UNIT_ROWS  # at least one row of zeros, which gives the bias
        units = torch.nn.functional.pad(units, (0, 0, 0, n - self.hidden_size)).view(-1, _UNIT_ROWS, self.hidden_size)
        heads = []

        def keep(_module: nn.Module, _query: torch.Tensor, value: torch.Tensor, _weights: torch.Tensor) -> None:
            rows = value.transpose(1, 2).flatten(0, 1)[: self.hidden_size + 1].float()  # unit, kv head, entry
            per_head = (rows[:-1] - rows[-1]).repeat_interleave(self.n_heads // value.shape[1], dim=1)
            heads.append(per_head.flatten(1).T.to(dtype))

        ids = torch.zeros(units.shape[:2], dtype=torch.long, device=device)
        with contextlib.ExitStack() as hooks, watched_attention(self.loaded.model, keep), torch.inference_mode():
            for block in self.blocks:
                hooks.enter_context(_feed(block.attention, units))
            self.structure.decoder(ids, use_cache=False)
        return heads


def _folded(rows: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return norm.before(rows) if norm is not None else rows


def _feed(module: nn.Module, hidden: torch.Tensor) -> Any:
    """Replace a module's input by these hidden states, positional or not."""

    def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    return module.register_forward_pre_hook(replace, with_kwargs=True)


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
    outputs: dict[nn.Module, torch.Tensor] = {}

    def watch(module: nn.Module, _query: torch.Tensor, value: torch.Tensor, weights: torch.Tensor) -> None:
        groups = weights.shape[1] // value.shape[1]
        mixed = weights @ value.repeat_interleave(groups, dim=1)
        outputs[module] = flat(mixed.transpose(1, 2).flatten(2))

    ids = torch.arange(_TRACE_TOKENS, device=loaded.device)[None]
    with contextlib.ExitStack() as hooks, watched_attention(loaded.model, watch), torch.inference_mode():
        for i, block in enumerate(structure.blocks):
            for module in block.modules():
                hook = functools.partial(_note, calls[i])
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        structure.decoder(ids, use_cache=False)
    multiplier = float(getattr(loaded.model.config.get_text_config(), "residual_multiplier", None) or 1.0)
    blocks = tuple(
        _block(loaded, i, module, ffn, calls[i], outputs, multiplier)
        for i, (module, ffn) in enumerate(zip(structure.blocks, structure.ffns, strict=True))
    )
    return Decomposition(loaded, structure, blocks, multiplier)


def _note(calls: list[Call], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    read: Any = args[0] if args else kwargs.get("hidden_states")
    written = output[0] if isinstance(output, tuple) else output
    if hasattr(read, "shape") and hasattr(written, "shape"):
        # Cloned, since some modules add to what others returned (the experts of Llama 4).
        calls.append(Call(module, flat(read).clone(), flat(written).clone(), args, kwargs, output))


def _block(
    loaded: LoadedModel,
    layer: int,
    module: nn.Module,
    ffn: nn.Module,
    calls: list[Call],
    attended: dict[nn.Module, torch.Tensor],
    multiplier: float,
) -> Block:
    """Find one block's parts among its calls, given in the order in which they ended."""
    where = f"{loaded.source.name} cannot be decomposed: block {layer} of {type(loaded.model).__name__}"
    inside = set(module.modules())
    attention = next((m for m in attended if m in inside), None)
    if attention is None:
        raise ModelError(f"{where} has its own attention, which transformers' AttentionInterface does not reach.")
    by_module = {call.module: call for call in calls}
    norms = [call for call in calls if "norm" in type(call.module).__name__.lower()]
    linear = [call for call in calls if is_linear(call.module)]
    of_attention = set(attention.modules())
    attn_out = next((c for c in linear if c.module in of_attention and same(c.read, attended[attention])), None)
    if attn_out is None:
        raise ModelError(f"{where} has no linear map that reads its heads.")
    size = loaded.model.config.get_text_config().hidden_size

    def find(**wanted: torch.Tensor) -> Norm | None:
        norm = next((c for c in norms if all(same(getattr(c, k), v) for k, v in wanted.items())), None)
        return read_norm(norm.module, size) if norm is not None else None

    ffn_read = by_module[ffn].read
    ffn_norm = find(written=ffn_read)
    ffn_source = by_module[ffn_norm.module].read if ffn_norm is not None else ffn_read
    attn_post = find(read=attn_out.written)

    def before(read: torch.Tensor) -> tuple[Norm | Linear, ...]:
        norm, projection = find(written=read), next((c for c in linear if same(c.written, read)), None)
        if norm is not None or projection is None:
            return () if norm is None else (norm,)
        return (*before(projection.read), Linear(projection.module))

    outside = [c for c in calls if c.module not in of_attention]
    attn = attn_out.written if attn_post is None else by_module[attn_post.module].written
    added = (by_module[module].written - by_module[module].read) / multiplier - attn
    parts, total = find_ffn(where, module, outside, ffn_read, before, added)
    return Block(
        module=module,
        attention=attention,
        attn_out=attn_out.module,
        ffn=parts,
        attn_norm=find(written=by_module[attention].read),
        ffn_norm=ffn_norm,
        attn_post=attn_post,
        ffn_post=find(read=total),
        parallel=same(ffn_source, by_module[module].read),
    )
