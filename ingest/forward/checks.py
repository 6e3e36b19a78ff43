"""Compare measured values with the untouched model, and refuse a run whose difference rounding does not explain."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdb.errors import ModelError
from kdb.ingest.forward.length_classes import forget_longest
from kdb.ingest.models.guard import not_finite
from kdb.ingest.models.trace import without_cache

if TYPE_CHECKING:
    import torch

    from kdb.ingest.forward.capture import Capture
    from kdb.ingest.models.find import LoadedModel
    from kdb.ingest.models.structure import ModelStructure

log = logging.getLogger(__name__)

CHECK_PROMPTS = 8
"""Prompts on which each run is compared with the untouched model."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 2e-2}
"""Largest relative difference of a last state, a sum, a logit or a probability that rounding explains, by dtype."""

STATES_TOLERANCE = TOLERANCE | {"bfloat16": 0.3, "float16": 4e-2}
"""Largest relative difference of the states of all layers that rounding explains (``benchmarks/batches.py``)."""

READOUT_KL_TOLERANCE = {"float32": 1e-8, "bfloat16": 5e-3, "float16": 5e-5}
"""Largest KL divergence, in nats, of the frozen readout: 35 times and more what rounding made of two real models and
tiny ones of 19 architectures (8e-13, 1.4e-4, 5.5e-7), since larger models have larger logits."""

IDENTITY_TOLERANCE = 1e-4
"""Largest part of a log-probability, in nats, that layer scores may leave unexplained in float32; two real models leave
1.2e-5."""

_NEVER_REFUSED = ("layer_score_sum",)
"""Checks whose failure is stored and reported, but refuses no model: rounding grows with layers and logits."""

DETAIL = {
    "resid_post": "largest ‖captured − untouched‖ / ‖untouched‖ over layers, batched with padding, cue and shared "
    "prefix against one prompt at a time",
    "final_norm": "the same for the last layer, after the final norm",
    "readout": "the same for the logits that the last captured state gives",
    "readout_kl": "KL divergence, in nats, of those logits from the model's own",
    "stored_states": "largest ‖stored − untouched‖ / ‖untouched‖ over layers, in the batches of the run against one "
    "prompt at a time",
    "stored_answers": "largest |stored − untouched| probability of an answer, in the batches of the run against one "
    "prompt at a time",
    "stored_probs": "largest |stored − untouched| probability of a target, in the batches of the run against one "
    "prompt at a time",
    "logits": "largest |logit − the model's own| / spread of the model's own logits",
    "logits_kl": "KL divergence, in nats, of the recorded logits from the model's own",
    "residual_sum": "‖block output − (input + attention + FFN + mixer)‖ / ‖block output‖, largest over blocks and "
    "positions",
    "head_sum": "‖attention contribution − (heads + biases)‖ / ‖heads and biases, norms added‖, largest over layers",
    "ffn_sum": "‖FFN contribution − (neurons + biases)‖ / ‖neurons and biases, norms added‖, largest over layers",
    "value_keys": "the same for a head's values, read through the value projection found",
    "ffn_keys": "the same for what the projection that makes the FFN's neurons fire gives",
    "frozen_readout": "largest |logit of the frozen, linear readout − recorded logit| / spread of the logits",
    "frozen_readout_kl": "KL divergence, in nats, of the frozen, linear readout from the recorded logits",
    "head_positions": "layers whose attention weights cannot be read: their heads have scores, but none by position, "
    "and no attention neurons",
    "ffn_neurons": "layers whose FFN is no activation times linear maps of its input: they have a layer score, and no "
    "FFN neurons",
    "layer_score_sum": "largest |log p(target) − sum of layer scores − log p(target) at the embedding|, in nats",
}
"""Definition of each check, as it is stored."""


def check_row(check: str, values: Sequence[float], loaded: LoadedModel, n_prompts: int) -> dict[str, Any]:
    """Build the row of ``checks`` for the largest of some differences.

    Raises ModelError if it is larger than the rounding of the weights' dtype explains.
    """
    value = float(np.max(values, initial=0))  # unlike Python's max, NumPy's keeps a NaN
    tolerance = _tolerance(check, loaded.dtype)
    if not np.isfinite(value):
        raise not_finite(loaded.source.name, loaded.dtype, f"the check {check}")
    if not value <= tolerance:
        off = f"{check} is off by {value:.2g}, and {loaded.dtype} explains {tolerance:.2g} ({DETAIL[check]})."
        if check not in _NEVER_REFUSED:
            raise ModelError(f"{loaded.source.name} cannot be measured: {off}")
        log.warning("%s: %s", loaded.source.name, off)
    detail = f"{DETAIL[check]}; {n_prompts} prompts, {loaded.dtype}"
    return {"check": check, "value": value, "tolerance": tolerance, "passed": value <= tolerance, "detail": detail}


def _tolerance(check: str, dtype: str) -> float:
    if check == "layer_score_sum":
        return IDENTITY_TOLERANCE
    if check == "frozen_readout_kl":
        return READOUT_KL_TOLERANCE[dtype]
    return (STATES_TOLERANCE if check in ("resid_post", "stored_states") else TOLERANCE)[dtype]


def kl_divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """KL divergence, in nats, of one distribution from another, given as logits (…, vocab); the largest of several."""
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).abs().max())


