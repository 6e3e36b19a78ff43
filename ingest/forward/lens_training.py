"""Train the translators of a tuned lens: a least-squares start, then Adam on the KL divergence.

Logits of some models are so steep that steps which suit another model ruin a translator, so each is checked from time
to time on positions that are not trained on. Training goes back to the best one, with smaller steps.

Each step compares distributions over some tokens only: those that the model finds likely somewhere in the batch, and
random ones that stand for all others. A step on the whole vocabulary would take many times as long.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdb.ingest.forward.linear import matrix
from kdb.ingest.forward.readouts import Place, positions_at_once, read
from kdb.ingest.progress import progress

if TYPE_CHECKING:
    import torch

    from kdb.ingest.models.find import LoadedModel
    from kdb.ingest.models.structure import ModelStructure

STEPS = 300
"""Steps of Adam."""

BATCH = 256
"""Positions of one step of Adam."""

LIKELY = 8
"""Tokens of each position that a step includes: the model's most probable ones."""

OTHERS = 512
"""Random tokens of each step that stand for all others."""

_RATE = 2e-3
"""Learning rate at the first step; it falls to 0."""

_CHECKED = 15
"""Steps after which a map is checked."""

_SLOWER = 0.3
"""Factor of the learning rate after a check at which a map is not better."""

