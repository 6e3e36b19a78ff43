"""List the datasets that have a name, and load one of them or a user's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdb.errors import DatasetError, UnknownNameError
from kdb.ingest.datasets import fetch
from kdb.ingest.datasets.answers import check_answers
from kdb.ingest.datasets.asking import asking
from kdb.ingest.datasets.base import Dataset, DatasetInfo, first_of_each_category, first_of_each_class
from kdb.ingest.datasets.builtin import BUILT_IN, builtin_info, load_builtin
from kdb.ingest.datasets.ioi import IOI, ioi_info, load_ioi
from kdb.ingest.datasets.knowledge import KNOWLEDGE, knowledge_info, load_knowledge
from kdb.ingest.datasets.paper import PAPER_DATASETS, load_paper, paper_info
from kdb.ingest.datasets.published import PUBLISHED, load_published, published_info
from kdb.ingest.datasets.userfile import load_user_file, refuse_groups, refuse_positive
from kdb.ingest.datasets.userformats import ENDINGS, format_of

_HINT = f"`kdb datasets` lists them; a file of your own ends in {ENDINGS}."


def available_datasets(data_dir: Path | None = None) -> list[DatasetInfo]:
    """Describe every dataset that has a name, and whether its files are available; reads no data."""
    fetch.check_folder(data_dir)
    return [
        *(builtin_info(builtin) for builtin in BUILT_IN.values()),
        *(paper_info(paper, data_dir) for paper in PAPER_DATASETS.values()),
        knowledge_info(),
        ioi_info(),
        *(published_info(published, data_dir) for published in PUBLISHED.values()),
    ]


def published_files(name: str) -> tuple[fetch.File, ...]:
    """Return the published files of a dataset; none if it is built in. Raises UnknownNameError."""
    if name in PAPER_DATASETS:
        return PAPER_DATASETS[name].published
    if name in PUBLISHED:
        return PUBLISHED[name].published
    known = [info.name for info in available_datasets()]
    if name not in known:
        raise UnknownNameError("dataset", name, known, "`kdb datasets` lists them.")
    return ()


def load_dataset(
    name_or_path: str,
    *,
    data_dir: Path | None = None,
    dataset_name: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    group_by: str | None = None,
    positive: str | None = None,
    ask: str | None = None,
    answers: str | Sequence[str] | None = None,
    download: bool = True,
) -> Dataset:
    """Load a complete dataset, or raise DatasetError.

    `limit` keeps the first N examples of each class, or of each category, in the order of the source. `group_by` names
    the column with the group of each example, in the concept study only. `dataset_name` renames a user's file.
    `positive` is the class that is label 1, if the labels of a user's file are names of classes.
    `ask` is a question that follows each text of a user's file, and `answers` are its two answers, that of label 0
    first; without them the model is asked nothing. With a `template`, that is so for every dataset.
    Files of a dataset that is not built in are looked for in `data_dir`, KDB_DATA_DIR and the user's cache. A file
    that is not found is downloaded if `download` is true.
    """
    _check_options(template, limit)
    fetch.check_folder(data_dir)
    dataset = _load(name_or_path, data_dir, dataset_name, group_by, positive, download)
    _check(dataset)
    dataset = asking(dataset, ask, answers, own_template=template is not None)
    if template is not None:
        dataset = replace(dataset, template=template)
    if limit is not None:
        dataset = _limited(dataset, limit)
    return dataset


def _load(
    name: str,
    data_dir: Path | None,
    rename: str | None,
    group_by: str | None,
    positive: str | None,
    download: bool,
) -> Dataset:
    known = [*BUILT_IN, *PAPER_DATASETS, KNOWLEDGE, IOI, *PUBLISHED]
    if format_of(name) or (name not in known and Path(name).is_file()):
        return load_user_file(Path(name), rename, group_by, positive, known)
    if name not in known:
        raise UnknownNameError("dataset", name, known, _HINT)
    if rename is not None:
        raise DatasetError(f"Dataset {name!r} cannot be renamed: --dataset-name is only for a file of your own.")
    refuse_positive(name, positive)
    if name in BUILT_IN:
        return load_builtin(BUILT_IN[name], group_by)
    if name in PAPER_DATASETS:
        return load_paper(PAPER_DATASETS[name], data_dir, group_by, download)
    refuse_groups(name, group_by)
    if name in PUBLISHED:
        return load_published(PUBLISHED[name], data_dir, download)
    return load_ioi() if name == IOI else load_knowledge()


def _limited(dataset: Dataset, limit: int) -> Dataset:
    if dataset.study == "concept":
        return replace(dataset, examples=first_of_each_class(dataset.examples, limit, limit))
    fewer = replace(dataset, examples=first_of_each_category(dataset.examples, limit))
    check_answers(fewer, limit=limit)
    return fewer


def _check_options(template: str | None, limit: int | None) -> None:
    if template is not None and "{text}" not in template:
        raise DatasetError(f"The template {template!r} has no place for the text: add {{text}} to it.")
    if limit is not None and limit < 1:
        raise DatasetError(f"limit counts the examples of each class or category: expected 1 or more, found {limit}.")


def _check(dataset: Dataset) -> None:
    if dataset.study == "knowledge":
        check_answers(dataset)
    else:
        _check_classes(dataset)


def _check_classes(dataset: Dataset) -> None:
    for label in (0, 1):
        if not any(example.label == label for example in dataset.examples):
            raise DatasetError(
                f"Dataset {dataset.name!r} ({dataset.source}) has no example with label {label}; "
                "a probe needs both classes."
            )
