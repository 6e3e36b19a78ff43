"""A warehouse in an object store: the same rows as in a folder, whole runs, and each byte fetched once."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import duckdb
import pytest
from click.testing import Result
from helpers.killing import Writers, kill_writers
from helpers.object_store import CUT, KEY, LOSE, SECRET, ObjectStore, extension, object_store
from helpers.served import served
from helpers.tiny_llama import ASK_OPTIONS
from hypothesis import given, settings
from hypothesis import strategies as st

import kdb
from kdb.errors import WarehouseError
from kdb.warehouse import compaction
from kdb.warehouse.block_cache import BLOCK, BlockFile
from kdb.warehouse.bucket_storage import BucketStorage
from kdb.warehouse.run_copy import copy_into, copy_run
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

URL = "s3://lab/some/where"
KILLS = 6

SUMS = """
SELECT count(*) AS vectors, round(sum(list_sum(vector)), 2) AS total, (SELECT count(*) FROM prompts) AS prompts,
    (SELECT count(*) FROM probe_predictions) AS predictions,
    (SELECT round(sum(accuracy), 6) FROM probe_scores) AS accuracy
FROM activations
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """The server with an empty bucket, and a cache of this test's own."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    use_cache(monkeypatch, tmp_path / "cache")
    yield server
    server.empty()


@pytest.fixture
def filled(store: ObjectStore, measured: Path, run_kdb: Callable[..., Result]) -> ObjectStore:
    """The same, with the run of the measured warehouse in it, and nothing in the cache."""
    assert run_kdb("import", measured, "--warehouse", URL).exit_code == 0
    forget()
    return store


def use_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("kdb.warehouse.bucket_storage.user_cache_path", lambda _: folder)


def forget() -> None:
    """Delete what is mirrored, as on another machine."""
    shutil.rmtree(kdb.open(URL).storage.local.path)


def objects() -> list[str]:
    """The committed and uncommitted files of runs in the bucket."""
    return [found.path for found in kdb.open(URL).storage.bucket.list("lake") if "__none__" not in found.path]


def read(seen: list[str]) -> list[str]:
    """Those of the requests that read files of runs."""
    return [request for request in seen if request.startswith("GET") and "/lake/" in request]


# Reading ---------------------------------------------------------------------------------------------------------


def test_an_ingest_into_a_bucket_stores_what_one_into_a_folder_does(
    store: ObjectStore, measured: Path, tiny_model: Path, user_dataset: Path, run_kdb: Callable[..., Result]
) -> None:
    arguments = ["ingest", "--model", tiny_model, "--dataset", user_dataset, *ASK_OPTIONS, "--warehouse", URL]
    assert run_kdb(*arguments).exit_code == 0
    forget()
    assert kdb.open(URL).sql(SUMS).equals(kdb.open(measured).sql(SUMS))
    assert kdb.open(URL).runs() == kdb.open(measured).runs()
    assert "is stored already" in run_kdb(*arguments).stdout
    assert run_kdb("verify", "--warehouse", URL).exit_code == 0


def test_a_question_asked_twice_reads_the_network_once(filled: ObjectStore) -> None:
    with filled.counted() as first:
        answer = kdb.open(URL).query("concept-depth")
    with filled.counted() as second:
        again = kdb.open(URL).query("concept-depth")
    assert again.equals(answer)
    assert read(first)
    assert read(second) == []
    assert len(second) == 2  # is it a warehouse, and which runs are there


def test_only_files_that_a_question_needs_are_read(filled: ObjectStore) -> None:
    with filled.counted() as seen:
        kdb.open(URL).sql("SELECT count(*) FROM prompts")
    assert ["/prompts/" in request for request in read(seen)] == [True]
    with filled.counted() as seen:
        kdb.open(URL).sql("SELECT avg(accuracy) FROM probe_scores WHERE model = 'another'")
    assert read(seen) == []


def test_vectors_are_read_by_blocks_and_kept(filled: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdb.warehouse.block_cache.BLOCK", 4096)
    question = "SELECT sum(list_sum(vector)) FROM activations WHERE layer = 1 AND site = 'ffn_norm'"
    expected = kdb.open(URL).sql(question)
    with filled.counted() as again:
        assert kdb.open(URL).sql(question).equals(expected)
    assert read(again) == []
    assert not any((kdb.open(URL).storage.local.lake / "model=tiny").rglob("activations/*.parquet"))  # not whole


def test_frames_engines_shells_and_servers_read_it_too(filled: ObjectStore, measured: Path) -> None:
    local, remote = kdb.open(measured), kdb.open(URL)
    columns = ["prompt_id", "layer", "site"]
    assert remote.scan("activations").sort(columns).collect().equals(local.scan("activations").sort(columns).collect())
    with remote.engine().connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM prompts").scalar() == 40
    with remote.snapshot() as frozen:
        assert frozen.sql(SUMS).equals(local.sql(SUMS))


def test_it_is_served_as_a_folder_is(filled: ObjectStore, measured: Path, tmp_path: Path) -> None:
    environment = {**filled.environment, "XDG_CACHE_HOME": str(tmp_path)}
    with served("--warehouse", URL, **environment) as running, running.client() as client:
        rows = client.get("/api/queries/concept-depth?format=json").raise_for_status().json()
        assert [row["site"] for row in rows] == kdb.open(measured).query("concept-depth")["site"].to_list()
        vectors = client.get("/api/tables/activations?filter=layer=1&limit=1&format=json").raise_for_status().json()
        assert len(vectors[0]["vector"]) == 16


def test_the_shells_file_reads_the_bucket_itself(
    filled: ObjectStore, measured: Path, run_kdb: Callable[..., Result]
) -> None:
    httpfs = extension("httpfs")
    if httpfs is None:
        pytest.skip(f"duckdb-extension-httpfs is not installed for DuckDB {duckdb.__version__}")
    path = run_kdb("rebuild", "--warehouse", URL).stdout.removeprefix("Wrote ").strip().removesuffix(".")
    with duckdb.connect(path, read_only=True) as shell:
        shell.execute(f"LOAD '{httpfs}'")
        host = filled.endpoint.removeprefix("http://")
        shell.execute(
            f"CREATE SECRET (TYPE s3, KEY_ID '{KEY}', SECRET '{SECRET}', ENDPOINT '{host}', USE_SSL false, "
            "URL_STYLE 'path')"
        )
        assert shell.execute("SELECT count(*) FROM activations").fetchall() == [(160,)]
        depths = "SELECT site, converging_layer FROM concept_depth() ORDER BY ALL"
        assert shell.execute(depths).fetchall() == kdb.open(measured).sql(depths).rows()


def test_derived_runs_and_exports_start_from_a_bucket(
    filled: ObjectStore, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    assert run_kdb("project", "--model", "tiny", "--dataset", "weather", "--warehouse", URL).exit_code == 0
    assert kdb.open(URL).sql("SELECT count(*) FROM projections").item() == 160
    forget()
    assert run_kdb("export", tmp_path / "out", "--warehouse", URL).exit_code == 0
    assert kdb.open(tmp_path / "out").sql(SUMS).equals(kdb.open(URL).sql(SUMS))
    assert run_kdb("verify", "--warehouse", tmp_path / "out").exit_code == 0


def test_a_run_that_is_removed_and_measured_again_is_read_anew(
    filled: ObjectStore, measured: Path, run_kdb: Callable[..., Result]
) -> None:
    [run] = kdb.open(URL).runs()
    before = kdb.open(URL).sql(SUMS)
    reader = kdb.open(URL)
    assert run_kdb("runs", "remove", run, "--yes", "--warehouse", URL).exit_code == 0
    assert objects() == []
    assert reader.sql("SELECT count(*) FROM prompts").item() == 0
    assert run_kdb("import", measured, "--warehouse", URL).exit_code == 0
    assert reader.sql(SUMS).equals(before)
    assert reader.storage.find(run).path.is_dir()
    assert run_kdb("verify", "--warehouse", URL).exit_code == 0


def test_a_damaged_object_is_named_and_never_kept(filled: ObjectStore, run_kdb: Callable[..., Result]) -> None:
    lake = kdb.open(URL).storage
    path = next(path for path in objects() if "/prompts/" in path)
    content = bytearray(lake.bucket.get(path))
    content[len(content) // 2] ^= 1
    damaged = lake.local.path / "damaged"
    damaged.write_bytes(content)
    lake.bucket.upload(path, damaged)
    found = run_kdb("verify", "--warehouse", URL)
    assert (found.exit_code, found.stdout.count("sha256")) == (1, 1)
    for _ in range(2):
        asked = run_kdb("sql", "SELECT count(text) FROM prompts", "--warehouse", URL)
        assert asked.exit_code == 2
        assert "is damaged" in asked.stderr
    lake.bucket.delete([path])
    assert "missing" in run_kdb("verify", "--warehouse", URL).stdout


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3_500_000), st.integers(0, 2_000_000)), max_size=6), st.integers(0, 3_500_000))
def test_a_file_read_by_blocks_is_the_file(tmp_path_factory: Any, reads: list[tuple[int, int]], size: int) -> None:
    content = random.Random(size).randbytes(size)
    fetched: list[range] = []

    def fetch(start: int, end: int) -> bytes:
        fetched.append(range(start // BLOCK, -(-end // BLOCK)))
        return content[start:end]

    folder = tmp_path_factory.mktemp("blocks")
    for start, count in reads:
        file = BlockFile(size, fetch, folder)
        file.seek(start)
        assert file.read(count) == content[start : start + count]
    blocks = [number for span in fetched for number in span]
    assert len(blocks) == len(set(blocks))  # none is fetched twice


def test_runs_are_compacted_and_lose_their_vectors(
    store: ObjectStore,
    tiny_model: Path,
    user_dataset: Path,
    run_kdb: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdb.ingest.concept.study.prompts_per_part", lambda *_: 10)
    assert run_kdb("ingest", "--model", tiny_model, "--dataset", user_dataset, "--warehouse", URL).exit_code == 0
    reader, before = kdb.open(URL), kdb.open(URL).sql(SUMS)
    assert run_kdb("compact", "--warehouse", URL).stdout == "Reduced the number of files by 3 in 1 run.\n"
    assert reader.sql(SUMS).equals(before)
    assert len(reader.files("activations")) == 1
    assert run_kdb("runs", "keep-vectors", "none", "--yes", "--warehouse", URL).exit_code == 0
    assert reader.sql("SELECT count(*) FROM activations").item() == 0
    assert reader.sql("SELECT count(*) FROM probe_scores").item() > 0
    [commit] = kdb.open(URL).storage.commits.refresh().values()
    assert sorted(commit.paths()) == objects()  # nothing is left of what was
    assert run_kdb("verify", "--warehouse", URL).exit_code == 0


def test_a_server_goes_on_where_a_run_is_compacted(
    store: ObjectStore,
    tiny_model: Path,
    user_dataset: Path,
    run_kdb: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdb.ingest.concept.study.prompts_per_part", lambda *_: 10)
    assert run_kdb("ingest", "--model", tiny_model, "--dataset", user_dataset, "--warehouse", URL).exit_code == 0
    environment = {**store.environment, "XDG_CACHE_HOME": str(tmp_path)}
    with served("--warehouse", URL, "--workers", "1", **environment) as running, running.client() as client:
        client.get("/api/queries/runs?format=json").raise_for_status()  # now it knows the run's files
        assert run_kdb("compact", "--warehouse", URL).stdout == "Reduced the number of files by 3 in 1 run.\n"
        vectors = client.get("/api/tables/activations?format=csv").raise_for_status()
        assert len(vectors.text.splitlines()) == 1 + kdb.open(URL).sql("SELECT count(*) FROM activations").item()


def test_of_two_who_replace_a_run_one_is_told(
    filled: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = kdb.open(URL).storage
    use_cache(monkeypatch, tmp_path / "of-another-machine")
    other = kdb.open(URL).storage
    [folder] = other.run_folders()
    with compaction.rewriting(other, folder) as files:
        assert compaction.keep_vectors(one, one.find(folder.run), "none")
        files.write({"activations": None})
        with pytest.raises(WarehouseError, match="changed by another process"):
            files.commit()
    assert list(kdb.open(URL).storage.verify()) == []
    assert sorted(next(iter(kdb.open(URL).storage.commits.refresh().values())).paths()) == objects()


# Writing ---------------------------------------------------------------------------------------------------------


def test_two_writers_of_one_run_leave_one_whole_run(
    store: ObjectStore, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lakes = []
    for name in ("one", "two", "three"):
        use_cache(monkeypatch, tmp_path / name)
        lakes.append(BucketStorage.create(URL))
    assert len({lake.local.path for lake in lakes}) == 3
    [folder] = kdb.open(measured).storage.run_folders()
    together, outcomes = threading.Barrier(3), []

    def write(lake: BucketStorage) -> None:
        with lake.stage(folder.run, folder.model, folder.dataset) as staged:
            together.wait()  # each has seen that there is no such run
            copy_into(staged, folder, lambda _copy, _manifest: {})
            outcomes.append(staged.committed)

    threads = [threading.Thread(target=write, args=(lake,)) for lake in lakes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 3
    opened = kdb.open(URL)
    [commit] = opened.storage.commits.refresh().values()
    assert sorted(commit.paths()) == objects()  # the losers took theirs back
    assert opened.sql(SUMS).equals(kdb.open(measured).sql(SUMS))
    assert list(opened.storage.verify()) == []


def test_two_writers_of_two_runs_both_find_theirs(
    store: ObjectStore,
    warehouse: Path,
    tmp_path: Path,
    run_kdb: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--model", "tiny", "--dataset", "weather", "--warehouse", warehouse]
    assert run_kdb("probe", *arguments, "--splits", "2").exit_code == 0
    folders, lakes = kdb.open(warehouse).storage.run_folders(), []
    for folder in folders:
        use_cache(monkeypatch, tmp_path / folder.run)
        lakes.append(BucketStorage.create(URL))
    threads = [
        threading.Thread(target=copy_run, args=(lake, folder)) for lake, folder in zip(lakes, folders, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kdb.open(URL).query("runs").sort("run").equals(kdb.open(warehouse).query("runs").sort("run"))
    assert list(kdb.open(URL).storage.verify()) == []


def test_a_connection_cut_before_the_commit_leaves_nothing_visible_and_goes_on(
    store: ObjectStore, measured: Path, run_kdb: Callable[..., Result]
) -> None:
    Warehouse.create(URL)
    with store.failing(lambda method, path: CUT if method == "PUT" and "/commits/" in path else None):
        result = run_kdb("import", measured, "--warehouse", URL)
    assert result.exit_code == 2
    assert "connection was lost" in result.stderr
    assert kdb.open(URL).runs() == []
    uploaded = objects()
    assert uploaded
    assert run_kdb("import", measured, "--warehouse", URL).exit_code == 0
    assert objects() == uploaded  # the same objects, now committed
    assert kdb.open(URL).sql(SUMS).equals(kdb.open(measured).sql(SUMS))


def test_a_commit_whose_answer_is_lost_is_a_commit(
    store: ObjectStore, measured: Path, run_kdb: Callable[..., Result]
) -> None:
    Warehouse.create(URL)
    lost: list[str] = []

    def lose_the_first(method: str, path: str) -> bytes | None:
        if method != "PUT" or "/commits/" not in path or lost:
            return None
        lost.append(path)
        return LOSE

    with store.failing(lose_the_first):  # the same request, sent again, finds an object there
        assert run_kdb("import", measured, "--warehouse", URL).exit_code == 0
    assert lost
    assert kdb.open(URL).sql(SUMS).equals(kdb.open(measured).sql(SUMS))


def test_a_writer_that_is_killed_leaves_whole_runs_or_none(
    store: ObjectStore, processes: ForkServerContext, tmp_path: Path, tiny_model: Path, user_dataset: Path
) -> None:
    location = f"{URL}/{{}}".format
    tally = kill_writers(Writers(processes, tiny_model, user_dataset, location, tmp_path, store.environment), KILLS)
    assert tally.sound, tally.troubles
    assert tally.reads > 0


# What goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://no-such-bucket/x", "there is no such bucket"),
        ("s3://lab/empty", "There is no warehouse at 's3://lab/empty'"),
        ("s3://", "not a location of a warehouse"),
        ("ftp://lab/x", "not a location of a warehouse"),
        (f"s3://{KEY}:{SECRET}@lab/x", "contains credentials"),
    ],
)
def test_a_location_that_is_none_is_one_message(
    store: ObjectStore, run_kdb: Callable[..., Result], url: str, said: str
) -> None:
    result = run_kdb("query", "concept-depth", "--warehouse", url)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert SECRET not in result.output


def test_a_bucket_that_does_not_exist_is_said_before_anything_is_measured(
    store: ObjectStore, tiny_model: Path, user_dataset: Path, run_kdb: Callable[..., Result]
) -> None:
    arguments = ["ingest", "--model", tiny_model, "--dataset", user_dataset, "--warehouse", "s3://no-such-bucket/x"]
    result = run_kdb(*arguments)
    assert result.exit_code == 2
    assert "there is no such bucket" in result.stderr


def test_a_refusal_does_not_tell_the_key(filled: ObjectStore, run_kdb: Callable[..., Result]) -> None:
    body = f"<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>{KEY}</AWSAccessKeyId></Error>".encode()
    with filled.failing(lambda *_: body):
        result = run_kdb("query", "concept-depth", "--warehouse", URL)
    assert result.exit_code == 2
    assert "permission denied (403 SignatureDoesNotMatch)" in result.stderr
    assert KEY not in result.output


def test_no_credentials_are_kept(filled: ObjectStore, tmp_path: Path, run_kdb: Callable[..., Result]) -> None:
    assert run_kdb("query", "concept-depth", "--warehouse", URL).exit_code == 0
    assert run_kdb("rebuild", "--warehouse", URL).exit_code == 0
    lake = kdb.open(URL).storage
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    stored = [lake.bucket.get(found.path) or b"" for found in lake.bucket.list("")]
    assert len(kept) > 20
    assert len(stored) > 10
    assert not any(word.encode() in content for content in kept + stored for word in (KEY, SECRET))


def test_a_store_that_cannot_be_reached_is_one_message(
    store: ObjectStore, run_kdb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    result = run_kdb("query", "concept-depth", "--warehouse", URL)
    assert result.exit_code == 2
    assert "cannot be reached" in result.stderr


def test_a_newer_schema_is_refused(store: ObjectStore) -> None:
    bucket = BucketStorage.create(URL).bucket
    bucket.delete(["warehouse.json"])
    bucket.put_new("warehouse.json", b'{"schema_version": 99}')
    with pytest.raises(WarehouseError, match="newer kdb"):
        kdb.open(URL)
