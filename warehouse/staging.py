"""The folder in which runs are prepared, with their locks, and what killed processes leave in it.

    staging/R/          a run that is being measured, see `kdb.warehouse.staged_run`
    staging/R.lock      held by the process that writes run R

Other folders, such as ``removed-R-…``, are no longer read when the process that made them has ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdb.errors import WarehouseError
from kdb.warehouse.files import storage_errors
from kdb.warehouse.manifest import parse_json

_LOCK_SECONDS = 1.0
"""Seconds for which a writer waits for a lock, because another process may be testing it (`Staging.leftovers`)."""


@dataclass(frozen=True)
class Leftover:
    """An item in staging: an unfinished run (``begun`` has its names), or a folder that is no longer read.

    ``in_progress`` says whether a process is working on it.
    """

    path: Path
    bytes: int
    begun: Mapping[str, Any] = field(default_factory=dict)
    in_progress: bool = False


class Staging:
    """The staging folder at ``path``, which is created when it is first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lock(self, name: str) -> FileLock:
        """Return the lock of a run or a folder in staging; it is not acquired yet."""
        return FileLock(self.path / f"{name}.lock")

    @contextlib.contextmanager
    def locked(self, run: str, *, patience: float = _LOCK_SECONDS) -> Iterator[None]:
        """Lock a committed run; raises WarehouseError if another process holds the lock for ``patience`` seconds."""
        lock = self.lock(run)
        with storage_errors(self.path.parent):
            self.path.mkdir(exist_ok=True)
            try:
                lock.acquire(timeout=patience)
            except Timeout:
                raise WarehouseError(f"Run {run} is being written by another process. Retry later.") from None
        try:
            yield
        finally:
            lock.release()

    def unfinished_runs(self) -> list[Leftover]:
        """Return runs in progress or interrupted, each with the facts recorded at its start."""
        unfinished = []
        for file in sorted(self.path.glob("*/run.json")):
            with contextlib.suppress(OSError, WarehouseError):  # committed since it was listed
                begun = parse_json(file.read_bytes(), file)
                if {"run", "model", "dataset"} <= set(begun):
                    in_progress = not self._is_free(file.parent.name)
                    unfinished.append(Leftover(file.parent, _bytes_of(file.parent), begun, in_progress))
        return unfinished

    def leftovers(self) -> list[Leftover]:
        """Return folders that are no longer read, left by a process that has ended."""
        left = []
        for path in sorted(self.path.glob("*-*")):
            kind, _, rest = path.name.partition("-")
            if kind in ("removed", "rewritten", "copied", "held") and path.is_dir() and not path.is_symlink():
                # A process that copies or rewrites a run holds its lock; one with a snapshot holds that of its folder.
                lock = path.name if kind == "held" else rest.partition("-")[0]
                if kind == "removed" or self._is_free(lock):
                    left.append(Leftover(path, _bytes_of(path)))
        return left

    def delete_leftovers(self) -> int:
        """Delete folders that are no longer read (`leftovers`); returns their size in bytes."""
        n_bytes = 0
        for left in self.leftovers():
            shutil.rmtree(left.path, ignore_errors=True)
            (self.path / f"{left.path.name}.lock").unlink(missing_ok=True)
            n_bytes += left.bytes
        return n_bytes

    def delete_unfinished(self, left: Leftover) -> bool:
        """Delete an unfinished run unless a process is working on it; return whether it was deleted."""
        try:
            with self.lock(left.path.name).acquire(timeout=0):
                shutil.rmtree(left.path, ignore_errors=True)
        except Timeout:
            return False
        return True

    def _is_free(self, name: str) -> bool:
        try:
            with self.lock(name).acquire(timeout=0):
                return True
        except (Timeout, OSError):
            return False


def _bytes_of(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # unlike rglob, it tolerates folders that disappear meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total
