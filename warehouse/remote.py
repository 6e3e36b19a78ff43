"""Committed files of an object store, as DuckDB opens them: one that a question needs is fetched when it is opened.

DuckDB leaves out the files whose path a filter on model, dataset or run excludes, before it opens any.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, BinaryIO

from fsspec import AbstractFileSystem

if TYPE_CHECKING:
    from kdb.warehouse.cloud import CloudLake

SCHEME = "kdb://"


class CommittedFiles(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The file system ``kdb://``: paths within one warehouse, to be read."""

    protocol = "kdb"
    cachable = False  # one per connection

    def __init__(self, lake: CloudLake) -> None:
        super().__init__()
        self._lake = lake

    def _open(self, path: str, mode: str = "rb", **_: Any) -> BinaryIO:
        if mode != "rb":
            raise PermissionError(f"{path}: committed files are only read")
        return self._lake.open(_within(path))

    def open(self, path: str, mode: str = "rb", **options: Any) -> BinaryIO:
        """A file to be read, without fsspec's own buffer around it."""
        return self._open(path, mode, **options)

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself: DuckDB asks of every name, and no name of ours is a pattern."""
        return [path]

    def exists(self, path: str, **_: Any) -> bool:
        """Whether a commit names it, which is why it was asked for."""
        return True

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name and size, from the commit."""
        return {"name": path, "size": self._lake.record(_within(path)).bytes, "type": "file"}

    def modified(self, path: str) -> datetime.datetime:
        """Always the same: what is committed never changes."""
        return datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)


def _within(path: str) -> str:
    return path.removeprefix(SCHEME)
