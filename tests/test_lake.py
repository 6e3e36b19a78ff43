"""The folders of a warehouse: what is visible when, what survives a kill, and how damage is found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count, pairwise
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb.errors import UnknownNameError, WarehouseError
from kdb.warehouse import staged_run
from kdb.warehouse.files import write_json
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.manifest import run_id
from kdb.warehouse.parquet import write_parquet
from kdb.warehouse.run_folders import empty_file
from kdb.warehouse.schema import TABLES
from kdb.warehouse.staged_run import StagedRun
from kdb.warehouse.store import Warehouse
from kdb.warehouse.vectors import activation_groups, prompts_per_part, read_vectors

pytestmark = pytest.mark.slow

RUN = "00000000000000aa"
PARTS = {"part-00000": [0, 3], "part-00001": [1, 2], "part-00002": [4]}


def measure(lake: FolderStorage, run: str = RUN, model: str = "tiny", dataset: str = "weather") -> list[str]:
    """Stage and commit a run as an ingest does, with invented numbers; return the names of the parts written."""
    written = []
    with lake.stage(run, model, dataset) as staged:
        if not staged.committed:
            for name in PARTS:
                if not staged.has("activations", name):
                    write_part(staged, name)
                    written.append(name)
            for layer in (0, 1):
                if not staged.has("probe_scores", f"resid_post-{layer}"):
                    staged.write_rows("probe_scores", f"resid_post-{layer}", [{"layer": layer}])
            staged.commit({"study": "concept", "variant": "default"})
    return written


def write_part(staged: StagedRun, name: str) -> None:
    ids = PARTS[name]
    vectors = np.array(ids, dtype=np.float32)[:, None, None, None] + np.zeros((1, 2, 1, 3), dtype=np.float32)
    staged.write("activations", name, activation_groups(ids, ["resid_post"], vectors), seconds=0.5)


def run_files(lake: FolderStorage, run: str = RUN) -> list[str]:
    folder = lake.find(run).path
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


ACTIVATIONS = "SELECT prompt_id, layer, site, vector FROM activations WHERE run = $run ORDER BY ALL"
MEASURED = [(prompt, layer, "resid_post", [float(prompt)] * 3) for prompt in range(5) for layer in (0, 1)]


def stored(path: Path, run: str = RUN) -> list[tuple[Any, ...]]:
    return Warehouse(path).sql(ACTIVATIONS, {"run": run}).rows()


@pytest.fixture
def lake(tmp_path: Path) -> FolderStorage:
    return FolderStorage.create(tmp_path / "warehouse")


# Parts and commits -----------------------------------------------------------------------------------------------


def test_a_committed_run_is_read_back_as_it_was_written(lake: FolderStorage) -> None:
    measure(lake)
    assert stored(lake.local.path) == MEASURED
    assert list(lake.verify()) == []


def test_a_part_that_fails_while_it_is_written_leaves_nothing(lake: FolderStorage) -> None:
    def half() -> Any:
        yield from activation_groups([0], ["resid_post"], np.zeros((1, 1, 1, 3), dtype=np.float32))
        raise RuntimeError("the model broke down")

    with lake.stage(RUN, "tiny", "weather") as staged:
        write_part(staged, "part-00000")
        with pytest.raises(RuntimeError):
            staged.write("activations", "part-00001", half())
        assert [path.name for path in (staged.path / "activations").iterdir()] == ["part-00000.parquet"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a sync, a machine that loses power may keep the name of a file, but not its content."""
    events, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append(f"{self} is {to}") or replace(self, to))
    write_json(tmp_path / "a.json", {})
    (written,) = [event for event in events if " is " not in event]
    assert events == [written, f"{written} is {tmp_path / 'a.json'}"]


def test_a_run_whose_id_is_not_that_of_its_identity_is_not_begun(lake: FolderStorage) -> None:
    with pytest.raises(AssertionError, match="does not follow from its identity"):
        lake.stage(RUN, "tiny", "weather", identity={"study": "concept"}).__enter__()


def test_a_run_is_invisible_until_it_is_committed(lake: FolderStorage) -> None:
    with lake.stage(RUN, "tiny", "weather") as staged:
        write_part(staged, "part-00000")
        assert lake.run_folders() == []
        assert stored(lake.local.path) == []


