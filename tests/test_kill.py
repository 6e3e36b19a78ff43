"""Ingest, and commands that change committed runs, killed (SIGKILL) at random moments while readers query.

The processes are forked from one that has imported torch already, so that the moments fall into an ingest's work
and not into its imports. Which steps of a commit a kill can hit is enumerated in test_lake.py; here it is chance.
"""

from __future__ import annotations

from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from helpers.killing import Writers, kill_writers
from helpers.killing_commands import Commands

from kdb.ingest.concept.probing import probing
from kdb.ingest.settings import Probing
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

KILLS = 12


def finished_parts(warehouse: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every finished part of the run, in progress or committed."""
    parts = {}
    for path in [*warehouse.glob("staging/*/*/*.parquet"), *warehouse.glob("lake/model=tiny/*/*/*/*.parquet")]:
        if path.stem != "all":
            stat = path.stat()
            parts[f"{path.parent.name}/{path.stem}"] = (stat.st_ino, stat.st_mtime_ns)
    return parts


def made_true_by(part: str) -> str:
    """The part of its stage's last table: it is written last, and without it the stage's shard is written again."""
    table, name = part.split("/")
    lasts = {table: stage.tables[-1] for stage in probing(Probing(), seed=0) for table in stage.tables}
    lasts |= {"zero_shot": "activations"}
    return f"{'datasets' if name == 'texts' else lasts.get(table, table)}/{name}"


class Watched(Writers):
    """Writers of which none may write again what a killed one had finished."""

    before: dict[str, tuple[int, int]] = {}  # noqa: RUF012  # set anew for each, never changed
    resumed = 0

    def start(self, warehouse: str, machine: int = 0) -> Any:
        self.check(warehouse)
        self.resumed += "activations/part-00000" in self.before
        return super().start(warehouse, machine)

    def check(self, warehouse: str) -> None:
        """Compare what is finished now with what was when the last writer began."""
        after = finished_parts(Path(warehouse))
        changed = {part for part, stat in self.before.items() if after.get(part, stat) != stat}
        assert {part for part in changed if made_true_by(part) in self.before} == set()
        self.before = after


def test_a_killed_ingest_resumes_to_the_same_rows_and_no_reader_notices(
    tmp_path: Path, processes: ForkServerContext, tiny_model: Path, user_dataset: Path
) -> None:
    writers = Watched(processes, tiny_model, user_dataset, lambda number: str(tmp_path / f"{number}"), tmp_path)
    tally = kill_writers(writers, KILLS)
    assert tally.sound, tally.troubles
    assert tally.reads > 0
    assert writers.resumed > 0  # else every kill came before the first part
    for warehouse in tmp_path.glob("[0-9]*"):
        assert Warehouse(warehouse).storage.local.staging.unfinished_runs() == []


def test_commands_that_are_killed_lose_nothing_and_no_reader_notices(
    tmp_path: Path, processes: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tally = Commands(tmp_path, processes).rounds(kills=8, attempts=12)
    assert tally.sound, tally.troubles
    assert tally.reads > 0
