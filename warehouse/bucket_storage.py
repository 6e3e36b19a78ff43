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

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from kdb.errors import WarehouseError
from kdb.warehouse.bucket import Bucket, concurrently
from kdb.warehouse.commits import Commit, Commits
from kdb.warehouse.files import write_json
from kdb.warehouse.local_folder import LocalFolder, check_version
from kdb.warehouse.manifest import MANIFEST, FileRecord, Files, Manifest, RunFolder, read_manifest
from kdb.warehouse.mirror import Mirror
from kdb.warehouse.remote import SCHEME, CommittedFiles
from kdb.warehouse.run_folders import empty_file
from kdb.warehouse.schema import SCHEMA_VERSION, TABLES
from kdb.warehouse.staged_run import StagedRun
from kdb.warehouse.storage import Damage, Storage

log = logging.getLogger(__name__)


class BucketStorage(Storage):
    """The warehouse under a URL, with copies on this machine of files that were read or are being written.

    Raises WarehouseError if there is no warehouse, if it has another schema, or if the store refuses.
    """

    is_remote = True

    def __init__(self, url: str, bucket: Bucket | None = None) -> None:
        self.bucket = bucket or Bucket.at(url)
        content = self.bucket.get("warehouse.json")
        if content is None:
            raise WarehouseError(
                f"There is no warehouse at {url!r}. Create one with `kdb ingest`, or name another with --warehouse."
            )
        self.schema_version = check_version(url, content)
        self.location = url
        self.local = LocalFolder.create(_cache_folder(url))
        self.mirror = Mirror(self.bucket, self.local.path)
        self.commits = Commits(self.bucket, self.local.path / "commits")

    @classmethod
    def create(cls, url: str) -> BucketStorage:
        """Open the warehouse at a URL, and create it if there is none."""
        bucket = Bucket.at(url)
        if bucket.get("warehouse.json") is None:
            bucket.put_new("warehouse.json", _marker())
        storage = cls(url, bucket)
        storage._record_schema_version()
        return storage

    def _record_schema_version(self) -> None:
        """Record in the warehouse that it may hold runs of this kdb's schema, so that an older kdb refuses it."""
        if self.schema_version < SCHEMA_VERSION:
            self.bucket.put_over("warehouse.json", _marker(), lambda content: content != _marker())
            self.schema_version = SCHEMA_VERSION

    # Listing ---------------------------------------------------------------------------------------------------------

    def run_folders(self) -> list[RunFolder]:
        """Return all committed runs; their folders have the files that were downloaded so far."""
        self.commits.refresh()
        return self.commits.run_folders(self.local.path)

    def manifest(self, folder: RunFolder) -> Manifest:
        """Return the manifest of a committed run. Raises UnknownNameError if it was removed."""
        return self.commits.of(folder.run).manifest

    def are_unchanged(self, folders: Iterable[RunFolder]) -> bool:
        """Return True: no object name is written twice, so a file always belongs to the commit that lists it."""
        return True

    @property
    def older_runs(self) -> bool:
        """Whether there are runs of an older schema."""
        return any(c.manifest.schema_version < SCHEMA_VERSION for c in self.commits.refresh().values())

    # Reading ---------------------------------------------------------------------------------------------------------

    def inspect(self, folders: Sequence[RunFolder], *, vectors: bool) -> None:
        """Do nothing: an object is checked against its commit when it is downloaded."""

    def downloaded(self, folder: RunFolder) -> RunFolder:
        """Return a listed run after downloading all its files."""
        commit = self.commits.of(folder.run)
        files = commit.paths()
        self.mirror.download(files)
        for path in folder.path.rglob("*.parquet"):
            # The id may have been of another run, which was removed and measured again.
            if path.relative_to(self.local.path).as_posix() not in files:
                path.unlink()
        write_json(folder.path / MANIFEST, json.loads(commit.content()))
        return folder

    def download_table(self, table: str, folders: Sequence[RunFolder]) -> None:
        """Download all files of a table in these runs."""
        self.mirror.download({p: f for commit in self.commits.known(folders) for p, f in commit.paths(table).items()})

    @contextlib.contextmanager
    def protected(self, folders: Sequence[RunFolder]) -> Iterator[tuple[Path, list[RunFolder]]]:
        """Yield the mirror's lake, because an object store has no links."""
        yield self.local.lake, list(folders)

    def files_by_version(self, folders: Sequence[RunFolder]) -> Files:
        """Return the local path of each file that was downloaded, and for others ``kdb://`` and the path."""
        files = {SCHEMA_VERSION: {table: [str(empty_file(self.local.lake, table))] for table in TABLES}}
        for commit in self.commits.known(folders):
            tables = files.setdefault(commit.manifest.schema_version, {})
            for path, record in commit.paths().items():
                tables.setdefault(record.table, []).append(str(self.mirror.copy_of(path, record) or SCHEME + path))
        return files

    @property
    def filesystem(self) -> CommittedFiles:
        """Return the file system that opens ``kdb://`` paths for DuckDB."""
        return CommittedFiles(
            lambda path: self.mirror.open(path, self._record(path)), lambda path: self._record(path).bytes
        )

    def _record(self, path: str) -> FileRecord:
        """Return the commit's record of a file."""
        return self.commits.of(path.split("/")[3].removeprefix("run=")).paths()[path]

    def committed_files(self, table: str, folders: Sequence[RunFolder] | None = None) -> list[str]:
        """Return the URLs of a table's committed files."""
        runs = None if folders is None else {folder.run for folder in folders}
        commits = [c for c in self.commits.refresh().values() if runs is None or c.run in runs]
        return [f"{self.location}/{path}" for commit in commits for path in commit.paths(table)]

    def verify(self) -> Iterator[Damage]:
        """Read every committed file again and check it against its commit; yields the damaged ones."""
        for commit in self.commits.refresh().values():
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

    # Writing ---------------------------------------------------------------------------------------------------------

    def stage(self, run: str, model: str, dataset: str, *, identity: Mapping[str, Any] | None = None) -> StagedRun:
        """Begin or resume a run, staged on this machine."""
        return StagedRun(self.local.staging, self, run, model, dataset, identity)

    def has_run(self, staged: StagedRun) -> bool:
        """Whether the run has a commit."""
        return self.bucket.get(Commits.object_of(staged.run)) is not None

    def publish(self, staged: StagedRun) -> None:
        """Upload the files, then the commit that makes them a run.

        If another writer has committed the same run, the uploaded files are deleted.
        """
        if "attempt" not in staged.facts:
            # Before any upload, because a resumed one must write the same objects.
            staged.remember(attempt=uuid.uuid4().hex[:8])
        attempt = staged.facts["attempt"]
        manifest = read_manifest(staged.path, staged.run)
        sources = [staged.path / file.path for file in manifest.files]
        manifest = replace(manifest, files=tuple(_renamed(file, attempt) for file in manifest.files))
        commit = Commit(staged.run, staged.model, staged.dataset, attempt, manifest)
        log.info("Uploading %.1f MB to %s", sum(f.bytes for f in manifest.files) / 1e6, self.location)
        concurrently(self.bucket.upload, commit.paths(), sources)
        if self._put_commit(commit):
            self._keep_copies(sources, commit)
        else:
            self.bucket.delete(list(commit.paths()))
        shutil.rmtree(staged.path, ignore_errors=True)

    def _put_commit(self, commit: Commit) -> bool:
        """Write the commit of a new run; return whether it is the run's commit."""
        path, content = Commits.object_of(commit.run), commit.content()
        # If the first request succeeded but its response was lost, the stored commit is this one.
        return self.bucket.put_new(path, content) or self.bucket.get(path) == content

    def _keep_copies(self, sources: list[Path], commit: Commit) -> None:
        """Move uploaded files to the mirror, where readers look for them first."""
        for source, path in zip(sources, commit.paths(), strict=True):
            copy = self.local.path / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            source.replace(copy)

    def replace_run(self, folder: RunFolder, new: Path, manifest: Manifest) -> None:
        """Upload the new files, and replace the commit by one that lists them and the unchanged ones."""
        before, attempt = self.commits.of(folder.run), uuid.uuid4().hex[:8]
        renamed = {f.path: f if f in before.manifest.files else _renamed(f, attempt) for f in manifest.files}
        commit = replace(before, attempt=attempt, manifest=replace(manifest, files=tuple(renamed.values())))
        added = {f"{commit.folder}/{f.path}": new / path for path, f in renamed.items() if f.path != path}
        concurrently(self.bucket.upload, added.keys(), added.values())
        path = Commits.object_of(folder.run)
        where = f"{self.location}/{path}"
        if not self.bucket.put_over(path, commit.content(), lambda content: Commit.read(content, where) == before):
            self.bucket.delete(list(added))
            raise WarehouseError(
                f"Run {folder.run} was changed by another process meanwhile. Run `kdb runs`, then retry."
            )
        self.bucket.delete([path for path in before.paths() if path not in commit.paths()])

    def remove(self, run: str) -> None:
        """Delete a committed run: without its commit, no reader sees its files."""
        self.commits.refresh()
        commit = self.commits.of(run)
        self.bucket.delete([Commits.object_of(run)])
        self.bucket.delete(list(commit.paths()))
        shutil.rmtree(self.local.path / commit.folder, ignore_errors=True)


def _marker() -> bytes:
    return json.dumps({"schema_version": SCHEMA_VERSION}).encode()


def _renamed(file: FileRecord, attempt: str) -> FileRecord:
    return replace(file, path=f"{file.path.removesuffix('.parquet')}-{attempt}.parquet")


def _cache_folder(url: str) -> Path:
    """Return the folder that mirrors a warehouse: one for each URL and server."""
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    name = hashlib.sha256(f"{server} {url}".encode()).hexdigest()[:16]
    return user_cache_path("kdb") / "warehouses" / name
