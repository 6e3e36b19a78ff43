"""Runs that go to the hub and come back: what is there after a push, what a pull brings, what is said when it fails."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from helpers.hub import TOKEN, Hub, attaching, pretended

import kdb
from kdb.warehouse.folder_storage import FolderStorage

pytestmark = pytest.mark.slow

URL, NAME = "hf://datasets/lab/depths", "lab/depths"


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with pretended() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub, whom huggingface_hub takes for the real one."""
    from huggingface_hub import constants

    server.commits, server.asked, server.rivals, server.read_only, server.sent = {}, [], [], False, 0
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture
def second(warehouse: Path, tmp_path: Path, run_kdb: Callable[..., Result]) -> Path:
    """A warehouse with one run, which is computed from the one in ``warehouse`` and not in it."""
    folder = Path(shutil.copytree(warehouse, tmp_path / "second"))
    result = run_kdb("project", "--model", "tiny", "--dataset", "weather", "--warehouse", folder)
    assert result.exit_code == 0, result.output
    (measured,) = runs_of(warehouse)
    kdb.open(folder).storage.remove(measured)
    return folder


def runs_of(folder: Path) -> list[str]:
    return [found.run for found in FolderStorage(folder).run_folders()]


def card_of(hub: Hub) -> str:
    return hub.files(NAME)["README.md"].decode()


