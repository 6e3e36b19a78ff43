"""The first minute: the demo that comes with kdb, and the summary of a warehouse."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import webbrowser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import kdb
from kdb.cli import main
from kdb.summary import summary
from kdb.warehouse.store import Warehouse
from kdb.web import serve


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo-warehouse"
    assert CliRunner().invoke(main, ["demo", "--save", str(folder)]).exit_code == 0
    return folder


def test_the_atlas_counts_what_its_page_says(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.parent)
    page = (Path(__file__).parents[1] / "docs" / "atlas.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    *before, last = code.strip().splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(before), names)  # the code is ours
    curves, bold, jumps, late = eval(last, names).row(0)
    assert f"Of {curves} curves, {bold} are bold, but {jumps} have a jump point J" in " ".join(page.split())
    assert f"C is one of the last two layers in {late} of them" in " ".join(page.split())


def test_the_demo_serves_without_a_browser() -> None:
    command = [sys.executable, "-m", "kdb", "demo", "--no-browser"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
    assert re.match(r"kdb is running at http://127.0.0.1:\d+/ ", line)
    assert process.returncode == 0


@pytest.mark.parametrize(("display", "opened"), [(":0", ["http://127.0.0.1:8765/"]), ("", [])])
def test_a_browser_opens_where_there_is_a_screen(
    display: str, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(webbrowser, "open", seen.append)
    monkeypatch.setattr(serve, "threading", SimpleNamespace(Thread=_Now))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    serve.open_page("http://127.0.0.1:8765/")
    assert seen == opened


class _Now:
    """A thread that runs when it is started, before anything else."""

    def __init__(self, target: object, args: tuple[str, ...], daemon: bool) -> None:
        self.start = lambda: target(*args)  # type: ignore[operator]


def test_the_demo_is_written_to_a_new_folder_only(demo: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--save", str(demo)])
    assert result.exit_code == 2
    assert "not empty" in result.stderr


def test_the_summary_is_about_every_model_and_kind_of_knowledge(demo: Path) -> None:
    lines = summary(kdb.open(demo))
    for model in kdb.open(demo).sql("SELECT DISTINCT model FROM runs")["model"]:
        assert model in lines
    (first, *_) = kdb.open(demo).query("top-heads", k=1).iter_rows(named=True)
    said = [line for line in lines if first["category"] in line and f"{first['n_prompts']} prompts" in line]
    assert any(f"head {first['head_name']} adds" in line for line in said)


def test_the_commands_that_the_summary_names_can_be_typed(demo: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["summary", "--warehouse", str(demo)])
    commands = [line.partition("#")[0].strip() for line in result.stdout.partition("Next:")[2].splitlines() if line]
    assert len(commands) == 5
    for command in commands:
        if " query " in command:
            answer = CliRunner().invoke(main, shlex.split(command)[1:])
            assert answer.exit_code == 0, command
            assert answer.stdout.strip(), command


def test_the_summary_of_an_empty_warehouse_says_how_to_start(tmp_path: Path) -> None:
    assert "kdb ingest" in " ".join(summary(Warehouse.create(tmp_path / "new")))


def test_the_summary_refuses_a_model_that_is_not_stored(demo: Path) -> None:
    result = CliRunner().invoke(main, ["summary", "--model", "smollm2-135", "--warehouse", str(demo)])
    assert result.exit_code == 2
    assert "smollm2-135m" in result.stderr
