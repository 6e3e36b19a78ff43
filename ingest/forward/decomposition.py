"""Decompose the residual stream into a sum: find the modules that add to it, and their linear maps.

The modules are found from one short forward pass, not from names of models: the attention function identifies the
module that calls it, and equal tensors show which module feeds which. All linear maps have one form: the norms before
and after a projection, their centring, the residual multiplier and the scale of the logits are folded into the
matrices. So no other code depends on the architecture.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from kdb.errors import ModelError
from kdb.ingest.forward.additions import Additions, find_additions, find_order
from kdb.ingest.forward.attention import (
    Attended,
    Attention,
    attending_ones,
    feed,
    find_attention,
    states_of,
    watched_attention,
    with_sources,
)
from kdb.ingest.forward.ffn import Call, find_key, flat, is_linear, n_inputs, same
from kdb.ingest.forward.layout import FfnLayout
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.structure import ModelStructure, find_structure

if TYPE_CHECKING:
    import torch
    from torch import nn

_TRACE_TOKENS = 5
_AMPLITUDE = 128.0
"""Entries of the vectors that probe a norm: so large that its epsilon is negligible."""

_UNIT_ROWS = 16
"""Positions of one sequence of unit vectors: fewer than the context of any model."""


@dataclass(frozen=True)
class Norm:
    """A norm with its scale frozen: y = weight · (x − mean, if centred) · scale + bias."""

    module: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor
    centred: bool

    def before(self, rows: torch.Tensor) -> torch.Tensor:
        """Fold the norm, without its scale, into the rows (…, hidden) of a projection that reads its output."""
        return self._centre(rows * self.weight)

    def after(self, columns: torch.Tensor) -> torch.Tensor:
        """Fold the norm, without its scale, into vectors (…, hidden) that it reads."""
        return self._centre(columns) * self.weight

    def scale(self, read: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Fit the scale (…) that maps ``read`` to ``written``, both (…, hidden), by least squares."""
        shape = self.after(read)
        return ((written - self.bias) * shape).sum(-1) / shape.square().sum(-1)

    def _centre(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True)
class Block:
    """The parts of one block. A part is None if the block has none.

    ``heads`` describes the attention, ``attn_out`` is the linear map that reads the heads. ``mixer`` is the module that
    writes what the block adds beside attention and FFN: a state-space model, linear attention, a convolution. ``key`` is the projection whose rows activate the FFN
    neurons (the up projection if the FFN is gated), ``key_rows`` its rows within a fused projection. ``activation`` is
    the module that computes the activation function, None if there is no such module. ``additions`` are the multipliers
    and the order of what is added.
    """

    module: nn.Module
    heads: Attention | None
    attn_out: nn.Module | None
    mixer: nn.Module | None
    ffn_out: nn.Module
    key: nn.Module
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
        """Whether a pass may begin behind cached tokens and behind the first blocks: each block needs its input only."""
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
        return self._columns(block.ffn_out, block.ffn_post, block.additions.multipliers["ffn"])

    def ffn_layout(self, layer: int) -> FfnLayout:
        """Return which of a layer's slots are the neurons of which expert."""
        return FfnLayout(n_inputs(self.blocks[layer].ffn_out))

    def ffn_keys(self, layer: int) -> torch.Tensor:
        """Direction of the residual that activates each FFN neuron: (neurons, hidden), float32."""
        block = self.blocks[layer]
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
        """The value projection of each layer with attention: rows (heads · head size, hidden) and bias (heads · head size).

        It is measured by unit vectors, so that it may be fused in any way. A norm within it counts without its scale.
        """
        return measured_values(self)


