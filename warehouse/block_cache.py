"""A remote file that is read and cached by blocks, so that only the blocks that are needed are downloaded."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

BLOCK = 2**20
"""Bytes of a block. Downloading it takes about as long as the request itself."""


class BlockFile(io.RawIOBase):
    """A file of ``size`` bytes; ``fetch(start, end)`` downloads the bytes from ``start`` to ``end``.

    Blocks are cached in ``folder``, completely or not at all; several processes can share it.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes], folder: Path) -> None:
        self._size, self._fetch, self._folder = size, fetch, folder
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Return the position that is read next."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Change the position, as in any file."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer cannot be filled
        """Fill the buffer up to the end of the file, with one request for each gap between cached blocks."""
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        first, last = self._at // BLOCK, (end - 1) // BLOCK
        content = b"".join(self._blocks(first, last))
        start = self._at - first * BLOCK
        count = end - self._at
        buffer[:count] = content[start : start + count]
        self._at = end
        return count

    def _blocks(self, first: int, last: int) -> Iterator[bytes]:
        """Return blocks ``first`` to ``last``; adjacent ones that are not cached are downloaded together."""
        number = first
        while number <= last:
            kept = self._kept(number)
            if kept is not None:
                yield kept
                number += 1
                continue
            until = number + 1
            while until <= last and self._kept(until) is None:
                until += 1
            fetched = self._fetch(number * BLOCK, min(until * BLOCK, self._size))
            for i in range(number, until):
                self._keep(i, fetched[(i - number) * BLOCK : (i - number + 1) * BLOCK])
            yield fetched
            number = until

    def _kept(self, number: int) -> bytes | None:
        try:
            content = (self._folder / str(number)).read_bytes()
        except FileNotFoundError:
            return None
        return content if len(content) == min(BLOCK, self._size - number * BLOCK) else None

    def _keep(self, number: int, content: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{number}.{uuid.uuid4().hex[:8]}"
        partial.write_bytes(content)
        partial.replace(self._folder / str(number))
