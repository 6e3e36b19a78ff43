"""Ingest killed (SIGKILL) at random moments, with a reader asking all the while.

The processes are forked from one that has imported torch already, so that the moments fall into an ingest's work
and not into its imports. Which steps of a commit a kill can hit is enumerated in test_lake.py; here it is chance.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

import kdb
from kdb.cli import main
from kdb.ingest import run
from kdb.warehouse.store import Warehouse

KILLS = 12
SEED = 3

INCOMPLETE = """
SELECT r.run, count(a.prompt_id) AS vectors, any_value(d.n_prompts) * any_value(m.n_layers) * 2 AS expected_vectors
FROM runs r JOIN models m USING (run) JOIN datasets d USING (run) LEFT JOIN activations a USING (run)
GROUP BY r.run HAVING vectors <> expected_vectors
UNION ALL
SELECT r.run, count(p.layer) AS scores, any_value(m.n_layers) * 2 * 2 AS expected_scores
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


def ingest(model: str, dataset: str, warehouse: str) -> None:
    """The command, in parts of four prompts so that there is much to interrupt."""
    import torch

    torch.set_num_threads(1)
    run.prompts_per_part = lambda *_: 4
    run._n_jobs = lambda *_: 1  # whoever kills this process could not find its workers
    main(["ingest", "--model", model, "--dataset", dataset, "--warehouse", warehouse])


@pytest.fixture
def start(processes: ForkServerContext, tiny_model: Path, user_dataset: Path) -> Callable[[Path], Any]:
    def start_ingest(warehouse: Path) -> Any:
        process = processes.Process(target=ingest, args=(str(tiny_model), str(user_dataset), str(warehouse)))
        process.start()
        return process

    return start_ingest


@contextmanager
def reader(warehouses: list[Path]) -> Iterator[list[object]]:
    """Ask the newest warehouse over and over; yields the list of what went wrong."""
    troubles: list[object] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                seen = kdb.open(warehouses[-1]).sql(INCOMPLETE).rows()
            except Exception as error:
                seen = [error]
            troubles.extend(seen)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield troubles
    finally:
        done.set()
        thread.join()


def finished_parts(warehouse: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every finished part of the run, in progress or committed."""
    parts = {}
    for path in [*warehouse.glob("staging/*/*/*.parquet"), *warehouse.glob("lake/model=tiny/*/*/*/*.parquet")]:
        if path.stem != "all":
            stat = path.stat()
            parts[f"{path.parent.name}/{path.stem}"] = (stat.st_ino, stat.st_mtime_ns)
    return parts


def made_true_by(part: str) -> str:
    """The part that is written after it, and without which it is written again."""
    table, name = part.split("/")
    return f"{ {'probe_predictions': 'probe_scores', 'zero_shot': 'activations'}.get(table, table) }/{name}"


def test_a_killed_ingest_resumes_to_the_same_rows_and_no_reader_notices(
    tmp_path: Path, start: Callable[[Path], Any]
) -> None:
    plain = tmp_path / "uninterrupted"
    start(plain).join()
    begun = time.monotonic()
    start(tmp_path / "timed").join()
    duration = time.monotonic() - begun
    expected = Warehouse(plain).sql(RESULTS).rows()
    assert len(expected) == 160

    moments = random.Random(SEED)
    warehouses = [plain]
    kills = resumed = 0
    with reader(warehouses) as troubles:
        while kills < KILLS:
            warehouse = Warehouse.create(tmp_path / f"killed-{len(warehouses)}").lake.path
            warehouses.append(warehouse)
            while True:
                before = finished_parts(warehouse)
                process = start(warehouse)
                process.join(moments.uniform(0, duration))
                process.kill()
                process.join()
                if process.exitcode == 0:
                    break
                assert process.exitcode == -signal.SIGKILL
                kills += 1
                after = finished_parts(warehouse)
                resumed += "activations/part-00000" in before
                changed = {part for part, stat in before.items() if after.get(part) != stat}
                if any(warehouse.rglob("probe_scores/all.parquet")):  # a commit makes one file of small tables
                    changed = {part for part in changed if part.startswith("activations/")}
                changed = {part for part in changed if made_true_by(part) in before}
                assert changed == set()
            opened = Warehouse(warehouse)
            assert opened.sql(RESULTS).rows() == expected
            assert list(opened.lake.verify()) == []
            assert opened.lake.interrupted() == []
    assert troubles == []
    assert resumed > 0  # else every kill came before the first part
