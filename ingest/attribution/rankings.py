"""Eight ways to rank FFN value neurons by their effect on a token (Yu and Ananiadou, section 4.1, Table 2).

Some rankings cost the whole vocabulary for each neuron. Their best neurons are found by bounds, with proof, as in
:mod:`kdb.ingest.attribution.bounds`. Among equal values, the larger |coefficient| comes first, then the lower layer,
then the lower neuron.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from kdb.ingest.attribution.bounds import certified_top
from kdb.ingest.attribution.scores import Attribution, Neurons

if TYPE_CHECKING:
    import torch

METHODS = (
    "log_prob_increase",
    "log_prob",
    "prob_increase",
    "norm",
    "coefficient",
    "rank",
    "coefficient_norm",
    "coefficient_rank",
)
"""The paper's methods a to h, in its order."""

_SAMPLES = (1024, 4096, 16384, 65536)
"""Numbers of tokens in the samples of the vocabulary that bound a rank from below: a rank is at least the rank within
the sample. The first number is for all neurons, the next ones are for neurons that may still be among the best."""
_TILE = 4096
_BLOCK = 512


def best_neurons(attribution: Attribution, k: int, top: Neurons | None = None) -> dict[str, torch.Tensor]:
    """Return the ``k`` best FFN neurons by each method, best first: (b, k) indices into (l · n), −1 for none.

    ``top`` are the best by log-probability increase, at least ``k``, if they are known already.
    """
    import torch

    a = attribution
    k = min(k, a.ffn_coefficients[0].numel())
    coefficient = a.ffn_coefficients.flatten(1).abs().double()
    length = torch.stack([a.decomposition.ffn_columns(i).norm(dim=1) for i in range(a.n_layers)])
    scale = a.cache.ffn_scale[:, torch.arange(a.n_prompts), a.cache.last].T  # b, l
    norm = (length * scale[..., None]).flatten(1).double()
    top = (top or a.ffn_top(k)).first(k)
    at_least, fires = _rank_bounds(a), None if a.fires is None else a.fires.flatten(1)
    n_tokens = a.decomposition.readout.table.shape[0]

    def by_rank(weight: torch.Tensor) -> torch.Tensor:
        def among(n_tokens: int | None, prompt: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
            return weight[prompt, flat] / _ranks(a, prompt, flat, n_tokens) + tie[prompt, flat]

        # Smaller than the difference of any two reciprocal ranks, so it only orders equal ones.
        tie = 0.4 / n_tokens**2 * coefficient / coefficient.amax(1, keepdim=True)
        upper = weight / at_least + tie
        upper = upper if fires is None else upper.masked_fill(~fires, -torch.inf)
        tighter = [functools.partial(among, n) for n in _SAMPLES[1:] if n < n_tokens]

        def exact(prompt: torch.Tensor, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value = among(None, prompt, flat)
            return value, torch.zeros_like(value)

        return certified_top(upper, torch.zeros_like(upper), k, exact, tighter, step=2 * k).index

    return {
        "log_prob_increase": torch.where(top.layer < 0, -1, top.layer * a.ffn_coefficients.shape[2] + top.neuron),
        "log_prob": _by_log_prob(a, k),
        "prob_increase": _by_prob_increase(a, k),
        "norm": _largest(norm, coefficient, k, fires),
        "coefficient": _largest(coefficient, coefficient, k, fires),
        "rank": by_rank(torch.ones_like(coefficient)),
        "coefficient_norm": _largest(coefficient * norm, coefficient, k, fires),
        "coefficient_rank": by_rank(coefficient),
    }


def _by_log_prob(a: Attribution, k: int) -> torch.Tensor:
    """Rank by log p(w|mv): the increase over a uniform distribution minus log V, so the order is the same."""
    import torch

    first, n_tokens = slice(0, a.n_prompts), a.decomposition.readout.table.shape[0]
    uniform = torch.full((1, n_tokens), 1 / n_tokens, device=a.target.device).expand(a.n_prompts, -1)
    alone = dataclasses.replace(
        a.at, scale=a.at.scale[first], target=a.target, p=uniform, log_p=a.at.log_p[first], prompt=a.at.prompt[first]
    )

    def exact(prompt: torch.Tensor, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return alone.scores_and_slack(prompt, *a.ffn_vectors(prompt, flat))

    return certified_top(*a.bounds_against(alone), k, exact).index


def _by_prob_increase(a: Attribution, k: int) -> torch.Tensor:
    """Rank by p(w|x+v) − p(w|x) = p(w|x) · expm1(score), so bounds of the score give bounds of it."""
    import torch

    n = a.ffn_coefficients.shape[2]
    of_ffn = slice(a.n_layers * a.n_prompts, 2 * a.n_layers * a.n_prompts)
    before = a.at.log_p[of_ffn].view(a.n_layers, a.n_prompts).T.double().exp()
    before = before.repeat_interleave(n, dim=1)
    upper, slack = a.ffn_bounds

    def exact(prompt: torch.Tensor, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score, error = a.ffn_exact(prompt, flat)
        return before[prompt, flat] * score.expm1(), before[prompt, flat] * (score + error).exp() * error

    most = (before * (upper + slack).expm1()).masked_fill(upper == -torch.inf, -torch.inf)
    return certified_top(most, before * (upper + slack).exp() * slack, k, exact).index


def _rank_bounds(a: Attribution) -> torch.Tensor:
    """Bound w's rank among each neuron's logits from below, (b, l · n), by its rank in a sample of the vocabulary."""
    import torch

    table = a.decomposition.readout.table
    targets, which = torch.unique(a.target, return_inverse=True)
    sample = table[a.decomposition.readout.longest[: _SAMPLES[0]]]
    counts = []
    for layer in range(a.n_layers):
        columns = a.decomposition.ffn_columns(layer)
        every = torch.zeros(len(targets), len(columns), dtype=torch.long, device=columns.device)
        counts.append(every)
        fires = slice(None) if a.fires is None else a.fires[:, layer].any(0).nonzero()[:, 0]
        columns = columns[fires]
        logits, own = columns @ sample.T, columns @ table[targets].T
        least = own + _rounding(columns.norm(dim=1, keepdim=True), table[targets].norm(dim=1))
        every[:, fires] = torch.stack([(logits > least[:, i, None]).sum(1) for i in range(len(targets))])
    return (1 + torch.cat(counts, dim=1)[which]).double()


def _rounding(column_length: torch.Tensor, row_length: torch.Tensor) -> torch.Tensor:
    """Largest difference between two ways of summing one logit.

    When a rank is bounded, a token whose logit exceeds w's by less than this is not counted, so the bound stays true.
    """
    return 1e-5 * column_length * row_length


def _ranks(a: Attribution, prompt: torch.Tensor, flat: torch.Tensor, n_tokens: int | None = None) -> torch.Tensor:
    """Return the rank (m) of w among the logits of a neuron's column: one plus the number of tokens with larger logits.

    With ``n_tokens``, return a lower bound: the rank among that many tokens, those with the longest rows.
    """
    import torch

    table, target = a.decomposition.readout.table, a.target[prompt]
    pairs, pair = (flat * len(table) + target).unique(return_inverse=True)
    neuron, token = pairs // len(table), pairs % len(table)
    columns, which = a.ffn_columns(neuron)
    rank = torch.ones(len(pairs), dtype=torch.float64, device=flat.device)
    every = torch.arange(len(table), device=flat.device)
    tokens = every if n_tokens is None else a.decomposition.readout.longest[:n_tokens].sort().values
    for rows in torch.arange(len(pairs), device=flat.device).split(_BLOCK):
        used, index = which[rows].unique_consecutive(return_inverse=True)
        mine, goal = columns[which[rows]], table[token[rows]]
        own = (mine * goal).sum(1, keepdim=True)
        if n_tokens is not None:
            own += _rounding(mine.norm(dim=1), goal.norm(dim=1))[:, None]
        for some in tokens.split(_TILE):
            logits = (columns[used] @ table[some].T)[index]
            logits.masked_fill_(some == token[rows, None], -torch.inf)
            rank[rows] += (logits > own).sum(1)
    return rank[pair]


def _largest(value: torch.Tensor, coefficient: torch.Tensor, k: int, fires: torch.Tensor | None) -> torch.Tensor:
    """Return the indices (b, k) of the largest values, ordered by value, then coefficient, then index; −1 for none.

    ``fires`` (b, n): which neurons are ranked; None for all.
    """
    import numpy as np
    import torch

    rows = []
    value = value if fires is None else value.masked_fill(~fires, -torch.inf)
    for row, tie in zip(value, coefficient, strict=True):
        near = ((row >= row.topk(k).values[-1]) & (row > -torch.inf)).nonzero()[:, 0]
        order = np.lexsort((near.cpu().numpy(), -tie[near].cpu().numpy(), -row[near].cpu().numpy()))
        best = near[torch.from_numpy(order[:k]).to(near.device)]
        rows.append(torch.nn.functional.pad(best, (0, k - len(best)), value=-1))
    return torch.stack(rows)
