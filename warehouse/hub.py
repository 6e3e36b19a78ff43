"""Runs on the hub: a dataset repository with the layout of an exported folder, a card, and a ``kdb.duckdb``.

push(kdb.open("kdb-warehouse"), ["1f0c9a3b5d7e2468"], "hf://datasets/lab/depths")
pull("hf://datasets/lab/depths", storage)

A push is one commit, so it succeeds completely or not at all; it adds runs and removes none. Credentials are those of
huggingface_hub: HF_TOKEN, or `hf auth login`.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from kdb.errors import KdbError
from kdb.warehouse.dataset_card import write_card
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.imports import Origin, import_run
from kdb.warehouse.local_folder import check_version
from kdb.warehouse.run_copy import copy_run
from kdb.warehouse.schema import SCHEMA_VERSION, TABLES
from kdb.warehouse.shell_file import write_public_file
from kdb.warehouse.shell_lookup import SHELL_FILE
from kdb.warehouse.storage import Storage
from kdb.warehouse.store import Warehouse

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TRIES = 5
"""Maximum attempts of a push while others push at the same time."""

_FILE = re.compile(
    r"lake/(model=[^/]+/dataset=[^/]+/run=(?P<run>[0-9a-f]{16}))/"
    r"((?P<table>\w+)/[^/]+\.parquet|manifest\.json)"
)


class HubError(KdbError):
    """A dataset on the hub that does not exist, cannot be reached, or denies access."""


@dataclass(frozen=True)
class HubRepo:
    """A dataset on the hub: ``OWNER/NAME``, and its branch, tag or commit."""

    name: str
    revision: str

    @classmethod
    def of(cls, url: str) -> HubRepo:
        """Return the dataset named by ``hf://datasets/OWNER/NAME[@REVISION]``. Raises HubError for any other text."""
        from huggingface_hub import parse_hf_uri
        from huggingface_hub.errors import HfUriError

        expected = f"Expected hf://datasets/OWNER/NAME, or hf://datasets/OWNER/NAME@REVISION, found {url!r}."
        try:
            uri = parse_hf_uri(url)
        except HfUriError as error:
            raise HubError(expected) from error
        if uri.type != "dataset" or uri.path_in_repo:
            raise HubError(expected)
        return cls(uri.id, uri.revision or "main")

    def __str__(self) -> str:
        return f"hf://datasets/{self.name}" + (f"@{self.revision}" if self.revision != "main" else "")


def push(
    warehouse: Warehouse, runs: Iterable[str], url: str, *, licence: str | None = None, private: bool = False
) -> list[str]:
    """Add runs to a dataset on the hub, creating it if necessary; returns the runs that were added.

    Raises HubError if the hub refuses, and WarehouseError for a damaged run; in both cases, nothing is added.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repo, api = HubRepo.of(url), HfApi(library_name="kdb")
    runs = list(runs)
    with _reported(repo):
        api.create_repo(repo.name, repo_type="dataset", private=private or None, exist_ok=True)
        for left in reversed(range(_TRIES)):
            try:
                return _push_once(api, repo, warehouse, runs, licence)
            except HfHubHTTPError as error:
                # Another push came first: 412, or 409 during that push. The card must describe the runs of both.
                if error.response.status_code not in (409, 412) or not left:
                    raise
    raise AssertionError("the last try returns or raises")


def pull(url: str, storage: Storage, *, preferred: bool = False) -> Iterator[tuple[str, bool]]:
    """Copy all runs of a dataset on the hub; yields each run, and whether it was copied or is stored already.

    ``preferred`` runs take precedence over those measured here. Raises HubError if the hub refuses, and WarehouseError
    for a run that is damaged or inconsistent (`import_run`).
    """
    from huggingface_hub import HfApi

    repo, api = HubRepo.of(url), HfApi(library_name="kdb")
    here = {folder.run for folder in storage.run_folders()}
    with _reported(repo):
        head, files = _contents(api, repo)
        runs = {match["run"]: match[1] for match in filter(None, map(_FILE.fullmatch, files))}
        wanted = {run: f"lake/{glob.escape(folder)}/*" for run, folder in runs.items() if run not in here}
        cached = _download(api, repo, head, files, list(wanted.values()))
    origin = Origin(f"{repo} ({head[:12]})", preferred)
    with tempfile.TemporaryDirectory(prefix="kdb-pull-") as copy:
        source = FolderStorage(_plain_copy(cached, Path(copy)))
        for run in runs:
            yield run, run in wanted and import_run(storage, source.find(run), origin)


def _plain_copy(cached: Path, copy: Path) -> Path:
    """Yield a folder of hard links to the hub's cached files, because these are symlinks, which a warehouse refuses."""
    for path in cached.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(cached)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), target)
            except OSError:  # on another disk
                shutil.copyfile(path, target)
    return copy


