"""Committed runs written anew without a reader noticing: small files merged, vectors dropped.

    compact(lake, run)
    keep_vectors(lake, lake.find(run), "none")

The run's new folder is built in staging, of links to what stays, and takes the old one's place in one step: two folders
change names, or in an object store the commit is replaced. Who asks in that moment has listed the old files or the new:
a file that is gone by then is an error, never a row less, and kdb asks again (`Warehouse.sql`).
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdb.warehouse.lake import FileRecord, Lake, RunFolder, file_record, read_manifest, storage_errors, write_parquet
from kdb.warehouse.schema import has_vectors

SAMPLE = 100
"""Prompts whose vectors ``sampled`` keeps."""

_ROWS = 2**20
"""Rows of a row group of a merged table."""


def compact(lake: Lake, run: str) -> int:
    """Merge the files of each table of a run into one; returns by how many there are fewer.

    Vectors keep their row groups, one for each site and layer, with the prompts of all parts. Raises WarehouseError
    where the run is being written, or where it cannot be replaced in one step (`Lake.replace`).
    """
    tables = Counter(file.table for file in lake.records(run))
    if max(tables.values()) > 1:
        folder = lake.find(run)
        several = {table: paths for table, paths in _files(folder).items() if len(paths) > 1}
        _rewrite(lake, folder, {t: _by_layer(p) if has_vectors(t) else _in_turn(p) for t, p in several.items()})
    return sum(n - 1 for n in tables.values())


def keep_vectors(lake: Lake, folder: RunFolder, which: str) -> bool:
    """Drop a run's vectors: all with 'none', all but those of ``SAMPLE`` prompts with 'sampled'; whether it had any.

    Its row in ``runs`` says what it still has. Raises WarehouseError as `compact` does.
    """
    files = _files(folder)
    dropped = [table for table in files if has_vectors(table)]
    if not dropped:
        return False
    if which == "sampled":
        _rewrite(lake, folder, {table: _sampled(files[table]) for table in dropped})
        return True
    row = pq.ParquetFile(files["runs"][0]).read()
    tables = [table for table in row["tables"].to_pylist()[0] if table not in dropped]
    column = row.schema.get_field_index("tables")
    row = row.set_column(column, row.schema.field(column), pa.array([tables], row.schema.field(column).type))
    _rewrite(lake, folder, {"runs": [row], **dict.fromkeys(dropped)})
    return True


def _files(folder: RunFolder) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in read_manifest(folder.path):
        found.setdefault(file.table, []).append(folder.path / file.path)
    return found


def _in_turn(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """The rows of some files, one after the other."""
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(_ROWS):
            yield pa.Table.from_batches([batch])


def _by_layer(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """The vectors of some files, a group for each site and layer; every part has the same ones in the same order."""
    files = [pq.ParquetFile(path) for path in paths]
    for group in range(files[0].num_row_groups):
        yield pa.concat_tables(file.read_row_group(group) for file in files)


def _sampled(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """The vectors of the same prompts in every layer."""
    files = [pq.ParquetFile(path) for path in paths]
    ids = np.unique(np.concatenate([file.read_row_group(0, ["prompt_id"])["prompt_id"].to_numpy() for file in files]))
    chosen = pa.array(np.random.default_rng(0).permutation(ids)[:SAMPLE])
    for group in _by_layer(paths):
        yield group.filter(pc.is_in(group["prompt_id"], chosen))


def _rewrite(lake: Lake, folder: RunFolder, changed: Mapping[str, Iterable[pa.Table] | None]) -> None:
    """Put a run in its own place again, with the tables that ``changed`` names replaced, or dropped where None."""
    with lake.locked(folder), storage_errors(lake.path):
        for left in lake.staging.glob(f"rewritten-{folder.run}-*"):  # by one that was killed
            shutil.rmtree(left)
        new = lake.staging / f"rewritten-{folder.run}-{uuid.uuid4().hex[:8]}"
        try:
            kept = [file for file in read_manifest(folder.path) if file.table not in changed]
            for file in kept:
                (new / file.path).parent.mkdir(parents=True, exist_ok=True)
                _link(folder.path / file.path, new / file.path)
            written = [
                _written(new, table, groups, _seconds(folder, table)) for table, groups in changed.items() if groups
            ]
            lake.replace(folder, new, kept, written)
        finally:
            shutil.rmtree(new, ignore_errors=True)  # of a folder's, what was there before


def _written(new: Path, table: str, groups: Iterable[pa.Table], seconds: float) -> FileRecord:
    path = new / table / "all.parquet"
    write_parquet(path, groups, seconds=seconds)
    return file_record(path, new)


def _seconds(folder: RunFolder, table: str) -> float:
    paths = _files(folder)[table]
    return sum(float(pq.read_schema(path).metadata[b"kdb_seconds"]) for path in paths)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
