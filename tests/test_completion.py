"""Completion by the shell: stored names, quickly found, and never a traceback or a warehouse that nobody asked for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import Result
from helpers.command_line import answer, refusal
from helpers.knowledge_rows import ALPHA, add_knowledge
from helpers.stored import create_lake
from helpers.synthetic import write_manifests

from kdb.cli import main

RunKdb = Callable[..., Result]

NAMES = {
    "model",
    "models",
    "models_",
    "dataset",
    "datasets",
    "datasets_",
    "run",
    "runs",
    "chosen",
    "variant",
    "category",
}
"""Names of the parameters whose values are stored names."""


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """A warehouse with two runs of the knowledge study."""
    folder = tmp_path / "facts"
    lake = create_lake(folder)
    add_knowledge(lake, "alpha", "facts", "a" * 16, ALPHA)
    add_knowledge(lake, "org/beta 50%", "more", "b" * 16, {"prompts": []}, variant="limit=5")
    write_manifests(folder)
    return folder


def completed(*words: str | Path, incomplete: str = "") -> list[str]:
    """The values that the shell offers after these words."""
    shell = ShellComplete(main, {}, "kdb", "_KDB_COMPLETE")
    return [item.value for item in shell.get_completions([str(word) for word in words], incomplete)]


def test_stored_names_are_completed(facts: Path) -> None:
    asked = ("query", "top-heads", "--warehouse", facts)
    assert completed(*asked, "--model") == ["alpha", "org/beta 50%"]
    assert completed(*asked, "--model", incomplete="al") == ["alpha"]
    assert completed(*asked, "--dataset") == ["facts", "more"]
    assert completed(*asked, "--run") == ["a" * 16, "b" * 16]
    assert completed(*asked, "--variant") == ["default", "limit=5"]
    assert completed(*asked, "--category") == sorted({row["category"] for row in ALPHA["prompts"]})
    assert completed("runs", "--warehouse", facts, "remove", incomplete="a") == ["a" * 16]
    assert completed("compare", "--warehouse", facts) == ["a" * 16, "b" * 16]


def test_names_of_tables_and_datasets_are_completed() -> None:
    assert completed("schema", incomplete="probe_s") == ["probe_scores"]
    assert completed("datasets", "fetch", incomplete="memory") == ["memory-colors"]


def test_names_are_those_of_the_models_and_datasets_given_before(facts: Path) -> None:
    asked = ("query", "top-heads", "--warehouse", facts)
    assert completed(*asked, "--model", "alpha", "--run") == ["a" * 16]
    assert completed(*asked, "--dataset", "more", "--variant") == ["limit=5"]
    assert completed(*asked, "--model", "alpha", "--dataset") == ["facts"]


def test_the_warehouse_is_the_one_that_the_command_would_use(facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDB_WAREHOUSE", str(facts))
    assert completed("query", "top-heads", "--model") == ["alpha", "org/beta 50%"]
    monkeypatch.delenv("KDB_WAREHOUSE")
    monkeypatch.chdir(facts.parent)
    facts.rename(facts.with_name("kdb-warehouse"))
    assert completed("query", "top-heads", "--model") == ["alpha", "org/beta 50%"]


def test_what_can_be_measured_and_asked_is_completed() -> None:
    assert completed("ingest", "--model", incomplete="smol") == ["smollm2-135m"]
    assert completed("ingest", "--dataset", incomplete="world") == ["world-cities"]
    assert completed("ingest", "--dataset", incomplete="./my") == ["./my"]  # the shell completes files
    assert completed("queries", incomplete="top-h") == ["top-heads"]
    assert completed("query", incomplete="top-h") == ["top-heads"]


def test_nothing_is_completed_or_created_without_a_warehouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert completed("query", "top-heads", "--model") == []
    assert completed("query", "top-heads", "--warehouse", "s3://bucket/w", "--model") == []
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_warehouse_completes_nothing_and_raises_nothing(facts: Path) -> None:
    for file in facts.glob("lake/model=*/dataset=*/run=*/runs/*.parquet"):
        file.write_bytes(b"no Parquet")
    assert completed("query", "top-heads", "--warehouse", facts, "--variant") == []
    shutil.rmtree(facts / "lake")
    (facts / "lake").symlink_to(facts.parent)
    (facts.parent / "model=x").write_text("")
    assert completed("query", "top-heads", "--warehouse", facts, "--model") == []


def parameters(command: click.Command = main, path: str = "kdb") -> Iterator[tuple[str, click.Parameter]]:
    yield from ((path, param) for param in command.params)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from parameters(found, f"{path} {name}")


def test_every_parameter_that_takes_a_stored_name_completes_it(facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDB_WAREHOUSE", str(facts))
    taking = [(path, param) for path, param in parameters() if param.name in NAMES]
    assert len(taking) > 100
    context = click.Context(main)
    assert [(path, param.name) for path, param in taking if not param.shell_complete(context, "")] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed_with_how_to_install_it(run_kdb: RunKdb, shell: str) -> None:
    *script, last = answer(run_kdb("completion", shell)).splitlines()
    assert "_KDB_COMPLETE" in "\n".join(script)
    assert last.startswith("# To install: ")
    assert f"kdb completion {shell}" in last
    assert answer(run_kdb("completion", SHELL=f"/bin/{shell}")).splitlines() == [*script, last]


def test_bash_takes_the_script(run_kdb: RunKdb) -> None:
    script = answer(run_kdb("completion", "bash"))
    read = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (read.returncode, read.stderr) == (0, "")


def test_an_unknown_shell_is_refused(run_kdb: RunKdb) -> None:
    assert refusal(run_kdb("completion", SHELL="/bin/tcsh")) == "Name the shell: bash, zsh, fish."


# Help ------------------------------------------------------------------------------------------------------------


def test_help_groups_the_commands_and_ends_with_the_guides(run_kdb: RunKdb) -> None:
    text = answer(run_kdb("--help"))
    headings = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == ["Options", "Measure", "Ask", "Show", "Share", "Keep"]
    assert all(f"\n  {name} " in text for name in main.commands)
    assert " ".join(text.split()).endswith("The guides are README.md and the folder docs of kdb's source.")
