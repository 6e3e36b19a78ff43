"""The base class of both kinds of storage, folder and bucket: list, read, commit and replace the runs of a warehouse.

`FolderStorage` and `BucketStorage` are the two kinds; `kdb.warehouse.store.storage_at` opens the one for a location.
Both have a folder on this machine (`LocalFolder`), in which runs are staged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kdb.errors import QueryError, UnknownNameError
from kdb.warehouse.local_folder import LocalFolder
from kdb.warehouse.manifest import Files, Manifest, RunFolder
from kdb.warehouse.run_folders import run_named
from kdb.warehouse.staged_run import StagedRun

_FEWEST_DIGITS = 4
"""Digits of an id that name a run, as in git: fewer are too easily those of another run."""


@dataclass(frozen=True)
class Damage:
    """A committed file that has changed since its commit."""

    run: str
    path: Path
    problem: str


class Storage(ABC):
    """The committed runs of one warehouse, and the runs in progress.

    ``location`` is the path or URL that the user gave. ``local`` is a folder on this machine: runs are staged in it,
    and files are read from it. A run is named by a `RunFolder`, as it was when it was listed.
    """

    is_remote: ClassVar[bool]
    """Whether committed files must be downloaded before they are read."""

    location: str
    local: LocalFolder

    # Listing ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def run_folders(self) -> list[RunFolder]:
        """Return all committed runs, by model, dataset and run. Raises WarehouseError for a damaged listing."""

    def listed(self, run: str) -> RunFolder:
        """Return the committed run with this id; its files may not be on this machine. Raises UnknownNameError."""
        folders = {folder.run: folder for folder in self.run_folders()}
        if run not in folders:
            raise UnknownNameError("run", run, folders, "`kdb runs` lists them.")
        return folders[run]

    def named(self, digits: str) -> RunFolder:
        """Return the committed run whose id begins with these digits, as :meth:`listed` does.

        There must be as many digits as git takes. Raises UnknownNameError for an unknown run, QueryError for too few
        digits, and if several runs begin with them.
        """
        folders = {folder.run: folder for folder in self.run_folders()}
        if len(digits) < _FEWEST_DIGITS:
            raise QueryError(f"{digits!r} is too short for a run: give {_FEWEST_DIGITS} of its digits or more.")
        runs = {run: f"{folder.model} on {folder.dataset}" for run, folder in folders.items()}
        return folders[run_named(digits, runs)]

    def find(self, run: str) -> RunFolder:
        """Return the committed run with this id, with all its files on this machine. Raises UnknownNameError."""
        return self.downloaded(self.listed(run))

    @abstractmethod
    def manifest(self, folder: RunFolder) -> Manifest:
        """Return the manifest of a committed run. Raises WarehouseError if it is damaged or was removed."""

    @abstractmethod
    def are_unchanged(self, folders: Iterable[RunFolder]) -> bool:
        """Whether the files of runs that were listed earlier are the same: none removed, none rewritten."""

    @property
    @abstractmethod
    def older_runs(self) -> bool:
        """Whether there may be runs of an older schema; none are left after `kdb migrate`."""

    # Reading ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def inspect(self, folders: Sequence[RunFolder], *, vectors: bool) -> None:
        """Raise DamagedRunError unless the files of these runs match their manifests.

        ``vectors`` says whether files of vectors will be read, too.
        """

    @abstractmethod
    def downloaded(self, folder: RunFolder) -> RunFolder:
        """Return a listed run with all its files on this machine."""

    @abstractmethod
    def download_table(self, table: str, folders: Sequence[RunFolder]) -> None:
        """Bring all files of a table in these runs to this machine."""

    @abstractmethod
    def protected(self, folders: Sequence[RunFolder]) -> AbstractContextManager[tuple[Path, list[RunFolder]]]:
        """Keep the files of some runs readable, if possible, even if the runs are removed.

        Yields the lake that has these files, and the runs in it. Raises FileNotFoundError if a run no longer exists.
        """

    @abstractmethod
    def files_by_version(self, folders: Sequence[RunFolder]) -> Files | None:
        """Return the files that DuckDB must read by name; None if globs over the lake are enough.

        In the current schema version, the empty typed file comes first, because it gives a table's types.
        """

    @property
    @abstractmethod
    def filesystem(self) -> Any:
        """Return the file system (of fsspec) with which DuckDB opens `files_by_version`; None for local paths."""

    @abstractmethod
    def committed_files(self, table: str, folders: Sequence[RunFolder] | None = None) -> list[str]:
        """Return the absolute paths or URLs of a table's committed files, in these runs or in all."""

    @abstractmethod
    def verify(self) -> Iterator[Damage]:
        """Read every committed file again and check it against its checksum; yields the damaged ones."""

    # Writing ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def stage(self, run: str, model: str, dataset: str, *, identity: Mapping[str, Any] | None = None) -> StagedRun:
        """Begin or resume a run; use it in a ``with`` statement, which holds the run's lock.

        ``identity`` holds the values from which the run's id was computed (`run_id`); an import needs it.
        """

    @abstractmethod
    def replace_run(self, folder: RunFolder, new: Path, manifest: Manifest) -> None:
        """Replace a committed run in one step by the files of the manifest, which are in the folder ``new``.

        All files were verified just before. Raises WarehouseError if that is impossible, or if another process has
        replaced or removed the run meanwhile.
        """

    @abstractmethod
    def remove(self, run: str) -> None:
        """Delete a committed run; one step makes it invisible to all readers. Raises UnknownNameError."""
