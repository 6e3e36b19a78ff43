"""Replace a whole set of neurons or heads at the last position, and measure the answer (table ``ablations``).

    rows = set_rows(category, {0: [Chosen("mine", Silenced(ffn={5: [123]}), 1)]}, "mean")

The values that take their place are those of effects: zero, the mean over the category's other kept prompts, or the
value in the next of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdb.ingest.attribution.effects import Category
from kdb.ingest.attribution.patch import Patched, known, shards_of
from kdb.ingest.forward.ablation import Answer, Chosen, Silenced, ablation_row, standing
from kdb.ingest.forward.layout import FfnLayout, stored_layouts
from kdb.ingest.forward.memory import most_per_shard
from kdb.ingest.forward.patching import Pass, Together, run_patched
from kdb.ingest.rows import Rows, timed
from kdb.ingest.stages import Advance, RunInProgress, Shard
from kdb.warehouse.schema import arrow_schema

if TYPE_CHECKING:
    import torch

_PARTS = (("ffn_neuron", "ffn"), ("head", "attn"))
"""Components, and the field of ``Silenced`` with the entries of each."""


def set_rows(category: Category, chosen: Mapping[int, Sequence[Chosen]], mode: str) -> pa.Table:
    """Rows of ``ablations`` for the sets chosen for each prompt, given by index.

    A prompt has no row if it is the only one of its category and has no mean or next prompt.
    """
    passes: list[Pass] = []
    patches: list[Together] = []
    keys: list[tuple[int, Chosen]] = []
    for i, some in chosen.items():
        prompt = category.prompts[i]
        for one in some:
            patch = _together(category, i, one.silenced, mode, of=len(passes))
            if patch is not None:
                patches.append(patch)
                keys.append((prompt.number, one))
        passes.append(Pass(prompt.token_ids, (len(prompt.token_ids) - 1,), prompt.target))
    before: dict[int, Answer] = {}
    after: dict[int, Answer] = {}
    for numbers, rows, prompts, logits in run_patched(category.decomposition, passes, patches):
        untouched = _answers(prompts.logits, prompts.target)
        before |= {n: untouched[row] for n, row in zip(numbers, rows, strict=True)}
        after |= zip(numbers, _answers(logits, prompts.target[rows]), strict=True)
    found = [ablation_row(*key, "last", mode, before[n], after[n]) for n, key in enumerate(keys)]
    return pa.Table.from_pylist(found, arrow_schema("ablations"))


def _together(category: Category, i: int, silenced: Silenced, mode: str, *, of: int) -> Together | None:
    values: dict[tuple[str, int], tuple[list[int], torch.Tensor]] = {}
    for component, part in _PARTS:
        entries = getattr(silenced, part)
        if entries:
            new = category.replacement(i, "last", component, mode)
            if new is None:
                return None
            values |= {(component, layer): (some, new[layer][:, some]) for layer, some in entries.items()}
    return Together(of, values)


def _answers(logits: torch.Tensor, target: torch.Tensor) -> list[Answer]:
    rank, logp, _total = standing(logits, logits.gather(1, target[:, None]))
    return list(zip(rank.tolist(), logp.exp().tolist(), logp.tolist(), strict=True))


# The comparison of methods of a knowledge run ---------------------------------------------------------------------


def method_shards(run: RunInProgress) -> list[Shard]:
    """The kept prompts of a knowledge run by category, with each method's best neurons of each prompt."""
    kept = [row for row in run.table("prompts").to_pylist() if row["kept"]]
    if not kept or not run.files("ablated_parts"):
        return []
    [model] = run.table("models").to_pylist()
    experts = run.table("experts").to_pylist() if run.files("experts") else []
    chosen = _methods_by_prompt(run.table("ablated_parts").to_pylist(), stored_layouts(model, experts))
    most = max(len(some) for some in chosen.values())
    flops = 2 * model["n_params"] * (2 * max(row["n_tokens"] for row in kept) + most)
    size = run.remembered("method means", lambda: most_per_shard(run.device, flops))
    numbers: dict[str, list[int]] = {}
    for row in kept:
        numbers.setdefault(row["category"], []).append(row["prompt_id"])
    # Another name than the parts of the attribution stage, which writes the rows of zero to this table.
    return shards_of(
        [known(row) for row in kept], size, lambda category: {n: chosen[n] for n in numbers[category]}, name="mean"
    )


def _methods_by_prompt(rows: Sequence[Mapping[str, Any]], layouts: Sequence[FfnLayout]) -> dict[int, list[Chosen]]:
    ffn: dict[tuple[int, str], dict[int, list[int]]] = {}
    for row in rows:
        layers = ffn.setdefault((row["prompt_id"], row["method"]), {})
        layers.setdefault(row["layer"], []).append(layouts[row["layer"]].slot(row["expert"], row["neuron"]))
    chosen: dict[int, list[Chosen]] = {}
    for (prompt, method), layers in ffn.items():
        k = sum(map(len, layers.values()))
        chosen.setdefault(prompt, []).append(Chosen(method, Silenced(ffn=layers), k))
    return chosen


def mean_rows(subject: Patched, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of ``ablations`` with mode mean for one shard; advances by prompts."""
    begun, some = time.monotonic(), shard.work
    chosen = {i: some.wanted[some.prompts[i].number] for i in some.indices}
    yield timed("ablations", [set_rows(subject.category(some.prompts), chosen, "mean")], begun)
    advance(len(some.indices))
