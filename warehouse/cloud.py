"""A warehouse in an object store, which has no rename: a run is committed by writing the object that lists its files.

    s3://bucket/prefix/warehouse.json                                           marks the warehouse; schema version
                      /lake/model=M/dataset=D/run=R/<table>/<part>-A.parquet    A: this attempt to write the run
                      /commits/R.json                                           names the files; written last, if absent

Readers ignore files that no commit lists, such as those of a killed writer, or of the slower of two writers of the same
run. The store itself checks that a commit does not exist yet, so exactly one of two writers succeeds.

A folder in the user's cache mirrors the layout. Runs are staged there as in any warehouse, and files that were read are
cached there, because committed files never change. The folder can be deleted whenever no kdb process is running.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from platformdirs import user_cache_path

from kdb.errors import UnknownNameError, WarehouseError
from kdb.warehouse.block_cache import BlockFile
from kdb.warehouse.bucket import Bucket, Found
from kdb.warehouse.files import appears_whole, storage_errors, write_json
from kdb.warehouse.lake import Damage, Lake, StagedRun, check_version, empty_file, partitions
from kdb.warehouse.manifest import (
    MANIFEST,
    RUN_ID,
    FileRecord,
    Manifest,
    RunFolder,
    parse_json,
    parse_manifest,
    read_manifest,
)
from kdb.warehouse.remote import SCHEME, CommittedFiles
from kdb.warehouse.schema import SCHEMA_VERSION, TABLES, has_vectors

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_AT_ONCE = 16
"""Maximum number of concurrent requests."""


@dataclass(frozen=True)
class Commit:
    """A committed run. The manifest's paths are relative to the run's folder; each file name contains ``attempt``."""

    run: str
    model: str
    dataset: str
    attempt: str
    manifest: Manifest

    @classmethod
    def read(cls, content: bytes, where: str) -> Commit:
        """Return the commit in an object. Raises WarehouseError if it is invalid or has an unsupported schema."""
        said = parse_json(content, where)
        names = {name: said.get(name) for name in ("run", "model", "dataset", "attempt")}
        if not all(isinstance(name, str) and name for name in names.values()):
            raise WarehouseError(f"{where} is damaged: run, model, dataset or attempt is not a text.")
        run = str(names["run"])
        if not RUN_ID.fullmatch(run):
            raise WarehouseError(f"{where} is damaged: run ids are 16 hex digits.")
        commit = cls(**cast("dict[str, str]", names), manifest=parse_manifest(content, run, where))
        partitions(commit.model, commit.dataset, commit.run)  # raises for an invalid name
        return commit

    def content(self) -> bytes:
        """Return the content of the commit's object."""
        names = {"run": self.run, "model": self.model, "dataset": self.dataset, "attempt": self.attempt}
        return json.dumps({**self.manifest.content(), **names}, indent=1).encode()

    @property
    def folder(self) -> str:
        """The run's folder, within the warehouse."""
        return f"lake/{partitions(self.model, self.dataset, self.run)}"

    def paths(self, table: str | None = None) -> dict[str, FileRecord]:
        """Return the files of one table or of all, by their paths within the warehouse."""
        return {f"{self.folder}/{f.path}": f for f in self.manifest.files if table in (None, f.table)}


