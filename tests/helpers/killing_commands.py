"""Commands that change committed runs, killed (SIGKILL) at random moments while others ask.

    tally = Commands(folder, context).rounds(kills=100)

Each round begins with a small warehouse of schema 3. `compact`, `keep-vectors`, `runs remove`, `import` and `migrate`
are given in random order, and most of them are killed. Meanwhile one process asks a statement that joins six tables,
and another asks in snapshots. Every run in an answer must be as it was before or after a command that ran at the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from helpers.killing import Tally
from kdb.cli import main
from kdb.warehouse import compaction
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.manifest import run_id
from kdb.warehouse.store import Warehouse
from kdb.warehouse.vectors import activation_groups

OLD = Path(__file__).parents[1] / "warehouses/schema-3.zip"
PROMPTS, PARTS, LAYERS, WIDTH, SAMPLED = 40, 4, 3, 64, 10
KINDS = ("compact", "sampled", "none", "remove", "import", "migrate")

WHOLE = """
WITH p AS (SELECT run, count(*) AS n, sum(hash(prompt_id, text))::VARCHAR AS rows FROM prompts GROUP BY run),
a AS (
    SELECT run, count(*) AS n, sum(hash(prompt_id, layer, site, vector::FLOAT[]))::VARCHAR AS rows
    FROM activations JOIN prompts USING (run, prompt_id) GROUP BY run
),
s AS (
    SELECT run, count(*) AS n, sum(hash(layer, site, classifier, accuracy))::VARCHAR AS rows
    FROM probe_scores GROUP BY run
),
k AS (
    SELECT run, count(*) AS n, sum(hash(prompt_id, layer, neuron, score))::VARCHAR AS rows
    FROM neuron_scores GROUP BY run
),
m AS (SELECT run, count(*) AS n FROM models GROUP BY run)
SELECT run, list_sort(r.tables), p.n, p.rows, a.n, a.rows, s.n, s.rows, k.n, k.rows, m.n
FROM runs r FULL JOIN p USING (run) FULL JOIN a USING (run) FULL JOIN s USING (run) FULL JOIN k USING (run)
FULL JOIN m USING (run)
"""
"""A row for every run that any of six tables has rows of; sums that change with any of those rows."""

COUNTS = "SELECT run, count(*) AS n FROM {} GROUP BY run ORDER BY run"

Rows = dict[str, str]
"""The answer to `WHOLE`: a text for each run that it shows."""

States = dict[str, frozenset[str]]
"""The names of the states in which each run may be: absent, full, sampled, none."""


def ask(warehouse: Warehouse) -> Rows:
    """The answer to `WHOLE`."""
    return {str(run): json.dumps(rest, default=list) for run, *rest in warehouse.sql(WHOLE).rows()}


def write_source(folder: Path, models: int = 3) -> None:
    """A warehouse of small runs that can be imported: vectors in several files, and scores."""
    lake = FolderStorage.create(folder)
    for number in range(models):
        identity = {"model": f"m{number}", "dataset": "towns"}
        with lake.stage(run_id(identity), *identity.values(), identity=identity) as staged:
            staged.write_rows("models", "part", [{"family": "made", "n_layers": LAYERS, "n_params": 1000}])
            staged.write_rows("datasets", "part", [{"study": "concept", "n_prompts": PROMPTS}])
            for part, ids in enumerate(np.array_split(np.arange(PROMPTS), PARTS)):
                staged.write_rows(
                    "prompts", f"{part}", [{"prompt_id": i, "text": f"{i} of {number}"} for i in ids.tolist()]
                )
                staged.write("activations", f"part-{part:05}", vectors(ids.tolist(), number))
            scores = [
                {"layer": i, "site": "resid_post", "classifier": "logistic", "accuracy": i / 9} for i in range(LAYERS)
            ]
            staged.write_rows("probe_scores", "part", scores)
            staged.commit({"study": "concept", "variant": "default", "settings": "{}", "seed": 0, "kdb_version": "0"})


def vectors(ids: Sequence[int], seed: int) -> Iterator[pa.Table]:
    """Row groups of invented vectors."""
    invented = np.random.default_rng([seed, ids[0]]).normal(size=(len(ids), LAYERS, 1, WIDTH))
    return activation_groups(ids, ["resid_post"], invented.astype(np.float32))


# What runs beside each other -------------------------------------------------------------------------------------


def command(arguments: Sequence[str], cache: str) -> None:
    """A kdb command that says nothing, with a cache of its own."""
    os.environ["XDG_CACHE_HOME"] = cache
    compaction.SAMPLE = SAMPLED
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        main(list(arguments))


def keep_asking(warehouse: str, notes: str, cache: str, held: bool) -> None:
    """Ask until killed, and note for each answer when it was asked, when it came, and what it says."""
    os.environ["XDG_CACHE_HOME"] = cache
    again = Warehouse(warehouse)  # opened once, as a notebook does
    with Path(notes).open("ab", buffering=0) as file:  # a line is written whole, or is the last one
        turn = 0
        while True:
            asked, turn = time.monotonic(), turn + 1
            try:
                opened = again if turn % 2 else Warehouse(warehouse)
                said: object = ask_in_snapshot(opened) if held else ask(opened)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            file.write(json.dumps([asked, time.monotonic(), said]).encode() + b"\n")


def ask_in_snapshot(warehouse: Warehouse) -> Rows | str:
    """The answer, which stays the same as long as the snapshot is held, and agrees with questions about one table."""
    with warehouse.snapshot() as held:
        first = ask(held)
        for table, column in (("activations", 3), ("prompts", 1), ("probe_scores", 5)):
            counted = dict(held.sql(COUNTS.format(table)).rows())
            if counted != {run: json.loads(row)[column] for run, row in first.items() if json.loads(row)[column]}:
                return f"a snapshot counts {table} in two ways: {counted} and {first}"
        if held.runs() != sorted(held.runs(), key=held.runs().index) or set(held.runs()) != set(first):
            return f"a snapshot lists {held.runs()} and shows {sorted(first)}"
        return first if ask(held) == first else "a snapshot changed while it was held"


# What may be seen ------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """The expected answer for each run in each state, the model of each run, and the runs that an import adds."""

    rows: dict[str, dict[str, str]]
    models: dict[str, str]
    imported: frozenset[str]

    def after(self, kind: str, target: str, run: str, state: str) -> str:
        """The state of a run after a command, which is about a run (`remove`) or a model (`keep-vectors`)."""
        if kind == "import":
            return "full" if state == "absent" and run in self.imported else state
        if kind == "remove":
            return "absent" if run == target else state
        if kind in ("sampled", "none") and self.models[run] == target and self.rows[run].get(kind):
            return state if state in ("absent", "none") else kind
        return state

    def trouble(self, seen: Rows, allowed: States) -> tuple[int, int, list[str]]:
        """Rows lost, rows doubled, and what else is wrong with an answer."""
        lost, doubled, wrong = 0, 0, [f"unknown run {run}" for run in seen if run not in self.rows]
        for run, states in allowed.items():
            expected = [self.rows[run][state] for state in states - {"absent"}]
            row = seen.get(run)
            if row in expected or (row is None and "absent" in states):
                continue
            wrong.append(f"run {run}: {row}, expected one of {sorted(states)}: {expected}")
            counts = [_count(row)] + [_count(each) for each in expected or [None]]
            lost += max(0, min(counts[1:]) - counts[0])
            doubled += max(0, counts[0] - max(counts[1:]))
        return lost, doubled, wrong


def _count(row: str | None) -> int:
    return sum(cell for cell in json.loads(row)[1:] if isinstance(cell, int)) if row else 0


@dataclass
class History:
    """The possible states of the runs, each with the time since when they are possible."""

    entries: list[tuple[float, States]] = field(default_factory=list)

    def now(self, states: States) -> None:
        """From now on, these states are possible."""
        self.entries.append((time.monotonic(), states))

    @property
    def last(self) -> States:
        """The states that are possible now."""
        return self.entries[-1][1]

    def between(self, begun: float, ended: float) -> States:
        """Everything that was possible at some time between two."""
        until = [*(moment for moment, _ in self.entries[1:]), float("inf")]
        during = [
            states for (since, states), to in zip(self.entries, until, strict=True) if since <= ended and begun <= to
        ]
        return {run: frozenset().union(*(states[run] for states in during)) for run in during[0]}


# The rounds ------------------------------------------------------------------------------------------------------


@dataclass
class Commands:
    """Give commands and kill them; ``folder`` holds the warehouses."""

    folder: Path
    processes: ForkServerContext
    seed: int = 3
    tally: Tally = field(default_factory=lambda: Tally(done="commands"))
    told: Callable[[Tally], object] = lambda _: None

    def __post_init__(self) -> None:
        """Write the source of imports and the first warehouse, and learn what each command does."""
        self.random = random.Random(self.seed)
        self.source, self.old = self.folder / "source", self.folder / "old"
        write_source(self.source)
        with zipfile.ZipFile(OLD) as archive:
            archive.extractall(self.old)
        self.expected, self.seconds = self._learned()

    def rounds(self, kills: int, attempts: int = 14) -> Tally:
        """Rounds of commands until so many were killed."""
        number = 0
        while self.tally.kills < kills:
            self._round(self.folder / f"round-{number}", attempts, kills)
            self.told(self.tally)
            number += 1
        return self.tally

    def _learned(self) -> tuple[Expected, dict[str, float]]:
        """Every state of every run, from a warehouse in which nothing is killed, and the seconds of each command."""
        place, seconds = shutil.copytree(self.old, self.folder / "learned"), {}
        self._start(
            shutil.copytree(self.old, self.folder / "first"), "compact", ""
        ).join()  # starts what forks the others
        for kind in ("import", "compact", "migrate"):
            seconds[kind] = self._left_alone(place, kind)
        states = {run: {"full": row} for run, row in ask(Warehouse(place)).items()}
        models = {folder.run: folder.model for folder in FolderStorage(place).run_folders()}
        for kind in ("sampled", "none"):
            for model in sorted({*models.values()}):
                seconds[kind] = self._left_alone(place, kind, model)
            for run, row in ask(Warehouse(place)).items():
                if row != states[run]["full"]:
                    states[run][kind] = row
        seconds["remove"] = self._left_alone(place, "remove", next(iter(states)))
        imported = frozenset(Warehouse(self.source).runs())
        return Expected(states, models, imported), seconds

    def _left_alone(self, place: Path, kind: str, target: str = "") -> float:
        """The seconds of a command, and its effect on ``place``."""
        begun = time.monotonic()
        process = self._start(place, kind, target)
        process.join()
        assert process.exitcode == 0, f"kdb {kind} {target} ended with {process.exitcode}"
        return time.monotonic() - begun

    def _start(self, place: Path, kind: str, target: str) -> Any:
        arguments = {
            "compact": ["compact"],
            "sampled": ["runs", "keep-vectors", "sampled", "--model", target, "--yes"],
            "none": ["runs", "keep-vectors", "none", "--model", target, "--yes"],
            "remove": ["runs", "remove", target, "--yes"],
            "import": ["import", str(self.source)],
            "migrate": ["migrate"],
        }[kind]
        arguments = [*arguments, "--warehouse", str(place)]
        process = self.processes.Process(target=command, args=(arguments, str(self.folder / "cache")))
        process.start()
        return process

    def _round(self, place: Path, attempts: int, kills: int) -> None:
        shutil.copytree(self.old, place)
        there = set(Warehouse(self.old).runs())
        history = History()
        history.now({run: frozenset({"full" if run in there else "absent"}) for run in self.expected.rows})
        with self._readers(place, history):
            for _ in range(attempts):
                if self.tally.kills < kills:
                    self._attempt(place, history)
            for kind in ("migrate", "compact", "import"):
                self._finish(place, history, kind)
        self._check(place, history, unfinished=False)
        shutil.rmtree(place)

    def _attempt(self, place: Path, history: History) -> None:
        """Start a command, kill it at a random moment, check what is left, and half the time run the command again."""
        kind = self.random.choice(KINDS)
        target = self._target(kind, history.last)
        process, before = self._begin(place, history, kind, target)
        process.join(self.random.uniform(0, 1.1 * self.seconds[kind]))
        process.kill()
        process.join()
        self.tally.kills += process.exitcode == -signal.SIGKILL
        if process.exitcode != -signal.SIGKILL:
            self._ended(process.exitcode, history, before, kind, target)
        self._check(place, history)
        if process.exitcode == -signal.SIGKILL and self.random.random() < 0.5:
            self._finish(place, history, kind, target)

    def _target(self, kind: str, states: States) -> str:
        """A run that may be there, or a model that has one that is."""
        if kind == "remove":
            return self.random.choice([run for run, possible in sorted(states.items()) if possible != {"absent"}])
        there = {self.expected.models[run] for run, possible in states.items() if "absent" not in possible}
        return self.random.choice(sorted(there)) if kind in ("sampled", "none") else ""

    def _begin(self, place: Path, history: History, kind: str, target: str) -> tuple[Any, States]:
        before = history.last
        history.now({run: before[run] | after for run, after in self._after(before, kind, target).items()})
        return self._start(place, kind, target), before

    def _after(self, before: States, kind: str, target: str) -> States:
        return {
            run: frozenset(self.expected.after(kind, target, run, state) for state in states)
            for run, states in before.items()
        }

    def _finish(self, place: Path, history: History, kind: str, target: str = "") -> None:
        process, before = self._begin(place, history, kind, target)
        process.join()
        self._ended(process.exitcode, history, before, kind, target)

    def _ended(self, code: int, history: History, before: States, kind: str, target: str) -> None:
        """Note that a command came to its end, which is a good one unless its run was removed already."""
        self.tally.commits += 1
        gone = kind == "remove" and "absent" in before[target]
        if code not in ((0, 2) if gone else (0,)):
            self.tally.troubles.append(f"kdb {kind} {target} ended with {code}")
            return
        history.now(self._after(before, kind, target))

    def _check(self, place: Path, history: History, *, unfinished: bool = True) -> None:
        """Look at the warehouse while no command runs, and note which states are left."""
        opened = Warehouse(place)
        seen = ask(opened)
        self._hold_against(seen, history.last)
        self.tally.damaged += len(list(opened.storage.verify()))
        self.tally.troubles += [f"left in staging: {path}" for path in self._left(place, unfinished=unfinished)]
        rows = self.expected.rows
        history.now(
            {
                run: frozenset(s for s in states if (seen.get(run) == rows[run].get(s))) or states
                for run, states in history.last.items()
            }
        )

    def _left(self, place: Path, *, unfinished: bool) -> list[str]:
        """Parquet files in staging that are neither in a snapshot nor, if there may be one, of an unfinished import."""
        found = [
            Path(parent, name).relative_to(place / "staging")
            for parent, _, names in os.walk(place / "staging")
            for name in names
            if name.endswith(".parquet")
        ]
        if not unfinished:
            return [str(path) for path in found]
        tops = {path.parts[0] for path in found}
        return [top for top in tops if not top.startswith("held-") and top not in self.expected.imported]

    def _hold_against(self, seen: Rows, allowed: States) -> None:
        lost, doubled, wrong = self.expected.trouble(seen, allowed)
        self.tally.lost += lost
        self.tally.doubled += doubled
        self.tally.troubles += wrong

    @contextlib.contextmanager
    def _readers(self, place: Path, history: History) -> Iterator[None]:
        """Two processes that ask, killed in the end; then what they noted is held against what was possible."""
        readers = []
        for held in (False, True):
            arguments = (str(place), f"{place}-{held}.json", str(self.folder / f"cache-{held}"), held)
            readers.append(self.processes.Process(target=keep_asking, args=arguments))
            readers[-1].start()
        try:
            yield
        finally:
            for reader in readers:
                reader.kill()
                reader.join()
        for held in (False, True):
            self._read_notes(Path(f"{place}-{held}.json"), history)

    def _read_notes(self, notes: Path, history: History) -> None:
        for line in notes.read_bytes().splitlines(keepends=True) if notes.exists() else []:
            if line.endswith(b"\n"):
                begun, ended, said = json.loads(line)
                self.tally.reads += 1
                if isinstance(said, str):
                    self.tally.troubles.append(said)
                else:
                    self._hold_against(said, history.between(begun, ended))
