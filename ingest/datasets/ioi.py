"""Generate the indirect object identification dataset: which of two people is given something.

Wang et al. 2022, Interpretability in the Wild (arXiv 2211.00593), section 2: "When Mary and John went to the store,
John gave a drink to" is continued by Mary. Prompts stand in pairs that differ in the giver only, so each is the other's
corrupt prompt; both orders of the names are as frequent.
"""

from __future__ import annotations

from collections.abc import Iterator

from kdb.ingest.datasets.base import Dataset, DatasetInfo, Example

IOI = "ioi"
_SOURCE = "prompts made by kdb after Wang et al. 2022 (arXiv 2211.00593)"
_TEMPLATE = "{text}"
_N_PAIRS = 50
_CATEGORY = "indirect object"

# Common first names, a single token of most tokenizers.
_NAMES = (
    *("Mary", "John", "Tom", "James", "Anna", "Paul", "Kate", "David", "Sarah", "Mark"),
    *("Laura", "Peter", "Emma", "George", "Alice", "Robert", "Jane", "Henry", "Lisa", "Adam"),
)
_PLACES = ("store", "park", "school", "office", "station", "hospital", "restaurant")
_THINGS = ("drink", "book", "ring", "ball", "letter", "key")
_TEMPLATES = (
    "When {a} and {b} went to the {place}, {giver} gave a {thing} to",
    "Then, {a} and {b} went to the {place}. {giver} gave a {thing} to",
    "After {a} and {b} went to the {place}, {giver} gave a {thing} to",
    "While {a} and {b} were working at the {place}, {giver} gave a {thing} to",
    "Friends {a} and {b} found a {thing} at the {place}. {giver} gave it to",
)


def load_ioi() -> Dataset:
    """Generate the dataset, always in the same way."""
    return Dataset(IOI, _SOURCE, _TEMPLATE, tuple(_examples()), study="knowledge")


def ioi_info() -> DatasetInfo:
    """Describe the dataset."""
    return DatasetInfo(
        IOI, f"{_N_PAIRS} pairs of prompts", _SOURCE, _TEMPLATE, "built in", study="knowledge", by_default=False
    )


def _examples() -> Iterator[Example]:
    for number in range(_N_PAIRS):
        # Steps that share no divisor with the lengths, so that each combination comes once.
        a, b = _NAMES[7 * number % 20], _NAMES[(7 * number + 1 + 3 * (number // 20)) % 20]
        template, place = _TEMPLATES[number % 5], _PLACES[number % 7]
        for giver, receiver in ((b, a), (a, b)):
            text = template.format(a=a, b=b, giver=giver, place=place, thing=_THINGS[number % 6])
            yield Example(text, category=_CATEGORY, relation=f"pair {number}", subject=giver, answer=receiver)
