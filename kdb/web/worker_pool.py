"""A pool of worker processes that answer questions within limits.

A question waits while all workers are busy; when too many wait, it is turned away. A worker that exceeds a limit, or
whose client has left, is killed, and another takes its place.
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
from kdb.warehouse.database import Limits
from kdb.web import worker
from kdb.web.metrics import BUSY, REPLACED
from kdb.web.worker import Question


class BusyError(Exception):
    """All workers are busy and too many questions wait."""


class FailedError(Exception):
    """A worker failed in a way that is not the asker's fault; `details` are for the server's log."""

    def __init__(self, told: str, details: str = "") -> None:
        super().__init__(told)
        self.details = details


@dataclass(frozen=True)
class Settings:
    """What the service may use: workers, DuckDB's memory and threads for each, seconds for a question, waiting ones."""

    workers: int = 2
    memory: int = 2**30
    threads: int = 1
    seconds: float = 30.0
    queue: int = 64


class Answer:
    """The head of an answer, and its body as it is computed. Whoever takes one must close it."""

    def __init__(
        self, head: dict[str, Any], chunks: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]
    ) -> None:
        self.head = head
        self._chunks, self._close, self._closed = chunks, close, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The chunks of the body. Raises FailedError where the rest cannot be computed, QueryError beyond a limit."""
        async for chunk in self._chunks:
            yield chunk
        await self.close()

    async def close(self) -> None:
        """Let go of the worker; a body that was not read to its end is given up."""
        if not self._closed:
            self._closed = True
            await self._close()


class WorkerPool:
    """Worker processes for one warehouse; use it in an ``async with`` statement."""

    def __init__(self, warehouse: Path | str, settings: Settings) -> None:
        self._warehouse, self.settings = warehouse, settings
        self._context = multiprocessing.get_context("forkserver")
        # A worker is then forked in milliseconds from a process that has imported all that it needs.
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
        """Take a question to a worker; returns when the answer's first bytes are there.

        Raises KdbError for what the asker can mend, a limit included, BusyError when no worker is free for long, and
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
        said = json.loads(content)
        if kind == worker.FAILED:
            raise FailedError(said["error"], said["details"])
        raise RefusedError(said["error"], unknown=said["unknown"])

    async def _turn(self) -> _Worker:
        try:
            # Longer than a question may take: whoever waits for that long would have left.
            async with asyncio.timeout(2 * self.settings.seconds):
                hired = await self._free.get()
        except TimeoutError:
            raise BusyError from None
        if hired.process.is_alive():
            BUSY.inc()
            return hired
        await self._replace(hired)  # the operating system was short of memory, say
        return await self._turn()

    async def _chunks(self, hired: _Worker) -> AsyncIterator[bytes]:
        while True:
            kind, content = await self._receive(hired)
            if kind == worker.END:
                return
            if kind != worker.CHUNK:  # the answer has begun: all that is left is to break it off
                raise FailedError(json.loads(content)["error"])
            yield content

    async def _receive(self, hired: _Worker, question: Question | None = None) -> tuple[bytes, bytes]:
        message = await self._in_thread(hired.receive, question, self.settings.seconds)
        if message is None:
            raise QueryError(
                f"The answer takes more than the {self.settings.seconds:g} s that a question may take: "
                "ask for fewer rows, or of one model"
            )
        if message == b"" and (number := await self._in_thread(hired.signal)) not in _SHORT_OF_MEMORY:
            raise FailedError(
                "The process that answered this question has died: ask for something else, or report it",
                f"a worker died of signal {number}",
            )
        if message in (b"", worker.EXHAUSTED):
            raise QueryError(
                f"The answer needs more than the {self.settings.memory / 2**20:.0f} MiB of memory that a question may "
                "use: ask for fewer rows, or of one model"
            )
        return message[:1], message[1:]

    async def _done(self, hired: _Worker) -> None:
        """Take the worker back; one that is still at work is replaced."""
        BUSY.dec()
        if hired.quiet:
            self._free.put_nowait(hired)
        else:
            REPLACED.inc()
            await self._replace(hired)

    async def _replace(self, hired: _Worker) -> None:
        self._dismiss(hired)
        # Shielded and held: whoever asked may have left, and been cancelled.
        hiring = asyncio.ensure_future(self._hire_anew())
        self._hiring.add(hiring)
        hiring.add_done_callback(self._hiring.discard)
        await asyncio.shield(hiring)

    async def _hire_anew(self) -> None:
        with contextlib.suppress(RuntimeError):  # the service is being stopped
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
"""Signals that end a process where memory is short: from the system, or from its own allocator."""
_BURIAL = 5.0
"""Seconds to wait for the exit code of a process whose connection has closed."""


class RefusedError(QueryError):
    """What a worker refuses; ``unknown`` where it is a name that does not exist."""

    def __init__(self, text: str, *, unknown: bool) -> None:
        super().__init__(text)
        self.unknown = unknown


class _Worker:
    """A process, and the connection to it. ``quiet``: nothing is under way, so it can be asked again."""

    def __init__(self, process: ForkServerProcess, connection: Connection, folder: Path) -> None:
        self.process, self.connection, self.folder = process, connection, folder
        self.quiet = True

    def receive(self, question: Question | None, seconds: float) -> bytes | None:
        """Ask, if there is a question; the next message, None where none comes in time, empty where it has died.

        Blocks, but not for long once the process is killed.
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
        """The signal that the process died of; 0 where it ended in another way."""
        self.process.join(_BURIAL)
        return -(self.process.exitcode or 0)
