"""Old runs are removed by their age, once they were listed and whoever asks has agreed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers.command_line import refusal

import kdb
from kdb.cli import main
from kdb.cli.keep import moment
from kdb.errors import QueryError
from kdb.warehouse.folder_storage import FolderStorage

RunKdb = Callable[..., Result]

NOW = datetime(2026, 5, 3, 12, tzinfo=UTC)


def runs(warehouse: Path) -> list[str]:
    return kdb.open(warehouse).runs()


def test_an_age_or_a_date_names_a_moment() -> None:
    assert moment("90d", NOW) == NOW - timedelta(days=90)
    assert moment("12h", NOW) == NOW - timedelta(hours=12)
    assert moment("2026-01-31", NOW) == datetime(2026, 1, 31, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "90", "90m", "-1d", "2026-02-30", "yesterday", "9" * 30 + "d"])
def test_what_is_neither_is_refused(text: str, warehouse: Path, run_kdb: RunKdb) -> None:
    with pytest.raises(QueryError):
        moment(text, NOW)
    if text:
        message = refusal(run_kdb("runs", "remove", "--older-than", text, "--yes", "--warehouse", warehouse))
        assert f"expected an age such as 90d or 12h, or a date such as 2026-01-31, found {text!r}" in message
    assert len(runs(warehouse)) == 1


def test_only_older_runs_are_removed(warehouse: Path, run_kdb: RunKdb) -> None:
    (new,) = runs(warehouse)
    result = run_kdb("runs", "remove", "--older-than", "1h", "--yes", "--warehouse", warehouse)
    assert (result.exit_code, result.stdout, runs(warehouse)) == (0, "No run is that old.\n", [new])
    result = run_kdb("runs", "remove", "--older-than", "0h", "--yes", "--warehouse", warehouse)
    assert (result.stdout, runs(warehouse)) == (f"Removed run {new}.\n", [])
    assert result.stderr.startswith(f"{new} tiny weather default ")


@pytest.mark.parametrize(("answer", "left"), [("n\n", 1), ("", 1), ("y\n", 0)])
def test_it_asks_first(answer: str, left: int, warehouse: Path) -> None:
    command = ["runs", "remove", "--older-than", "0h", "--warehouse", str(warehouse)]
    result = CliRunner().invoke(main, command, input=answer)
    assert "Remove 1 run permanently?" in result.stderr
    assert result.exit_code == (1 if left else 0)
    assert len(runs(warehouse)) == left


@pytest.mark.parametrize("options", [[], ["1f0c9a3b5d7e2468", "--older-than", "90d"]])
def test_a_run_or_an_age_is_named(options: list[str], warehouse: Path, run_kdb: RunKdb) -> None:
    result = run_kdb("runs", "remove", *options, "--warehouse", warehouse)
    assert result.exit_code == 2
    assert "Give either one run, or an age with --older-than." in result.stderr
    assert len(runs(warehouse)) == 1


def test_a_run_is_removed_by_its_id_once_its_names_were_confirmed(warehouse: Path) -> None:
    (folder,) = FolderStorage(warehouse).run_folders()
    command = ["runs", "remove", folder.run, "--warehouse", str(warehouse)]
    refused = CliRunner().invoke(main, command, input="n\n")
    assert (refused.exit_code, len(FolderStorage(warehouse).run_folders())) == (1, 1)
    assert f"Remove run {folder.run} (tiny on weather) permanently?" in refused.output
    assert CliRunner().invoke(main, command, input="y\n").exit_code == 0
    assert FolderStorage(warehouse).run_folders() == []
