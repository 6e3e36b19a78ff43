"""Time commands on a warehouse of many runs, each as a whole process.

    python benchmarks/cli.py [--runs 100]

Prints the median of seven for each command and, for comparison, for a Python that does nothing. A query is measured
with files that this machine has verified, and with files that it has not: those are hashed before they are read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.store import Warehouse

LAYERS = 30


def build(path: Path, n_runs: int) -> None:
    """A warehouse of small runs, ten datasets to a model, as an ingest leaves them."""
    lake = FolderStorage.create(path)
    for number in range(n_runs):
        model, dataset = f"model-{number // 10}", f"dataset-{number % 10}"
        with lake.stage(f"{number:016x}", model, dataset) as staged:
            staged.write_rows("models", "part", [{"family": "made", "n_layers": LAYERS, "n_params": 10**9}])
            staged.write_rows("datasets", "part", [{"study": "concept", "n_prompts": 1000}])
            staged.write_rows("probe_scores", "part", list(scores()))
            staged.commit({"study": "concept", "variant": "default"})
    Warehouse(path)


def scores() -> list[dict[str, object]]:
    """The probe scores of one run: two sites, two classifiers."""
    return [
        {
            "layer": layer,
            "depth": layer / LAYERS,
            "site": site,
            "classifier": classifier,
            "split": "paper",
            "converged": True,
            "n_test": 400,
            "accuracy": min(0.95, 0.5 + 0.02 * layer),
            "auc": 0.5,
        }
        for site in ("resid_post", "ffn_norm")
        for classifier in ("logistic", "logistic-paper")
        for layer in range(LAYERS)
    ]


def seconds(command: list[str], *, forget: bool = False) -> float:
    """Median wall time of seven runs after one to warm up; ``forget`` gives each an empty cache."""
    times = []
    for _ in range(8):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, **({"XDG_CACHE_HOME": cache} if forget else {})}
            begun = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def megabytes(warehouse: Path) -> float:
    """The files that are verified before the first question: all but vectors, of which there are none here."""
    return sum(path.stat().st_size for path in (warehouse / "lake").rglob("*.parquet")) / 1e6


def main() -> None:
    """Print a row per command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    kdb = str(Path(sys.executable).parent / "kdb")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "w", options.runs)
        warehouse = ["--warehouse", str(Path(folder) / "w")]
        nothing = seconds([sys.executable, "-c", "pass"])
        print(f"{options.runs} runs; python -c pass: {nothing:.3f} s")
        for command in (["--help"], ["query", "concept-depth", *warehouse], ["runs", *warehouse]):
            took = seconds([kdb, *command])
            print(f"kdb {' '.join(command[:2])}: {took:.3f} s, {took / nothing:.0f} times as long")
        query = [kdb, "query", "concept-depth", *warehouse]
        seen, new = seconds(query), seconds(query, forget=True)
        size = megabytes(Path(folder) / "w")
        print(f"the query at files once seen: {seen:.3f} s, at {size:.1f} MB of new files: {new:.3f} s,", end=" ")
        print(f"{size / (new - seen):.0f} MB/s" if new > seen else "no difference")


if __name__ == "__main__":
    main()
