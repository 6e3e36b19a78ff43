"""A warehouse in a folder: one atomic rename commits a run, and checksums verify its files.

    W/lake/model=M/dataset=D/run=R/<table>/<part>.parquet   committed runs, with a manifest.json each
    W/staging/R/<table>/<part>.parquet                      a run in progress

A run is valid when its folder is in ``lake``, where it appears by a rename: a reader sees all of a run or nothing,
whenever the writer is killed.

A warehouse may come from an untrusted source. Names of folders are checked when they are listed (``run_folders.py``),
manifests in ``manifest.py``, and the files themselves in ``inspection.py`` before they are first read.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdb.errors import WarehouseError
from kdb.warehouse.files import storage_errors, sync, write_json
from kdb.warehouse.inspection import Inspector
from kdb.warehouse.local_folder import LocalFolder
from kdb.warehouse.manifest import MANIFEST, Files, Manifest, RunFolder, read_manifest
from kdb.warehouse.run_folders import empty_file, list_run_folders, version_of
from kdb.warehouse.schema import SCHEMA_VERSION, TABLES
from kdb.warehouse.staged_run import StagedRun
from kdb.warehouse.storage import Damage, Storage
from kdb.warehouse.verification import damaged_files

_VERIFY_SECONDS = 600
"""Seconds for which a check waits for a run that is being rewritten."""


class FolderStorage(Storage):
    """The warehouse in the folder at ``path``.

    A ``partial`` one describes more runs than it has files of: see `kdb.warehouse.hub`. Raises WarehouseError if
    ``path`` is not a warehouse, or was written by a newer kdb.
    """

    is_remote = False

    def __init__(self, path: Path, *, partial: bool = False) -> None:
        self.local = LocalFolder(path)
        self.location = str(self.local.path)
        self.inspector = Inspector(self.local.lake)
        self.partial = partial

    @classmethod
    def create(cls, path: Path, *, partial: bool = False) -> FolderStorage:
        """Open the warehouse at ``path``, and create it if the folder is missing or empty."""
        return cls(LocalFolder.create(path).path, partial=partial)

    # Listing ---------------------------------------------------------------------------------------------------------

    def run_folders(self) -> list[RunFolder]:
        """Return all committed runs. Raises WarehouseError for a folder that kdb would not have written."""
        return list_run_folders(self.local.lake)

    def manifest(self, folder: RunFolder) -> Manifest:
        """Return the manifest of a committed run. Raises WarehouseError if it is damaged or missing."""
        try:
            return read_manifest(folder.path, folder.run)
        except FileNotFoundError:
            raise WarehouseError(
                f"{folder.path / MANIFEST} is missing: run {folder.run} was removed, or is damaged."
            ) from None

    def are_unchanged(self, folders: Iterable[RunFolder]) -> bool:
        """Whether runs that were listed earlier are unchanged: none removed, none rewritten."""
        return all(version_of(folder.path) == folder.version for folder in folders)

    @property
    def older_runs(self) -> bool:
        """Whether there may be runs of an older schema, as recorded in the marker."""
        return self.local.schema_version < SCHEMA_VERSION or bool(self.local.recorded().get("older_runs"))

    # Reading ---------------------------------------------------------------------------------------------------------

    def inspect(self, folders: Sequence[RunFolder], *, vectors: bool) -> None:
        """Raise DamagedRunError unless the files of these runs match their manifests; see `Inspector`."""
        if not self.partial:
            self.inspector.inspect(folders, vectors=vectors)

    def downloaded(self, folder: RunFolder) -> RunFolder:
        """Return the run itself, whose files are here."""
        return folder

    def download_table(self, table: str, folders: Sequence[RunFolder]) -> None:
        """Do nothing: all files are here."""

    @contextlib.contextmanager
    def protected(self, folders: Sequence[RunFolder]) -> Iterator[tuple[Path, list[RunFolder]]]:
        """Yield a lake of hard links to the files of some runs, which remain readable even if the runs are removed.

        Yields the lake itself if it is read-only or the disk has no links.
        """
        name, staging = f"held-{uuid.uuid4().hex[:16]}", self.local.staging
        with contextlib.ExitStack() as stack:
            try:
                staging.path.mkdir(exist_ok=True)
                lock = staging.lock(name)
                stack.enter_context(lock.acquire(timeout=0))
                stack.callback(lambda: Path(lock.lock_file).unlink(missing_ok=True))
                stack.callback(lambda: shutil.rmtree(staging.path / name, ignore_errors=True))
                lake = staging.path / name / "lake"
                empty = empty_file(self.local.lake, "runs").parents[1]
                for path in (*(folder.path for folder in folders), *([empty] if empty.is_dir() else [])):
                    _link_folder(path, lake / path.relative_to(self.local.lake))
            except FileNotFoundError:
                raise
            except OSError:
                lake = self.local.lake
            yield lake, [replace(run, path=lake / run.path.relative_to(self.local.lake)) for run in folders]

    def files_by_version(self, folders: Sequence[RunFolder]) -> Files | None:
        """Return the paths of the files of each table, if a run has an older schema.

        Runs that are `protected` have the empty typed files beside them.
        """
        version = self.local.schema_version
        if {version, *self._schema_versions(folders)} == {SCHEMA_VERSION}:
            return None
        lake = folders[0].path.parents[2] if folders else self.local.lake
        # A warehouse that cannot be written to has none for tables that are newer than it.
        empty = {table: empty_file(lake, table) for table in TABLES}
        files = {version: {table: [str(path)] for table, path in empty.items() if path.exists()}}
        for folder in folders:
            manifest = self.manifest(folder)
            tables = files.setdefault(manifest.schema_version, {})
            for file in manifest.files:
                tables.setdefault(file.table, []).append(str(folder.path / file.path))
        return files

    def _schema_versions(self, folders: Sequence[RunFolder]) -> Iterable[int]:
        """Return the schema versions of runs that were inspected."""
        if self.partial:
            return [self.manifest(folder).schema_version for folder in folders]
        return self.inspector.schema_versions(folders).values()

    @property
    def filesystem(self) -> None:
        """Return None: DuckDB reads the files itself."""

    def committed_files(self, table: str, folders: Sequence[RunFolder] | None = None) -> list[str]:
        """Return the absolute paths of a table's committed files, from the manifests of these runs or of all."""
        if folders is not None:
            return [str(folder.path / f.path) for folder in folders for f in self.manifest(folder).of(table)]
        files = []
        for folder in self.run_folders():
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                files += [str(folder.path / f.path) for f in read_manifest(folder.path, folder.run).of(table)]
        return files

    def verify(self) -> Iterator[Damage]:
        """Check every committed file against its manifest; yields the damaged ones. Each run is locked meanwhile.

        In a read-only warehouse, there are no locks.
        """
        staging = self.local.staging
        writable = os.access(staging.path if staging.path.is_dir() else self.local.path, os.W_OK)
        for listed in self.run_folders():
            with staging.locked(listed.run, patience=_VERIFY_SECONDS) if writable else contextlib.nullcontext():
                version = version_of(listed.path)
                folder = replace(listed, version=version or "")
                damages = [Damage(folder.run, path, problem) for path, problem in damaged_files(folder)]
                if version is None or version_of(listed.path) != version:
                    continue  # removed meanwhile, which no lock prevents
                if not damages:
                    self.inspector.remember(folder, self.manifest(folder))
                yield from damages

    # Writing ---------------------------------------------------------------------------------------------------------

    def stage(self, run: str, model: str, dataset: str, *, identity: Mapping[str, Any] | None = None) -> StagedRun:
        """Begin or resume a run in staging."""
        return StagedRun(self.local.staging, self, run, model, dataset, identity)

    def has_run(self, staged: StagedRun) -> bool:
        """Whether the run's folder is in the lake."""
        return (self.local.lake / staged.folder).is_dir()

    def publish(self, staged: StagedRun) -> None:
        """Move a complete run to the lake by one rename."""
        target = self.local.lake / staged.folder
        _delete_unlisted(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.path.rename(target)
        sync(target.parent)
        if staged.hashed is not None:  # just written, and read back from the disk
            folder = RunFolder(staged.run, staged.model, staged.dataset, target, version_of(target) or "")
            self.inspector.remember(folder, staged.hashed)

    def replace_run(self, folder: RunFolder, new: Path, manifest: Manifest) -> None:
        """Exchange a committed run and the folder ``new``.

        Raises WarehouseError if the system has no such step: with two steps, a reader in between would miss the run.
        """
        write_json(new / MANIFEST, manifest.content())
        _exchange(new, folder.path)
        self.inspector.remember(replace(folder, version=version_of(folder.path) or ""), manifest)

    def remove(self, run: str) -> None:
        """Delete a committed run; one rename makes it invisible to all readers."""
        folder, staging = self.find(run), self.local.staging.path
        with storage_errors(self.local.path):
            staging.mkdir(exist_ok=True)
            removed = staging / f"removed-{run}-{uuid.uuid4().hex[:8]}"
            folder.path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)  # what is left is deleted later: see `Staging.leftovers`
            for parent in folder.path.parents[:2]:
                with contextlib.suppress(OSError):  # the folder has another run
                    parent.rmdir()


