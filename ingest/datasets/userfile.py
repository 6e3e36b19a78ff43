"""A user's own dataset: a .csv, .jsonl or .parquet file with columns `text` and `label`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from kdb.errors import DatasetError
from kdb.ingest.datasets.base import Dataset
from kdb.ingest.datasets.layout import Layout, to_examples
from kdb.ingest.datasets.rows import read_csv, read_jsonl, read_parquet

_READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}
_LABELS = {"0": 0, "1": 1, "true": 1, "false": 0, "yes": 1, "no": 0}


def is_user_file(name: str) -> bool:
    """Tell a file from a dataset's name by its ending, whether or not it exists."""
    return Path(name).suffix.lower() in _READERS


def load_user_file(path: Path, name: str | None, group_by: str | None, taken: Collection[str]) -> Dataset:
    """Read a file under its stem or the given name; raises DatasetError if either cannot be used.

    `taken` are the names of kdb's own datasets, which a user's may not shadow.
    """
    name = _usable_name(path, name, taken)
    layout = Layout(labels=_LABELS, group=group_by)
    rows = _READERS[path.suffix.lower()](path, layout.needed)
    return Dataset(name, f"{path.name}, a user's file", "{text}", tuple(to_examples(rows, layout)))


def _usable_name(path: Path, name: str | None, taken: Collection[str]) -> str:
    name = path.stem if name is None else name
    if not name.strip():
        raise DatasetError(f"{path.name} would be stored under a blank name: give --dataset-name another.")
    if name.lower() in taken:
        raise DatasetError(
            f"{path.name} would be stored as {name!r}, the name of one of kdb's own datasets: "
            "give --dataset-name another."
        )
    return name
