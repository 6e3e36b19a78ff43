"""Lens readouts of the kept prompts of a stored run, at their last or at every position (`kdb lens`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdb.ingest.attribution.effects import Known
from kdb.ingest.forward.patching import same_length
from kdb.ingest.forward.readouts import (
    Place,
    log_probabilities,
    places,
    positions_at_once,
    read,
    readouts,
    residuals,
    texts_of,
    tokens_of_states,
)
from kdb.warehouse.schema import arrow_schema

if TYPE_CHECKING:
    import torch

    from kdb.ingest.forward.decomposition import Decomposition
    from kdb.ingest.forward.lens_training import Translators


def prompt_rows(
    decomposition: Decomposition,
    prompts: Sequence[Known],
    positions: str,
    translators: Translators | None = None,
) -> Iterator[pa.Table]:
    """Yield rows of ``lens_readouts`` for some prompts, of which those of one length are run together.

    ``positions`` are 'last' or 'all'. With translators, they are rows of the tuned lens: at the places that have one,
    and not at the first position, whose states are unlike all others.
    """
    blocks = None if translators is not None else decomposition.blocks
    every = places(len(decomposition.blocks), blocks)
    for rows in same_length([p.token_ids for p in prompts], tokens_of_states(decomposition.loaded, len(every))):
        some = [prompts[i] for i in rows]
        loaded, structure = decomposition.loaded, decomposition.structure
        states = residuals(loaded, structure, [p.token_ids for p in some], blocks)
        last = states.shape[2] - 1
        first = last if positions == "last" else 0
        at = [(i, p) for i in range(len(some)) for p in range(first, last + 1) if translators is None or p > 0]
        size = positions_at_once(loaded)
        for start in range(0, len(at), size):
            yield _table(decomposition, some, states, at[start : start + size], every, translators)


def _table(
    decomposition: Decomposition,
    prompts: Sequence[Known],
    states: torch.Tensor,
    at: Sequence[tuple[int, int]],
    every: Sequence[Place],
    translators: Translators | None,
) -> pa.Table:
    """Rows of positions ``at`` (prompt, position) of the states (place, prompt, position, hidden)."""
    import torch

    loaded, structure, rows = decomposition.loaded, decomposition.structure, list[dict[str, Any]]()
    text, lens = texts_of(loaded.tokenizer), "logit" if translators is None else "tuned"
    here = states[:, [i for i, _p in at], [p for _i, p in at]]
    named = [{"prompt_id": prompts[i].number, "position": p, "token": text(prompts[i].token_ids[p])} for i, p in at]
    target, rival = [prompts[i].target for i, _p in at], [prompts[i].rival for i, _p in at]
    with torch.inference_mode():
        final = log_probabilities(read(loaded, structure, here[-1]))
        for place, resid in zip(every, here, strict=True):
            if translators is not None and place not in translators:
                continue
            logits = read(loaded, structure, resid if translators is None else translators[place](resid))
            of_place = {"layer": place[0], "place": place[1], "lens": lens}
            found = readouts(logits, final, target, rival, text)
            rows += [one | of_place | row for one, row in zip(named, found, strict=True)]
    return pa.Table.from_pylist(rows, arrow_schema("lens_readouts"))
