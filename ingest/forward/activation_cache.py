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

from kdb.ingest.forward.attention import is_asked_again, states_of, watched_attention, weights_returned
from kdb.ingest.forward.capture import batches, padded
from kdb.ingest.forward.checks import DETAIL, check_row, kl_divergence, untouched
from kdb.ingest.forward.decomposition import Decomposition
from kdb.ingest.forward.experts import Experts
from kdb.ingest.forward.ffn_activations import FfnActivations
from kdb.ingest.forward.head_values import inner_norms, watched_gates
from kdb.ingest.forward.length_classes import LengthClasses, forget_longest
from kdb.ingest.forward.linear import Norm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdb.ingest.forward.attention import Attention
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
    attention: torch.Tensor  # (l, b, h, t) weights of the last query; t is 0 where heads have no positions
    values: torch.Tensor  # (l, b, kv head or head, t, entry), times the gate of the last query, if there is one
    attn_bias: torch.Tensor  # (l, b, d) contribution of biases, which belongs to no head, at the last position
    ffn_bias: torch.Tensor  # (l, b, d) contribution of biases, which belongs to no neuron, at the last position
    final_scale: torch.Tensor  # (b) of the final norm at the last position
    logits: torch.Tensor  # (b, vocab) of the model, after its soft cap
    mixer: torch.Tensor | None = None  # (l, b, t, d) contributions, 0 in a layer without; None if no layer has a mixer
    heads: torch.Tensor | None = None  # (l, b, h, entry) what the heads write, summed over positions, if these are lost
    gates: torch.Tensor | None = None  # (l, b, h, entry) what multiplies the values; None if no layer has gates
    # Routing at the last position, E: experts of the layer that has most; None if no layer has experts.
    router_weight: torch.Tensor | None = None  # (l, b, E) that multiplies an expert's output; 0 if it is not chosen
    router_probs: torch.Tensor | None = None  # (l, b, E) 0 for shared experts, NaN in a layer without a router
    chosen: torch.Tensor | None = None  # (l, b, E) whether the expert was chosen; shared experts always are
    expert_scale: torch.Tensor | None = None  # (l, b, E) that multiplies an expert's bias, but for ffn_scale

    def added(self, component: str) -> torch.Tensor:
        """The contributions (l, b, t, d) of a component: attn, ffn or mixer."""
        found = {"attn": self.attn, "ffn": self.ffn, "mixer": self.mixer}[component]
        return self.attn.new_zeros(()).expand_as(self.attn) if found is None else found

    def before(self, layer: int, components: Sequence[str]) -> torch.Tensor:
        """The residual (b, t, d) of a layer after these components have been added to its input."""
        residual = self.resid_pre[layer]
        for component in components:
            residual = residual + self.added(component)[layer]
        return residual

    @property
    def n_bytes(self) -> int:
        """Bytes of memory of the cache."""
        kept = (getattr(self, f.name) for f in fields(self))
        return sum(x.nbytes for x in kept if x is not None)


