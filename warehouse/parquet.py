"""Parquet files of a run: one part of a table each, with a row group for each Arrow table.

write_parquet(path, [rows], seconds=1.5)
rows = read_parts(paths)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdb.warehouse.files import appears_whole
from kdb.warehouse.schema import PARTITIONS

_SECONDS = b"kdb_seconds"


def write_parquet(path: Path, groups: Iterable[pa.Table], *, seconds: float = 0.0) -> None:
    """Write Arrow tables as the row groups of one Parquet file, completely or not at all.

    ``seconds`` is the time spent measuring the content. Vectors of float32 are byte-stream-split, so that their
    exponents compress (DuckDB cannot read float16 in this encoding). Everything is compressed with zstd.
    """
    groups = iter(groups)
    first = next(groups)
    schema = first.schema.with_metadata({_SECONDS: str(seconds)})
    vectors = [f"{field.name}.list.element" for field in schema if _is_float32_vector(field.type)]
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"compression": "zstd", "use_byte_stream_split": vectors or False}
    options["use_dictionary"] = [f.name for f in schema if not pa.types.is_nested(f.type)]
    with appears_whole(path) as partial, pq.ParquetWriter(partial, schema, **options) as writer:
        for group in itertools.chain([first], groups):
            if len(group):  # `datasets` cannot read a file with an empty row group
                writer.write_table(group, row_group_size=len(group))


def read_parts(parts: Sequence[Path]) -> pa.Table:
    """Return the rows of some Parquet files of one table."""
    return pa.concat_tables((pq.ParquetFile(part).read() for part in parts), promote_options="default")


def seconds_of(path: Path) -> float:
    """Return the seconds spent measuring the content of a file; 0 if not recorded in the file."""
    try:
        seconds = float((pq.read_schema(path).metadata or {}).get(_SECONDS, 0))
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def with_partitions(rows: pa.Table, *names: str) -> pa.Table:
    """Add model, dataset and run as columns, so that readers without partitions know the origin of each row."""
    # The rows may already name the run that they come from.
    rows = rows.drop_columns([name for name in PARTITIONS if name in rows.column_names])
    for column, name in zip(PARTITIONS, names, strict=True):
        rows = rows.append_column(column, pa.repeat(name, len(rows)))
    return rows


def _is_float32_vector(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_float32(kind.value_type))
