"""The tuned lens (Belrose et al. 2023, arXiv 2303.08112): an affine translator for each place of the residual stream.

    fits = fit(loaded, structure, passages, held_out, seed=42)

A translator maps a state h to h + A h + b, which the final norm and the unembedding then read. It is fitted so that
the KL divergence of this readout from the model's own output is small: A and b start at 0, or at a share of the
least-squares map to the last block's output if that is better, and Adam does the rest. The readout after the last block
is the model's output, so its translator is the identity.

:mod:`kdb.ingest.forward.lens_training` fits the translators. Held-out divergences are of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdb.ingest.forward.lens_training import STEPS, Training, Translator
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
from kdb.ingest.progress import progress

if TYPE_CHECKING:
    import torch

    from kdb.ingest.models.find import LoadedModel
    from kdb.ingest.models.structure import ModelStructure

TRAINING_BYTES = 768 * 2**20
"""Bytes of memory for the states that translators are fitted to."""

MOST_POSITIONS = 12_000
"""Largest number of positions that translators are fitted to."""

HELD_OUT = 400
"""Largest number of held-out positions on which lenses are compared, spread over the held-out passages."""

_OF_PASSAGE = 8
"""Held-out positions of a passage, if there are many passages."""

_FEWEST_GROUPS = 5
"""Passages below which a mean over them has no interval."""


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


def _interval(values: NDArray[np.float64], group: NDArray[np.int64]) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval (Student's t) of a mean over groups of equal size; None below five groups."""
    from scipy.stats import t

    means = np.array([values[group == one].mean() for one in np.unique(group)])
    if len(means) < _FEWEST_GROUPS:
        return None, None
    half = float(t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    return float(means.mean()) - half, float(means.mean()) + half


def fit(
    loaded: LoadedModel,
    structure: ModelStructure,
    passages: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    seed: int,
) -> list[Fit]:
    """Fit a translator for every place but those between attention and FFN, and compare it on held-out passages.

    Passages have one length; their first token is left out. Shows its progress.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    every = places(len(structure.blocks))
    most = min(MOST_POSITIONS, TRAINING_BYTES // (4 * len(every) * _hidden(loaded)))
    states, _ = _states(loaded, structure, passages, most, generator, len(passages[0]) - 1)
    training = Training(loaded, structure, states, generator)
    with progress("Training", STEPS + len(every) - 1, "steps") as shown:
        translators = training.run(shown.advance)
    del training, states
    some = max(_OF_PASSAGE, HELD_OUT // len(held_out))
    # Drawn anew from the seed, so that other settings of the training are compared on the same positions.
    again = torch.Generator().manual_seed(seed)
    tested, passage = _states(loaded, structure, held_out, HELD_OUT, again, some)
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
    each: int,
) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """States (place, position, hidden), on the CPU, of at most ``most`` positions; and the passage of each position.

    They are of random passages, as many as are needed, and of ``each`` random positions of a passage but the first.
    """
    import torch

    length = min(each, len(passages[0]) - 1)
    n = max(1, min(len(passages), most // length))
    chosen = torch.randperm(len(passages), generator=generator)[:n].sort().values.tolist()
    at = 1 + torch.randperm(len(passages[0]) - 1, generator=generator)[:length].sort().values
    n_places = len(structure.blocks) + 1
    states = torch.empty(n_places, n, length, _hidden(loaded))
    with progress("Reading the corpus", n, "passages") as shown:
        for rows in same_length([passages[i] for i in chosen], tokens_of_states(loaded, n_places)):
            states[:, rows] = residuals(loaded, structure, [passages[chosen[i]] for i in rows])[:, :, at].cpu()
            shown.advance(len(rows))
    return states.flatten(1, 2), np.repeat(chosen, length)


# Held-out text ---------------------------------------------------------------------------------------------------


def _compared(
    loaded: LoadedModel, structure: ModelStructure, states: torch.Tensor, translators: Sequence[Translator]
) -> NDArray[np.float64]:
    """KL divergence (place, lens, position) of both lenses from the model's output, over the whole vocabulary."""
    import torch

    parts = []
    with torch.inference_mode(), progress("Judging on held-out text", states.shape[1], "tokens") as shown:
        for some in states.to(loaded.device).split(positions_at_once(loaded), dim=1):
            final = log_probabilities(read(loaded, structure, some[-1]))
            rows = [list(_divergences(loaded, structure, final, h, t)) for h, t in zip(some, translators, strict=True)]
            parts.append(torch.tensor(rows, dtype=torch.float64))
            shown.advance(some.shape[1])
    return torch.cat(parts, 2).numpy()


def _divergences(
    loaded: LoadedModel, structure: ModelStructure, final: torch.Tensor, states: torch.Tensor, translator: Translator
) -> Iterator[list[float]]:
    """KL divergences (position) of the logit lens, then of the tuned one."""
    import torch

    p = final.exp()
    for translated in (states, translator(states)):
        log_q = read(loaded, structure, translated).log_softmax(-1)
        kl: list[float] = (p * (final - log_q)).sum(1, dtype=torch.float64).clamp_min(0).tolist()
        yield kl