def test_a_warehouse_whose_creation_was_interrupted_is_completed(tmp_path: Path) -> None:
    folder = tmp_path / "warehouse"
    FolderStorage.create(folder)
    empty_file(folder / "lake", "projections").unlink()
    assert len(Warehouse(FolderStorage.create(folder).location).sql("SELECT * FROM projections")) == 0


def test_a_run_in_progress_tells_what_it_is(lake: FolderStorage) -> None:
    with lake.stage(RUN, "tiny", "weather") as staged:
        write_part(staged, "part-00000")
    (left,) = lake.local.staging.unfinished_runs()
    begun = left.begun
    assert (begun["run"], begun["model"], begun["dataset"]) == (RUN, "tiny", "weather")
    measure(lake)
    assert lake.local.staging.unfinished_runs() == []


def test_a_run_that_stored_nothing_leaves_no_trace(lake: FolderStorage) -> None:
    with pytest.raises(RuntimeError), lake.stage(RUN, "tiny", "weather"):
        raise RuntimeError("the prompts were too long")
    assert lake.local.staging.unfinished_runs() == []


FILES = [*(f"activations/part-0000{i}.parquet" for i in range(3)), "manifest.json"]
FILES += ["probe_scores/all.parquet", "runs/all.parquet"]
"""The files of a committed run."""


def test_a_resumed_run_writes_only_the_parts_that_are_missing(lake: FolderStorage) -> None:
    with lake.stage(RUN, "tiny", "weather") as staged:
        write_part(staged, "part-00001")
    assert measure(lake) == ["part-00000", "part-00002"]
    assert stored(lake.local.path) == MEASURED


def test_a_committed_run_is_not_written_again(lake: FolderStorage) -> None:
    assert measure(lake) == ["part-00000", "part-00001", "part-00002"]
    assert measure(lake) == []
    assert [path for path in lake.local.staging.path.iterdir() if path.suffix != ".lock"] == []


def test_the_run_row_tells_its_tables_its_times_and_the_seconds_of_its_parts(lake: FolderStorage) -> None:
    measure(lake)
    row = (
        Warehouse(lake.local.path).sql("SELECT tables, seconds, started_at <= finished_at AS ordered FROM runs").rows()
    )
    assert row == [(["activations", "probe_scores", "runs"], 1.5, True)]


