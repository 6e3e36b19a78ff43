from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from helpers.stored import NOON, add_run, create_lake, needs_shell, shell, write_part
from sqlalchemy import inspect, text

from kdb.errors import QueryError, WarehouseError
from kdb.warehouse.connection import connect
from kdb.warehouse.database import Database, engine
from kdb.warehouse.scan import scan
from kdb.warehouse.schema import PARTITIONS, TABLES, arrow_schema, sql_type
from kdb.warehouse.shell_file import write_shell_file

ODD_NAMES = ["007", "true", "1e5", "null", "a=b/c d%", "2024-01-01", "ü", "it's"]

VIEWS = ("current_runs", "known_runs", "shadowed_runs")


def add_vectors(lake: Path, run: str, size: int, value: float, float16: bool = False) -> None:
    """Commit a run with one vector of `size` equal entries."""
    stored = arrow_schema("activations", vector_size=size, float16=float16)
    values = pa.array([value] * size, pa.float32()).cast(stored.field("vector").type.value_type)
    vector = pa.FixedSizeListArray.from_arrays(values, size)
    columns = [pa.array([0], pa.int32()), pa.array([3], pa.int16()), pa.array(["resid_post"]), vector]
    write_part(lake / f"model=m/dataset=d/run={run}/activations", pa.table(columns, schema=stored))


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    return create_lake(tmp_path / "warehouse")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake, in a folder with an awkward name, that has a run for every awkward model and dataset name."""
    lake = create_lake(tmp_path_factory.mktemp("odd [dir] it's *x? {a,b} ü") / "w")
    for number, name in enumerate(ODD_NAMES):
        add_run(lake, name, name, f"{number:016x}", checks=[{"check": "sum", "value": 0.5}])
    return lake


@pytest.fixture(scope="module")
def database(filled: Path) -> Iterator[Database]:
    with Database(filled) as opened:
        yield opened


@pytest.mark.parametrize("table", TABLES)
def test_view_without_runs_has_the_declared_columns(database: Database, table: str) -> None:
    described = database.sql(f"DESCRIBE {table}").select("column_name", "column_type").rows()
    declared = [
        (column.name, sql_type(column).replace("TIMESTAMPTZ", "TIMESTAMP WITH TIME ZONE"))
        for column in TABLES[table].columns
    ]
    assert described == [(name, "VARCHAR") for name in PARTITIONS] + declared


def test_every_view_is_empty_before_the_first_run(lake: Path) -> None:
    with Database(lake) as database:
        for view in (*TABLES, *VIEWS, *(f"current.{table}" for table in TABLES), "concept_depth()"):
            assert database.sql(f"FROM {view}").is_empty()
    for table in TABLES:
        assert scan(lake, table).collect().is_empty()


def test_partition_values_stay_text(filled: Path, database: Database) -> None:
    expected = sorted((name, name, f"{number:016x}") for number, name in enumerate(ODD_NAMES))
    select = "SELECT model, dataset, run FROM checks"
    assert sorted(database.sql(select).rows()) == expected
    assert sorted(scan(filled, "checks").select("model", "dataset", "run").collect().rows()) == expected
    frame = pd.read_sql(select, engine(lambda: connect(filled)))
    assert sorted(frame.itertuples(index=False, name=None)) == expected


@pytest.mark.parametrize("name", ODD_NAMES)
def test_partition_values_can_be_asked_for(filled: Path, database: Database, name: str) -> None:
    assert database.sql("SELECT dataset FROM checks WHERE model = ?", [name]).rows() == [(name,)]
    assert scan(filled, "checks").filter(pl.col("model") == name).collect()["dataset"].to_list() == [name]


@pytest.mark.parametrize("table", TABLES)
def test_scan_has_the_columns_of_the_view(filled: Path, database: Database, table: str) -> None:
    expected = database.sql(f"FROM {table} LIMIT 0").schema
    scanned = scan(filled, table).collect_schema()
    assert scanned.names() == expected.names()
    assert scanned == expected


def test_vectors_of_all_sizes_and_widths_read_as_lists_of_float32(lake: Path) -> None:
    add_vectors(lake, "a" * 16, 576, 42000.5)
    add_vectors(lake, "b" * 16, 640, 2.5)
    add_vectors(lake, "c" * 16, 576, 3.5, float16=True)
    expected = [(576, 42000.5), (640, 2.5), (576, 3.5)]
    scanned = scan(lake, "activations").sort("run").collect()
    assert scanned.schema["vector"] == pl.List(pl.Float32)
    assert scanned.select(pl.col("vector").list.len(), last=pl.col("vector").list.last()).rows() == expected
    with Database(lake) as database:
        asked = database.sql("SELECT run, vector FROM activations ORDER BY run")
        assert asked.equals(scanned.select("run", "vector"))
    only = scan(lake, "activations").filter(pl.col("run") == "b" * 16).select("layer").collect()
    assert only.rows() == [(3,)]


def test_runs_outside_the_snapshot_are_invisible(lake: Path) -> None:
    add_run(lake, "m", "d", "a" * 16, checks=[{"check": "old"}])
    with Database(lake, ["a" * 16]) as snapshot, Database(lake) as live, Database(lake, []) as before:
        add_run(lake, "m", "d", "b" * 16, checks=[{"check": "new"}])
        assert snapshot.sql('SELECT "check" FROM checks').rows() == [("old",)]
        assert live.sql("SELECT count(*) FROM checks").item() == 2
        assert before.sql("FROM runs").is_empty()
        assert snapshot.sql("SELECT run FROM current_runs WHERE table_name = 'checks'").rows() == [("a" * 16,)]
    assert scan(lake, "checks", ["b" * 16]).collect()["check"].to_list() == ["new"]
    assert scan(lake, "checks", []).collect().is_empty()


def test_current_run_is_the_newest_of_each_table_model_dataset_and_variant(lake: Path) -> None:
    later = NOON + timedelta(hours=1)
    add_run(lake, "m", "d", "b" * 16, probe_scores=[], activations=[])
    add_run(lake, "m", "d", "a" * 16, runs=[{"finished_at": later}], probe_scores=[])
    add_run(lake, "m", "d", "c" * 16, runs=[{"finished_at": later}], probe_scores=[])  # a tie: the larger id
    add_run(lake, "m", "d", "d" * 16, runs=[{"finished_at": later, "variant": "noise"}], probe_scores=[])
    with Database(lake) as database:
        rows = database.sql("SELECT table_name, variant, run FROM current_runs WHERE table_name <> 'runs'").rows()
    assert sorted(rows) == [
        ("activations", "default", "b" * 16),
        ("probe_scores", "default", "c" * 16),
        ("probe_scores", "noise", "d" * 16),
    ]


def test_sql_takes_parameters_by_place_and_by_name(database: Database) -> None:
    assert database.sql("SELECT ? + ? AS x", [1, 2]).rows() == [(3,)]
    assert database.sql("SELECT $a || $b AS x", {"a": "it's", "b": "; DROP"}).rows() == [("it's; DROP",)]


@pytest.mark.parametrize(
    "statement",
    [
        "FROM checks",
        "TABLE checks",
        "VALUES (1)",
        "WITH a AS (SELECT 1) FROM a;",
        "DESCRIBE checks",
        "SUMMARIZE checks",
        "SHOW TABLES",
        "EXPLAIN SELECT 1",
        "explain analyze FROM checks",
        "PIVOT checks ON \"check\" IN ('sum') USING sum(value)",
        "-- what is refused elsewhere: COPY\nSELECT 'COPY x TO y; query(' AS enable_logging",
    ],
)
def test_statements_that_read_are_run(database: Database, statement: str) -> None:
    assert not database.sql(statement).is_empty()


@pytest.mark.parametrize(
    ("statement", "cause"),
    [
        ("COPY (SELECT 1) TO '{lake}/new.parquet'", "COPY"),
        ("EXPLAIN ANALYZE COPY (SELECT 1) TO '{lake}/new.parquet'", "not a SELECT"),
        ("EXPLAIN /* */ (ANALYZE) COPY (SELECT 1) TO '{lake}/new.parquet'", "not a SELECT"),
        ("INSERT INTO checks VALUES (1)", "SQL only reads here: INSERT is refused"),
        ("WITH a AS (SELECT 1) INSERT INTO checks FROM a", "INSERT"),
        ("UPDATE checks SET value = 1", "UPDATE"),
        ("DELETE FROM checks", "DELETE"),
        ("TRUNCATE checks", "DELETE"),
        ("CREATE TABLE t AS SELECT 1", "CREATE"),
        ("CREATE OR REPLACE VIEW checks AS SELECT 1", "CREATE"),
        ("DROP VIEW checks", "DROP"),
        ("ALTER VIEW checks RENAME TO x", "ALTER"),
        ("COMMENT ON VIEW checks IS 'x'", "ALTER"),
        ("ATTACH '{lake}/new.duckdb'", "ATTACH"),
        ("EXPORT DATABASE '{lake}/new'", "EXPORT"),
        ("IMPORT DATABASE '/tmp'", "Permission"),
        ("SET threads = 1", "SET"),
        ("SET VARIABLE kdb_runs = NULL", "SET"),
        ("RESET threads", "SET"),
        ("USE memory", "SET"),
        ("INSTALL httpfs", "LOAD"),
        ("LOAD httpfs", "LOAD"),
        ("PRAGMA version", "not a SELECT"),
        ("CALL pragma_version()", "CALL"),
        ("CHECKPOINT", "CALL"),
        ("BEGIN", "TRANSACTION"),
        ("PREPARE p AS SELECT 1", "PREPARE"),
        ("VACUUM", "VACUUM"),
        ("SELECT 1; SELECT 2", "one statement at a time, found 2"),
        ("SELECT 1; DROP VIEW checks", "one statement"),
        ("-- nothing", "found 0"),
        ('PIVOT checks ON "check" USING sum(value)', "IN"),
        ("FROM enable_logging(storage = 'file', storage_config = {{'path': '{lake}'}})", "enable_logging"),
        ('FROM system.main."ENABLE_PROFILING"()', "(?i)enable_profiling"),
        ("FROM query('FROM enable_' || 'logging()')", "query"),
        ("FROM json_execute_serialized_sql('')", "json_execute_serialized_sql"),
        ("FROM read_csv('/etc/passwd')", "the function read_csv is refused"),
        ("FROM read_text('{lake}/../../secret')", "the function read_text is refused"),
        ("FROM glob('/etc/*')", "the function glob is refused"),
        ("FROM read_parquet('/etc/passwd')", "Permission"),
        ("FROM parquet_metadata('{lake}/../../secret')", "Permission"),
        ("-- EXPLAIN\nEXPLAIN ANALYZE COPY (SELECT 1) TO '{lake}/new.parquet' /* SELECT 1 */", "not a SELECT"),
        (" --EXPLAIN\nEXPLAIN ANALYZE COPY (SELECT 1) TO '{lake}/n.parquet' /*\nSELECT 1 --*/", "not a SELECT"),
        ("/* EXPLAIN */ EXPLAIN ANALYZE COPY (SELECT 1) TO '{lake}/new.parquet'", "not a SELECT"),
        ("EXPLAIN ANALYZE EXPLAIN ANALYZE COPY (SELECT 1) TO '{lake}/new.parquet'", "(?i)syntax|not a SELECT"),
        ("EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{lake}/new.parquet'", "not a SELECT"),
        ("EXPLAIN (FORMAT json) SELECT 1", "not a SELECT"),
        ("SELECT json_serialize_plan('EXPORT DATABASE x')", "json_serialize_plan is refused"),
        ("SELECT json_deserialize_sql('{{}}')", "json_deserialize_sql is refused"),
        ("SELECT combine(sum(1), 1)", "combine is refused"),
        ("SELECT sum(1) EXPORT_STATE", "EXPORT_STATE"),
        ("SELECT 1::VARIANT", "VARIANT"),
        ("SELECT 1::STRUCT(a VARIANT[])", "VARIANT"),
        ("SELECT 1\0; DROP VIEW checks", "NUL"),
        ("SELECT '\ud800'", "not valid Unicode"),
        ("FROM '/etc/passwd'", "passwd"),
        ("FROM lake", "does not exist"),  # a Python variable of this test
    ],
)
def test_statements_that_do_more_are_refused(filled: Path, database: Database, statement: str, cause: str) -> None:
    lake = str(filled).replace("'", "''")
    before = digest(filled.parent)
    with pytest.raises(QueryError, match=cause):
        database.sql(statement.format(lake=lake))
    assert digest(filled.parent) == before


def test_duckdb_errors_come_without_the_statement(database: Database) -> None:
    with pytest.raises(QueryError) as caught:
        database.sql("SELECT valu FROM checks")
    assert str(caught.value).startswith('Binder Error: Referenced column "valu" not found')
    assert "LINE 1" not in str(caught.value)
    with pytest.raises(QueryError, match="boom"):
        database.sql("SELECT error('boom')")


def test_wrong_parameters_and_types_polars_lacks_are_query_errors(database: Database) -> None:
    for statement, params in [("SELECT ?", [1, 2]), ("SELECT $a", {"b": 1}), ("SELECT ?", [object()])]:
        with pytest.raises(QueryError):
            database.sql(statement, params)
    with pytest.raises(QueryError, match="VARCHAR"):
        database.sql("SELECT finished_at - finished_at FROM runs")


def test_times_are_utc(database: Database) -> None:
    assert database.sql("SELECT finished_at FROM runs LIMIT 1").item() == NOON
    assert database.sql("FROM runs").schema["finished_at"] == pl.Datetime("us", "UTC")


def test_a_missing_or_damaged_lake_is_a_warehouse_error(tmp_path: Path, lake: Path) -> None:
    with pytest.raises(WarehouseError, match="kdb verify"):
        Database(tmp_path / "nothing")
    next(lake.rglob("*.parquet")).write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(WarehouseError, match="kdb verify"):
        Database(lake)


@pytest.mark.filterwarnings("error")
def test_engine_reflects_every_view(filled: Path, database: Database) -> None:
    opened = engine(lambda: connect(filled))
    with opened.connect() as connection:
        inspector = inspect(connection)
        assert sorted(inspector.get_view_names("main")) == sorted([*TABLES, *VIEWS, "_known_runs"])
        assert sorted(inspector.get_view_names("current")) == sorted(TABLES)
        for schema, views in {"main": [*TABLES, *VIEWS], "current": list(TABLES)}.items():
            for view in views:
                names = [column["name"] for column in inspector.get_columns(view, schema)]
                assert names == database.sql(f"FROM {schema}.{view} LIMIT 0").columns


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("table", TABLES)
def test_pandas_reads_every_table(filled: Path, table: str) -> None:
    opened = engine(lambda: connect(filled))
    read, whole = pd.read_sql(f"SELECT * FROM {table}", opened), pd.read_sql_table(table, opened)
    assert list(read.columns) == list(whole.columns) == [*PARTITIONS, *TABLES[table].columns.keys()]
    assert len(read) == len(whole) == (len(ODD_NAMES) if table in ("checks", "runs") else 0)


def test_pandas_reads_lists_and_vectors(lake: Path) -> None:
    add_vectors(lake, "a" * 16, 3, 2.5)
    add_run(lake, "m", "d", "b" * 16)
    opened = engine(lambda: connect(lake))
    assert list(pd.read_sql_table("activations", opened)["vector"][0]) == [2.5, 2.5, 2.5]
    assert list(pd.read_sql_table("runs", opened)["tables"][0]) == ["runs"]


def test_pandas_reads_times_in_utc_beside_all_else(filled: Path) -> None:
    sql = (
        "SELECT finished_at, [finished_at] AS several, sum(1) OVER () AS n, NULL AS nothing, finished_at, "
        "1.5::DECIMAL(4, 2) AS exact FROM runs LIMIT 1"
    )
    with engine(lambda: connect(filled)).connect() as connection:
        row = connection.execute(text(sql)).one()
        assert tuple(row) == (NOON, [NOON], len(ODD_NAMES), None, NOON, Decimal("1.50"))
        found = connection.execute(text("SELECT finished_at FROM runs"))
        assert found.fetchone() == (NOON,)
        assert len(found.fetchmany(2)) == 2
        assert len(found.fetchall()) == len(ODD_NAMES) - 3
        assert connection.execute(text("SELECT 1")).scalar() == 1
    frame = pd.read_sql("SELECT finished_at FROM runs", engine(lambda: connect(filled)))
    assert str(frame["finished_at"].dtype).endswith("UTC]")


@pytest.mark.slow
def test_reflection_finds_columns_and_no_keys(filled: Path) -> None:
    found = inspect(engine(lambda: connect(filled)))
    for table in TABLES:
        assert found.has_table(table)
        assert found.get_pk_constraint(table)["constrained_columns"] == []
        nothing = (found.get_foreign_keys, found.get_indexes, found.get_unique_constraints, found.get_check_constraints)
        assert [answer(table) for answer in nothing] == [[], [], [], []]


def test_engine_takes_parameters_and_refuses_writes(filled: Path) -> None:
    opened = engine(lambda: connect(filled, [f"{0:016x}", f"{1:016x}"]))
    with opened.connect() as connection:
        rows = connection.execute(text("SELECT model FROM checks WHERE model <> :name"), {"name": "true"}).all()
        assert [tuple(row) for row in rows] == [("007",)]
    with opened.connect() as connection, pytest.raises(QueryError, match="COPY is refused"):
        connection.execute(text("COPY checks TO 'x'"))


def test_engine_connections_see_runs_committed_since(lake: Path) -> None:
    runs: list[str] = []
    opened = engine(lambda: connect(lake, runs))
    assert pd.read_sql("FROM runs", opened).empty
    add_run(lake, "m", "d", "a" * 16)
    runs.append("a" * 16)
    assert pd.read_sql("SELECT run FROM runs", opened)["run"].tolist() == ["a" * 16]


@needs_shell
def test_shell_sees_views_macros_comments_and_new_runs(tmp_path: Path) -> None:
    lake = create_lake(tmp_path / "odd [dir] it's {a,b} ü")
    write_shell_file(lake.parent)
    file = lake.parent / "kdb.duckdb"
    assert shell(file, "SELECT count(*) FROM runs") == ["0"]
    add_run(lake, "007", "a=b/c d%", "a" * 16, checks=[{"check": "sum"}])
    assert shell(file, "SELECT model, dataset FROM checks") == ["007,a=b/c d%"]
    assert shell(file, "SELECT table_name FROM current_runs ORDER BY ALL") == ["checks", "runs"]
    assert shell(file, "FROM concept_depth(jump_ratio := 1.2)") == []
    about = "SELECT comment FROM duckdb_columns() WHERE table_name = 'checks' AND column_name = 'tolerance'"
    assert shell(file, about) == ["largest difference allowed; NULL for a count"] * 2, "in schema main, and in current"
    assert shell(file, 'SELECT model, "check" FROM current.checks') == ["007,sum"]


def test_shell_file_is_replaced_under_a_shell_that_holds_it(lake: Path) -> None:
    file = lake.parent / "kdb.duckdb"
    write_shell_file(lake.parent)
    with duckdb.connect(str(file)) as held:
        add_run(lake, "m", "d", "a" * 16)
        write_shell_file(lake.parent)
        assert held.execute("SELECT run FROM runs").fetchall() == [("a" * 16,)]
    file.with_name("kdb.duckdb.wal").write_bytes(b"left by a crash")
    write_shell_file(lake.parent)
    assert sorted(path.name for path in lake.parent.iterdir()) == ["kdb.duckdb", "lake"]


def test_shell_file_of_a_moved_warehouse_can_be_rewritten(lake: Path, tmp_path: Path) -> None:
    write_shell_file(lake.parent)
    moved = lake.parent.rename(tmp_path / "moved")
    write_shell_file(moved)
    with duckdb.connect(str(moved / "kdb.duckdb"), read_only=True) as opened:
        assert opened.execute("FROM runs").fetchall() == []
