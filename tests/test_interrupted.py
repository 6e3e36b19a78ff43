"""Commands that change committed runs: beside snapshots, interrupted at any step, on full and read-only disks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from filelock import FileLock
from helpers.killing_commands import OLD, ask, command, write_source

from kdb.errors import WarehouseError
from kdb.warehouse import folder_storage, staging
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.manifest import MANIFEST
from kdb.warehouse.staging import Staging
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

RunKdb = Callable[..., Result]

COMMANDS = ("compact", "none", "migrate", "remove", "import")
"""Commands that change or add committed runs; see `arguments`."""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a cache of its own, so that no test knows which files another one has verified."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse of one run of today's schema, whose vectors are in several files."""
    folder = tmp_path_factory.mktemp("source") / "shared"
    write_source(folder, models=1)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, source: Path, run_kdb: RunKdb) -> Path:
    """A warehouse of runs of schema 3, and the run of ``source`` beside them."""
    folder = unpacked(tmp_path_factory.mktemp("mixed") / "w")
    assert run_kdb("import", source, "--warehouse", folder).exit_code == 0
    return folder


@pytest.fixture
def folder(mixed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed, tmp_path / "w"))


def test_an_engine_and_the_files_of_a_snapshot_are_of_its_runs(folder: Path) -> None:
    opened = Warehouse(folder)
    with opened.snapshot() as held:
        engine, table = held.engine(), "SELECT count(*) FROM probe_scores"
        before, files = held.sql(table).item(), held.files("probe_scores")
        for run in opened.runs():
            opened.storage.remove(run)
        with engine.connect() as connection:
            assert connection.exec_driver_sql(table).scalar_one() == before > 0
        assert held.files("probe_scores") == files
        assert all(Path(file).is_file() for file in files)
        assert opened.files("probe_scores") == []
    with pytest.raises(WarehouseError, match="This snapshot is closed"):
        held.query("runs")


def test_a_run_that_is_being_measured_is_not_offered_for_deletion(tmp_path: Path, run_kdb: RunKdb) -> None:
    lake = FolderStorage.create(tmp_path / "new")
    with lake.stage("0" * 16, "tiny", "snow") as staged:
        staged.write_rows("prompts", "part", [{"prompt_id": 0}])
        result = run_kdb("clean", "--warehouse", tmp_path / "new")
        assert "Being measured, not deleted: tiny on snow" in result.stderr
        assert "Delete" not in result.stderr
    assert "Delete 1 interrupted run?" in run_kdb("clean", "--warehouse", tmp_path / "new").stderr


def unpacked(folder: Path) -> Path:
    """The warehouse that a kdb of schema 3 wrote."""
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(folder)
    return folder


def arguments(kind: str, folder: Path, source: Path) -> list[str]:
    """A command of this kind for the warehouse."""
    given = {
        "compact": ["compact"],
        "none": ["runs", "keep-vectors", "none", "--yes"],
        "migrate": ["migrate"],
        "remove": ["runs", "remove", Warehouse(source).runs()[0], "--yes"],
        "import": ["import", str(source)],
    }
    return [*given[kind], "--warehouse", str(folder)]


def staged_parquet(folder: Path) -> list[Path]:
    return list((folder / "staging").rglob("*.parquet"))


# Snapshots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_snapshot_shows_the_same_rows_whatever_becomes_of_the_runs(
    kind: str, folder: Path, source: Path, run_kdb: RunKdb
) -> None:
    if kind == "import":
        run_kdb("runs", "remove", Warehouse(source).runs()[0], "--yes", "--warehouse", folder)
    opened = Warehouse(folder)
    with opened.snapshot() as held:
        runs, before = held.runs(), ask(held)
        result = run_kdb(*arguments(kind, folder, source))
        assert result.exit_code == 0, result.output
        assert ask(held) == before
        assert held.runs() == runs
        assert held.sql("SELECT count(*) FROM activations WHERE vector[1] IS NULL").item() == 0
    assert (ask(opened) == before) == (kind in ("compact", "migrate"))
    assert not list((folder / "staging").glob("held-*"))


def test_a_snapshot_shows_runs_of_which_all_are_removed(folder: Path) -> None:
    opened = Warehouse(folder)
    with opened.snapshot() as held:
        before = ask(held)
        for run in opened.runs():
            opened.storage.remove(run)
        assert ask(held) == before
    assert ask(opened) == {}


def hold_snapshot(folder: str, cache: str, there: Connection) -> None:
    """Hold a snapshot, and answer whenever asked."""
    os.environ["XDG_CACHE_HOME"] = cache
    with Warehouse(folder).snapshot() as held:
        there.send(ask(held))
        while there.recv():
            there.send(ask(held))


@pytest.fixture
def holder(folder: Path, tmp_path: Path, processes: ForkServerContext) -> Any:
    """A process that holds a snapshot: the process, and a connection to it."""
    here, there = processes.Pipe()
    process = processes.Process(target=hold_snapshot, args=(str(folder), str(tmp_path / "cache"), there))
    process.start()
    there.close()  # else nobody would notice that the process has ended
    yield process, here
    process.kill()
    process.join()


