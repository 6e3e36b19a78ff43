"""Verification of a run: every file is read again and compared with the manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kdb.errors import WarehouseError
from kdb.warehouse.checksums import problem_of
from kdb.warehouse.inspection import ADDED, unlisted
from kdb.warehouse.manifest import MANIFEST, RunFolder, read_manifest


def damaged_files(folder: RunFolder) -> Iterator[tuple[Path, str]]:
    """Read every file of a run and compare it with the manifest; yields damaged and added files, with the problem."""
    try:
        manifest = read_manifest(folder.path, folder.run)
        added = unlisted(folder, manifest)
    except (OSError, WarehouseError) as error:
        yield folder.path / MANIFEST, f"unreadable ({error})"
        return
    for record in manifest.files:
        if problem := problem_of(folder.path, record):
            yield folder.path / record.path, problem
    for path in added:
        yield folder.path / path, ADDED