def untouched(loaded: LoadedModel, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one prompt alone and without hooks; return hidden states (layer + 1, hidden) and logits (vocab).

    Both are those of the last token. transformers applies the final norm to the last of the states. Models with several
    residual streams report states of several shapes, which only ``untouched_states`` reads.
    """
    import torch

    states, logits = _reported(loaded, token_ids)
    return torch.stack([state[0, -1].float() for state in states]), logits


def _reported(loaded: LoadedModel, token_ids: Sequence[int]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Run one prompt alone; return its hidden states, as transformers reports them, and the last token's logits."""
    import torch

    forget_longest(loaded)
    with torch.inference_mode():
        ids = torch.tensor([list(token_ids)], device=loaded.device)
        # Logits of all positions would take a gigabyte for a thousand tokens and a vocabulary of 262,144.
        last = {"logits_to_keep": 1} if "logits_to_keep" in signature(loaded.model.forward).parameters else {}
        output = loaded.model(ids, output_hidden_states=True, **without_cache(loaded.model), **last)
    return tuple(output.hidden_states), output.logits[0, -1].float()


def untouched_states(
    loaded: LoadedModel, structure: ModelStructure, token_ids: Sequence[int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run one prompt as ``untouched`` does; return the last token's state (hidden) after each block, and its logits.

    The last of the states has been through ``structure.last_state``.
    """
    states, logits = _reported(loaded, token_ids)
    first, n = structure.first_state, len(structure.blocks)
    ours = (*states[first : first + n - 1], states[-1])
    return [structure.layout.reported(state)[0, -1].float() for state in ours], logits


def untouched_logits(loaded: LoadedModel, structure: ModelStructure, token_ids: Sequence[int]) -> torch.Tensor:
    """Run one prompt alone and without hooks; return the logits (vocab) of its last state, read out in float32."""
    import torch

    states, _own = untouched_states(loaded, structure, token_ids)
    with torch.inference_mode():
        return structure.unembed_normed(structure.after_last_state(states[-1].to(getattr(torch, loaded.dtype))))


def chosen_prompts(token_ids: Sequence[Sequence[int]]) -> list[int]:
    """Choose the prompts on which a run is checked: the shortest, the longest, the last, one with the rarest token.

    The first prompts are added until there are ``CHECK_PROMPTS``.
    """
    counts = Counter(itertools.chain.from_iterable(token_ids))
    indices = range(len(token_ids))
    by_length = sorted(indices, key=lambda i: len(token_ids[i]))
    # Among equally rare tokens, take the one with the highest id: vocabularies list frequent tokens first.
    rarest = min(counts, key=lambda token: (counts[token], -token))
    rare = next(i for i in indices if rarest in token_ids[i])
    return list(dict.fromkeys([by_length[0], by_length[-1], indices[-1], rare, *indices]))[:CHECK_PROMPTS]


def check_capture(
    capture: Capture, token_ids: Sequence[Sequence[int]], prefix: Sequence[int] = (), cue: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Compare batched capture and readout with the untouched model; return rows of ``checks``.

    Raises ModelError if a difference is larger than the rounding of the weights' dtype explains.
    """
    import torch

    loaded, dtype = capture.loaded, getattr(torch, capture.loaded.dtype)
    vectors = torch.from_numpy(capture.vectors_and_ends(token_ids, prefix, cue)[0]).to(loaded.device)
    errors: dict[str, list[float]] = {"resid_post": [], "final_norm": [], "readout": [], "readout_kl": []}
    for resid, ids in zip(vectors[:, :, 0], token_ids, strict=True):
        states, logits = untouched_states(loaded, capture.structure, ids)
        off = _off(capture, resid, states)
        with torch.inference_mode():
            read = capture.structure.readout(resid[-1].to(dtype)).to(dtype).float()  # rounded as the model's own are
        errors["resid_post"].extend(off[:-1])
        errors["final_norm"].append(off[-1])
        errors["readout"].append(_relative(read, logits))
        errors["readout_kl"].append(kl_divergence(logits, read))
    return [check_row(name, of, loaded, len(token_ids)) for name, of in errors.items()]


def check_stored(
    capture: Capture, token_ids: Sequence[Sequence[int]], states: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """Compare the stored states (prompt, layer, hidden) of some prompts with the untouched model.

    Returns rows of ``checks``. Raises ModelError if a difference is larger than the rounding of the weights' dtype
    explains.
    """
    import torch

    alone = (untouched_states(capture.loaded, capture.structure, ids)[0] for ids in token_ids)
    stored = torch.from_numpy(states).to(capture.loaded.device)
    off = [value for resid, own in zip(stored, alone, strict=True) for value in _off(capture, resid, own)]
    return [check_row("stored_states", off, capture.loaded, len(token_ids))]


def _off(capture: Capture, resid: torch.Tensor, states: Sequence[torch.Tensor]) -> list[float]:
    """Relative difference of each block output (layer, hidden) from the untouched model's, the last one normed."""
    import torch

    with torch.inference_mode():
        last = capture.structure.last_state(resid[-1].to(getattr(torch, capture.loaded.dtype))).float()
    return [*map(_relative, resid[:-1], states[:-1]), _relative(last, states[-1])]


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
