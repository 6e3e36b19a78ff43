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

_COUNTS = {
    **dict.fromkeys(("n_prompts", "n_prompts_a", "n_prompts_b", "n"), "prompts"),
    "n_test": "test prompts",
}
"""Columns with numbers of prompts, and what they count."""

_CHANCE = {"shared_by_chance": "shared", "jaccard_by_chance": "Jaccard index"}
_WIDTH = 100
"""Characters in a line of a subtitle."""


def sample(numbers: pl.DataFrame, variants: Sequence[str]) -> list[str]:
    """Return lines that name the models, datasets and variants of a figure, and its numbers of prompts.

    A further line says how probes were fitted, and one how much would overlap by chance, where a figure shows that.
    """
    of = [_named("dataset", _names(numbers, "source_dataset", "dataset")), *_n(numbers), _named("variant", variants)]
    probe = [_named(name, _names(numbers, name)) for name in ("classifier", "split", "site") if name in numbers.columns]
    lines = [_named("model", _names(numbers, "model")), "; ".join(of), *filter(None, ["; ".join(probe)])]
    shown = {label: numbers[name].drop_nulls().to_list() for name, label in _CHANCE.items() if name in numbers.columns}
    chance = [f"{label} {_span(values, '.2g')}" for label, values in shown.items()]
    lines += [f"by chance: {', '.join(chance)}"] * bool(chance)
    return [short for line in lines for short in textwrap.wrap(line, _WIDTH, break_on_hyphens=False)]


_MOST_NAMES = 12
"""Maximum number of names in a subtitle; the others are counted."""


def _named(what: str, names: Sequence[str]) -> str:
    others = len(names) - _MOST_NAMES
    listed = ", ".join(names[:_MOST_NAMES]) + (f" and {others} others" if others > 0 else "")
    return f"{what}{'s' * (len(names) > 1)}: {listed}"


def _names(numbers: pl.DataFrame, *columns: str) -> list[str]:
    """Return the different values of these columns, in order of appearance."""
    found = [numbers[name].drop_nulls().unique(maintain_order=True).to_list() for name in columns if name in numbers]
    return list(dict.fromkeys(name for names in found for name in names))


def _n(numbers: pl.DataFrame) -> list[str]:
    """Say how many prompts the numbers are of; rows of single prompts are counted."""
    counted = [name for name in _COUNTS if name in numbers.columns]
    if not counted and "prompt_id" in numbers.columns:
        return [f"n = {numbers['prompt_id'].n_unique()} prompts"]
    counts = [n for name in counted for n in numbers[name].drop_nulls().to_list()]
    return [f"n = {_span(counts, '')} {_COUNTS[counted[0]]}"] if counted else []


def _span(values: Sequence[float], form: str) -> str:
    """Return the range of some numbers; a question mark if none is known."""
    ends = dict.fromkeys(format(end(values), form) for end in (min, max)) if values else {"?": None}
    return " to ".join(ends)