_RIDGE = 0.02
"""Penalty on A in the least-squares fit, for states of unit variance, beside a mean squared error."""

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the least-squares fit at which Adam may start."""


@dataclass(frozen=True)
class Translator:
    """An affine map h + A h + b: ``weight`` is A (hidden, hidden), ``bias`` is b (hidden)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Translate states (…, hidden)."""
        translated: torch.Tensor = states + states @ self.weight.T + self.bias
        return translated


Translators = Mapping[Place, Translator]
"""The translators of a tuned lens that are used."""


class Training:
    """Fits the translators of all places to states (place, position, hidden) at once, so that they share batches."""

    def __init__(
        self, loaded: LoadedModel, structure: ModelStructure, states: torch.Tensor, generator: torch.Generator
    ) -> None:
        self.loaded, self.structure, self.states, self.generator = loaded, structure, states, generator
        self.device = loaded.device
        self.norm = copy.deepcopy(structure.final_norm).float()
        self.rows = matrix(structure.unembed)
        self.likely = self._likely()
        self.size = min(BATCH, states.shape[1] // 2)
        self.rest = states.shape[1] - self.size

    def run(self, advance: Callable[[int], None]) -> list[Translator]:
        """Fit, and return a translator for each place; that of the last place is the identity.

        ``advance`` counts finished steps: one for each place but the last, then ``STEPS``.
        """
        import torch

        # The last passages are not trained on: they tell whether a map gets better.
        check = self._batch(torch.arange(self.rest, self.rest + self.size))
        maps = self._maps(check, advance)
        for step in range(1, STEPS + 1):
            batch = self._batch(torch.randint(self.rest, (self.size,), generator=self.generator))
            loss, checked = functools.partial(self._loss, batch), functools.partial(self._loss, check)
            for one, here in zip(maps, self.states, strict=False):  # all but the last place
                one.step(loss, self._here(here, batch), 1 - (step - 1) / STEPS)
                if step % _CHECKED == 0 or step == STEPS:
                    one.check(checked, self._here(here, check))
            advance(1)
        return [*(one.translator() for one in maps), self._identity()]

    def _maps(self, batch: _Batch, advance: Callable[[int], None]) -> list[_Map]:
        """The maps at their start, for each place but the last."""
        final, maps = self.states[-1, : self.rest].to(self.device), []
        for here in self.states[:-1]:
            maps.append(_Map(here[: self.rest].to(self.device), final))
            maps[-1].start(functools.partial(self._loss, batch), self._here(here, batch))
            advance(1)
        return maps

    def _here(self, states: torch.Tensor, batch: _Batch) -> torch.Tensor:
        return states[batch.at].to(self.device)

    def _identity(self) -> Translator:
        import torch

        size = self.states.shape[2]
        return Translator(torch.zeros(size, size, device=self.device), torch.zeros(size, device=self.device))

    def _likely(self) -> torch.Tensor:
        """The most probable tokens (position, token) of the model's own output."""
        import torch

        final, found = self.states[-1], []
        with torch.inference_mode(), progress("Finding likely tokens", len(final), "tokens") as shown:
            for some in final.split(positions_at_once(self.loaded)):
                logits = read(self.loaded, self.structure, some.to(self.device))
                found.append(logits.topk(min(LIKELY, logits.shape[1]), -1).indices.cpu())
                shown.advance(len(some))
        return torch.cat(found)

    def _batch(self, at: torch.Tensor) -> _Batch:
        """Some positions, and the tokens on which they are compared."""
        import torch

        likely, vocab = self.likely[at].unique(), len(self.rows)
        others = torch.randint(vocab, (OTHERS,), generator=self.generator).unique()
        others = others[~torch.isin(others, likely)]
        weight = torch.zeros(len(likely) + len(others))
        weight[len(likely) :] = float(np.log(max(1, vocab - len(likely)) / max(1, len(others))))
        tokens = torch.cat([likely, others]).to(self.rows.device)
        bias = getattr(self.structure.unembed, "bias", None)
        compared = _Tokens(
            self.rows[tokens].float().to(self.device),
            None if bias is None else bias.detach()[tokens].float().to(self.device),
            weight.to(self.device),
        )
        with torch.no_grad():
            return _Batch(at, compared, self._log_p(self.states[-1][at].to(self.device), compared))

    def _log_p(self, states: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
        """Log-probabilities (position, token) among the compared tokens, each logit raised by its token's weight."""
        logits = self.norm(states) @ tokens.rows.T
        logits = (logits if tokens.bias is None else logits + tokens.bias) * self.structure.logit_scale
        cap = self.structure.logit_softcap
        if cap is not None:
            logits = cap * (logits / cap).tanh()
        log_p: torch.Tensor = (logits + tokens.weight).log_softmax(-1)
        return log_p

    def _loss(self, batch: _Batch, translated: torch.Tensor) -> torch.Tensor:
        """Mean KL divergence of a readout from the model's output, over the tokens of the batch."""
        log_q = self._log_p(translated, batch.tokens)
        kl: torch.Tensor = (batch.final.exp() * (batch.final - log_q)).sum(-1).mean()
        return kl


@dataclass(frozen=True)
class _Tokens:
    """Tokens whose probabilities are compared, with their rows and biases of the unembedding.

    ``weight`` is 0 for a likely token. For a random one, it is the log of the number of tokens that are not likely over
    that of the random ones, so that these count for all of them.
    """

    rows: torch.Tensor
    bias: torch.Tensor | None
    weight: torch.Tensor


@dataclass(frozen=True)
class _Batch:
    """Positions of one step, the tokens that it compares, and their log-probabilities in the model's own output."""

    at: torch.Tensor
    tokens: _Tokens
    final: torch.Tensor


class _Map:
    """The translator of one place in training: h + s (M x + c), where x is h, whitened, and s the size of the output.

    In these coordinates all directions are alike, so that one learning rate fits them.
    """

    def __init__(self, states: torch.Tensor, final: torch.Tensor) -> None:
        import torch

        self.mean = states.mean(0)
        centred = states - self.mean
        values, vectors = torch.linalg.eigh((centred.T @ centred / len(states)).double())
        scale = values.clamp_min(1e-6 * values.max() + 1e-12).rsqrt()
        self.white = (vectors * scale @ vectors.T).float()
        length = final.square().mean(-1, keepdim=True).sqrt()
        self.size = length.mean()
        self.least = self._least_squares(centred @ self.white, (final - states), length)
        self.rate = _RATE
        self._begin(torch.zeros_like(self.least))

    def _least_squares(self, x: torch.Tensor, wanted: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """The map (hidden + 1, hidden) to the last block's output; errors count in units of that output's length."""
        import torch

        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        weighted = x / length.square() * length.square().reciprocal().mean().reciprocal() / len(x)
        penalty = torch.full((x.shape[1],), _RIDGE, device=x.device)
        penalty[-1] = 0  # of the constant
        left, right = weighted.T @ x + torch.diag(penalty), weighted.T @ (wanted / self.size)
        solved: torch.Tensor = torch.linalg.solve(left.double(), right.double()).float()
        return solved

    def _translated(self, states: torch.Tensor, map_: torch.Tensor) -> torch.Tensor:
        x = (states - self.mean) @ self.white
        translated: torch.Tensor = states + self.size * (x @ map_[:-1] + map_[-1])
        return translated

    def start(self, loss: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> None:
        """Begin with the share of the least-squares map whose loss is smallest; 0 is the identity."""
        import torch

        with torch.no_grad():
            losses = [float(loss(self._translated(states, share * self.least))) for share in _SHARES]
        self.best, self.loss = _SHARES[int(np.argmin(losses))] * self.least, min(losses)
        self._begin(self.best)
        del self.least

    def _begin(self, map_: torch.Tensor) -> None:
        """Start Adam at a map."""
        import torch

        self.map, self.steps = map_.clone(), 0
        self.moments = [torch.zeros_like(map_) for _ in range(2)]

    def check(self, loss: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> None:
        """Keep the map if its loss is the smallest so far; else go back to the best one, with smaller steps."""
        import torch

        with torch.no_grad():
            now = float(loss(self._translated(states, self.map)))
        if now < self.loss:
            self.best, self.loss = self.map.clone(), now
        else:
            self.rate *= _SLOWER
            self._begin(self.best)

    def step(self, loss: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, share: float) -> None:
        """Take one step of Adam, with a share of the learning rate."""
        import torch

        with torch.enable_grad():
            map_ = self.map.clone().requires_grad_(True)
            [slope] = torch.autograd.grad(loss(self._translated(states, map_)), map_)
        self.steps += 1
        for moment, value, keep in zip(self.moments, (slope, slope.square()), (0.9, 0.99), strict=True):
            moment.mul_(keep).add_(value, alpha=1 - keep)
        mean, square = (m / (1 - k**self.steps) for m, k in zip(self.moments, (0.9, 0.99), strict=True))
        self.map -= self.rate * share * mean / (square.sqrt() + 1e-8)

    def translator(self) -> Translator:
        """The best translator, in the coordinates of the states."""
        weight = self.size * (self.white @ self.best[:-1]).T
        return Translator(weight, self.size * self.best[-1] - self.mean @ weight.T)
