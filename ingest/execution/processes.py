"""Compute shards of stored tables in parallel processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import joblib

S = TypeVar("S")
T = TypeVar("T")


def mapped(work: Callable[[Any, S], T], inputs: Any, shards: Sequence[S], n_jobs: int) -> Iterator[T]:
    """Yield ``work(inputs, shard)`` for each shard, in the order of the shards, as soon as it is ready.

    At most ``n_jobs`` shards are computed at once, to limit the matrices in memory. All three must be picklable.
    The processes share the cores evenly: fitting a probe took 12 s of CPU on two threads, 8 on one.
    """
    threads = max(1, joblib.cpu_count() // n_jobs)
    with joblib.parallel_config(backend="loky", inner_max_num_threads=threads):
        parallel = joblib.Parallel(n_jobs, return_as="generator", pre_dispatch="n_jobs", batch_size=1)
    results = parallel(joblib.delayed(work)(inputs, shard) for shard in shards)
    try:
        yield from results
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # joblib warns of unfinished shards if the caller stops early
            results.close()
