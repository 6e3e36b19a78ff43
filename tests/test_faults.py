"""Unexpected errors end with one line and no traceback; their details are in a file."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import Result

from kdb.faults import explain
from kdb.opened import OpenWarehouse

pytestmark = pytest.mark.slow

RunKdb = Callable[..., Result]


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the logs, which are nobody's own here."""
    monkeypatch.delenv("KDB_DEBUG", raising=False)
    monkeypatch.setattr("platformdirs.user_log_path", lambda *_, **__: tmp_path / "logs")
    return tmp_path / "logs"


@pytest.fixture
def failing(measured: Path, run_kdb: RunKdb, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Result]:
    """`kdb query runs`, in which an error is raised."""

    def run(error: BaseException) -> Result:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(OpenWarehouse, "query", fail)
        return run_kdb("query", "runs", "--warehouse", measured)

    return run


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("0\nof\x1b[2J"), pl.exceptions.PanicException("of Rust"), KeyError()]
)
def test_an_unexpected_error_is_one_line_that_names_a_log(
    failing: Callable[[BaseException], Result], logs: Path, error: BaseException
) -> None:
    result = failing(error)
    assert (result.exit_code, result.stdout) == (70, "")
    (log,) = logs.iterdir()
    assert result.stderr.startswith(f"Error: Internal error in kdb query: {type(error).__name__}")
    assert result.stderr.endswith(f". Details are in {log}; please report it.\n")
    assert (result.stderr.count("\n"), "\x1b" in result.stderr) == (1, False)
    assert log.read_text().startswith("kdb query\n")
    assert "Traceback (most recent call last)" in log.read_text()


def test_details_go_to_the_folder_of_temporary_files_where_no_log_can_be_written(
    failing: Callable[[BaseException], Result], logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.write_text("no folder")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert f"Details are in {tmp_path}/kdb-" in failing(ZeroDivisionError()).stderr


def test_the_traceback_is_shown_where_it_is_asked_for(
    failing: Callable[[BaseException], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDB_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())


class OutOfMemoryException(Exception):  # noqa: N818
    """An error with the name of DuckDB's own."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "kdb query: not enough memory."),
        (OutOfMemoryException(), "kdb query: not enough memory."),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "kdb query: '/x': Permission denied. Check that"),
        (OSError(errno.ENOSPC, "No space left on device"), "kdb query: No space left on device. Check that"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "a file is damaged or is not text: UnicodeDecodeError"),
    ],
)
def test_what_the_user_can_mend_is_said(
    failing: Callable[[BaseException], Result], logs: Path, error: BaseException, said: str
) -> None:
    result = failing(error)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not logs.exists()


@pytest.mark.parametrize("text", ["{", "[" * 200_000])
def test_damaged_json_is_said_however_deep(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)) as caught:
        json.loads(text)
    assert explain(caught.value, "kdb query").exit_code == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("Query interrupted")])
def test_ctrl_c_is_an_interruption_however_it_comes(
    failing: Callable[[BaseException], Result], error: BaseException
) -> None:
    result = failing(error)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "\nInterrupted. Finished parts are kept. Run the same command again to resume.\n"


def test_a_reader_that_goes_away_is_no_error(measured: Path, start_kdb: Callable[..., subprocess.Popen[str]]) -> None:
    many = "SELECT repeat('x', 1000) FROM range(20000)"
    process = start_kdb("sql", many, "--format", "csv", "--warehouse", measured)
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)


def test_a_job_that_fails_unexpectedly_names_a_log_and_the_next_is_measured(
    tiny_model: Path, tmp_path: Path, run_kdb: RunKdb, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdb.ingest import plan_file as batch

    def fail(_: object, job: Any, __: object, original: Any = batch.ingest_on) -> Any:
        if job.dataset.name == "first":
            raise pl.exceptions.PanicException("of Rust")
        return original(_, job, __)

    monkeypatch.setattr(batch, "ingest_on", fail)
    rows = "".join(f"city {n} is large,{n % 2}\n" for n in range(20))
    for name in ("first", "second"):
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    given = ("--dataset", tmp_path / "first.csv", "--dataset", tmp_path / "second.csv")
    result = run_kdb("ingest", "--model", tiny_model, *given, "--warehouse", tmp_path / "w")
    assert result.exit_code == 1
    assert "on second: stored" in result.stdout
    (log,) = logs.iterdir()
    assert f"Internal error in measuring tiny on first: PanicException: of Rust. Details are in {log}" in result.stderr


# Files that are written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "endings"),
    [
        (("query", "runs", "-o", "x.docx"), ".csv, .json, .md, .parquet, .xlsx, .txt"),
        (("sql", "SELECT 1", "-o", "x.gif"), ".csv, .json, .md, .parquet, .xlsx, .txt"),
        (("runs", "-o", "x.docx"), ".csv, .json, .md, .parquet, .xlsx, .txt"),
        (("plot", "depth-curves", "-o", "x.gif"), ".html, .png, .svg, .pdf, .json, .csv, .parquet"),
        (("report", "-o", "x.pdf"), ".html, .md"),
    ],
)
def test_an_ending_that_kdb_does_not_write_is_refused_before_any_work(
    run_kdb: RunKdb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], endings: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_kdb(*command, "--warehouse", "absent")  # which would be the next thing to say
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: -o {command[-1]!r}: expected a file that ends in {endings}.\n"
    assert list(tmp_path.iterdir()) == []


WRITING = [("query", "runs"), ("plot", "depth-curves"), ("report",)]
NAMES = {"query": "a.csv", "plot": "a.svg", "report": "a.html"}


@pytest.mark.parametrize("command", WRITING)
def test_a_file_that_cannot_be_written_is_one_message_and_the_old_one_stays(
    measured: Path, run_kdb: RunKdb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    name = NAMES[command[0]]
    (tmp_path / name).write_text("old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    for path, said in ((tmp_path / name, "No space left"), (tmp_path / "no" / name, "there is no folder")):
        result = run_kdb(*command, "-o", path, "--warehouse", measured)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Error: Cannot write ")
        assert said in result.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "old"}


def test_a_full_device_is_one_message_and_stays_a_device(measured: Path, run_kdb: RunKdb) -> None:
    result = run_kdb("query", "runs", "--format", "csv", "-o", "/dev/full", "--warehouse", measured)
    assert (result.exit_code, result.stderr) == (2, "Error: Cannot write '/dev/full': No space left on device.\n")
    assert Path("/dev/full").is_char_device()


def test_a_published_file_replaces_no_device_and_no_file_of_another_kind(
    measured: Path, run_kdb: RunKdb, tmp_path: Path
) -> None:
    (tmp_path / "x.duckdb").symlink_to("/dev/full")
    (tmp_path / "passwd").write_text("mine")
    for name, problem in (("x.duckdb", "not a regular file"), ("passwd", "expected a file that ends in .duckdb")):
        publish = ("rebuild", "--url", "https://example.org/w", "-o", tmp_path / name)
        result = run_kdb(*publish, "--warehouse", measured)
        assert (result.exit_code, result.stdout) == (2, "")
        assert problem in result.stderr
    assert (tmp_path / "passwd").read_text() == "mine"
    assert Path("/dev/full").is_char_device()


def test_what_a_link_leads_to_is_written(measured: Path, run_kdb: RunKdb, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near.csv").symlink_to(tmp_path / "far/runs.csv")
    assert run_kdb("query", "runs", "-o", tmp_path / "near.csv", "--warehouse", measured).exit_code == 0
    assert (tmp_path / "near.csv").is_symlink()
    assert (tmp_path / "far/runs.csv").read_text().startswith("run,model,dataset")
