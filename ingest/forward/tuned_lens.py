"""The tuned lens (Belrose et al. 2023, arXiv 2303.08112): an affine translator for each place of the residual stream.

    fits = fit(loaded, structure, passages, held_out, seed=42)

A translator maps a state h to h + A h + b, which the final norm and the unembedding then read. It is fitted so that
the KL divergence of this readout from the model's own output is small: A and b start at 0, or at a share of the
least-squares map to the last block's output if that is better, and Adam does the rest. The readout after the last block
is the model's output, so its translator is the identity.

To be fast, each step compares distributions over some tokens only: those that the model finds likely somewhere in the
batch, and random ones that stand for all others. Held-out divergences are of the whole vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdb.ingest.forward.decomposition import matrix
from kdb.ingest.forward.patching import same_length
from kdb.ingest.forward.readouts import (
    Place,
    log_probabilities,
    places,
    positions_at_once,
    read,
    residuals,
    tokens_of_states,
)

if TYPE_CHECKING:
    import torch

    from kdb.ingest.models.find import LoadedModel
    from kdb.ingest.models.structure import ModelStructure

TRAINING_BYTES = 768 * 2**20
"""Bytes of memory for the states that translators are fitted to."""

MOST_POSITIONS = 12_000
"""Largest number of positions that translators are fitted to."""

HELD_OUT = 600
"""Largest number of held-out positions on which lenses are compared."""

STEPS = 150
BATCH = 512
"""Positions of one step of Adam."""

LIKELY = 8
"""Tokens of each position that a step includes: the model's most probable ones."""

OTHERS = 1024
"""Random tokens of each step that stand for all others."""

_FEWEST_GROUPS = 5
"""Passages below which a mean over them has no interval."""

_RATE = 2e-3
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
        return states + states @ self.weight.T + self.bias