def test_what_is_pushed_and_pulled_is_the_same(
    hub: Hub, warehouse: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    pushed = run_kdb("push", URL, "--warehouse", warehouse)
    assert pushed.exit_code == 0, pushed.output
    assert "tiny on weather: pushed (run " in pushed.stdout
    back = tmp_path / "back"
    assert "copied (run " in run_kdb("pull", URL, "--warehouse", back).stdout
    assert runs_of(back) == runs_of(warehouse)
    assert "All files of 1 run" in run_kdb("verify", "--warehouse", back).stdout
    assert kdb.open(back).query("prompts").equals(kdb.open(warehouse).query("prompts"))
    assert not any("__none__" in path for path in hub.files(NAME))


def test_the_same_again_sends_and_fetches_nothing(
    hub: Hub, warehouse: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    run_kdb("push", URL, "--warehouse", warehouse)
    head = list(hub.commits[NAME])
    assert "is already there (run " in run_kdb("push", URL, "--warehouse", warehouse).stdout
    assert list(hub.commits[NAME]) == head
    run_kdb("pull", URL, "--warehouse", tmp_path / "back")
    shutil.rmtree(tmp_path / "hub-cache")
    hub.asked.clear()
    assert "is stored already (run " in run_kdb("pull", URL, "--warehouse", tmp_path / "back").stdout
    assert [path for _, path in hub.asked if path.endswith(".parquet")] == []


def test_a_push_adds_to_what_is_there_and_sends_only_what_is_new(
    hub: Hub, warehouse: Path, second: Path, run_kdb: Callable[..., Result]
) -> None:
    run_kdb("push", URL, "--license", "cc-by-4.0", "--warehouse", warehouse)
    before = hub.files(NAME)
    result = run_kdb("push", URL, "--warehouse", second)
    assert result.exit_code == 0, result.output
    after = hub.files(NAME)
    changed = {path for path in after if before.get(path) != after[path]}
    (new,) = runs_of(second)
    assert {path for path in changed if f"run={new}/" not in path} == {"README.md", "kdb.duckdb"}
    assert before.keys() <= after.keys()
    for told in (new, *runs_of(warehouse), "config_name: projections", "license: cc-by-4.0"):
        assert told in card_of(hub)


def test_two_who_push_at_once_both_keep_their_runs(
    hub: Hub, warehouse: Path, second: Path, run_kdb: Callable[..., Result]
) -> None:
    run_kdb("push", URL, "--warehouse", warehouse)
    files = hub.files(NAME)
    hub.commits.clear()
    hub.commit(NAME, {".gitattributes": b""})
    # Between the look and the commit of this push, the other run and its card arrive.
    hub.rivals = [lambda: hub.commit(NAME, files)]
    result = run_kdb("push", URL, "--warehouse", second)
    assert result.exit_code == 0, result.output
    (mine,), (theirs,) = runs_of(second), runs_of(warehouse)
    assert all(any(f"run={run}/manifest.json" in path for path in hub.files(NAME)) for run in (mine, theirs))
    assert mine in card_of(hub)
    assert theirs in card_of(hub)


def test_a_push_that_never_gets_through_says_so(hub: Hub, warehouse: Path, run_kdb: Callable[..., Result]) -> None:
    hub.commit(NAME, {".gitattributes": b""})
    hub.rivals = [lambda i=i: hub.commit(NAME, {f"note-{i}": b""}) for i in range(9)]
    result = run_kdb("push", URL, "--warehouse", warehouse)
    assert result.exit_code == 2
    assert "too many concurrent pushes" in result.stderr
    assert not any(path.startswith("lake/") for path in hub.files(NAME))


def test_what_people_write_in_the_card_stays(
    hub: Hub, warehouse: Path, second: Path, run_kdb: Callable[..., Result]
) -> None:
    run_kdb("push", URL, "--warehouse", warehouse)
    edited = (
        card_of(hub)
        .replace("tags:", "pretty_name: Depths\ntags:")
        .replace("<!-- kdb: what", "Our paper.\n\n<!-- kdb: what")
    )
    hub.commit(NAME, {"README.md": (edited + "\nCite us.\n").encode()})
    run_kdb("push", URL, "--warehouse", second)
    for text in ("pretty_name: Depths", "Our paper.", "Cite us."):
        assert card_of(hub).count(text) == 1


def test_a_pushed_dataset_is_asked_in_duckdb_without_a_download(
    hub: Hub, warehouse: Path, second: Path, run_kdb: Callable[..., Result]
) -> None:
    run_kdb("push", URL, "--warehouse", warehouse)
    run_kdb("push", URL, "--warehouse", second)
    with attaching() as shell:
        shell.execute(f"ATTACH '{hub.url}/datasets/{NAME}/resolve/main/kdb.duckdb' AS paper (READ_ONLY); USE paper")
        depths = "SELECT model, site, jump_layer, converging_layer FROM concept_depth() ORDER BY ALL"
        assert shell.execute(depths).fetchall() == kdb.open(warehouse).sql(depths).rows()
        points = "SELECT count(*) FROM projections"
        assert shell.execute(points).fetchall() == kdb.open(second).sql(points).rows()


@pytest.mark.parametrize("command", ["push", "pull"])
@pytest.mark.parametrize(
    "url", ["hf://models/lab/x", "hf://datasets/x", "s3://bucket", "hf://datasets/lab/x/lake", "lab/x"]
)
def test_what_is_no_dataset_is_refused_before_anything_is_read(
    run_kdb: Callable[..., Result], tmp_path: Path, command: str, url: str
) -> None:
    result = run_kdb(command, url, "--warehouse", tmp_path / "w")
    assert result.exit_code == 2
    assert f"Expected hf://datasets/OWNER/NAME, or hf://datasets/OWNER/NAME@REVISION, found {url!r}" in result.stderr
    assert not (tmp_path / "w").exists()


def test_refusals_of_the_hub_are_one_message_and_tell_no_token(
    hub: Hub, warehouse: Path, tmp_path: Path, run_kdb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: str | Path) -> str:
        result = run_kdb(*args)
        assert result.exit_code == 2, result.output
        assert TOKEN not in result.output
        return result.stderr

    assert "no such dataset, or you have no access" in refused("pull", URL, "--warehouse", tmp_path / "w")
    hub.commit(NAME, {".gitattributes": b""})
    assert "no such branch, tag or commit" in refused("pull", f"{URL}@v9", "--warehouse", tmp_path / "w")
    hub.read_only = True
    assert "refused access (403). Log in with `hf auth login`" in refused("push", URL, "--warehouse", warehouse)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "Log in with `hf auth login`" in refused("push", URL, "--warehouse", warehouse)
    assert list(hub.files(NAME)) == [".gitattributes"]
    assert runs_of(tmp_path / "w") == []


def test_a_hub_that_cannot_be_reached_is_said(
    hub: Hub, tmp_path: Path, run_kdb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    result = run_kdb("pull", URL, "--warehouse", tmp_path / "w")
    assert result.exit_code == 2
    assert "the hub cannot be reached" in result.stderr


def test_a_pull_takes_a_damaged_run_or_a_newer_schema_not_at_all(
    hub: Hub, warehouse: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    run_kdb("push", URL, "--warehouse", warehouse)
    (path,) = (path for path in hub.files(NAME) if "/probe_scores/" in path)
    good = hub.files(NAME)
    hub.commit(NAME, {path: good[path][:-1]})
    result = run_kdb("pull", URL, "--warehouse", tmp_path / "w")
    assert result.exit_code == 2
    assert " is damaged (" in result.stderr
    assert runs_of(tmp_path / "w") == []
    hub.commit(NAME, {**good, "warehouse.json": json.dumps({"schema_version": 99}).encode()})
    for command, where in (("pull", tmp_path / "w"), ("push", warehouse)):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(tmp_path / "hub-cache")
        if command == "push":  # something new to add
            run_kdb("project", "--model", "tiny", "--dataset", "weather", "--warehouse", warehouse)
        result = run_kdb(command, URL, "--warehouse", where)
        assert result.exit_code == 2, result.output
        assert "was written by a newer kdb (schema 99, this one knows 6). Upgrade kdb" in result.stderr


def test_a_damaged_run_is_not_pushed(hub: Hub, warehouse: Path, run_kdb: Callable[..., Result]) -> None:
    file = next(warehouse.glob("lake/model=tiny/*/*/activations/*.parquet"))
    file.write_bytes(file.read_bytes()[:-1])
    result = run_kdb("push", URL, "--warehouse", warehouse)
    assert result.exit_code == 2
    assert " is damaged: " in result.stderr
    with pytest.raises(KeyError):
        hub.files(NAME)  # not even made
