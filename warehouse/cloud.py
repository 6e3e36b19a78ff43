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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from platformdirs import user_cache_path

from kdb.errors import UnknownNameError, WarehouseError
from kdb.warehouse.blocks import BlockFile
from kdb.warehouse.bucket import Bucket, Found
from kdb.warehouse.lake import (
    Damage,
    FileRecord,
    Lake,
    RunFolder,
    StagedRun,
    appears_whole,
    check_version,
    empty_file,
    partitions,
    read_manifest,
    storage_errors,
    write_json,
)
from kdb.warehouse.remote import SCHEME, CommittedFiles
from kdb.warehouse.schema import SCHEMA_VERSION, TABLES, has_vectors

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_AT_ONCE = 16
"""Requests under way at the same time."""


@dataclass(frozen=True)
class Commit:
    """A committed run. The files' paths are relative to the run's folder; ``attempt`` is in the name of each."""

    run: str
    model: str
    dataset: str
    attempt: str
    files: tuple[FileRecord, ...]

    @classmethod
    def read(cls, content: bytes, where: str) -> Commit:
        """What a commit object says. Raises WarehouseError where it is none, or of another schema."""
        try:
            said = json.loads(content)
            version = said.pop("schema_version")
            files = tuple(FileRecord(**file) for file in said.pop("files"))
            commit = cls(files=files, **said)
        except (ValueError, KeyError, TypeError) as error:
            raise WarehouseError(f"{where} is damaged ({error}): `kdb runs remove` takes its run away.") from error
        if version != SCHEMA_VERSION:
            raise WarehouseError(f"{where} was written with schema {version}, and this kdb has {SCHEMA_VERSION}.")
        return commit

    def content(self) -> bytes:
        """What the commit object holds."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1).encode()

    @property
    def folder(self) -> str:
        """The run's folder, within the warehouse."""
        return f"lake/{partitions(self.model, self.dataset, self.run)}"

    def paths(self, table: str | None = None) -> dict[str, FileRecord]:
        """The files of one table or of all, by their paths within the warehouse."""
        return {f"{self.folder}/{f.path}": f for f in self.files if table in (None, f.table)}


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
        check_version(url, content)
        super().__init__(Lake.create(_mirror(url)).path)
        self.location = url
        self._known: dict[str, tuple[str, Commit]] = {}

    @classmethod
    def create_at(cls, url: str, bucket: Bucket | None = None) -> CloudLake:
        """Open the warehouse at a URL, making it first where there is none."""
        bucket = bucket or Bucket.at(url)
        if bucket.get("warehouse.json") is None:
            bucket.put_new("warehouse.json", json.dumps({"schema_version": SCHEMA_VERSION}).encode())
        return cls(url, bucket)

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
        kept = self.path / "commits" / hashlib.sha256(f"{found.path} {found.tag}".encode()).hexdigest()
        with contextlib.suppress(FileNotFoundError):
            return Commit.read(kept.read_bytes(), f"{self.location}/{found.path}")
        content = self.bucket.get(found.path)
        if content is None:
            return None
        commit = Commit.read(content, f"{self.location}/{found.path}")
        kept.parent.mkdir(exist_ok=True)
        with appears_whole(kept) as partial:
            partial.write_bytes(content)
        return commit

    def run_folders(self) -> list[RunFolder]:
        """Every committed run, by model, dataset and run; its folder holds what was read of it so far."""
        found = [RunFolder(c.run, c.model, c.dataset, self.path / c.folder) for c in self.commits().values()]
        return sorted(found, key=lambda folder: (folder.model, folder.dataset, folder.run))

    def find(self, run: str) -> RunFolder:
        """The committed run with this id, all of its files fetched; raises UnknownNameError."""
        commit = self._named(run)
        folder = self.path / commit.folder
        self._fetch(commit.paths())
        for path in folder.rglob("*.parquet"):  # of a run with this id that was removed and measured again
            if path.relative_to(self.path).as_posix() not in commit.paths():
                path.unlink()
        write_json(folder / "manifest.json", json.loads(commit.content()))
        return RunFolder(run, commit.model, commit.dataset, folder)

    def records(self, run: str) -> list[FileRecord]:
        """The files of a committed run, none of which is fetched. Raises UnknownNameError."""
        return list(self._named(run).files)

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

    def replace(self, folder: RunFolder, new: Path, kept: Sequence[FileRecord], written: Sequence[FileRecord]) -> None:
        """Upload what was written, and let the commit name it and what is kept.

        Raises WarehouseError where another has replaced or removed the run meanwhile.
        """
        before = self._known[folder.run][1]
        attempt = uuid.uuid4().hex[:8]
        renamed = [replace(file, path=_renamed(file.path, attempt)) for file in written]
        commit = replace(before, attempt=attempt, files=(*kept, *renamed))
        added = [f"{commit.folder}/{file.path}" for file in renamed]
        _at_once(self.bucket.upload, added, [new / file.path for file in written])
        place = f"commits/{folder.run}.json"
        where = f"{self.location}/{place}"
        if not self.bucket.put_over(place, commit.content(), lambda found: Commit.read(found, where) == before):
            self.bucket.delete(added)
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

    def stage(self, run: str, model: str, dataset: str) -> StagedRun:
        """Begin or resume a run, staged in the mirror; use it in a ``with`` statement."""
        return _CloudRun(self, run, model, dataset)

    # What is read ----------------------------------------------------------------------------------------------------

    def files(self, runs: Sequence[str]) -> dict[str, list[str]]:
        """The files of each table in these runs: a local path where it is mirrored, else ``kdb://`` and its path.

        The empty typed file comes first: it tells a table's types without a request.
        """
        if any(run not in self._known for run in runs):
            self.commits()
        commits = [self._known[run][1] for run in runs if run in self._known]  # those removed meanwhile are gone
        return {
            table: [
                str(empty_file(self.root, table)),
                *(
                    str(self._local(path, record) or SCHEME + path)
                    for commit in commits
                    for path, record in commit.paths(table).items()
                ),
            ]
            for table in TABLES
        }

    @property
    def filesystem(self) -> CommittedFiles:
        """What opens ``kdb://`` paths, for DuckDB."""
        return CommittedFiles(self)

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

    def __init__(self, lake: CloudLake, run: str, model: str, dataset: str) -> None:
        super().__init__(lake, run, model, dataset)
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
        local = {file: replace(file, path=_renamed(file.path, attempt)) for file in read_manifest(self.path)}
        commit = Commit(self.run, self.model, self.dataset, attempt, tuple(local.values()))
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


def _renamed(path: str, attempt: str) -> str:
    return f"{path.removesuffix('.parquet')}-{attempt}.parquet"


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