def test_small_parts_are_committed_as_one_file(lake: FolderStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_scores(run: str) -> list[str]:
        with lake.stage(run, "tiny", "weather") as staged:
            for layer in range(3):
                staged.write_rows("probe_scores", f"resid_post-{layer:04}", [{"layer": layer}])
            staged.commit({"variant": "default"})
        return sorted(path.name for path in (lake.find(run).path / "probe_scores").iterdir())

    assert measure_scores("0" * 16) == ["all.parquet"]
    monkeypatch.setattr(staged_run, "_MERGE_BELOW", 1)
    assert measure_scores("1" * 16) == [f"resid_post-000{layer}.parquet" for layer in range(3)]


def test_parts_of_vectors_keep_their_row_groups(lake: FolderStorage) -> None:
    with lake.stage(RUN, "tiny", "weather") as staged:
        write_part(staged, "part-00000")
        before = staged.part("activations", "part-00000").stat()
    measure(lake)
    assert run_files(lake) == FILES
    after = (lake.find(RUN).path / "activations/part-00000.parquet").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# Killed at every step --------------------------------------------------------------------------------------------

WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_at(step: int, folder: str) -> None:
    """Kill this process just before its step-th change to the folder."""
    steps = count(1)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event not in WRITES or not isinstance(args[0], str | os.PathLike) or folder not in str(args[0]):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def create_and_die(folder: str, step: int) -> None:
    die_at(step, folder)
    Warehouse.create(folder)


def measure_and_die(folder: str, step: int) -> None:
    die_at(step, folder)
    measure(FolderStorage(Path(folder)))


def killed_at(processes: ForkServerContext, target: Callable[..., None], folder: Path, step: int) -> bool:
    """Return whether the target reached that step and died there; if not, it must have ended without an error."""
    process = processes.Process(target=target, args=(str(folder), step))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_a_run_killed_at_any_step_is_whole_or_invisible_and_resumes(
    lake: FolderStorage, tmp_path: Path, processes: ForkServerContext
) -> None:
    Warehouse(lake.local.path)  # writes kdb.duckdb, which each copy would have to rebuild
    visible_after = []
    for step in count(1):
        copy = Path(shutil.copytree(lake.local.path, tmp_path / f"killed-{step}"))
        if not killed_at(processes, measure_and_die, copy, step):
            break
        left = FolderStorage(copy)
        visible_after.append(bool(left.run_folders()))
        finished = {path.stem for path in left.local.staging.path.glob("*/activations/part-*.parquet")}
        sealed = any(left.local.staging.path.glob("*/manifest.json")) or visible_after[-1]
        assert stored(copy) == (MEASURED if visible_after[-1] else [])
        assert list(left.verify()) == []
        assert measure(left) == ([] if sealed else sorted(PARTS.keys() - finished))
        assert stored(copy) == MEASURED
        assert list(left.verify()) == []
        assert run_files(left) == FILES
        shutil.rmtree(copy)
    assert len(visible_after) > 15
    assert visible_after == sorted(visible_after)
    assert True in visible_after


def test_a_warehouse_whose_creation_was_killed_at_any_step_can_be_used(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    for step in count(1, 4):  # of which a fourth will do: every table takes the same steps
        folder = tmp_path / f"killed-{step}"
        if not killed_at(processes, create_and_die, folder, step):
            break
        assert all(Warehouse.create(folder).sql(f"SELECT * FROM {table}").is_empty() for table in ("runs", "models"))
        measure(FolderStorage(folder))
        assert stored(folder) == MEASURED
        shutil.rmtree(folder)
    assert step > len(TABLES)


# Locks -----------------------------------------------------------------------------------------------------------


def hold(folder: str, held: Event, release: Event) -> None:
    with FolderStorage(Path(folder)).stage(RUN, "tiny", "weather") as staged:
        write_part(staged, "part-00000")
        held.set()
        release.wait()


def test_a_run_is_measured_by_one_process_at_a_time(lake: FolderStorage, processes: ForkServerContext) -> None:
    held, release = processes.Event(), processes.Event()
    other = processes.Process(target=hold, args=(str(lake.local.path), held, release))
    other.start()
    assert held.wait(timeout=60)
    with pytest.raises(WarehouseError, match=rf"Run {RUN} \(tiny on weather\) is being measured by another process"):
        measure(lake)
    assert len(measure(lake, run="00000000000000bb")) == 3  # another run may be measured meanwhile
    release.set()
    other.join()
    assert measure(lake) == ["part-00001", "part-00002"]


def test_a_killed_process_leaves_no_lock(lake: FolderStorage, processes: ForkServerContext) -> None:
    held, never = processes.Event(), processes.Event()
    other = processes.Process(target=hold, args=(str(lake.local.path), held, never))
    other.start()
    assert held.wait(timeout=60)
    other.kill()
    other.join()
    assert measure(lake) == ["part-00001", "part-00002"]


def test_a_run_that_could_not_be_begun_is_not_locked(lake: FolderStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(staged_run, "write_json", refuse)
        with pytest.raises(WarehouseError, match="the disk is full") as caught:
            measure(lake)
    assert caught.tb  # it holds on to the failed attempt, as a notebook does
    assert measure(lake) == ["part-00000", "part-00001", "part-00002"]


def create_and_measure(folder: str, run: str, start: Any) -> None:
    start.wait()
    Warehouse.create(folder)
    measure(FolderStorage(Path(folder)), run=run)


def test_many_processes_may_make_one_warehouse_at_once(tmp_path: Path, processes: ForkServerContext) -> None:
    runs = [f"{i:016x}" for i in range(4)]
    start = processes.Barrier(len(runs))
    started = [
        processes.Process(target=create_and_measure, args=(str(tmp_path / "warehouse"), run, start)) for run in runs
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0, 0]
    assert [folder.run for folder in FolderStorage(tmp_path / "warehouse").run_folders()] == runs
    assert all(stored(tmp_path / "warehouse", run) == MEASURED for run in runs)


# Run ids ---------------------------------------------------------------------------------------------------------


def test_a_run_id_is_the_same_on_every_machine() -> None:
    assert run_id({"model": "tiny", "seed": 42}) == "a11f1cf21f7756e5"
    assert run_id({"seed": 42, "model": "tiny"}) == "a11f1cf21f7756e5"


def test_the_id_of_a_run_measured_before_schema_4_is_computed_as_it_was_then() -> None:
    assert run_id({"model": "tiny", "seed": 42}, 1) == "519655a65249c829"


# Damage ----------------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def append_nothing_but_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (Path.unlink, "missing"),
        (flip_a_byte, "sha256: "),
        (truncate, "unreadable ("),
        (append_nothing_but_rows, "bytes: "),
    ],
)
def test_verify_names_the_damaged_file_and_what_is_wrong_with_it(
    lake: FolderStorage, damage: Callable[[Path], None], problem: str
) -> None:
    measure(lake)
    measure(lake, run="00000000000000bb")
    path = lake.find(RUN).path / "activations/part-00000.parquet"
    damage(path)
    (found,) = lake.verify()
    assert (found.run, found.path) == (RUN, path)
    assert found.problem.startswith(problem)


def test_verify_names_a_file_that_was_added(lake: FolderStorage) -> None:
    measure(lake)
    folder = lake.find(RUN).path
    shutil.copy(folder / "activations/part-00000.parquet", folder / "activations/more.parquet")
    (found,) = lake.verify()
    assert found.path == folder / "activations/more.parquet"
    assert found.problem == "not part of the run: it was added after commit"


@pytest.mark.parametrize("content", [None, "", "{}", '{"files": [{"path": 3}]}', "[]"])
def test_verify_names_a_manifest_that_is_missing_or_damaged(lake: FolderStorage, content: str | None) -> None:
    measure(lake)
    manifest = lake.find(RUN).path / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    (found,) = lake.verify()
    assert found.path == manifest
    assert found.problem.startswith("unreadable (")


# Removal ---------------------------------------------------------------------------------------------------------


def test_a_removed_run_is_gone_and_the_others_stay(lake: FolderStorage) -> None:
    measure(lake)
    measure(lake, run="00000000000000bb")
    measure(lake, run="00000000000000cc", dataset="snow")
    lake.remove(RUN)
    lake.remove("00000000000000cc")
    assert [folder.run for folder in lake.run_folders()] == ["00000000000000bb"]
    assert stored(lake.local.path) == []
    assert [path.name for path in (lake.local.lake / "model=tiny").iterdir()] == ["dataset=weather"]
    assert [path for path in lake.local.staging.path.iterdir() if path.suffix != ".lock"] == []


def test_a_removed_run_can_be_measured_again(lake: FolderStorage) -> None:
    measure(lake)
    lake.remove(RUN)
    assert measure(lake) == ["part-00000", "part-00001", "part-00002"]
    assert stored(lake.local.path) == MEASURED


def test_removing_an_unknown_run_names_the_nearest(lake: FolderStorage) -> None:
    measure(lake)
    with pytest.raises(UnknownNameError, match=rf"Unknown run '{RUN[:-1]}b'. Did you mean '{RUN}'\?"):
        lake.remove(RUN[:-1] + "b")


# Names and places ------------------------------------------------------------------------------------------------


names = st.text(min_size=1, max_size=15).filter(str.strip)


@given(model=names, dataset=names)
@settings(max_examples=25, deadline=None)
def test_any_name_of_a_model_or_dataset_is_stored_and_found(
    tmp_path_factory: pytest.TempPathFactory, model: str, dataset: str
) -> None:
    lake = FolderStorage.create(tmp_path_factory.mktemp("names") / "warehouse")
    measure(lake, model=model, dataset=dataset)
    (folder,) = lake.run_folders()
    assert (folder.model, folder.dataset) == (model, dataset)
    seen = Warehouse(lake.local.path).sql("SELECT DISTINCT model, dataset FROM activations").rows()
    assert seen == [(model, dataset)]


@pytest.mark.parametrize("name", ["", " ", "__none__", "__HIVE_DEFAULT_PARTITION__"])
def test_a_name_that_would_not_come_back_is_refused(lake: FolderStorage, name: str) -> None:
    with pytest.raises(WarehouseError, match="cannot be stored as a name"):
        measure(lake, model=name)


@pytest.mark.parametrize("name", ["a folder", "it's", "50 % [new] {x,y}", "Zoë*?"])
def test_a_warehouse_may_lie_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    lake = FolderStorage.create(tmp_path / name / "warehouse")
    measure(lake)
    assert stored(lake.local.path) == MEASURED
    assert shell_rows(lake.local.path) == 10


def shell_rows(path: Path) -> int:
    """Number of rows that a DuckDB shell counts in ``activations``."""
    with duckdb.connect(path / "kdb.duckdb", read_only=True) as connection:
        return connection.sql("SELECT count(*) FROM activations").fetchone()[0]


def test_the_shell_of_a_moved_warehouse_reads_it_where_it_is(lake: FolderStorage, tmp_path: Path) -> None:
    measure(lake)
    Warehouse(lake.local.path)
    moved = lake.local.path.rename(tmp_path / "elsewhere")
    assert shell_rows(moved) == 10
    assert stored(moved) == MEASURED
    assert shell_rows(moved) == 10


def test_a_deleted_shell_file_is_written_again(lake: FolderStorage) -> None:
    measure(lake)
    Warehouse(lake.local.path)
    (lake.local.path / "kdb.duckdb").unlink()
    Warehouse(lake.local.path)
    assert shell_rows(lake.local.path) == 10


def test_rebuild_restores_the_empty_tables(lake: FolderStorage) -> None:
    opened = Warehouse(lake.local.path)
    shutil.rmtree(lake.local.lake)
    with pytest.raises(WarehouseError, match="kdb rebuild"):
        opened.sql("SELECT * FROM activations")
    assert opened.rebuild() == lake.local.path / "kdb.duckdb"
    assert all(opened.sql(f"SELECT * FROM {table}").is_empty() for table in TABLES)
    assert shell_rows(lake.local.path) == 0


# Folders that are no warehouse -----------------------------------------------------------------------------------


def test_a_missing_folder_is_no_warehouse(tmp_path: Path) -> None:
    with pytest.raises(WarehouseError, match=r"There is no warehouse at '.*/absent': no such folder\. Create"):
        Warehouse(tmp_path / "absent")


def test_a_file_is_no_warehouse(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WarehouseError, match=r"There is no warehouse at '.*/notes\.txt': it is a file\."):
        Warehouse(tmp_path / "notes.txt")
    with pytest.raises(WarehouseError, match="is not empty and not a kdb warehouse"):
        Warehouse.create(tmp_path / "notes.txt")


def test_a_folder_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WarehouseError, match=r"it has no warehouse\.json"):
        Warehouse(tmp_path)
    with pytest.raises(WarehouseError, match="is not empty and not a kdb warehouse"):
        Warehouse.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_becomes_a_warehouse(tmp_path: Path) -> None:
    assert Warehouse.create(tmp_path).sql("SELECT count(*) FROM runs").item() == 0


