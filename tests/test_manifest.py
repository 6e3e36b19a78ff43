"""Manifests, names of folders and imported runs are input: what is not as it should be is refused in words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from helpers.measured import measure
from hypothesis import given
from hypothesis import strategies as st

import kdb
from kdb.errors import WarehouseError
from kdb.warehouse.checksums import file_record
from kdb.warehouse.compaction import compact, keep_vectors, rewriting
from kdb.warehouse.files import write_json
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.imports import Origin, import_run, prefer
from kdb.warehouse.manifest import FORMULA, MANIFEST, FileRecord, Manifest, RunFolder, parse_manifest, run_id
from kdb.warehouse.run_copy import copy_run
from kdb.warehouse.schema import PARTITIONS, SCHEMA_VERSION, TABLES
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

RunKdb = Callable[..., Result]
RUN = "0123456789abcdef"
RECORD = {"path": "runs/all.parquet", "rows": 1, "bytes": 10, "sha256": "0" * 64}


def renew(folder: RunFolder, **changed: Any) -> None:
    """Write a manifest that names what lies there now: only what it says is wrong, not its checksums."""
    old = json.loads((folder.path / MANIFEST).read_text())
    records = tuple(file_record(path, folder.path) for path in sorted(folder.path.rglob("*.parquet")))
    manifest = Manifest(records, old["schema_version"], old["formula"], old["identity"])
    write_json(folder.path / MANIFEST, {**manifest.content(), **changed})


def replace_column(folder: RunFolder, table: str, column: str, make: Callable[[pa.Table], Any]) -> None:
    path = sorted((folder.path / table).glob("*.parquet"))[0]
    rows = pq.ParquetFile(path).read()
    metadata = pq.read_schema(path).metadata
    place = rows.schema.get_field_index(column)
    changed = rows.set_column(place, column, make(rows)).replace_schema_metadata(metadata)
    pq.write_table(changed, path)


# Manifests -------------------------------------------------------------------------------------------------------


def content(**changed: Any) -> bytes:
    return json.dumps({"schema_version": SCHEMA_VERSION, "files": [RECORD], **changed}).encode()


def record(**changed: Any) -> bytes:
    return content(files=[RECORD, {**RECORD, "path": "prompts/part.parquet", **changed}])


@pytest.mark.parametrize(
    "hostile",
    [
        *(b"", b"[]", b"7", b"{", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 100_000, b'{"schema_version": NaN}'),
        *(content(files=files) for files in (None, 7, "x", [], {}, [7], [None], [{}], [{**RECORD, "mode": 7}])),
        *(content(schema_version=version) for version in (None, "4", 4.0, True, -1, 2, 99, 10**30)),
        *(
            record(path=path)
            for path in ("../../.bashrc", "/etc/passwd", "prompts/../../x.parquet", "prompts", 7, None)
        ),
        *(
            record(path=path)
            for path in ("prompts/a/b.parquet", "nothing/a.parquet", "prompts/.parquet", "prompts/a\0b.parquet")
        ),
        *(
            record(path=path)
            for path in ("prompts/a\nb.parquet", "prompts\\a.parquet", "prompts/" + "a" * 300 + ".parquet")
        ),
        *(record(rows=rows) for rows in (-1, "1", None, 1.5, True, 10**30)),
        *(record(bytes=size) for size in (-1, "1", None)),
        *(record(sha256=text) for text in ("", "0" * 63, "g" * 64, 7, None)),
        content(files=[RECORD, RECORD]),
        content(files=[{**RECORD, "path": "prompts/all.parquet"}]),
        *(content(formula=formula) for formula in (0, 3, "2", [])),
        *(content(formula=FORMULA, identity=identity) for identity in (None, 7, [], {"model": "another"})),
    ],
)
def test_a_manifest_that_is_none_is_refused_in_words(hostile: bytes) -> None:
    with pytest.raises(WarehouseError, match="the manifest"):
        parse_manifest(hostile, RUN, "the manifest")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda c: (
            st.lists(c)
            | st.dictionaries(
                st.sampled_from(["schema_version", "files", "path", "rows", "bytes", "sha256", "formula", "identity"]),
                c,
            )
        ),
    )
)
def test_no_json_is_more_than_a_manifest_or_a_message(value: Any) -> None:
    try:
        manifest = parse_manifest(json.dumps(value).encode(), RUN, "the manifest")
    except WarehouseError as error:
        assert str(error).startswith("the manifest")
    else:
        assert [file.table for file in manifest.files].count("runs") == 1


def test_a_manifest_is_read_as_it_was_written() -> None:
    identity = {"model": "m", "seed": 1}
    manifest = Manifest((FileRecord(**RECORD),), formula=FORMULA, identity=identity)  # type: ignore[arg-type]
    assert parse_manifest(json.dumps(manifest.content()).encode(), run_id(identity), "it") == manifest


# A warehouse from somebody else ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["compact"], ["runs", "keep-vectors", "none", "--yes"], ["runs"], ["sql", "FROM prompts"]]
)
def test_a_manifest_that_leads_out_of_its_run_moves_nothing(
    tmp_path: Path, run_kdb: RunKdb, command: list[str]
) -> None:
    folder = measure(tmp_path / "home/w")
    victim = tmp_path / "home/.bashrc"
    victim.write_text("mine")
    manifest = json.loads((folder.path / MANIFEST).read_text())
    manifest["files"].append({**RECORD, "path": "../../../../../.bashrc"})
    (folder.path / MANIFEST).write_text(json.dumps(manifest))
    result = run_kdb(*command, "--warehouse", tmp_path / "home/w")
    assert result.exit_code == 2
    assert "which is not TABLE/NAME.parquet" in result.stderr
    assert victim.read_text() == "mine"


def link_file(folder: RunFolder, outside: Path) -> None:
    file = next(folder.path.glob("prompts/*.parquet"))
    file.rename(outside)
    file.symlink_to(outside)


def link_table(folder: RunFolder, outside: Path) -> None:
    (folder.path / "prompts").rename(outside)
    (folder.path / "prompts").symlink_to(outside)


def link_run(folder: RunFolder, outside: Path) -> None:
    folder.path.rename(outside)
    folder.path.symlink_to(outside)


def link_manifest(folder: RunFolder, outside: Path) -> None:
    (folder.path / MANIFEST).rename(outside)
    (folder.path / MANIFEST).symlink_to(outside)


def pipe(folder: RunFolder, _outside: Path) -> None:
    file = next(folder.path.glob("prompts/*.parquet"))
    file.unlink()
    os.mkfifo(file)


def link_lake(folder: RunFolder, outside: Path) -> None:
    lake = folder.path.parents[2]
    lake.rename(outside)
    lake.symlink_to(outside)


@pytest.mark.parametrize("change", [link_file, link_table, link_run, link_manifest, link_lake, pipe])
@pytest.mark.parametrize("command", ["sql", "import", "compact", "verify"])
def test_links_and_pipes_in_a_warehouse_are_not_followed(
    tmp_path: Path, run_kdb: RunKdb, change: Callable[[RunFolder, Path], None], command: str
) -> None:
    folder = measure(tmp_path / "w")
    change(folder, tmp_path / "outside")
    arguments = {"sql": ["FROM prompts"], "import": [tmp_path / "w"]}.get(command, [])
    where = tmp_path / ("new" if command == "import" else "w")
    result = run_kdb(command, *arguments, "--warehouse", where)
    assert result.exit_code in (1, 2), result.output  # 1: verify names the damage
    assert not list((tmp_path / "new").glob("lake/model=own/*/*"))


@pytest.mark.parametrize(
    "path",
    [
        *("model=own%2f/dataset=d/run=0123456789abcdef", "model=OWN%20/dataset=%64/run=0123456789abcdef"),
        *("model=[x]/dataset=d/run=0123456789abcdef", "model=a/dataset=d/run=0123456789ABCDEF"),
        *("model=a/dataset=d/run=..", "model=a/dataset=d/run=0", "model=all/dataset=d/run=0123456789abcdef"),
        *("model=/dataset=d/run=0123456789abcdef", "model=%20/dataset=d/run=0123456789abcdef"),
        *("model=a/dataset=__HIVE_DEFAULT_PARTITION__/run=0123456789abcdef", f"model={'a' * 240}/dataset=d/run={RUN}"),
    ],
)
def test_a_folder_that_kdb_would_not_have_written_is_named(tmp_path: Path, path: str) -> None:
    lake = FolderStorage.create(tmp_path / "w")
    (lake.local.lake / path).mkdir(parents=True)
    (lake.local.lake / path / MANIFEST).write_bytes(content())
    with pytest.raises(WarehouseError, match="was not written by kdb"):
        lake.run_folders()


def test_a_run_that_stands_twice_is_named(tmp_path: Path, run_kdb: RunKdb) -> None:
    folder = measure(tmp_path / "w")
    other = tmp_path / "w/lake/model=aaa/dataset=d" / folder.path.name
    other.parent.mkdir(parents=True)
    other.mkdir()
    for path in folder.path.rglob("*"):
        if path.is_file():
            target = other / path.relative_to(folder.path)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    result = run_kdb("runs", "remove", folder.run, "--yes", "--warehouse", tmp_path / "w")
    assert result.exit_code == 2
    assert f"run {folder.run} is also at" in result.stderr
    assert folder.path.is_dir()


# Imports ---------------------------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[RunFolder], None]] = {
    "no identity": lambda f: renew(f, formula=None, identity=None),
    "identity of another run": lambda f: renew(f, identity={"model": "own", "dataset": "d"}),
    "a column is missing": lambda f: drop_column(f, "probe_scores", "accuracy"),
    "text in a number": lambda f: changed(f, "probe_scores", "layer", lambda t: pa.array(["x"] * len(t))),
    "vectors are structs": lambda f: changed(f, "activations", "vector", lambda t: pa.array([{"a": 1}] * len(t))),
    "settings are no JSON": lambda f: changed(f, "runs", "settings", lambda _: pa.array(["{{{"])),
    "settings are nested": lambda f: changed(f, "runs", "settings", lambda _: pa.array(["[" * 100_000])),
    "settings are NULL": lambda f: changed(f, "runs", "settings", lambda _: pa.array([None], pa.string())),
    "no such study": lambda f: changed(f, "runs", "study", lambda _: pa.array(["psychology"])),
    "never ended": lambda f: changed(
        f, "runs", "finished_at", lambda t: pa.nulls(1, t.schema.field("finished_at").type)
    ),
    "other tables": lambda f: changed(
        f, "runs", "tables", lambda t: pa.array([["runs"]], t.schema.field("tables").type)
    ),
    "rows of another model": lambda f: changed(f, "prompts", "model", lambda t: pa.array(["other"] * len(t))),
    "rows of no model": lambda f: changed(f, "prompts", "model", lambda t: pa.array([None, *["own"] * (len(t) - 1)])),
    "a model without layers": lambda f: changed(f, "models", "n_layers", lambda _: pa.array([0], pa.int16())),
    "a layer that the model lacks": lambda f: changed(f, "probe_scores", "layer", lambda t: int16([0, 2])),
    "no layer": lambda f: changed(f, "probe_scores", "layer", lambda t: int16([-1, 0])),
    "a row twice": lambda f: changed(f, "probe_scores", "layer", lambda t: int16([1, 1])),
    "two models": lambda f: twice(f, "models"),
    "no dataset": lambda f: (shutil.rmtree(f.path / "datasets"), renew(f)),
    "vectors of several lengths": lambda f: changed(f, "activations", "vector", lambda t: lengths(len(t))),
    "a vector with a hole": lambda f: changed(
        f, "activations", "vector", lambda t: pa.array([[1.0, None, 2.0, 3.0]] * len(t), pa.list_(pa.float32(), 4))
    ),
    "a time beyond the calendar": lambda f: changed(
        f, "runs", "finished_at", lambda t: pa.array([2**62]).cast(t.schema.field("finished_at").type)
    ),
    "an identity that is nested": lambda f: renew(f, identity=json.loads("[" * 900 + "]" * 900)),
    "rows of another run": lambda f: changed(f, "activations", "run", lambda t: pa.array([RUN] * len(t))),
    "no Parquet": lambda f: next(f.path.glob("prompts/*")).write_bytes(b"PAR1"),
}


def changed(folder: RunFolder, table: str, column: str, make: Callable[[pa.Table], Any]) -> None:
    replace_column(folder, table, column, make)
    renew(folder)


def int16(numbers: list[int]) -> pa.Array:
    return pa.array(numbers, pa.int16())


def lengths(n: int) -> pa.Array:
    return pa.array([[1.0] * (1 + i % 2) for i in range(n)], pa.list_(pa.float32()))


def twice(folder: RunFolder, table: str) -> None:
    path = next((folder.path / table).glob("*.parquet"))
    rows = pq.ParquetFile(path).read()
    pq.write_table(pa.concat_tables([rows, rows]), path)
    renew(folder)


def drop_column(folder: RunFolder, table: str, column: str) -> None:
    path = next((folder.path / table).glob("*.parquet"))
    metadata = pq.read_schema(path).metadata
    pq.write_table(pq.ParquetFile(path).read().drop_columns([column]).replace_schema_metadata(metadata), path)
    renew(folder)


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_is_not_what_it_says_is_not_imported(tmp_path: Path, run_kdb: RunKdb, change: str) -> None:
    measure(tmp_path / "own", model="mine")
    CHANGES[change](measure(tmp_path / "theirs"))
    result = run_kdb("import", tmp_path / "theirs", "--warehouse", tmp_path / "own")
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    opened = kdb.open(tmp_path / "own")
    assert [folder.model for folder in opened.storage.run_folders()] == ["mine"]
    assert len(opened.query("layer-accuracy")) == 2
    assert not list((tmp_path / "own/staging").rglob("*.parquet"))


def shown(warehouse: Path) -> set[float]:
    return set(kdb.open(warehouse).sql("SELECT accuracy FROM current.probe_scores")["accuracy"])


def test_an_imported_run_never_takes_the_place_of_one_measured_here(tmp_path: Path, run_kdb: RunKdb) -> None:
    measure(tmp_path / "own")
    theirs = measure(tmp_path / "theirs", accuracy=0.123, seed=2)
    moment = datetime(2999, 1, 1, tzinfo=UTC)
    changed(theirs, "runs", "finished_at", lambda t: pa.array([moment], t.schema.field("finished_at").type))
    assert run_kdb("import", tmp_path / "theirs", "--warehouse", tmp_path / "own").exit_code == 0
    assert shown(tmp_path / "own") == {0.5}
    told = (
        kdb.open(tmp_path / "own").sql("SELECT imported_from, preferred FROM runs WHERE run = ?", [theirs.run]).rows()
    )
    assert told == [(str(tmp_path / "theirs"), False)]


def test_an_imported_run_that_is_preferred_is_shown(tmp_path: Path, run_kdb: RunKdb) -> None:
    measure(tmp_path / "own")
    measure(tmp_path / "theirs", accuracy=0.123, seed=2)
    arguments = ["import", tmp_path / "theirs", "--prefer-imported", "--warehouse", tmp_path / "own"]
    assert run_kdb(*arguments).exit_code == 0
    assert shown(tmp_path / "own") == {0.123}


def test_the_preference_of_a_run_that_was_imported_before_can_be_changed(tmp_path: Path, run_kdb: RunKdb) -> None:
    own = measure(tmp_path / "own")
    measure(tmp_path / "theirs", accuracy=0.123, seed=2)
    arguments = ["import", tmp_path / "theirs", "--warehouse", tmp_path / "own"]
    assert run_kdb(*arguments).exit_code == 0
    assert "is stored already, and now takes precedence" in run_kdb(*arguments, "--prefer-imported").stdout
    assert shown(tmp_path / "own") == {0.123}
    assert run_kdb(*arguments).stdout.strip().endswith(")"), "without the option, nothing changes"
    assert shown(tmp_path / "own") == {0.123}
    assert "and no longer takes precedence" in run_kdb(*arguments, "--no-prefer-imported").stdout
    assert shown(tmp_path / "own") == {0.5}
    assert not prefer(FolderStorage(tmp_path / "own"), own, True), "a run measured here has no such choice"
    assert run_kdb("verify", "--warehouse", tmp_path / "own").exit_code == 0


@pytest.mark.parametrize("seconds", [None, b"abc", b"nan", b"-1e999"])
def test_files_that_do_not_say_how_long_they_took_are_read(
    tmp_path: Path, run_kdb: RunKdb, seconds: bytes | None
) -> None:
    theirs = measure(tmp_path / "theirs")
    for path in theirs.path.rglob("*.parquet"):
        metadata = None if seconds is None else {b"kdb_seconds": seconds}
        pq.write_table(pq.ParquetFile(path).read().replace_schema_metadata(metadata), path)
    renew(theirs)
    for command in (["import", tmp_path / "theirs"], ["compact"], ["verify"]):
        assert run_kdb(*command, "--warehouse", tmp_path / "own").exit_code == 0


@pytest.mark.parametrize("first", [True, False])
def test_compacting_files_of_unlike_row_groups_loses_nothing(tmp_path: Path, run_kdb: RunKdb, first: bool) -> None:
    theirs = measure(tmp_path / "theirs")
    path = sorted((theirs.path / "activations").glob("*.parquet"))[0 if first else 1]
    pq.write_table(pq.ParquetFile(path).read(), path, row_group_size=1)
    renew(theirs)
    assert run_kdb("import", tmp_path / "theirs", "--warehouse", tmp_path / "own").exit_code == 0
    result = run_kdb("compact", "--warehouse", tmp_path / "own")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "row groups, expected the same number in each. The run was not changed" in result.stderr
    assert kdb.open(tmp_path / "own").sql("SELECT count(*) FROM activations").item() == 8
    assert run_kdb("verify", "--warehouse", tmp_path / "own").exit_code == 0


def test_rewriting_refuses_to_lose_rows(tmp_path: Path) -> None:
    folder = measure(tmp_path / "w")
    lake = FolderStorage(tmp_path / "w")
    with rewriting(lake, folder) as files, pytest.raises(WarehouseError, match="has 4 rows, but 3 were written"):
        files.write({"prompts": [pq.ParquetFile(files.paths["prompts"][0]).read().slice(1)]})
    assert list(lake.verify()) == []


def test_what_a_killed_import_has_copied_is_never_taken_for_measured_here(tmp_path: Path) -> None:
    theirs = measure(tmp_path / "theirs", accuracy=0.123)
    lake = FolderStorage(Warehouse.create(tmp_path / "own").storage.local.path)

    def killed(*_: object) -> NoReturn:
        os._exit(9)

    if (child := os.fork()) == 0:
        copy_run(lake, theirs, killed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with lake.stage(theirs.run, "own", "d") as staged:
        assert not any(staged.parts(table) for table in TABLES)
    assert [left.path.name.partition("-")[0] for left in lake.local.staging.leftovers()] == ["copied"]
    kdb.open(tmp_path / "own")
    assert lake.local.staging.leftovers() == []


def test_what_is_stored_was_checked_though_the_source_changes_meanwhile(tmp_path: Path) -> None:
    theirs = measure(tmp_path / "theirs")
    lake, source = Warehouse.create(tmp_path / "own").storage, FolderStorage(tmp_path / "theirs")

    def swap(copy: RunFolder, manifest: Manifest) -> dict[str, pa.Table]:
        changed(theirs, "probe_scores", "accuracy", lambda t: pa.array([0.99] * len(t)))
        return {}

    assert copy_run(lake, source.find(theirs.run), swap)
    assert shown(tmp_path / "own") == {0.5}


def test_a_run_that_is_stored_under_its_id_is_left_alone(tmp_path: Path) -> None:
    own, theirs = measure(tmp_path / "own"), measure(tmp_path / "theirs", accuracy=0.123)
    assert own.run == theirs.run
    lake, source = FolderStorage(tmp_path / "own"), FolderStorage(tmp_path / "theirs")
    assert not import_run(lake, source.find(theirs.run), Origin("theirs", preferred=True))
    assert shown(tmp_path / "own") == {0.5}


def test_what_is_written_anew_keeps_its_identity(tmp_path: Path) -> None:
    folder = measure(tmp_path / "w")
    lake, before = FolderStorage(tmp_path / "w"), FolderStorage(tmp_path / "w").manifest(folder)
    assert compact(lake, folder.run) == 1
    assert keep_vectors(lake, lake.find(folder.run), "none")
    after = lake.manifest(lake.find(folder.run))
    assert (after.formula, after.identity) == (FORMULA, before.identity)
    assert set(PARTITIONS) <= set(pq.read_schema(next(folder.path.glob("runs/*.parquet"))).names)
