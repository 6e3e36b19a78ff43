"""The warehouse's folders: parts in staging, one atomic rename to commit, checksums to verify by.

    W/warehouse.json                                        marks the folder; schema version
    W/lake/model=M/dataset=D/run=R/<table>/<part>.parquet   committed runs, with a manifest.json each
    W/staging/R/<table>/<part>.parquet                      a run in progress

A part counts once it has its final name; a run counts once its folder stands in ``lake``. Both appear by
rename, so a reader sees all of it or nothing, whenever the writer is killed.

A warehouse may come from anybody: names of folders are checked where they are read (`Lake.run_folders`), manifests in
``manifest.py``, and the files themselves in ``inspection.py`` before they are first read.
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
"""A table whose parts hold fewer bytes than this is committed as one file: few files keep queries fast."""

_SECONDS = b"kdb_seconds"

_PATIENCE = 600
"""Seconds for which a check waits for a run that is being written anew."""

_GLANCE = 1.0
"""Seconds for which a writer waits for a lock: another process may be looking whether it is free (`leftovers`)."""

_LONGEST_NAME = 200
"""Bytes of the longest name, as a folder spells it: file systems end at 255."""

_WORDS = {NOBODY, "__HIVE_DEFAULT_PARTITION__", "all"}
"""Names that mean something else: nobody's files, no value, and every name."""


@dataclass(frozen=True)
class Damage:
    """A committed file that is not what it was at commit."""

    run: str
    path: Path
    problem: str


@dataclass(frozen=True)
class Leftover:
    """Something in staging: a run that was begun (``begun`` has its names), or a folder that nothing reads any more.

    ``in_progress``: whether a process is at work on it.
    """

    path: Path
    bytes: int
    begun: Mapping[str, Any] = field(default_factory=dict)
    in_progress: bool = False


Prepare = Callable[[RunFolder, Manifest], Mapping[str, pa.Table]]
"""Tables that a copied run is committed with instead of its own; see `Lake.adopt`."""