def test_a_warehouse_of_a_newer_kdb_is_refused_and_left_alone(lake: FolderStorage) -> None:
    lake.local.marker.write_text('{"schema_version": 99}')
    with pytest.raises(WarehouseError, match=r"written by a newer kdb \(schema 99, this one knows 6\). Upgrade kdb"):
        Warehouse.create(lake.local.path)
    assert json.loads(lake.local.marker.read_text()) == {"schema_version": 99}


def test_a_warehouse_of_an_older_kdb_is_refused(lake: FolderStorage) -> None:
    lake.local.marker.write_text('{"schema_version": 1}')
    with pytest.raises(
        WarehouseError, match=r"written by an older kdb \(schema 1, this one reads 3 and later\). Measure again"
    ):
        Warehouse(lake.local.path)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"schema_version": "new"}', '{"schema_version": 1e999}', "\x00", "[" * 200_000]
)
def test_a_damaged_marker_is_named(lake: FolderStorage, content: str) -> None:
    lake.local.marker.write_text(content)
    with pytest.raises(WarehouseError, match=r"warehouse\.json is damaged: "):
        Warehouse(lake.local.path)


# Disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_wherever_it_strikes_and_the_run_goes_on_from_there(small_disk: Any) -> None:
    lake = FolderStorage.create(small_disk.path / "warehouse")
    Warehouse(lake.local.path)
    measure(lake, run="00000000000000bb")
    refused = 0
    for pages in count():
        small_disk.fill(leave=4096 * pages)
        try:
            measure(lake)
        except WarehouseError as error:
            assert "the disk is full. Free some space, then run the same command again" in str(error)
            assert list(lake.verify()) == []
            assert stored(lake.local.path, "00000000000000bb") == MEASURED
            refused += 1
        else:
            break
    assert refused > 3
    assert stored(lake.local.path) == MEASURED
    assert list(lake.verify()) == []


