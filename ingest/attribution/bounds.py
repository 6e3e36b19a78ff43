"""Find the best of many vectors with proof: bound the scores of all, compute the scores of few.

The score of a vector v that joins a residual x is the log-probability increase of the target w,

    score(v) = log p(w|x+v) − log p(w|x) = v·g_w − log E_p[exp(v·g)],    p = softmax of x's logits,

where g_u is the row of token u in the frozen, linear readout. By Jensen's inequality
score(v) ≤ v·(g_w − E_p[g]) = upper(v): one matrix–vector product bounds every neuron of a layer, where a score
costs the whole vocabulary. Scoring in falling order of the bound until the next bound is below the k-th best
score proves that the k best are complete. See docs/certificate.md.

This module takes arrays and is independent of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ROUNDING = 5 * 2.0**-24
"""Five standard deviations of a float32 rounding: the error of a sum of n products a·b is at most this times
√n · ‖a‖‖b‖ (Higham and Mary 2019, A new approach to probabilistic rounding error analysis, theorem 2.4)."""

_EXPLICIT = 256
"""Number of most probable tokens that an interval sums over one by one."""

_TILE = 2048
"""Tokens scored at once: few enough that a block's products stay in the cache."""
_BLOCK = 512
"""Vectors scored at once."""
_NARROW = 1e-4
"""Widest interval, in nats, that takes the place of a score in a sum."""
_FAR = 16
"""Residuals or vectors whose logits over the whole vocabulary are in memory at once: 16 MiB for 256k tokens."""


