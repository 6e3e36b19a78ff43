"""Ingest on a Ray cluster of two nodes, both on this machine: the same rows, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import Result

import kdb
from kdb.ingest.attribution import study as knowledge
from kdb.ingest.concept import study as run
from kdb.ingest.execution import ray as cluster
from kdb.ingest.execution.ray import Needs
from kdb.warehouse.schema import TABLES
from kdb.warehouse.staged_run import StagedRun
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.cluster

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
    assert list(found.storage.verify()) == []


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kill the process of a worker that measures, once; the list tells which."""
    killed: list[int] = []
    wait = ray.wait

    def kill_and_wait(references: list[Any], **options: Any) -> Any:
        measuring = [
            actor for workers in wanted for actor, task in workers._busy.values() if task.shard.name.startswith("part-")
        ]
        if measuring and not killed:
            killed.append(pids[measuring[0]._actor_id])
            os.kill(killed[0], signal.SIGKILL)
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
def test_a_cluster_stores_the_rows_that_one_process_does_though_a_worker_is_killed(
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


def test_an_interrupted_run_goes_on_in_one_process(
    address: str,
    ingest: Callable[..., Warehouse],
    user_dataset: Path,
    tiny_model: Path,
    tmp_path: Path,
    run_kdb: Callable[..., Result],
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = ingest("local", user_dataset)
    write, written, interrupts = StagedRun.write, [], [KeyboardInterrupt()]

    def interrupt(staged: StagedRun, table: str, name: str, *args: Any, **options: Any) -> None:
        write(staged, table, name, *args, **options)
        written.append(f"{table}/{name}")
        if interrupts and len(written) > 8:
            raise interrupts.pop()

    monkeypatch.setattr(StagedRun, "write", interrupt)
    arguments = ["--model", tiny_model, "--dataset", user_dataset, "--warehouse", tmp_path / "stopped"]
    result = run_kdb("ingest", *arguments, "--engine", "ray", "--address", address)
    assert result.exit_code == 130
    assert kdb.open(tmp_path / "stopped").runs() == []
    begun = {name for name in written if name.startswith("activations")}
    written.clear()
    assert_same(ingest("stopped", user_dataset), expected)
    assert begun.isdisjoint(written)


def test_what_a_worker_refuses_is_said_as_here(
    address: str, user_dataset: Path, tiny_model: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    arguments = ["ingest", "--model", folder, "--dataset", user_dataset, "--warehouse", tmp_path / "w"]
    here, there = run_kdb(*arguments), run_kdb(*arguments, "--engine", "ray", "--address", address)
    assert (here.exit_code, there.exit_code) == (2, 2)
    assert there.stderr.strip() == here.stderr.strip()


def test_a_shard_that_kills_every_worker_fails_the_run(
    address: str,
    user_dataset: Path,
    tiny_model: Path,
    tmp_path: Path,
    run_kdb: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Deadly(cluster.Holder):
        def measure(self, *_: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(cluster, "Holder", Deadly)
    monkeypatch.setattr(cluster, "TRIES", 2)
    arguments = ["ingest", "--model", tiny_model, "--dataset", user_dataset, "--warehouse", tmp_path / "w"]
    result = run_kdb(*arguments, "--engine", "ray", "--address", address)
    assert result.exit_code == 2
    assert "2 workers died at loading of tiny" in result.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no-such-host.invalid:6379", "nonsense"])
def test_an_address_without_ray_is_one_message(
    address: str, user_dataset: Path, tiny_model: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    arguments = ["ingest", "--model", tiny_model, "--dataset", user_dataset, "--warehouse", tmp_path / "w"]
    result = run_kdb(*arguments, "--engine", "ray", "--address", address)
    assert result.exit_code == 2
    assert f"{address!r}" in result.stderr
    assert not list((tmp_path / "w").glob("staging/*/*/*.parquet"))


def test_workers_that_no_node_has_room_for_are_one_message(
    address: str, user_dataset: Path, tiny_model: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    arguments = ["ingest", "--model", tiny_model, "--dataset", user_dataset, "--warehouse", tmp_path / "w"]
    result = run_kdb(*arguments, "--engine", "ray", "--address", address, "--worker-cpus", "64")
    assert result.exit_code == 2
    assert "No node of the cluster has 64 CPUs" in result.stderr


def test_ray_is_asked_for_only_where_it_is_used(
    user_dataset: Path,
    tiny_model: Path,
    tmp_path: Path,
    run_kdb: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["ingest", "--model", tiny_model, "--dataset", user_dataset, "--warehouse", tmp_path / "w"]
    result = run_kdb(*arguments, "--engine", "ray")
    assert result.exit_code == 2
    assert "pip install 'kdb-lm[ray]'" in result.stderr
    result = run_kdb(*arguments, "--address", "127.0.0.1:6379")
    assert result.exit_code == 2
    assert "need --engine ray" in result.stderr


@pytest.mark.parametrize(
    ("nodes", "needs", "expected"),
    [
        ([{"CPU": 8}, {"CPU": 4}], Needs(), ({"num_cpus": 4, "num_gpus": 0}, 3)),
        ([{"CPU": 8}, {"CPU": 4}], Needs(cpus=2), ({"num_cpus": 2, "num_gpus": 0}, 6)),
        ([{"CPU": 32, "GPU": 8}, {"CPU": 8}], Needs(), ({"num_cpus": 1, "num_gpus": 1}, 8)),
        ([{"CPU": 32, "GPU": 8}], Needs(cpus=4, gpus=4), ({"num_cpus": 4, "num_gpus": 4}, 2)),
        ([{"CPU": 32, "GPU": 8}, {"CPU": 8}], Needs(gpus=0), ({"num_cpus": 8, "num_gpus": 0}, 5)),
    ],
)
def test_workers_fill_the_cluster(nodes: list[dict[str, float]], needs: Needs, expected: Any) -> None:
    assert cluster._places([{"Alive": True, "Resources": node} for node in nodes], needs) == expected
