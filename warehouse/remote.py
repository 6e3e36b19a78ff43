"""File system through which DuckDB opens committed files of an object store; a file is downloaded when it is opened.

DuckDB opens no file whose path a filter on model, dataset or run excludes.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem

SCHEME = "kdb://"


class CommittedFiles(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A read-only file system for ``kdb://`` and a path within one warehouse."""

    protocol = "kdb"
    cachable = False  # one per connection

    def __init__(self, opened: Callable[[str], BinaryIO], n_bytes: Callable[[str], int]) -> None:
        """Take ``opened``, which opens a path, and ``n_bytes``, which returns its size in the commit."""
        super().__init__()
        self._opened, self._n_bytes = opened, n_bytes

    def open(self, path: str, mode: str = "rb", **_: Any) -> BinaryIO:
        """Open a file without fsspec's own buffer. Raises WarehouseError if its run was removed."""
        if mode != "rb":
            raise PermissionError(f"{path}: committed files are read-only")
        return self._opened(path.removeprefix(SCHEME))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name and size, from the commit."""
        return {"name": path, "size": self._n_bytes(path.removeprefix(SCHEME)), "type": "file"}

    def glob(self, path: str, **_: Any) -> list[str]:
        """Return the path itself: DuckDB calls this for every name, and no name in a commit is a pattern."""
        return [path]

    def exists(self, path: str, **_: Any) -> bool:
        """Return True: only files in a commit are opened."""
        return True

    def modified(self, path: str) -> datetime.datetime:
        """Return a constant time, because committed files never change."""
        return datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
