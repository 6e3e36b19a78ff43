"""Where dataset files are looked for, and how one that is missing is downloaded and verified."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import platformdirs

from kdb.errors import DatasetError

BASE_URL = "https://raw.githubusercontent.com"
_TIMEOUT = 30.0  # seconds without an answer


def cache_dir() -> Path:
    """Return the user's folder for downloaded datasets."""
    return Path(platformdirs.user_cache_dir("kdb")) / "datasets"


def search_places(data_dir: Path | None) -> list[Path]:
    """Return the folders to look in, in order: the one given, KDB_DATA_DIR, the user's cache."""
    named = (data_dir, os.environ.get("KDB_DATA_DIR"))
    places = [Path(place).expanduser() for place in named if place]
    return list(dict.fromkeys([*places, cache_dir()]))


def find_file(name: str, data_dir: Path | None) -> Path | None:
    """Return the first file of that name in the folders to look in, or None."""
    candidates = (place / name for place in search_places(data_dir))
    return next((path for path in candidates if path.is_file()), None)


def locate(
    dataset: str, file: str, data_dir: Path | None, *, url_path: str | None, sha256: str, may_download: bool
) -> Path:
    """Return a dataset's file, downloading it into the user's cache if it is nowhere else.

    Raises DatasetError, naming every place tried, if it cannot be had.
    """
    found = find_file(file, data_dir)
    if found is not None:
        return found
    target = cache_dir() / file
    try:
        if url_path is None:
            raise DatasetError("It cannot be downloaded as one file.")
        if not may_download:
            raise DatasetError("Downloading is switched off.")
        download(url_path, sha256, target)
    except DatasetError as why:
        places = ", ".join(map(str, search_places(data_dir)))
        raise DatasetError(
            f"Dataset {dataset!r} needs the file {file}, which is not in {places}. {why} "
            "Put the file in a folder and name that with --data-dir."
        ) from why
    return target


def download(url_path: str, sha256: str, target: Path) -> None:
    """Store the file at BASE_URL/url_path as `target`; what does not match its checksum never reaches it.

    Raises DatasetError without a network, on a wrong checksum, and where `target` cannot be written.
    """
    url = f"{BASE_URL}/{url_path}"
    content = _get(url)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DatasetError(f"What {url} holds now is not the file that kdb knows (its SHA-256 differs).")
    try:
        _write_whole(target, content)
    except OSError as error:
        raise DatasetError(f"Cannot write {target}: {error.strerror}.") from error


def _get(url: str) -> bytes:
    from http.client import HTTPException  # with urllib.request 50 ms, and seldom needed
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=_TIMEOUT) as response:
            content: bytes = response.read()
    except (OSError, HTTPException) as error:
        raise DatasetError(f"Cannot download {url}: {getattr(error, 'reason', error)}.") from error
    return content


def _write_whole(target: Path, content: bytes) -> None:
    """Write a file that is whole or absent, whatever happens on the way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
