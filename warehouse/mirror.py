"""Copies on this machine of a bucket's committed files, which never change. They can be deleted at any time.

A file is downloaded as a whole, with its checksum checked; of files of vectors, which are large, only the blocks that
are read.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

from kdb.errors import WarehouseError
from kdb.warehouse.block_cache import BlockFile
from kdb.warehouse.bucket import Bucket, concurrently
from kdb.warehouse.files import appears_whole, storage_errors
from kdb.warehouse.manifest import FileRecord
from kdb.warehouse.schema import has_vectors


class Mirror:
    """The files of a bucket under their paths in the folder ``path``, as far as they were read."""

    def __init__(self, bucket: Bucket, path: Path) -> None:
        self._bucket, self.path = bucket, path

    def open(self, path: str, record: FileRecord) -> BinaryIO:
        """Open a committed file: downloaded once as a whole, or block by block if it holds vectors.

        Raises WarehouseError if the run was removed.
        """
        if has_vectors(record.table):
            blocks = self.path / "blocks" / path
            return cast(BinaryIO, BlockFile(record.bytes, lambda start, end: self._range(path, start, end), blocks))
        return (self.copy_of(path, record) or self._download(path, record)).open("rb")

    def copy_of(self, path: str, record: FileRecord) -> Path | None:
        """Return the copy of a whole file; None if there is none."""
        copy = self.path / path
        try:
            return copy if copy.stat().st_size == record.bytes else None
        except FileNotFoundError:
            return None

    def download(self, files: Mapping[str, FileRecord]) -> None:
        """Download whole files, unless they are here."""
        missing = {path: record for path, record in files.items() if self.copy_of(path, record) is None}
        concurrently(self._download, missing.keys(), missing.values())

    def _download(self, path: str, record: FileRecord) -> Path:
        copy, digest = self.path / path, hashlib.sha256()
        with storage_errors(self.path), _reported(path):
            copy.parent.mkdir(parents=True, exist_ok=True)
            with appears_whole(copy) as partial:
                with partial.open("wb") as file:
                    for chunk in self._bucket.chunks(path):
                        digest.update(chunk)
                        file.write(chunk)
                if digest.hexdigest() != record.sha256:
                    raise WarehouseError(f"{self._bucket.url}/{path} is damaged. `kdb verify` lists all damaged files.")
        return copy

    def _range(self, path: str, start: int, end: int) -> bytes:
        with _reported(path):
            return self._bucket.range(path, start, end)


@contextlib.contextmanager
def _reported(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise WarehouseError(
            f"{path} no longer exists: its run was removed while it was read. Run the query again."
        ) from None
