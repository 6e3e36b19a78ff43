"""Copies of committed runs: a run of another warehouse is checked against its manifest, and committed here.

    copy_run(storage, source.find("1f0c9a3b5d7e2468"))

The source is read only once, since it may change meanwhile; all checks are made on the copy.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from kdb.errors import WarehouseError
from kdb.warehouse.checksums import file_record, problem_of
from kdb.warehouse.files import storage_errors, sync
from kdb.warehouse.manifest import MANIFEST, FileRecord, Manifest, RunFolder, read_manifest
from kdb.warehouse.parquet import seconds_of, write_parquet
from kdb.warehouse.schema import SCHEMA_VERSION
from kdb.warehouse.staged_run import StagedRun
from kdb.warehouse.storage import Storage

Prepare = Callable[[RunFolder, Manifest], Mapping[str, pa.Table]]
"""Checks the copy of a run, and returns tables that replace its own; raises WarehouseError to refuse the run."""


def copy_run(storage: Storage, folder: RunFolder, prepare: Prepare = lambda _copy, _manifest: {}) -> bool:
    """Copy a run of another warehouse, and commit it if all files match its manifest.

    Returns False if the run is already stored. Raises WarehouseError for a run that is damaged, or is being measured
    here; nothing of it is then visible.
    """
    with storage.stage(folder.run, folder.model, folder.dataset) as staged:
        if staged.committed:
            return False
        copy_into(staged, folder, prepare)
    return True


def copy_into(staged: StagedRun, folder: RunFolder, prepare: Prepare) -> None:
    """Copy a committed run into a staged one, and commit it. Raises WarehouseError if it is damaged."""
    # In a separate folder, so that a copied file is never mistaken for a part measured here.
    copy = staged.path.with_name(f"copied-{staged.run}-{uuid.uuid4().hex[:8]}")
    try:
        manifest = _copied(staged, folder, copy)
        changed = prepare(replace(folder, path=copy), manifest)
        with storage_errors(staged.path):
            records = [_replaced(staged, copy, manifest, table, rows) for table, rows in changed.items()]
        unchanged = [record for record in manifest.files if record.table not in changed]
        version = SCHEMA_VERSION if changed else manifest.schema_version
        staged.commit_copy(copy, replace(manifest, files=(*unchanged, *records), schema_version=version))
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _copied(staged: StagedRun, folder: RunFolder, copy: Path) -> Manifest:
    """Copy the files of a run to a folder, and return their manifest after checking the copies."""
    try:
        manifest = read_manifest(folder.path, folder.run)
    except FileNotFoundError:
        raise WarehouseError(f"{folder.path / MANIFEST} is missing: the run was not copied.") from None
    with storage_errors(staged.path):
        for record in manifest.files:
            _copy_regular(folder.path / record.path, copy / record.path)
    for record in manifest.files:
        if problem := problem_of(copy, record):
            raise WarehouseError(f"{folder.path / record.path} is damaged ({problem}): the run was not copied.")
    return manifest


def _replaced(staged: StagedRun, copy: Path, manifest: Manifest, table: str, rows: pa.Table) -> FileRecord:
    """Write a table to replace its files in a copy."""
    before = [copy / record.path for record in manifest.of(table)]
    seconds = sum(seconds_of(path) for path in before)
    for path in before:
        path.unlink()
    write_parquet(copy / table / "all.parquet", [staged.named(rows)], seconds=seconds)
    return file_record(copy / table / "all.parquet", copy)


def _copy_regular(source: Path, target: Path) -> None:
    """Copy a regular file; anything else is skipped, and then reported as a missing file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISREG(source.lstat().st_mode) and not source.parent.is_symlink():
            shutil.copyfile(source, target)
            sync(target)