class CloudLake(Lake):
    """The warehouse under a URL, with a local mirror of files that were read or are being written.

    Raises WarehouseError if there is no warehouse, if it has another schema, or if the store refuses.
    """

    def __init__(self, url: str, bucket: Bucket | None = None) -> None:
        self.bucket = bucket or Bucket.at(url)
        content = self.bucket.get("warehouse.json")
        if content is None:
            raise WarehouseError(
                f"There is no warehouse at {url!r}. Create one with `kdb ingest`, or name another with --warehouse."
            )
        version = check_version(url, content)
        super().__init__(Lake.create(_mirror(url)).path)
        self.schema_version = version
        self.location = url
        self._known: dict[str, tuple[str, Commit]] = {}

    @classmethod
    def create_at(cls, url: str, bucket: Bucket | None = None) -> CloudLake:
        """Open the warehouse at a URL, and create it if there is none."""
        bucket = bucket or Bucket.at(url)
        if bucket.get("warehouse.json") is None:
            bucket.put_new("warehouse.json", json.dumps({"schema_version": SCHEMA_VERSION}).encode())
        lake = cls(url, bucket)
        lake.raise_version()
        return lake

    def raise_version(self) -> None:
        """Record in the warehouse that it may hold runs of this kdb's schema, so that an older kdb refuses it."""
        if self.schema_version < SCHEMA_VERSION:
            marker = json.dumps({"schema_version": SCHEMA_VERSION}).encode()
            self.bucket.put_over("warehouse.json", marker, lambda found: found != marker)
            self.schema_version = SCHEMA_VERSION

    @property
    def older_runs(self) -> bool:
        """Whether there are runs of an older schema."""
        return any(commit.manifest.schema_version < SCHEMA_VERSION for commit in self.commits().values())

    # What is committed -----------------------------------------------------------------------------------------------

    def commits(self) -> dict[str, Commit]:
        """Return all committed runs by their ids, with one listing, and one request for each new commit."""
        listed = {Path(found.path).stem: found for found in self.bucket.list("commits")}
        seen = {run: known for run, known in self._known.items() if run in listed and known[0] == listed[run].tag}
        new = [found for run, found in listed.items() if run not in seen]
        for found, commit in zip(new, _at_once(self._commit, new), strict=True):
            if commit is not None:
                seen[commit.run] = found.tag, commit
        self._known = dict(sorted(seen.items()))
        return {run: commit for run, (_tag, commit) in self._known.items()}

    def _commit(self, found: Found) -> Commit | None:
        """Return a listed commit, which is cached in the mirror under its tag; None if it was removed meanwhile."""
        where = f"{self.location}/{found.path}"
        kept = self.path / "commits" / hashlib.sha256(f"{found.path} {found.tag}".encode()).hexdigest()
        with contextlib.suppress(FileNotFoundError):
            return Commit.read(kept.read_bytes(), where)
        content = self.bucket.get(found.path)
        if content is None:
            return None
        commit = Commit.read(content, where)
        if found.path != f"commits/{commit.run}.json":
            raise WarehouseError(f"{where} is damaged: it holds the commit of another run, {commit.run}.")
        kept.parent.mkdir(exist_ok=True)
        with appears_whole(kept) as partial:
            partial.write_bytes(content)
        return commit

    def run_folders(self) -> list[RunFolder]:
        """Return all committed runs, by model, dataset and run; their folders hold the files cached so far."""
        self.commits()
        found = [
            RunFolder(commit.run, commit.model, commit.dataset, self.path / commit.folder, tag)
            for tag, commit in self._known.values()
        ]
        return sorted(found, key=lambda folder: (folder.model, folder.dataset, folder.run))

    def find(self, run: str) -> RunFolder:
        """Return the committed run with this id, after downloading all its files. Raises UnknownNameError."""
        commit = self._named(run)
        folder = self.path / commit.folder
        self._fetch(commit.paths())
        for path in folder.rglob(
            "*.parquet"
        ):  # files of an earlier run with this id, which was removed and measured again
            if path.relative_to(self.path).as_posix() not in commit.paths():
                path.unlink()
        write_json(folder / MANIFEST, json.loads(commit.content()))
        return RunFolder(run, commit.model, commit.dataset, folder, self._known[run][0])

    def still(self, folders: Iterable[RunFolder]) -> bool:
        """Return True: no object name is written twice, so a file always belongs to the commit that lists it."""
        return True

    def look(self, folders: Sequence[RunFolder], *, vectors: bool) -> None:
        """Do nothing: an object is checked against its commit when it is downloaded."""

    def schema_versions(self, folders: Sequence[RunFolder]) -> dict[str, int]:
        """Return the schema version of each run, by its id."""
        return {folder.run: self._known[folder.run][1].manifest.schema_version for folder in folders}

    def manifest(self, folder: RunFolder) -> Manifest:
        """Return the manifest of a committed run. Raises UnknownNameError."""
        return self._named(folder.run).manifest

    @contextlib.contextmanager
    def held(self, folders: Sequence[RunFolder]) -> Iterator[tuple[Path, list[RunFolder]]]:
        """Yield the lake itself, because an object store has no links."""
        yield self.root, list(folders)

    def records(self, run: str) -> list[FileRecord]:
        """Return the files of a committed run, without downloading them. Raises UnknownNameError."""
        return list(self._named(run).manifest.files)

    def _named(self, run: str) -> Commit:
        commits = self.commits()
        if run not in commits:
            raise UnknownNameError("run", run, commits, "`kdb runs` lists them.")
        return commits[run]

    def remove(self, run: str) -> None:
        """Delete a committed run: without its commit, no reader sees its files."""
        commit = self._named(run)
        self.bucket.delete([f"commits/{run}.json"])
        self.bucket.delete(list(commit.paths()))
        shutil.rmtree(self.path / commit.folder, ignore_errors=True)

    def replace(self, folder: RunFolder, new: Path, manifest: Manifest) -> None:
        """Upload the new files, and replace the commit by one that lists them and the unchanged ones.

        Raises WarehouseError if another process has replaced or removed the run meanwhile.
        """
        before = self._known[folder.run][1]
        attempt = uuid.uuid4().hex[:8]
        renamed = {f.path: f if f in before.manifest.files else _renamed(f, attempt) for f in manifest.files}
        commit = replace(before, attempt=attempt, manifest=replace(manifest, files=tuple(renamed.values())))
        added = {f"{commit.folder}/{f.path}": new / path for path, f in renamed.items() if f.path != path}
        _at_once(self.bucket.upload, added.keys(), added.values())
        place = f"commits/{folder.run}.json"
        where = f"{self.location}/{place}"
        if not self.bucket.put_over(place, commit.content(), lambda found: Commit.read(found, where) == before):
            self.bucket.delete(list(added))
            raise WarehouseError(
                f"Run {folder.run} was changed by another process meanwhile. Run `kdb runs`, then retry."
            )
        self.bucket.delete([path for path in before.paths() if path not in commit.paths()])

    def verify(self) -> Iterator[Damage]:
        """Read every committed file again and check it against its commit; yields the damaged ones."""
        for commit in self.commits().values():
            for path, record in commit.paths().items():
                if problem := self._problem(path, record):
                    yield Damage(commit.run, Path(path), problem)

    def _problem(self, path: str, record: FileRecord) -> str:
        digest = hashlib.sha256()
        try:
            for chunk in self.bucket.chunks(path):
                digest.update(chunk)
        except FileNotFoundError:
            return "missing"
        return "" if digest.hexdigest() == record.sha256 else f"sha256: {record.sha256} at commit, different now"

    def stage(self, run: str, model: str, dataset: str, *, identity: Mapping[str, Any] | None = None) -> StagedRun:
        """Begin or resume a run, staged in the mirror; use it in a ``with`` statement."""
        return _CloudRun(self, run, model, dataset, identity)

    # What is read ----------------------------------------------------------------------------------------------------

    def files(self, folders: Sequence[RunFolder]) -> dict[int, dict[str, list[str]]]:
        """Return the files of each table in these runs, for each schema version.

        A file is given by its local path if it is mirrored, otherwise by ``kdb://`` and its path. In the current schema
        version, the empty typed file comes first.
        """
        if any(folder.run not in self._known for folder in folders):
            self.commits()
        found = {SCHEMA_VERSION: {table: [str(empty_file(self.root, table))] for table in TABLES}}
        for folder in folders:
            if folder.run in self._known:  # otherwise it was removed meanwhile
                commit = self._known[folder.run][1]
                tables = found.setdefault(commit.manifest.schema_version, {})
                for path, record in commit.paths().items():
                    tables.setdefault(record.table, []).append(str(self._local(path, record) or SCHEME + path))
        return found

    @property
    def filesystem(self) -> CommittedFiles:
        """Return the file system that opens ``kdb://`` paths for DuckDB."""
        return CommittedFiles(self.open, lambda path: self.record(path).bytes)

    def committed_files(self, table: str) -> list[str]:
        """Return the URLs of a table's committed files, from the commits of all runs."""
        return [f"{self.location}/{path}" for commit in self.commits().values() for path in commit.paths(table)]

    def open(self, path: str) -> BinaryIO:
        """Open a committed file: downloaded once as a whole, or block by block if it holds vectors.

        Raises WarehouseError if the run was removed.
        """
        record = self.record(path)
        if has_vectors(record.table):
            folder = self.path / "blocks" / path
            return cast(BinaryIO, BlockFile(record.bytes, lambda a, b: self._range(path, a, b), folder))
        return (self._local(path, record) or self._download(path, record)).open("rb")

    def record(self, path: str) -> FileRecord:
        """Return the commit's record of a file."""
        commit = self._known[path.split("/")[3].removeprefix("run=")][1]
        return commit.paths()[path]

    def fetch(self, table: str, runs: Iterable[str]) -> None:
        """Download all files of a table in these runs into the mirror."""
        commits = self.commits()
        self._fetch({p: r for run in runs if run in commits for p, r in commits[run].paths(table).items()})

    def _fetch(self, files: dict[str, FileRecord]) -> None:
        missing = {path: record for path, record in files.items() if self._local(path, record) is None}
        _at_once(self._download, missing.keys(), missing.values())

    def _local(self, path: str, record: FileRecord) -> Path | None:
        local = self.path / path
        try:
            return local if local.stat().st_size == record.bytes else None
        except FileNotFoundError:
            return None

    def _download(self, path: str, record: FileRecord) -> Path:
        local, digest = self.path / path, hashlib.sha256()
        with storage_errors(self.path), _still_there(path):
            local.parent.mkdir(parents=True, exist_ok=True)
            with appears_whole(local) as partial:
                with partial.open("wb") as file:
                    for chunk in self.bucket.chunks(path):
                        digest.update(chunk)
                        file.write(chunk)
                if digest.hexdigest() != record.sha256:
                    raise WarehouseError(f"{self.location}/{path} is damaged. `kdb verify` lists all damaged files.")
        return local

    def _range(self, path: str, start: int, end: int) -> bytes:
        with _still_there(path):
            return self.bucket.range(path, start, end)


