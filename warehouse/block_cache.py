"""A remote file read by blocks, each of which is kept in a folder: who reads a hundredth of a file fetches no more."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

BLOCK = 2**20
"""Bytes of a block: a request takes about as long as so many bytes."""


class BlockFile(io.RawIOBase):
    """A file of ``size`` bytes, whose bytes from ``start`` to ``end`` are ``fetch(start, end)``.

    Blocks are kept in ``folder``, whole or not at all; several processes can share it.
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
        """The place that is read next."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, as in any file."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer cannot be filled
        """Fill the buffer as far as the file goes, with as few requests as there are gaps in what is kept."""
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
        """Blocks ``first`` to ``last``; those not kept that lie side by side are fetched together."""
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