class Lake:
    """The folders of one warehouse. ``location`` is what its user calls it.

    Raises WarehouseError if ``path`` is no warehouse, or one that a newer kdb wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.location = str(self.path)
        self.root = self.path / "lake"
        self.staging = self.path / "staging"
        self.marker = self.path / "warehouse.json"
        self.schema_version = self._check_marker()
        self.inspector = Inspector(self.root)
        self.partial = False  # where runs are told of that are not all there: see `kdb.warehouse.hub`

    @classmethod
    def create(cls, path: Path) -> Lake:
        """Open the warehouse at ``path``, making it first where the folder is missing or empty."""
        marker = path / "warehouse.json"
        with storage_errors(path):
            # Looked for twice: another process may be making it too.
            if not marker.exists() and not _is_vacant(path) and not marker.exists():
                raise WarehouseError(
                    f"{str(path)!r} is not a kdb warehouse, and not empty: name a new or empty folder with --warehouse."
                )
            if not marker.exists():
                # The marker comes first: if this is cut off, the folder is ours, and what it lacks is mended.
                path.mkdir(parents=True, exist_ok=True)
                write_json(marker, {"schema_version": SCHEMA_VERSION})
                _write_empty_tables(path / "lake")
            lake = cls(path)
            lake.raise_version()
        return lake

    def raise_version(self) -> None:
        """Let the warehouse say that it may hold runs of this kdb's schema, so that an older kdb leaves it alone."""
        if self.schema_version < SCHEMA_VERSION:
            _write_empty_tables(self.root)
            self.mark(schema_version=SCHEMA_VERSION, older_runs=bool(self.run_folders()))
            self.schema_version = SCHEMA_VERSION

    @property
    def older_runs(self) -> bool:
        """Whether there may be runs of an older schema; `kdb migrate` leaves none."""
        return self.schema_version < SCHEMA_VERSION or bool(self.marks().get("older_runs"))

    def marks(self) -> dict[str, Any]:
        """Content of ``warehouse.json``. Raises WarehouseError where that cannot be read."""
        return parse_json(self.marker.read_bytes(), self.marker)

    def mark(self, **changed: object) -> None:
        """Change what the warehouse says of itself; None takes a mark away."""
        with storage_errors(self.path):
            self.staging.mkdir(exist_ok=True)
            with FileLock(self.staging / "marks.lock").acquire(timeout=_PATIENCE):  # two processes may change two marks
                marks = {**self.marks(), **changed}
                write_json(self.marker, {name: value for name, value in marks.items() if value is not None})

    def _check_marker(self) -> int:
        name = repr(str(self.path))
        for folder in (self.root, self.staging):
            if folder.is_symlink():
                raise WarehouseError(
                    f"{str(folder)!r} is a link: a warehouse's folders lie within it. Put a folder there."
                )
        if not self.path.is_dir():
            raise WarehouseError(f"There is no warehouse at {name}: `kdb ingest` makes one, --warehouse names another.")
        try:
            content = self.marker.read_text()
        except FileNotFoundError:
            raise WarehouseError(
                f"{name} is not a kdb warehouse: it has no warehouse.json. --warehouse names another folder."
            ) from None
        except UnicodeDecodeError:
            content = ""
        except OSError as error:
            raise WarehouseError(f"The warehouse {name} cannot be read: {error.strerror}.") from error
        return check_version(str(self.path), content)

    def restore_empty_tables(self) -> None:
        """Write the empty typed files again, without which a view over no run is an error."""
        with storage_errors(self.path):
            _write_empty_tables(self.root)

    def run_folders(self) -> list[RunFolder]:
        """Every committed run, by model, dataset and run.

        Raises WarehouseError for a folder that kdb would not have written: a link, another spelling of a name, or a
        run id that stands twice.
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
        """The committed run with this id; raises UnknownNameError."""
        folders = {folder.run: folder for folder in self.run_folders()}
        if run not in folders:
            raise UnknownNameError("run", run, folders, "`kdb runs` lists them.")
        return folders[run]

    def still(self, folders: Iterable[RunFolder]) -> bool:
        """Whether runs that were listed a while ago are as they were: none removed, none written anew."""
        return all(_version(folder.path) == folder.version for folder in folders)

    def look(self, folders: Sequence[RunFolder], *, vectors: bool) -> None:
        """Raise DamagedRunError unless the files of these runs are those of their manifests; see `Inspector`."""
        if not self.partial:
            self.inspector.look(folders, vectors=vectors)

    def schema_versions(self, folders: Sequence[RunFolder]) -> dict[str, int]:
        """The schema version of each run, by its id; of runs that were looked at."""
        if self.partial:
            return {folder.run: self.manifest(folder).schema_version for folder in folders}
        return self.inspector.schema_versions(folders)

    def manifest(self, folder: RunFolder) -> Manifest:
        """The manifest of a committed run. Raises WarehouseError where it is damaged or gone."""
        try:
            return read_manifest(folder.path, folder.run)
        except FileNotFoundError:
            raise WarehouseError(
                f"{folder.path / MANIFEST} is missing: run {folder.run} was removed, or is damaged."
            ) from None

    def records(self, run: str) -> list[FileRecord]:
        """The files of a committed run. Raises UnknownNameError."""
        return list(self.manifest(self.find(run)).files)

    def files(self, folders: Sequence[RunFolder]) -> dict[int, dict[str, list[str]]]:
        """The files of each table in these runs by their absolute paths, for each schema version that they follow.

        The empty typed file comes first: it tells a table's types. Runs that are held (`held`) have one beside them.
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
        """The committed files of a table by their absolute paths, from the manifests of all runs."""
        files = []
        for folder in self.run_folders():
            with contextlib.suppress(FileNotFoundError):  # removed a moment ago
                files += [str(folder.path / f.path) for f in read_manifest(folder.path, folder.run).of(table)]
        return files

    @contextlib.contextmanager
    def locked(self, folder: RunFolder, *, patience: float = _GLANCE) -> Iterator[None]:
        """Keep other processes from a committed run; raises WarehouseError if one has it for ``patience`` seconds."""
        lock = FileLock(self.staging / f"{folder.run}.lock")
        with storage_errors(self.path):
            self.staging.mkdir(exist_ok=True)
            try:
                lock.acquire(timeout=patience)
            except Timeout:
                raise WarehouseError(
                    f"Run {folder.run} is being written by another process: ask again later."
                ) from None
        try:
            yield
        finally:
            lock.release()

    def replace(self, folder: RunFolder, new: Path, manifest: Manifest) -> None:
        """Put ``new``, which holds the files of the manifest, in a committed run's place, in one step.

        Every file is one that was verified a moment ago.

        Raises WarehouseError where the system has no such step: with two, a reader in between would miss the run.
        """
        write_json(new / MANIFEST, manifest.content())
        _exchange(new, folder.path)
        self.inspector.remember(replace(folder, version=_version(folder.path) or ""), manifest)

    # Staging ---------------------------------------------------------------------------------------------------------

    def interrupted(self) -> list[Leftover]:
        """Runs in progress or interrupted, each with what it said of itself when it was begun."""
        found = []
        for file in sorted(self.staging.glob("*/run.json")):
            with contextlib.suppress(OSError, WarehouseError):  # committed a moment ago
                begun = parse_json(file.read_bytes(), file)
                if {"run", "model", "dataset"} <= set(begun):
                    at_work = not _is_free(self.staging / f"{file.parent.name}.lock")
                    found.append(Leftover(file.parent, _bytes_of(file.parent), begun, at_work))
        return found

    def leftovers(self) -> list[Leftover]:
        """Folders in staging that nothing reads any more, left by a process that is gone."""
        found = []
        for path in sorted(self.staging.glob("*-*")):
            kind, _, rest = path.name.partition("-")
            if kind in ("removed", "rewritten", "copied", "held") and path.is_dir() and not path.is_symlink():
                # Who copies a run or writes it anew holds its lock, and who holds a snapshot that of its folder.
                lock = path.name if kind == "held" else rest.partition("-")[0]
                if kind == "removed" or _is_free(self.staging / f"{lock}.lock"):
                    found.append(Leftover(path, _bytes_of(path)))
        return found

    def sweep(self) -> int:
        """Delete what nothing reads any more from staging (`leftovers`); returns its bytes."""
        swept = 0
        for left in self.leftovers():
            shutil.rmtree(left.path, ignore_errors=True)
            (self.staging / f"{left.path.name}.lock").unlink(missing_ok=True)
            swept += left.bytes
        return swept

    def discard(self, left: Leftover) -> bool:
        """Delete a run in progress, unless a process is at work on it; whether it was deleted."""
        lock = FileLock(self.staging / f"{left.path.name}.lock")
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(left.path, ignore_errors=True)
        except Timeout:
            return False
        return True

    @contextlib.contextmanager
    def held(self, folders: Sequence[RunFolder]) -> Iterator[tuple[Path, list[RunFolder]]]:
        """A lake of links to the files of some runs, which stay readable whatever becomes of the runs.

        Yields its root and the runs in it; the lake itself where the disk has no links or may not be written. Raises
        FileNotFoundError where a run is gone already.
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
        """Delete a committed run: one rename takes it out of every reader's sight."""
        folder = self.find(run)
        with storage_errors(self.path):
            self.staging.mkdir(exist_ok=True)
            grave = self.staging / f"removed-{run}-{uuid.uuid4().hex[:8]}"
            folder.path.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)  # what is left is swept away later: see `sweep`
            for parent in folder.path.parents[:2]:
                with contextlib.suppress(OSError):  # another run lives there
                    parent.rmdir()

    def verify(self) -> Iterator[Damage]:
        """Check every committed file against its manifest, naming what is damaged. Each run is locked meanwhile.

        Where the warehouse may not be written, there are no locks.
        """
        writable = os.access(self.staging if self.staging.is_dir() else self.path, os.W_OK)
        for listed in self.run_folders():
            with self.locked(listed, patience=_PATIENCE) if writable else contextlib.nullcontext():
                version = _version(listed.path)
                folder = replace(listed, version=version or "")
                damages = list(_verify_run(folder))
                if version is None or _version(listed.path) != version:
                    continue  # removed meanwhile, which no lock keeps anybody from
                if not damages:
                    self.inspector.remember(folder, self.manifest(folder))
                yield from damages

    def adopt(self, folder: RunFolder, prepare: Prepare = lambda _copy, _manifest: {}) -> bool:
        """Copy a run of another warehouse, and commit it if every file is what its manifest says.

        ``prepare`` is called with the copy, once its files were compared with the manifest, and returns the tables that
        it is committed with instead of its own; it may refuse the run with a WarehouseError. The source is not read
        again: it may change meanwhile. False where the run is here already. Raises WarehouseError for a run that is
        damaged, or being measured here; nothing of it is then visible.
        """
        with self.stage(folder.run, folder.model, folder.dataset) as staged:
            if staged.committed:
                return False
            staged.adopt(folder, prepare)
        return True

    def stage(self, run: str, model: str, dataset: str, *, identity: Mapping[str, Any] | None = None) -> StagedRun:
        """Begin or resume a run; use it in a ``with`` statement, which holds the run's lock.

        ``identity`` is what the run's id was computed from (`run_id`); without it nobody can import the run.
        """
        return StagedRun(self, run, model, dataset, identity)


