"""Measure queries as a warehouse grows: 1, 10 and 100 million neuron scores in 81 runs of nine models.

    python benchmarks/scale.py --rows 1000000 --rows 10000000 --rows 100000000 --keep DIR

The numbers are invented (benchmarks/grown.py). ``--keep`` keeps the warehouses in DIR (12 GB) and reuses those that
exist. Each query runs four times in a process of its own. Printed are the time of the first run, the median time of the
other three with its CPU seconds, and the peak memory of the process. For the ten best neurons, kdb is compared with the
same SQL over the same files without kdb's views and snapshot, and with three ways that do not use the stored sums:
DuckDB over all scores, DuckDB over one unpartitioned file, and Polars. ``--vectors`` and ``--runs`` measure activations
and many tiny runs. At the end, sizes for 80 models of 100 checkpoints each are estimated from the bytes of a row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import duckdb
import polars as pl
import pyarrow.parquet as pq
from grown import HIDDEN, build, build_folders, build_vectors

import kdb
from kdb.queries.catalogue import find_query, literal, macros
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.schema import TABLES
from kdb.warehouse.vectors import read_vectors

MODEL = "llama-7b"
NEURON = "f0_0"

FROM_SCORES = """
WITH kept AS MATERIALIZED (
    SELECT *, dense_rank() OVER (ORDER BY model, category)::SMALLINT AS kind
    FROM _kept_prompts('neuron_scores', {models}, NULL, NULL, 'default', NULL)
),
best AS (
    SELECT kind, component, layer, head, neuron, sum(score) AS total
    FROM neuron_scores JOIN kept USING (model, dataset, run, prompt_id)
    WHERE among(neuron_scores.model, {models})
    GROUP BY kind, component, layer, head, neuron
    QUALIFY row_number() OVER (PARTITION BY kind, component ORDER BY total DESC, layer, head, neuron) <= 10
)
SELECT model, category, component, layer, head, neuron, total / n_kept AS score
FROM best JOIN (SELECT DISTINCT kind, model, category, n_kept FROM kept) USING (kind)
"""

Question = Callable[[], object]


def saved(name: str, **params: object) -> Callable[[Path], Question]:
    """A saved query, as Python asks it: the warehouse is opened for each answer."""

    def prepare(folder: Path) -> Question:
        warehouse = kdb.open(folder)
        return lambda: warehouse.query(name, **params)

    return prepare


def bare(models: list[str] | None) -> Callable[[Path], Question]:
    """The SQL of `top-neurons` over globs of the warehouse's files."""

    def prepare(folder: Path) -> Question:
        connection, query = _globs(folder), find_query("top-neurons")
        for variable, value in query.bind({"pool": True} | ({"model": models} if models else {})).items():
            connection.execute(f"SET VARIABLE {variable} = {literal(value)}")
        return lambda: connection.execute(query.sql).pl()

    return prepare


def from_scores(models: list[str] | None, *, single: bool = False) -> Callable[[Path], Question]:
    """The ten best neurons from neuron_scores and no sums, over globs, or over one file of all scores."""

    def prepare(folder: Path) -> Question:
        connection = _globs(folder, {"neuron_scores": f"{folder}.single.parquet"} if single else {})
        text = FROM_SCORES.format(models=literal(tuple(models) if models else None))
        return lambda: connection.execute(text).pl()

    return prepare


def in_polars(models: list[str] | None) -> Callable[[Path], Question]:
    """The ten best neurons of each category and component, without tokens and counts, as a lazy scan."""

    def prepare(folder: Path) -> Question:
        warehouse = kdb.open(folder)
        wanted = pl.col("model").is_in(models) if models else pl.lit(value=True)
        kind, place = ["model", "category"], ["component", "layer", "head", "neuron"]
        key = ["model", "dataset", "run", "prompt_id"]
        prompts = warehouse.scan("prompts").filter(wanted, pl.col("kept")).select(*key, "category")
        scores = warehouse.scan("neuron_scores").filter(wanted).select(*key, *place, "score")
        totals = scores.join(prompts, on=key).group_by(*kind, *place).agg(pl.col("score").sum())
        best = totals.sort("score", descending=True).group_by(*kind, "component").head(10)
        return lambda: best.collect(engine="streaming")

    return prepare


