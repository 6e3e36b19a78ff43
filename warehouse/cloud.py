"""A warehouse in an object store. There is no rename there: a run is committed by the one object that names its files.

    s3://bucket/prefix/warehouse.json                                           marks the warehouse; schema version
                      /lake/model=M/dataset=D/run=R/<table>/<part>-A.parquet    A: this attempt to write the run
                      /commits/R.json                                           names the files; written last, if absent

What no commit names is not there for any reader: what a killed writer uploaded, or the slower of two that wrote the
same run. The store itself checks that a commit is absent, so one of two writers wins, whole.

A folder in the user's cache mirrors the layout. Runs are staged there as in any warehouse, and what is read is kept
there: committed files never change. It can be deleted at any time when nothing runs.
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
"""Requests under way at the same time."""


@dataclass(frozen=True)
class Commit:
    """A committed run. The manifest's paths are relative to the run's folder; ``attempt`` is in the name of each."""

    run: str
    model: str
    dataset: str
    attempt: str
    manifest: Manifest

    @classmethod
    def read(cls, content: bytes, where: str) -> Commit:
        """The commit in an object. Raises WarehouseError where it is none, or of a schema that kdb does not read."""
        said = parse_json(content, where)
        names = {name: said.get(name) for name in ("run", "model", "dataset", "attempt")}
        if not all(isinstance(name, str) and name for name in names.values()):
            raise WarehouseError(f"{where} is damaged: run, model, dataset and attempt are not texts.")
        run = str(names["run"])
        if not RUN_ID.fullmatch(run):
            raise WarehouseError(f"{where} is damaged: run ids are 16 hex digits.")
        commit = cls(**cast("dict[str, str]", names), manifest=parse_manifest(content, run, where))
        partitions(commit.model, commit.dataset, commit.run)  # refuses what cannot be a name
        return commit

    def content(self) -> bytes:
        """The content of the commit's object."""
        names = {"run": self.run, "model": self.model, "dataset": self.dataset, "attempt": self.attempt}
        return json.dumps({**self.manifest.content(), **names}, indent=1).encode()

    @property
    def folder(self) -> str:
        """The run's folder, within the warehouse."""
        return f"lake/{partitions(self.model, self.dataset, self.run)}"

    def paths(self, table: str | None = None) -> dict[str, FileRecord]:
        """The files of one table or of all, by their paths within the warehouse."""
        return {f"{self.folder}/{f.path}": f for f in self.manifest.files if table in (None, f.table)}


