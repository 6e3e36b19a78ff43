"""Reduce a measured warehouse to what fits into the package: the warehouse that ``kdb serve --demo`` serves.

    python benchmarks/reduce_atlas.py atlas kdb/web/demo.zip
    python benchmarks/reduce_atlas.py --refresh kdb/web/demo.zip

Every number is a measured one. Left out are hidden states and probe weights, all but the best neurons of each prompt
and category, and most projected prompts and lens readouts before the last token (`KEPT`). Texts are kept of the
datasets that come with kdb only: of the others, no licence is stated, and prompts have ids and scores. A run's id is
not that of the run that it was cut from, since its content differs. With ``--refresh``, the warehouse stays as it is,
but for columns and tables that were declared since, which are empty.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

import kdb
from kdb.errors import KdbError
from kdb.ingest.datasets.builtin import BUILT_IN
from kdb.ingest.datasets.ioi import IOI
from kdb.ingest.datasets.knowledge import KNOWLEDGE
from kdb.warehouse.compaction import rewriting
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.manifest import run_id
from kdb.warehouse.migration import upgraded
from kdb.warehouse.parquet import read_parts
from kdb.warehouse.schema import TABLES, arrow_schema
from kdb.warehouse.store import Warehouse

LARGEST = 15 * 10**6
"""Largest size of the zip file, in bytes."""

OPEN = {*BUILT_IN, KNOWLEDGE, IOI}
"""Datasets whose texts are made by kdb, and may be published."""

WITHOUT_TEXT = "[text left out: no licence is stated]"
"""Text that replaces each text that may not be published."""

_BEST = """IN (
    SELECT neuron_name(component, layer, head, expert, neuron) FROM neuron_scores WHERE run = $run AND rank <= 10
    UNION SELECT neuron_name(component, layer, head, expert, neuron) FROM neuron_sums WHERE run = $run AND rank <= 20
    UNION SELECT neuron_name('ffn', layer, NULL, expert, neuron) FROM query_neuron_scores
    WHERE run = $run AND rank <= 10
)"""

_RANKED = (
    "IN (SELECT neuron_name(component, layer, head, expert, neuron) FROM neuron_sums WHERE run = $run AND rank <= 50)"
)

KEPT = {
    "activations": "false",
    "probe_weights": "false",
    "candidate_scores": f"neuron_name(component, layer, head, expert, neuron) {_RANKED}",
    "probe_transfer": "classifier = 'logistic'",
    "neuron_scores": "rank <= 10",
    "neuron_sums": f"neuron_name(component, layer, head, expert, neuron) {_RANKED}",
    "query_neuron_scores": "rank <= 10",
    "neuron_tokens": f"rank <= 10 AND neuron_name(component, layer, head, expert, neuron) {_BEST}",
    "projections": "prompt_id % 5 = 0 AND site = 'resid_post'",
    "head_position_scores": "score > 0.02",
    "lens_readouts": "prompt_id % 6 = 0 OR position = max(position) OVER (PARTITION BY prompt_id)",
}
"""Conditions for the rows that are kept of large tables; of all others, every row is."""


def reduce(full: Warehouse, small: Path) -> None:
    """Write every run of ``full``, without most of its large tables, to a new warehouse in the folder ``small``."""
    runs = full.sql("SELECT * FROM runs ORDER BY finished_at").to_dicts()
    identities = {row["run"]: {"demonstration_of": row["run"]} for row in runs}
    named = {run: run_id(identity) for run, identity in identities.items()}
    lake = FolderStorage.create(small)
    for row in runs:
        run = row["run"]
        with lake.stage(named[run], row["model"], row["dataset"], identity=identities[run]) as staged:
            took = row["seconds"]  # a run's time is its parts', so the first of them is given all of it
            for table in (name for name in row["tables"] if name != "runs"):
                found = _rows(full, table, row, named)
                if len(found):
                    staged.write(table, "part", [found], seconds=took)
                    took = 0.0
            stored = {name: value for name, value in row.items() if name in TABLES["runs"].columns}
            staged.commit({**stored, "source_run": named.get(row["source_run"])})


def _rows(full: Warehouse, table: str, row: Mapping[str, Any], named: Mapping[str, str]) -> pa.Table:
    """Return what is kept of a table of a run, with the new ids of the runs that it names."""
    columns = ", ".join(f'"{column.name}"' for column in TABLES[table].columns)
    text = f"SELECT {columns} FROM {table} WHERE run = $run QUALIFY {KEPT.get(table, 'true')}"
    if "OVER" not in text:
        text = text.replace("QUALIFY", "AND")
    found = full.sql(text, {"run": row["run"]})
    if table == "prompts" and row["dataset"] not in OPEN:
        found = without_texts(found)
    if table == "probe_transfer":
        found = found.with_columns(pl.col("probe_run").replace_strict(named, default=None))
    return found.to_arrow().cast(arrow_schema(table))


def without_texts(prompts: pl.DataFrame) -> pl.DataFrame:
    """Replace the texts of prompts, and remove what their words could be read from; groups become numbers."""
    group = pl.format("group {}", pl.col("group_id").rank("dense"))
    words = ("subject", "corrupt", "token_ids", "corrupt_token_ids", "answer")
    nothing = [pl.lit(None, dtype=prompts.schema[name]).alias(name) for name in words]
    return prompts.with_columns(pl.lit(WITHOUT_TEXT).alias("text"), group.alias("group_id"), *nothing)


def refresh(target: Path) -> None:
    """Add the columns that were declared since to the warehouse in a zip file, with NULL in every row."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(target) as packed:
            packed.extractall(folder)
        storage = FolderStorage(Path(folder))
        for run in storage.run_folders():
            with rewriting(storage, run) as files:
                old = [name for name, [path, *_] in files.paths.items() if _lacks_columns(name, path)]
                if old:
                    files.write({name: [upgraded(name, read_parts(files.paths[name]), run.dataset)] for name in old})
                    files.commit()
        storage.local.restore_empty_tables()
        pack(Path(folder), target)


