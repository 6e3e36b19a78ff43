"""Find the best neurons of each category: those with the largest mean scores over all its kept prompts, with proof.

A prompt's list holds its best neurons. What other neurons score in that prompt is unknown, but bounded
(`Neurons.most`), and the sums of these bounds over a category say which neurons may be among its best. These
candidates are scored in every prompt, and no other neuron's sum can reach that of the last proved rank. See
docs/certificate.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kdb.ingest.attribution.score_rows import layouts_of
from kdb.ingest.forward.activation_cache import run_with_cache
from kdb.ingest.forward.layout import named_slots
from kdb.ingest.prompts import Prompt
from kdb.ingest.rows import arrow_rows
from kdb.queries.domains import PROVED_RANKS
from kdb.warehouse.schema import NEURON

if TYPE_CHECKING:
    import torch

    from kdb.ingest.attribution.scores import Attribution, Neurons
    from kdb.ingest.forward.decomposition import Decomposition
    from kdb.ingest.stages import RunInProgress

FIRST = 64
"""Number of candidates that are scored first: usually more than the bounds leave open."""

BOUNDS = "_neuron_bounds"
"""Working table of a run in progress: category, component, and the largest sum that each neuron may have."""

Key = tuple[str, str]
"""Category and component."""

Wanted = Mapping[str, Sequence[int]]
"""Neurons of each component, by their index: layers, then heads, then neurons."""


def bound_rows(categories: Sequence[str], neurons: Mapping[str, Neurons]) -> pa.Table:
    """Rows of the working table for a chunk of prompts, from the neurons of each component."""
    rows: list[dict[str, Any]] = []
    for category in sorted(set(categories)):
        here = [i for i, own in enumerate(categories) if own == category]
        rows += [
            {"category": category, "component": component, "most": of.most[here].sum(0).cpu().numpy()}
            for component, of in neurons.items()
        ]
    kinds = {"category": pa.string(), "component": pa.string(), "most": pa.list_(pa.float64())}
    return pa.Table.from_pylist(rows, pa.schema(kinds))


def first_candidates(run: RunInProgress) -> dict[Key, list[int]]:
    """Neurons of each category and component with the largest bounds."""
    return {key: _largest(most) for key, most in _bounds(run).items()}


def further_candidates(run: RunInProgress) -> dict[Key, list[int]]:
    """Neurons outside the first candidates whose bounds do not exclude that they have a proved rank."""
    reached, further = _reached(run), {}
    for key, most in _bounds(run).items():
        open_ = np.flatnonzero(~(most <= reached.get(key, -np.inf)))  # or NaN
        if len(left := np.setdiff1d(open_, _largest(most))):
            further[key] = left.tolist()
    return further


def _largest(most: np.ndarray) -> list[int]:
    best = np.argsort(-most, kind="stable")[:FIRST]
    return sorted(best[most[best] > -np.inf].tolist())


def _bounds(run: RunInProgress) -> dict[Key, np.ndarray]:
    """The largest sum over a category's kept prompts that each neuron may have."""
    bounds: dict[Key, np.ndarray] = {}
    for row in run.table(BOUNDS).to_pylist():
        key = row["category"], row["component"]
        bounds[key] = bounds.get(key, 0.0) + np.array(row["most"])
    # A bound of exactly 0: the neuron wrote nothing in any prompt, such as those of experts that were never chosen.
    return {key: np.where(most == 0, -np.inf, most) for key, most in bounds.items()}


def _reached(run: RunInProgress) -> dict[Key, float]:
    """The sum that as many candidates as there are proved ranks certainly reach, by category and component."""
    import polars as pl

    neuron = ["category", *NEURON]
    scores = pl.DataFrame(run.table("candidate_scores"))
    prompts = pl.DataFrame(run.table("prompts").select(["prompt_id", "category"]))
    sums = scores.join(prompts, on="prompt_id").group_by(neuron).agg(pl.col("lower").sum())
    ranked = sums.group_by("category", "component").agg(pl.col("lower").top_k(PROVED_RANKS))
    enough = ranked.filter(pl.col("lower").list.len() == PROVED_RANKS)
    return {(category, component): min(lower) for category, component, lower in enough.iter_rows()}


def candidate_rows(decomposition: Decomposition, chunk: Sequence[Prompt], wanted: Wanted) -> pa.Table:
    """Rows of ``candidate_scores``: the score of each wanted neuron in each prompt, summed over positions."""
    import torch

    from kdb.ingest.attribution.scores import Attribution

    device = decomposition.loaded.device
    widths = {"attn": decomposition.n_heads * decomposition.head_size, "ffn": len(decomposition.ffn_columns(0))}
    layers = {c: sorted({i // width for i in wanted.get(c, ())}) for c, width in widths.items()}
    cache = run_with_cache(decomposition, [p.token_ids for p in chunk])
    target = torch.tensor([p.target for p in chunk], device=device)
    a = Attribution(decomposition, cache, target, layers)
    ids = np.array([p.number for p in chunk], dtype=np.int32)
    entries = decomposition.head_size
    with torch.inference_mode():
        return pa.concat_tables(
            _rows(ids, a, component, torch.tensor(neurons, device=device), widths[component], entries)
            for component, neurons in sorted(wanted.items())
        )


def _rows(ids: Any, a: Attribution, component: str, neurons: torch.Tensor, width: int, entries: int) -> pa.Table:
    score, error = (a.ffn_nearly if component == "ffn" else a.attn_nearly)(neurons)
    within = neurons % width
    if component == "ffn":
        every = (x.expand(len(ids), -1) for x in (neurons // width, within))
        named = named_slots(layouts_of(a.decomposition), *every)
    else:
        named = {"head": within // entries, "neuron": within % entries}
    return arrow_rows(
        "candidate_scores",
        {
            "prompt_id": ids[:, None],
            "component": component,
            "layer": neurons // width,
            **named,
            "score": score,
            "lower": score - error,
            "upper": score + error,
        },
    )


def by_category(candidates: Mapping[Key, Sequence[int]]) -> Iterator[tuple[str, Wanted]]:
    """Each category that has candidates, with them."""
    for category in sorted({category for category, _component in candidates}):
        yield category, {component: some for (of, component), some in candidates.items() if of == category}
