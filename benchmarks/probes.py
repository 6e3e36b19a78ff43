"""Time probing against a plain scikit-learn loop over layers that gets the same scores.

    python benchmarks/probes.py                                          # 40 layers × 4,096 × 6,000 prompts
    python benchmarks/probes.py --layers 4 --hidden 512 --prompts 1500   # seconds

Both sides read the same synthetic layers, made anew from a seed whenever one is read (and timed with it), and fit
``logistic-raw`` to its optimum and ``logistic-paper`` once. Then kdb fits what every run fits, with the validated
``logistic`` and ``mean-difference``, and the ratio of both times is printed. The loop uses
newton-cholesky, the fastest solver of scikit-learn that reached the optimum here: at 4 layers × 512 × 1,500, on the
last layer, newton-cg gave up after 1,000 steps and lbfgs had not ended after two minutes. ``--baseline-layers K`` runs
the loop on K layers, spread over the depth, and extrapolates; 0 leaves it out.

``logistic-paper`` need not agree: it stops short of the optimum, where the order of additions, which depends on
the number of threads, moves its scores.
"""

from __future__ import annotations

import argparse
import functools
import threading
import time
import warnings
from collections.abc import Callable, Sequence

import joblib
import numpy as np
import psutil
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score

from kdb.ingest.concept.probes import ProbeScore, score_probes
from kdb.ingest.concept.splits import Split, Task, make_splits, make_task
from kdb.ingest.execution.processes import mapped
from kdb.ingest.settings import ALWAYS_FITTED

Load = Callable[[int], NDArray[np.float32]]
Labels = NDArray[np.int64]
Scores = list[tuple[float, ...]]  # accuracy, F1, AUC of logistic-raw, then of logistic-paper
PAPERS = ("logistic-raw", "logistic-paper")


def synthetic_layer(layer: int, *, layers: int, prompts: int, hidden: int) -> NDArray[np.float32]:
    """Return states (prompts, hidden) shaped like a real residual stream; the first half has label 0.

    A power-law spectrum, dimensions of unequal scale that grow with depth, three massive ones far from zero, and
    a label direction that strengthens with depth.
    """
    rng = np.random.default_rng(layer)
    depth = (layer + 1) / layers
    rank = min(256, hidden)
    factors = rng.standard_normal((prompts, rank), np.float32) / np.arange(1, rank + 1, dtype=np.float32) ** 0.5
    X = factors @ rng.standard_normal((rank, hidden), np.float32)
    X += 0.5 * rng.standard_normal((prompts, hidden), np.float32)
    X[prompts // 2 :] += (0.03 * depth) * rng.standard_normal(hidden, np.float32)
    X *= (1 + 10 * depth) * np.exp(0.7 * rng.standard_normal(hidden, np.float32))
    massive = rng.choice(hidden, 3, replace=False)
    X[:, massive] = 80 * depth * (X[:, massive] + 10 * (1 + 10 * depth))
    return X


def plain_scores(X: NDArray[np.float32], labels: Labels, split: Split) -> Scores:
    optimum = LogisticRegression(solver="newton-cholesky", tol=1e-7, max_iter=1000)
    scores = []
    for model, states in ((optimum, X.astype(np.float64)), (LogisticRegression(), X)):
        model.fit(states[split.train], labels[split.train])
        truth, predicted = labels[split.test], model.predict(states[split.test])
        auc = roc_auc_score(truth, model.decision_function(states[split.test]))
        scores.append(tuple(map(float, (np.mean(predicted == truth), f1_score(truth, predicted), auc))))
    return scores


def run_plain(load: Load, keys: Sequence[int], labels: Labels, split: Split) -> dict[int, Scores]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return {key: plain_scores(load(key), labels, split) for key in keys}


def run_kdb(
    load: Load, keys: Sequence[int], task: Task, classifiers: Sequence[str], jobs: int
) -> dict[int, list[ProbeScore]]:
    return dict(zip(keys, mapped(scored, (load, task, classifiers), keys, jobs), strict=True))


def scored(work: tuple[Load, Task, Sequence[str]], key: int) -> list[ProbeScore]:
    """The scores of one layer."""
    load, task, classifiers = work
    return score_probes(load(key), task, classifiers)


def largest_difference(ours: list[ProbeScore], plain: Scores, classifier: int) -> float:
    score = ours[classifier]
    return float(np.abs(np.subtract((score.accuracy, score.f1, score.auc), plain[classifier])).max())


class PeakMemory:
    """The largest resident memory, in bytes, of this process and its children together while it is open."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.1):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=6000)
    parser.add_argument("--jobs", type=int, default=joblib.cpu_count(), help="layers probed at a time")
    parser.add_argument("--baseline-layers", type=int, help="run the plain loop on so many layers only")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    load = functools.partial(synthetic_layer, layers=args.layers, prompts=args.prompts, hidden=args.hidden)
    labels = np.repeat([0, 1], [args.prompts // 2, args.prompts - args.prompts // 2])
    task = make_task(labels, make_splits(labels))
    print(f"{args.layers} layers × {args.hidden} dimensions × {args.prompts} prompts, {args.jobs} at a time")

    with PeakMemory() as memory:
        start = time.perf_counter()
        ours = run_kdb(load, range(args.layers), task, PAPERS, args.jobs)
        seconds = time.perf_counter() - start
    converged = sum(scores[0].converged for scores in ours.values())
    print(f"kdb     {seconds:8.1f} s, logistic-raw converged on {converged} of {args.layers}")
    print(f"        peak memory of all processes {memory.peak / 2**30:.2f} GiB")
    with PeakMemory() as memory:
        start = time.perf_counter()
        run_kdb(load, range(args.layers), task, ALWAYS_FITTED, args.jobs)
        whole = time.perf_counter() - start
    print(f"all     {whole:8.1f} s for {', '.join(ALWAYS_FITTED)}: {whole / seconds:.1f} × as long")
    print(f"        peak memory of all processes {memory.peak / 2**30:.2f} GiB")

    wanted = args.layers if args.baseline_layers is None else min(args.baseline_layers, args.layers)
    if wanted == 0:
        return
    keys = np.linspace(0, args.layers - 1, wanted).round().astype(int).tolist()
    start = time.perf_counter()
    plain = run_plain(load, keys, labels, task.splits[0])
    measured = time.perf_counter() - start
    baseline = measured * args.layers / wanted
    note = "" if wanted == args.layers else f", extrapolated from {measured:.1f} s on {wanted}"
    print(f"plain   {baseline:8.1f} s{note}")
    print(f"ratio   {baseline / seconds:8.1f} ×")
    for i, name in enumerate(PAPERS):
        difference = max(largest_difference(ours[key], plain[key], i) for key in keys)
        print(f"largest difference of accuracy, F1 or AUC, {name}: {difference:.5f}")


if __name__ == "__main__":
    main()
