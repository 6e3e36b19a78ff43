"""Committed runs written anew: the same rows from fewer files, or without vectors, and no reader notices."""

from __future__ import annotations

import random
import shutil
import signal
import threading
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from click.testing import Result

import kdb
from kdb.ingest.concept import study as ingest_run
from kdb.warehouse import compaction
from kdb.warehouse.folder_storage import FolderStorage

pytestmark = pytest.mark.slow

ROWS = "SELECT prompt_id, layer, site, vector FROM activations ORDER BY ALL"


@pytest.fixture(scope="module")
def scattered(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, user_dataset: Path, run_kdb: Callable[..., Result]
) -> Path:
    """A warehouse whose run has its activations in ten files."""
    folder = tmp_path_factory.mktemp("scattered") / "w"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest_run, "prompts_per_part", lambda *_: 4)
        arguments = ["--model", tiny_model, "--dataset", user_dataset, "--warehouse", folder]
        assert run_kdb("ingest", *arguments).exit_code == 0
    return folder


@pytest.fixture
def folder(scattered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scattered, tmp_path / "w"))


def files(folder: Path) -> list[str]:
    return [Path(path).name for path in kdb.open(folder).files("activations")]


def test_compact_leaves_one_file_a_table_and_every_row(folder: Path, run_kdb: Callable[..., Result]) -> None:
    before = kdb.open(folder).sql(ROWS)
    assert len(files(folder)) == 10
    assert run_kdb("compact", "--warehouse", folder).stdout == "Reduced the number of files by 9 in 1 run.\n"
    assert len(files(folder)) == 1
    assert kdb.open(folder).sql(ROWS).equals(before)
    assert run_kdb("verify", "--warehouse", folder).exit_code == 0
    assert run_kdb("compact", "--warehouse", folder).stdout == "Reduced the number of files by 0 in 1 run.\n"
    assert run_kdb("project", "--model", "tiny", "--dataset", "weather", "--warehouse", folder).exit_code == 0
    assert not list(folder.glob("staging/rewritten-*"))


def test_a_reader_notices_nothing_of_compactions(scattered: Path, tmp_path: Path) -> None:
    expected = kdb.open(scattered).sql(ROWS)
    copies = [Path(shutil.copytree(scattered, tmp_path / f"{i}")) for i in range(30)]
    current, seen, done = [copies[0]], [], threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                seen.append(kdb.open(current[0]).sql(ROWS).equals(expected))
            except Exception as error:
                seen.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for copy in copies:
        current[0] = copy
        lake = FolderStorage(copy)
        compaction.compact(lake, lake.run_folders()[0].run)
    done.set()
    reader.join()
    assert seen
    assert {True} == set(seen)


def compact_all(folder: str) -> None:
    """Rewrite the same run again and again, until the process is killed."""
    lake = FolderStorage(Path(folder))
    while True:
        with compaction.rewriting(lake, lake.run_folders()[0]) as files:
            files.write({"activations": compaction._by_layer(files.paths["activations"])})
            files.commit()


def test_a_compaction_that_is_killed_leaves_the_run_whole(folder: Path, processes: ForkServerContext) -> None:
    expected, moments = kdb.open(folder).sql(ROWS), random.Random(1)
    for _ in range(15):
        process = processes.Process(target=compact_all, args=(str(folder),))
        process.start()
        process.join(moments.uniform(0.05, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        opened = kdb.open(folder)
        assert opened.sql(ROWS).equals(expected)
        assert list(opened.storage.verify()) == []
    lake = FolderStorage(folder)
    compaction.keep_vectors(lake, lake.run_folders()[0], "sampled")
    assert not list(folder.glob("staging/rewritten-*"))


def test_vectors_are_dropped_and_scores_kept(folder: Path, run_kdb: Callable[..., Result]) -> None:
    depths = kdb.open(folder).query("concept-depth")
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    result = run_kdb("runs", "keep-vectors", "none", "--yes", "--warehouse", folder)
    assert result.exit_code == 0, result.output
    opened = kdb.open(folder)
    assert opened.sql("SELECT count(*) FROM activations").item() == 0
    assert "activations" not in opened.sql("SELECT tables FROM runs").item().to_list()
    assert opened.query("concept-depth").equals(depths)
    assert run_kdb("verify", "--warehouse", folder).exit_code == 0
    assert sum(path.stat().st_size for path in folder.rglob("*.parquet")) < size
    refused = run_kdb("project", "--model", "tiny", "--dataset", "weather", "--warehouse", folder)
    assert refused.exit_code == 2
    again = run_kdb("runs", "keep-vectors", "none", "--yes", "--warehouse", folder)
    assert (again.exit_code, again.stderr) == (0, "None of these runs has vectors.\n")


def test_a_sample_is_the_same_prompts_in_every_layer(
    folder: Path, run_kdb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "SAMPLE", 7)
    before = kdb.open(folder).sql(ROWS)
    assert run_kdb("runs", "keep-vectors", "sampled", "--model", "tiny", "--yes", "--warehouse", folder).exit_code == 0
    kept = kdb.open(folder).sql(ROWS)
    prompts = kept["prompt_id"].unique()
    assert len(prompts) == 7
    assert kept.equals(before.filter(before["prompt_id"].is_in(prompts)))
    refused = run_kdb("probe", "--model", "tiny", "--dataset", "weather", "--splits", "2", "--warehouse", folder)
    assert refused.exit_code == 2
    assert "has the vectors of only 7 of its 40 prompts" in refused.stderr


def test_a_run_that_is_written_is_left_alone(folder: Path, run_kdb: Callable[..., Result]) -> None:
    lake = FolderStorage(folder)
    [found] = lake.run_folders()
    with lake.local.staging.locked(found.run):
        result = run_kdb("compact", "--warehouse", folder)
    assert result.exit_code == 2
    assert "is being written by another process" in result.stderr
    assert len(files(folder)) == 10
