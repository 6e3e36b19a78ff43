"""The warehouse's folders: parts in staging, one atomic rename to commit, checksums to verify files.

    W/warehouse.json                                        marks the folder; schema version
    W/lake/model=M/dataset=D/run=R/<table>/<part>.parquet   committed runs, with a manifest.json each
    W/staging/R/<table>/<part>.parquet                      a run in progress

A part is valid when it has its final name; a run is valid when its folder is in ``lake``. Both appear by a rename, so a
reader sees all of a run or nothing, whenever the writer is killed.

A warehouse may come from an untrusted source. Names of folders are checked when they are read (`Lake.run_folders`),
manifests in ``manifest.py``, and the files themselves in ``inspection.py`` before they are first read.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from kdb.errors import UnknownNameError, WarehouseError
from kdb.warehouse.files import appears_whole, is_partial, storage_errors, sync, write_json
from kdb.warehouse.inspection import Inspector, file_record, problem_of, strays
from kdb.warehouse.manifest import (
    FORMULA,
    MANIFEST,
    RUN_ID,
    FileRecord,
    Manifest,
    RunFolder,
    parse_json,
    read_manifest,
    run_id,
    schema_version_of,
)
from kdb.warehouse.schema import OLDEST_SCHEMA, PARTITIONS, SCHEMA_VERSION, TABLES, arrow_schema, has_vectors

NOBODY = "__none__"
"""Partition value of the empty typed files, which keep every view valid before the first run."""

_MERGE_BELOW = 64 * 2**20
"""A table whose parts are smaller than this in total is committed as one file, because few files keep queries fast."""

_SECONDS = b"kdb_seconds"

_PATIENCE = 600
"""Seconds for which a check waits for a run that is being rewritten."""

_GLANCE = 1.0
"""Seconds for which a writer waits for a lock, because another process may be testing it (`leftovers`)."""

_LONGEST_NAME = 200
"""Maximum bytes of a name in its encoded form; the limit of file systems is 255."""

_WORDS = {NOBODY, "__HIVE_DEFAULT_PARTITION__", "all"}
"""Names with a special meaning: the empty typed files, no value, and all names."""


@dataclass(frozen=True)
class Damage:
    """A committed file that has changed since its commit."""

    run: str
    path: Path
    problem: str


@dataclass(frozen=True)
class Leftover:
    """An item in staging: an unfinished run (``begun`` has its names), or a folder that is no longer read.

    ``in_progress`` says whether a process is working on it.
    """

    path: Path
    bytes: int
    begun: Mapping[str, Any] = field(default_factory=dict)
    in_progress: bool = False


Prepare = Callable[[RunFolder, Manifest], Mapping[str, pa.Table]]
"""Tables that replace those of a copied run when it is committed; see `Lake.adopt`."""


class Lake:
    """The folders of one warehouse. ``location`` is the path or URL that the user gave.

    Raises WarehouseError if ``path`` is not a warehouse, or was written by a newer kdb.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.location = str(self.path)
        self.root = self.path / "lake"
        self.staging = self.path / "staging"
        self.marker = self.path / "warehouse.json"
        self.schema_version = self._check_marker()
        self.inspector = Inspector(self.root)
        self.partial = False  # for folders that describe more runs than they contain: see `kdb.warehouse.hub`

    @classmethod
    def create(cls, path: Path) -> Lake:
        """Open the warehouse at ``path``, and create it if the folder is missing or empty."""
        marker = path / "warehouse.json"
        with storage_errors(path):
            # Checked twice, because another process may be creating it, too.
            if not marker.exists() and not _is_vacant(path) and not marker.exists():
                raise WarehouseError(
                    f"{str(path)!r} is not empty and not a kdb warehouse. Name a new or empty folder with --warehouse."
                )
            if not marker.exists():
                # The marker comes first: after an interruption, the folder is recognised and completed later.
                path.mkdir(parents=True, exist_ok=True)
                write_json(marker, {"schema_version": SCHEMA_VERSION})
                _write_empty_tables(path / "lake")
            lake = cls(path)
            lake.raise_version()
        return lake

    def raise_version(self) -> None:
        """Record in the warehouse that it may hold runs of this kdb's schema, so that an older kdb refuses it."""
        if self.schema_version < SCHEMA_VERSION:
            _write_empty_tables(self.root)
            self.mark(schema_version=SCHEMA_VERSION, older_runs=bool(self.run_folders()))
            self.schema_version = SCHEMA_VERSION

    @property
    def older_runs(self) -> bool:
        """Whether there may be runs of an older schema; none are left after `kdb migrate`."""
        return self.schema_version < SCHEMA_VERSION or bool(self.marks().get("older_runs"))

    def marks(self) -> dict[str, Any]:
        """Return the content of ``warehouse.json``. Raises WarehouseError if it cannot be read."""
        return parse_json(self.marker.read_bytes(), self.marker)

    def mark(self, **changed: object) -> None:
        """Change fields of ``warehouse.json``; None removes a field."""
        with storage_errors(self.path):
            self.staging.mkdir(exist_ok=True)
            with FileLock(self.staging / "marks.lock").acquire(
                timeout=_PATIENCE
            ):  # two processes may change different fields
                marks = {**self.marks(), **changed}
                write_json(self.marker, {name: value for name, value in marks.items() if value is not None})

    def _check_marker(self) -> int:
        name = repr(str(self.path))
        for folder in (self.root, self.staging):
            if folder.is_symlink():
                raise WarehouseError(
                    f"{str(folder)!r} is a link, but a warehouse's folders must be real. Replace it by a folder."
                )
        if not self.path.is_dir():
            raise WarehouseError(
                f"There is no warehouse at {name}. Create one with `kdb ingest`, or name another with --warehouse."
            )
        try:
            content = self.marker.read_text()
        except FileNotFoundError:
            raise WarehouseError(
                f"{name} is not a kdb warehouse: it has no warehouse.json. Name another folder with --warehouse."
            ) from None
        except UnicodeDecodeError:
            content = ""
        except OSError as error:
            raise WarehouseError(
                f"The warehouse {name} cannot be read: {error.strerror}. Check its permissions."
            ) from error
        return check_version(str(self.path), content)

    def restore_empty_tables(self) -> None:
        """Rewrite the empty typed files, without which a view over no run is an error."""
        with storage_errors(self.path):
            _write_empty_tables(self.root)

    def run_folders(self) -> list[RunFolder]:
        """Return all committed runs, by model, dataset and run.

        Raises WarehouseError for a folder that kdb would not have written: a link, a name in another encoding, or a
        duplicate run id.
        """
        found: dict[str, RunFolder] = {}
        for model in _subfolders(self.root, "model="):
            for dataset in _subfolders(model, "dataset="):
                for path in _subfolders(dataset, "run="):
                    run = path.name.partition("=")[2]
                    if run == NOBODY:
                        continue
                    if not RUN_ID.fullmatch(run):
                        raise _odd(path, "run ids are 16 hex digits")
                    if run in found:
                        raise _odd(path, f"run {run} is also at {str(found[run].path)!r}")
                    version = _version(path)
                    if version is not None:
                        found[run] = RunFolder(run, _decoded(model), _decoded(dataset), path, version)
        return sorted(found.values(), key=lambda folder: (folder.model, folder.dataset, folder.run))

    def find(self, run: str) -> RunFolder:
        """Return the committed run with this id. Raises UnknownNameError."""
        folders = {folder.run: folder for folder in self.run_folders()}
        if run not in folders:
            raise UnknownNameError("run", run, folders, "`kdb runs` lists them.")
        return folders[run]

    def still(self, folders: Iterable[RunFolder]) -> bool:
        """Whether runs that were listed earlier are unchanged: none removed, none rewritten."""
        return all(_version(folder.path) == folder.version for folder in folders)

    def look(self, folders: Sequence[RunFolder], *, vectors: bool) -> None:
        """Raise DamagedRunError unless the files of these runs match their manifests; see `Inspector`."""
        if not self.partial:
            self.inspector.look(folders, vectors=vectors)

    def schema_versions(self, folders: Sequence[RunFolder]) -> dict[str, int]:
        """Return the schema version of each run by its id, for runs that were inspected."""
        if self.partial:
            return {folder.run: self.manifest(folder).schema_version for folder in folders}
        return self.inspector.schema_versions(folders)

    def manifest(self, folder: RunFolder) -> Manifest:
        """Return the manifest of a committed run. Raises WarehouseError if it is damaged or missing."""
        try:
            return read_manifest(folder.path, folder.run)
        except FileNotFoundError:
            raise WarehouseError(
                f"{folder.path / MANIFEST} is missing: run {folder.run} was removed, or is damaged."
            ) from None

    def records(self, run: str) -> list[FileRecord]:
        """Return the files of a committed run. Raises UnknownNameError."""
        return list(self.manifest(self.find(run)).files)

    def files(self, folders: Sequence[RunFolder]) -> dict[int, dict[str, list[str]]]:
        """Return the absolute paths of the files of each table in these runs, for each schema version.

        The empty typed file comes first, because it gives a table's types. Held runs (`held`) have one beside them.
        """
        root = folders[0].path.parents[2] if folders else self.root
        found = {self.schema_version: {table: [str(empty_file(root, table))] for table in TABLES}}
        for folder in folders:
            manifest = self.manifest(folder)
            tables = found.setdefault(manifest.schema_version, {})
            for file in manifest.files:
                tables.setdefault(file.table, []).append(str(folder.path / file.path))
        return found

    def committed_files(self, table: str) -> list[str]:
        """Return the absolute paths of a table's committed files, from the manifests of all runs."""
        files = []
        for folder in self.run_folders():
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                files += [str(folder.path / f.path) for f in read_manifest(folder.path, folder.run).of(table)]
        return files

    @contextlib.contextmanager
    def locked(self, folder: RunFolder, *, patience: float = _GLANCE) -> Iterator[None]:
        """Lock a committed run; raises WarehouseError if another process holds the lock for ``patience`` seconds."""
        lock = FileLock(self.staging / f"{folder.run}.lock")
        with storage_errors(self.path):
            self.staging.mkdir(exist_ok=True)
            try:
                lock.acquire(timeout=patience)
            except Timeout:
                raise WarehouseError(f"Run {folder.run} is being written by another process. Retry later.") from None
        try:
            yield
        finally:
            lock.release()

    def replace(self, folder: RunFolder, new: Path, manifest: Manifest) -> None:
        """Replace a committed run by the folder ``new``, which holds the files of the manifest, in one step.

        All files were verified just before.

        Raises WarehouseError if the system has no such step: with two steps, a reader in between would miss the run.
        """
        write_json(new / MANIFEST, manifest.content())
        _exchange(new, folder.path)
        self.inspector.remember(replace(folder, version=_version(folder.path) or ""), manifest)

    # Staging ---------------------------------------------------------------------------------------------------------

    def interrupted(self) -> list[Leftover]:
        """Return runs in progress or interrupted, each with the facts recorded at its start."""
        found = []
        for file in sorted(self.staging.glob("*/run.json")):
            with contextlib.suppress(OSError, WarehouseError):  # committed since it was listed
                begun = parse_json(file.read_bytes(), file)
                if {"run", "model", "dataset"} <= set(begun):
                    at_work = not _is_free(self.staging / f"{file.parent.name}.lock")
                    found.append(Leftover(file.parent, _bytes_of(file.parent), begun, at_work))
        return found

    def leftovers(self) -> list[Leftover]:
        """Return folders in staging that are no longer read, left by a process that has ended."""
        found = []
        for path in sorted(self.staging.glob("*-*")):
            kind, _, rest = path.name.partition("-")
            if kind in ("removed", "rewritten", "copied", "held") and path.is_dir() and not path.is_symlink():
                # A process that copies or rewrites a run holds its lock; one with a snapshot holds that of its folder.
                lock = path.name if kind == "held" else rest.partition("-")[0]
                if kind == "removed" or _is_free(self.staging / f"{lock}.lock"):
                    found.append(Leftover(path, _bytes_of(path)))
        return found

    def sweep(self) -> int:
        """Delete folders in staging that are no longer read (`leftovers`); returns their size in bytes."""
        swept = 0
        for left in self.leftovers():
            shutil.rmtree(left.path, ignore_errors=True)
            (self.staging / f"{left.path.name}.lock").unlink(missing_ok=True)
            swept += left.bytes
        return swept

    def discard(self, left: Leftover) -> bool:
        """Delete an unfinished run unless a process is working on it; return whether it was deleted."""
        lock = FileLock(self.staging / f"{left.path.name}.lock")
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(left.path, ignore_errors=True)
        except Timeout:
            return False
        return True

    @contextlib.contextmanager
    def held(self, folders: Sequence[RunFolder]) -> Iterator[tuple[Path, list[RunFolder]]]:
        """Yield a lake of hard links to the files of some runs, which remain readable even if the runs are removed.

        Yields its root and the runs in it, or the lake itself if it is read-only or the disk has no links. Raises
        FileNotFoundError if a run no longer exists.
        """
        name = f"held-{uuid.uuid4().hex[:16]}"
        with contextlib.ExitStack() as stack:
            try:
                self.staging.mkdir(exist_ok=True)
                stack.enter_context(FileLock(self.staging / f"{name}.lock").acquire(timeout=0))
                stack.callback(lambda: (self.staging / f"{name}.lock").unlink(missing_ok=True))
                stack.callback(lambda: shutil.rmtree(self.staging / name, ignore_errors=True))
                root = self.staging / name / "lake"
                empty = empty_file(self.root, "runs").parents[1]
                for path in (*(folder.path for folder in folders), *([empty] if empty.is_dir() else [])):
                    _link_folder(path, root / path.relative_to(self.root))
            except FileNotFoundError:
                raise
            except OSError:
                root = self.root
            yield root, [replace(run, path=root / run.path.relative_to(self.root)) for run in folders]

    def remove(self, run: str) -> None:
        """Delete a committed run; one rename makes it invisible to all readers."""
        folder = self.find(run)
        with storage_errors(self.path):
            self.staging.mkdir(exist_ok=True)
            grave = self.staging / f"removed-{run}-{uuid.uuid4().hex[:8]}"
            folder.path.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)  # the rest is deleted later: see `sweep`
            for parent in folder.path.parents[:2]:
                with contextlib.suppress(OSError):  # the folder has another run
                    parent.rmdir()

    def verify(self) -> Iterator[Damage]:
        """Check every committed file against its manifest; yields the damaged ones. Each run is locked meanwhile.

        In a read-only warehouse, there are no locks.
        """
        writable = os.access(self.staging if self.staging.is_dir() else self.path, os.W_OK)
        for listed in self.run_folders():
            with self.locked(listed, patience=_PATIENCE) if writable else contextlib.nullcontext():
                version = _version(listed.path)
                folder = replace(listed, version=version or "")
                damages = list(_verify_run(folder))
                if version is None or _version(listed.path) != version:
                    continue  # removed meanwhile, which no lock prevents
                if not damages:
                    self.inspector.remember(folder, self.manifest(folder))
                yield from damages

    def adopt(self, folder: RunFolder, prepare: Prepare = lambda _copy, _manifest: {}) -> bool:
        """Copy a run of another warehouse, and commit it if all files match its manifest.

        ``prepare`` is called with the copy after its files were compared with the manifest. It returns tables that
        replace the run's own, or raises WarehouseError to refuse the run. The source is not read again, since it may
        change meanwhile. Returns False if the run is already here. Raises WarehouseError for a run that is damaged, or
        is being measured here; nothing of it is then visible.
        """
        with self.stage(folder.run, folder.model, folder.dataset) as staged:
            if staged.committed:
                return False
            staged.adopt(folder, prepare)
        return True

    def stage(self, run: str, model: str, dataset: str, *, identity: Mapping[str, Any] | None = None) -> StagedRun:
        """Begin or resume a run; use it in a ``with`` statement, which holds the run's lock.

        ``identity`` holds the values from which the run's id was computed (`run_id`); an import needs it.
        """
        return StagedRun(self, run, model, dataset, identity)


