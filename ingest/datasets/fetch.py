"""Find dataset files on this machine, and download and verify missing ones."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from kdb.errors import DatasetError
from kdb.ingest.datasets.rows import read_bytes
from kdb.warehouse.files import appears_whole

BASE_URL = "https://raw.githubusercontent.com"
_TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class File:
    """A published file: its name in a data folder, its path below `BASE_URL`, and its SHA-256.

    `url_path` is None for a file that no public repository has as one file; `origin` says where its texts are.
    """

    name: str
    url_path: str | None
    sha256: str
    origin: str


def cache_dir() -> Path:
    """Return the user's folder for downloaded datasets."""
    return Path(platformdirs.user_cache_dir("kdb")) / "datasets"


def check_folder(data_dir: Path | None) -> None:
    """Raise DatasetError for a folder that does not exist."""
    if data_dir is not None and not data_dir.expanduser().is_dir():
        raise DatasetError(
            f"--data-dir: no such folder {str(data_dir)!r}. Name the folder with the files of datasets "
            "(`kdb datasets fetch` downloads them), or leave --data-dir and KDB_DATA_DIR out."
        )


def search_folders(data_dir: Path | None) -> list[Path]:
    """Return the folders to search, in order: `data_dir`, KDB_DATA_DIR, the user's cache."""
    named = (data_dir, os.environ.get("KDB_DATA_DIR"))
    folders = [Path(folder).expanduser() for folder in named if folder]
    return list(dict.fromkeys([*folders, cache_dir()]))


def find_file(name: str, data_dir: Path | None) -> Path | None:
    """Return the first file of that name in the folders to search, or None."""
    candidates = (folder / name for folder in search_folders(data_dir))
    return next((path for path in candidates if path.is_file()), None)


def locate(dataset: str, file: File, data_dir: Path | None, *, may_download: bool) -> Path:
    """Return a dataset's file; download it into the user's cache if it is not on this machine.

    Raises DatasetError, with every folder searched, if this fails.
    """
    existing = find_file(file.name, data_dir)
    if existing is not None:
        return existing
    try:
        if not may_download:
            raise DatasetError("Downloading is switched off.")
        fetch_file(file, cache_dir())
    except DatasetError as why:
        folders = ", ".join(map(str, search_folders(data_dir)))
        raise DatasetError(
            f"Dataset {dataset!r} needs the file {file.name}, which is not in {folders}. {why} "
            "Put the file into a folder, and give --data-dir that folder."
        ) from why
    return cache_dir() / file.name


def fetch_file(file: File, folder: Path) -> bool:
    """Download a file into a folder, or verify the one that is there; return whether it was downloaded.

    Raises DatasetError if it cannot be downloaded, or if the one in the folder is another file.
    """
    target = folder.expanduser() / file.name
    if target.exists():
        if hashlib.sha256(read_bytes(target)).hexdigest() != file.sha256:
            raise DatasetError(f"{target} is not the published file: its SHA-256 is another. Move it, and fetch again.")
        return False
    if file.url_path is None:
        raise DatasetError(f"It cannot be downloaded as one file; its texts are published in {file.origin}.")
    download(file.url_path, file.sha256, target)
    return True


def download(url_path: str, sha256: str, target: Path) -> None:
    """Download BASE_URL/url_path to `target`; a file with a wrong checksum is not stored there.

    Raises DatasetError without a network, for a wrong checksum, and if `target` cannot be written.
    """
    url = f"{BASE_URL}/{url_path}"
    content = _get(url)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DatasetError(f"The file at {url} has changed (its SHA-256 is not the expected one).")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with appears_whole(target) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise DatasetError(f"Cannot write {target}: {error.strerror}.") from error


def _get(url: str) -> bytes:
    from http.client import HTTPException  # takes 50 ms, and is rarely needed
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=_TIMEOUT) as response:
            content: bytes = response.read()
    except (OSError, HTTPException) as error:
        raise DatasetError(f"Cannot download {url}: {getattr(error, 'reason', error)}.") from error
    return content
