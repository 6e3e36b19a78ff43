"""Score the layers, heads and neurons that raise a token's probability, and the earlier neurons that activate them.

Yu and Ananiadou, Neuron-Level Knowledge Attribution in Large Language Models (arXiv 2312.12141): everything is read
at the last position, with the final norm's scale frozen, and a vector's score is the log-probability increase
(section 3.3) that :mod:`kdb.ingest.attribution.bounds` computes. Shapes: layer l, prompt b, position t, head h, entry e
of a head, neuron n, hidden d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kdb.ingest.attribution.bounds import Best, Distributions, certified_top, distributions
from kdb.ingest.forward.activation_cache import ActivationCache, expert_vectors, head_coefficients, head_vectors
from kdb.ingest.forward.additions import COMPONENTS
from kdb.ingest.forward.decomposition import Decomposition
from kdb.ingest.forward.memory import room

if TYPE_CHECKING:
    import torch

BASES_BYTES = 320 * 2**20
"""Bytes of memory for the token probabilities of one batch, at all of its residuals."""

WIDEST = 0.01
"""Widest interval, in nats, that is stored for a neuron; if it is wider, the exact score is computed."""


def prompts_at_once(decomposition: Decomposition) -> int:
    """Number of prompts to attribute together: as many as have room in memory for their token probabilities."""
    memory = room(decomposition.loaded.device, BASES_BYTES)
    return max(
        1,
        memory
        // ((2 * len(decomposition.blocks) + len(decomposition.with_mixer)) * decomposition.readout.table.shape[0] * 4),
    )


@dataclass(frozen=True)
class Neurons:
    """The best neurons of one component for each prompt (b, k), best first; layer is −1 if a prompt has fewer.

    ``head`` and ``position`` are None for FFN neurons, which act at the last position. ``most`` (b, n) is the largest
    score, summed over positions, that each neuron of the component may have: by layer, then head, then neuron.
    """

    layer: torch.Tensor
    head: torch.Tensor | None
    neuron: torch.Tensor
    position: torch.Tensor | None
    coefficient: torch.Tensor
    score: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    exact: torch.Tensor
    n_scored: torch.Tensor
    most: torch.Tensor

    def first(self, k: int) -> Neurons:
        """The ``k`` best of each prompt."""
        whole = ("n_scored", "most")
        names = [f.name for f in fields(self) if f.name not in whole and getattr(self, f.name) is not None]
        changed: dict[str, Any] = {name: getattr(self, name)[:, :k] for name in names}
        return replace(self, **changed)


@dataclass(frozen=True)
class QueryScores:
    """Scores, in nats, of the sources that activate a prompt's value neurons.

    Sources are FFN neurons, ``neurons`` (b, l, n), and whole outputs: ``embed`` (b), ``attn``, ``ffn`` and ``mixer``
    (b, l), which is None if no layer has a mixer. In a model with experts, ``neurons`` is −inf where no neuron fires.
    ``total_share`` (b) is the least part of the whole outputs' products with a key that is left when they are added:
    near 0, scores are shares of a total that cancels, so that single ones may be larger than the value neurons' score.
    """

    neurons: torch.Tensor
    embed: torch.Tensor
    attn: torch.Tensor
    ffn: torch.Tensor
    mixer: torch.Tensor | None
    total_share: torch.Tensor


def _neurons(
    best: Best,
    layer: torch.Tensor,
    head: torch.Tensor | None,
    neuron: torch.Tensor,
    position: torch.Tensor | None,
    coefficient: torch.Tensor,
    most: torch.Tensor,
) -> Neurons:
    """Build neurons whose scores were computed over the whole vocabulary, so that rounding is their only error."""
    lower, upper = best.score - best.slack, best.score + best.slack
    exact, n_scored = best.index >= 0, best.n_scored
    return Neurons(layer, head, neuron, position, coefficient, best.score, lower, upper, exact, n_scored, most)


class Attribution:
    """The attribution scores of a batch of prompts. Each is computed when it is first used."""

    def __init__(
        self,
        decomposition: Decomposition,
        cache: ActivationCache,
        target: torch.Tensor,
        layers: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """``target`` (b): the token whose probability is explained, for each prompt.

        ``layers`` are those of 'attn' and 'ffn' whose neurons are scored, if only :meth:`ffn_nearly` and
        :meth:`attn_nearly` are used.
        """
        self.decomposition = decomposition
        self.cache = cache
        self.target = target
        self.n_layers = len(decomposition.blocks)
        self.n_prompts = len(target)
        every = {"attn": range(self.n_layers), "ffn": range(self.n_layers), "mixer": decomposition.with_mixer}
        self._layers: Mapping[str, Sequence[int]] = every if layers is None else {**layers, "mixer": ()}

    @cached_property
    def _rows(self) -> torch.Tensor:
        import torch

        return torch.arange(self.n_prompts, device=self.target.device)

    @cached_property
    def _before_ffn(self) -> torch.Tensor:
        """The residual (l, b, d) that each FFN is added to, at the last position."""
        return self._before("ffn", range(self.n_layers))

    def _before(self, component: str, layers: Sequence[int]) -> torch.Tensor:
        """The residual (layer, b, d) that a component of these layers is added to, at the last position."""
        import torch

        cache, found = self.cache, []
        for layer in layers:
            residual = cache.resid_pre[layer, self._rows, cache.last]
            for other in self.decomposition.blocks[layer].before(component):
                residual = residual + cache.added(other)[layer, self._rows, cache.last]
            found.append(residual)
        return torch.stack(found)

    @cached_property
    def at(self) -> Distributions:
        """Token probabilities at every residual: before attention (l · b), FFNs (l · b) and the mixers that exist."""
        import torch

        cache, readout = self.cache, self.decomposition.readout
        points = torch.cat([self._before(c, self._layers[c]) for c in COMPONENTS if self._layers[c]])
        n = len(points)
        return distributions(
            readout.table,
            readout.constant,
            points.flatten(0, 1),
            cache.final_scale.repeat(n),
            self.target.repeat(n),
            self._rows.repeat(n),
            self._cap,
        )

    @cached_property
    def _cap(self) -> torch.Tensor | None:
        """A soft cap's slope at the real logits (b, vocab): frozen like the norm, so that the readout is linear."""
        import torch

        cache, readout = self.cache, self.decomposition.readout
        if readout.softcap is None:
            return None
        logits = (cache.resid_post * cache.final_scale[:, None]) @ readout.table.T + readout.constant
        slope = readout.softcap * (logits / readout.softcap).tanh() / logits
        return torch.where(logits == 0, 1.0, slope)

    def _base(self, component: str, layer: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Rows of :attr:`at` for the residuals that a component of this layer is added to."""
        import torch

        first = sum(len(self._layers[c]) for c in COMPONENTS[: COMPONENTS.index(component)])
        place = torch.full((self.n_layers,), -1, device=layer.device)
        place[list(self._layers[component])] = torch.arange(len(self._layers[component]), device=layer.device)
        return (first + place[layer]) * self.n_prompts + prompt

    # Layers and heads

    @cached_property
    def layer_scores(self) -> dict[str, torch.Tensor]:
        """Log-probability increase of each layer's output, (b, l) by component; 0 where a layer lacks it."""
        import torch

        cache, n = self.cache, self.n_layers * self.n_prompts
        added = torch.cat([x[:, self._rows, cache.last].flatten(0, 1) for x in (cache.attn, cache.ffn)])
        every = torch.arange(2 * n, device=added.device)
        scores = self.at.scores(every, added, every, torch.ones(2 * n, device=added.device))
        attn, ffn = scores.view(2, self.n_layers, self.n_prompts).transpose(1, 2)
        return {"attn": attn, "ffn": ffn} | ({} if cache.mixer is None else {"mixer": self._mixer_scores(cache.mixer)})

    def _mixer_scores(self, mixer: torch.Tensor) -> torch.Tensor:
        """Log-probability increase (b, l) of each mixer's output, given for all positions (l, b, t, d)."""
        import torch

        layers = list(self._layers["mixer"])
        added = mixer[layers][:, self._rows, self.cache.last].flatten(0, 1)
        every = torch.arange(len(added), device=added.device)
        base = 2 * self.n_layers * self.n_prompts + every
        scores = self.at.scores(base, added, every, torch.ones_like(added[:, 0]))
        out = scores.new_zeros(self.n_prompts, self.n_layers)
        out[:, layers] = scores.view(len(layers), self.n_prompts).T
        return out

    @cached_property
    def unexplained(self) -> torch.Tensor | None:
        """The part of log p(w) that layer scores do not explain, (b): 0 but for rounding.

        It is log p(w) − their sum − log p(w|embedding).

        None where it need not be: in half precision, with parallel blocks, which read one residual, and with a soft
        cap, whose slope is frozen.
        """
        exact = self.decomposition.loaded.dtype == "float32" and self._cap is None
        if not exact or any(block.parallel for block in self.decomposition.blocks):
            return None
        whole = self.cache.logits.double().log_softmax(1).gather(1, self.target[:, None])[:, 0]
        scores = sum(score.sum(1) for score in self.layer_scores.values())
        left: torch.Tensor = whole - scores - self.at.log_p[: self.n_prompts].double()
        return left

    @cached_property
    def head_scores(self) -> torch.Tensor:
        """Log-probability increase of each head, summed over positions: (b, l, h); −inf for heads that do not exist."""
        import torch

        vectors = torch.stack([head_vectors(self.decomposition, self.cache, i) for i in range(self.n_layers)])
        n_heads = vectors.shape[2]
        base = torch.arange(self.n_layers * self.n_prompts, device=vectors.device).repeat_interleave(n_heads)
        flat = vectors.flatten(0, 2)
        every = torch.arange(len(flat), device=flat.device)
        scores = self.at.scores(base, flat, every, torch.ones(len(flat), device=flat.device))
        by_head = scores.view(self.n_layers, self.n_prompts, n_heads).transpose(0, 1)
        return by_head if self.lacking is None else by_head.masked_fill(self.lacking.all(2), -torch.inf)

    @cached_property
    def lacking(self) -> torch.Tensor | None:
        """Which entries (l, h, e) no head of the layer has; None if all layers have the same heads."""
        import torch

        decomposition = self.decomposition
        if all(
            (decomposition.heads_in(i), decomposition.head_size_in(i))
            == (decomposition.n_heads, decomposition.head_size)
            for i in range(self.n_layers)
        ):
            return None
        shape = (self.n_layers, decomposition.n_heads, decomposition.head_size)
        out = torch.ones(shape, dtype=torch.bool, device=self.target.device)
        for layer in range(self.n_layers):
            out[layer, : decomposition.heads_in(layer), : decomposition.head_size_in(layer)] = False
        return out

    def head_positions(self, n_best: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores of the best heads' positions: layer and head (b, n), attention and score (b, n, t); 0 at padding."""
        import torch

        cache, n_heads = self.cache, self.head_scores.shape[2]
        existing = sum(self.decomposition.heads_in(i) for i in range(self.n_layers))
        best = self.head_scores.flatten(1).topk(min(n_best, existing), dim=1).indices
        layer, head = best // n_heads, best % n_heads
        prompt = self._rows[:, None].expand_as(layer)
        weights = cache.attention[layer, prompt, head]
        groups = n_heads // cache.values.shape[2]
        coefficients = weights[..., None] * cache.values[layer, prompt, head // groups]
        vectors = torch.empty(*weights.shape, cache.resid_post.shape[1], device=weights.device)
        for i in layer.unique().tolist():
            columns = self.decomposition.attn_columns(i).view(n_heads, coefficients.shape[-1], -1)
            here = layer == i
            vectors[here] = coefficients[here] @ columns[head[here]]
        vectors *= cache.attn_scale[layer, prompt, cache.last[:, None]][..., None, None]
        real = (torch.arange(weights.shape[2], device=weights.device) <= cache.last[:, None])[:, None].expand_as(
            weights
        )
        base = self._base("attn", layer, prompt)[..., None].expand_as(weights)[real]
        every = torch.arange(len(base), device=base.device)
        score = torch.zeros(weights.shape, dtype=torch.float64, device=weights.device)
        score[real] = self.at.scores(base, vectors[real], every, torch.ones(len(base), device=base.device))
        return layer, head, weights, score

    @cached_property
    def expert_scores(self) -> torch.Tensor | None:
        """Log-probability increase of each expert's whole output: (b, l, E); NaN where it was not chosen.

        None if the model has no experts.
        """
        import torch

        cache = self.cache
        if cache.chosen is None:
            return None
        out = torch.full(cache.chosen.shape, torch.nan, dtype=torch.float64, device=cache.chosen.device)
        first = self.n_layers * self.n_prompts
        for layer, chosen in enumerate(cache.chosen):
            prompt, expert = chosen.nonzero(as_tuple=True)
            if len(prompt):
                vectors = expert_vectors(self.decomposition, cache, layer)[prompt, expert]
                every = torch.arange(len(prompt), device=prompt.device)
                base = first + layer * self.n_prompts + prompt
                out[layer, prompt, expert] = self.at.scores(base, vectors, every, torch.ones_like(vectors[:, 0]))
        return out.transpose(0, 1)

    # Value neurons

    @cached_property
    def fires(self) -> torch.Tensor | None:
        """Which FFN slots (b, l, n) have a neuron, and one of a chosen expert; None if all have."""
        import torch

        layouts = [self.decomposition.ffn_layout(i) for i in range(self.n_layers)]
        n, device = self.decomposition.n_slots, self.target.device
        if all(layout.size == n and not layout.starts for layout in layouts):
            return None
        slots, out = torch.arange(n), torch.zeros(self.n_prompts, self.n_layers, n, dtype=torch.bool, device=device)
        for layer, layout in enumerate(layouts):
            out[:, layer, : layout.size] = True
            if layout.starts:
                assert self.cache.chosen is not None
                expert = torch.from_numpy(layout.experts(slots[: layout.size].numpy())).to(device)
                out[:, layer, : layout.size] = self.cache.chosen[layer][:, expert]
        return out

    @cached_property
    def exists(self) -> torch.Tensor:
        """Which FFN slots (l · n) have a neuron."""
        import torch

        sizes = torch.tensor([self.decomposition.ffn_layout(i).size for i in range(self.n_layers)])
        every: torch.Tensor = torch.arange(self.decomposition.n_slots) < sizes[:, None]
        return every.flatten().to(self.target.device)

    @cached_property
    def ffn_coefficients(self) -> torch.Tensor:
        """Coefficients (b, l, n) at the last position."""
        cache = self.cache
        return cache.coefficients[:, self._rows, cache.last].transpose(0, 1)

    @cached_property
    def _ffn_factor(self) -> torch.Tensor:
        """Factors (b, l, n) of the FFN columns: the coefficient times the scale of a norm after the FFN."""
        cache = self.cache
        return self.ffn_coefficients * cache.ffn_scale[:, self._rows, cache.last].T[..., None]

    @cached_property
    def ffn_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Upper bound of every FFN neuron's score, and its possible rounding error: (b, l · n)."""
        return self.bounds_against(self.at, first=self.n_layers * self.n_prompts)

    def bounds_against(self, at: Distributions, first: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Upper bound and slack (b, l · n) of every FFN neuron's score at other residuals; −inf where none fires.

        ``at`` has one row per prompt or, from ``first`` on, one row per layer and prompt.
        """
        import torch

        upper, slack = [], []
        for layer in range(self.n_layers):
            start = 0 if first is None else first + layer * self.n_prompts
            rows = slice(start, start + self.n_prompts)
            columns, factor = self.decomposition.ffn_columns(layer), self._ffn_factor[:, layer]
            upper.append(factor * (at.slope[rows] @ columns.T))
            slack.append(factor.abs() * columns.norm(dim=1) * at.reach[rows, None])
        bound = torch.cat(upper, dim=1).double()
        if self.fires is not None:
            bound.masked_fill_(~self.fires.flatten(1), -torch.inf)
        return bound, torch.cat(slack, dim=1).double()

    def ffn_columns(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct columns (u, d) of FFN neurons given by index into (l · n), and each neuron's column (m)."""
        return self._columns(flat, self._ffn_factor.shape[2], "ffn")

    def ffn_vectors(self, prompt: torch.Tensor, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the vectors and factors of FFN neurons, given by prompt and by index into (l · n)."""
        n = self._ffn_factor.shape[2]
        return *self.ffn_columns(flat), self._ffn_factor[prompt, flat // n, flat % n]

    def ffn_exact(self, prompt: torch.Tensor, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact scores (m) of FFN neurons given by prompt and index into (l · n), and their rounding."""
        layer = flat // self._ffn_factor.shape[2]
        return self.at.scores_and_slack(self._base("ffn", layer, prompt), *self.ffn_vectors(prompt, flat))

    def ffn_nearly(self, neurons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (b, m) of FFN neurons, given by index into (l · n), in every prompt, and how far each may be off."""
        prompt = self._rows.repeat_interleave(len(neurons))
        flat = neurons.repeat(self.n_prompts)
        layer = flat // self._ffn_factor.shape[2]
        scores = self.at.nearly(self._base("ffn", layer, prompt), *self.ffn_vectors(prompt, flat))
        score, error = (x.view(self.n_prompts, -1) for x in scores)
        return score, error

    def ffn_top(self, k: int) -> Neurons:
        """The k best FFN neurons of each prompt, proved complete."""
        import torch

        n = self._ffn_factor.shape[2]
        best = certified_top(*self.ffn_bounds, k, self.ffn_exact)
        layer, neuron, exists = best.index // n, best.index % n, best.index >= 0
        coefficient, most = self.ffn_coefficients.flatten(1).gather(1, best.index.clamp_min(0)), best.most
        if self.fires is not None:  # a neuron of an expert that was not chosen writes 0
            most = most.masked_fill(~self.fires.flatten(1), 0.0).masked_fill(~self.exists, -torch.inf)
        return _neurons(best, layer.masked_fill(~exists, -1), None, neuron, None, coefficient, most)

    def _columns(self, key: torch.Tensor, per_layer: int, component: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct columns (u, d) for ``key`` = layer · per_layer + column, and the index of each key's column."""
        import torch

        distinct, which = key.unique(return_inverse=True)
        layers = distinct // per_layer
        columns = self.decomposition.ffn_columns if component == "ffn" else self.decomposition.attn_columns
        parts = [columns(i)[distinct[layers == i] % per_layer] for i in layers.unique().tolist()]
        return torch.cat(parts), which

    @cached_property
    def _attn_coefficients(self) -> torch.Tensor:
        """Coefficients (b, l, h, t, e): attention weight × value entry."""
        import torch

        return torch.stack([head_coefficients(self.cache, i) for i in range(self.n_layers)], dim=1)

    @cached_property
    def attn_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Upper bound of every attention neuron's score, and its slack: (b, l · h · t · e); −inf at padding."""
        import torch

        cache, upper, slack = self.cache, [], []
        slope = self.at.slope[: self.n_layers * self.n_prompts].view(self.n_layers, self.n_prompts, -1)
        reach = self.at.reach[: self.n_layers * self.n_prompts].view(self.n_layers, self.n_prompts)
        n_tokens = cache.attention.shape[-1]
        real = torch.arange(n_tokens, device=cache.last.device) <= cache.last[:, None]
        for layer in range(self.n_layers):
            factor = (
                self._attn_coefficients[:, layer] * cache.attn_scale[layer, self._rows, cache.last, None, None, None]
            )
            b, h, _t, e = factor.shape
            columns = self.decomposition.attn_columns(layer)
            gain = (slope[layer] @ columns.T).view(b, h, 1, e)
            length = columns.norm(dim=1).view(1, h, 1, e) * reach[layer].view(b, 1, 1, 1)
            exists = real[:, None, :, None]
            if self.lacking is not None:
                exists = exists & ~self.lacking[layer][None, :, None]
            upper.append(torch.where(exists, factor * gain, -torch.inf).flatten(1))
            slack.append((factor.abs() * length).flatten(1))
        return torch.cat(upper, dim=1).double(), torch.cat(slack, dim=1).double()

    def attn_exact(self, prompt: torch.Tensor, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact scores (m) of attention neurons given by prompt and index into (l · h · t · e), and their rounding."""
        return self.at.scores_and_slack(*self._attn_parts(prompt, flat))

    def _attn_parts(
        self, prompt: torch.Tensor, flat: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The residuals, columns and factors of attention neurons, given as in :meth:`attn_exact`."""
        _b, _l, h, t, e = self._attn_coefficients.shape
        layer, head, position, entry = flat // (h * t * e), flat // (t * e) % h, flat // e % t, flat % e
        vectors, which = self._columns(layer * h * e + head * e + entry, h * e, "attn")
        scale = self.cache.attn_scale[layer, prompt, self.cache.last[prompt]]
        factor = self._attn_coefficients[prompt, layer, head, position, entry] * scale
        return self._base("attn", layer, prompt), vectors, which, factor

    def attn_nearly(self, neurons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (b, m) of attention neurons, summed over positions, and how far each may be off.

        ``neurons`` (m) are indices into (l · h · e).
        """
        import torch

        _b, _l, _h, t, e = self._attn_coefficients.shape
        flat = (neurons // e * t * e + neurons % e)[:, None] + torch.arange(t, device=neurons.device) * e
        real = torch.arange(t, device=neurons.device) <= self.cache.last[:, None]
        real = real[:, None].expand(-1, len(neurons), -1)
        prompt = self._rows[:, None, None].expand_as(real)[real]
        arguments = self._attn_parts(prompt, flat.expand_as(real)[real])
        out = torch.zeros(2, *real.shape, dtype=torch.float64, device=neurons.device)
        out[:, real] = torch.stack(self.at.nearly(*arguments))
        score, error = out.sum(3)
        return score, error

    def attn_top(self, k: int) -> Neurons:
        """The k best attention neurons of each prompt, proved complete."""
        import torch

        b, _l, h, t, e = self._attn_coefficients.shape
        best = certified_top(*self.attn_bounds, k, self.attn_exact)
        # Padding has no score, and the bound −∞.
        most = best.most.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=0.0).view(b, -1, t, e).sum(2).flatten(1)
        if self.lacking is not None:
            most = most.masked_fill(self.lacking.flatten(), -torch.inf)
        flat, exists = best.index.clamp_min(0), best.index >= 0
        coefficient = self._attn_coefficients.flatten(1).gather(1, flat)
        layer = (flat // (h * t * e)).masked_fill(~exists, -1)
        return _neurons(best, layer, flat // (t * e) % h, flat % e, flat // e % t, coefficient, most)

    def ffn_every(self, top: Neurons) -> Neurons:
        """Every FFN neuron of each prompt, best first: ``top`` with exact scores, others with intervals."""
        n = self._ffn_factor.shape[2]
        known = (top.layer * n + top.neuron).masked_fill(top.layer < 0, -1)
        best, bounds = self._every("ffn", self._ffn_factor, self.ffn_bounds, top, known, self.ffn_exact)
        coefficient, layer = self.ffn_coefficients.flatten(1).gather(1, best), best // n
        if self.fires is not None:
            layer = layer.masked_fill(~self.fires.flatten(1).gather(1, best), -1)
        return Neurons(layer, None, best % n, None, coefficient, *bounds, top.n_scored, top.most)

    def attn_every(self, top: Neurons) -> Neurons:
        """Every attention neuron of each prompt, best first: ``top`` with exact scores, others with intervals."""
        cache = self.cache
        _b, _l, h, t, e = self._attn_coefficients.shape
        assert top.head is not None and top.position is not None
        known = ((top.layer * h + top.head) * t + top.position) * e + top.neuron
        scale = cache.attn_scale[:, self._rows, cache.last].T[:, :, None, None, None]
        factor = (self._attn_coefficients * scale).flatten(2)
        known = known.masked_fill(top.layer < 0, -1)
        best, bounds = self._every("attn", factor, self.attn_bounds, top, known, self.attn_exact)
        coefficient = self._attn_coefficients.flatten(1).gather(1, best)
        padding = best // e % t > cache.last[:, None]
        if self.lacking is not None:
            padding = padding | self.lacking[best // (h * t * e), best // (t * e) % h, best % e]
        layer = (best // (h * t * e)).masked_fill(padding, -1)
        head, position = best // (t * e) % h, best // e % t
        return Neurons(layer, head, best % e, position, coefficient, *bounds, top.n_scored, top.most)

    def _every(
        self,
        component: str,
        factor: torch.Tensor,
        bounds: tuple[torch.Tensor, torch.Tensor],
        top: Neurons,
        known: torch.Tensor,
        score_exactly: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Indices (b, m) of all neurons by falling score, and their score, lower, upper and exact.

        ``factor`` (b, l, n) multiplies the columns; ``known`` (b, k) are the indices of ``top``, −1 for none.
        """
        import torch

        intervals = []
        for layer in range(self.n_layers):
            columns = (
                self.decomposition.ffn_columns(layer) if component == "ffn" else self.decomposition.attn_columns(layer)
            )
            every = torch.arange(factor.shape[2], device=factor.device)
            if component == "attn":
                t, e = self._attn_coefficients.shape[3:]
                every = every // (t * e) * e + every % e
            base = self._base(component, torch.full_like(self._rows, layer), self._rows)
            base = base[:, None].expand(-1, factor.shape[2]).flatten()
            intervals.append(
                torch.stack(
                    self.at.intervals(base, columns, every.repeat(self.n_prompts), factor[:, layer].flatten())
                ).view(2, self.n_prompts, -1)
            )
        lower, upper = torch.cat(intervals, dim=2)
        upper = torch.minimum(upper, bounds[0] + bounds[1])
        score, exact = (lower + upper) / 2, torch.zeros_like(lower, dtype=torch.bool)
        row, index = (known >= 0).nonzero(as_tuple=True)
        where = (row, known[row, index])
        score[where], lower[where], upper[where] = (x[row, index] for x in (top.score, top.lower, top.upper))
        exact[where] = True
        wide = ~(upper - lower <= WIDEST) & ~exact & (bounds[0] > -torch.inf)
        wide = wide.nonzero(as_tuple=True)  # or NaN, after an overflow of e⁷⁰⁰
        if len(wide[0]):
            (score[wide], error), exact[wide] = score_exactly(*wide), True
            lower[wide], upper[wide] = score[wide] - error, score[wide] + error
        # Those that do not exist come last, so that ranks have no gaps.
        order = score.where(bounds[0] > -torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)
        return order, (score.gather(1, order), lower.gather(1, order), upper.gather(1, order), exact.gather(1, order))

    # Query side

    def attn_queries(self, values: Neurons) -> QueryScores:
        """Score the sources that activate attention value neurons: earlier layers, at the positions that they read."""
        cache = self.cache
        prompt = self._rows[:, None].expand_as(values.layer)
        assert values.head is not None and values.position is not None
        width = self._attn_coefficients.shape[-1]
        keys = self._keys(values.layer, values.head * width + values.neuron, self.decomposition.value_keys)
        layer = values.layer.clamp_min(0)
        read = self._values_of[layer]  # the layer whose input the values are computed from
        total = (keys * cache.resid_pre[read, prompt, values.position]).sum(-1)
        return self._queries(replace(values, layer=read.where(values.layer >= 0, -1)), keys, total, values.position)

    @cached_property
    def _values_of(self) -> torch.Tensor:
        import torch

        heads = [block.heads for block in self.decomposition.blocks]
        own = [i if one is None else one.values_of for i, one in enumerate(heads)]
        return torch.tensor(own, device=self.target.device)

    def ffn_queries(self, values: Neurons) -> QueryScores:
        """Score the sources that activate FFN value neurons: earlier layers, and the same block's attention."""
        prompt = self._rows[:, None].expand_as(values.layer)
        keys = self._keys(values.layer, values.neuron, self.decomposition.ffn_keys)
        total = (keys * self._before_ffn[values.layer.clamp_min(0), prompt]).sum(-1)
        last = self.cache.last[:, None].expand_as(values.layer)
        return self._queries(values, keys, total, last, own="ffn")

    def _keys(self, layer: torch.Tensor, row: torch.Tensor, keys: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The key (b, j, d) of each value neuron; zeros where there is no neuron."""
        import torch

        out = torch.zeros(*layer.shape, self.decomposition.hidden_size, device=layer.device)
        for i in layer[layer >= 0].unique().tolist():
            out[layer == i] = keys(i)[row[layer == i]]
        return out

    def _queries(
        self, values: Neurons, keys: torch.Tensor, total: torch.Tensor, position: torch.Tensor, own: str = "attn"
    ) -> QueryScores:
        """Compute Σ over value neurons of score × (source · key) ÷ total, for every source (section 3.4).

        ``keys`` (b, j, d), ``total`` and ``position`` (b, j). ``own`` is the component of the value neurons: they read
        a residual that contains the outputs of their own block which are added before it.
        """
        import torch

        cache = self.cache
        prompt = self._rows[:, None].expand_as(values.layer)
        share = torch.where(values.layer >= 0, values.score / total.double(), 0.0)
        embed = (keys * cache.resid_pre[0, prompt, position]).sum(-1)
        size = embed.abs()
        components = ("attn", "ffn") if cache.mixer is None else COMPONENTS
        neurons: list[torch.Tensor] = []
        layers = dict[str, list["torch.Tensor"]]((c, []) for c in components)
        for i, block in enumerate(self.decomposition.blocks):
            earlier = share * (values.layer > i)
            for component, scores in layers.items():
                seen = share * (values.layer >= i) if component in block.before(own) else earlier
                product = (keys * cache.added(component)[i, prompt, position]).sum(-1)
                size = size + product.abs() * (seen != 0)
                scores.append((seen * product).sum(1))
            columns = self.decomposition.ffn_columns(i)
            used = earlier.any(0).nonzero()[:, 0]
            if not len(used):
                nothing = 0.0 if self.fires is None else -torch.inf
                neurons.append(torch.full((self.n_prompts, len(columns)), nothing, device=share.device))
                continue
            fired = cache.coefficients[i, prompt[:, used], position[:, used]]
            weight = earlier[:, used] * cache.ffn_scale[i, prompt[:, used], position[:, used]]
            of_slots = torch.einsum("bj,bjn->bn", weight.float(), fired * (keys[:, used] @ columns.T))
            if self.fires is not None:  # the neurons of experts that were not chosen, and slots without a neuron
                of_slots = of_slots.masked_fill((fired == 0).all(1), -torch.inf)
            neurons.append(of_slots)
        left = torch.where(values.layer >= 0, total.abs() / size, 1.0).clamp(max=1).amin(1)
        by_layer = {component: torch.stack(parts, dim=1) for component, parts in layers.items()}
        total_of = torch.stack(neurons, dim=1), (share * embed).sum(1)
        return QueryScores(*total_of, by_layer["attn"], by_layer["ffn"], by_layer.get("mixer"), left)

    @cached_property
    def layer_components(self) -> tuple[str, ...]:
        """The components of which any layer adds something."""
        blocks = self.decomposition.blocks
        return tuple(c for c in COMPONENTS if any(block.has(c) for block in blocks))
