"""Damage is never an answer: files are held against their manifest before they are first read."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from helpers.measured import measure

import kdb
from kdb.errors import KdbError
from kdb.warehouse import inspection
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.inspection import DamagedRunError
from kdb.warehouse.manifest import FileRecord

pytestmark = pytest.mark.slow

RunKdb = Callable[..., Result]


@pytest.fixture(autouse=True)
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    measure(tmp_path / "w")
    shutil.rmtree(tmp_path / "cache")  # as if it came from another machine
    return tmp_path / "w"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are hashed when they are first read."""
    found: list[str] = []

    def problem_of(path: Path, record: FileRecord) -> str:
        found.append(record.path)
        return plain(path, record)

    plain = inspection.problem_of
    monkeypatch.setattr(inspection, "problem_of", problem_of)
    return found


def file_of(folder: Path, table: str) -> Path:
    return next(folder.glob(f"lake/model=own/*/*/{table}/*.parquet"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 8)
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b"x")])
def test_a_lost_or_grown_file_of_vectors_is_noticed_by_questions_about_other_tables(
    folder: Path, harm: Callable[[Path], object]
) -> None:
    assert len(kdb.open(folder).sql("FROM prompts")) == 4  # and the run is remembered as whole
    harm(file_of(folder, "activations"))
    with pytest.raises(DamagedRunError, match=r"activations/part-\d\.parquet: (missing|bytes: )"):
        kdb.open(folder).sql("FROM prompts")


def test_a_flipped_bit_is_an_error_that_names_the_run_and_the_file(folder: Path) -> None:
    path = file_of(folder, "prompts")
    whole, moments = path.read_bytes(), random.Random(0)
    for _ in range(40):
        flip(path, moments.randrange(len(whole)))
        with pytest.raises(
            DamagedRunError, match=r"Run [0-9a-f]{16} \(own on d\) is damaged: .*prompts/part\.parquet: "
        ):
            kdb.open(folder).sql("SELECT count(*) FROM runs")
        path.write_bytes(whole)
    assert len(kdb.open(folder).sql("FROM prompts")) == 4


def lose_part(folder: Path) -> None:
    file_of(folder, "activations").unlink()


def lose_table(folder: Path) -> None:
    shutil.rmtree(file_of(folder, "prompts").parent)


def lose_manifest(folder: Path) -> None:
    next(folder.glob("lake/model=own/*/*/manifest.json")).unlink()


def add_file(folder: Path) -> None:
    path = file_of(folder, "prompts")
    shutil.copyfile(path, path.with_name("part (copy).parquet"))


def shorten(folder: Path) -> None:
    path = file_of(folder, "activations")
    path.write_bytes(path.read_bytes()[:-1])


ASKED: dict[str, Callable[[Path], object]] = {
    "sql": lambda w: kdb.open(w).sql("SELECT count(*) FROM prompts"),
    "query": lambda w: kdb.open(w).query("layer-accuracy"),
    "scan": lambda w: kdb.open(w).scan("prompts", everything=True).collect(),
    "table": lambda w: kdb.open(w).table("probe_scores"),
    "snapshot": lambda w: kdb.open(w).snapshot().__enter__(),
    "engine": lambda w: kdb.open(w).engine().connect(),
    "compact": lambda w: __import__("kdb.warehouse.compaction").warehouse.compaction.compact(
        FolderStorage(w), FolderStorage(w).run_folders()[0].run
    ),
}


@pytest.mark.parametrize("damage", [lose_part, lose_table, lose_manifest, add_file, shorten])
@pytest.mark.parametrize("how", ASKED)
def test_half_a_run_is_an_error_whoever_reads_it(folder: Path, damage: Callable[[Path], None], how: str) -> None:
    damage(folder)
    with pytest.raises(KdbError, match="damaged"):
        ASKED[how](folder)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("setpriv"), reason="needs setpriv")