class StagedRun:
    """A run in progress: parts that are finished stay finished, whatever happens to the writer.

    ``committed`` says whether the run stands in the lake, and so has nothing left to be written.
    """

    def __init__(
        self, lake: Lake, run: str, model: str, dataset: str, identity: Mapping[str, Any] | None = None
    ) -> None:
        if identity is not None and run_id(identity) != run:
            raise AssertionError(f"the run id {run} is not that of its identity")
        self.run, self.model, self.dataset, self.identity = run, model, dataset, identity
        self._inspector = lake.inspector
        self.path = lake.staging / run
        self.target = lake.root / partitions(model, dataset, run)
        self.committed = False
        self._hashed: Manifest | None = None
        self._lock = FileLock(lake.staging / f"{run}.lock")

    def __enter__(self) -> StagedRun:
        """Take the run's lock; raises WarehouseError if another process has it."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise WarehouseError(
                    f"Run {self.run} ({self.model} on {self.dataset}) is being measured by another process: "
                    "wait for it to finish, then ask again."
                ) from None
            try:
                self._begin()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the lock; what is finished stays in staging."""
        if self.path.is_dir() and not any(self.path.rglob("*.parquet")):
            shutil.rmtree(self.path, ignore_errors=True)
        if self.committed:
            # Whoever still waits on the removed file finds the run committed, and has nothing to write.
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _begin(self) -> None:
        self.committed = self._stands()
        if self.committed:  # by the process that held the lock a moment ago
            shutil.rmtree(self.path, ignore_errors=True)
            return
        if (self.path / MANIFEST).exists():  # its commit was cut off
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
        """What is known of the run since it was begun: its names, ``started_at``, and what was remembered."""
        facts: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        return facts

    def remember(self, **facts: object) -> None:
        """Keep facts of a run in progress that a resumed run could not know otherwise."""
        write_json(self.path / "run.json", {**self.facts, **facts})

    def restart(self, **facts: object) -> None:
        """Drop every finished part, and remember nothing but the run's names, when it was begun, and these facts."""
        with storage_errors(self.path):
            for child in self.path.iterdir():
                if child.is_dir():
                    shutil.rmtree(child)
            kept = {name: self.facts[name] for name in ("run", "model", "dataset", "started_at")}
            write_json(self.path / "run.json", {**kept, **facts})

    def _stands(self) -> bool:
        """Whether the run is in the lake already."""
        return self.target.is_dir()

    def part(self, table: str, name: str) -> Path:
        """Where a part lies once it is finished."""
        return self.path / table / f"{name}.parquet"

    def has(self, table: str, name: str) -> bool:
        """Whether a part is finished."""
        return self.part(table, name).exists()

    def parts(self, table: str) -> list[Path]:
        """The finished parts of a table, in order of their names."""
        return sorted(path for path in (self.path / table).glob("*.parquet") if path.stem != "all")

    def table(self, table: str) -> pa.Table:
        """The rows of the finished parts of a table."""
        return read_parts(self.parts(table))

    def write(self, table: str, name: str, groups: Iterable[pa.Table], *, seconds: float = 0.0) -> None:
        """Write one part, each Arrow table a row group; it counts when it is whole.

        ``seconds`` is the time spent measuring what it holds; the parts' sum is the run's.
        """
        with storage_errors(self.path):
            write_parquet(self.part(table, name), map(self._signed, groups), seconds=seconds)

    def write_rows(self, table: str, name: str, rows: Sequence[Mapping[str, Any]], *, seconds: float = 0.0) -> None:
        """Write one part of a small table from dictionaries; absent columns are NULL."""
        self.write(table, name, [pa.Table.from_pylist(list(rows), schema=arrow_schema(table))], seconds=seconds)

    def commit(self, run_row: Mapping[str, Any]) -> None:
        """Make the run visible, whole, in one rename.

        ``run_row`` is the row of ``runs``; times and the list of tables are filled in here. The manifest is
        written last: what it names is the run, and whoever next takes the lock ends a commit that was cut off.
        """
        with storage_errors(self.path):
            self._seal(run_row)
            self._publish()

    def adopt(self, folder: RunFolder, prepare: Prepare) -> None:
        """Become a copy of a committed run, see `Lake.adopt`. Raises WarehouseError if it is damaged."""
        # In a folder of its own: what is copied is never taken for a part that was measured here.
        copy = self.path.with_name(f"copied-{self.run}-{uuid.uuid4().hex[:8]}")
        try:
            try:
                manifest = read_manifest(folder.path, folder.run)
            except FileNotFoundError:
                raise WarehouseError(f"{folder.path / MANIFEST} is missing: the run is not copied.") from None
            with storage_errors(self.path):
                for record in manifest.files:
                    _copy_regular(folder.path / record.path, copy / record.path)
            for record in manifest.files:
                if problem := problem_of(copy, record):
                    raise WarehouseError(f"{folder.path / record.path} is damaged ({problem}): the run is not copied.")
            changed = prepare(replace(folder, path=copy), manifest)
            with storage_errors(self.path):
                records = [self._replaced(copy, manifest, table, rows) for table, rows in changed.items()]
                kept = [record for record in manifest.files if record.table not in changed]
                version = SCHEMA_VERSION if changed else manifest.schema_version
                self._hashed = replace(manifest, files=(*kept, *records), schema_version=version)
                write_json(copy / MANIFEST, self._hashed.content())
                write_json(copy / "run.json", self.facts)
                shutil.rmtree(self.path)
                copy.rename(self.path)  # from here on, whoever takes the lock ends the commit
                self._publish()
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _replaced(self, copy: Path, manifest: Manifest, table: str, rows: pa.Table) -> FileRecord:
        """Write a table in the place of its files in a copy."""
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
        if self._hashed is not None:  # a moment ago, from the disk
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
        # Vectors stay as they are: their row groups are what lets a reader skip all other layers.
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
    """The rows of some Parquet files of one table."""
    return pa.concat_tables((pq.ParquetFile(part).read() for part in parts), promote_options="default")