def opening(folder: Path) -> Question:
    """`kdb.open`, and the list of its runs."""
    return lambda: kdb.open(folder).runs()


QUESTIONS: dict[str, Callable[[Path], Question]] = {
    "open, list runs": opening,
    "top-neurons, one model": saved("top-neurons", model=[MODEL], pool=True),
    "one model, bare Parquet": bare([MODEL]),
    "one model, from the scores": from_scores([MODEL]),
    "one model, from one file": from_scores([MODEL], single=True),
    "one model, Polars": in_polars([MODEL]),
    "top-neurons, nine models": saved("top-neurons", pool=True),
    "nine models, bare Parquet": bare(None),
    "nine models, from the scores": from_scores(None),
    "nine models, from one file": from_scores(None, single=True),
    "nine models, Polars": in_polars(None),
    "concept-depth": saved("concept-depth"),
    "converging-point-by-size": saved("converging-point-by-size"),
    "prompt-story": saved("prompt-story", prompt=3, model=[MODEL], dataset="cities"),
    "neuron-by-category": saved("neuron-by-category", neuron=NEURON),
    "neuron-in-prompts": saved("neuron-in-prompts", neuron=NEURON),
}

FOLDERS: dict[str, Callable[[Path], Question]] = {
    "list run folders": lambda folder: FolderStorage(folder).run_folders,
    "open a snapshot": lambda folder: lambda: held(folder),
    "first look at all files": lambda folder: lambda: first_look(folder),
    "kdb runs": saved("runs"),
    "count(*) of layer_scores": lambda folder: lambda: kdb.open(folder).sql("SELECT count(*) FROM layer_scores"),
    "top-layers": saved("top-layers"),
}


def held(folder: Path) -> None:
    """Open a snapshot, and close it."""
    with kdb.open(folder).snapshot():
        pass


def first_look(folder: Path) -> float:
    """Verify every file as on a machine that has seen none; returns the seconds."""
    lake, begun = FolderStorage(folder), time.perf_counter()
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict("os.environ", XDG_CACHE_HOME=cache):
        lake.inspect(lake.run_folders(), vectors=True)
    return time.perf_counter() - begun


def _globs(folder: Path, files: dict[str, str] | None = None) -> duckdb.DuckDBPyConnection:
    """A plain DuckDB with a view for each table: its glob over the lake, or its file."""
    connection = duckdb.connect()
    for table in TABLES:
        file = (files or {}).get(table, f"{folder}/lake/*/*/*/{table}/*.parquet")
        connection.execute(f"CREATE VIEW {table} AS FROM read_parquet({literal(file)}, hive_partitioning = true)")
    connection.execute(macros())
    return connection


def write_one_file(folder: Path) -> None:
    """Write all neuron scores to one file beside the warehouse, unless it is there."""
    target = Path(f"{folder}.single.parquet")
    if target.exists():
        return
    partial = f"{target}.partial"
    with _globs(folder) as connection:
        connection.execute(f"COPY neuron_scores TO {literal(partial)} (FORMAT parquet, COMPRESSION zstd)")
    Path(partial).rename(target)


def ask(question: Question) -> dict[str, float]:
    """Seconds of the first answer, of the median of the next three and of the processor, and MiB at most."""
    walls, cpus = [], []
    for _ in range(4):
        begun, cpu = time.perf_counter(), time.process_time()
        question()
        walls.append(time.perf_counter() - begun)
        cpus.append(time.process_time() - cpu)
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return {
        "first": walls[0],
        "warm": statistics.median(walls[1:]),
        "cpu": statistics.median(cpus[1:]),
        "peak": peak,
    }


def measured(name: str, folder: Path) -> dict[str, float]:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--ask", name, "--keep", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def print_answers(names: list[str], folders: dict[int, Path], what: str) -> None:
    """A table of the questions' cost, and how the warm one grows from size to size."""
    print(f"\n| {what} | question | first s | warm s | CPU s | peak MiB |\n| --- | --- | --- | --- | --- | --- |")
    warm: dict[str, list[float]] = {name: [] for name in names}
    for n, folder in folders.items():
        for name in names:
            a = measured(name, folder)
            warm[name].append(a["warm"])
            cells = f"{a['first']:.2f} | {a['warm']:.2f} | {a['cpu']:.2f} | {a['peak']:.0f}"
            print(f"| {n:,} | {name} | {cells} |", flush=True)
    print(f"\n| question | warm s at {', '.join(f'{n:,}' for n in folders)} {what} |\n| --- | --- |")
    for name in names:
        print(f"| {name} | {' → '.join(f'{seconds:.2f}' for seconds in warm[name])} |")


