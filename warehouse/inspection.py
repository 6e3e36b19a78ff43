"""Inspection of a run: its files are compared with its manifest before any query reads them.

    inspector = Inspector(storage.local.lake)
    inspector.inspect(storage.run_folders(), vectors=False)

Names and sizes are compared when a process first reads a run. A file whose size, time and inode are new to this machine
is hashed once, before it is first read; files of vectors only when vectors are queried. The results are stored in the
user's cache and not in the warehouse, because a warehouse from elsewhere must not contain its own proof. Damage that
does not change size, time and inode is found only by ``kdb verify``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import shlex
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from kdb.errors import WarehouseError
from kdb.warehouse.checksums import problem_of
from kdb.warehouse.files import appears_whole
from kdb.warehouse.manifest import MANIFEST, FileRecord, Manifest, RunFolder, read_manifest
from kdb.warehouse.schema import TABLES, has_vectors

log = logging.getLogger(__name__)

_HEAVY = frozenset(table for table in TABLES if has_vectors(table))
"""Tables of vectors, whose files are hashed when they are queried."""

_AT_ONCE = 4
"""Number of files that are hashed concurrently."""

ADDED = "not part of the run: it was added after commit"

_WORTH_TELLING = 256 * 2**20
"""Bytes to hash above which a message tells the user about the delay."""


class DamagedRunError(WarehouseError):
    """A run whose files differ from its manifest. The message names the run and the file."""


@dataclass(frozen=True)
class _Seen:
    """Verified signatures of one version of a run.

    ``light`` is the signature of the hashed files without vectors. ``compared`` is that of the files with vectors after
    comparing names and sizes, and ``heavy`` the same after hashing.
    """

    version: str
    schema_version: int
    light: str
    compared: str
    heavy: str | None


@dataclass(frozen=True)
class _File:
    """A file in a listing; ``regular`` is false for links, devices, pipes and folders."""

    size: int
    mtime: int
    inode: int
    regular: bool


class Inspector:
    """Checks the runs of the lake at ``root`` before they are read, and caches the results."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[str, _Seen] = {}

    def inspect(self, folders: Sequence[RunFolder], *, vectors: bool) -> None:
        """Raise DamagedRunError unless the files of every run match its manifest.

        ``vectors`` says whether files of vectors will be read, too.
        """
        new = [folder for folder in folders if not self._is_seen(folder, vectors)]
        if not new:
            return
        memory = Memory.of(self._root)
        verified: list[tuple[RunFolder, _Seen]] = []
        unknown: list[tuple[RunFolder, dict[str, _File]]] = []
        for folder in new:
            files = _listing(folder)
            known = memory.known(folder, *_signatures(folder, files))
            if known and (known.heavy or not vectors):
                self._seen[folder.run] = known
            else:
                unknown.append((folder, files))
        if unknown:
            verified = _verified(unknown, vectors)
            self._seen.update((folder.run, seen) for folder, seen in verified)
            memory.remember(verified)

    def remember(self, folder: RunFolder, manifest: Manifest) -> None:
        """Cache that all files of a run were just hashed."""
        light, heavy = _signatures(folder, _listing(folder))
        seen = _Seen(folder.version, manifest.schema_version, light, heavy, heavy)
        self._seen[folder.run] = seen
        Memory.of(self._root).remember([(folder, seen)])

    def schema_versions(self, folders: Iterable[RunFolder]) -> dict[str, int]:
        """Return the schema version of each inspected run, by its id."""
        return {folder.run: self._schema_version(folder) for folder in folders}

    def _schema_version(self, folder: RunFolder) -> int:
        seen = self._seen[folder.run]
        if seen.version == folder.version:
            return seen.schema_version
        return read_manifest(folder.path, folder.run).schema_version  # rewritten since another thread inspected it

    def _is_seen(self, folder: RunFolder, vectors: bool) -> bool:
        seen = self._seen.get(folder.run)
        return seen is not None and seen.version == folder.version and bool(seen.heavy or not vectors)


class Memory:
    """The runs of one lake that this machine has verified, stored as JSON in the user's cache."""

    def __init__(self, root: Path, path: Path) -> None:
        self._root, self._path = root, path
        self._entries = self._read()

    @classmethod
    def of(cls, root: Path) -> Memory:
        """Return the memory of the lake at ``root``."""
        return cls(root, memory_path(root))

    def known(self, folder: RunFolder, light: str, heavy: str) -> _Seen | None:
        """Return the record of a run whose files have these signatures; None if they were not verified."""
        entry = self._entries.get(self._key(folder))
        if not isinstance(entry, list) or len(entry) != 4 or entry[:2] != [light, heavy]:
            return None
        return _Seen(folder.version, int(entry[3]), light, heavy, heavy if entry[2] == heavy else None)

    def remember(self, verified: Iterable[tuple[RunFolder, _Seen]]) -> None:
        """Add verified runs. If the cache cannot be written, they are verified again next time."""
        added = {
            self._key(folder): [seen.light, seen.compared, seen.heavy, seen.schema_version] for folder, seen in verified
        }
        entries = {**self._read(), **added}
        there = {key: entry for key, entry in entries.items() if key in added or (self._root / key).is_dir()}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with appears_whole(self._path) as partial:
                partial.write_text(json.dumps({"lake": str(self._root.resolve()), "runs": there}))

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return dict(json.loads(self._path.read_text())["runs"])
        return {}

    def _key(self, folder: RunFolder) -> str:
        return "/".join(folder.path.parts[-3:])  # model=…/dataset=…/run=…, in the lake or linked to it


