"""Checksums of committed files: the record of a file for its manifest, and comparison of a file with its record."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdb.warehouse.manifest import FileRecord


def file_record(path: Path, folder: Path) -> FileRecord:
    """Return the record of a file in a run's folder, for its manifest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = pq.read_metadata(path).num_rows
    return FileRecord(path.relative_to(folder).as_posix(), rows, path.stat().st_size, digest)


def problem_of(folder: Path, record: FileRecord) -> str:
    """Return how a file differs from its record; empty if it does not."""
    path = folder / record.path
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) or path.parent.is_symlink():
            return "not a regular file"
        found = file_record(path, folder)
    except FileNotFoundError:
        return "missing"
    except (OSError, pa.ArrowException) as error:
        return f"unreadable ({error})"
    for what in ("bytes", "rows", "sha256"):
        expected, actual = getattr(record, what), getattr(found, what)
        if expected != actual:
            return f"{what}: {expected} at commit, {actual} now"
    return ""