class StagedRun:
    """A run in progress. Finished parts remain, whatever happens to the writer.

    ``committed`` says whether the run is already in the lake, so that nothing remains to be written.
    """

    def __init__(
        self, lake: Lake, run: str, model: str, dataset: str, identity: Mapping[str, Any] | None = None
    ) -> None:
        if identity is not None and run_id(identity) != run:
            raise AssertionError(f"the run id {run} does not follow from its identity")
        self.run, self.model, self.dataset, self.identity = run, model, dataset, identity
        self._inspector = lake.inspector
        self.path = lake.staging / run
        self.target = lake.root / partitions(model, dataset, run)
        self.committed = False
        self._hashed: Manifest | None = None
        self._lock = FileLock(lake.staging / f"{run}.lock")

    def __enter__(self) -> StagedRun:
        """Take the run's lock. Raises WarehouseError if another process holds it."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise WarehouseError(
                    f"Run {self.run} ({self.model} on {self.dataset}) is being measured by another process. "
                    "Wait for it to finish, then retry."
                ) from None
            try:
                self._begin()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; finished parts remain in staging."""
        if self.path.is_dir() and not any(self.path.rglob("*.parquet")):
            shutil.rmtree(self.path, ignore_errors=True)
        if self.committed:
            # A process that still waits for the removed lock file finds the run committed, and has nothing to write.
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _begin(self) -> None:
        self.committed = self._stands()
        if self.committed:  # by the process that held the lock before
            shutil.rmtree(self.path, ignore_errors=True)
            return
        if (self.path / MANIFEST).exists():  # its commit was interrupted
            self._publish()
            return
        for stray in filter(is_partial, self.path.rglob("*")):
            stray.unlink()
        if not (self.path / "run.json").exists():
            begun = datetime.now(UTC).isoformat()
            names = {"run": self.run, "model": self.model, "dataset": self.dataset}
            write_json(self.path / "run.json", {**names, "started_at": begun})

    @property
    def facts(self) -> dict[str, Any]:
        """Return the recorded facts of the run: its names, ``started_at``, and those added by `remember`."""
        facts: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        return facts

    def remember(self, **facts: object) -> None:
        """Record facts of a run in progress that a resumed run needs."""
        write_json(self.path / "run.json", {**self.facts, **facts})

    def restart(self, **facts: object) -> None:
        """Delete all finished parts and recorded facts, except the run's names, its start, and the facts given."""
        with storage_errors(self.path):
            for child in self.path.iterdir():
                if child.is_dir():
                    shutil.rmtree(child)
            kept = {name: self.facts[name] for name in ("run", "model", "dataset", "started_at")}
            write_json(self.path / "run.json", {**kept, **facts})

    def _stands(self) -> bool:
        """Whether the run is already in the lake."""
        return self.target.is_dir()

    def part(self, table: str, name: str) -> Path:
        """Return the path of a finished part."""
        return self.path / table / f"{name}.parquet"

    def has(self, table: str, name: str) -> bool:
        """Whether a part is finished."""
        return self.part(table, name).exists()

    def parts(self, table: str) -> list[Path]:
        """Return the finished parts of a table, in order of their names."""
        return sorted(path for path in (self.path / table).glob("*.parquet") if path.stem != "all")

    def table(self, table: str) -> pa.Table:
        """Return the rows of the finished parts of a table."""
        return read_parts(self.parts(table))

    def write(self, table: str, name: str, groups: Iterable[pa.Table], *, seconds: float = 0.0) -> None:
        """Write one part, with a row group for each Arrow table; it is valid when it is complete.

        ``seconds`` is the time spent measuring its content; the run's time is the sum over its parts.
        """
        with storage_errors(self.path):
            write_parquet(self.part(table, name), map(self._signed, groups), seconds=seconds)

    def write_rows(self, table: str, name: str, rows: Sequence[Mapping[str, Any]], *, seconds: float = 0.0) -> None:
        """Write one part of a small table from dictionaries; absent columns are NULL."""
        self.write(table, name, [pa.Table.from_pylist(list(rows), schema=arrow_schema(table))], seconds=seconds)

    def commit(self, run_row: Mapping[str, Any]) -> None:
        """Make the complete run visible by one rename.

        ``run_row`` is the row of ``runs``; times and the list of tables are filled in here. The manifest, which defines
        the run, is written last. An interrupted commit is completed by the next process that takes the lock.
        """
        with storage_errors(self.path):
            self._seal(run_row)
            self._publish()

    def adopt(self, folder: RunFolder, prepare: Prepare) -> None:
        """Copy a committed run into this one, see `Lake.adopt`. Raises WarehouseError if it is damaged."""
        # In a separate folder, so that a copied file is never mistaken for a part measured here.
        copy = self.path.with_name(f"copied-{self.run}-{uuid.uuid4().hex[:8]}")
        try:
            try:
                manifest = read_manifest(folder.path, folder.run)
            except FileNotFoundError:
                raise WarehouseError(f"{folder.path / MANIFEST} is missing: the run was not copied.") from None
            with storage_errors(self.path):
                for record in manifest.files:
                    _copy_regular(folder.path / record.path, copy / record.path)
            for record in manifest.files:
                if problem := problem_of(copy, record):
                    raise WarehouseError(f"{folder.path / record.path} is damaged ({problem}): the run was not copied.")
            changed = prepare(replace(folder, path=copy), manifest)
            with storage_errors(self.path):
                records = [self._replaced(copy, manifest, table, rows) for table, rows in changed.items()]
                kept = [record for record in manifest.files if record.table not in changed]
                version = SCHEMA_VERSION if changed else manifest.schema_version
                self._hashed = replace(manifest, files=(*kept, *records), schema_version=version)
                write_json(copy / MANIFEST, self._hashed.content())
                write_json(copy / "run.json", self.facts)
                shutil.rmtree(self.path)
                copy.rename(self.path)  # from here on, the next process that takes the lock completes the commit
                self._publish()
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _replaced(self, copy: Path, manifest: Manifest, table: str, rows: pa.Table) -> FileRecord:
        """Write a table to replace its files in a copy."""
        before = [copy / record.path for record in manifest.of(table)]
        seconds = sum(seconds_of(path) for path in before)
        for path in before:
            path.unlink()
        write_parquet(copy / table / "all.parquet", [self._signed(rows)], seconds=seconds)
        return file_record(copy / table / "all.parquet", copy)

    def _publish(self) -> None:
        self._drop_strays()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.path.rename(self.target)
        sync(self.target.parent)
        self.committed = True
        if self._hashed is not None:  # just written, and read back from the disk
            folder = RunFolder(self.run, self.model, self.dataset, self.target, _version(self.target) or "")
            self._inspector.remember(folder, self._hashed)

    def _seal(self, run_row: Mapping[str, Any]) -> None:
        tables = {folder.name for folder in self.path.iterdir() if folder.is_dir()} | {"runs"}
        parts = {table: self.parts(table) for table in sorted(tables - {"runs"})}
        row = {
            **run_row,
            "tables": sorted(tables),
            "started_at": datetime.fromisoformat(self.facts["started_at"]),
            "finished_at": datetime.now(UTC),
            "seconds": sum(seconds_of(path) for paths in parts.values() for path in paths),
        }
        self.write_rows("runs", "all", [row])
        files = [self.part("runs", "all")]
        for table, paths in parts.items():
            files += self._merged(table, paths)
        records = tuple(file_record(path, self.path) for path in files)
        formula = None if self.identity is None else FORMULA
        self._write_manifest(Manifest(records, formula=formula, identity=self.identity))

    def _write_manifest(self, manifest: Manifest) -> None:
        write_json(self.path / MANIFEST, manifest.content())
        self._hashed = manifest

    def _merged(self, table: str, paths: list[Path]) -> list[Path]:
        # Vectors are not merged: their row groups let a reader skip all other layers.
        if has_vectors(table) or len(paths) < 2 or sum(path.stat().st_size for path in paths) >= _MERGE_BELOW:
            return paths
        whole = self.part(table, "all")
        write_parquet(whole, [pa.concat_tables(self._signed(pq.ParquetFile(path).read()) for path in paths)])
        return [whole]

    def _signed(self, rows: pa.Table) -> pa.Table:
        return _signed(rows, self.model, self.dataset, self.run)

    def _drop_strays(self) -> None:
        manifest = read_manifest(self.path, self.run)
        kept = {self.path / record.path for record in manifest.files} | {self.path / MANIFEST}
        for path in self.path.rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()


