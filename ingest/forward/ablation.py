"""Set neurons or heads to zero, and measure the effect on the target.

The prompts of several interventions run in one batch, and each row has its own neurons set to zero. An ablated forward
pass computes its own norms: none is frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdb.ingest.forward.capture import batches, padded
from kdb.ingest.forward.decomposition import Decomposition
from kdb.ingest.forward.length_classes import LengthClasses, forget_longest
from kdb.ingest.forward.memory import tokens_at_once
from kdb.ingest.forward.patching import touched
from kdb.warehouse.schema import arrow_schema

if TYPE_CHECKING:
    import torch

LOGITS_BYTES = 256 * 2**20
"""Memory for the logits of one batch."""


@dataclass(frozen=True)
class Silenced:
    """Entries to set to zero, by layer: of the FFN's coefficients, and of the heads' outputs.

    ``attn`` entries are head · head size + entry.
    """

    ffn: dict[int, list[int]] = field(default_factory=dict)
    attn: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One prompt with one intervention, at its last position or everywhere.

    ``rivals`` are tokens that the target is compared with.
    """

    token_ids: Sequence[int]
    target: int
    silenced: Silenced
    everywhere: bool
    rivals: Sequence[int] = ()


@dataclass(frozen=True)
class Effects:
    """The target's rank (from 1), probability and log-probability in each trial, and whether no rival beats it, (m).

    ``rival`` (m) is the token with the largest logit among the trial's rivals, −1 without any, and ``rival_logp`` its
    log-probability.
    """

    rank: NDArray[np.int64]
    prob: NDArray[np.float64]
    logp: NDArray[np.float64]
    ahead: NDArray[np.bool_]
    rival: NDArray[np.int64]
    rival_logp: NDArray[np.float64]