class _CloudRun(StagedRun):
    """A run in progress, staged in the mirror and uploaded when it is complete."""

    def __init__(
        self, lake: CloudLake, run: str, model: str, dataset: str, identity: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(lake, run, model, dataset, identity)
        self._lake = lake

    def _stands(self) -> bool:
        return self._lake.bucket.get(f"commits/{self.run}.json") is not None

    def _publish(self) -> None:
        """Upload the files, then the commit that makes them a run.

        If another writer has committed the same run, the uploaded files are deleted.
        """
        if "attempt" not in self.facts:
            self.remember(attempt=uuid.uuid4().hex[:8])  # before any upload: a resumed one must write the same objects
        attempt, bucket = self.facts["attempt"], self._lake.bucket
        manifest = read_manifest(self.path, self.run)
        local = {file: _renamed(file, attempt) for file in manifest.files}
        manifest = replace(manifest, files=tuple(local.values()))
        commit = Commit(self.run, self.model, self.dataset, attempt, manifest)
        log.info("Uploading %.1f MB to %s", sum(f.bytes for f in local) / 1e6, self._lake.location)
        sources = [self.path / file.path for file in local]
        _at_once(bucket.upload, commit.paths(), sources)
        if not bucket.put_new(f"commits/{self.run}.json", commit.content()) and not self._is_ours(commit):
            bucket.delete(list(commit.paths()))
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self._move(sources, commit)
        self.committed = True

    def _is_ours(self, commit: Commit) -> bool:
        """Whether the stored commit is this one: the first request succeeded, but its response was lost."""
        return self._lake.bucket.get(f"commits/{self.run}.json") == commit.content()

    def _move(self, sources: list[Path], commit: Commit) -> None:
        """Move the files to the mirror, where readers look for them first."""
        for source, path in zip(sources, commit.paths(), strict=True):
            kept = self._lake.path / path
            kept.parent.mkdir(parents=True, exist_ok=True)
            source.replace(kept)
        shutil.rmtree(self.path, ignore_errors=True)


def _at_once(function: Callable[..., Result], *arguments: Iterable[Any]) -> list[Result]:
    """Yield a function's results for each argument in order, computed concurrently; the first error stops it."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, *arguments))


def _renamed(file: FileRecord, attempt: str) -> FileRecord:
    return replace(file, path=f"{file.path.removesuffix('.parquet')}-{attempt}.parquet")


def _mirror(url: str) -> Path:
    """Return the folder that mirrors a warehouse: one for each URL and server."""
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    name = hashlib.sha256(f"{server} {url}".encode()).hexdigest()[:16]
    return user_cache_path("kdb") / "warehouses" / name


@contextlib.contextmanager
def _still_there(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise WarehouseError(
            f"{path} no longer exists: its run was removed while it was read. Run the query again."
        ) from None
