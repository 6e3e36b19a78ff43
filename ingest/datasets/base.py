"""Define datasets, and put their texts into prompts."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from kdb.ingest.settings import Measuring


@dataclass(frozen=True)
class Example:
    """One text of a dataset: with a label to probe for, or with a category and the answer that continues it.

    Label 1 is the affirmative class: true, yes, positive, hateful, sarcastic. ``answer_prefix`` is the white space
    that the file has between text and answer; without it, :mod:`kdb.ingest.datasets.joining` chooses it. ``rival`` is
    the answer that this one is compared with, instead of the category's others; ``corrupt`` is the prompt that patching
    compares this one with.
    """

    text: str
    label: int | None = None
    group: str | None = None
    category: str | None = None
    relation: str | None = None
    subject: str | None = None
    answer: str | None = None
    answer_prefix: str | None = None
    rival: str | None = None
    corrupt: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of their source, and the template that makes a prompt of a text.

    `study` is 'concept' (every example has a label) or 'knowledge' (every example has an answer and a category).
    `source` names the origin of the texts in one line; it is stored, so it has no path of this machine.
    `answers` are the words for label 0 and label 1, or None if nothing is asked, as in the knowledge study.
    `ask` is the question that follows each prompt; it is empty if the template asks.
    `first_label` is the label of the first list of the published code, whose order decides its split.
    """

    name: str
    source: str
    template: str
    examples: tuple[Example, ...]
    study: str = "concept"
    answers: tuple[str, str] | None = None
    ask: str = ""
    first_label: int = 1

    @property
    def cue(self) -> str:
        """Text that follows a prompt to ask for the answer; empty if nothing is asked, or the template asks last."""
        if self.answers is None:
            return ""
        if self.ask:
            return f"\n{self.ask}" + ("" if self.ask.endswith(":") else "\nAnswer:")
        return "" if self.template.rstrip().endswith((":", "?")) else "\nAnswer:"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the parts of the examples that results depend on.

        These are text, label and group; in the knowledge study text, answer and category, and where there are any, the
        answer's prefix, rival and corrupt prompt.
        """
        digest = hashlib.sha256()
        for example in self.examples:
            # JSON in ASCII gives the same bytes on all machines, and separates the examples clearly.
            digest.update(json.dumps(self._essence(example)).encode("ascii") + b"\n")
        return digest.hexdigest()

    def _essence(self, example: Example) -> list[str | int | None]:
        if self.study == "knowledge":
            prefix = [] if example.answer_prefix is None else [example.answer_prefix]
            also = {"rival": example.rival, "corrupt": example.corrupt}
            named = [f"{name}: {value}" for name, value in also.items() if value is not None]
            return [example.text, example.answer, example.category, *prefix, *named]
        return [example.text, example.label, example.group]

    @property
    def n_positive(self) -> int | None:
        """Number of examples with label 1; None in the knowledge study, which has no labels."""
        if self.study == "knowledge":
            return None
        return sum(example.label == 1 for example in self.examples)


@dataclass(frozen=True)
class DatasetInfo:
    """One line of `kdb datasets`.

    `status` is 'built in', 'available', 'downloadable' or 'needs a file'; `where` is the folder of an
    available file, else empty.
    """

    name: str
    size: str
    source: str
    template: str
    status: str
    where: str = ""
    study: str = "concept"
    by_default: bool = True
    """Whether `kdb ingest` measures it without --dataset, if it is built in."""


def prompts(dataset: Dataset, *, noise: bool = Measuring.noise, seed: int = Measuring.seed) -> list[str]:
    """Put every text, stripped at both ends, into the template; with noise, "aaa " or "bbb " before it."""
    rng = random.Random(seed)
    return [
        dataset.template.replace("{text}", (_noise(rng) if noise else "") + example.text.strip())
        for example in dataset.examples
    ]


def _noise(rng: random.Random) -> str:
    # Of random's methods, Python guarantees only for random() the same sequence in all versions.
    return "aaa " if rng.random() < 0.5 else "bbb "


def first_of_each_class(examples: Iterable[Example], n_negative: int, n_positive: int) -> tuple[Example, ...]:
    """Keep the first `n_negative` examples with label 0 and `n_positive` with label 1, in the given order."""
    room: dict[int | None, int] = {0: n_negative, 1: n_positive}
    kept = []
    for example in examples:
        if room[example.label] > 0:
            room[example.label] -= 1
            kept.append(example)
    return tuple(kept)


def first_of_each_category(examples: Iterable[Example], n: int) -> tuple[Example, ...]:
    """Keep the first `n` examples of each category, in the given order."""
    taken: Counter[str | None] = Counter()
    kept = []
    for example in examples:
        taken[example.category] += 1
        if taken[example.category] <= n:
            kept.append(example)
    return tuple(kept)