def sizes_of(folder: Path) -> dict[str, tuple[int, float]]:
    """Rows of each table that the warehouse's runs have, and bytes of Parquet for a row."""
    sizes: dict[str, tuple[int, float]] = {}
    for table in TABLES:
        files = [file for run in FolderStorage(folder).run_folders() for file in (run.path / table).glob("*.parquet")]
        rows = sum(pq.read_metadata(file).num_rows for file in files)
        if rows:
            sizes[table] = rows, sum(file.stat().st_size for file in files) / rows
    return sizes


def print_sizes(folders: dict[int, Path], what: str) -> None:
    """Rows, and bytes of a row, for each size of the warehouse."""
    print(f"\n| {what} | table | rows | bytes a row |\n| --- | --- | --- | --- |")
    for n, folder in folders.items():
        for table, (rows, size) in sizes_of(folder).items():
            print(f"| {n:,} | {table} | {rows:,} | {size:.1f} |")


def print_vectors(folder: Path, rows: int) -> None:
    """The cost of one layer of one run's vectors."""
    print_sizes({rows: folder}, f"vectors of {HIDDEN} float32")
    parts = sorted(FolderStorage(folder).run_folders()[0].path.glob("activations/*.parquet"))
    answer = ask(lambda: read_vectors(parts, 3, "resid_post"))
    print(f"\nOne layer of one run: {answer['warm']:.3f} s.")
    size = sum(path.stat().st_size for path in (folder / "lake").rglob("*.parquet")) / 1e6
    print(f"First look at {size:,.0f} MB of new files: {size / first_look(folder):,.0f} MB/s.")


def print_model(sizes: dict[str, tuple[int, float]]) -> None:
    """Modelled: the bytes of 80 models × 100 checkpoints × 50,000 prompts, of a shape such as Qwen3-4B's."""
    layers, heads, hidden, ffn, entries, tokens, runs, prompts = 36, 32, 2560, 9728, 4096, 10, 8000, 50_000
    every = layers * (ffn + tokens * entries)
    rows: dict[str, Any] = {
        "layer_scores": 2 * layers,
        "head_scores": layers * heads,
        "neuron_scores, --top-k 300": 600,
        "neuron_scores, --all-neurons": every,
        "activations, float32": 2 * layers,
    }
    each = {table: size for table, (_rows, size) in sizes.items()} | {"activations": 4 * hidden}
    print("\n| modelled | rows a prompt | bytes a row | bytes a run | bytes of all |\n| --- | --- | --- | --- | --- |")
    for table, n in rows.items():
        size = each[table.partition(",")[0]]
        run = n * size * prompts
        print(f"| {table} | {n:,} | {size:.1f} | {run / 1e9:.2f} GB | {run * runs / 1e12:,.1f} TB |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, action="append", default=[], help="neuron scores; may be repeated")
    parser.add_argument("--vectors", type=int, help="activation vectors")
    parser.add_argument("--runs", type=int, action="append", default=[], help="tiny runs; may be repeated")
    parser.add_argument("--only", action="append", help="ask this question alone; may be repeated")
    parser.add_argument("--keep", type=Path, help="where the warehouses are kept")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask({**QUESTIONS, **FOLDERS}[args.ask](args.keep))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        run(args, args.keep or Path(temporary))


def run(args: argparse.Namespace, keep: Path) -> None:
    """Build what is asked for, and measure it."""
    if args.rows:
        folders = {rows: build(keep / str(rows), rows) for rows in args.rows}
        for folder in folders.values():
            write_one_file(folder)
        print_sizes(folders, "scores")
        print_answers(args.only or list(QUESTIONS), folders, "scores")
        print_model(sizes_of(folder))
    if args.vectors:
        print_vectors(build_vectors(keep / f"vectors-{args.vectors}", args.vectors), args.vectors)
    if args.runs:
        print_answers(list(FOLDERS), {n: build_folders(keep / f"runs-{n}", n) for n in args.runs}, "runs")


if __name__ == "__main__":
    main()
