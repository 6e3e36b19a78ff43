"""A warehouse without some prompts, in which a query chooses what is then measured in these prompts.

    with without_prompts(storage, source, hidden) as seen:
        rows = seen.sql("SELECT … FROM current.head_scores …")

It holds one run and those computed from it. No row of a hidden prompt is in it, and sums are built without them.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from kdb.warehouse.manifest import Manifest, RunFolder
from kdb.warehouse.migration import upgraded
from kdb.warehouse.parquet import read_parts, write_parquet
from kdb.warehouse.run_copy import copy_run
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.schema import NEURON
from kdb.warehouse.storage import Storage
from kdb.warehouse.store import Warehouse
from kdb.warehouse.sums import sum_neurons

_CHOSEN = "ablated_parts"
"""Table of sets that were chosen before, perhaps in all prompts: runs with it are left out."""


@contextlib.contextmanager
def without_prompts(storage: Storage, source: RunFolder, hidden: Collection[int]) -> Iterator[Warehouse]:
    """Yield a warehouse, removed afterwards, of a run without its hidden prompts, and of runs computed from it."""
    storage.inspect([source], vectors=False)
    with tempfile.TemporaryDirectory(prefix="kdb-half-") as folder:
        half = Warehouse.create(Path(folder) / "warehouse")
        for one in [source, *_computed_from(storage, source)]:
            copy_run(half.storage, one, functools.partial(_without, hidden))
        yield half


def _computed_from(storage: Storage, source: RunFolder) -> Iterator[RunFolder]:
    for folder in storage.run_folders():
        if (folder.model, folder.dataset) == (source.model, source.dataset) and folder.run != source.run:
            found = storage.find(folder.run)
            [row] = read_parts(table_files(found.path, "runs")).to_pylist()
            if row["source_run"] == source.run and not table_files(found.path, _CHOSEN):
                yield found


def _without(hidden: Collection[int], copy: RunFolder, manifest: Manifest) -> Mapping[str, pa.Table]:
    """Return the tables of a run without the hidden prompts, in the current schema."""
    names = sorted({str(record.table) for record in manifest.files})
    tables = {name: _shown(read_parts(table_files(copy.path, name)), hidden) for name in names}
    tables = {name: upgraded(name, rows, copy.dataset) for name, rows in tables.items()}
    if "candidate_scores" in tables:  # all prompts decided which neurons are candidates
        tables["candidate_scores"] = tables["candidate_scores"].slice(0, 0)
    if "neuron_sums" in tables:
        tables["neuron_sums"] = _sums(tables["neuron_scores"], tables["prompts"])
    if "neuron_tokens" in tables:
        tables["neuron_tokens"] = _of_shown_neurons(tables)
    return tables


def _shown(rows: pa.Table, hidden: Collection[int]) -> pa.Table:
    if "prompt_id" not in rows.column_names:
        return rows
    ids = rows["prompt_id"]
    return rows.filter(pc.invert(pc.is_in(ids, value_set=pa.array(sorted(hidden), ids.type))))


def _sums(scores: pa.Table, prompts: pa.Table) -> pa.Table:
    with tempfile.TemporaryDirectory(prefix="kdb-half-") as folder:
        paths = [Path(folder) / name for name in ("scores.parquet", "prompts.parquet")]
        for path, rows in zip(paths, (scores, prompts), strict=True):
            write_parquet(path, [rows])
        return sum_neurons(paths[:1], [], paths[1:])


def _of_shown_neurons(tables: Mapping[str, pa.Table]) -> pa.Table:
    """Return the tokens of neurons that are in the list of some prompt; a name in it would tell of a hidden one."""
    import polars as pl

    rows = pl.DataFrame(tables["neuron_tokens"])
    queries = pl.DataFrame(tables["query_neuron_scores"]).select(
        pl.lit("ffn").alias("component"), "layer", pl.lit(None, rows["head"].dtype).alias("head"), "expert", "neuron"
    )
    named = pl.concat([pl.DataFrame(tables["neuron_scores"]).select(NEURON), queries]).unique()
    shown = rows.join(named, on=NEURON, how="semi", nulls_equal=True)
    return shown.to_arrow().cast(tables["neuron_tokens"].schema)
