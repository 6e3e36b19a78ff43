"""Runs that go from one warehouse to another: whole, checked, and once."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from click.testing import Result

import kdb
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.run_copy import copy_run

pytestmark = pytest.mark.slow


@pytest.fixture
def derived(warehouse: Path, run_kdb: Callable[..., Result]) -> Path:
    """A warehouse with a run, and one that was computed from it."""
    result = run_kdb("probe", "--model", "tiny", "--dataset", "weather", "--splits", "2", "--warehouse", warehouse)
    assert result.exit_code == 0, result.output
    return warehouse


def runs_of(folder: Path) -> list[tuple[str, str | None]]:
    return kdb.open(folder).sql("SELECT run, source_run FROM runs ORDER BY source_run NULLS FIRST").rows()


def test_what_is_exported_and_imported_is_the_same(
    derived: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert run_kdb("export", there, "--warehouse", derived).exit_code == 0
    assert run_kdb("import", there, "--warehouse", back).exit_code == 0
    for folder in (there, back):
        assert runs_of(folder) == runs_of(derived)
        assert "All files of 2 runs" in run_kdb("verify", "--warehouse", folder).stdout
        for query in ("layer-accuracy", "concept-depth", "prompts"):
            assert kdb.open(folder).query(query).equals(kdb.open(derived).query(query))


def test_a_run_brings_the_one_that_it_was_computed_from(
    derived: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    (measured, _), (refit, source) = runs_of(derived)
    assert source == measured
    run_kdb("export", tmp_path / "both", "--run", refit, "--warehouse", derived)
    assert len(runs_of(tmp_path / "both")) == 2
    run_kdb("export", tmp_path / "one", "--run", measured, "--warehouse", derived)
    assert runs_of(tmp_path / "one") == [(measured, None)]


def test_the_same_import_again_does_nothing(warehouse: Path, tmp_path: Path, run_kdb: Callable[..., Result]) -> None:
    target = tmp_path / "w"
    assert "copied (run " in run_kdb("import", warehouse, "--warehouse", target).stdout
    before = sorted((path, path.stat().st_mtime_ns) for path in (target / "lake").rglob("*"))
    assert "is stored already (run " in run_kdb("import", warehouse, "--warehouse", target).stdout
    assert sorted((path, path.stat().st_mtime_ns) for path in (target / "lake").rglob("*")) == before


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, shorten, Path.unlink])
def test_a_damaged_run_is_refused_and_nothing_of_it_is_stored(
    warehouse: Path, tmp_path: Path, run_kdb: Callable[..., Result], damage: Callable[[Path], object]
) -> None:
    damage(next(warehouse.glob("lake/model=tiny/*/*/activations/*.parquet")))
    result = run_kdb("import", warehouse, "--warehouse", tmp_path / "w")
    assert result.exit_code == 2
    assert "is damaged (" in result.stderr
    assert runs_of(tmp_path / "w") == []
    assert [path for path in (tmp_path / "w/staging").rglob("*") if path.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema_version": 99}, "was written with schema 99"),
        (
            {"files": [{"path": "../../outside.parquet", "rows": 1, "bytes": 1, "sha256": ""}]},
            "which is not TABLE/NAME.parquet",
        ),
        ({"files": [{"path": "/etc/passwd", "rows": 1, "bytes": 1, "sha256": ""}]}, "which is not TABLE/NAME.parquet"),
        (
            {"files": [{"path": "nothing/all.parquet", "rows": 1, "bytes": 1, "sha256": ""}]},
            "which is not TABLE/NAME.parquet",
        ),
        ({"files": 1}, "it lists no files"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(
    warehouse: Path, tmp_path: Path, run_kdb: Callable[..., Result], change: dict[str, object], told: str
) -> None:
    manifest = next(warehouse.glob("lake/model=tiny/*/*/manifest.json"))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    result = run_kdb("import", warehouse, "--warehouse", tmp_path / "w")
    assert result.exit_code == 2
    assert told in result.stderr
    assert runs_of(tmp_path / "w") == []


def test_a_warehouse_of_a_newer_schema_is_refused(
    warehouse: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    (warehouse / "warehouse.json").write_text('{"schema_version": 99}')
    assert run_kdb("import", warehouse, "--warehouse", tmp_path / "w").exit_code == 2


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["export", "out", "--run", "0123456789abcdef"], "Unknown run"),
        (["export", "out", "--model", "gpt-6"], "Unknown model 'gpt-6'"),
        (["import", "nowhere"], "There is no warehouse"),
    ],
)
def test_what_is_not_there_is_one_message(
    warehouse: Path, run_kdb: Callable[..., Result], args: list[str], told: str
) -> None:
    result = run_kdb(*args, "--warehouse", warehouse)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not Path("out").exists()


def adopt(source: Path, target: Path, began: Event) -> None:
    began.set()
    lake = FolderStorage(target)
    for folder in FolderStorage(source).run_folders():
        copy_run(lake, folder)


def test_a_copy_that_is_killed_is_whole_or_invisible_and_goes_on(
    warehouse: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    target = tmp_path / "w"
    lake = FolderStorage.create(target)
    run = FolderStorage(warehouse).run_folders()[0].run
    for delay in (0.0, 0.005, 0.01, 0.02, 0.04, 0.08):
        began = processes.Event()
        copying = processes.Process(target=adopt, args=(warehouse, target, began))
        copying.start()
        began.wait(30)
        copying.join(delay)
        copying.kill()
        copying.join()
        assert copying.exitcode in (0, -signal.SIGKILL)
        assert list(lake.verify()) == []
    adopt(warehouse, target, processes.Event())
    assert [folder.run for folder in lake.run_folders()] == [run]
    assert list(lake.verify()) == []