def table_files(run: Path, table: str) -> list[Path]:
    """The Parquet files of a table in a committed run's folder."""
    return sorted((run / table).glob("*.parquet"))


def write_parquet(path: Path, groups: Iterable[pa.Table], *, seconds: float = 0.0) -> None:
    """Write Arrow tables as the row groups of one Parquet file that appears whole or not at all.

    Vectors of float32 are split by byte, which makes their exponents compress (DuckDB cannot read float16
    so); everything is zstd.
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
            if len(group):  # `datasets` reads no file that has an empty row group
                writer.write_table(group, row_group_size=len(group))


def _signed(rows: pa.Table, *names: str) -> pa.Table:
    """The rows, with the columns that their path names: readers that know no partitions see where a file is from."""
    rows = rows.drop_columns([name for name in PARTITIONS if name in rows.column_names])  # of a run that they come from
    for column, name in zip(PARTITIONS, names, strict=True):
        rows = rows.append_column(column, pa.repeat(name, len(rows)))
    return rows


def _is_float32_vector(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_float32(kind.value_type))


def partitions(model: str, dataset: str, run: str) -> str:
    """A run's folder within the lake. Raises WarehouseError for a name that cannot be one of a folder."""
    return f"model={_encoded(model)}/dataset={_encoded(dataset)}/run={run}"


