"""Run stages on a Ray cluster: each worker holds the model, and measures one shard after the other.

    with Cluster("10.0.0.1:6379") as cluster, cluster.engine(source, settings) as engine:
        ingest_on(storage, job, engine)

If a worker dies, another one measures its shard again. Workers return rows to the ingesting process, and only this
process writes to the warehouse.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from kdb.errors import KdbError, ModelError
from kdb.ingest.models.find import ModelSource
from kdb.ingest.models.load import load_model
from kdb.ingest.stages import Advance, Shard, Subject, Work

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

TRIES = 3
"""Attempts at a shard before its run fails: the shard itself may kill the workers, by its memory."""

PATIENCE = 300.0
"""Seconds without a worker after which a run fails."""


@dataclass(frozen=True)
class Needs:
    """CPUs and GPUs of a worker. By default, one GPU if the cluster has any, else all CPUs of its smallest node."""

    cpus: int | None = None
    gpus: int | None = None


class Cluster:
    """A connection to a Ray cluster, or to a new local one; use it in a ``with`` statement.

    Raises KdbError if Ray is not installed, the address has no cluster, or no node has enough CPUs or GPUs.
    """

    def __init__(self, address: str | None = None, needs: Needs | None = None) -> None:
        self._address, self._needs = address, needs or Needs()

    def __enter__(self) -> Self:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise KdbError("--engine ray needs Ray: `pip install 'kdb-lm[ray]'`.") from None
        if self._address:
            _refuse_silence(self._address)
        own: dict[str, Any] = {} if self._address else {"include_dashboard": False}
        try:
            ray.init(self._address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except (Exception, SystemExit) as error:
            raise KdbError(
                f"Cannot use the Ray cluster at {self._address!r}: {str(error).rstrip('.')}. If it requires a token, "
                "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless the token is in ~/.ray."
            ) from error
        try:
            self.resources, self.places = _places(ray.nodes(), self._needs)
        except KdbError:
            ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()

    def engine(self, source: ModelSource, settings: Mapping[str, Any], batch_tokens: int | None = None) -> Workers:
        """Return an engine whose workers load this model with these settings, when they are first needed."""
        return Workers(self, source, settings, batch_tokens)


def _refuse_silence(address: str) -> None:
    """Raise KdbError if nothing listens at the address; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise KdbError(
            f"There is no Ray cluster at {address!r} ({error}): give --address HOST:PORT as `ray start --head` prints "
            "it, or leave it out to use only this machine."
        ) from None