def _push_once(api: HfApi, repo: HubRepo, warehouse: Warehouse, runs: Sequence[str], licence: str | None) -> list[str]:
    from huggingface_hub import CommitOperationAdd

    head, files = _contents(api, repo)
    there = {match["run"] for match in filter(None, map(_FILE.fullmatch, files))}
    new = [run for run in runs if run not in there]
    if not new and licence is None:
        return []
    with tempfile.TemporaryDirectory(prefix="kdb-push-") as folder:
        copy = Warehouse.over(FolderStorage.create(Path(folder), partial=True))
        for run in new:
            own = warehouse.storage.find(run)
            if warehouse.storage.manifest(own).schema_version < SCHEMA_VERSION:
                raise HubError(f"Run {run} was measured by an older kdb. Run `kdb migrate`, then push again.")
            copy_run(copy.storage, own)
        added = [path for run in new for path in sorted(copy.storage.find(run).path.rglob("*")) if path.is_file()]
        uploads: dict[str, Any] = {path.relative_to(copy.storage.local.path).as_posix(): path for path in added}
        known = _known(api, repo, head, files)
        if there and check_version(str(repo), (known / "warehouse.json").read_bytes()) < SCHEMA_VERSION:
            raise HubError(f"{repo} was pushed by an older kdb. Pull it, run `kdb migrate`, and push to a new dataset.")
        _complete(copy, uploads, repo, known, files, licence)
        operations = [CommitOperationAdd(path, content) for path, content in uploads.items()]
        api.create_commit(
            repo.name,
            operations,
            commit_message=f"{len(new)} runs, by kdb push",
            repo_type="dataset",
            revision=repo.revision,
            parent_commit=head,
        )
    return new


def _complete(
    copy: Warehouse, uploads: dict[str, Any], repo: HubRepo, known: Path, files: Sequence[str], licence: str | None
) -> None:
    """Add the files about all runs: card and ``kdb.duckdb``. ``known`` holds the small tables of the other runs."""
    every = sorted({*files, *uploads})
    urls: dict[str, list[str]] = {name: [] for name in TABLES}
    for match in filter(None, map(_FILE.fullmatch, every)):
        if match["table"] in urls:
            urls[match["table"]].append(_url(repo, match[0]))
    shell = copy.storage.local.path / "public.duckdb"
    write_public_file(shell, copy.storage.local.lake, urls, encoded=True)
    readme = known / "README.md"
    # Of the other runs, only the small tables are placed beside the new runs.
    for path in known.glob("lake/*/*/*/**/*"):
        target = copy.storage.local.path / path.relative_to(known)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # the target of a link would be outside the folders that DuckDB may read
    text = write_card(copy, str(repo), licence=licence, before=readme.read_text("utf-8") if readme.exists() else "")
    uploads |= {
        "README.md": text.encode(),
        "warehouse.json": json.dumps({"schema_version": SCHEMA_VERSION}).encode(),
        SHELL_FILE: shell.read_bytes(),
    }


def _contents(api: HfApi, repo: HubRepo) -> tuple[str, list[str]]:
    """Return the current commit of a dataset, and its files."""
    head = api.dataset_info(repo.name, revision=repo.revision).sha
    return str(head), api.list_repo_files(repo.name, repo_type="dataset", revision=head)


def _known(api: HfApi, repo: HubRepo, head: str, files: Sequence[str]) -> Path:
    """Return a folder with the description of a dataset's runs: manifests, small tables, and the card."""
    small = ["README.md", "lake/*/manifest.json", "lake/*/runs/*.parquet", "lake/*/models/*.parquet"]
    return _download(api, repo, head, files, small)


def _download(api: HfApi, repo: HubRepo, head: str, files: Sequence[str], wanted: Sequence[str]) -> Path:
    """Return the folder with cached copies of the files that match the patterns.

    Raises HubError and WarehouseError for a dataset that is not a warehouse, or has an unsupported schema.
    """
    there = any(_FILE.fullmatch(file) for file in files)
    wanted = [
        *wanted,
        "warehouse.json",
        ".gitattributes",
    ]  # every dataset has it: without a match, the hub's library warns
    folder = Path(api.snapshot_download(repo.name, repo_type="dataset", revision=head, allow_patterns=wanted))
    if there:
        try:
            check_version(str(repo), (folder / "warehouse.json").read_bytes())
        except OSError:
            raise HubError(
                f"{repo} has no warehouse.json: it was not pushed by kdb, or is damaged. Check the name."
            ) from None
    return folder


def _url(repo: HubRepo, path: str) -> str:
    """Return the public URL of a dataset's file. '=' is not encoded, because DuckDB reads names from 'model=…'."""
    from huggingface_hub import hf_hub_url

    base = hf_hub_url(repo.name, "lake", repo_type="dataset", revision=repo.revision)
    return f"{base.removesuffix('lake')}{quote(path, safe='/=')}"


@contextlib.contextmanager
def _reported(repo: HubRepo) -> Iterator[None]:
    """Convert errors of huggingface_hub into a HubError that says what to do, and contains no token."""
    from huggingface_hub import errors

    login = "Log in with `hf auth login`, or set HF_TOKEN to a token with this permission"
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo}: there is no such branch, tag or commit. Check what follows the @.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, errors.RepositoryNotFoundError):
            raise HubError(f"{repo}: there is no such dataset, or you have no access. {login}.") from None
        if status in (401, 403):
            raise HubError(f"{repo}: the hub refused access ({status}). {login}.") from None
        if status in (409, 412):
            raise HubError(f"{repo}: too many concurrent pushes. Run the same command again later.") from None
        raise HubError(f"{repo}: the hub answered with status {status}. Run the same command again later.") from None
    except ValueError as error:  # for example, an unknown licence
        raise HubError(f"{repo}: {' '.join(str(error).split())}") from error
    except (_transport_error(), errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{repo}: the hub cannot be reached ({type(error).__name__}). Check the network connection."
        ) from None


def _transport_error() -> type[Exception]:
    """Return the error class of the HTTP client for a failed connection; the client depends on huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    error: type[Exception] = HfHubHTTPError.__bases__[0]
    return error
