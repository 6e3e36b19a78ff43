"""A pool of worker processes that answer requests within limits.

A request waits while all workers are busy; if too many wait, it is refused. A worker that exceeds a limit, or whose
client has disconnected, is killed and replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import multiprocessing
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from kdb.errors import QueryError
from kdb.warehouse.limits import Limits
from kdb.web import worker
from kdb.web.metrics import BUSY, REPLACED
from kdb.web.worker import Question


class BusyError(Exception):
    """All workers are busy and too many requests wait."""


class FailedError(Exception):
    """A worker failed for a reason that the client did not cause; `details` are for the server's log."""

    def __init__(self, text: str, details: str = "") -> None:
        super().__init__(text)
        self.details = details


@dataclass(frozen=True)
class Settings:
    """Limits of the server: workers, DuckDB's memory and threads in each, seconds per request, waiting requests."""

    workers: int = 2
    memory: int = 2**30
    threads: int = 1
    seconds: float = 30.0
    queue: int = 64


class Answer:
    """The head of an answer, and its body as a stream. The caller must close it."""

    def __init__(
        self, head: dict[str, Any], chunks: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]
    ) -> None:
        self.head = head
        self._chunks, self._close, self._closed = chunks, close, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the chunks of the body. Raises FailedError if computing the rest fails, QueryError beyond a limit."""
        async for chunk in self._chunks:
            yield chunk
        await self.close()

    async def close(self) -> None:
        """Release the worker; the rest of a body that was not read to its end is discarded."""
        if not self._closed:
            self._closed = True
            await self._close()


class WorkerPool:
    """Worker processes for one warehouse; use it in an ``async with`` statement."""

    def __init__(self, warehouse: Path | str, settings: Settings) -> None:
        self._warehouse, self.settings = warehouse, settings
        self._context = multiprocessing.get_context("forkserver")
        # A worker is then forked in milliseconds from a process that has already imported everything.
        self._context.set_forkserver_preload(["kdb.web.worker"])
        self._free: asyncio.Queue[_Worker] = asyncio.Queue()
        self._all: set[_Worker] = set()
        self._hiring: set[asyncio.Future[None]] = set()
        self._threads = ThreadPoolExecutor(settings.workers + 1, thread_name_prefix="pool")

    async def __aenter__(self) -> WorkerPool:
        self._folder = Path(tempfile.mkdtemp(prefix="kdb-serve-"))
        for _ in range(self.settings.workers):
            self._free.put_nowait(await self._in_thread(self._hire))
        return self

    async def __aexit__(self, *_: object) -> None:
        for hired in list(self._all):
            self._dismiss(hired)
        self._threads.shutdown(wait=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def ask(self, question: Question) -> Answer:
        """Send a request to a worker; returns when the answer's first bytes have arrived.

        Raises KdbError for errors that the client can fix, including limits, BusyError if no worker becomes free, and
        FailedError.
        """
        hired = await self._turn()
        answered = False
        try:
            kind, content = await self._receive(hired, question)
            if kind == worker.HEAD:
                answered = True
                return Answer(json.loads(content), self._chunks(hired), functools.partial(self._done, hired))
        finally:
            if not answered:
                await self._done(hired)
        answer = json.loads(content)
        if kind == worker.FAILED:
            raise FailedError(answer["error"], answer["details"])
        raise RefusedError(answer["error"], unknown=answer["unknown"])

    async def _turn(self) -> _Worker:
        try:
            # Longer than the time limit of a request: no client waits that long.
            async with asyncio.timeout(2 * self.settings.seconds):
                hired = await self._free.get()
        except TimeoutError:
            raise BusyError from None
        if hired.process.is_alive():
            BUSY.inc()
            return hired
        await self._replace(hired)  # for example, the operating system was out of memory
        return await self._turn()

    async def _chunks(self, hired: _Worker) -> AsyncIterator[bytes]:
        while True:
            kind, content = await self._receive(hired)
            if kind == worker.END:
                return
            if kind != worker.CHUNK:  # the answer has begun: it can only be aborted
                raise FailedError(json.loads(content)["error"])
            yield content

    async def _receive(self, hired: _Worker, question: Question | None = None) -> tuple[bytes, bytes]:
        message = await self._in_thread(hired.receive, question, self.settings.seconds)
        if message is None:
            raise QueryError(
                f"The query exceeds the time limit of {self.settings.seconds:g} s. "
                "Request fewer rows, or only one model."
            )
        if message == b"" and (number := await self._in_thread(hired.signal)) not in _SHORT_OF_MEMORY:
            raise FailedError(
                "The worker process of this request ended unexpectedly. Change the query, or report it.",
                f"a worker died of signal {number}",
            )
        if message in (b"", worker.EXHAUSTED):
            raise QueryError(
                f"The query exceeds the memory limit of {self.settings.memory / 2**20:.0f} MiB. "
                "Request fewer rows, or only one model."
            )
        return message[:1], message[1:]

    async def _done(self, hired: _Worker) -> None:
        """Return the worker to the pool; one that is still busy is replaced."""
        BUSY.dec()
        if hired.quiet:
            self._free.put_nowait(hired)
        else:
            REPLACED.inc()
            await self._replace(hired)

    async def _replace(self, hired: _Worker) -> None:
        self._dismiss(hired)
        # Shielded and referenced: the client's task may have been cancelled.
        hiring = asyncio.ensure_future(self._hire_anew())
        self._hiring.add(hiring)
        hiring.add_done_callback(self._hiring.discard)
        await asyncio.shield(hiring)

    async def _hire_anew(self) -> None:
        with contextlib.suppress(RuntimeError):  # the server is stopping
            self._free.put_nowait(await self._in_thread(self._hire))

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _hire(self) -> _Worker:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        ours, theirs = self._context.Pipe()
        limits = Limits(self.settings.memory, self.settings.threads)
        process = self._context.Process(
            target=worker.serve, args=(theirs, self._warehouse, limits, folder), daemon=True, name="kdb-worker"
        )
        process.start()
        theirs.close()
        hired = _Worker(process, ours, folder)
        self._all.add(hired)
        return hired

    def _dismiss(self, hired: _Worker) -> None:
        self._all.discard(hired)
        hired.process.kill()
        shutil.rmtree(hired.folder, ignore_errors=True)


_SHORT_OF_MEMORY = (signal.SIGKILL, signal.SIGABRT)
"""Signals that end a process that is out of memory: from the system, or from its own allocator."""
_BURIAL = 5.0
"""Seconds to wait for the exit code of a process whose connection has closed."""


class RefusedError(QueryError):
    """A request that a worker refuses; ``unknown`` if it has a name that does not exist."""

    def __init__(self, text: str, *, unknown: bool) -> None:
        super().__init__(text)
        self.unknown = unknown


class _Worker:
    """A process, and the connection to it. ``quiet``: it is idle and can take a request."""

    def __init__(self, process: ForkServerProcess, connection: Connection, folder: Path) -> None:
        self.process, self.connection, self.folder = process, connection, folder
        self.quiet = True

    def receive(self, question: Question | None, seconds: float) -> bytes | None:
        """Send the request, if any, and return the next message: None after a timeout, empty if the process has ended.

        Blocks, but returns soon after the process is killed.
        """
        self.quiet = False
        try:
            if question is not None:
                self.connection.send(question)
            end = time.monotonic() + seconds
            while not self.connection.poll(min(1.0, max(0.0, end - time.monotonic()))):
                if time.monotonic() >= end:
                    return None
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            return b""
        self.quiet = message[:1] in (worker.END, worker.REFUSED)
        return message

    def signal(self) -> int:
        """Return the signal that ended the process; 0 if it ended in another way."""
        self.process.join(_BURIAL)
        return -(self.process.exitcode or 0)
