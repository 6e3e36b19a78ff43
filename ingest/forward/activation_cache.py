"""Run a batch of prompts once, and cache the activations that the attribution of a token needs.

Prompts are padded on the right, as in :mod:`kdb.ingest.forward.capture`: in a causal model, padding does not change the
positions before it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from kdb.ingest.forward.attention import watched_attention
from kdb.ingest.forward.capture import batches, padded
from kdb.ingest.forward.checks import check_row, kl_divergence, untouched
from kdb.ingest.forward.decomposition import Decomposition
from kdb.ingest.forward.experts import Experts
from kdb.ingest.forward.ffn_activations import FfnActivations
from kdb.ingest.forward.length_classes import LengthClasses, forget_longest
from kdb.ingest.forward.linear import Norm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdb.ingest.forward.ffn import Source
    from kdb.ingest.models.find import LoadedModel

CHECK_BYTES = 512 * 2**20
"""Bytes of memory for the cache of the prompts that a run is checked on."""


@dataclass(frozen=True)
class ActivationCache:
    """Activations of a batch's forward pass, in float32.

    Shapes: layer l, prompt b, position t, head h, hidden d, neuron n. ``last`` is each prompt's last position; values
    at the padding after it are meaningless. Contributions include the scale and the bias of a norm after them, the bias
    of the projection, and the residual multiplier.
    """

    last: torch.Tensor  # (b)
    resid_pre: torch.Tensor  # (l, b, t, d) block inputs
    resid_post: torch.Tensor  # (b, d) the last block's output at the last position
    attn: torch.Tensor  # (l, b, t, d) contributions
    ffn: torch.Tensor  # (l, b, t, d) contributions
    coefficients: torch.Tensor  # (l, b, t, n) of the FFN neurons
    attn_scale: torch.Tensor  # (l, b, t) of the norm after attention; 1 if there is none
    ffn_scale: torch.Tensor  # (l, b, t)
    attention: torch.Tensor  # (l, b, h, t) weights of the last query
    values: torch.Tensor  # (l, b, kv head, t, entry)
    attn_bias: torch.Tensor  # (l, b, d) contribution of biases, which belongs to no head, at the last position
    ffn_bias: torch.Tensor  # (l, b, d) contribution of biases, which belongs to no neuron, at the last position
    final_scale: torch.Tensor  # (b) of the final norm at the last position
    logits: torch.Tensor  # (b, vocab) of the model, after its soft cap
    # Routing at the last position, E: experts of the layer that has most; None if no layer has experts.
    router_weight: torch.Tensor | None = None  # (l, b, E) that multiplies an expert's output; 0 if it is not chosen
    router_probs: torch.Tensor | None = None  # (l, b, E) 0 for shared experts, NaN in a layer without a router
    chosen: torch.Tensor | None = None  # (l, b, E) whether the expert was chosen; shared experts always are
    expert_scale: torch.Tensor | None = None  # (l, b, E) that multiplies an expert's bias, but for ffn_scale

    @property
    def n_bytes(self) -> int:
        """Bytes of memory of the cache."""
        kept = (getattr(self, f.name) for f in fields(self))
        return sum(x.nbytes for x in kept if x is not None)


def bytes_per_token(decomposition: Decomposition) -> int:
    """Largest number of bytes for one token of a prompt: its cache, and the bounds of its attention neurons."""
    n_neurons = decomposition.n_slots
    n_values = decomposition.attn_columns(0).shape[0]
    recorded = 4 * (n_neurons + 4 * decomposition.hidden_size + n_values + 8)
    bounds = 6 * 8 * n_values
    return len(decomposition.blocks) * (recorded + bounds)


def run_with_cache(decomposition: Decomposition, token_ids: Sequence[Sequence[int]]) -> ActivationCache:
    """Run a batch of prompts of one length class, and cache its activations."""
    import torch

    device, ids = decomposition.loaded.device, padded(token_ids)
    last = torch.tensor([len(tokens) - 1 for tokens in token_ids], device=device)
    recorder = _Recorder(decomposition, tuple(ids.shape), last)
    forget_longest(decomposition.loaded)
    with recorder.running(), torch.inference_mode():
        decomposition.structure.decoder(ids.to(device), use_cache=False)
    with torch.inference_mode():
        return recorder.cache()


class _Recorder:
    """Hooks of one forward pass, and the activations that they recorded."""

    def __init__(self, decomposition: Decomposition, shape: tuple[int, ...], last: torch.Tensor) -> None:
        self.decomposition = decomposition
        self.shape = shape
        self.last = last
        n = len(decomposition.blocks)
        self.recorded: dict[str, list[Any]] = {
            k: [None] * n for k in ("resid", "attn", "attn_post", "weights", "values", "heads", "out")
        }
        self.ffns = [FfnActivations(block.ffn, block.ffn_post) for block in decomposition.blocks]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        layer_of = {block.attention: i for i, block in enumerate(self.decomposition.blocks)}
        rows = range(self.shape[0])

        def watch(module: nn.Module, _query: torch.Tensor, value: torch.Tensor, weights: torch.Tensor) -> None:
            i = layer_of[module]
            self.recorded["weights"][i] = weights[rows, :, self.last].float()
            self.recorded["values"][i] = value.float()

        with contextlib.ExitStack() as hooks:
            for i, block in enumerate(self.decomposition.blocks):
                hooks.enter_context(self._record(block.module, i, read="resid", written="out"))
                hooks.enter_context(self._record(block.attn_out, i, read="heads", written="attn"))
                hooks.enter_context(self.ffns[i].running())
                if block.attn_post is not None:
                    hooks.enter_context(self._record(block.attn_post.module, i, written="attn_post"))
            hooks.enter_context(watched_attention(self.decomposition.loaded.model, watch))
            yield

    def _record(self, module: nn.Module, layer: int, read: str | None = None, written: str | None = None) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if read is not None:
                self.recorded[read][layer] = self._states(args[0] if args else kwargs["hidden_states"])
            if written is not None:
                self.recorded[written][layer] = self._states(output[0] if isinstance(output, tuple) else output)

        return module.register_forward_hook(hook, with_kwargs=True)

    def _states(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*self.shape, x.shape[-1]).float()

    def cache(self) -> ActivationCache:
        """Assemble the activation cache."""
        import torch

        recorded, decomposition, rows = self.recorded, self.decomposition, range(self.shape[0])
        attn, attn_scale = self._contributions("attn", "attn_post", [b.attn_post for b in decomposition.blocks])
        ffn, ffn_scale = self._ffn_contributions(attn)
        resid_post = recorded["out"][-1][rows, self.last]
        dtype = getattr(torch, decomposition.loaded.dtype)
        normed = decomposition.structure.final_norm(resid_post.to(dtype))
        logits = decomposition.structure.readout(resid_post.to(dtype))
        return ActivationCache(
            last=self.last,
            resid_pre=torch.stack(recorded["resid"]),
            resid_post=resid_post,
            attn=attn,
            ffn=ffn,
            coefficients=torch.stack([self._by_prompt(f.coefficients(decomposition.n_slots)) for f in self.ffns]),
            attn_scale=attn_scale,
            ffn_scale=ffn_scale,
            attention=torch.stack(recorded["weights"]),
            values=torch.stack(recorded["values"]),
            attn_bias=self._unaccounted(attn_scale, [(b.attn_out, b.attn_post) for b in decomposition.blocks]),
            ffn_bias=self._ffn_biases(ffn_scale),
            final_scale=decomposition.final_norm.scale(resid_post, normed.float()),
            logits=logits,
            **(self._routing() if decomposition.n_experts else {}),
        )

    def _by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*self.shape, *x.shape[1:])

    @functools.cached_property
    def _last_tokens(self) -> torch.Tensor:
        """Numbers (b) of the prompts' last tokens among all tokens of the batch."""
        import torch

        return torch.arange(self.shape[0], device=self.last.device) * self.shape[1] + self.last

    def _ffn_contributions(self, attn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Contributions (l, b, t, d) of the FFNs, and the scale (l, b, t) of the norms behind them."""
        import torch

        multiplier, resid, added, scales = self.decomposition.multiplier, self.recorded["resid"], [], []
        for i, one in enumerate(self.ffns):
            if one.total is None and any(source.is_scaled for source in one.ffn.sources):
                one.total = ((self.recorded["out"][i] - resid[i] - attn[i]) / multiplier).flatten(0, 1)
            read = one.summed()
            norm, written = one.post, read if one.normed is None else one.normed
            scale = torch.ones(len(read), device=read.device) if norm is None else norm.scale(read, written)
            added.append(self._by_prompt(written))
            scales.append(self._by_prompt(scale))
        return torch.stack(added) * multiplier, torch.stack(scales)

    def _ffn_biases(self, scales: torch.Tensor) -> torch.Tensor:
        """Contribution (l, b, d) of what belongs to no neuron, at the last position."""
        import torch

        size, biases = self.decomposition.hidden_size, []
        for one, scale in zip(self.ffns, scales.flatten(1), strict=True):
            bias, norm, at = one.bias(self._last_tokens, size), one.post, scale[self._last_tokens, None]
            biases.append(at * bias if norm is None else at * norm.after(bias) + norm.bias)
        return torch.stack(biases) * self.decomposition.multiplier

    def _routing(self) -> dict[str, torch.Tensor]:
        """The routing (l, b, expert) at the last position; layers without experts have none."""
        import torch

        n, tokens = self.decomposition.n_experts, self._last_tokens
        empty = {"router_weight": 0.0, "router_probs": float("nan"), "chosen": False, "expert_scale": 0.0}
        found: dict[str, list[torch.Tensor]] = {name: [] for name in empty}
        for one in self.ffns:
            for name, value in empty.items():
                row = torch.full((len(tokens), n), value, device=tokens.device)
                if one.ffn.layout.starts:
                    of = getattr(one, name)
                    parts = torch.cat([of(i, tokens) for i in range(len(one.ffn.sources))], dim=1)
                    row[:, : parts.shape[1]] = parts
                found[name].append(row)
        return {name: torch.stack(rows) for name, rows in found.items()}

    def _contributions(self, name: str, post: str, norms: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Contributions (l, b, t, d) of attention or FFN, and the scale (l, b, t) of the norm after it."""
        import torch

        written, after = self.recorded[name], self.recorded[post]
        scales = [
            torch.ones(self.shape, device=w.device) if norm is None else norm.scale(w, a)
            for w, a, norm in zip(written, after, norms, strict=True)
        ]
        added = [w if norm is None else a for w, a, norm in zip(written, after, norms, strict=True)]
        return torch.stack(added) * self.decomposition.multiplier, torch.stack(scales)

    def _unaccounted(self, scales: torch.Tensor, parts: Sequence[tuple[nn.Module, Any]]) -> torch.Tensor:
        """Contribution (l, b, d) of the biases of projection (scaled by the norm) and norm at the last position."""
        import torch

        rows, size, biases = range(self.shape[0]), self.decomposition.hidden_size, []
        for scale, (projection, norm) in zip(scales, parts, strict=True):
            bias = getattr(projection, "bias", None)
            vector = torch.zeros(size, device=scale.device) if bias is None else bias.float()
            added = scale[rows, self.last, None] * (norm.after(vector) if norm is not None else vector)
            biases.append((added + norm.bias if norm is not None else added) * self.decomposition.multiplier)
        return torch.stack(biases)


# Checks ----------------------------------------------------------------------------------------------------------


Further = Callable[[ActivationCache, Sequence[Sequence[int]]], dict[str, float]]
"""Further values to check, by their name, of a cache and the prompts in it."""


def check_decomposition(
    decomposition: Decomposition,
    token_ids: Sequence[Sequence[int]],
    further: Further | None = None,
    at_most: int | None = None,
) -> list[dict[str, Any]]:
    """Check on some prompts that all sums add up and match the untouched model; return rows of ``checks``.

    ``further`` takes at most ``at_most`` prompts.
    Raises ModelError, naming the sum, if a difference is larger than the rounding of the weights' dtype explains.
    """
    loaded = decomposition.loaded
    errors = [_off(decomposition, group, further) for group in _together(decomposition, token_ids, at_most)]
    return [check_row(name, [of[name] for of in errors], loaded, len(token_ids)) for name in errors[0]]


def check_logits(loaded: LoadedModel, recorded: torch.Tensor, own: torch.Tensor) -> None:
    """Compare one prompt's cached logits (vocab) with the untouched model's.

    Raises ModelError if the difference is larger than the rounding of the weights' dtype explains.
    """
    check_row("logits", [float((recorded - own).abs().max() / _spread(own))], loaded, 1)


def _together(
    decomposition: Decomposition, token_ids: Sequence[Sequence[int]], at_most: int | None
) -> Iterator[list[Sequence[int]]]:
    """Batches of prompts to cache together: of one length class, and small enough for memory with padding."""
    order = sorted(token_ids, key=len, reverse=True)
    budget = max(1, CHECK_BYTES // bytes_per_token(decomposition))
    length_class = LengthClasses(decomposition.loaded.model.config)
    for batch in batches(list(map(len, order)), budget, length_class, at_most):
        yield [order[i] for i in batch]


def _off(decomposition: Decomposition, token_ids: Sequence[Sequence[int]], further: Further | None) -> dict[str, float]:
    """Error of every sum, and difference of the logits from the untouched model's, in one batch of prompts."""
    import torch

    with torch.inference_mode():
        r = run_with_cache(decomposition, token_ids)
        own = torch.stack([untouched(decomposition.loaded, ids)[1] for ids in token_ids])
        recorded = r.logits.to(getattr(torch, decomposition.loaded.dtype)).float()  # rounded as the model's own are
        linear = _linear_logits(decomposition, r)
        return {
            "residual_sum": _residual_sum(r),
            "head_sum": _head_sum(decomposition, r),
            "ffn_sum": _ffn_sum(decomposition, r),
            "value_keys": _value_keys(decomposition, r),
            "ffn_keys": _ffn_keys(decomposition, r),
            "frozen_readout": float(((linear - r.logits).abs().amax(-1) / _spread(r.logits)).max()),
            "frozen_readout_kl": kl_divergence(r.logits, linear),
            "logits": float(((recorded - own).abs().amax(-1) / _spread(own)).max()),
            "logits_kl": kl_divergence(own, recorded),
            **(further(r, token_ids) if further else {}),
        }


def _residual_sum(r: ActivationCache) -> float:
    """Relative error of the residual sum, over all positions that are not padding."""
    import torch

    after = torch.cat([r.resid_pre[1:], torch.zeros_like(r.resid_pre[:1])])
    rows = torch.arange(len(r.last), device=r.last.device)
    after[-1, rows, r.last] = r.resid_post
    real = torch.arange(after.shape[2], device=r.last.device) <= r.last[:, None]
    off = (after - (r.resid_pre + r.attn + r.ffn)).norm(dim=-1) / after.norm(dim=-1)
    last_block = off[-1][rows, r.last].max()
    return _largest(torch.stack([off[:-1][:, real].max() if len(off) > 1 else last_block, last_block]))


def _head_sum(decomposition: Decomposition, r: ActivationCache) -> float:
    import torch

    off, rows = [], torch.arange(len(r.last), device=r.last.device)
    for layer in range(len(decomposition.blocks)):
        heads = head_vectors(decomposition, r, layer)
        scale = (heads.norm(dim=-1).sum(1) + r.attn_bias[layer].norm(dim=-1)).clamp_min(1e-30)
        off.append((heads.sum(1) + r.attn_bias[layer] - r.attn[layer, rows, r.last]).norm(dim=-1) / scale)
    return _largest(torch.stack(off))


def _ffn_sum(decomposition: Decomposition, r: ActivationCache) -> float:
    import torch

    off, rows = [], torch.arange(len(r.last), device=r.last.device)
    for layer in range(len(decomposition.blocks)):
        columns = decomposition.ffn_columns(layer)
        m = r.coefficients[layer, rows, r.last] * r.ffn_scale[layer, rows, r.last, None]
        scale = (m.abs() @ columns.norm(dim=-1) + r.ffn_bias[layer].norm(dim=-1)).clamp_min(1e-30)
        off.append((m @ columns + r.ffn_bias[layer] - r.ffn[layer, rows, r.last]).norm(dim=-1) / scale)
    return _largest(torch.stack(off))


def _value_keys(decomposition: Decomposition, r: ActivationCache) -> float:
    """Check that a value entry is its key's product with the residual, up to the norm's scale and a bias.

    The scale of the input norm is not cached, so it is fitted: one factor per position and one bias per entry must
    explain all values. Differences between positions remove the bias.
    """
    import torch

    off = []
    for layer, block in enumerate(decomposition.blocks):
        values = r.values[layer]
        groups = decomposition.n_heads // values.shape[1]
        entries = values.repeat_interleave(groups, dim=1).transpose(1, 2).flatten(2)
        off.append(
            _off_its_keys(
                decomposition, r, r.resid_pre[layer], block.attn_norm, decomposition.value_keys(layer), entries
            )
        )
    return _largest(torch.cat(off))


def _ffn_keys(decomposition: Decomposition, r: ActivationCache) -> float:
    """Check the same of the outputs of the projections that activate the neurons; of experts, of the chosen ones."""
    import torch

    off, dtype = [torch.zeros(1, device=r.last.device)], getattr(torch, decomposition.loaded.dtype)
    for layer, block in enumerate(decomposition.blocks):
        resid = r.resid_pre[layer] if block.parallel else r.resid_pre[layer] + r.attn[layer]
        keys = decomposition.ffn_keys(layer)
        for source, expert, slots in _read_experts(decomposition, r, layer):
            read = resid.to(dtype)
            for of in source.before:
                read = of.module(read)
            norm = next((of for of in source.before if isinstance(of, Norm)), None)
            entries = source.part.read(read, expert)
            off.append(_off_its_keys(decomposition, r, resid, norm, keys[slots], entries))
    return _largest(torch.cat(off))


def _read_experts(decomposition: Decomposition, r: ActivationCache, layer: int) -> Iterator[tuple[Source, int, slice]]:
    """Every source of a layer's FFN, and the slots of its experts that any prompt chose; all those of a dense one."""
    n_before = start = 0
    for source in decomposition.blocks[layer].ffn.sources:
        part = source.part
        size = part.size // part.n_experts
        for expert in range(part.n_experts):
            if r.chosen is None or not isinstance(part, Experts) or r.chosen[layer, :, n_before + expert].any():
                yield source, expert, slice(start + expert * size, start + (expert + 1) * size)
        n_before, start = n_before + part.n_experts, start + part.size


def _off_its_keys(
    decomposition: Decomposition,
    r: ActivationCache,
    resid: torch.Tensor,
    norm: Norm | None,
    keys: torch.Tensor,
    entries: torch.Tensor,
) -> torch.Tensor:
    """Distance of entries (b, t, n) from keys (n, d) · residual (b, t, d) · scale + a constant, by position."""
    import torch

    real = torch.arange(resid.shape[1], device=resid.device) <= r.last[:, None]
    x, written = resid[real], entries[real]
    scale = torch.ones(len(x), device=x.device)
    if norm is not None:
        scale = norm.scale(x, norm.module(x.to(getattr(torch, decomposition.loaded.dtype))).float())
    rest = written - (x @ keys.T) * scale[:, None]
    off: torch.Tensor = (rest - rest.mean(0)).norm(dim=-1) / written.norm(dim=-1).clamp_min(1e-30)
    return off


def _linear_logits(decomposition: Decomposition, r: ActivationCache) -> torch.Tensor:
    """Logits (b, vocab) of the frozen, linear readout, after the soft cap."""
    readout = decomposition.readout
    linear = (r.resid_post * r.final_scale[:, None]) @ readout.table.T + readout.constant
    if readout.softcap is not None:
        linear = readout.softcap * (linear / readout.softcap).tanh()
    return linear


def head_vectors(decomposition: Decomposition, r: ActivationCache, layer: int) -> torch.Tensor:
    """Contributions (b, h, d) of the heads to the residual at the last position."""
    import torch

    mixed = head_coefficients(r, layer).sum(2)  # (b, h, entry)
    columns = decomposition.attn_columns(layer).view(mixed.shape[1], mixed.shape[2], -1)
    rows = torch.arange(len(r.last), device=r.last.device)
    return torch.einsum("bhe,hed->bhd", mixed, columns) * r.attn_scale[layer, rows, r.last, None, None]


def expert_vectors(decomposition: Decomposition, r: ActivationCache, layer: int) -> torch.Tensor:
    """Contributions (b, E, d) of the experts to the residual at the last position, their biases included.

    Those that were not chosen contribute 0. What a norm behind the FFN adds is no expert's.
    """
    import torch

    assert r.chosen is not None and r.expert_scale is not None
    layout, rows = decomposition.ffn_layout(layer), torch.arange(len(r.last), device=r.last.device)
    columns, biases = decomposition.ffn_columns(layer), decomposition.expert_biases(layer)
    m, out = r.coefficients[layer, rows, r.last], columns.new_zeros(*r.chosen.shape[1:], columns.shape[1])
    for expert, (start, stop) in enumerate(itertools.pairwise([*layout.starts, layout.size])):
        if r.chosen[layer, :, expert].any():
            out[:, expert] = m[:, start:stop] @ columns[start:stop]
    if biases is not None and layout.starts:
        out[:, : len(biases)] += r.expert_scale[layer, :, : len(biases), None] * biases
    return out * r.ffn_scale[layer, rows, r.last, None, None]


def head_coefficients(r: ActivationCache, layer: int) -> torch.Tensor:
    """Coefficients (b, h, t, entry) of the attention neurons: attention weight × value entry; 0 at padding."""
    import torch

    values = r.values[layer]
    weights = r.attention[layer]
    real = torch.arange(weights.shape[-1], device=weights.device) <= r.last[:, None]
    groups = weights.shape[1] // values.shape[1]
    return (weights * real[:, None])[..., None] * values.repeat_interleave(groups, dim=1)


def _spread(logits: torch.Tensor) -> torch.Tensor:
    return logits.amax(-1) - logits.amin(-1)


def _largest(x: torch.Tensor) -> float:
    # Unlike Python's max, NumPy's keeps a NaN.
    return float(np.max(x.cpu().numpy(), initial=0))
