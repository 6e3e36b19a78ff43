"""Make the warehouse that ``kdb serve --demo`` serves: measured runs, cut to what fits into the package.

    kdb ingest --model smollm2-135m --warehouse full     # and gemma-3-270m, as is
    kdb project --model smollm2-135m --dataset world-cities --warehouse full
    python docs/demo_warehouse.py full kdb/web/demo.zip

Every number is a measured one. Left out are the activations, all but the best neurons of each prompt, and all but some
of the projected prompts; so a run's id is not that of the run that it was cut from.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import kdb
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.manifest import run_id
from kdb.warehouse.schema import TABLES, arrow_schema
from kdb.warehouse.store import Warehouse
from kdb.warehouse.sums import write_neuron_sums

DATASETS = ("world-cities", "coinflip-synthetic", "knowledge")

KEPT = {
    "activations": "false",
    "neuron_scores": "rank <= 10",
    "query_neuron_scores": "rank <= 10",
    "neuron_tokens": "rank <= 10 AND neuron_name(component, layer, head, neuron) IN ("
    "SELECT neuron_name(component, layer, head, neuron) FROM neuron_scores WHERE run = $run AND rank <= 10 "
    "UNION SELECT neuron_name('ffn', layer, NULL, neuron) FROM query_neuron_scores WHERE run = $run AND rank <= 10)",
    "projections": "prompt_id % 5 = 0 AND site = 'resid_post'",
    "head_position_scores": "score > 0.02",
}
"""What is kept of the tables that are large."""


def cut(full: Warehouse, small: Path) -> None:
    """Write the runs of DATASETS into the warehouse ``small``."""
    runs = full.sql(
        "SELECT * FROM runs WHERE list_contains($names, dataset) ORDER BY finished_at", {"names": list(DATASETS)}
    ).to_dicts()
    identities = {row["run"]: {"demonstration_of": row["run"]} for row in runs}
    named = {run: run_id(identity) for run, identity in identities.items()}
    lake = FolderStorage.create(small)
    for row in runs:
        run = row["run"]
        with lake.stage(named[run], row["model"], row["dataset"], identity=identities[run]) as staged:
            took = row["seconds"]  # a run's time is its parts', so the first of them is given all of it
            for table in (name for name in row["tables"] if name not in ("runs", "neuron_sums")):
                columns = ", ".join(f'"{column.name}"' for column in TABLES[table].columns)
                text = f"SELECT {columns} FROM {table} WHERE run = $run AND {KEPT.get(table, 'true')}"
                found = full.sql(text, {"run": row["run"]}).to_arrow()
                if len(found):
                    staged.write(table, "part", [found.cast(arrow_schema(table))], seconds=took)
                    took = 0.0
            if "neuron_sums" in row["tables"]:  # of what is left
                write_neuron_sums(staged)
            stored = {name: value for name, value in row.items() if name in TABLES["runs"].columns}
            staged.commit({**stored, "source_run": named.get(row["source_run"])})
            print(row["model"], row["dataset"], row["variant"])


def pack(folder: Path, target: Path) -> None:
    """Write the folder as a zip whose bytes depend on its contents alone."""
    with zipfile.ZipFile(target, "w") as packed:
        for file in sorted(
            path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".duckdb", ".lock")
        ):
            entry = zipfile.ZipInfo(file.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
            packed.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


def main(full: str, target: str) -> None:
    """Cut and pack."""
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "demo"
        cut(kdb.open(full), small)
        rows = sum(pq.read_metadata(path).num_rows for path in small.rglob("*.parquet"))
        pack(small, Path(target))
        print(f"{rows:,} rows, {Path(target).stat().st_size / 2**20:.1f} MiB, pyarrow {pa.__version__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
