"""Columns of every kind in every format: written well, or refused in one line that names the column."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from click.testing import Result

from kdb.errors import QueryError
from kdb.formats import MEDIA_TYPES, encode
from kdb.warehouse.statements import refusal

WRITTEN = {
    "UUID": ("'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::UUID", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    "TIME": "TIME '12:00:01'",
    "DATE": "DATE '2020-01-01'",
    "TIMESTAMP_NS": "'2020-01-01 00:00:00.123456789'::TIMESTAMP_NS",
    "TIMESTAMPTZ": "TIMESTAMPTZ '2020-01-01 00:00:00+00'",
    "HUGEINT": "170141183460469231731687303715884105727::HUGEINT",
    "DECIMAL": "1.5::DECIMAL(38, 10)",
    "UBIGINT": "18446744073709551615::UBIGINT",
    "ENUM": "'a'::ENUM('a', 'b')",
    "ARRAY": "[1, 2]::INT[2]",
    "MAP": "MAP {'a': [1]}",
    "JSON": "'[1]'::JSON",
    "NULL": "NULL",
    "NAN": "'nan'::DOUBLE",
    "NESTED": "{'a': [{'b': 1.5, 'c': DATE '2020-01-01'}]}",
    "NUL": "chr(0)",
}
"""Values of types that every format writes."""

REFUSED = {
    "BLOB": "'\\xAA'::BLOB",
    "BLOB[]": "['x'::BLOB]",
    "STRUCT(BLOB)": "{'a': 'x'::BLOB}",
    "MAP(BLOB)": "MAP {'a': 'x'::BLOB}",
    "BIT": "'101'::BIT",
    "BIGNUM": "1::BIGNUM",
    "INTERVAL": "INTERVAL 3 DAY",
    "INTERVAL[]": "[INTERVAL 3 DAY]",
    "STRUCT(INTERVAL)": "{'a': INTERVAL 3 DAY}",
    "UNION": "union_value(a := 1)",
    "UNION[]": "[union_value(a := 1)]",
    "unnamed STRUCT": "row(1, 'x')",
    "infinite date": "'infinity'::DATE",
    "infinite time": "'infinity'::TIMESTAMP",
    "far time": "TIMESTAMP '290000-01-01'",
    "MAP(list)": "MAP {[1]: 2}",
}
"""Values that text cannot hold; `kdb sql` in tables too, since Polars panics on some of them."""

TEXTS = ("json", "csv", "table", "markdown")


def answer(expression: str) -> str:
    return f"SELECT {expression} AS odd, 1 AS plain"


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("format_", [*TEXTS, "parquet"])
def test_kind_is_written(
    measured: Path, run_kdb: Callable[..., Result], tmp_path: Path, kind: str, format_: str
) -> None:
    value = WRITTEN[kind]
    text = answer(value if isinstance(value, str) else value[0])
    file = tmp_path / "answer"
    result = run_kdb("sql", text, "--warehouse", measured, "--format", format_, "-o", file)
    assert result.exit_code == 0, result.output
    assert file.stat().st_size > 0
    if format_ == "json":
        assert json.loads(file.read_text())[0]["plain"] == 1


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("format_", ["json", "csv"])
def test_kind_without_text_is_refused_in_one_line(
    measured: Path, run_kdb: Callable[..., Result], kind: str, format_: str
) -> None:
    result = run_kdb("sql", answer(REFUSED[kind]), "--warehouse", measured, "--format", format_)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "column odd: " in result.stderr
    assert "cast it" in result.stderr


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("format_", ["table", "markdown", "parquet"])
def test_kind_is_written_or_refused_and_never_a_traceback(
    measured: Path, run_kdb: Callable[..., Result], tmp_path: Path, kind: str, format_: str
) -> None:
    result = run_kdb("sql", answer(REFUSED[kind]), "--warehouse", measured, "--format", format_, "-o", tmp_path / "x")
    assert result.exit_code in (0, 2)
    if result.exit_code:
        assert "cast it" in result.stderr


@pytest.mark.parametrize("kind", [*WRITTEN, *REFUSED])
@pytest.mark.parametrize("format_", MEDIA_TYPES)
def test_server_writes_or_refuses_every_kind(kind: str, format_: str) -> None:
    value = {**WRITTEN, **REFUSED}[kind]
    reader = duckdb.connect().execute(answer(value if isinstance(value, str) else value[0])).to_arrow_reader()
    try:
        written = b"".join(encode(reader, format_))
    except QueryError as error:
        assert kind in REFUSED
        assert "cast it" in str(error)
        return
    assert written
    if format_ == "json":
        assert kind in WRITTEN
        assert json.loads(written)[0]["plain"] == 1


def test_columns_of_one_name_are_told_apart(measured: Path, run_kdb: Callable[..., Result]) -> None:
    result = run_kdb("sql", "SELECT 1 AS a, 2 AS a", "--warehouse", measured, "--format", "json")
    assert json.loads(result.stdout) == [{"a": 1, "a_1": 2}]


def test_wide_rows_are_written_in_parts_that_join_to_the_whole() -> None:
    table = pa.table({"vector": [[float(i)] * 4096 for i in range(500)]})
    parts = list(encode(table.to_reader(max_chunksize=500), "json"))
    assert len(parts) > 3
    assert [row["vector"][0] for row in json.loads(b"".join(parts))] == list(range(500))


# Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_while_duckdb_works_is_said_in_words(
    measured: Path, start_kdb: Callable[..., subprocess.Popen[str]]
) -> None:
    text = "SELECT count(*) FROM range(1000000000) a, range(1000000) b WHERE hash(a.range) = b.range"
    started = start_kdb("sql", text, "--warehouse", measured)
    _wait_until_it_computes(started.pid)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=120)[1]
    assert started.returncode == 130
    assert "Interrupted" in said
    assert "Traceback" not in said


def _wait_until_it_computes(pid: int) -> None:
    """Return once the query's own thread has used a second of processor."""
    import psutil

    process = psutil.Process(pid)
    main = pid
    while not any(thread.id != main and thread.user_time > 1 for thread in process.threads()):
        process.cpu_percent(interval=0.1)


def test_duckdbs_word_for_ctrl_c_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        refusal(OSError("INTERRUPT Error: Interrupted!"))
