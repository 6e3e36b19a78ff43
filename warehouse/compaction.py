"""Rewriting of committed runs, without an effect on readers: small files are merged, or vectors deleted.

    compact(storage, run)
    keep_vectors(storage, storage.find(run), "none")

The run's new folder is built in staging, with links to unchanged files, and replaces the old one in one step: two
folders exchange names, or, in an object store, the commit is replaced. New files get new names, so that no reader
mistakes one for an old file. A query that is running during the change is repeated (`Warehouse.sql`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdb.errors import WarehouseError
from kdb.warehouse.checksums import file_record, problem_of
from kdb.warehouse.files import storage_errors
from kdb.warehouse.manifest import FileRecord, RunFolder
from kdb.warehouse.parquet import seconds_of, write_parquet
from kdb.warehouse.schema import has_vectors
from kdb.warehouse.storage import Storage

SAMPLE = 100
"""Number of prompts whose vectors ``sampled`` keeps."""

_ROWS = 2**20
"""Rows per row group of a merged table."""


def compact(storage: Storage, run: str) -> int:
    """Merge the files of each table of a run into one; returns the decrease in the number of files.

    Vectors keep one row group for each site and layer, now with the prompts of all parts. Raises WarehouseError if the
    run is damaged or being written, or cannot be replaced in one step (`Storage.replace_run`).
    """
    folder = storage.listed(run)
    tables = Counter(file.table for file in storage.manifest(folder).files)
    if max(tables.values()) > 1:
        with rewriting(storage, storage.downloaded(folder)) as files:
            several = {table: paths for table, paths in files.paths.items() if len(paths) > 1}
            files.write({t: _by_layer(p) if has_vectors(t) else _in_turn(p) for t, p in several.items()})
            files.commit()
    return sum(n - 1 for n in tables.values())


def keep_vectors(storage: Storage, folder: RunFolder, which: str) -> bool:
    """Delete a run's vectors and return whether it had any.

    'none' keeps none, 'sampled' those of ``SAMPLE`` prompts. The run's row in ``runs`` lists the remaining tables.
    Raises WarehouseError as `compact` does.
    """
    with rewriting(storage, folder) as files:
        dropped = [table for table in files.paths if has_vectors(table)]
        if not dropped:
            return False
        if which == "sampled":
            files.write({table: _sampled(files.paths[table]) for table in dropped}, sampled=True)
            files.commit()
            return True
        row = pq.ParquetFile(files.paths["runs"][0]).read()
        tables = [table for table in row["tables"].to_pylist()[0] if table not in dropped]
        column = row.schema.get_field_index("tables")
        row = row.set_column(column, row.schema.field(column), pa.array([tables], row.schema.field(column).type))
        files.write({"runs": [row], **dict.fromkeys(dropped)})
        files.commit()
    return True


def _in_turn(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the rows of some files, one after the other."""
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(_ROWS):
            yield pa.Table.from_batches([batch])


def _by_layer(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the vectors of some files, grouped by site and layer; all files have the same groups in the same order."""
    files = [pq.ParquetFile(path) for path in paths]
    counts = {file.num_row_groups for file in files}
    if len(counts) > 1:
        raise WarehouseError(
            f"{paths[0].parent}: its files have {', '.join(map(str, sorted(counts)))} row groups, expected the same "
            "number in each. The run was not changed; `kdb verify` checks it."
        )
    for group in range(counts.pop()):
        yield pa.concat_tables(file.read_row_group(group) for file in files)


def _sampled(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the vectors of the sampled prompts, the same in every layer."""
    files = [pq.ParquetFile(path) for path in paths]
    ids = np.unique(np.concatenate([file.read_row_group(0, ["prompt_id"])["prompt_id"].to_numpy() for file in files]))
    chosen = pa.array(np.random.default_rng(0).permutation(ids)[:SAMPLE])
    for group in _by_layer(paths):
        yield group.filter(pc.is_in(group["prompt_id"], chosen))


class Rewriting:
    """A committed run that is being rewritten while its lock is held. ``paths`` are its files, by table."""

    def __init__(self, storage: Storage, folder: RunFolder) -> None:
        self._storage, self._folder = storage, folder
        self.manifest = storage.manifest(folder)
        self._suffix = uuid.uuid4().hex[:8]
        self._new = storage.local.staging.path / f"rewritten-{folder.run}-{self._suffix}"
        self._files: tuple[FileRecord, ...] = ()
        self.paths: dict[str, list[Path]] = {}
        for file in self.manifest.files:
            self.paths.setdefault(file.table, []).append(folder.path / file.path)

    def write(self, changed: Mapping[str, Iterable[pa.Table] | None], *, sampled: bool = False) -> dict[str, Path]:
        """Write the tables ``changed``, and link the files of the others; a table that is None is removed.

        Each table keeps its number of rows, unless it is ``sampled``. Returns the new files by table. Raises
        WarehouseError for a file with unexpected content; the run itself does not change before `commit`.
        """
        kept = [self._kept(file) for file in self.manifest.files if file.table not in changed]
        written = [self._written(table, groups) for table, groups in changed.items() if groups is not None]
        for record in written:
            if problem := problem_of(self._new, record):
                raise WarehouseError(
                    f"{self._new / record.path} was not written correctly ({problem}). Run the command again."
                )
            before = sum(file.rows for file in self.manifest.of(record.table))
            if record.rows != before and not sampled:
                raise WarehouseError(
                    f"Table {record.table} of run {self._folder.run} has {before:,} rows, but {record.rows:,} were "
                    "written. The run was not changed; run the command again."
                )
        self._files = (*kept, *written)
        return {record.table: self._new / record.path for record in written}

    def commit(self, **fields: Any) -> None:
        """Replace the run by the rewritten one in one step. ``fields`` are changed in its manifest."""
        self._storage.replace_run(self._folder, self._new, replace(self.manifest, files=self._files, **fields))

    def close(self) -> None:
        """Delete files that were built but not committed, or, in a folder, those of the replaced run."""
        shutil.rmtree(self._new, ignore_errors=True)

    def _kept(self, file: FileRecord) -> FileRecord:
        source, target = self._folder.path / file.path, self._new / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() or source.parent.is_symlink() or not source.is_file():
            raise WarehouseError(
                f"{source} is not a regular file: run {self._folder.run} is damaged. "
                "Nothing was changed; `kdb verify` checks it."
            )
        _link(source, target)
        return file

    def _written(self, table: str, groups: Iterable[pa.Table]) -> FileRecord:
        path = self._new / table / f"all-{self._suffix}.parquet"
        seconds = sum(seconds_of(path) for path in self.paths.get(table, []))
        write_parquet(path, groups, seconds=seconds)
        return file_record(path, self._new)


@contextlib.contextmanager
def rewriting(storage: Storage, folder: RunFolder) -> Iterator[Rewriting]:
    """Lock a run for rewriting, after checking its files against its manifest."""
    local = storage.local
    with local.staging.locked(folder.run), storage_errors(local.path):
        storage.inspect([storage.find(folder.run)], vectors=True)
        files = Rewriting(storage, folder)
        try:
            yield files
        finally:
            files.close()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
