"""The warehouse's folders: parts in staging, one atomic rename to commit, checksums to verify by.

    W/warehouse.json                                        marks the folder; schema version
    W/lake/model=M/dataset=D/run=R/<table>/<part>.parquet   committed runs, with a manifest.json each
    W/staging/R/<table>/<part>.parquet                      a run in progress

A part counts once it has its final name; a run counts once its folder stands in ``lake``. Both appear by
rename, so a reader sees all of it or nothing, whenever the writer is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from kdb.errors import UnknownNameError, WarehouseError
from kdb.warehouse.schema import PARTITIONS, SCHEMA_VERSION, TABLES, arrow_schema, has_vectors

NOBODY = "__none__"
"""Partition value of the empty typed files, which keep every view valid before the first run."""

_MERGE_BELOW = 64 * 2**20
"""A table whose parts hold fewer bytes than this is committed as one file: few files keep queries fast."""

_SECONDS = b"kdb_seconds"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class RunFolder:
    """A committed run, as its path tells it."""

    run: str
    model: str
    dataset: str
    path: Path


@dataclass(frozen=True)
class FileRecord:
    """What the manifest records of a file at commit; ``path`` is relative to the run's folder."""

    path: str
    rows: int
    bytes: int
    sha256: str

    @property
    def table(self) -> str:
        """The table whose rows it holds."""
        return self.path.partition("/")[0]


@dataclass(frozen=True)
class Damage:
    """A committed file that is not what it was at commit."""

    run: str
    path: Path
    problem: str


