"""kdb.duckdb reads the folder that it lies in, or is an error: copied, moved, renamed, attached, beside another."""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import pytest
from helpers.stored import add_run, create_lake, needs_shell, shell
from sqlalchemy import create_engine, text

from kdb.queries.catalogue import macros
from kdb.warehouse.shell_file import write_public_file, write_shell_file
from kdb.warehouse.shell_lookup import bound_to
from kdb.warehouse.store import Warehouse

DATASETS = "SELECT DISTINCT dataset FROM {}prompts ORDER BY dataset"
ODD = "odd [a]* {q} ü it's"


def make(folder: Path, dataset: str) -> Path:
    lake = create_lake(folder)
    measure(folder, dataset)
    write_shell_file(folder)
    return lake


def measure(folder: Path, dataset: str) -> None:
    prompts = [{"prompt_id": 0, "text": dataset}]
    add_run(folder / "lake", "m", dataset, dataset[0] * 16, prompts=prompts, probe_scores=[])


def datasets(file: Path | str, **config: str) -> list[str]:
    with duckdb.connect(str(file), read_only=True, config=config) as opened:
        return [row[0] for row in opened.execute(DATASETS.format("")).fetchall()]


def attached(*files: Path, main: Path | str = ":memory:") -> duckdb.DuckDBPyConnection:
    """A session in which the files are attached as k0, k1, …"""
    opened = duckdb.connect(str(main))
    for number, file in enumerate(files):
        quoted = str(file).replace("'", "''")
        opened.execute(f"ATTACH '{quoted}' AS k{number} (READ_ONLY)")
    return opened


def asked(opened: duckdb.DuckDBPyConnection, name: str) -> list[str]:
    return [row[0] for row in opened.execute(DATASETS.format(name)).fetchall()]


