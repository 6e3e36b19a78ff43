"""Notes that stand beside numbers wherever they are shown; listing figures needs them without any mathematics."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

CAVEAT = (
    "J and C are the paper's, of its probe and split (logistic-raw, paper) unless others are asked for. By chance "
    "alone, most flat curves of 100 test prompts have a J, and on real ones C is nearly always one of the last two "
    "layers."
)
"""Warning beside every J and C."""

FEW = "no interval below five prompts, or where all but a few prompts have the same score"
"""Reason for which the interval of a mean over prompts is NULL."""


EFFECTS = "Effects are stored by `kdb ingest` and `kdb patch`; runs of older versions have none."
"""Sentence in place of effects that are not stored."""

READOUTS = (
    "Readouts of every layer are stored by `kdb ingest`, and by `kdb lens` for every position or a tuned lens; runs of "
    "older versions have none."
)
"""Sentence in place of readouts that are not stored."""

MEANS = (
    "Scores are means over the n_prompts kept prompts of a dataset, or over all n_kept where that column stands; each "
    "dataset has its own ranking, unless the parameter pool adds them up."
)
"""Note beside every table of means over prompts."""

_COUNTS = ("n_prompts", "n_prompts_a", "n_prompts_b")
_CHANCE = {"shared_by_chance": "shared", "jaccard_by_chance": "Jaccard index"}


def sample(numbers: pl.DataFrame) -> list[str]:
    """Return lines that name the datasets of a figure, its numbers of prompts, and the level of overlaps by chance."""
    names = numbers["dataset"].unique(maintain_order=True).to_list()
    lines = textwrap.wrap(f"dataset{'s' * (len(names) > 1)}: {', '.join(names)}", 100)
    counts = [n for name in _COUNTS if name in numbers.columns for n in numbers[name].to_list()]
    if counts:
        lines[-1] += f"; n = {_span(counts, '')} prompts"
    shown = {label: numbers[name].drop_nulls().to_list() for name, label in _CHANCE.items() if name in numbers.columns}
    chance = [f"{label} {_span(values, '.2g')}" for label, values in shown.items()]
    return lines + [f"by chance: {', '.join(chance)}"] * bool(chance)


def _span(values: Sequence[float], form: str) -> str:
    """Return the range of some numbers; a question mark if none is known."""
    ends = dict.fromkeys(format(end(values), form) for end in (min, max)) if values else {"?": None}
    return " to ".join(ends)
