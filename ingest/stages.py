"""Carry out a run, which is a list of stages.

    outcome = carry_out(storage, PlannedRun(...), engine)

A stage writes rows of some tables. Its work is divided into shards; each shard is one part of each of these tables. The
runner alone opens the staged run, skips complete shards, asks the engine to map the stage over the others, writes each
part while the next ones are measured, and commits. So an interrupted run resumes with the first missing shard, and a
study only defines its stages.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import pyarrow as pa

from kdb.errors import KdbError
from kdb.ingest.execution.writer import write_behind
from kdb.ingest.progress import LOADING, phase, progress
from kdb.ingest.rows import Rows
from kdb.ingest.speed import calibrated, learn
from kdb.warehouse.manifest import RunFolder, run_id
from kdb.warehouse.migration import upgraded
from kdb.warehouse.parquet import read_parts
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.staged_run import StagedRun
from kdb.warehouse.storage import Storage

if TYPE_CHECKING:
    from kdb.ingest.cost import Cost
    from kdb.ingest.models.find import LoadedModel, ModelSource

log = logging.getLogger(__name__)

Advance = Callable[[int], None]
"""Adds finished work to the display of progress."""

S_co = TypeVar("S_co", covariant=True)
S = TypeVar("S")
T = TypeVar("T")

LAYOUT = 3
"""Version of the division of runs into shards. A staged run of another version starts again from the beginning."""


@dataclass(frozen=True)
class Shard:
    """One part of a stage's work: ``name`` names its part in every table, ``work`` specifies what to measure.

    ``size`` is its amount of work in the display of progress.
    """

    name: str
    work: Any = None
    size: int = 1


class Loaded(Protocol):
    """An object that holds a model in memory."""

    @property
    def loaded(self) -> LoadedModel:
        """The model."""


class Subject(Protocol[S_co]):
    """Prompts or interventions of one run, before the model is loaded; picklable, since it is sent to workers."""

    @property
    def source(self) -> ModelSource:
        """The model that the run measures."""

    def bind(self, loaded: LoadedModel, batch_tokens: int | None) -> S_co:
        """Combine the subject with its model, as the functions of the stages take it."""


Work = Callable[[S, Shard, Advance], Iterator[T]]
"""A function that measures one shard of a subject on its model. It is defined in a module, so workers can import it."""


@dataclass(frozen=True)
class ModelStage(Generic[S]):
    """A stage that needs the model. ``rows`` yields the rows of a shard table by table, in the order of ``tables``."""

    tables: tuple[str, ...]
    shards: Callable[[RunInProgress], Sequence[Shard]]
    rows: Work[S, Rows]
    shown: tuple[str, str | None] | None = None
    """Title of the progress display, and the unit of a shard's size, or None for work that is not counted."""
    announce: Callable[[RunInProgress], Cost | None] = lambda _run: None
    """Called before the first shard is measured, to return the estimated cost of this stage and those after it."""


@dataclass(frozen=True)
class StoredStage:
    """A stage that computes from stored tables, without a model.

    ``read`` returns the inputs of all shards, and is called once; ``rows`` computes one shard from them. If
    ``n_jobs(inputs)`` is more than one, so many shards are computed in parallel, each in its own process.
    """

    tables: tuple[str, ...]
    shards: Callable[[RunInProgress], Sequence[Shard]]
    rows: Callable[[Any, Shard], Sequence[Rows]]
    read: Callable[[RunInProgress], Any] = lambda run: run
    n_jobs: Callable[[Any], int] = lambda _inputs: 1
    shown: tuple[str, str | None] | None = None


Stage = ModelStage[Any] | StoredStage


class Engine(Protocol):
    """Maps work over shards, in this process or on the workers of a cluster."""

    def map(
        self, work: Work[S, T], subject: Subject[S], shards: Iterable[Shard], advance: Advance
    ) -> Iterator[tuple[Shard, T]]:
        """Yield every result of the work, with its shard. The results of one shard keep their order.

        The model is loaded when it is first needed. Raises ModelError if it cannot be loaded, or fails.
        """

    def __enter__(self) -> Self:
        """Start using the engine."""

    def __exit__(self, *_: object) -> None:
        """Release the workers."""