def _encoded(name: str) -> str:
    """A model's or dataset's name as a partition value, which every engine reads back as this text."""
    text = quote(name, safe="", errors="surrogatepass")
    if name in _WORDS or not name.strip() or len(text) > _LONGEST_NAME:
        raise WarehouseError(f"{name[:200]!r} cannot be stored as a name: give another with --name or --dataset-name.")
    # DuckDB reads a bare null as NULL.
    return f"%{ord(text[0]):02X}{text[1:]}" if text.lower() == "null" else text


def _decoded(folder: Path) -> str:
    """The name that a partition's folder spells. Raises WarehouseError for one that kdb would spell otherwise."""
    value = folder.name.partition("=")[2]
    if value == NOBODY:
        return value
    name = unquote(value, errors="surrogatepass")
    try:
        spelled = _encoded(name)
    except (WarehouseError, UnicodeError):
        raise _odd(folder, "that is no name that can be stored") from None
    if spelled != value:
        raise _odd(folder, f"the name would be spelled {spelled!r}")
    return name


def _odd(path: Path, why: str) -> WarehouseError:
    return WarehouseError(
        f"{str(path)!r} is no folder that kdb writes: {why}. Delete it, or put it where it came from, and ask again."
    )


def _version(run: Path) -> str | None:
    """Text that changes when the run in this folder is written anew; None if gone, empty without a manifest."""
    try:
        status = os.lstat(f"{run}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        return "" if run.is_dir() else None
    except OSError:  # a folder that may not be read: said when its files are looked at
        return ""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def check_version(location: str, marker: str | bytes) -> int:
    """The schema version in the content of a warehouse.json. Raises WarehouseError unless this kdb reads its tables."""
    version = schema_version_of(marker, location + "/warehouse.json")
    if version > SCHEMA_VERSION:
        raise WarehouseError(
            f"The warehouse {location!r} was written by a newer kdb (schema {version}, this one knows "
            f"{SCHEMA_VERSION}): upgrade kdb, or name another with --warehouse."
        )
    if version < OLDEST_SCHEMA:
        raise WarehouseError(
            f"The warehouse {location!r} was written by an older kdb (schema {version}, this one reads "
            f"{OLDEST_SCHEMA} and later): measure again into a new folder, named with --warehouse."
        )
    return version


def _is_vacant(path: Path) -> bool:
    """Whether a warehouse can be made here: nothing is, or an empty folder, or what a killed kdb left of one."""
    return not path.exists() or (path.is_dir() and all(map(is_partial, path.iterdir())))


def _subfolders(parent: Path, prefix: str) -> list[Path]:
    # A folder can vanish between two looks, when another process removes a run.
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
        raise WarehouseError(f"{str(parent)!r} cannot be read: {error.strerror}.") from error


def empty_file(root: Path, table: str) -> Path:
    """The typed file without rows that keeps a table's view valid, in the lake at ``root``."""
    return root / f"model={NOBODY}/dataset={NOBODY}/run={NOBODY}" / table / "empty.parquet"


def _write_empty_tables(root: Path) -> None:
    for table in TABLES:
        write_parquet(empty_file(root, table), [_signed(arrow_schema(table).empty_table(), *[NOBODY] * 3)])


def seconds_of(path: Path) -> float:
    """Seconds that it took to measure what a file holds; 0 where the file does not say."""
    try:
        seconds = float((pq.read_schema(path).metadata or {}).get(_SECONDS, 0))
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def row_counts(folder: RunFolder) -> dict[str, int]:
    """The rows of each table of a run, as its manifest says. Raises WarehouseError where that is unreadable."""
    try:
        return read_manifest(folder.path, folder.run).row_counts()
    except FileNotFoundError:
        raise WarehouseError(f"{folder.path / MANIFEST} is missing: run {folder.run} is damaged.") from None


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
    """Copy a file, if it is one: what else stands in its place is left out, and then missed as any other damage."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISREG(source.lstat().st_mode) and not source.parent.is_symlink():
            shutil.copyfile(source, target)
            sync(target)


def _link_folder(source: Path, target: Path) -> None:
    """Make a folder like ``source``, a level deep, of links to its files."""
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
    for parent, _, names in os.walk(folder):  # unlike rglob, it bears that a folder is gone meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def _is_free(lock: Path) -> bool:
    """Whether no process holds a lock."""
    try:
        with FileLock(lock).acquire(timeout=0):
            return True
    except (Timeout, OSError):
        return False


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change names. Raises WarehouseError where the system has no such step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        at_here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        names = (at_here, os.fsencode(one), at_here, os.fsencode(other))
        if hasattr(libc, "renameat2") and libc.renameat2(*names, exchange) == 0:
            return
        if not other.is_dir():
            raise WarehouseError(f"{other} was removed by another process meanwhile: there is nothing to change.")
    raise WarehouseError(
        f"{other}: this system cannot exchange two folders in one step, and a reader would miss the run in between. "
        "Export the runs to a disk of Linux's, and do it there."
    )
