"""Writers that are killed (SIGKILL) at random moments, resumed and killed again, while a reader asks all the while.

The processes are forked from one that has imported torch already, so that the moments fall into an ingest's work and
not into its imports.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import kdb
from helpers.tiny_llama import ASK_OPTIONS
from kdb.cli import main
from kdb.ingest.concept import probing
from kdb.ingest.concept import study as run
from kdb.warehouse import bucket_storage
from kdb.warehouse.store import Warehouse

INCOMPLETE = """
SELECT r.run, count(a.prompt_id) AS vectors, any_value(d.n_prompts) * any_value(m.n_layers) * 2 AS expected_vectors
FROM runs r JOIN models m USING (run) JOIN datasets d USING (run) LEFT JOIN activations a USING (run)
GROUP BY r.run HAVING vectors <> expected_vectors
UNION ALL
SELECT r.run, count(p.layer) AS scores, any_value(m.n_layers) * 2 * 4 AS expected_scores
FROM runs r JOIN models m USING (run) LEFT JOIN probe_scores p USING (run)
GROUP BY r.run HAVING scores <> expected_scores
UNION ALL
SELECT r.run, count(z.prompt_id) AS answers, any_value(d.n_prompts) AS expected_answers
FROM runs r JOIN datasets d USING (run) LEFT JOIN zero_shot z USING (run)
GROUP BY r.run HAVING answers <> expected_answers
UNION ALL
SELECT p.run, sum(n_test) AS expected_predictions, (SELECT count(*) FROM probe_predictions q WHERE q.run = p.run)
FROM probe_scores p GROUP BY p.run HAVING sum(n_test) <> (SELECT count(*) FROM probe_predictions q WHERE q.run = p.run)
UNION ALL
SELECT coalesce(a.run, p.run), 0, 0
FROM activations a FULL JOIN probe_scores p USING (run) ANTI JOIN runs USING (run)
"""
"""Visible runs that lack rows of a table, and vectors and scores of no visible run: nothing, at any moment."""

RESULTS = """
SELECT prompt_id, layer, site, vector, text, accuracy, auc
FROM activations JOIN prompts USING (run, prompt_id)
JOIN probe_scores USING (run, layer, site) WHERE classifier = 'logistic' ORDER BY ALL
"""


def ingest(model: str, dataset: str, warehouse: str, environment: Mapping[str, str], cache: str) -> None:
    """The command, in parts of four prompts so that there is much to interrupt; buckets are mirrored in ``cache``."""
    import torch

    os.environ.update(environment)
    bucket_storage.user_cache_path = lambda _: Path(cache)  # type: ignore[assignment]  # one cache for each machine
    torch.set_num_threads(1)
    run.prompts_per_part = lambda *_: 4  # type: ignore[assignment]
    probing._n_jobs = lambda *_: 1  # type: ignore[assignment]  # whoever kills this process could not find its workers
    main(["ingest", "--model", model, "--dataset", dataset, *ASK_OPTIONS, "--warehouse", warehouse])


@dataclass
class Tally:
    """Counts over all warehouses that were written. ``commits`` counts what ``done`` names."""

    done: str = "commits"
    kills: int = 0
    commits: int = 0
    reads: int = 0
    lost: int = 0
    doubled: int = 0
    damaged: int = 0
    troubles: list[object] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing was lost, doubled, damaged or half visible."""
        return not (self.lost or self.doubled or self.damaged or self.troubles)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.commits} {self.done}, {self.reads} reads: {self.lost} rows lost, "
            f"{self.doubled} doubled, {self.damaged} files damaged, {len(self.troubles)} reads failed"
        )


@contextmanager
def reader(warehouses: list[str], tally: Tally) -> Iterator[None]:
    """Ask the newest warehouse over and over, and note what went wrong."""
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                with kdb.open(warehouses[-1]).snapshot() as now:
                    tally.troubles.extend(now.sql(INCOMPLETE).rows())
            except Exception as error:
                tally.troubles.append(error)
            tally.reads += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@dataclass
class Writers:
    """Start writers of one run: ``location`` names a warehouse by its number, buckets are mirrored in ``cache``."""

    processes: ForkServerContext
    model: Path
    dataset: Path
    location: Callable[[int], str]
    cache: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, warehouse: str, machine: int = 0) -> Any:
        """A process that ingests into the warehouse, on one of several machines as far as caches go."""
        cache = str(self.cache / f"machine-{machine}")
        arguments = (str(self.model), str(self.dataset), warehouse, dict(self.environment), cache)
        process = self.processes.Process(target=ingest, args=arguments)
        process.start()
        return process

    def new(self, number: int) -> str:
        """A new empty warehouse."""
        return Warehouse.create(self.location(number)).storage.location


def kill_writers(
    writers: Writers, kills: int, *, seed: int = 3, told: Callable[[Tally], object] = lambda _: None
) -> Tally:
    """Kill writers so many times. Each warehouse is written until its run is committed, and compared with the first."""
    tally, warehouses = Tally(), [writers.new(0)]
    writers.start(warehouses[0]).join()  # which waits for what the others are forked from
    expected = Counter(map(str, Warehouse(warehouses[0]).sql(RESULTS).rows()))
    assert sum(expected.values()) > 0
    warehouses.append(writers.new(1))
    begun = time.monotonic()
    writers.start(warehouses[1]).join()
    duration, moments = time.monotonic() - begun, random.Random(seed)
    with reader(warehouses, tally):
        while tally.kills < kills:
            warehouses.append(writers.new(len(warehouses)))
            tally.kills += _write_until_committed(writers, warehouses[-1], lambda: moments.uniform(0, duration))
            _compare(warehouses[-1], expected, tally)
            told(tally)
    return tally


def _write_until_committed(writers: Writers, warehouse: str, moment: Callable[[], float]) -> int:
    """Start, kill and start again; the kills that it took."""
    kills = 0
    while True:
        process = writers.start(warehouse, machine=kills % 2)
        process.join(moment() * (1 + kills / 10))  # later and later: a machine that got slower must come to an end, too
        process.kill()
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL, f"the writer ended with {process.exitcode}"
        kills += 1


def _compare(warehouse: str, expected: Counter[str], tally: Tally) -> None:
    opened = Warehouse(warehouse)
    found = Counter(map(str, opened.sql(RESULTS).rows()))
    tally.commits += 1
    tally.lost += sum((expected - found).values())
    tally.doubled += sum((found - expected).values())
    tally.damaged += len(list(opened.storage.verify()))