def bytes_per_token(decomposition: Decomposition) -> int:
    """Largest number of bytes for one token of a prompt: its cache, and the bounds of its attention neurons."""
    n_neurons = decomposition.n_slots
    n_values = decomposition.n_heads * decomposition.head_size
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
            k: [None] * n
            for k in (
                *("resid", "begun", "attn", "mixer", "attn_post", "out"),
                *("weights", "values", "heads", "gates", "read"),
            )
        }
        self.ffns = [FfnActivations(block.ffn, block.ffn_post) for block in decomposition.blocks]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record what the blocks of one forward pass do."""
        blocks = self.decomposition.blocks
        heads = {i: block.heads for i, block in enumerate(blocks) if block.heads is not None}
        layer_of = {one.module: i for i, one in heads.items()}
        rows = range(self.shape[0])

        def watch(module: nn.Module, _query: torch.Tensor, value: torch.Tensor, weights: torch.Tensor) -> None:
            if module in layer_of and self.decomposition.has_positions:
                i = layer_of[module]
                self.recorded["weights"][i] = weights[rows, :, self.last].float()
                self.recorded["values"][i] = value.float()

        def keep(layer: int, gate: torch.Tensor) -> None:
            self.recorded["gates"][layer] = gate[rows, self.last].float()

        with contextlib.ExitStack() as hooks:
            for i, block in enumerate(blocks):
                hooks.enter_context(self._record(block.module, i, read="resid", written="out"))
                if block.begins is not None:
                    hooks.enter_context(self._record(block.begins, i, written="begun"))
                hooks.enter_context(self.ffns[i].running())
                for module, read, written in (
                    (block.attn_out, "heads", "attn"),
                    (block.mixer, None, "mixer"),
                    (None if block.attn_post is None else block.attn_post.module, None, "attn_post"),
                ):
                    if module is not None:
                        hooks.enter_context(self._record(module, i, read=read, written=written))
            if self.decomposition.has_positions:
                for i, one in heads.items():
                    if not one.watched:
                        hooks.enter_context(self._record_own(one, i))
                hooks.enter_context(watched_gates(heads, keep))
            hooks.enter_context(watched_attention(self.decomposition.loaded.model, watch))
            yield

    def _record(self, module: nn.Module, layer: int, read: str | None = None, written: str | None = None) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if is_asked_again():
                return
            if read is not None:
                self.recorded[read][layer] = self._states(states_of(args, kwargs))
            if written is not None:
                self.recorded[written][layer] = self._states(output[0] if isinstance(output, tuple | list) else output)

        return module.register_forward_hook(hook, with_kwargs=True)

    def _record_own(self, one: Attention, layer: int) -> Any:
        """Record the weights that an attention returns, and its input, from which its values are computed."""
        rows = range(self.shape[0])

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.recorded["weights"][layer] = weights_returned(output)[rows, :, self.last].float()
            self.recorded["read"][layer] = self._states(states_of(args, kwargs))

        return one.module.register_forward_hook(hook, with_kwargs=True)

    def _states(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*self.shape, x.shape[-1]).float().clone()  # some blocks add to their states in place

    def cache(self) -> ActivationCache:
        """Assemble the activation cache."""
        import torch

        recorded, decomposition, rows = self.recorded, self.decomposition, range(self.shape[0])
        recorded["resid"] = [a if b is None else b for a, b in zip(recorded["resid"], recorded["begun"], strict=True)]
        blocks = decomposition.blocks
        attn, attn_scale = self._contributions("attn", [b.attn_post for b in blocks])
        mixer = self._contributions("mixer", [None] * len(blocks))[0] if decomposition.with_mixer else None
        ffn, ffn_scale = self._ffn_contributions(attn if mixer is None else attn + mixer)
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
            coefficients=self._coefficients(),
            attn_scale=attn_scale,
            ffn_scale=ffn_scale,
            attn_bias=self._unaccounted("attn", attn_scale, [(b.attn_out, b.attn_post) for b in blocks]),
            ffn_bias=self._ffn_biases(ffn_scale),
            final_scale=decomposition.final_norm.scale(resid_post, normed.float()),
            logits=logits,
            mixer=mixer,
            **self._heads(),
            **(self._routing() if decomposition.n_experts else {}),
        )

    def _coefficients(self) -> torch.Tensor:
        """The coefficients (l, b, t, n) of all slots; 0 in a layer without neurons."""
        import torch

        n = self.decomposition.n_slots
        none = self.recorded["resid"][0].new_zeros(self.shape[0] * self.shape[1], n)
        every = (one.coefficients(n) if one.ffn.sources else none for one in self.ffns)
        return torch.stack([self._by_prompt(m) for m in every])

    def _by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*self.shape, *x.shape[1:])

    @functools.cached_property
    def _last_tokens(self) -> torch.Tensor:
        """Numbers (b) of the prompts' last tokens among all tokens of the batch."""
        import torch

        return torch.arange(self.shape[0], device=self.last.device) * self.shape[1] + self.last

    def _ffn_contributions(self, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Contributions (l, b, t, d) of the FFNs, and the scale (l, b, t) of the norms behind them.

        ``others`` (l, b, t, d) is what attention and mixer add.
        """
        import torch

        added, scales = [], []
        for i, (one, block) in enumerate(zip(self.ffns, self.decomposition.blocks, strict=True)):
            multiplier, resid = block.additions.multipliers.get("ffn"), self.recorded["resid"][i]
            scale, written = torch.ones(resid.shape[:2], device=resid.device).flatten(), torch.zeros_like(resid)
            if multiplier is not None:
                if one.total is None and any(source.is_scaled for source in one.ffn.sources):
                    one.total = ((self.recorded["out"][i] - resid - others[i]) / multiplier).flatten(0, 1)
                read = one.summed()
                written = read if one.normed is None else one.normed
                written = written if multiplier == 1 else written * multiplier
                scale = scale if one.post is None or one.normed is None else one.post.scale(read, one.normed)
            added.append(self._by_prompt(written) if multiplier is not None else written)
            scales.append(self._by_prompt(scale))
        return torch.stack(added), torch.stack(scales)

    def _ffn_biases(self, scales: torch.Tensor) -> torch.Tensor:
        """Contribution (l, b, d) of what belongs to no neuron, at the last position."""
        import torch

        size, biases = self.decomposition.hidden_size, []
        for one, block, scale in zip(self.ffns, self.decomposition.blocks, scales.flatten(1), strict=True):
            bias, norm, at = one.bias(self._last_tokens, size), one.post, scale[self._last_tokens, None]
            added = at * bias if norm is None else at * norm.after(bias) + norm.bias
            biases.append(added * block.additions.multipliers.get("ffn", 0.0))
        return torch.stack(biases)

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

    def _heads(self) -> dict[str, torch.Tensor]:
        """Weights and values of the heads, or what the heads write, by their names in the cache."""
        import torch

        decomposition, rows = self.decomposition, range(self.shape[0])
        if decomposition.is_uniform and len({values.shape for values in self.recorded["values"]}) == 1:
            return {
                "attention": torch.stack(self.recorded["weights"]),
                "values": torch.stack(self.recorded["values"]),
            }
        layers = range(len(decomposition.blocks))
        if not decomposition.has_positions:
            written = [self._by_head(i, None if h is None else h[rows, self.last]) for i, h in self._each("heads")]
            n, size, b = decomposition.n_heads, decomposition.head_size, self.shape[0]
            none = self.last.new_zeros(len(layers), b, n, 0, dtype=torch.float32)
            return {
                "attention": none,
                "values": none[..., None].expand(-1, -1, -1, -1, size),
                "heads": torch.stack(written),
            }
        found = {
            "attention": torch.stack([self._weights(i) for i in layers]),
            "values": torch.stack([self._values(i) for i in layers]),
        }
        if any(gate is not None for gate in self.recorded["gates"]):
            found["gates"] = torch.stack([self._by_head(i, gate, 1.0) for i, gate in self._each("gates")])
            found["values"] = found["values"] * found["gates"][:, :, :, None]
        return found

    def _each(self, name: str) -> Iterator[tuple[int, Any]]:
        return enumerate(self.recorded[name])

    def _by_head(self, layer: int, entries: torch.Tensor | None, otherwise: float = 0.0) -> torch.Tensor:
        """Entries (b, heads · size of the layer) as (b, h, entry); ``otherwise`` where the layer has none."""
        n, size = self.decomposition.n_heads, self.decomposition.head_size
        out: torch.Tensor = self.recorded["resid"][0].new_full((self.shape[0], n, size), otherwise)
        if entries is not None:
            own = entries.unflatten(-1, (self.decomposition.heads_in(layer), -1))
            out[:, : own.shape[1], : own.shape[2]] = own
        return out

    def _weights(self, layer: int) -> torch.Tensor:
        """Weights (b, h, t) of the last query, 0 for heads that the layer lacks."""
        b, t = self.shape
        out: torch.Tensor = self.recorded["resid"][0].new_zeros(b, self.decomposition.n_heads, t)
        if (weights := self.recorded["weights"][layer]) is not None:
            out[:, : weights.shape[1]] = weights
        return out

    def _values(self, layer: int) -> torch.Tensor:
        """Values (b, h, t, entry) of each head, 0 for those that the layer lacks."""
        b, t = self.shape
        n, size = self.decomposition.n_heads, self.decomposition.head_size
        out: torch.Tensor = self.recorded["resid"][0].new_zeros(b, n, t, size)
        heads = self.decomposition.blocks[layer].heads
        if heads is None:
            return out
        if heads.watched:
            values = self.recorded["values"][layer]
            values = values.repeat_interleave(heads.n_heads // values.shape[1], dim=1)
        else:
            keys, bias = self.decomposition.value_rows[layer]
            values = (self.recorded["read"][layer] @ keys.float().T + bias).unflatten(-1, (heads.n_heads, -1))
            values = values.transpose(1, 2)
        out[:, : heads.n_heads, :, : heads.head_size] = values
        return out

    def _contributions(self, name: str, norms: Sequence[Norm | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Contributions (l, b, t, d) of a component, and the scale (l, b, t) of the norm after it."""
        import torch

        added, scales = [], []
        for layer, (block, norm) in enumerate(zip(self.decomposition.blocks, norms, strict=True)):
            written = self.recorded[name][layer]
            scales.append(torch.ones(self.shape, device=self.last.device))
            if not block.has(name):
                added.append(torch.zeros_like(self.recorded["resid"][layer]))
                continue
            if norm is not None:
                after = self.recorded[f"{name}_post"][layer]
                written, scales[-1] = after, norm.scale(written, after)
            multiplier = block.additions.multipliers[name]
            added.append(written if multiplier == 1 else written * multiplier)
        return torch.stack(added), torch.stack(scales)

    def _unaccounted(
        self, name: str, scales: torch.Tensor, parts: Sequence[tuple[nn.Module | None, Norm | None]]
    ) -> torch.Tensor:
        """Contribution (l, b, d) of the biases of projection (scaled by the norm) and norm at the last position."""
        import torch

        rows, size, biases = range(self.shape[0]), self.decomposition.hidden_size, []
        for block, scale, (projection, norm) in zip(self.decomposition.blocks, scales, parts, strict=True):
            bias = getattr(projection, "bias", None)
            vector = torch.zeros(size, device=scale.device) if bias is None else bias.float()
            added = scale[rows, self.last, None] * (norm.after(vector) if norm is not None else vector)
            added = added + norm.bias if norm is not None else added
            biases.append(added * block.additions.multipliers.get(name, 0.0))
        return torch.stack(biases)


# Checks ----------------------------------------------------------------------------------------------------------


def said_of(decomposition: Decomposition) -> list[dict[str, Any]]:
    """Rows of ``checks`` that say what the tables of a model cannot have; none for most models."""
    blocks = decomposition.blocks
    lacking = {
        "head_positions": sum(b.heads is not None and not decomposition.has_positions for b in blocks),
        "ffn_neurons": sum(b.has("ffn") and not b.ffn.sources for b in blocks),
    }
    return [
        {"check": name, "value": float(n), "tolerance": float(len(blocks)), "passed": True, "detail": DETAIL[name]}
        for name, n in lacking.items()
        if n
    ]


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
    rows = [check_row(name, [of[name] for of in errors], loaded, len(token_ids)) for name in errors[0]]
    return [*rows, *said_of(decomposition)]


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
    added = r.attn + r.ffn if r.mixer is None else r.attn + r.ffn + r.mixer
    off = (after - (r.resid_pre + added)).norm(dim=-1) / after.norm(dim=-1)
    last_block = off[-1][rows, r.last].max()
    return _largest(torch.stack([off[:-1][:, real].max() if len(off) > 1 else last_block, last_block]))


def _head_sum(decomposition: Decomposition, r: ActivationCache) -> float:
    import torch

    off, rows = [r.last.new_zeros(1, dtype=torch.float32)], torch.arange(len(r.last), device=r.last.device)
    for layer, block in enumerate(decomposition.blocks):
        if block.heads is None:
            continue
        heads = head_vectors(decomposition, r, layer)
        scale = (heads.norm(dim=-1).sum(1) + r.attn_bias[layer].norm(dim=-1)).clamp_min(1e-30)
        off.append((heads.sum(1) + r.attn_bias[layer] - r.attn[layer, rows, r.last]).norm(dim=-1) / scale)
    return _largest(torch.cat(off))


def _ffn_sum(decomposition: Decomposition, r: ActivationCache) -> float:
    import torch

    off, rows = [r.last.new_zeros(1, dtype=torch.float32)], torch.arange(len(r.last), device=r.last.device)
    for layer, block in enumerate(decomposition.blocks):
        if not block.ffn.sources:
            continue
        columns = decomposition.ffn_columns(layer)
        m = r.coefficients[layer, rows, r.last] * r.ffn_scale[layer, rows, r.last, None]
        scale = (m.abs() @ columns.norm(dim=-1) + r.ffn_bias[layer].norm(dim=-1)).clamp_min(1e-30)
        off.append((m @ columns + r.ffn_bias[layer] - r.ffn[layer, rows, r.last]).norm(dim=-1) / scale)
    return _largest(torch.cat(off))


def _value_keys(decomposition: Decomposition, r: ActivationCache) -> float:
    """Check that a value entry is its key's product with the residual, up to the norm's scale and a bias.

    The scale of the input norm is not cached, so it is fitted: one factor per position and one bias per entry must
    explain all values. Differences between positions remove the bias.
    """
    import torch

    off = [r.last.new_zeros(1, dtype=torch.float32)]
    for layer, block in enumerate(decomposition.blocks):
        if block.heads is None or not decomposition.has_positions:
            continue
        values, source = r.values[layer], block.heads.values_of
        groups = decomposition.n_heads // values.shape[1]
        entries = values.repeat_interleave(groups, dim=1).transpose(1, 2)  # b, t, h, entry
        keys = decomposition.value_keys(layer)
        if r.gates is not None:
            entries = entries / r.gates[layer][:, None].where(r.gates[layer][:, None] != 0, 1.0)
        norm, arguments = decomposition.blocks[source].attn_norm, (decomposition, r, r.resid_pre[source])
        this = _off_its_keys(*arguments, norm, keys, entries.flatten(2))
        if inner_norms(block.heads.module):
            # A norm on the way to the values has a scale of its own.
            this = torch.minimum(this, _off_scaled_keys(*arguments, keys, entries))
        off.append(this)
    return _largest(torch.cat(off))


def _off_scaled_keys(
    decomposition: Decomposition, r: ActivationCache, resid: torch.Tensor, keys: torch.Tensor, entries: torch.Tensor
) -> torch.Tensor:
    """Distance of entries (b, t, h, e) from keys · residual (b, t, d), each head times a scale that is fitted."""
    import torch

    real = torch.arange(resid.shape[1], device=resid.device) <= r.last[:, None]
    written = entries[real]
    along = (resid[real] @ keys.T).unflatten(-1, written.shape[1:])
    scale = (written * along).sum(-1) / along.square().sum(-1).clamp_min(1e-30)
    rest = written - along * scale[..., None]
    off: torch.Tensor = rest.flatten(1).norm(dim=-1) / written.flatten(1).norm(dim=-1).clamp_min(1e-30)
    return off


def _ffn_keys(decomposition: Decomposition, r: ActivationCache) -> float:
    """Check the same of the outputs of the projections that activate the neurons; of experts, of the chosen ones."""
    import torch

    off, dtype = [torch.zeros(1, device=r.last.device)], getattr(torch, decomposition.loaded.dtype)
    for layer, block in enumerate(decomposition.blocks):
        resid, keys = r.before(layer, block.middle), decomposition.ffn_keys(layer)
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

    mixed = head_coefficients(r, layer).sum(2) if r.heads is None else r.heads[layer]  # (b, h, entry)
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