def _delete_unlisted(staged: StagedRun) -> None:
    """Delete files that the manifest does not list: merged parts, working tables, and facts of the run in progress."""
    manifest = read_manifest(staged.path, staged.run)
    kept = {staged.path / record.path for record in manifest.files} | {staged.path / MANIFEST}
    for path in staged.path.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    for folder in filter(Path.is_dir, list(staged.path.iterdir())):
        if not any(folder.iterdir()):
            folder.rmdir()


def _link_folder(source: Path, target: Path) -> None:
    """Make a copy of the folder ``source``, one level deep, with hard links to its files."""
    target.mkdir(parents=True)
    with os.scandir(source) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.link(entry.path, target / entry.name, follow_symlinks=False)
                continue
            (target / entry.name).mkdir()
            for file in os.scandir(entry.path):
                os.link(file.path, target / entry.name / file.name, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> None:
    """Exchange the names of two folders. Raises WarehouseError if the system cannot do it in one step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        at_here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        names = (at_here, os.fsencode(one), at_here, os.fsencode(other))
        if hasattr(libc, "renameat2") and libc.renameat2(*names, exchange) == 0:
            return
        if not other.is_dir():
            raise WarehouseError(f"{other} was removed by another process meanwhile. There is nothing to change.")
    raise WarehouseError(
        f"{other}: this system cannot exchange two folders in one step, so a reader could miss the run in between. "
        "Export the runs to a Linux file system, and run the command there."
    )
