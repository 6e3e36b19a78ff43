"""Check a knowledge dataset: each prompt needs one answer, and each category at least two different answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kdb.errors import DatasetError
from kdb.ingest.datasets.base import Dataset, Example


def with_one_answer(examples: Iterable[Example]) -> tuple[list[Example], int]:
    """Keep the first of repeated prompts, and drop prompts with different answers; return also the number of these.

    Prompts without a category are dropped and not counted, but their answers are compared with those of other prompts.
    """
    answers: dict[str, set[str | None]] = {}
    first: dict[str, Example] = {}
    for example in examples:
        answers.setdefault(example.text, set()).add(example.answer)
        if example.category is not None:
            first.setdefault(example.text, example)
    kept = [example for text, example in first.items() if len(answers[text]) == 1]
    return kept, len(first) - len(kept)


def check_answers(dataset: Dataset, *, limit: int | None = None) -> None:
    """Raise DatasetError if there are no prompts, or if all answers of a category are the same."""
    if not dataset.examples:
        raise DatasetError(f"Dataset {dataset.name!r} ({dataset.source}) has no prompts.")
    for category, answers in _answers(dataset.examples).items():
        if len(answers) == 1:
            raise DatasetError(_no_rival(dataset, category, answers.pop(), limit))


def _answers(examples: Sequence[Example]) -> dict[str | None, set[str | None]]:
    by_category: dict[str | None, set[str | None]] = {}
    for example in examples:
        by_category.setdefault(example.category, set()).update({example.answer, example.rival or example.answer})
    return by_category


def _no_rival(dataset: Dataset, category: str | None, answer: str | None, limit: int | None) -> str:
    where = f"Dataset {dataset.name!r} ({dataset.source})"
    why = "an answer is compared with the others of its category"
    if limit is not None:
        return (
            f"{where} has only the answer {answer!r} among the first {limit} prompts of the category {category!r}; "
            f"{why}: raise the limit."
        )
    return (
        f"{where} has only the answer {answer!r} in the category {category!r}; {why}: add prompts with another "
        "answer, or move these to another category."
    )
