"""Files that appear whole or not at all, and what the file system's refusals mean.

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
    """Write a JSON file that appears whole or not at all."""
    with appears_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name ``path`` once it is whole, and else leaves nothing behind."""
    partial = path.with_suffix(f".{uuid.uuid4().hex[:8]}{_PARTIAL}")  # two processes may write the same file
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether a file is what a killed writer left."""
    return path.suffix == _PARTIAL


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk: a rename must not get there before what it makes visible."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into a WarehouseError that says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full. Free some space and give the same command again: what is finished is kept",
            errno.EDQUOT: "the disk quota is used up. Free some space and give the same command again: what "
            "is finished is kept",
            errno.EACCES: "permission denied. Name a folder that you can write to with --warehouse",
            errno.EPERM: "permission denied. Name a folder that you can write to with --warehouse",
            errno.EROFS: "the file system is read-only. Name another folder with --warehouse",
        }
        what = advice.get(error.errno or 0, str(error))
        raise WarehouseError(f"Cannot write to the warehouse at {str(path)!r}: {what}.") from error