def read_parts(parts: Sequence[Path]) -> pa.Table:
    """Return the rows of some Parquet files of one table."""
    return pa.concat_tables((pq.ParquetFile(part).read() for part in parts), promote_options="default")


def table_files(run: Path, table: str) -> list[Path]:
    """Return the Parquet files of a table in a committed run's folder."""
    return sorted((run / table).glob("*.parquet"))


def write_parquet(path: Path, groups: Iterable[pa.Table], *, seconds: float = 0.0) -> None:
    """Write Arrow tables as the row groups of one Parquet file, completely or not at all.

    Vectors of float32 are byte-stream-split, so that their exponents compress (DuckDB cannot read float16 in this
    encoding). Everything is compressed with zstd.
    """
    groups = iter(groups)
    first = next(groups)
    schema = first.schema.with_metadata({_SECONDS: str(seconds)})
    vectors = [f"{field.name}.list.element" for field in schema if _is_float32_vector(field.type)]
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"compression": "zstd", "use_byte_stream_split": vectors or False}
    options["use_dictionary"] = [f.name for f in schema if not pa.types.is_nested(f.type)]
    with appears_whole(path) as partial, pq.ParquetWriter(partial, schema, **options) as writer:
        for group in itertools.chain([first], groups):
            if len(group):  # `datasets` cannot read a file with an empty row group
                writer.write_table(group, row_group_size=len(group))