def _places(nodes: Sequence[Mapping[str, Any]], needs: Needs) -> tuple[dict[str, int], int]:
    """Return the resources of a worker, and the number of workers that the nodes have room for."""
    have = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = needs.gpus if needs.gpus is not None else int(any(node.get("GPU") for node in have))
    able = [node for node in have if node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= (needs.cpus or 1)]
    if not able:
        raise KdbError(
            f"No node of the cluster has {needs.cpus or 1} CPUs and {gpus} GPUs for a worker: give a smaller "
            "--worker-cpus or --worker-gpus."
        )
    cpus = needs.cpus or (1 if gpus else int(min(node["CPU"] for node in able)))
    n_workers = sum(
        int(min(node["CPU"] // cpus, node["GPU"] // gpus if gpus else node["CPU"] // cpus)) for node in able
    )
    return {"num_cpus": cpus, "num_gpus": gpus}, n_workers


@dataclass(frozen=True)
class _Task:
    """One shard, the work to do on it, and the number of attempts so far."""

    work: Work[Any, Any]
    shard: Shard
    begun: int = 0


class Workers:
    """An engine (`kdb.ingest.stages.Engine`) whose workers are actors of Ray; use it in a ``with`` statement."""

    def __init__(
        self, cluster: Cluster, source: ModelSource, settings: Mapping[str, Any], batch_tokens: int | None
    ) -> None:
        self._cluster, self._source, self._settings, self._batch_tokens = cluster, source, settings, batch_tokens
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, tuple[Any, _Task]] = {}
        self._sent: tuple[Subject[Any], Any] | None = None
        self._failed = 0

    def map(
        self, work: Work[S, T], subject: Subject[S], shards: Iterable[Shard], advance: Advance
    ) -> Iterator[tuple[Shard, T]]:
        """Yield the results of each shard, in the order in which workers finish."""
        for task, results in self._results(subject, [_Task(work, shard) for shard in shards]):
            for result in results:
                yield task.shard, result
            advance(task.shard.size)

    def _results(self, subject: Subject[Any], tasks: Iterable[_Task]) -> Iterator[tuple[_Task, list[Any]]]:
        import ray

        waiting = deque(tasks)
        while waiting or self._busy:
            self._hire(len(waiting))
            while waiting and self._idle:
                actor, task = self._idle.pop(), waiting.popleft()
                reference = actor.measure.remote(self._reference(subject), task.work, task.shard)
                self._busy[reference] = actor, replace(task, begun=task.begun + 1)
            done, _ = ray.wait([*self._busy, *self._starting], timeout=PATIENCE)
            if not done and not self._busy:
                raise KdbError(f"The cluster started no worker in {PATIENCE:.0f} s: check its nodes.")
            for reference in done:
                if reference in self._starting:
                    self._started(reference)
                    continue
                actor, task = self._busy.pop(reference)
                results = self._results_of(reference, actor, task)
                if results is None:
                    waiting.appendleft(task)
                else:
                    yield task, results[0]

    def _hire(self, wanted: int) -> None:
        """Start as many workers as the cluster has room for and the shards need."""
        there = len(self._idle) + len(self._busy) + len(self._starting)
        for _ in range(min(wanted + len(self._busy), self._cluster.places) - there):
            actor = _actor(self._cluster.resources).remote(
                self._source, dict(self._settings), self._batch_tokens, self._cluster.resources["num_cpus"]
            )
            self._starting[actor.load.remote()] = actor

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        if self._outcome(reference) is None:
            self._failed += 1
            if self._failed >= TRIES:
                raise KdbError(f"Workers die while loading {self._source.name}: check that nodes have enough memory.")
            return
        self._idle.append(actor)

    def _results_of(self, reference: Any, actor: Any, task: _Task) -> tuple[Any] | None:
        """Return the worker's results; None if it died and the task must be done again."""
        results = self._outcome(reference)
        if results is not None:
            self._idle.append(actor)
            return results
        what = task.shard.name
        if task.begun >= TRIES:
            raise KdbError(
                f"{task.begun} workers died at {what} of {self._source.name}, perhaps for lack of memory. Give a "
                "smaller --batch-tokens, or more resources to each worker with --worker-cpus. Finished shards are kept."
            )
        log.warning("A worker died; another one measures %s again.", what)
        return None

    def _outcome(self, reference: Any) -> tuple[Any] | None:
        """Return an actor's results, or None if it or its node is gone. Raises the errors that kdb raised there."""
        import ray

        try:
            kind, results = ray.get(reference)
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.NodeDiedError) as error:
            log.debug("A worker died: %s", error)
            return None
        if kind == "refused":
            raise ModelError(results)
        return (results,)

    def _reference(self, subject: Subject[Any]) -> Any:
        """Return a reference to the subject, which is sent to the cluster once."""
        import ray

        if self._sent is None or self._sent[0] is not subject:
            self._sent = subject, ray.put((uuid.uuid4().hex, subject))
        return self._sent[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in [*self._idle, *self._starting.values(), *(actor for actor, _task in self._busy.values())]:
            with contextlib.suppress(Exception):  # the actor may be dead, or the cluster gone
                ray.kill(actor)


class Holder:
    """State of a worker process: the model, and the subject that it measured last.

    Methods return ('done', results) or ('refused', message), since not every exception can be pickled.
    """

    def __init__(self, source: ModelSource, settings: dict[str, Any], batch_tokens: int | None, n_threads: int) -> None:
        self._source, self._settings, self._batch_tokens, self._n_threads = source, settings, batch_tokens, n_threads
        self._held: tuple[str, Any] = ("", None)

    def load(self) -> tuple[str, Any]:
        """Load the model, and return the id of this process."""
        import torch

        torch.set_num_threads(self._n_threads)
        try:
            self._loaded = load_model(self._source, **self._settings)
        except Exception as error:
            return "refused", _message_of(error)
        return "done", os.getpid()

    def measure(self, sent: tuple[str, Subject[Any]], work: Work[Any, Any], shard: Shard) -> tuple[str, Any]:
        """Return the results of the work on one shard of the subject."""
        key, subject = sent
        try:
            if self._held[0] != key:
                self._held = key, subject.bind(self._loaded, self._batch_tokens)
            return "done", list(work(self._held[1], shard, lambda _n: None))
        except Exception as error:
            return "refused", _message_of(error)


def _message_of(error: Exception) -> str:
    return str(error) if isinstance(error, KdbError) else f"A worker failed: {type(error).__name__}: {error}"


def _actor(resources: Mapping[str, int]) -> Any:
    """Return a new class of actors with these resources, since an actor class belongs to one connection."""
    import ray

    return ray.remote(Holder).options(**resources, max_restarts=0, max_task_retries=0)