def _lacks_columns(table: str, path: Path) -> bool:
    return not set(arrow_schema(table).names) <= set(pq.read_schema(path).names)


def pack(folder: Path, target: Path) -> None:
    """Write the folder as a zip whose bytes depend on its contents alone."""
    with zipfile.ZipFile(target, "w") as packed:
        for file in sorted(
            path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".duckdb", ".lock")
        ):
            entry = zipfile.ZipInfo(file.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
            packed.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each table in a warehouse, the largest first."""
    found: dict[str, int] = {}
    for path in folder.rglob("*.parquet"):
        found[path.parent.name] = found.get(path.parent.name, 0) + path.stat().st_size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("full", nargs="?", help="Folder of the measured warehouse.")
    parser.add_argument("--refresh", action="store_true", help="Add new columns to the zip file instead.")
    parser.add_argument("target", type=Path, help="Zip file to write.")
    options = parser.parse_args()
    if options.refresh:
        refresh(options.target)
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / "demo"
            reduce(kdb.open(options.full), small)
            rows = sum(pq.read_metadata(path).num_rows for path in small.rglob("*.parquet"))
            largest = ", ".join(f"{table} {n / 1e6:.1f}" for table, n in list(sizes(small).items())[:8])
            pack(small, options.target)
    except KdbError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    n_bytes = options.target.stat().st_size
    print(f"{rows:,} rows, {n_bytes / 1e6:.1f} MB; MB by table: {largest}; pyarrow {pa.__version__}")
    if n_bytes > LARGEST:
        print(
            f"{options.target} is larger than {LARGEST / 1e6:.0f} MB. Keep less: KEPT in {__file__}.", file=sys.stderr
        )
        raise SystemExit(1)


if __name__ == "__main__":
    main()
