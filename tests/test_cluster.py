"""Ingest on a Ray cluster of two nodes, both on this machine: the same rows, whoever dies."""

from __future__ import annotations

import os
import signal
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import Result

import kdb
from kdb.ingest import cluster, knowledge, run
from kdb.warehouse.schema import TABLES
from kdb.warehouse.store import Warehouse

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kdb-lm[ray]'")

FACTS = "prompt,answer,category\n" + "\n".join(
    f"Line {number} begins with,{letter},letter {number % 26}" for number, letter in enumerate(2 * string.ascii_letters)
)
"""Every letter is some prompt's answer, so the tiny model knows some of them."""

MEASURED = [table for table in TABLES if table not in ("runs", "checks")]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        yield nodes.address
        nodes.shutdown()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards, so that there is something to hand out."""
    monkeypatch.setattr(run, "prompts_per_part", lambda *_: 4)
    monkeypatch.setattr(knowledge, "CHUNK_BYTES", 1)  # a prompt each


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.csv"
    path.write_text(FACTS)
    return path


@pytest.fixture
def ingest(tiny_model: Path, tmp_path: Path, run_kdb: Callable[..., Result]) -> Callable[..., Warehouse]:
    """Ingest a dataset into a new warehouse, named after how."""

    def ingest_into(name: str, dataset: Path, *options: str) -> Warehouse:
        arguments = ["--model", tiny_model, "--dataset", dataset, "--warehouse", tmp_path / name]
        result = run_kdb("ingest", *arguments, *options)
        assert result.exit_code == 0, result.output
        return kdb.open(tmp_path / name)

    return ingest_into


def assert_same(found: Warehouse, expected: Warehouse) -> None:
    assert found.runs() == expected.runs()
    for table in MEASURED:
        rows, others = (opened.sql(f"FROM {table}") for opened in (found, expected))
        keys = [c for c, t in rows.schema.items() if not t.is_nested() and t != pl.Float64]
        assert rows.sort(keys).equals(others.sort(keys)), table
    assert list(found.lake.verify()) == []


@pytest.mark.parametrize("study", ["concept", "knowledge"])
def test_a_cluster_stores_the_rows_that_one_process_does(
    study: str, address: str, ingest: Callable[..., Warehouse], user_dataset: Path, facts: Path, one_thread: None
) -> None:
    dataset = user_dataset if study == "concept" else facts
    expected = ingest("local", dataset)
    assert_same(ingest("cluster", dataset, "--engine", "ray", "--address", address), expected)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kill the process of a worker that measures, once; the list tells which."""
    killed: list[int] = []
    wait = ray.wait

    def kill_and_wait(references: list[Any], **options: Any) -> Any:
        workers = wanted[0] if wanted else None
        if workers is not None and not killed and len(workers._busy) == 2:
            [actor, task], *_ = workers._busy.values()
            if task.question == "measure":
                os.kill(pids[actor._actor_id], signal.SIGKILL)
                killed.append(pids[actor._actor_id])
        return wait(references, **options)

    wanted: list[cluster.Workers] = []
    pids: dict[Any, int] = {}
    started = cluster.Workers._started

    def note(workers: cluster.Workers, reference: Any) -> None:
        wanted[:] = [workers]
        pids[workers._starting[reference]._actor_id] = ray.get(reference)[1]
        started(workers, reference)

    monkeypatch.setattr(cluster.Workers, "_started", note)
    monkeypatch.setattr(ray, "wait", kill_and_wait)
    return killed


@pytest.mark.parametrize("study", ["concept", "knowledge"])
def test_a_shard_whose_worker_is_killed_is_measured_by_another(
    study: str,
    address: str,
    ingest: Callable[..., Warehouse],
    user_dataset: Path,
    facts: Path,
    one_thread: None,
    killed: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset = user_dataset if study == "concept" else facts
    expected = ingest("local", dataset)
    assert_same(ingest("cluster", dataset, "--engine", "ray", "--address", address), expected)
    assert killed
    assert "A worker died" in caplog.text