def is_refused(opened: duckdb.DuckDBPyConnection, sql: str) -> bool:
    with pytest.raises(duckdb.InvalidInputException, match="cannot tell which warehouse to read"):
        opened.execute(sql).fetchall()
    return True


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse `home`, a copy of it from before `home` had its second run, and one of its own."""
    root = tmp_path_factory.mktemp("places")
    make(root / "home", "one")
    for name in ("copy", "away", ODD):
        shutil.copytree(root / "home", root / name)
    (root / "away").rename(root / "moved")
    measure(root / "home", "two")
    make(root / "other", "third")
    (root / "link").symlink_to(root / "copy")
    return root


@pytest.mark.parametrize("name", ["copy", "moved", ODD, "link"])
def test_a_copy_shows_what_it_holds(places: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets(places / name / "kdb.duckdb") == ["one"]
    monkeypatch.chdir(places)
    assert datasets(f"{name}/kdb.duckdb") == ["one"]
    monkeypatch.chdir(places / name)
    assert datasets("kdb.duckdb") == ["one"]
    assert datasets(places / "home/kdb.duckdb") == ["one", "two"]


@needs_shell
@pytest.mark.parametrize("name", ["copy", "moved", ODD, "link"])
def test_a_copy_shows_what_it_holds_in_the_duckdb_shell(
    places: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    for file in (places / name / "kdb.duckdb", Path(name) / "kdb.duckdb", Path(name) / "../copy/kdb.duckdb"):
        assert shell(file, DATASETS.format("")) == ["one"]
    monkeypatch.chdir(places / name)
    assert shell(Path("kdb.duckdb"), DATASETS.format("")) == ["one"]


def test_a_copy_is_read_through_sqlalchemy_and_after_the_original_is_gone(tmp_path: Path) -> None:
    make(tmp_path / "home", "one")
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    shutil.rmtree(tmp_path / "home")
    with create_engine(f"duckdb:///{tmp_path}/copy/kdb.duckdb").connect() as connection:
        assert connection.execute(text(DATASETS.format(""))).scalars().all() == ["one"]
        assert connection.execute(text("SELECT count(*) FROM current_runs")).scalar() == 3
        assert connection.execute(text("FROM concept_depth()")).all() == []


def test_an_open_shell_sees_a_new_run_of_its_copy(tmp_path: Path) -> None:
    make(tmp_path / "home", "one")
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    with duckdb.connect(str(tmp_path / "copy/kdb.duckdb"), read_only=True) as opened:
        measure(tmp_path / "copy", "new")
        measure(tmp_path / "home", "old")
        assert asked(opened, "") == ["new", "one"]


def test_with_another_temporary_directory_a_copy_is_an_error_and_the_original_is_read(places: Path) -> None:
    for setting in ("/tmp/x", "", str(places / "home/kdb.duckdb.tmp")):
        assert datasets(places / "home/kdb.duckdb", temp_directory=setting) == ["one", "two"]
        with pytest.raises(duckdb.InvalidInputException, match="cannot tell which warehouse"):
            datasets(places / "copy/kdb.duckdb", temp_directory=setting)


def test_a_renamed_file_reads_its_own_folder_or_nothing(places: Path, tmp_path: Path) -> None:
    for name in ("home", "copy"):
        shutil.copytree(places / name, tmp_path / name)
    write_shell_file(tmp_path / "home")
    renamed = shutil.copy(tmp_path / "home/kdb.duckdb", tmp_path / "home/paper.duckdb")
    assert datasets(renamed) == ["one", "two"]
    shutil.copytree(tmp_path / "home/lake", tmp_path / "copy/xlake")
    for name in ("paper.duckdb", "xkdb.duckdb"):
        with pytest.raises(duckdb.InvalidInputException, match="cannot tell"):
            datasets(shutil.copy(places / "copy/kdb.duckdb", tmp_path / "copy" / name))


QUESTIONS = [
    "SELECT count(*) FROM k0.prompts",
    "SELECT count(*) FROM k0.prompts WHERE dataset = 'new'",  # of which the original has no file
    "FROM k0.prompts WHERE model = 'none' LIMIT 1",
    "SELECT max(prompt_id) FROM k0.prompts",
    "SELECT EXISTS (FROM k0.prompts WHERE dataset = 'new')",
    "FROM k0.current_runs",
    "FROM k0.prompts JOIN k0.runs USING (run) WHERE prompts.dataset = 'new'",
    "FROM range(0) JOIN k0.prompts ON true",
    "SELECT count(*) FROM k0.ablations",  # no rows anywhere
]


@pytest.mark.parametrize("sql", QUESTIONS)
def test_an_attached_copy_is_an_error_whatever_is_asked(places: Path, sql: str) -> None:
    with attached(places / "copy/kdb.duckdb") as opened:
        assert is_refused(opened, sql)


def test_an_attached_original_is_read_and_so_is_a_copy_after_a_rebuild(places: Path, tmp_path: Path) -> None:
    with attached(places / "home/kdb.duckdb") as opened:
        assert asked(opened, "k0.") == ["one", "two"]
    with attached(places / "home/kdb.duckdb", main=tmp_path / "mine.duckdb") as opened:
        assert asked(opened, "k0.") == ["one", "two"]
    shutil.copytree(places / "copy", tmp_path / "copy")
    write_shell_file(tmp_path / "copy")
    with attached(tmp_path / "copy/kdb.duckdb") as opened:
        assert asked(opened, "k0.") == ["one"]


def test_two_warehouses_in_one_session_are_told_apart(places: Path) -> None:
    with attached(places / "home/kdb.duckdb", places / "other/kdb.duckdb") as opened:
        assert (asked(opened, "k0."), asked(opened, "k1.")) == (["one", "two"], ["third"])
    with attached(places / "other/kdb.duckdb", main=places / "home/kdb.duckdb") as opened:
        assert asked(opened, "") == ["one", "two"]
        assert is_refused(opened, DATASETS.format("k0."))


def test_a_warehouse_and_its_copy_in_one_session_are_an_error(places: Path) -> None:
    with attached(places / "home/kdb.duckdb", places / "copy/kdb.duckdb") as opened:
        assert is_refused(opened, DATASETS.format("k0."))
        assert is_refused(opened, DATASETS.format("k1."))
    with attached(places / "copy/kdb.duckdb", main=places / "home/kdb.duckdb") as opened:
        assert is_refused(opened, DATASETS.format(""))


def test_a_macro_of_one_warehouse_does_not_read_the_tables_of_another(places: Path) -> None:
    with attached(places / "other/kdb.duckdb", main=places / "home/kdb.duckdb") as opened:
        opened.execute("FROM concept_depth()")
        with pytest.raises(duckdb.CatalogException, match=f"{places}/other/"):
            opened.execute("FROM k0.concept_depth()")
    with attached(places / "home/kdb.duckdb", places / "other/kdb.duckdb") as opened:
        opened.execute("USE k1")
        opened.execute("FROM concept_depth()")
        with pytest.raises(duckdb.CatalogException, match=f"{places}/home/"):
            opened.execute("FROM k0.concept_depth()")


def test_a_macro_of_a_published_file_does_not_read_the_tables_of_another(places: Path, tmp_path: Path) -> None:
    lake = Warehouse.create(tmp_path / "published").storage.local.lake
    write_public_file(tmp_path / "p.duckdb", lake, {"runs": ["https://example.org/w/lake/x.parquet"]}, encoded=True)
    with attached(tmp_path / "p.duckdb", main=places / "home/kdb.duckdb") as opened:
        assert asked(opened, "k0.") == []
        with pytest.raises(duckdb.CatalogException, match=r"https://example.org/w \("):
            opened.execute("FROM k0.concept_depth()")


def test_every_macro_that_reads_tables_is_bound_to_its_file() -> None:
    assert bound_to("x", macros()).count('NULL::"x" IS NULL;') == macros().count(") AS TABLE\n") > 10


def test_the_shell_file_names_columns_and_rows_as_kdb_does(places: Path) -> None:
    with duckdb.connect(str(places / "home/kdb.duckdb"), read_only=True) as opened:
        found = opened.execute("SELECT comment FROM duckdb_views() WHERE view_name = 'prompts'").fetchall()
        assert found == [("prompt",)] * 2, "in schema main, and in current"


def test_kdb_rewrites_the_shell_file_of_a_moved_warehouse_once(tmp_path: Path) -> None:
    Warehouse.create(tmp_path / "home")
    (tmp_path / "home").rename(tmp_path / "moved")
    file = tmp_path / "moved/kdb.duckdb"
    before = file.stat().st_ino
    Warehouse(tmp_path / "moved")
    rewritten = file.stat().st_ino
    Warehouse(tmp_path / "moved")
    assert before != rewritten == file.stat().st_ino
    with attached(file) as opened:
        assert asked(opened, "k0.") == []