def test_what_a_killed_process_held_is_deleted_by_the_next_that_opens(folder: Path, holder: Any) -> None:
    process, here = holder
    here.recv()
    process.kill()
    process.join()
    assert list((folder / "staging").glob("held-*/"))
    Warehouse(folder)
    assert not list((folder / "staging").glob("held-*"))


def test_processes_leave_the_snapshots_of_others_alone(folder: Path, holder: Any) -> None:
    process, here = holder
    before = here.recv()
    with Warehouse(folder).snapshot() as held:
        Warehouse(folder).storage.local.staging.delete_leftovers()
        for run in held.runs():
            held.storage.remove(run)
        here.send(True)
        assert here.recv() == ask(held) == before
    here.send(False)
    process.join()
    assert process.exitcode == 0
    assert not list((folder / "staging").glob("held-*"))


def test_a_question_of_a_vanishing_folder_is_about_what_is_left(
    folder: Path, run_kdb: RunKdb, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, scan = folder / "staging" / "removed-00000000000000aa-1", os.scandir

    def delete_first(path: Any = ".") -> Any:
        if str(path) == str(left / "prompts"):  # another process is deleting it
            shutil.rmtree(left)
        return scan(path)

    (left / "prompts").mkdir(parents=True)
    monkeypatch.setattr(Staging, "delete_leftovers", lambda _: 0)
    monkeypatch.setattr(os, "scandir", delete_first)
    assert run_kdb("runs", "--warehouse", folder).exit_code == 0
    assert not left.exists()


# Interrupted -----------------------------------------------------------------------------------------------------

STRIDE = 43
"""One in this many steps of a command is tried, since most are alike. 1 tries all steps, in an hour."""

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}


def interrupted_at(step: int, number: int, folder: str, given: list[str], cache: str) -> None:
    """Run a command, and send a signal to its process just before its step-th change to the folder."""
    steps = count(1)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES and folder in f"{args[0]} {args[1] if len(args) > 1 else ''}":
            reading = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not reading and next(steps) == step:
                os.kill(os.getpid(), number)

    sys.addaudithook(watch)
    command(given, cache)


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_interrupted_at_some_step_leaves_every_run_whole_and_can_be_given_again(
    kind: str,
    number: signal.Signals,
    mixed: Path,
    source: Path,
    tmp_path: Path,
    processes: ForkServerContext,
    run_kdb: RunKdb,
) -> None:
    start, done = tmp_path / "start", tmp_path / "done"
    shutil.copytree(mixed, start)
    if kind == "import":
        FolderStorage(start).remove(Warehouse(source).runs()[0])
    shutil.copytree(start, done)
    cache, before = str(tmp_path / "cache"), ask(Warehouse(start))
    assert run_kdb(*arguments(kind, done, source)).exit_code == 0
    after = ask(Warehouse(done))
    for step in count(1, STRIDE):
        folder = Path(shutil.copytree(start, tmp_path / f"{step}"))
        given = arguments(kind, folder, source)
        process = processes.Process(target=interrupted_at, args=(step, number, str(folder), given, cache))
        process.start()
        process.join()
        assert process.exitcode in (0, 130 if number == signal.SIGINT else -number)
        opened = Warehouse(folder)
        seen = ask(opened)
        assert all(seen.get(run) in (before.get(run), after.get(run)) for run in {*before, *after, *seen})
        assert list(opened.storage.verify()) == []
        # A killed import leaves copies; migrate leaves probes in progress, which the same command resumes. An import
        # that is stopped between its last two renames leaves a whole run, which the next command commits.
        whole = kind == "import" and (number == signal.SIGKILL or list((folder / "staging").glob(f"*/{MANIFEST}")))
        assert not staged_parquet(folder) or kind == "migrate" or whole
        if seen != after or staged_parquet(folder):
            assert run_kdb(*given).exit_code == 0
        assert ask(Warehouse(folder)) == after
        assert not staged_parquet(folder)
        if process.exitcode == 0:
            break
        shutil.rmtree(folder)
    assert step > STRIDE


def test_clean_deletes_what_killed_commands_left_and_not_what_is_being_measured(folder: Path, run_kdb: RunKdb) -> None:
    lake, names = FolderStorage(folder), ("00000000000000aa", "00000000000000bb")
    before = ask(Warehouse(folder))
    for run in names:
        with lake.stage(run, "tiny", "weather") as staged:
            staged.write_rows("probe_scores", "part", [{"layer": 0}])
    for dropped in ("removed-00000000000000cc-1", "rewritten-00000000000000cc-1", "held-1"):
        shutil.copytree(lake.local.staging.path / names[0], lake.local.staging.path / dropped)
    with lake.stage(names[1], "tiny", "weather"):
        result = run_kdb("clean", "--yes", "--warehouse", folder)
        assert result.exit_code == 0, result.output
        assert "Being measured, not deleted: tiny on weather" in result.stderr
        assert [path.name for path in lake.local.staging.path.iterdir() if path.is_dir()] == [names[1]]
    assert run_kdb("clean", "--yes", "--warehouse", folder).exit_code == 0
    assert not staged_parquet(folder)
    assert ask(Warehouse(folder)) == before