def memory_path(root: Path) -> Path:
    """Return the file that stores which runs of the lake at ``root`` this machine has verified."""
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    return user_cache_path("kdb") / "verified" / f"{name}.json"


def unlisted(folder: RunFolder, manifest: Manifest) -> list[str]:
    """Return the Parquet files in a run's folder that its manifest does not list, by their paths within the folder."""
    named = {file.path for file in manifest.files}
    return sorted(path for path in _listing(folder) if path.endswith(".parquet") and path not in named)


def _verified(unknown: Sequence[tuple[RunFolder, dict[str, _File]]], vectors: bool) -> list[tuple[RunFolder, _Seen]]:
    manifests = [_compared(folder, files) for folder, files in unknown]
    wanted = [
        (folder, record)
        for (folder, _), manifest in zip(unknown, manifests, strict=True)
        for record in manifest.files
        if vectors or record.table not in _HEAVY
    ]
    _hash_all(wanted)
    return [
        (folder, _seen(folder, files, manifest, vectors))
        for (folder, files), manifest in zip(unknown, manifests, strict=True)
    ]


def _seen(folder: RunFolder, files: Mapping[str, _File], manifest: Manifest, vectors: bool) -> _Seen:
    light, heavy = _signatures(folder, files)
    all_hashed = vectors or not any(record.table in _HEAVY for record in manifest.files)
    return _Seen(folder.version, manifest.schema_version, light, heavy, heavy if all_hashed else None)


def _compared(folder: RunFolder, files: Mapping[str, _File]) -> Manifest:
    """Return the manifest of a run after comparing names and sizes of its files. Raises DamagedRunError."""
    try:
        manifest = read_manifest(folder.path, folder.run)
    except FileNotFoundError:
        raise _damaged(folder, MANIFEST, "missing") from None
    except WarehouseError as error:
        raise DamagedRunError(f"{_named(folder)}: {error} {_advice(folder)}") from error
    for record in manifest.files:
        file = files.get(record.path)
        if file is None:
            raise _damaged(folder, record.path, "missing")
        if not file.regular:
            raise _damaged(folder, record.path, "not a regular file")
        if file.size != record.bytes:
            raise _damaged(folder, record.path, f"bytes: {record.bytes} at commit, {file.size} now")
    for path in unlisted(folder, manifest):
        raise _damaged(folder, path, ADDED)
    return manifest


def _hash_all(wanted: Sequence[tuple[RunFolder, FileRecord]]) -> None:
    total, begun = sum(record.bytes for _, record in wanted), time.monotonic()
    if total >= _WORTH_TELLING:
        log.warning("Verifying %s MB of files that are new to this machine.", f"{total / 1e6:,.0f}")
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="verify") as pool:
        problems = pool.map(lambda pair: problem_of(pair[0].path, pair[1]), wanted)
        for (folder, record), problem in zip(wanted, problems, strict=True):
            if problem:
                pool.shutdown(wait=False, cancel_futures=True)
                raise _damaged(folder, record.path, problem)
    seconds = time.monotonic() - begun
    log.debug("Verified %d files, %.1f MB, in %.2f s.", len(wanted), total / 1e6, seconds)


def _listing(folder: RunFolder) -> dict[str, _File]:
    """Return all files of a run's folder by their paths within it, without following or opening any."""
    files: dict[str, _File] = {}
    try:
        with os.scandir(folder.path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    with os.scandir(entry.path) as inner:
                        files.update((f"{entry.name}/{file.name}", _file(file)) for file in inner)
                else:
                    files[entry.name] = _file(entry)
    except OSError as error:
        within = str(error.filename or "").removeprefix(f"{folder.path}/")
        raise _damaged(folder, within, error.strerror or str(error)) from error
    return files


def _file(entry: os.DirEntry[str]) -> _File:
    status = entry.stat(follow_symlinks=False)
    return _File(status.st_size, status.st_mtime_ns, status.st_ino, stat.S_ISREG(status.st_mode))


def _signatures(folder: RunFolder, files: Mapping[str, _File]) -> tuple[str, str]:
    """Return two signatures, of the files without and with vectors, which change when one of the files changes."""
    return (
        _signature(folder, files, lambda path: path.partition("/")[0] not in _HEAVY),
        _signature(folder, files, lambda path: path.partition("/")[0] in _HEAVY),
    )


def _signature(folder: RunFolder, files: Mapping[str, _File], wanted: Callable[[str], bool]) -> str:
    lines = sorted(
        f"{path}\0{file.size}\0{file.mtime}\0{file.inode}\0{file.regular}"
        for path, file in files.items()
        if wanted(path)
    )
    return hashlib.blake2b("\n".join([folder.run, *lines]).encode(errors="surrogateescape"), digest_size=12).hexdigest()


def _damaged(folder: RunFolder, path: str, problem: str) -> DamagedRunError:
    return DamagedRunError(f"{_named(folder)} is damaged: {folder.path / path}: {problem}. {_advice(folder)}")


def _named(folder: RunFolder) -> str:
    return f"Run {folder.run} ({folder.model} on {folder.dataset})"


def _advice(folder: RunFolder) -> str:
    warehouse = shlex.quote(str(folder.path.parents[3]))
    return (
        "`kdb verify` lists all damaged files. Restore the files, or remove the run with "
        f"`kdb runs remove {folder.run} --warehouse {warehouse}` and measure it again."
    )
