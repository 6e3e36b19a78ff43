"""Replace a whole set of neurons or heads at the last position, and measure the answer (table ``ablations``).

    rows = set_rows(category, {0: [Chosen("mine", Silenced(ffn={5: [123]}), 1)]}, "mean")

The values that take their place are those of effects: zero, the mean over the category's other kept prompts, or the
value in the next of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from kdb.ingest.attribution.effects import Category
from kdb.ingest.forward.ablation import Answer, Chosen, Silenced, ablation_row, standing
from kdb.ingest.forward.patching import Pass, Together, run_patched
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
