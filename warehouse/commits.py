"""Commits of a bucket: one object for each run, which names the run's files.

A commit is written last, and makes its files a run. Commits are read as untrusted input, and cached on this machine
under their tag.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from kdb.errors import UnknownNameError, WarehouseError
from kdb.warehouse.bucket import Bucket, ListedObject, concurrently
from kdb.warehouse.files import appears_whole
from kdb.warehouse.manifest import RUN_ID, FileRecord, Manifest, RunFolder, parse_json, parse_manifest
from kdb.warehouse.run_folders import in_order, partitions


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
        fields = parse_json(content, where)
        names = {name: fields.get(name) for name in ("run", "model", "dataset", "attempt")}
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


class Commits:
    """The commits of a bucket, as they were when they were last listed; ``cache`` is a folder for their content."""

    def __init__(self, bucket: Bucket, cache: Path) -> None:
        self._bucket, self._cache = bucket, cache
        self._known: dict[str, tuple[str, Commit]] = {}

    @staticmethod
    def object_of(run: str) -> str:
        """Return the path of a run's commit."""
        return f"commits/{run}.json"

    def refresh(self) -> dict[str, Commit]:
        """Return all committed runs by their ids, with one listing, and one request for each new commit."""
        listed = {Path(entry.path).stem: entry for entry in self._bucket.list("commits")}
        known = {run: entry for run, entry in self._known.items() if run in listed and entry[0] == listed[run].tag}
        new = [entry for run, entry in listed.items() if run not in known]
        for entry, commit in zip(new, concurrently(self._read, new), strict=True):
            if commit is not None:
                known[commit.run] = entry.tag, commit
        self._known = dict(sorted(known.items()))
        return {run: commit for run, (_tag, commit) in self._known.items()}

    def run_folders(self, mirror: Path) -> list[RunFolder]:
        """Return the known runs, with their folders in the mirror."""
        return in_order(
            RunFolder(commit.run, commit.model, commit.dataset, mirror / commit.folder, tag)
            for tag, commit in self._known.values()
        )

    def of(self, run: str) -> Commit:
        """Return the known commit of a run. Raises UnknownNameError."""
        if run not in self._known:
            raise UnknownNameError("run", run, self._known, "`kdb runs` lists them.")
        return self._known[run][1]

    def known(self, folders: Sequence[RunFolder]) -> Iterator[Commit]:
        """Yield the commits of runs, without those that were removed meanwhile."""
        if any(folder.run not in self._known for folder in folders):
            self.refresh()
        yield from (self._known[folder.run][1] for folder in folders if folder.run in self._known)

    def _read(self, entry: ListedObject) -> Commit | None:
        """Return a listed commit; None if it was removed meanwhile."""
        where = f"{self._bucket.url}/{entry.path}"
        cached = self._cache / hashlib.sha256(f"{entry.path} {entry.tag}".encode()).hexdigest()
        with contextlib.suppress(FileNotFoundError):
            return Commit.read(cached.read_bytes(), where)
        content = self._bucket.get(entry.path)
        if content is None:
            return None
        commit = Commit.read(content, where)
        if entry.path != self.object_of(commit.run):
            raise WarehouseError(f"{where} is damaged: it holds the commit of another run, {commit.run}.")
        cached.parent.mkdir(exist_ok=True)
        with appears_whole(cached) as partial:
            partial.write_bytes(content)
        return commit