@dataclass(frozen=True)
class PlannedRun:
    """Specification of a run for the runner.

    ``columns`` are those of its row in ``runs`` that the runner does not fill in itself. ``prepare`` returns the
    subject (None if no stage needs a model) and the stages. It is called only if the run is not stored yet, and checks
    the input before anything is measured. A run that is computed from another run, its ``source``, copies the tables
    ``copied`` from it.
    """

    identity: Mapping[str, Any]
    model: str
    dataset: str
    columns: Mapping[str, Any]
    prepare: Callable[[], tuple[Subject[Any] | None, Sequence[Stage]]]
    source: RunFolder | None = None
    copied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Id of a run, and its ``status``: 'committed', or 'exists' if it was stored before."""

    run: str
    status: str


def carry_out(storage: Storage, planned: PlannedRun, engine: Engine | None = None) -> Outcome:
    """Measure a run and commit it; do nothing if it is stored already.

    Raises DatasetError, ModelError or WarehouseError. Finished shards stay in staging, and the same run resumes there.
    """
    begun, run = time.monotonic(), run_id(planned.identity)
    with storage.stage(run, planned.model, planned.dataset, identity=planned.identity) as staged:
        if staged.committed:
            return Outcome(run, "exists")
        if staged.facts.get("layout") != LAYOUT:
            staged.restart(layout=LAYOUT)
        with phase("Preparing the run"):
            subject, stages = planned.prepare()
        in_progress = RunInProgress(staged, subject, engine, planned.source, begun)
        try:
            for stage in [*map(_copying, planned.copied), *stages]:
                in_progress.complete(stage)
        except KdbError:
            if {part.parent.name for part in staged.path.rglob("*.parquet")} <= set(planned.copied):
                staged.restart()  # nothing is measured, so nothing was interrupted
            raise
        in_progress.learn()
        with phase("Storing the run"):
            staged.commit({**planned.columns, **_versions(staged, with_model=subject is not None)})
    return Outcome(run, "committed")


def _versions(staged: StagedRun, *, with_model: bool) -> dict[str, Any]:
    """The columns of ``runs`` that name the versions and the device that computed a run.

    A run that is computed here is not marked as imported, even if its source run was imported.
    """
    libraries = ("torch", "transformers")
    return {
        "kdb_version": importlib.metadata.version("kdb-lm"),
        **{f"{name}_version": importlib.metadata.version(name) if with_model else None for name in libraries},
        "device": staged.facts.get("device", "cpu"),
        **dict.fromkeys(("imported_from", "imported_at", "preferred")),
    }


class RunInProgress:
    """A staged run, its subject, the engine that runs its model, and its source run, if it has one."""

    def __init__(
        self,
        staged: StagedRun,
        subject: Subject[Any] | None,
        engine: Engine | None,
        source: RunFolder | None,
        begun: float,
    ) -> None:
        """``begun``: when the run began, on the monotonic clock, in seconds."""
        self.staged, self._subject, self._engine, self._source = staged, subject, engine, source
        self._expected: Cost | None = None
        self._begun = {LOADING: begun}
        """When each phase began whose time is estimated, in the order of the phases."""

    def files(self, table: str) -> list[Path]:
        """The files of a table from earlier stages; if there are none, those of the source run."""
        own = self.staged.parts(table)
        return own if own or self._source is None else table_files(self._source.path, table)

    def table(self, name: str) -> pa.Table:
        """The rows of a table from earlier stages; if there are none, those of the source run."""
        return read_parts(self.files(name))

    @property
    def device(self) -> str:
        """The device on which the model of the run was first loaded; loads it if that is still to come."""
        return str(self.remembered("device", self._load))

    def remembered(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a JSON value that is made once per run: a resumed run reads it, even with other memory or device."""
        if name not in self.staged.facts:
            self.staged.remember(**{name: make()})
        return self.staged.facts[name]

    def once(self, work: Work[Any, T], shard: Shard) -> T:
        """Return the one result of work on the model that writes no table, such as the free memory."""
        engine, subject = self._with_model()
        [(_shard, result)] = engine.map(work, subject, [shard], lambda _n: None)
        return result

    def is_complete(self, stage: Stage, shard: Shard) -> bool:
        """Whether a shard is stored. Its part of the stage's last table is written last, so that part is looked for."""
        return self.staged.has(stage.tables[-1], shard.name)

    def complete(self, stage: Stage) -> None:
        """Measure and write all shards of a stage that are not complete."""
        shards = stage.shards(self)
        missing = [shard for shard in shards if not self.is_complete(stage, shard)]
        if not missing:
            return
        if isinstance(stage, ModelStage):
            self.remembered("device", self._load)
            self._expect(stage.announce(self), resumed=len(missing) < len(shards))
        if stage.shown is None:
            self._write(stage, self._measured(stage, missing, lambda _n: None))
            return
        what, unit = stage.shown
        if self._expected and what in self._expected.phases:
            self._begun.setdefault(what, time.monotonic())
        total, left = (sum(shard.size for shard in some) for some in (shards, missing))
        with phase(what) if unit is None else progress(what, total, unit, done=total - left) as shown:
            self._write(stage, self._measured(stage, missing, shown.advance))

    def _expect(self, cost: Cost | None, *, resumed: bool) -> None:
        """Print the estimated cost of the stages that follow."""
        if cost is not None:
            log.info("%s on %s: %s", self.staged.model, self.staged.dataset, calibrated(cost).after(LOADING))
            self._expected = None if resumed else cost

    def learn(self) -> None:
        """Compare the time that each phase took with its estimate, for the estimates of later runs."""
        if self._expected:
            ends = [*list(self._begun.values())[1:], time.monotonic()]
            took = {name: end - begun for (name, begun), end in zip(self._begun.items(), ends, strict=True)}
            learn(self._expected, took)

    def _write(self, stage: Stage, measured: Iterator[tuple[str, Rows]]) -> None:
        n_writers = 4 if str(self.staged.facts.get("device")).startswith("cuda") else 1
        write_behind(self.staged, measured, last=stage.tables[-1], n_writers=n_writers)

    def _measured(self, stage: Stage, missing: Sequence[Shard], advance: Advance) -> Iterator[tuple[str, Rows]]:
        if isinstance(stage, ModelStage):
            engine, subject = self._with_model()
            for shard, rows in engine.map(stage.rows, subject, missing, advance):
                yield shard.name, rows
            return
        inputs = stage.read(self)
        begun = time.monotonic()
        for shard, tables in _computed(stage.rows, inputs, missing, stage.n_jobs(inputs)):
            for rows in tables:
                # Shards may be computed in parallel, so the time between two of them is counted, not the time of each.
                yield shard.name, Rows(rows.table, rows.groups, time.monotonic() - begun)
                begun = time.monotonic()
            advance(shard.size)

    def _load(self) -> str:
        return self.once(_device, Shard("loading"))

    def _with_model(self) -> tuple[Engine, Subject[Any]]:
        if self._engine is None or self._subject is None:
            raise AssertionError("a stage needs the model, and the run has none")
        return self._engine, self._subject


def _computed(
    rows: Callable[[Any, Shard], Sequence[Rows]], inputs: Any, shards: Sequence[Shard], n_jobs: int
) -> Iterator[tuple[Shard, Sequence[Rows]]]:
    """Yield the rows of every shard, in the order of the shards, as soon as they are ready."""
    if n_jobs == 1:
        yield from ((shard, rows(inputs, shard)) for shard in shards)
        return
    from kdb.ingest.execution.processes import mapped  # joblib, and with it NumPy and SciPy

    yield from zip(shards, mapped(rows, inputs, shards, n_jobs), strict=True)


def single(name: str = "part") -> Callable[[RunInProgress], list[Shard]]:
    """Return the ``shards`` function of a stage whose work is a single shard."""
    return lambda _run: [Shard(name)]


def _copying(table: str) -> StoredStage:
    """Build the stage that copies a table of the source run, in the current schema."""

    def rows(run: RunInProgress, _shard: Shard) -> list[Rows]:
        return [Rows(table, [upgraded(table, run.table(table), run.staged.dataset)])]

    return StoredStage((table,), single(), rows)


def _device(subject: Loaded, _shard: Shard, _advance: Advance) -> Iterator[str]:
    yield str(subject.loaded.device)
