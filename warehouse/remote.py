"""Files that do not lie in a folder, as DuckDB opens them: to read an object store, and to write views over URLs."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fsspec import AbstractFileSystem

from kdb.warehouse.lake import empty_file

if TYPE_CHECKING:
    from kdb.warehouse.cloud import CloudLake

SCHEME = "kdb://"


class _ReadOnly(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """What DuckDB asks of a file system, for files that exist and never change."""

    cachable = False  # one per connection

    def open(self, path: str, mode: str = "rb", **_: Any) -> BinaryIO:
        """A file to be read, without fsspec's own buffer around it."""
        if mode != "rb":
            raise PermissionError(f"{path}: committed files are only read")
        return self.file(path)

    def file(self, path: str) -> BinaryIO:
        """The file, to be read."""
        raise NotImplementedError

    def size(self, path: str) -> int:
        """Its bytes."""
        raise NotImplementedError

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name and size."""
        return {"name": path, "size": self.size(path), "type": "file"}

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself: DuckDB asks of every name, and no name of ours is a pattern."""
        return [path]

    def exists(self, path: str, **_: Any) -> bool:
        """Always: only what a commit names is asked for."""
        return True

    def modified(self, path: str) -> datetime.datetime:
        """Always the same."""
        return datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)


class CommittedFiles(_ReadOnly):
    """``kdb://`` and a path within one warehouse: fetched when it is opened.

    DuckDB opens no file whose path a filter on model, dataset or run excludes.
    """

    protocol = "kdb"

    def __init__(self, lake: CloudLake) -> None:
        super().__init__()
        self._lake = lake

    def file(self, path: str) -> BinaryIO:
        """The committed file. Raises WarehouseError where its run was removed."""
        return self._lake.open(path.removeprefix(SCHEME))

    def size(self, path: str) -> int:
        """Its bytes, from the commit."""
        return self._lake.record(path.removeprefix(SCHEME)).bytes


class StandIns(_ReadOnly):
    """Each URL of a table's file as the empty file of that table: a view over URLs is then made without a network."""

    protocol = ("s3", "gs", "az", "http", "https", "hf")

    def __init__(self, lake: Path) -> None:
        super().__init__()
        self._lake = lake

    def file(self, path: str) -> BinaryIO:
        """The empty file of the table that the URL's folder names."""
        return self._empty(path).open("rb")

    def size(self, path: str) -> int:
        """The empty file's bytes."""
        return self._empty(path).stat().st_size

    def _empty(self, path: str) -> Path:
        return empty_file(self._lake, path.split("/")[-2])
