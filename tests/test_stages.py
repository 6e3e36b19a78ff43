"""The runner: shards that are complete are skipped, and nothing else says that one is complete."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdb.errors import ModelError
from kdb.ingest.attribution import study as attribution
from kdb.ingest.attribution.targets import Target
from kdb.ingest.concept import study
from kdb.ingest.datasets import Example
from kdb.ingest.execution.writer import write_behind
from kdb.ingest.forward.ablation import Effects
from kdb.ingest.forward.checks import check_row
from kdb.ingest.forward.memory import CPU_TOKENS, GPU_TOKENS, SHARD_FLOPS, most_per_shard, room
from kdb.ingest.prompts import Prompt
from kdb.ingest.rows import Rows, arrow_rows, rows_of
from kdb.ingest.stages import PlannedRun, RunInProgress, Shard, StoredStage, carry_out
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.staged_run import StagedRun

IDENTITY = {"model": "m", "dataset": "d"}


@pytest.fixture
def lake(tmp_path: Path) -> FolderStorage:
    return FolderStorage.create(tmp_path / "w")


def planned(*stages: StoredStage) -> PlannedRun:
    return PlannedRun(IDENTITY, "m", "d", {"study": "concept", "variant": "default"}, lambda: (None, stages))


def prompts(measured: list[str], *, fails_at: str = "") -> StoredStage:
    """A stage of three shards, of a prompt each, that notes what it measures."""

    def rows(_inputs: Any, shard: Shard) -> list[Rows]:
        if shard.name == fails_at:
            raise KeyboardInterrupt
        measured.append(shard.name)
        return [rows_of("checks", [{"check": shard.name}]), rows_of("prompts", [{"prompt_id": shard.work}])]

    return StoredStage(("checks", "prompts"), lambda _run: [Shard(f"part-{i}", i) for i in range(3)], rows)


def test_an_interrupted_run_resumes_with_the_first_shard_that_is_missing(lake: FolderStorage) -> None:
    measured: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        carry_out(lake, planned(prompts(measured, fails_at="part-1")))
    assert lake.run_folders() == []
    assert carry_out(lake, planned(prompts(measured))).status == "committed"
    assert measured == ["part-0", "part-1", "part-2"]
    assert carry_out(lake, planned(prompts(measured))).status == "exists"


def test_a_shard_without_its_last_table_is_measured_again(lake: FolderStorage) -> None:
    measured: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        carry_out(lake, planned(prompts(measured, fails_at="part-2")))
    next(lake.local.staging.path.glob("*/prompts/part-1.parquet")).unlink()
    carry_out(lake, planned(prompts(measured)))
    assert measured == ["part-0", "part-1", "part-1", "part-2"]


def test_parts_that_fell_into_other_shards_are_dropped(lake: FolderStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        carry_out(lake, planned(prompts(measured, fails_at="part-2")))
    monkeypatch.setattr("kdb.ingest.stages.LAYOUT", 99)
    carry_out(lake, planned(prompts(measured)))
    assert measured == ["part-0", "part-1", *(f"part-{i}" for i in range(3))]


def test_the_table_that_makes_a_shard_complete_is_written_last(
    lake: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[str, str]] = []
    moments = random.Random(0)

    def write(_staged: StagedRun, table: str, name: str, *_: Any, **__: Any) -> None:
        time.sleep(moments.random() / 50)
        ended.append((table, name))

    def measured() -> Iterator[tuple[str, Rows]]:
        for i in range(12):
            for table in ("a", "b", "last"):
                yield f"part-{i}", Rows(table, [])

    monkeypatch.setattr(StagedRun, "write", write)
    with lake.stage("0" * 16, "m", "d") as staged:
        write_behind(staged, measured(), last="last", n_writers=4)
    assert len(ended) == 36
    for i in range(12):
        tables = [table for table, name in ended if name == f"part-{i}"]
        assert tables[-1] == "last"


def test_what_a_write_raises_ends_the_run(lake: FolderStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr(StagedRun, "write", full)
    with lake.stage("0" * 16, "m", "d") as staged, pytest.raises(OSError, match="full"):
        write_behind(staged, iter([("part", Rows("a", []))]), last="a", n_writers=4)


def test_a_plan_is_remembered_whatever_fits_later(lake: FolderStorage) -> None:
    with lake.stage("0" * 16, "m", "d") as staged:
        run = RunInProgress(staged, None, None, None, time.monotonic())
        assert run.remembered("chunks", lambda: [[0, 1], [2]]) == [[0, 1], [2]]
        assert run.remembered("chunks", lambda: [[0], [1], [2]]) == [[0, 1], [2]]


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=200),
    st.sampled_from([10**6, 10**8, 10**10, 10**12]),
    st.sampled_from(["cpu", "cuda:0"]),
)
def test_captured_shards_hold_every_prompt_once_and_about_a_minute(
    n_tokens: Sequence[int], n_params: int, device: str
) -> None:
    model = pa.Table.from_pylist([{"n_layers": 30, "hidden_size": 4096, "n_params": n_params}])
    run: Any = SimpleNamespace(device=device, table=lambda _name: model)
    parts = study._parts(n_tokens, run)
    assert sorted(prompt for part in parts for prompt in part) == list(range(len(n_tokens)))
    most = max(CPU_TOKENS if device == "cpu" else GPU_TOKENS, most_per_shard(device, 2 * n_params))
    assert all(len(part) == 1 or sum(n_tokens[i] for i in part) <= most for part in parts)
    assert all(parts)


@given(st.floats(0, 1e20), st.sampled_from(["cpu", "cuda", "cuda:1"]))
def test_a_shard_has_at_least_one_thing_and_takes_no_more_than_its_operations(flops: float, device: str) -> None:
    most = most_per_shard(device, flops)
    assert most == 1 or most * flops <= SHARD_FLOPS["cpu" if device == "cpu" else "cuda"]


@pytest.mark.parametrize(
    ("rank", "ahead", "shared", "why_not"),
    [
        (1, True, False, None),
        (10, True, False, None),
        (11, True, True, "not_in_top_ten"),
        (1, False, False, "beaten_by_another_answer"),
        (1, True, True, "shares_first_token"),
    ],
)
def test_a_prompt_is_kept_if_its_target_is_among_the_ten_best_and_beats_its_rivals(
    monkeypatch: pytest.MonkeyPatch, rank: int, ahead: bool, shared: bool, why_not: str | None
) -> None:
    rival = (np.array([-1]), np.array([np.nan]))
    found = Effects(np.array([rank]), np.array([0.1]), np.array([-2.3]), np.array([ahead]), *rival)
    monkeypatch.setattr("kdb.ingest.forward.ablation.run_trials", lambda *_, **__: found)
    job = SimpleNamespace(
        dataset=SimpleNamespace(examples=[Example("The sky is", answer="blue")]), texts=["The sky is"]
    )
    subject: Any = SimpleNamespace(
        prompts=(Prompt(0, [1, 2], Target([1, 2], " ", (3, 4), ((3, 5),) * shared)),),
        whole=False,
        decomposition=None,
        batch_tokens=None,
        job=job,
        loaded=SimpleNamespace(tokenizer=SimpleNamespace(decode=str)),
    )
    (row,) = attribution._prompt_rows(subject, [0], lambda _n: None)
    assert (row["kept"], row["not_kept_because"], row["shares_first_token"]) == (why_not is None, why_not, shared)


@pytest.mark.parametrize(
    ("dtype", "states", "others"), [("float32", 1e-3, 1e-3), ("bfloat16", 0.3, 0.1), ("float16", 0.04, 0.02)]
)
def test_a_check_allows_what_the_docs_say_and_no_more(dtype: str, states: float, others: float) -> None:
    loaded: Any = SimpleNamespace(dtype=dtype, source=SimpleNamespace(name="tiny"))
    for check, allowed in (("resid_post", states), ("stored_states", states), ("readout", others)):
        assert check_row(check, [0.99 * allowed], loaded, 1)["passed"]
        with pytest.raises(ModelError, match=f"{check} is off by"):
            check_row(check, [1.01 * allowed], loaded, 1)


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-8), ("bfloat16", 5e-3), ("float16", 5e-5)])
def test_the_frozen_readout_is_bounded_by_kl(dtype: str, allowed: float) -> None:
    loaded: Any = SimpleNamespace(dtype=dtype, source=SimpleNamespace(name="tiny"))
    assert check_row("frozen_readout_kl", [0.99 * allowed], loaded, 1)["tolerance"] == allowed
    with pytest.raises(ModelError, match="frozen_readout_kl is off by"):
        check_row("frozen_readout_kl", [1.01 * allowed], loaded, 1)


def test_layer_scores_that_do_not_add_up_are_stored_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    loaded: Any = SimpleNamespace(dtype="float32", source=SimpleNamespace(name="tiny"))
    assert check_row("layer_score_sum", [1e-4], loaded, 1)["passed"] is True
    assert caplog.text == ""
    assert check_row("layer_score_sum", [1.1e-4], loaded, 1)["passed"] is False
    assert "tiny: layer_score_sum is off by 0.00011" in caplog.text


def test_a_batch_takes_two_fifths_of_a_gpus_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (1000, 5000))
    assert room(SimpleNamespace(type="cuda"), 7) == 400
    assert room(SimpleNamespace(type="cpu"), 7) == 7


def test_a_misspelled_column_is_not_stored_as_null() -> None:
    with pytest.raises(AssertionError, match="checks has no column chekc"):
        rows_of("checks", [{"chekc": "x"}])
    with pytest.raises(AssertionError, match="zero_shot has no column promt_id"):
        arrow_rows("zero_shot", {"promt_id": np.arange(3)})