@dataclass(frozen=True)
class Distributions:
    """Token probabilities of a set of residuals, with all that computing scores at these residuals needs.

    Shapes: residual b, token u, hidden d. ``table`` (u, d) holds g before the frozen scale; ``scale`` (b) is that
    scale; ``cap`` (prompt, u) is the frozen slope of a soft cap, or None; ``prompt`` (b) is the row of ``cap`` for each
    residual. ``p`` (b, u) are probabilities without error: scores and bounds hold for exactly this p.
    """

    table: torch.Tensor
    scale: torch.Tensor
    target: torch.Tensor
    p: torch.Tensor
    log_p: torch.Tensor
    cap: torch.Tensor | None
    prompt: torch.Tensor

    @cached_property
    def slope(self) -> torch.Tensor:
        """Scale · (g_w − E_p[g]), (b, d): a vector's product with it bounds its score."""
        import torch

        n, size = self.p.shape[0], self.table.shape[1]
        mean = torch.zeros(n, size, dtype=torch.float64, device=self.p.device)
        for tile in self._tiles(4 * _TILE):
            mean += (self._weighted(tile) @ self.table[tile]).double()
        own = self.table[self.target] * self._cap_of_target()[:, None]
        return ((own.double() - mean) * self.scale[:, None].double()).float()

    @cached_property
    def reach(self) -> torch.Tensor:
        """Factor (b): times a vector's length, it bounds the rounding error of the vector's upper bound."""
        per_length: torch.Tensor = self._rounding * (self._lengths[self.target] + self._mean_length)
        return per_length

    @property
    def _rounding(self) -> torch.Tensor:
        """Factor (b): times the lengths of a vector and of a row, it bounds the error of their product in a mean."""
        return _ROUNDING * (math.sqrt(self.table.shape[1]) + math.sqrt(4 * _TILE)) * self.scale.abs()

    def scores(
        self, base: torch.Tensor, vectors: torch.Tensor, which: torch.Tensor, coefficient: torch.Tensor
    ) -> torch.Tensor:
        """Exact scores (n), in float64, of ``coefficient`` (n) × ``vectors[which]``, each at residual ``base`` (n).

        ``vectors`` (m, d): each is unembedded once, even if several rows use it.
        """
        return self.scores_and_slack(base, vectors, which, coefficient)[0]

    def scores_and_slack(
        self, base: torch.Tensor, vectors: torch.Tensor, which: torch.Tensor, coefficient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what :meth:`scores` returns, and bounds (n) of the rounding error of each.

        The error of a token's product counts in the score as much as the token does in E_p[exp z]: by p·exp z over its
        sum, not by p. So it is weighted in the score's own pass; a token with a long row and a tiny p may decide it.
        """
        import torch

        order = torch.argsort(which)
        out = torch.empty(2, len(base), dtype=torch.float64, device=base.device)
        for rows in order.split(_BLOCK):
            used, index = which[rows].unique_consecutive(return_inverse=True)
            out[:, rows] = self._block(base[rows], vectors[used], index, coefficient[rows])
        return out[0], out[1]

    def nearly(
        self, base: torch.Tensor, vectors: torch.Tensor, which: torch.Tensor, coefficient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores (n) to within ``_NARROW`` / 2, and how far each may be off; most cost no pass over the tokens.

        Jensen's inequality bounds a score from above. Hoeffding's lemma, log E[exp(z − E z)] ≤ (max z − min z)² / 8,
        bounds it from below (Hoeffding 1963, equation 4.16). Where the two are further apart, the score is computed.
        """
        reach = (coefficient * self.scale[base]).double() * self._spread(vectors)[which]
        gap = reach.square() / 8
        upper = coefficient * (vectors @ self.slope.T)[which, base]
        error = gap / 2 + (coefficient.abs() * vectors.norm(dim=1)[which] * self.reach[base]).double()
        score = upper.double() - gap / 2
        wide = (~(gap <= _NARROW)).nonzero()[:, 0]  # or NaN
        if len(wide):
            exact = self.scores_and_slack(base[wide], vectors, which[wide], coefficient[wide])
            score[wide], error[wide] = exact
        return score, error

    def _spread(self, vectors: torch.Tensor) -> torch.Tensor:
        """Largest minus smallest logit (m) of each vector, a little enlarged for rounding.

        A soft cap's slope, between 0 and 1, draws logits towards 0, so with one 0 counts as a logit, too.
        """
        import torch

        ends = [torch.stack((vectors @ self.table[tile].T).aminmax(dim=1)) for tile in self._tiles(_TILE)]
        low, high = torch.stack(ends).amin(0)[0], torch.stack(ends).amax(0)[1]
        if self.cap is not None:
            low, high = low.clamp_max(0), high.clamp_min(0)
        return (high - low).double() * (1 + 1e-3)

    def intervals(
        self, base: torch.Tensor, vectors: torch.Tensor, which: torch.Tensor, coefficient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Certified lower and upper bounds (n) of the scores that :meth:`scores` would give.

        E_p[exp z] is summed over the most probable tokens. The remaining tokens have total probability R, largest
        probability P, and mean m and second moment s of z. Their part is bounded from above by
        exp z ≤ 1 + z + z²·φ(b) for z ≤ b, with φ(b) = (exp b − 1 − b)/b² (as in Bennett's inequality), and
        R·s ≤ P·Σ_u z_u² = P·vᵀ(WᵀW)v, which needs one matrix per model. The bound from below is Jensen's inequality,
        E[exp z] ≥ R·exp m.
        """
        import torch

        out = torch.empty(2, len(base), dtype=torch.float64, device=base.device)
        for row in base.unique().tolist():
            here = (base == row).nonzero()[:, 0]
            for some in here.split(4 * _BLOCK):
                used, index = which[some].unique(return_inverse=True)
                out[:, some] = self._interval(row, vectors[used], index, coefficient[some])
        return out[0], out[1]

    def _interval(
        self, row: int, vectors: torch.Tensor, index: torch.Tensor, coefficient: torch.Tensor
    ) -> torch.Tensor:
        import torch

        n_explicit = min(_EXPLICIT, self.p.shape[1])
        head = self.p[row].topk(n_explicit)
        table, cap = self.table[head.indices], None if self.cap is None else self.cap[self.prompt[row]]
        if cap is not None:
            table = table * cap[head.indices, None]
        factor = coefficient * self.scale[row]
        # Subtracting the mean does not change the score, and makes z small.
        own = self.table[self.target[row]] * self._cap_of_target()[row]
        mean = own - self.slope[row] / self.scale[row]
        z = (vectors @ (table - mean).T)[index].mul_(factor[:, None])
        z_own = (vectors @ (own - mean))[index].double() * factor
        first = (z @ head.values).double()
        joined = z.exp_().mul_(head.values)
        explicit = joined.sum(1).double()
        tilted_length = (joined @ table.norm(dim=1)).double() / explicit.clamp_min(1e-300)
        rest = 1 - head.values.double().sum()
        # Jensen's bound for the remaining tokens needs their mean; the mean over all tokens is 0 after the shift.
        rest_mean = -first / rest.clamp_min(1e-12)
        second = self._second_moment(vectors, mean, cap)[index] * factor.double().square()
        lengths = vectors.norm(dim=1).double()[index] * factor.double().abs()
        largest = self.p[row].topk(n_explicit + 1).values[-1].double() if n_explicit < self.p.shape[1] else 0.0
        b = torch.minimum(second.sqrt(), lengths * self._farthest(mean, cap)).clamp_min(1e-12)
        phi = torch.where(b < 1e-3, 0.5 + b / 6 + b.square(), (b.expm1() - b) / b.square())
        most = explicit + rest - first + largest * second * phi
        # If the rest is as small as its rounding error, its mean is unreliable. The bound holds without this term.
        least = explicit + rest * rest_mean.exp() if rest > 1e-4 else explicit
        # As in a score, the error of a token's product counts as much as the token does in E_p[exp z].
        length = self._lengths[self.target[row]] + tilted_length.clamp_min(self._mean_length[row])
        slack = self._rounding[row] * coefficient.abs() * vectors.norm(dim=1)[index] * length
        slack = slack + 1e-6  # the sum of float32 probabilities may differ from 1 by this much
        return torch.stack([z_own - most.log() - slack, z_own - least.clamp_min(1e-300).log() + slack])

    def _second_moment(self, vectors: torch.Tensor, mean: torch.Tensor, cap: torch.Tensor | None) -> torch.Tensor:
        """Σ_u (v·(g_u − mean))² over the vocabulary, (m); with a soft cap, whose slope is at most 1, an upper bound."""
        n = self.table.shape[0]
        along = (vectors @ mean).double()
        squares = ((vectors @ self._gram) * vectors).sum(1).double().clamp_min(0)
        if cap is not None:
            return 2 * squares + 2 * n * along.square()  # (a − b)² ≤ 2a² + 2b²
        total = (vectors @ self.table.sum(0)).double()
        return (squares - 2 * along * total + n * along.square()).clamp_min(0) * (1 + 1e-3) + 1e-9

    def _farthest(self, mean: torch.Tensor, cap: torch.Tensor | None) -> float:
        """The largest ‖g_u − mean‖; with a soft cap, whose slope is at most 1, an upper bound."""
        squares = self._lengths.square()
        if cap is None:
            return float((squares - 2 * (self.table @ mean) + mean.square().sum()).max().clamp_min(0).sqrt()) * 1.001
        return float(squares.max().sqrt() + mean.norm())

    @cached_property
    def _lengths(self) -> torch.Tensor:
        """‖g_u‖ of every token (u); with a soft cap, whose slope is at most 1, an upper bound."""
        lengths: torch.Tensor = self.table.norm(dim=1)
        return lengths

    @cached_property
    def _mean_length(self) -> torch.Tensor:
        """E_p[‖g‖] at every residual (b)."""
        return self.p @ self._lengths

    @cached_property
    def _gram(self) -> torch.Tensor:
        """WᵀW of the table, (d, d)."""
        return self.table.T @ self.table

    def _block(
        self, base: torch.Tensor, vectors: torch.Tensor, index: torch.Tensor, coefficient: torch.Tensor
    ) -> torch.Tensor:
        """Scores and their slack (2, n)."""
        import torch

        factor = (coefficient * self.scale[base])[:, None]
        own = (vectors[index] * self.table[self.target[base]]).sum(1, keepdim=True)
        own = own * factor * self._cap_of_target()[base, None]
        total, size = torch.zeros(2, len(base), dtype=torch.float64, device=base.device)
        length = self._mean_length[base].double()
        shared = len(vectors) < len(index)
        for tile in self._tiles(_TILE):
            z = vectors @ self.table[tile].T
            z = (z[index] if shared else z).mul_(factor)
            if self.cap is not None:
                z.mul_(self.cap[self.prompt[base], tile])
            # −log1p Σ p·expm1(z − z_w): a difference of two logarithms would lose the digits of a small score.
            weighted = z.sub_(own).expm1_().mul_(self.p[base, tile])
            total += weighted.sum(1)
            length += weighted @ self._lengths[tile]
            size += weighted.abs_().sum(1)
        score, share = -total.log1p(), 1 + total
        # Of the sum over tokens, then of the products with rows: E[‖g‖] under the tilted probabilities.
        summing, length = math.sqrt(4 * _TILE) * size / share, length / share
        far = (~((total > -0.99) & total.isfinite() & size.isfinite() & length.isfinite())).nonzero()[:, 0]
        for some in far.split(_FAR):  # cancellation, or a sum above e⁸⁸: sum logarithms instead
            z = (vectors[index[some]] @ self.table.T).mul_(factor[some])
            z = z if self.cap is None else z.mul_(self.cap[self.prompt[base[some]]])
            log_p = self.p[base[some]].log()
            joined = (z.sub_(own[some]) + log_p).double()
            score[some] = -joined.logsumexp(1)
            tilted = joined.softmax(1)
            length[some] = tilted @ self._lengths.double()
            summing[some] = (tilted * (z.abs() + log_p.abs()).nan_to_num(0.0, posinf=0.0)).sum(1)
        product = math.sqrt(self.table.shape[1]) * factor[:, 0].abs() * vectors.norm(dim=1)[index]
        slack = _ROUNDING * (product.double() * (self._lengths[self.target[base]] + length) + summing)
        return torch.stack([score, slack])

    def _weighted(self, tile: slice) -> torch.Tensor:
        return self.p[:, tile] if self.cap is None else self.p[:, tile] * self.cap[self.prompt, tile]

    def _cap_of_target(self) -> torch.Tensor:
        import torch

        return torch.ones_like(self.scale) if self.cap is None else self.cap[self.prompt, self.target]

    def _tiles(self, size: int) -> list[slice]:
        return [slice(i, i + size) for i in range(0, self.table.shape[0], size)]


def distributions(
    table: torch.Tensor,
    constant: torch.Tensor,
    residuals: torch.Tensor,
    scale: torch.Tensor,
    target: torch.Tensor,
    prompt: torch.Tensor,
    cap: torch.Tensor | None = None,
) -> Distributions:
    """Compute the token probabilities of residuals x (b, d): softmax((table @ x · scale + constant) · cap)."""
    import torch

    p, log_p = residuals.new_empty(len(residuals), len(table)), residuals.new_empty(len(residuals))
    for rows in torch.arange(len(residuals), device=residuals.device).split(_FAR):
        logits = torch.addmm(constant, residuals[rows] * scale[rows, None], table.T)
        if cap is not None:
            logits *= cap[prompt[rows]]
        logits -= logits.amax(1, keepdim=True)  # large logits would lose the digits that tell tokens apart
        own = logits.gather(1, target[rows, None]).double()
        total = logits.exp_().sum(1, keepdim=True, dtype=torch.float64)
        log_p[rows] = (own - total.log())[:, 0].float()
        p[rows] = (logits / total).float()
    return Distributions(table, scale, target, p, log_p, cap, prompt)


@dataclass(frozen=True)
class Best:
    """The k best candidates of each row, best first. Shapes (row, k); ``index`` is −1 if a row has fewer than k."""

    index: torch.Tensor
    score: torch.Tensor
    slack: torch.Tensor
    n_scored: torch.Tensor  # (row)
    most: torch.Tensor  # (row, n) the largest score that each candidate may have; −inf for none


def certified_top(
    upper: torch.Tensor,
    slack: torch.Tensor,
    k: int,
    score: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    tighter: Sequence[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = (),
    step: int = 64,
) -> Best:
    """Return the k best candidates of each row (row, n), with proof that no unscored candidate is among them.

    ``upper`` (row, n) bounds every score from above, except for rounding; ``slack`` (row, n) bounds the rounding error
    of these bounds. ``score`` takes rows and columns, each (m), and returns their exact scores and the rounding errors
    that these may have. −inf in ``upper`` means no candidate. ``tighter`` are further bounds, each closer and more
    costly than the one before, but cheaper than a score, and computed only for undecided candidates.
    """
    import torch

    n = upper.shape[1]
    k = min(k, n)
    bound = upper + slack
    known = torch.full(bound.shape, -torch.inf, dtype=torch.float64, device=upper.device)
    error = torch.zeros_like(known)
    todo = torch.zeros_like(bound, dtype=torch.bool)
    first = bound.topk(min(n, k + min(k, step) // 4 + 1), dim=1)
    todo.scatter_(1, first.indices, first.values > -torch.inf)
    scored = torch.zeros_like(todo)
    least = torch.full_like(bound[:, :1], torch.inf)
    bounds = iter(tighter)
    while todo.any():
        rows, columns = todo.nonzero(as_tuple=True)
        known[rows, columns], error[rows, columns] = score(rows, columns)
        scored |= todo
        # A score has an error up to its slack, so a candidate is excluded by lower ends of scores only.
        least = (known - error).topk(k, dim=1).values[:, -1:]
        open_ = (bound > least) & ~scored & (bound > -torch.inf)
        if open_.any() and (closer := next(bounds, None)):
            rows, columns = open_.nonzero(as_tuple=True)
            bound[rows, columns] = torch.minimum(bound[open_], closer(rows, columns) + slack[open_])
            open_ &= bound > least
        ahead = torch.where(open_, bound, -torch.inf).topk(min(n, step), dim=1)
        todo = torch.zeros_like(open_).scatter_(1, ahead.indices, ahead.values > -torch.inf)
    best = known.topk(k, dim=1)
    index = torch.where(best.values > -torch.inf, best.indices, -1)
    # A candidate that was not scored is at most at the k-th best, or it would have been scored.
    most = torch.where(scored, known + error, torch.minimum(bound, least))
    return Best(index, best.values, error.gather(1, best.indices), scored.sum(1), most)
