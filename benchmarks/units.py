"""Show what the unit of the hidden states decides: probe stored vectors again, multiplied by a number or rotated.

    python benchmarks/units.py WAREHOUSE [--model smollm2-135m] [--dataset coinflip-synthetic] [--split paper]

Prints J and the best accuracy of ``logistic-raw``, the paper's objective, and of ``logistic``, kdb's default, at the
site resid_post. Nothing is stored.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import kdb
from kdb.ingest.concept.probes import score_probes
from kdb.ingest.concept.probing import read_layer, task_of_tables
from kdb.ingest.concept.splits import Task
from kdb.ingest.execution.processes import mapped
from kdb.ingest.settings import Probing
from kdb.warehouse.parquet import read_parts
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.store import Warehouse

CLASSIFIERS = ("logistic-raw", "logistic")
FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
Vectors = NDArray[np.float32]
JUMP = """
SELECT min(layer) FROM (
    SELECT layer, accuracy / lag(accuracy) OVER (ORDER BY layer) AS rate
    FROM (SELECT unnest(?::DOUBLE[]) AS accuracy, generate_subscripts(?::DOUBLE[], 1) - 1 AS layer)
)
WHERE is_jump(rate, 1.1)
"""


def scaled(factor: float, X: Vectors) -> Vectors:
    return X * np.float32(factor)


def rotated(X: Vectors) -> Vectors:
    """Turn vectors (n, hidden) by a random orthogonal matrix, the same for every layer."""
    rotation, _r = np.linalg.qr(np.random.default_rng(0).standard_normal((X.shape[1], X.shape[1])))
    return (X @ rotation).astype(np.float32)


def accuracies(
    work: tuple[list[Path], Callable[[Vectors], Vectors], Task, str], layer: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return accuracy and C of each classifier at one layer."""
    files, change, task, split = work
    scores = score_probes(change(read_layer(files, (layer, "resid_post"))), task, CLASSIFIERS)
    wanted = [score for score in scores if score.split == split]
    return {s.classifier: s.accuracy for s in wanted}, {s.classifier: s.c for s in wanted}


def report(wh: Warehouse, model: str, dataset: str, split: str) -> None:
    """Print a row for each change of the vectors."""
    question = "SELECT run FROM current_runs WHERE table_name = 'activations' AND model = ? AND dataset = ?"
    folder = wh.storage.find(wh.sql(question, [model, dataset]).item()).path

    def tables(name: str) -> pa.Table:
        return read_parts(table_files(folder, name))

    n_layers = tables("models").to_pylist()[0]["n_layers"]
    task = task_of_tables(tables, dataset, Probing(), 42)
    changes = {f"× {factor:g}": partial(scaled, factor) for factor in FACTORS} | {"rotated": rotated}
    print(f"{model} on {dataset}, split {split}, {len(task.tested_rows(split))} test prompts")
    print(f"{'vectors':10}" + "".join(f"{name + ': J':>18}{'best':>8}" for name in CLASSIFIERS) + f"{'same C':>10}")
    chosen: list[float] = []
    for name, change in changes.items():
        work = (table_files(folder, "activations"), change, task, split)
        layers = list(mapped(accuracies, work, range(n_layers), 2))
        cs = [c["logistic"] for _accuracy, c in layers]
        chosen = chosen or cs
        row = f"{name:10}"
        for classifier in CLASSIFIERS:
            curve = [accuracy[classifier] for accuracy, _c in layers]
            row += f"{wh.sql(JUMP, [curve, curve]).item()!s:>18}{max(curve):8.3f}"
        print(row + f"{sum(a == b for a, b in zip(cs, chosen, strict=True)):>7}/{n_layers}", flush=True)


def main() -> None:
    """Read the options and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("warehouse", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="coinflip-synthetic")
    parser.add_argument("--split", default="paper")
    options = parser.parse_args()
    report(kdb.open(options.warehouse), options.model, options.dataset, options.split)


if __name__ == "__main__":
    main()