def measured_values(decomposition: Decomposition) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Measure the value projections, as in :attr:`Decomposition.value_rows`, from passes with unit vectors as inputs.

    Attention functions show their values. A family with an attention of its own reads each vector as a text of one
    token: all its weight is on itself, so that the heads are its values.
    """
    layers = {b.heads.module: i for i, b in enumerate(decomposition.blocks) if b.heads is not None}
    watched = {m: i for m, i in layers.items() if _heads(decomposition, i).watched}
    own = {m: i for m, i in layers.items() if m not in watched}
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for some, width in ((watched, _UNIT_ROWS), (own, 1)):
        if some:
            found |= _measured(decomposition, some, width)
    return found


def _heads(decomposition: Decomposition, layer: int) -> Attention:
    heads = decomposition.blocks[layer].heads
    assert heads is not None
    return heads


def _measured(
    decomposition: Decomposition, layers: dict[nn.Module, int], width: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Feed unit vectors to these attentions, in texts of ``width`` tokens."""
    import torch

    loaded, size = decomposition.loaded, decomposition.hidden_size
    device, dtype = loaded.device, getattr(torch, loaded.dtype)
    n = -(-(size + 1) // width) * width  # at least one row of zeros, which gives the bias
    units = torch.nn.functional.pad(torch.eye(size, device=device, dtype=dtype), (0, 0, 0, n - size))
    units = units.view(-1, width, size)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(layer: int, value: torch.Tensor) -> None:
        """``value``: (unit, entries of all heads)."""
        rows = value[: size + 1].float()
        found[layer] = (rows[:-1] - rows[-1]).T.to(dtype), rows[-1]

    def watch(module: nn.Module, query: torch.Tensor, value: torch.Tensor, _weights: torch.Tensor) -> None:
        if module in layers:
            every = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            keep(layers[module], every.transpose(1, 2).flatten(0, 1).flatten(1))

    def read(layer: int, _module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        keep(layer, flat(args[0]))

    ids = torch.zeros(units.shape[:2], dtype=torch.long, device=device)
    with contextlib.ExitStack() as hooks, watched_attention(loaded.model, watch), torch.inference_mode():
        for module, layer in layers.items():
            hooks.enter_context(feed(module, units))
            hooks.enter_context(_without_scales(module))
            if not _heads(decomposition, layer).watched:
                hook = functools.partial(read, layer)
                hooks.enter_context(_heads(decomposition, layer).out.register_forward_hook(hook))
        decomposition.structure.decoder(ids, use_cache=False)
    return found


@contextlib.contextmanager
def _without_scales(attention: nn.Module) -> Iterator[None]:
    """Let the norms within an attention be linear: of their output, only the scale is left out."""
    with contextlib.ExitStack() as hooks:
        for norm in inner_norms(attention):
            hooks.enter_context(norm.register_forward_hook(_unscaled))
        yield


def _unscaled(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    norm = read_norm(module, args[0].shape[-1])
    return (norm.after(args[0].float()) + norm.bias).to(output.dtype)


def inner_norms(attention: nn.Module) -> list[nn.Module]:
    """The norms within an attention: of queries and keys, or on the way to its values."""
    return [m for m in attention.modules() if is_norm(m)]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def _folded(rows: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return norm.before(rows) if norm is not None else rows


def matrix(module: nn.Module) -> torch.Tensor:
    """Matrix (out, in) of a linear module: its plain weight, or else measured by unit vectors."""
    import torch
    from transformers.pytorch_utils import Conv1D

    weight: Any = module.weight
    if type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point():
        plain: torch.Tensor = weight.detach()
        return plain.T if isinstance(module, Conv1D) else plain
    with torch.inference_mode():
        # A quantized weight of any kind: its outputs define the matrix.
        units = torch.eye(cast(int, module.in_features), device=weight.device)
        rows: torch.Tensor = (module(units) - module(torch.zeros_like(units[:1]))).T
        return rows


def read_norm(module: nn.Module, size: int) -> Norm:
    """Measure a norm's weight and bias from its outputs, in float32, since architectures store them differently."""
    import torch

    twin = copy.deepcopy(module).float()
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    signs = torch.ones(size, device=device)
    signs[1::2] = -1
    x = signs * _AMPLITUDE
    with torch.inference_mode():
        up, down, shifted = twin(x), twin(-x), twin(x + _AMPLITUDE)
    # Cloned, since some operations outside of inference mode refuse its tensors.
    weight, bias = ((up - down) / 2 * signs).clone(), ((up + down) / 2).clone()
    return Norm(module, weight, bias, centred=bool(torch.allclose(up, shifted, rtol=1e-3, atol=1e-5)))


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
    return _with_positions(Decomposition(loaded, structure, blocks, multiplier), calls, attended)


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
    ffn: nn.Module,
    calls: list[Call],
    attended: dict[nn.Module, torch.Tensor],
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
    of_ffn = [c for c in linear if c.module not in of_attention]
    if not of_ffn:
        raise ModelError(f"{where} has no linear map in its FFN.")
    size = loaded.model.config.get_text_config().hidden_size

    def find(**wanted: torch.Tensor) -> Norm | None:
        norm = next((c for c in norms if all(same(getattr(c, k), v) for k, v in wanted.items())), None)
        return read_norm(norm.module, size) if norm is not None else None

    ffn_read = by_module[ffn].read
    ffn_norm = find(written=ffn_read)
    ffn_source = by_module[ffn_norm.module].read if ffn_norm is not None else ffn_read
    outside = [c for c in calls if c.module not in of_attention]
    key, rows, activation, gated = find_key(where, of_ffn[:-1], outside, of_ffn[-1].read)
    return Block(
        module=module,
        attention=attention,
        attn_out=attn_out.module,
        ffn_out=of_ffn[-1].module,
        key=key,
        key_rows=rows,
        activation=activation,
        gated=gated,
        attn_norm=find(written=by_module[attention].read),
        ffn_norm=ffn_norm,
        attn_post=find(read=attn_out.written),
        ffn_post=find(read=of_ffn[-1].written),
        parallel=same(ffn_source, by_module[module].read),
    )