def run_id(identity: Mapping[str, Any]) -> str:
    """Sixteen hex digits derived from everything that determines a result, the schema version included."""
    text = json.dumps({**identity, "schema_version": SCHEMA_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        self._check_marker()

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
        return cls(path)

    def _check_marker(self) -> None:
        name = repr(str(self.path))
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
        check_version(str(self.path), content)

    def restore_empty_tables(self) -> None:
        """Write the empty typed files again, without which a view over no run is an error."""
        with storage_errors(self.path):
            _write_empty_tables(self.root)

    def run_folders(self) -> list[RunFolder]:
        """Every committed run, by model, dataset and run."""
        found = []
        for model in _subfolders(self.root, "model="):
            for dataset in _subfolders(model, "dataset="):
                for run in _subfolders(dataset, "run="):
                    names = [unquote(folder.name.partition("=")[2]) for folder in (run, model, dataset)]
                    if names[0] != NOBODY:
                        found.append(RunFolder(names[0], names[1], names[2], run))
        return found

    def find(self, run: str) -> RunFolder:
        """The committed run with this id; raises UnknownNameError."""
        folders = {folder.run: folder for folder in self.run_folders()}
        if run not in folders:
            raise UnknownNameError("run", run, folders, "`kdb runs` lists them.")
        return folders[run]

    def records(self, run: str) -> list[FileRecord]:
        """The files of a committed run. Raises UnknownNameError."""
        return read_manifest(self.find(run).path)

    def committed_files(self, table: str) -> list[str]:
        """The committed files of a table by their absolute paths, from the manifests of all runs."""
        files = []
        for folder in self.run_folders():
            with contextlib.suppress(FileNotFoundError):  # removed a moment ago
                files += [str(folder.path / f.path) for f in read_manifest(folder.path) if f.table == table]
        return files

    @contextlib.contextmanager
    def locked(self, folder: RunFolder) -> Iterator[None]:
        """Keep other processes from a committed run; raises WarehouseError if one has it."""
        self.staging.mkdir(exist_ok=True)
        lock = FileLock(self.staging / f"{folder.run}.lock")
        try:
            with lock.acquire(timeout=0):
                yield
        except Timeout:
            raise WarehouseError(f"Run {folder.run} is being written by another process: ask again later.") from None

    def replace(self, folder: RunFolder, new: Path, kept: Sequence[FileRecord], written: Sequence[FileRecord]) -> None:
        """Put ``new``, which holds the files kept and written, in a committed run's place, in one step.

        Raises WarehouseError where the system has no such step: with two, a reader in between would miss the run.
        """
        files = [asdict(file) for file in (*kept, *written)]
        write_json(new / "manifest.json", {"schema_version": SCHEMA_VERSION, "files": files})
        _exchange(new, folder.path)

    def interrupted(self) -> list[dict[str, Any]]:
        """What each run in staging said of itself when it was begun."""
        said = []
        for file in sorted(self.staging.glob("*/run.json")):
            with contextlib.suppress(FileNotFoundError):  # committed a moment ago
                said.append(json.loads(file.read_text()))
        return said

    def remove(self, run: str) -> None:
        """Delete a committed run: one rename takes it out of every reader's sight."""
        folder = self.find(run)
        with storage_errors(self.path):
            self.staging.mkdir(exist_ok=True)
            grave = self.staging / f"removed-{run}-{uuid.uuid4().hex[:8]}"
            folder.path.rename(grave)
            shutil.rmtree(grave)
            for parent in folder.path.parents[:2]:
                with contextlib.suppress(OSError):  # another run lives there
                    parent.rmdir()

    def verify(self) -> Iterator[Damage]:
        """Check every committed file against its manifest, naming what is damaged."""
        for folder in self.run_folders():
            yield from _verify_run(folder)

    def adopt(self, folder: RunFolder) -> bool:
        """Copy a run of another warehouse, and commit it if every file is what its manifest says.

        False where the run is here already. Raises WarehouseError for a run that is damaged, of another schema
        version, or being measured here; nothing of it is then visible.
        """
        if not re.fullmatch("[0-9a-f]{16}", folder.run):
            raise WarehouseError(f"{folder.path} is no run's folder: run ids are 16 hex digits. It is not copied.")
        with self.stage(folder.run, folder.model, folder.dataset) as staged:
            if staged.committed:
                return False
            staged.adopt(folder.path)
        return True

    def stage(self, run: str, model: str, dataset: str) -> StagedRun:
        """Begin or resume a run; use it in a ``with`` statement, which holds the run's lock."""
        return StagedRun(self, run, model, dataset)


class StagedRun:
    """A run in progress: parts that are finished stay finished, whatever happens to the writer.

    ``committed`` says whether the run stands in the lake, and so has nothing left to be written.
    """

    def __init__(self, lake: Lake, run: str, model: str, dataset: str) -> None:
        self.run, self.model, self.dataset = run, model, dataset
        self.path = lake.staging / run
        self.target = lake.root / partitions(model, dataset, run)
        self.committed = False
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
        if (self.path / "manifest.json").exists():  # its commit was cut off
            self._publish()
            return
        for stray in filter(_is_partial, self.path.rglob("*")):
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

    def adopt(self, folder: Path) -> None:
        """Become a copy of a committed run's folder. Raises WarehouseError where that is damaged."""
        records = _adoptable(folder)
        try:
            with storage_errors(self.path):
                for record in records:
                    copy = self.path / record.path
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    with contextlib.suppress(FileNotFoundError):  # said below, as any other damage
                        shutil.copyfile(folder / record.path, copy)
                        _sync(copy)
            for record in records:
                if problem := _problem(self.path, record):
                    raise WarehouseError(f"{folder / record.path} is damaged ({problem}): the run is not copied.")
        except WarehouseError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        with storage_errors(self.path):
            # Written last, and as it was: it makes the copies the run.
            write_json(self.path / "manifest.json", json.loads((folder / "manifest.json").read_text()))
            self._publish()

    def _publish(self) -> None:
        self._drop_strays()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.path.rename(self.target)
        _sync(self.target.parent)
        self.committed = True

    def _seal(self, run_row: Mapping[str, Any]) -> None:
        tables = {folder.name for folder in self.path.iterdir() if folder.is_dir()} | {"runs"}
        parts = {table: self.parts(table) for table in sorted(tables - {"runs"})}
        row = {
            **run_row,
            "tables": sorted(tables),
            "started_at": datetime.fromisoformat(self.facts["started_at"]),
            "finished_at": datetime.now(UTC),
            "seconds": sum(_seconds(path) for paths in parts.values() for path in paths),
        }
        self.write_rows("runs", "all", [row])
        files = [self.part("runs", "all")]
        for table, paths in parts.items():
            files += self._merged(table, paths)
        records = [asdict(file_record(path, self.path)) for path in files]
        write_json(self.path / "manifest.json", {"schema_version": SCHEMA_VERSION, "files": records})

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
        kept = {self.path / record.path for record in read_manifest(self.path)} | {self.path / "manifest.json"}
        for path in self.path.rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()


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
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _is_partial(path: Path) -> bool:
    """Whether a file is what a killed writer left."""
    return path.suffix == _PARTIAL


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


def partitions(model: str, dataset: str, run: str) -> str:
    """A run's folder within the lake. Raises WarehouseError for a name that cannot be one of a folder."""
    return f"model={_encoded(model)}/dataset={_encoded(dataset)}/run={run}"


def _encoded(name: str) -> str:
    """A model's or dataset's name as a partition value, which every engine reads back as this text."""
    if name in (NOBODY, "__HIVE_DEFAULT_PARTITION__") or not name.strip():
        raise WarehouseError(f"{name!r} cannot be stored as a name: give another with --name or --dataset-name.")
    text = quote(name, safe="")
    # DuckDB reads a bare null as NULL.
    return f"%{ord(text[0]):02X}{text[1:]}" if text.lower() == "null" else text


def check_version(location: str, marker: str | bytes) -> None:
    """Raise WarehouseError unless the content of a warehouse.json says that this kdb reads and writes its tables."""
    try:
        version = int(json.loads(marker)["schema_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise WarehouseError(
            f'{location + "/warehouse.json"!r} is damaged: expected {{"schema_version": {SCHEMA_VERSION}}}.'
        ) from error
    if version > SCHEMA_VERSION:
        raise WarehouseError(
            f"The warehouse {location!r} was written by a newer kdb (schema {version}, this one knows "
            f"{SCHEMA_VERSION}): upgrade kdb, or name another with --warehouse."
        )
    if version < SCHEMA_VERSION:
        raise WarehouseError(
            f"The warehouse {location!r} was written by an older kdb (schema {version}, this one needs "
            f"{SCHEMA_VERSION}): measure again into a new folder, named with --warehouse."
        )


def _is_vacant(path: Path) -> bool:
    """Whether a warehouse can be made here: nothing is, or an empty folder, or what a killed kdb left of one."""
    return not path.exists() or (path.is_dir() and all(map(_is_partial, path.iterdir())))


def _subfolders(parent: Path, prefix: str) -> list[Path]:
    # A folder can vanish between two looks, when another process removes a run.
    try:
        with os.scandir(parent) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.name.startswith(prefix))
    except FileNotFoundError:
        return []


def empty_file(root: Path, table: str) -> Path:
    """The typed file without rows that keeps a table's view valid, in the lake at ``root``."""
    return root / f"model={NOBODY}/dataset={NOBODY}/run={NOBODY}" / table / "empty.parquet"


def _write_empty_tables(root: Path) -> None:
    for table in TABLES:
        write_parquet(empty_file(root, table), [_signed(arrow_schema(table).empty_table(), *[NOBODY] * 3)])


def _seconds(path: Path) -> float:
    return float(pq.read_schema(path).metadata[_SECONDS])


def file_record(path: Path, folder: Path) -> FileRecord:
    """What a manifest says of a file in a run's folder."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = pq.read_metadata(path).num_rows
    return FileRecord(path.relative_to(folder).as_posix(), rows, path.stat().st_size, digest)


def read_manifest(folder: Path) -> list[FileRecord]:
    """The files of a run, as its manifest names them."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return [FileRecord(**file) for file in files]


def row_counts(folder: RunFolder) -> dict[str, int]:
    """The rows of each table of a run, as its manifest says. Raises WarehouseError where that is unreadable."""
    counts: dict[str, int] = {}
    for record in _adoptable(folder.path):
        table = record.path.partition("/")[0]
        counts[table] = counts.get(table, 0) + record.rows
    return counts


def _adoptable(folder: Path) -> list[FileRecord]:
    """The files of a run, if this kdb can read them and each lies within the run's folder; else WarehouseError."""
    try:
        version = json.loads((folder / "manifest.json").read_text())["schema_version"]
        records = read_manifest(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WarehouseError(f"{folder / 'manifest.json'} is unreadable ({error}): the run is not copied.") from error
    if version != SCHEMA_VERSION:
        raise WarehouseError(
            f"{folder} was written with schema {version}, and this kdb has {SCHEMA_VERSION}: the run is not copied."
        )
    for record in records:
        parts = Path(record.path).parts
        if len(parts) != 2 or parts[0] not in TABLES or ".." in parts or Path(record.path).suffix != ".parquet":
            raise WarehouseError(f"{folder / 'manifest.json'} names {record.path!r}, which is no table's file.")
    return records


def _verify_run(folder: RunFolder) -> Iterator[Damage]:
    try:
        records = read_manifest(folder.path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Damage(folder.run, folder.path / "manifest.json", f"unreadable ({error})")
        return
    for record in records:
        problem = _problem(folder.path, record)
        if problem:
            yield Damage(folder.run, folder.path / record.path, problem)
    known = {folder.path / record.path for record in records}
    for path in sorted(set(folder.path.rglob("*.parquet")) - known):
        yield Damage(folder.run, path, "not part of the run: it was added after commit")


def _problem(folder: Path, record: FileRecord) -> str:
    path = folder / record.path
    if not path.exists():
        return "missing"
    try:
        found = file_record(path, folder)
    except (OSError, pa.ArrowException) as error:
        return f"unreadable ({error})"
    for what in ("bytes", "rows", "sha256"):
        expected, actual = getattr(record, what), getattr(found, what)
        if expected != actual:
            return f"{what}: {expected} at commit, {actual} now"
    return ""


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change names. Raises WarehouseError where the system has no such step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        at_here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        names = (at_here, os.fsencode(one), at_here, os.fsencode(other))
        if hasattr(libc, "renameat2") and libc.renameat2(*names, exchange) == 0:
            return
    raise WarehouseError(
        f"{other}: this system cannot exchange two folders in one step, and a reader would miss the run in between. "
        "Export the runs to a disk of Linux's, and do it there."
    )


def _sync(path: Path) -> None:
    # A rename must not reach the disk before what it makes visible.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
