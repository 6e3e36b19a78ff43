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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from kdb.errors import ModelError
from kdb.ingest.forward.ffn import Call, find_key, flat, is_linear, n_inputs, same
from kdb.ingest.forward.layout import FfnLayout
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.structure import ModelStructure, find_structure

if TYPE_CHECKING:
    import torch
    from torch import nn

ATTENTION = "kdb"
"""Name under which our attention function is registered in transformers."""

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
    """The parts of one block. A norm is None if the architecture has no norm there.

    ``attention`` is the module that calls the attention function. ``key`` is the projection whose rows activate the FFN
    neurons (the up projection if the FFN is gated), ``key_rows`` its rows within a fused projection. ``activation`` is
    the module that computes the activation function, None if there is no such module. ``parallel``: attention and FFN
    both read the block's input.
    """

    module: nn.Module
    attention: nn.Module
    attn_out: nn.Module
    ffn_out: nn.Module
    key: nn.Module
    key_rows: slice
    activation: nn.Module | None
    gated: bool
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

    def ffn_columns(self, layer: int) -> torch.Tensor:
        """Contribution of one unit of each FFN neuron to the residual: (neurons, hidden), float32."""
        return self._columns(self.blocks[layer].ffn_out, self.blocks[layer].ffn_post)

    def ffn_layout(self, layer: int) -> FfnLayout:
        """Return which of a layer's slots are the neurons of which expert."""
        return FfnLayout(n_inputs(self.blocks[layer].ffn_out))

    def ffn_keys(self, layer: int) -> torch.Tensor:
        """Direction of the residual that activates each FFN neuron: (neurons, hidden), float32."""
        block = self.blocks[layer]
        return _folded(matrix(block.key)[block.key_rows].float(), block.ffn_norm)

    def value_keys(self, layer: int) -> torch.Tensor:
        """Direction of the residual that produces each value entry: (heads · head size, hidden), float32."""
        return _folded(self._value_rows[layer].float(), self.blocks[layer].attn_norm)

    def _columns(self, projection: nn.Module, post: Norm | None) -> torch.Tensor:
        columns = matrix(projection).float().T
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


# Attention -------------------------------------------------------------------------------------------------------

Watcher = Callable[..., None]
_watching: list[Watcher] = []


@contextlib.contextmanager
def watched_attention(model: Any, watcher: Watcher, *, frozen: bool = False) -> Iterator[None]:
    """Run ``model`` with our attention function, which calls ``watcher(module, query, value, weights)``.

    ``frozen`` attention lets no gradient through its weights.

    query and value (batch, heads or key-value heads, position, entry) are as the attention used them, after any
    rotation; weights (batch, heads, position, position) are after softmax.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, functools.partial(_attention, frozen=frozen))
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    _watching.append(watcher)
    try:
        yield
    finally:
        _watching.remove(watcher)
        model.set_attn_implementation(before)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    *,
    frozen: bool,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Compute softmax attention in plain steps, since a fused kernel would not return the weights that it used."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores + attention_mask[..., : keys.shape[-2]]
    weights = scores.float().softmax(-1).to(query.dtype)
    weights = weights.detach() if frozen else weights
    for watcher in _watching:
        watcher(module, query, value, weights)
    return (weights @ values).transpose(1, 2).contiguous(), None


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
    blocks = tuple(
        _block(loaded, i, module, ffn, calls[i], outputs)
        for i, (module, ffn) in enumerate(zip(structure.blocks, structure.ffns, strict=True))
    )
    multiplier = float(getattr(loaded.model.config.get_text_config(), "residual_multiplier", None) or 1.0)
    return Decomposition(loaded, structure, blocks, multiplier)


def _note(calls: list[Call], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    read: Any = args[0] if args else kwargs.get("hidden_states")
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
