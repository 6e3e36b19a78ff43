"""Where a model runs: in this process, or on the workers of a cluster (``cluster.py``).

What the model is asked is the same in both, and so is who writes: the process that was told to ingest. It hands out
shards of prompts, and writes the rows that come back while the next are computed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import pyarrow as pa

from kdb.ingest.models.guard import told
from kdb.warehouse.lake import StagedRun

if TYPE_CHECKING:
    from kdb.ingest.job import Job
    from kdb.ingest.models.find import LoadedModel

Advance = Callable[[int], None]
"""Told how much more is done."""


@dataclass(frozen=True)
class Shard:
    """Prompts that are measured together: a part of every table. ``size`` is what progress counts."""

    name: str
    prompts: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Rows:
    """Rows of a table, each Arrow table a row group, and the seconds that it took to measure them."""

    table: str
    groups: list[pa.Table]
    seconds: float


class Worker(Protocol):
    """A model and a job: whatever of the job needs the model. Loads the model when it is first needed."""

    def device(self) -> str:
        """Where the model runs."""

    def check(self) -> Rows:
        """The rows of ``checks``. Raises ModelError for a model that fails."""

    def measure(self, prompts: Sequence[int], advance: Advance) -> Iterator[Rows]:
        """The rows of a shard, table by table, and the table last that tells that all are there."""


class Engine(Protocol):
    """Runs workers. ``question`` is the name of a worker's method."""

    def ask(self, job: Job, question: str, *arguments: Any) -> Any:
        """What a worker answers."""

    def measure(self, job: Job, shards: Iterable[Shard], advance: Advance) -> Iterator[tuple[str, Rows]]:
        """The rows of every shard with its name, those of one in the worker's order; shards in any order."""

    def __enter__(self) -> Self:
        """Ready to be asked."""

    def __exit__(self, *_: object) -> None:
        """Let go of the workers."""


_FIRST = ("device", "check")
"""Questions for which the model is loaded, and runs for the first time: whatever is odd about it shows here."""


class Here:
    """One worker, in this process."""

    def __init__(self, load: Callable[[], LoadedModel], batch_tokens: int | None = None) -> None:
        self._load, self._batch_tokens = load, batch_tokens
        self._at: tuple[Job, Worker] | None = None

    def ask(self, job: Job, question: str, *arguments: Any) -> Any:
        """Answer of the worker. Raises ModelError where the model fails before anything is measured."""
        worker = self._worker(job)
        with told(f"{job.source.name} cannot be run") if question in _FIRST else contextlib.nullcontext():
            return getattr(worker, question)(*arguments)

    def measure(self, job: Job, shards: Iterable[Shard], advance: Advance) -> Iterator[tuple[str, Rows]]:
        """The rows of one shard after the other."""
        for shard in shards:
            for rows in self._worker(job).measure(shard.prompts, advance):
                yield shard.name, rows

    def _worker(self, job: Job) -> Worker:
        if self._at is None or self._at[0] is not job:
            self._at = job, make_worker(job, self._load, self._batch_tokens)
        return self._at[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._at = None


def make_worker(job: Job, load: Callable[[], LoadedModel], batch_tokens: int | None) -> Worker:
    """The worker of the job's study."""
    # Here and not above: a worker imports torch, and who hands out the work may have none.
    if job.study == "knowledge":
        from kdb.ingest.attribution.study import Attributor

        return Attributor(job, load, batch_tokens)
    from kdb.ingest.concept.capturer import Capturer

    return Capturer(job, load, batch_tokens)


def timed(table: str, groups: list[pa.Table], begun: float) -> Rows:
    """Rows that were measured since ``begun``, by the monotonic clock."""
    return Rows(table, groups, time.monotonic() - begun)


def write_behind(staged: StagedRun, measured: Iterable[tuple[str, Rows]]) -> None:
    """Write rows as parts of the given names, in their order, each while the next are computed.

    At most one write is under way, so that memory is bounded. Raises what a write raises, at the next rows.
    """
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        for name, rows in measured:
            if pending is not None:
                pending.result()
            pending = writer.submit(staged.write, rows.table, name, rows.groups, seconds=rows.seconds)
        if pending is not None:
            pending.result()


def write_part(staged: StagedRun, rows: Rows, name: str = "part") -> None:
    """Write the rows of one part of a table, most often its only one."""
    staged.write(rows.table, name, rows.groups, seconds=rows.seconds)