class CloudLake(Lake):
    """The warehouse under a URL, with a local mirror of what was read and of what is being written.

    Raises WarehouseError if there is no warehouse, or one of another schema, or the store refuses.
    """

    def __init__(self, url: str, bucket: Bucket | None = None) -> None:
        self.bucket = bucket or Bucket.at(url)
        content = self.bucket.get("warehouse.json")
        if content is None:
            raise WarehouseError(
                f"There is no warehouse at {url!r}: `kdb ingest` makes one, --warehouse names another."
            )
        version = check_version(url, content)
        super().__init__(Lake.create(_mirror(url)).path)
        self.schema_version = version
        self.location = url
        self._known: dict[str, tuple[str, Commit]] = {}

    @classmethod
    def create_at(cls, url: str, bucket: Bucket | None = None) -> CloudLake:
        """Open the warehouse at a URL, making it first where there is none."""
        bucket = bucket or Bucket.at(url)
        if bucket.get("warehouse.json") is None:
            bucket.put_new("warehouse.json", json.dumps({"schema_version": SCHEMA_VERSION}).encode())
        lake = cls(url, bucket)
        lake.raise_version()
        return lake

    def raise_version(self) -> None:
        """Let the warehouse say that it may hold runs of this kdb's schema, so that an older kdb leaves it alone."""
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
        """Every committed run, by its id: one listing, and one request for each commit not seen before."""
        listed = {Path(found.path).stem: found for found in self.bucket.list("commits")}
        seen = {run: known for run, known in self._known.items() if run in listed and known[0] == listed[run].tag}
        new = [found for run, found in listed.items() if run not in seen]
        for found, commit in zip(new, _at_once(self._commit, new), strict=True):
            if commit is not None:
                seen[commit.run] = found.tag, commit
        self._known = dict(sorted(seen.items()))
        return {run: commit for run, (_tag, commit) in self._known.items()}

    def _commit(self, found: Found) -> Commit | None:
        """A commit as it was listed, kept in the mirror under its tag; None where it was removed meanwhile."""
        where = f"{self.location}/{found.path}"
        kept = self.path / "commits" / hashlib.sha256(f"{found.path} {found.tag}".encode()).hexdigest()
        with contextlib.suppress(FileNotFoundError):
            return Commit.read(kept.read_bytes(), where)
        content = self.bucket.get(found.path)
        if content is None:
            return None
        commit = Commit.read(content, where)
        if found.path != f"commits/{commit.run}.json":
            raise WarehouseError(f"{where} is damaged: it is the commit of run {commit.run}.")
        kept.parent.mkdir(exist_ok=True)
        with appears_whole(kept) as partial:
            partial.write_bytes(content)
        return commit

    def run_folders(self) -> list[RunFolder]:
        """Every committed run, by model, dataset and run; its folder holds what was read of it so far."""
        self.commits()
        found = [
            RunFolder(commit.run, commit.model, commit.dataset, self.path / commit.folder, tag)
            for tag, commit in self._known.values()
        ]
        return sorted(found, key=lambda folder: (folder.model, folder.dataset, folder.run))

    def find(self, run: str) -> RunFolder:
        """The committed run with this id, all of its files fetched; raises UnknownNameError."""
        commit = self._named(run)
        folder = self.path / commit.folder
        self._fetch(commit.paths())
        for path in folder.rglob("*.parquet"):  # of a run with this id that was removed and measured again
            if path.relative_to(self.path).as_posix() not in commit.paths():
                path.unlink()
        write_json(folder / MANIFEST, json.loads(commit.content()))
        return RunFolder(run, commit.model, commit.dataset, folder, self._known[run][0])

    def still(self, folders: Iterable[RunFolder]) -> bool:
        """Always: no object is written twice under its name, so one that is read is of the commit that named it."""
        return True

    def look(self, folders: Sequence[RunFolder], *, vectors: bool) -> None:
        """Nothing: an object is checked against its commit when it is fetched."""

    def schema_versions(self, folders: Sequence[RunFolder]) -> dict[str, int]:
        """The schema version of each run, by its id."""
        return {folder.run: self._known[folder.run][1].manifest.schema_version for folder in folders}

    def manifest(self, folder: RunFolder) -> Manifest:
        """The manifest of a committed run. Raises UnknownNameError."""
        return self._named(folder.run).manifest

    @contextlib.contextmanager
    def held(self, folders: Sequence[RunFolder]) -> Iterator[tuple[Path, list[RunFolder]]]:
        """The lake itself: an object store has no links."""
        yield self.root, list(folders)

    def records(self, run: str) -> list[FileRecord]:
        """The files of a committed run, none of which is fetched. Raises UnknownNameError."""
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
        """Upload what was written, and let the commit name it and what is kept.

        Raises WarehouseError where another has replaced or removed the run meanwhile.
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
            raise WarehouseError(f"Run {folder.run} was changed by somebody else meanwhile: look, and ask again.")
        self.bucket.delete([path for path in before.paths() if path not in commit.paths()])

    def verify(self) -> Iterator[Damage]:
        """Read every committed file again and check it against its commit, naming what is damaged."""
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
        return "" if digest.hexdigest() == record.sha256 else f"sha256: {record.sha256} at commit, another now"

    def stage(self, run: str, model: str, dataset: str, *, identity: Mapping[str, Any] | None = None) -> StagedRun:
        """Begin or resume a run, staged in the mirror; use it in a ``with`` statement."""
        return _CloudRun(self, run, model, dataset, identity)

    # What is read ----------------------------------------------------------------------------------------------------

    def files(self, folders: Sequence[RunFolder]) -> dict[int, dict[str, list[str]]]:
        """The files of each table in these runs: a local path where it is mirrored, else ``kdb://`` and its path.

        For each schema version that they follow; the empty typed file comes first in today's.
        """
        if any(folder.run not in self._known for folder in folders):
            self.commits()
        found = {SCHEMA_VERSION: {table: [str(empty_file(self.root, table))] for table in TABLES}}
        for folder in folders:
            if folder.run in self._known:  # else removed meanwhile
                commit = self._known[folder.run][1]
                tables = found.setdefault(commit.manifest.schema_version, {})
                for path, record in commit.paths().items():
                    tables.setdefault(record.table, []).append(str(self._local(path, record) or SCHEME + path))
        return found

    @property
    def filesystem(self) -> CommittedFiles:
        """What opens ``kdb://`` paths, for DuckDB."""
        return CommittedFiles(self.open, lambda path: self.record(path).bytes)

    def committed_files(self, table: str) -> list[str]:
        """The committed files of a table by their URLs, from the commits of all runs."""
        return [f"{self.location}/{path}" for commit in self.commits().values() for path in commit.paths(table)]

    def open(self, path: str) -> BinaryIO:
        """A committed file to be read: fetched whole, once, or block by block where it holds vectors.

        Raises WarehouseError where the run was removed.
        """
        record = self.record(path)
        if has_vectors(record.table):
            folder = self.path / "blocks" / path
            return cast(BinaryIO, BlockFile(record.bytes, lambda a, b: self._range(path, a, b), folder))
        return (self._local(path, record) or self._download(path, record)).open("rb")

    def record(self, path: str) -> FileRecord:
        """What the commit says of a file."""
        commit = self._known[path.split("/")[3].removeprefix("run=")][1]
        return commit.paths()[path]

    def fetch(self, table: str, runs: Iterable[str]) -> None:
        """Bring every file of a table in these runs into the mirror."""
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
                    raise WarehouseError(f"{self.location}/{path} is damaged: `kdb verify` names every such file.")
        return local

    def _range(self, path: str, start: int, end: int) -> bytes:
        with _still_there(path):
            return self.bucket.range(path, start, end)


