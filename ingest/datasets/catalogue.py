"""Every dataset that kdb knows by name, and the one function that loads any of them or a user's file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdb.errors import DatasetError, UnknownNameError
from kdb.ingest.datasets.base import Dataset, DatasetInfo, first_of_each_class
from kdb.ingest.datasets.builtin import BUILT_IN, builtin_info, load_builtin
from kdb.ingest.datasets.paper import PAPER_DATASETS, load_paper, paper_info
from kdb.ingest.datasets.userfile import is_user_file, load_user_file

_HINT = "`kdb datasets` lists them; a file needs an ending .csv, .jsonl or .parquet"


def available_datasets(data_dir: Path | None = None) -> list[DatasetInfo]:
    """Describe every dataset that has a name, and say whether it can be had here; reads no data."""
    ours = [builtin_info(builtin) for builtin in BUILT_IN.values()]
    return ours + [paper_info(paper, data_dir) for paper in PAPER_DATASETS.values()]


def load_dataset(
    name_or_path: str,
    *,
    data_dir: Path | None = None,
    dataset_name: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    group_by: str | None = None,
    download: bool = True,
) -> Dataset:
    """Load a dataset whole, or raise DatasetError; nothing partial is returned.

    `limit` keeps the first N of each class in the source's order, `group_by` names the column that holds
    each example's group, `dataset_name` renames a user's file. A paper dataset's file is looked for in
    `data_dir`, KDB_DATA_DIR and the user's cache, and then downloaded if `download` allows it.
    """
    _check_options(template, limit)
    dataset = _load(name_or_path, data_dir, dataset_name, group_by, download)
    _check_classes(dataset)
    if template is not None:
        dataset = replace(dataset, template=template)
    if limit is not None:
        dataset = replace(dataset, examples=first_of_each_class(dataset.examples, limit, limit))
    return dataset


def _load(name: str, data_dir: Path | None, rename: str | None, group_by: str | None, download: bool) -> Dataset:
    known = [*BUILT_IN, *PAPER_DATASETS]
    if is_user_file(name):
        return load_user_file(Path(name), rename, group_by, known)
    if name not in known:
        raise UnknownNameError("dataset", name, known, _HINT)
    if rename is not None:
        raise DatasetError(f"Dataset {name!r} keeps its name: --dataset-name is for a file of your own.")
    if name in BUILT_IN:
        return load_builtin(BUILT_IN[name], group_by)
    return load_paper(PAPER_DATASETS[name], data_dir, group_by, download)


def _check_options(template: str | None, limit: int | None) -> None:
    if template is not None and "{text}" not in template:
        raise DatasetError(f"The template {template!r} does not say where the text goes: write {{text}} there.")
    if limit is not None and limit < 1:
        raise DatasetError(f"The limit counts examples of each class: expected 1 or more, found {limit}.")


def _check_classes(dataset: Dataset) -> None:
    for label in (0, 1):
        if not any(example.label == label for example in dataset.examples):
            raise DatasetError(
                f"Dataset {dataset.name!r} ({dataset.source}) has no example with label {label}; "
                "a probe needs both classes."
            )