def test_a_run_that_is_removed_while_it_is_verified_is_not_called_damaged(
    folder: Path, run_kdb: RunKdb, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, check = Warehouse(folder).runs()[0], folder_storage.damaged_files

    def remove_first(run: Any) -> Any:
        if run.run == gone:  # another process removes it
            FolderStorage(folder).remove(gone)
        return check(run)

    monkeypatch.setattr(folder_storage, "damaged_files", remove_first)
    result = run_kdb("verify", "--warehouse", folder)
    assert result.exit_code == 0, result.output


def set_marks(folder: str, name: str) -> None:
    lake = FolderStorage(Path(folder))
    for value in range(100):
        lake.local.record(**{name: value})


def test_processes_that_change_two_marks_of_a_warehouse_lose_none(folder: Path, processes: ForkServerContext) -> None:
    names = ("one", "two", "three")
    writers = [processes.Process(target=set_marks, args=(str(folder), name)) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    marks = FolderStorage(folder).local.recorded()
    assert [marks.get(name) for name in names] == [99, 99, 99]


# Disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compact", "import", "migrate", "none"])
def test_a_full_disk_loses_nothing_and_is_told(
    kind: str, mixed: Path, source: Path, run_kdb: RunKdb, small_disk: Any
) -> None:
    folder = Path(shutil.copytree(mixed, small_disk.path / "w"))
    if kind == "import":
        FolderStorage(folder).remove(Warehouse(source).runs()[0])
    opened, refused = Warehouse(folder), 0
    before, given = ask(opened), arguments(kind, folder, source)
    for pages in (0, 1, 2, 4, 6):
        small_disk.fill(leave=4096 * pages)
        result = run_kdb(*given)
        assert result.exit_code in (0, 2), result.output
        if result.exit_code:
            assert "the disk is full. Free some space, then run the same command again" in result.stderr
            refused += 1
        assert kind == "none" or {run: ask(opened).get(run) for run in before} == before
        assert list(opened.storage.verify()) == []
        assert not staged_parquet(folder)
    assert refused
    small_disk.free()
    result = run_kdb(*given)
    assert result.exit_code == 0, result.output
    assert list(opened.storage.verify()) == []


QUESTIONS = """
import sys, kdb
from kdb.warehouse.store import Warehouse
warehouse = kdb.open(sys.argv[1])
with warehouse.snapshot() as held:
    for opened in (warehouse, held):
        print(opened.sql("SELECT count(*) FROM runs JOIN activations USING (run)").item(), opened.query("runs").height)
"""


@pytest.mark.parametrize("older", [False, True])
def test_a_warehouse_that_may_not_be_written_can_be_asked(older: bool, source: Path, tmp_path: Path) -> None:
    folder = unpacked(tmp_path / "w") if older else Path(shutil.copytree(source, tmp_path / "w"))
    expected = Warehouse(folder).sql("SELECT count(*) FROM runs JOIN activations USING (run)").item()
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    opened, kdb = Warehouse(folder), str(Path(sys.executable).with_name("kdb"))
    answered = without_privileges(sys.executable, "-c", QUESTIONS, str(folder))
    assert answered.stdout.split() == [str(expected), str(len(opened.runs()))] * 2, answered.stderr
    for given in (["runs"], ["query", "concept-depth"], ["verify"]):
        answered = without_privileges(kdb, *given, "--warehouse", str(folder))
        assert (answered.returncode, "Error" in answered.stderr) == (0, False), answered.stderr
    for given in (
        ["runs", "remove", opened.runs()[0], "--yes"],
        ["runs", "keep-vectors", "none", "--yes"],
        ["migrate"],
    ):
        refused = without_privileges(kdb, *given, "--warehouse", str(folder))
        assert (refused.returncode, "permission denied" in refused.stderr) == (2, True), refused.stderr
    assert list(FolderStorage(folder).verify()) == []


def without_privileges(*given: str) -> subprocess.CompletedProcess[str]:
    """Run a program that permissions bind: as root, without the capabilities that lift them."""
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("needs setpriv, for permissions do not bind root")
        dropped = "-dac_override,-dac_read_search"
        given = (setpriv, f"--bounding-set={dropped}", "--inh-caps=-all", *given)
    return subprocess.run(given, capture_output=True, text=True)


def test_a_lock_that_another_process_looks_at_is_waited_for(folder: Path) -> None:
    lake = FolderStorage(folder)
    found = lake.run_folders()[0]
    look = FileLock(lake.local.staging.path / f"{found.run}.lock")
    look.acquire()
    waited = []

    class Released(FileLock):
        def acquire(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
            waited.append(timeout)
            look.release()
            return super().acquire(*args, timeout=timeout, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "FileLock", Released)
        with lake.local.staging.locked(found.run):
            assert (waited[0] or 0) > 0