def test_a_warehouse_that_a_full_disk_cut_short_can_be_used_once_there_is_space(small_disk: Any) -> None:
    for pages in (0, 2, 4, 8, 16):
        small_disk.fill(leave=4096 * pages)
        with pytest.raises(WarehouseError, match="the disk is full"):
            Warehouse.create(small_disk.path / "new")
    small_disk.free()
    measure(Warehouse.create(small_disk.path / "new").storage)
    assert stored(small_disk.path / "new") == MEASURED


def test_a_read_only_disk_can_be_asked_and_not_written(small_disk: Any) -> None:
    lake = FolderStorage.create(small_disk.path / "warehouse")
    measure(lake)
    small_disk.make_read_only()
    assert stored(lake.local.path) == MEASURED
    for write in (
        lambda: measure(lake, run="00000000000000bb"),
        lambda: lake.remove(RUN),
        lambda: Warehouse(lake.local.path).rebuild(),
        lambda: FolderStorage.create(small_disk.path / "new"),
    ):
        with pytest.raises(WarehouseError, match=r"the file system is read-only\. Name another folder"):
            write()


# Vectors ---------------------------------------------------------------------------------------------------------


def test_vectors_are_stored_as_float32_of_one_length(lake: FolderStorage) -> None:
    measure(lake)
    schema = pq.read_schema(lake.find(RUN).path / "activations/part-00000.parquet")
    assert str(schema.field("vector").type) == "fixed_size_list<element: float>[3]"


