"""Files that are written completely or not at all, and messages for errors of the file system.

with appears_whole(path) as partial:
    partial.write_text("content")
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from kdb.errors import WarehouseError

_PARTIAL = ".partial"


def write_json(path: Path, content: object) -> None:
    """Write a JSON file completely or not at all."""
    with appears_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Yield a file to write. It is renamed to ``path`` when it is complete, and deleted after an error."""
    # Two processes may write the same file; a long name would become too long.
    partial = path.with_name(f"{path.stem[:40]}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether a file is the partial file of a killed writer."""
    return path.suffix == _PARTIAL


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a later rename does not reach the disk before its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Convert errors of the file system into a WarehouseError that says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full. Free some space, then run the same command again to resume",
            errno.EDQUOT: "the disk quota is exceeded. Free some space, then run the same command again to resume",
            errno.EACCES: "permission denied. Name a folder that you can write to with --warehouse",
            errno.EPERM: "permission denied. Name a folder that you can write to with --warehouse",
            errno.EROFS: "the file system is read-only. Name another folder with --warehouse",
        }
        what = advice.get(error.errno or 0, str(error))
        raise WarehouseError(f"Cannot write to the warehouse at {str(path)!r}: {what}.") from error