class _CloudRun(StagedRun):
    """A run in progress, staged in the mirror and uploaded when it is whole."""

    def __init__(
        self, lake: CloudLake, run: str, model: str, dataset: str, identity: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(lake, run, model, dataset, identity)
        self._lake = lake

    def _stands(self) -> bool:
        return self._lake.bucket.get(f"commits/{self.run}.json") is not None

    def _publish(self) -> None:
        """Upload the files, then the commit that makes them the run.

        If another writer's commit stands, what was uploaded is taken back: the run is the same.
        """
        if "attempt" not in self.facts:
            self.remember(attempt=uuid.uuid4().hex[:8])  # before any upload: a resumed one writes the same objects
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
        """Whether the commit that stands is this one, whose first answer was lost."""
        return self._lake.bucket.get(f"commits/{self.run}.json") == commit.content()

    def _move(self, sources: list[Path], commit: Commit) -> None:
        """Keep the files where readers look for them first."""
        for source, path in zip(sources, commit.paths(), strict=True):
            kept = self._lake.path / path
            kept.parent.mkdir(parents=True, exist_ok=True)
            source.replace(kept)
        shutil.rmtree(self.path, ignore_errors=True)


def _at_once(function: Callable[..., Result], *arguments: Iterable[Any]) -> list[Result]:
    """What a function gives for each argument, in their order; the first error ends it."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, *arguments))


def _renamed(file: FileRecord, attempt: str) -> FileRecord:
    return replace(file, path=f"{file.path.removesuffix('.parquet')}-{attempt}.parquet")


def _mirror(url: str) -> Path:
    """The folder that mirrors a warehouse: one for each URL and server."""
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    name = hashlib.sha256(f"{server} {url}".encode()).hexdigest()[:16]
    return user_cache_path("kdb") / "warehouses" / name


@contextlib.contextmanager
def _still_there(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise WarehouseError(f"{path} is gone: its run was removed while it was read. Ask again.") from None