def _signed(rows: pa.Table, *names: str) -> pa.Table:
    """Add the columns of the path to the rows, so that readers without partitions know a file's origin."""
    rows = rows.drop_columns(
        [name for name in PARTITIONS if name in rows.column_names]
    )  # of the run that they come from
    for column, name in zip(PARTITIONS, names, strict=True):
        rows = rows.append_column(column, pa.repeat(name, len(rows)))
    return rows


def _is_float32_vector(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_float32(kind.value_type))


def partitions(model: str, dataset: str, run: str) -> str:
    """Return a run's folder within the lake. Raises WarehouseError for a name that no folder can have."""
    return f"model={_encoded(model)}/dataset={_encoded(dataset)}/run={run}"


def _encoded(name: str) -> str:
    """Return a model's or dataset's name as a partition value, which every engine decodes to the same text."""
    text = quote(name, safe="", errors="surrogatepass")
    if name in _WORDS or not name.strip() or len(text) > _LONGEST_NAME:
        raise WarehouseError(f"{name[:200]!r} cannot be stored as a name. Give another with --name or --dataset-name.")
    # DuckDB reads a bare null as NULL.
    return f"%{ord(text[0]):02X}{text[1:]}" if text.lower() == "null" else text


def _decoded(folder: Path) -> str:
    """Return the name encoded in a partition's folder. Raises WarehouseError if kdb would encode it differently."""
    value = folder.name.partition("=")[2]
    if value == NOBODY:
        return value
    name = unquote(value, errors="surrogatepass")
    try:
        spelled = _encoded(name)
    except (WarehouseError, UnicodeError):
        raise _odd(folder, "this name cannot be stored") from None
    if spelled != value:
        raise _odd(folder, f"the encoded name would be {spelled!r}")
    return name


