"""Decide what the model is asked about each text: by the dataset's own template, or by a question of the user.

asking(dataset, "Is it true?", "no,yes", own_template=False)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdb.errors import DatasetError
from kdb.ingest.datasets.base import Dataset


def asking(dataset: Dataset, ask: str | None, answers: str | Sequence[str] | None, *, own_template: bool) -> Dataset:
    """Return a dataset with the user's question and answers; raise DatasetError if they cannot be used.

    With a template of the user (``own_template``), the dataset's own question is gone, and the template may itself ask.
    Nothing is guessed: without answers, the model is not asked.
    """
    if ask is None and answers is None:
        return replace(dataset, answers=None) if own_template else dataset
    where = f"Dataset {dataset.name!r}"
    if dataset.study == "knowledge":
        raise DatasetError(f"{where} has prompts that their answers continue. Leave --ask and --answers out.")
    if dataset.answers is not None and not own_template:
        raise DatasetError(f"{where} asks a question of its own. Leave --ask and --answers out, or add --template.")
    if answers is None:
        raise DatasetError("--ask needs the two answers: add --answers, label 0's word first, such as no,yes.")
    if ask is None and not own_template:
        raise DatasetError("--answers needs a question: add --ask, such as 'Is it true?', or a --template that asks.")
    if ask is not None and not ask.strip():
        raise DatasetError("--ask is blank: write a question, such as 'Is it true?'.")
    return replace(dataset, ask=(ask or "").strip(), answers=_pair(answers))


def _pair(answers: str | Sequence[str]) -> tuple[str, str]:
    words = [word.strip() for word in (answers.split(",") if isinstance(answers, str) else answers)]
    if len(words) != 2 or not all(words) or words[0].lower() == words[1].lower():
        raise DatasetError(
            f"--answers: expected two different words, label 0's first, such as no,yes; found {answers!r}."
        )
    return words[0], words[1]