def test_float16_halves_the_vectors_and_duckdb_reads_them_as_floats(lake: FolderStorage) -> None:
    vectors = np.array([[[[0.1, -65504.0]]]], dtype=np.float32)
    with lake.stage(RUN, "tiny", "weather") as staged:
        staged.write("activations", "part-00000", activation_groups([0], ["resid_post"], vectors, float16=True))
        staged.commit({})
    schema = pq.read_schema(lake.find(RUN).path / "activations/part-00000.parquet")
    assert str(schema.field("vector").type) == "fixed_size_list<element: halffloat>[2]"
    row = Warehouse(lake.local.path).sql("SELECT vector, typeof(vector) FROM activations").row(0)
    assert row == ([np.float16(0.1), -65504.0], "FLOAT[]")


def test_float16_is_refused_for_a_value_beyond_it() -> None:
    vectors = np.zeros((2, 3, 1, 4), dtype=np.float32)
    vectors[1, 2, 0, 3] = -70_000
    with pytest.raises(WarehouseError) as caught:
        list(activation_groups([0, 1], ["ffn_norm"], vectors, float16=True))
    assert str(caught.value) == (
        "Layer 2 (ffn_norm) has values up to 70,000, but the limit of float16 is 65,504. "
        "Store these vectors with --store float32."
    )


def test_a_part_holds_64_mib_of_vectors() -> None:
    assert prompts_per_part(n_layers=30, n_sites=2, hidden_size=576) == 485
    assert prompts_per_part(n_layers=1000, n_sites=2, hidden_size=100_000) == 1


@given(
    ids=st.lists(st.integers(0, 10_000), min_size=1, max_size=12, unique=True),
    cuts=st.lists(st.integers(1, 11), max_size=3),
    n_layers=st.integers(1, 3),
    sites=st.permutations(["resid_post", "ffn_norm"]),
    hidden=st.integers(1, 5),
    float16=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_vectors_come_back_in_order_of_prompt_however_they_were_cut_into_parts(
    tmp_path_factory: pytest.TempPathFactory,
    ids: list[int],
    cuts: list[int],
    n_layers: int,
    sites: list[str],
    hidden: int,
    float16: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((len(ids), n_layers, 2, hidden)).astype(np.float16).astype(np.float32)
    edges = [0, *sorted(cut for cut in set(cuts) if cut < len(ids)), len(ids)]
    parts = []
    for start, stop in pairwise(edges):
        parts.append(folder / f"part-{start}.parquet")
        groups = activation_groups(ids[start:stop], sites, vectors[start:stop], float16=float16)
        write_parquet(parts[-1], groups)
    for layer in range(n_layers):
        for s, site in enumerate(sites):
            found = read_vectors(parts, layer, site)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, vectors[np.argsort(ids), layer, s])