def _interval(values: NDArray[np.float64], group: NDArray[np.int64]) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval (Student's t) of a mean over groups of equal size; None below five groups."""
    from scipy.stats import t

    means = np.array([values[group == one].mean() for one in np.unique(group)])
    if len(means) < _FEWEST_GROUPS:
        return None, None
    half = float(t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    return float(means.mean()) - half, float(means.mean()) + half


Translators = Mapping[Place, Translator]


@dataclass(frozen=True)
class Fit:
    """A fitted translator, and the KL divergences (nat) of both lenses on held-out text, a value for each position.

    ``passage`` (position) numbers the passage of each value.
    """

    place: Place
    translator: Translator
    kl_logit: NDArray[np.float64]
    kl_tuned: NDArray[np.float64]
    passage: NDArray[np.int64]

    def row(self) -> dict[str, Any]:
        """The row of ``lens_fits``."""
        gain = self.kl_logit - self.kl_tuned
        low, high = _interval(gain, self.passage)
        return {
            "layer": self.place[0],
            "place": self.place[1],
            "n_tokens": len(gain),
            "n_passages": len(np.unique(self.passage)),
            "kl_logit": float(self.kl_logit.mean()),
            "kl_tuned": float(self.kl_tuned.mean()),
            "gain_low": low,
            "gain_high": high,
            "kept": self.is_better,
        }

    @property
    def is_better(self) -> bool:
        """Whether the tuned lens is at least as close to the model's output as the logit lens."""
        return bool(self.kl_tuned.mean() <= self.kl_logit.mean())


def fit(
    loaded: LoadedModel,
    structure: ModelStructure,
    passages: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    seed: int,
    advance: Callable[[int], None] = lambda _n: None,
) -> list[Fit]:
    """Fit a translator for every place but those between attention and FFN, and compare it on held-out passages.

    Passages have one length; their first token is left out. ``advance`` counts finished steps, of ``STEPS``.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    every = places(len(structure.blocks))
    most = min(MOST_POSITIONS, TRAINING_BYTES // (4 * len(every) * _hidden(loaded)))
    states, _ = _states(loaded, structure, passages, most, generator)
    translators = _Training(loaded, structure, states, generator).run(advance)
    del states
    tested, passage = _states(loaded, structure, held_out, HELD_OUT, generator)
    kls = _compared(loaded, structure, tested, translators)
    return [Fit(place, t, kl[0], kl[1], passage) for place, t, kl in zip(every, translators, kls, strict=True)]


def _hidden(loaded: LoadedModel) -> int:
    return int(loaded.model.config.get_text_config().hidden_size)


def _states(
    loaded: LoadedModel,
    structure: ModelStructure,
    passages: Sequence[Sequence[int]],
    most: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """States (place, position, hidden), on the CPU, of at most ``most`` positions; and the passage of each position.

    As many passages are drawn as are needed, and their first tokens are left out.
    """
    import torch

    n = max(1, min(len(passages), most // (len(passages[0]) - 1)))
    chosen = torch.randperm(len(passages), generator=generator)[:n].sort().values.tolist()
    ids, parts, of = [passages[i] for i in chosen], [], []
    for rows in same_length(ids, tokens_of_states(loaded, len(structure.blocks) + 1)):
        found = residuals(loaded, structure, [ids[i] for i in rows])[:, :, 1:]
        parts.append(found.flatten(1, 2).cpu())
        of += [chosen[i] for i in rows for _ in range(found.shape[2])]
    return torch.cat(parts, 1), np.array(of)


# Training --------------------------------------------------------------------------------------------------------


class _Training:
    """Fits the translators of all places to states (place, position, hidden) at once, so that they share batches."""

    def __init__(
        self, loaded: LoadedModel, structure: ModelStructure, states: torch.Tensor, generator: torch.Generator
    ) -> None:
        self.loaded, self.structure, self.states, self.generator = loaded, structure, states, generator
        self.norm = copy.deepcopy(structure.final_norm).float()
        self.rows = matrix(structure.unembed)
        self.likely = self._likely()
        self.size = min(BATCH, 2 * positions_at_once(loaded), states.shape[1])

    def run(self, advance: Callable[[int], None]) -> list[Translator]:
        """Fit, and return a translator for each place; that of the last place is the identity."""
        import torch

        n = self.states.shape[1]
        batch = self._batch(torch.randperm(n, generator=self.generator)[: self.size])
        maps = [_Map(here, self.states[-1]) for here in self.states[:-1]]
        for one, here in zip(maps, self.states[:-1], strict=True):
            one.start(functools.partial(self._loss, batch), here[batch.at])
        for step in range(STEPS):
            at = torch.randint(n, (self.size,), generator=self.generator)
            batch = self._batch(at)
            for one, here in zip(maps, self.states[:-1], strict=True):
                one.step(functools.partial(self._loss, batch), here[at], _RATE * (1 - step / STEPS))
            advance(1)
        size = self.states.shape[2]
        identity = Translator(torch.zeros(size, size), torch.zeros(size))
        return [*(one.translator() for one in maps), identity]

    def _likely(self) -> torch.Tensor:
        """The most probable tokens (position, token) of the model's own output."""
        import torch

        with torch.inference_mode():
            found = [
                read(self.loaded, self.structure, some.to(self.loaded.device)).topk(LIKELY, -1).indices.cpu()
                for some in self.states[-1].split(positions_at_once(self.loaded))
            ]
        return torch.cat(found)

    def _batch(self, at: torch.Tensor) -> _Batch:
        import torch

        vocab = len(self.rows)
        likely = self.likely[at].unique()
        others = torch.randint(vocab, (OTHERS,), generator=self.generator).unique()
        others = others[~torch.isin(others, likely)]
        tokens = torch.cat([likely, others])
        weight = torch.zeros(len(tokens))
        weight[len(likely) :] = float(np.log(max(1, vocab - len(likely)) / max(1, len(others))))
        rows = self.rows[tokens.to(self.rows.device)].float()
        bias = getattr(self.structure.unembed, "bias", None)
        batch = _Batch(at, rows, None if bias is None else bias[tokens].float(), weight.to(rows.device))
        with torch.no_grad():
            batch.final = self._log_p(self.states[-1][at].to(rows.device), batch)
        return batch

    def _log_p(self, states: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """Log-probabilities (position, token of the batch), each other token standing for several."""
        logits = self.norm(states) @ batch.rows.T
        logits = (logits if batch.bias is None else logits + batch.bias) * self.structure.logit_scale
        cap = self.structure.logit_softcap
        if cap is not None:
            logits = cap * (logits / cap).tanh()
        return (logits + batch.weight).log_softmax(-1)

    def _loss(self, batch: _Batch, translated: torch.Tensor) -> torch.Tensor:
        """Mean KL divergence of a readout from the model's output, over the tokens of the batch."""
        log_q = self._log_p(translated, batch)
        return (batch.final.exp() * (batch.final - log_q)).sum(-1).mean()


@dataclass
class _Batch:
    """Positions of one step, and the tokens whose probabilities it compares: their rows of the unembedding.

    ``weight`` is the logarithm of the number of tokens that each stands for.
    """

    at: torch.Tensor
    rows: torch.Tensor
    bias: torch.Tensor | None
    weight: torch.Tensor
    final: torch.Tensor = None  # type: ignore[assignment]  # log-probabilities of the model's own output


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
        self.map = torch.zeros_like(self.least)
        self.moments = [torch.zeros_like(self.least) for _ in range(2)]
        self.steps = 0

    def _least_squares(self, x: torch.Tensor, wanted: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """The map (hidden + 1, hidden) to the last block's output; errors count in units of that output's length."""
        import torch

        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        weight = 1 / length.square()
        weight = weight / weight.mean()
        left = (x * weight).T @ x / len(x)
        penalty = torch.full((len(left),), _RIDGE)
        penalty[-1] = 0
        right = (x * weight).T @ (wanted / self.size) / len(x)
        return torch.linalg.solve((left + torch.diag(penalty)).double(), right.double()).float()

    def _translated(self, states: torch.Tensor, map_: torch.Tensor) -> torch.Tensor:
        x = (states - self.mean) @ self.white
        return states + self.size * (x @ map_[:-1] + map_[-1])

    def start(self, loss: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> None:
        """Begin with the share of the least-squares map whose loss is smallest; 0 is the identity."""
        import torch

        with torch.no_grad():
            losses = [float(loss(self._translated(states, share * self.least))) for share in _SHARES]
        self.map = _SHARES[int(np.argmin(losses))] * self.least
        del self.least

    def step(self, loss: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, rate: float) -> None:
        """Take one step of Adam."""
        import torch

        with torch.enable_grad():
            map_ = self.map.clone().requires_grad_(True)
            [slope] = torch.autograd.grad(loss(self._translated(states, map_)), map_)
        self.steps += 1
        for moment, value, keep in zip(self.moments, (slope, slope.square()), (0.9, 0.99), strict=True):
            moment.mul_(keep).add_(value, alpha=1 - keep)
        mean, square = (m / (1 - k**self.steps) for m, k in zip(self.moments, (0.9, 0.99), strict=True))
        self.map -= rate * mean / (square.sqrt() + 1e-8)

    def translator(self) -> Translator:
        """The translator in the coordinates of the states."""
        weight = self.size * (self.white @ self.map[:-1]).T
        return Translator(weight, self.size * self.map[-1] - self.mean @ weight.T)


# Held-out text ---------------------------------------------------------------------------------------------------


def _compared(
    loaded: LoadedModel, structure: ModelStructure, states: torch.Tensor, translators: Sequence[Translator]
) -> NDArray[np.float64]:
    """KL divergence (place, lens, position) of both lenses from the model's output, over the whole vocabulary."""
    import torch

    parts = []
    with torch.inference_mode():
        for some in states.to(loaded.device).split(positions_at_once(loaded), dim=1):
            final = log_probabilities(read(loaded, structure, some[-1]))
            rows = [list(_divergences(loaded, structure, final, h, t)) for h, t in zip(some, translators, strict=True)]
            parts.append(torch.tensor(rows, dtype=torch.float64))
    return torch.cat(parts, 2).numpy()


def _divergences(
    loaded: LoadedModel, structure: ModelStructure, final: torch.Tensor, states: torch.Tensor, translator: Translator
) -> Iterator[list[float]]:
    """KL divergences (position) of the logit lens, then of the tuned one."""
    for read_ in (states, translator(states)):
        log_q = read(loaded, structure, read_).log_softmax(-1)
        kl: list[float] = (final.exp() * (final - log_q)).sum(1).clamp_min(0).tolist()
        yield kl