def run_trials(
    decomposition: Decomposition,
    trials: Sequence[Trial],
    *,
    batch_tokens: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Effects:
    """Run all trials, in batches of similar length; results are in the order of ``trials``.

    ``on_batch`` is called after each batch with its number of trials.
    """
    import torch

    budget = batch_tokens or tokens_at_once(decomposition.loaded)
    at_most = max(1, LOGITS_BYTES // (8 * decomposition.readout.table.shape[0]))
    types = (np.int64, np.float64, np.float64, np.bool_, np.int64, np.float64)  # of the fields, in their order
    out = Effects(*(np.empty(len(trials), dtype=type_) for type_ in types))  # type: ignore[arg-type]  # one array of each type
    order = sorted(range(len(trials)), key=lambda i: -len(trials[i].token_ids))
    lengths = [len(trials[i].token_ids) for i in order]
    with torch.inference_mode():
        for batch in batches(lengths, budget, LengthClasses(decomposition.loaded.model.config)):
            for start in range(0, len(batch), at_most):
                rows = [order[i] for i in batch[start : start + at_most]]
                results = _run(decomposition, [trials[i] for i in rows])
                for field, values in zip(fields(out), results, strict=True):
                    getattr(out, field.name)[rows] = values
                if on_batch is not None:
                    on_batch(len(rows))
    return out


def _run(decomposition: Decomposition, trials: Sequence[Trial]) -> tuple[Any, ...]:
    import torch

    device, rows = decomposition.loaded.device, torch.arange(len(trials))
    ids = padded([trial.token_ids for trial in trials])
    last = torch.tensor([len(t.token_ids) - 1 for t in trials])
    forget_longest(decomposition.loaded)
    with _silencing(decomposition, trials, last):
        hidden = decomposition.structure.decoder(ids.to(device), use_cache=False)[0]
    # The decoder has applied the final norm. The rest of the readout is linear, except for the soft cap.
    logits = decomposition.structure.unembed_normed(hidden[rows, last])
    own = logits.gather(1, torch.tensor([[t.target] for t in trials], device=device))
    rank, logp, total = standing(logits, own)
    others = [list(t.rivals) for t in trials]
    rival = torch.tensor([ids[int(logits[i, ids].argmax())] if ids else -1 for i, ids in enumerate(others)])
    beside = logits[rows, rival.clamp_min(0)].double()
    rival_logp = (beside - total).masked_fill(rival < 0, torch.nan)
    ahead = (own[:, 0] > beside) | (rival < 0)
    return tuple(x.cpu().numpy() for x in (rank, logp.exp(), logp, ahead, rival, rival_logp))


def standing(logits: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rank (row), log-probability (row) and log-sum-exp (row) of tokens with the logits ``own`` (row, 1) among all."""
    total = logits.double().logsumexp(1)
    rank = 1 + (logits > own).sum(1)
    return rank, own[:, 0].double() - total, total


@contextlib.contextmanager
def _silencing(decomposition: Decomposition, trials: Sequence[Trial], last: torch.Tensor) -> Iterator[None]:
    """Set each trial's entries to zero, in the inputs of the projections that read them."""
    shape = (len(trials), max(len(t.token_ids) for t in trials))
    with contextlib.ExitStack() as stack:
        for component, kind in (("ffn_neuron", "ffn"), ("head", "attn")):
            zero = {
                layer: _zero([getattr(t.silenced, kind).get(layer, []) for t in trials], trials, last)
                for layer in sorted({layer for t in trials for layer in getattr(t.silenced, kind)})
            }

            def touch(
                _component: str, layer: int, states: torch.Tensor, zero: dict[int, Any] = zero
            ) -> torch.Tensor | None:
                changed: torch.Tensor = zero[layer](states)
                return changed

            stack.enter_context(touched(decomposition, [component], shape, touch, list(zero)))
        yield


def _zero(
    entries: Sequence[Sequence[int]], trials: Sequence[Trial], last: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    n = len(trials)
    everywhere = [(row, entry) for row in range(n) if trials[row].everywhere for entry in entries[row]]
    at_last = [(row, int(last[row]), entry) for row in range(n) if not trials[row].everywhere for entry in entries[row]]

    def zeroed(states: torch.Tensor) -> torch.Tensor:
        states = states.clone()
        if everywhere:
            row, entry = torch.tensor(everywhere, device=states.device).T
            states[row, :, entry] = 0
        if at_last:
            row, position, entry = torch.tensor(at_last, device=states.device).T
            states[row, position, entry] = 0
        return states

    return zeroed


@dataclass(frozen=True)
class Chosen:
    """A set of entries to replace, and what ``ablations`` says about it in every prompt; see its columns."""

    method: str
    silenced: Silenced
    k: int
    control_of: str | None = None
    control_ratio: float | None = None
    held_out: bool | None = None


@dataclass(frozen=True)
class Intervention:
    """A set of entries to set to zero in one prompt, at its last position or at all."""

    prompt_id: int
    token_ids: Sequence[int]
    target: int
    positions: str
    chosen: Chosen


def intervene(
    decomposition: Decomposition,
    interventions: Sequence[Intervention],
    *,
    batch_tokens: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> pa.Table:
    """Build rows of ``ablations``: the target before and after each intervention, in the order of ``interventions``.

    The untouched model runs through the same code, so that only the intervention differs.
    """
    untouched = {i.prompt_id: Trial(i.token_ids, i.target, Silenced(), everywhere=False) for i in interventions}
    before_of = {prompt: index for index, prompt in enumerate(untouched)}
    trials = [Trial(i.token_ids, i.target, i.chosen.silenced, i.positions == "all") for i in interventions]
    effects = run_trials(decomposition, [*untouched.values(), *trials], batch_tokens=batch_tokens, on_batch=on_batch)
    at = list(zip(effects.rank.tolist(), effects.prob.tolist(), effects.logp.tolist(), strict=True))
    rows = [
        ablation_row(i.prompt_id, i.chosen, i.positions, "zero", at[before_of[i.prompt_id]], at[after])
        for after, i in enumerate(interventions, start=len(untouched))
    ]
    return pa.Table.from_pylist(rows, arrow_schema("ablations"))


Answer = tuple[int, float, float]
"""Rank, probability and log-probability of the target."""


def ablation_row(
    prompt_id: int, chosen: Chosen, positions: str, mode: str, before: Answer, after: Answer
) -> dict[str, Any]:
    """A row of ``ablations``."""
    described = {f.name: getattr(chosen, f.name) for f in fields(chosen) if f.name != "silenced"}
    row = {"prompt_id": prompt_id, "positions": positions, "mode": mode, **described}
    for when, answer in (("before", before), ("after", after)):
        row |= {f"{name}_{when}": value for name, value in zip(("rank", "prob", "logp"), answer, strict=True)}
    return row
