"""Committed files of an object store, as DuckDB opens them: one that a question needs is fetched when it is opened.

DuckDB opens no file whose path a filter on model, dataset or run excludes.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem

SCHEME = "kdb://"


class CommittedFiles(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """``kdb://`` and a path within one warehouse, to be read."""

    protocol = "kdb"
    cachable = False  # one per connection

    def __init__(self, opened: Callable[[str], BinaryIO], n_bytes: Callable[[str], int]) -> None:
        """``opened`` opens a path, ``n_bytes`` is its size as the commit has it."""
        super().__init__()
        self._opened, self._n_bytes = opened, n_bytes

    def open(self, path: str, mode: str = "rb", **_: Any) -> BinaryIO:
        """A file, without fsspec's own buffer around it. Raises WarehouseError where its run was removed."""
        if mode != "rb":
            raise PermissionError(f"{path}: committed files are only read")
        return self._opened(path.removeprefix(SCHEME))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name and size, from the commit."""
        return {"name": path, "size": self._n_bytes(path.removeprefix(SCHEME)), "type": "file"}

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself: DuckDB asks of every name, and no name of ours is a pattern."""
        return [path]

    def exists(self, path: str, **_: Any) -> bool:
        """Whether a commit names it, which is why it was asked for."""
        return True

    def modified(self, path: str) -> datetime.datetime:
        """Always the same: what is committed never changes."""
        return datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