def test_a_table_that_may_not_be_read_is_an_error(folder: Path) -> None:
    table = file_of(folder, "prompts").parent
    table.chmod(0)
    kdb_command = Path(sys.executable).with_name("kdb")
    command = [str(kdb_command), "sql", "SELECT count(*) FROM prompts", "--warehouse", str(folder)]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *command]
    result = subprocess.run(command, capture_output=True, text=True)
    table.chmod(0o755)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Permission denied" in result.stderr


def test_files_are_hashed_once_and_those_of_vectors_when_they_are_asked_for(folder: Path, hashed: list[str]) -> None:
    kdb.open(folder).sql("FROM prompts")
    assert sorted(hashed) == [
        "datasets/part.parquet",
        "models/part.parquet",
        "probe_scores/part.parquet",
        "prompts/part.parquet",
        "runs/all.parquet",
    ]
    hashed.clear()
    kdb.open(folder).sql("FROM prompts")
    assert hashed == []
    kdb.open(folder).sql("SELECT count(*) FROM current.ACTIVATIONS")
    assert {path for path in hashed if path.startswith("activations/")} == {
        "activations/part-0.parquet",
        "activations/part-1.parquet",
    }
    hashed.clear()
    kdb.open(folder).scan("activations").collect()
    assert hashed == []


def test_what_was_measured_or_verified_here_is_not_hashed_again(
    tmp_path: Path, folder: Path, hashed: list[str], run_kdb: RunKdb
) -> None:
    measure(tmp_path / "new")
    kdb.open(tmp_path / "new").sql("FROM activations")
    assert run_kdb("verify", "--warehouse", folder).exit_code == 0
    kdb.open(folder).sql("FROM activations")
    assert hashed == []


def test_a_file_that_was_touched_is_hashed_again(folder: Path, hashed: list[str]) -> None:
    kdb.open(folder).sql("FROM prompts")
    hashed.clear()
    os.utime(file_of(folder, "prompts"))
    kdb.open(folder).sql("FROM prompts")
    assert "prompts/part.parquet" in hashed


def test_a_damaged_vector_is_an_error_where_vectors_are_asked_for(folder: Path, run_kdb: RunKdb) -> None:
    flip(file_of(folder, "activations"), 100)
    assert len(kdb.open(folder).sql("FROM prompts")) == 4
    for question in ("FROM activations", 'SELECT count(*) FROM main."activations"', "FROM current.activations"):
        with pytest.raises(DamagedRunError, match="activations/part"):
            kdb.open(folder).sql(question)
    result = run_kdb("probe", "--model", "own", "--dataset", "d", "--warehouse", folder)
    assert (result.exit_code, "damaged" in result.stderr) == (2, True)


def test_a_warehouse_brings_no_proof_of_its_own(folder: Path, tmp_path: Path) -> None:
    kdb.open(folder).sql("FROM prompts")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    flip(file_of(copy, "prompts"), 50)
    with pytest.raises(DamagedRunError):
        kdb.open(copy).sql("FROM prompts")


def test_a_memory_that_cannot_be_written_or_read_is_done_without(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert len(kdb.open(folder).sql("FROM prompts")) == 4
    (tmp_path / "cache").unlink()
    kdb.open(folder).sql("FROM prompts")
    for memory in (tmp_path / "cache").rglob("*.json"):
        memory.write_text("[" * 100_000)
    assert len(kdb.open(folder).sql("FROM prompts")) == 4


def test_runs_and_remove_work_beside_a_damaged_run(folder: Path, run_kdb: RunKdb) -> None:
    lose_part(folder)
    [damaged] = FolderStorage(folder).run_folders()
    assert run_kdb("verify", "--warehouse", folder).exit_code == 1
    assert run_kdb("runs", "remove", damaged.run, "--yes", "--warehouse", folder).exit_code == 0
    assert run_kdb("runs", "--warehouse", folder).exit_code == 0