def _odd(path: Path, why: str) -> WarehouseError:
    return WarehouseError(
        f"{str(path)!r} was not written by kdb: {why}. Delete it, or move it out of the warehouse, then retry."
    )


def _version(run: Path) -> str | None:
    """Return a text that changes when the run in this folder is rewritten; None if removed, empty without manifest."""
    try:
        status = os.lstat(f"{run}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        return "" if run.is_dir() else None
    except OSError:  # a folder without read permission: reported when its files are inspected
        return ""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def check_version(location: str, marker: str | bytes) -> int:
    """Return the schema version in a warehouse.json. Raises WarehouseError unless this kdb can read its tables."""
    version = schema_version_of(marker, location + "/warehouse.json")
    if version > SCHEMA_VERSION:
        raise WarehouseError(
            f"The warehouse {location!r} was written by a newer kdb (schema {version}, this one knows "
            f"{SCHEMA_VERSION}). Upgrade kdb, or name another with --warehouse."
        )
    if version < OLDEST_SCHEMA:
        raise WarehouseError(
            f"The warehouse {location!r} was written by an older kdb (schema {version}, this one reads "
            f"{OLDEST_SCHEMA} and later). Measure again into a new folder, named with --warehouse."
        )
    return version


def _is_vacant(path: Path) -> bool:
    """Whether a warehouse can be created here: no folder, an empty one, or one that a killed kdb left incomplete."""
    return not path.exists() or (path.is_dir() and all(map(is_partial, path.iterdir())))


def _subfolders(parent: Path, prefix: str) -> list[Path]:
    # A folder can disappear between two checks, when another process removes a run.
    try:
        with os.scandir(parent) as entries:
            found = [entry for entry in entries if entry.name.startswith(prefix)]
            for entry in found:
                if not entry.is_dir(follow_symlinks=False):
                    raise _odd(Path(entry.path), "it is a link or a file")
            return sorted(Path(entry.path) for entry in found)
    except FileNotFoundError:
        return []
    except PermissionError as error:
        raise WarehouseError(f"{str(parent)!r} cannot be read: {error.strerror}. Check its permissions.") from error


def empty_file(root: Path, table: str) -> Path:
    """Return the empty typed file that keeps a table's view valid, in the lake at ``root``."""
    return root / f"model={NOBODY}/dataset={NOBODY}/run={NOBODY}" / table / "empty.parquet"


def _write_empty_tables(root: Path) -> None:
    for table in TABLES:
        write_parquet(empty_file(root, table), [_signed(arrow_schema(table).empty_table(), *[NOBODY] * 3)])


def seconds_of(path: Path) -> float:
    """Return the seconds spent measuring the content of a file; 0 if not recorded in the file."""
    try:
        seconds = float((pq.read_schema(path).metadata or {}).get(_SECONDS, 0))
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def row_counts(folder: RunFolder) -> dict[str, int]:
    """Return the row counts of a run's tables from its manifest. Raises WarehouseError if that cannot be read."""
    try:
        return read_manifest(folder.path, folder.run).row_counts()
    except FileNotFoundError:
        raise WarehouseError(
            f"{folder.path / MANIFEST} is missing: run {folder.run} is damaged. See `kdb verify`."
        ) from None


def _verify_run(folder: RunFolder) -> Iterator[Damage]:
    try:
        manifest = read_manifest(folder.path, folder.run)
        added = strays(folder, manifest)
    except (OSError, WarehouseError) as error:
        yield Damage(folder.run, folder.path / MANIFEST, f"unreadable ({error})")
        return
    for record in manifest.files:
        problem = _problem(folder.path, record)
        if problem:
            yield Damage(folder.run, folder.path / record.path, problem)
    for path in added:
        yield Damage(folder.run, folder.path / path, "not part of the run: it was added after commit")


def _problem(folder: Path, record: FileRecord) -> str:
    return problem_of(folder, record)


def _copy_regular(source: Path, target: Path) -> None:
    """Copy a regular file; anything else is skipped, and then reported as a missing file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISREG(source.lstat().st_mode) and not source.parent.is_symlink():
            shutil.copyfile(source, target)
            sync(target)


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


def _bytes_of(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # unlike rglob, it tolerates folders that disappear meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def _is_free(lock: Path) -> bool:
    """Whether a lock is free."""
    try:
        with FileLock(lock).acquire(timeout=0):
            return True
    except (Timeout, OSError):
        return False


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
