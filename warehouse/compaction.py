"""Committed runs written anew without a reader noticing: small files merged, vectors dropped.

    compact(lake, run)
    keep_vectors(lake, lake.find(run), "none")

The run's new folder is built in staging, of links to what stays, and takes the old one's place in one step: two folders
change names, or in an object store the commit is replaced. Files that are written get names of their own, so that no
reader takes a new file for an old one; a question that meets the change is asked again (`Warehouse.sql`).
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
from kdb.warehouse.files import storage_errors
from kdb.warehouse.inspection import file_record, problem_of
from kdb.warehouse.lake import Lake, seconds_of, write_parquet
from kdb.warehouse.manifest import FileRecord, RunFolder
from kdb.warehouse.schema import has_vectors

SAMPLE = 100
"""Prompts whose vectors ``sampled`` keeps."""

_ROWS = 2**20
"""Rows of a row group of a merged table."""


def compact(lake: Lake, run: str) -> int:
    """Merge the files of each table of a run into one; returns by how many there are fewer.

    Vectors keep their row groups, one for each site and layer, with the prompts of all parts. Raises WarehouseError
    where the run is damaged or being written, or where it cannot be replaced in one step (`Lake.replace`).
    """
    tables = Counter(file.table for file in lake.records(run))
    if max(tables.values()) > 1:
        folder = lake.find(run)
        with rewriting(lake, folder) as files:
            several = {table: paths for table, paths in files.paths.items() if len(paths) > 1}
            files.write({t: _by_layer(p) if has_vectors(t) else _in_turn(p) for t, p in several.items()})
            files.commit()
    return sum(n - 1 for n in tables.values())


def keep_vectors(lake: Lake, folder: RunFolder, which: str) -> bool:
    """Drop a run's vectors: all with 'none', all but those of ``SAMPLE`` prompts with 'sampled'; whether it had any.

    Its row in ``runs`` says what it still has. Raises WarehouseError as `compact` does.
    """
    with rewriting(lake, folder) as files:
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
    """The rows of some files, one after the other."""
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(_ROWS):
            yield pa.Table.from_batches([batch])


def _by_layer(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """The vectors of some files, a group for each site and layer; every part has the same ones in the same order."""
    files = [pq.ParquetFile(path) for path in paths]
    counts = {file.num_row_groups for file in files}
    if len(counts) > 1:
        raise WarehouseError(
            f"{paths[0].parent}: its files have {', '.join(map(str, sorted(counts)))} row groups, expected as many in "
            "each: the run is left as it was."
        )
    for group in range(counts.pop()):
        yield pa.concat_tables(file.read_row_group(group) for file in files)


def _sampled(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """The vectors of the same prompts in every layer."""
    files = [pq.ParquetFile(path) for path in paths]
    ids = np.unique(np.concatenate([file.read_row_group(0, ["prompt_id"])["prompt_id"].to_numpy() for file in files]))
    chosen = pa.array(np.random.default_rng(0).permutation(ids)[:SAMPLE])
    for group in _by_layer(paths):
        yield group.filter(pc.is_in(group["prompt_id"], chosen))


class Rewriting:
    """A committed run that is written anew while its lock is held. ``paths`` are its files, by table."""

    def __init__(self, lake: Lake, folder: RunFolder) -> None:
        self._lake, self._folder = lake, folder
        self.manifest = lake.manifest(folder)
        self._mark = uuid.uuid4().hex[:8]
        self._new = lake.staging / f"rewritten-{folder.run}-{self._mark}"
        self._files: tuple[FileRecord, ...] = ()
        self.paths: dict[str, list[Path]] = {}
        for file in self.manifest.files:
            self.paths.setdefault(file.table, []).append(folder.path / file.path)

    def write(self, changed: Mapping[str, Iterable[pa.Table] | None], *, sampled: bool = False) -> dict[str, Path]:
        """Write the tables ``changed``, and link the files of the others; a table that is None is dropped.

        Each has as many rows as before, unless it is ``sampled``. Returns the new files by table. Raises WarehouseError
        for a file that is not what it should be; nothing of the run is changed before `commit`.
        """
        kept = [self._kept(file) for file in self.manifest.files if file.table not in changed]
        written = [self._written(table, groups) for table, groups in changed.items() if groups is not None]
        for record in written:
            if problem := problem_of(self._new, record):
                raise WarehouseError(
                    f"{self._new / record.path} was not written well ({problem}): give the command again."
                )
            before = sum(file.rows for file in self.manifest.of(record.table))
            if record.rows != before and not sampled:
                raise WarehouseError(
                    f"Table {record.table} of run {self._folder.run} has {before:,} rows, and {record.rows:,} were "
                    "written: the run is left as it was."
                )
        self._files = (*kept, *written)
        return {record.table: self._new / record.path for record in written}

    def commit(self, **fields: Any) -> None:
        """Put the run with the files written in its own place, in one step. ``fields`` are changed in its manifest."""
        self._lake.replace(self._folder, self._new, replace(self.manifest, files=self._files, **fields))

    def close(self) -> None:
        """Delete what was built and not committed, or in a folder what was there before."""
        shutil.rmtree(self._new, ignore_errors=True)

    def _kept(self, file: FileRecord) -> FileRecord:
        source, target = self._folder.path / file.path, self._new / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() or source.parent.is_symlink() or not source.is_file():
            raise WarehouseError(
                f"{source} is not a regular file: run {self._folder.run} is damaged. Nothing was changed."
            )
        _link(source, target)
        return file

    def _written(self, table: str, groups: Iterable[pa.Table]) -> FileRecord:
        path = self._new / table / f"all-{self._mark}.parquet"
        seconds = sum(seconds_of(path) for path in self.paths.get(table, []))
        write_parquet(path, groups, seconds=seconds)
        return file_record(path, self._new)


@contextlib.contextmanager
def rewriting(lake: Lake, folder: RunFolder) -> Iterator[Rewriting]:
    """Take a run's lock to write it anew, once its files were found to be those of its manifest."""
    with lake.locked(folder), storage_errors(lake.path):
        lake.look([lake.find(folder.run)], vectors=True)
        files = Rewriting(lake, folder)
        try:
            yield files
        finally:
            files.close()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
