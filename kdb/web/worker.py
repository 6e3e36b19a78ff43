"""A process that answers requests one after the other, and can be killed at any time.

Workers are processes, not threads. DuckDB's memory limit does not count texts that a function makes (``repeat('x',
3000000)`` took 5.9 GB under a limit of 300 MB), and such a function cannot be interrupted before it ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from kdb.errors import EngineError, KdbError, QueryError, UnknownNameError
from kdb.formats import encode
from kdb.warehouse.database import is_gone
from kdb.warehouse.limits import Limits
from kdb.warehouse.notes import KdbNote
from kdb.warehouse.statements import public_message
from kdb.warehouse.store import Warehouse
from kdb.web import answers


@dataclass(frozen=True)
class Question:
    """A request to a worker: a kind of `answers.KINDS`, its parameters, and the runs to answer from.

    A run's version changes whenever its rows change.
    """

    kind: str
    params: dict[str, Any]
    runs: tuple[str, ...] = field(repr=False)
    versions: tuple[str, ...] = field(repr=False)


HEAD, CHUNK, END, REFUSED, FAILED, EXHAUSTED = b"H", b"C", b"E", b"R", b"F", b"X"
"""First byte of each message, which says what it holds: the head, a chunk or the end of an answer, or an error."""

_PIECE = 2**16
"""Maximum bytes of a message, and so the most that the server buffers for a client that reads slowly."""

_TRIES = 5
"""Maximum attempts to answer while runs are being changed."""

_INTERNAL = "Internal error. Details are in the server's log; please report it."


def serve(connection: Connection, warehouse: Path | str, limits: Limits, folder: Path) -> None:
    """Answer requests from the connection until it is closed; DuckDB's temporary files go to the folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which finishes open answers first
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tempfile.tempdir = str(folder)
    _warm_up()
    _limit_memory(limits.memory)
    warnings.simplefilter("ignore", KdbNote)  # the client gets the notes
    opened = _Opened(Warehouse(warehouse), limits)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            for message in _answer(opened, connection.recv()):
                connection.send_bytes(message)


def _answer(opened: _Opened, question: Question) -> Iterator[bytes]:
    try:
        head, first, chunks = _begin_whole(opened, question)
        yield HEAD + json.dumps(head).encode()
        for chunk in itertools.chain([first], chunks):
            yield from (CHUNK + chunk[start : start + _PIECE] for start in range(0, len(chunk), _PIECE))
        yield END
    except EngineError as error:  # DuckDB is unusable in this process: another process replaces it
        yield FAILED + _failure(opened.public(error, question), error)
    except (KdbError, MemoryError) as error:
        if isinstance(error, MemoryError) or str(error).startswith("Out of Memory"):
            yield EXHAUSTED  # the memory is fragmented now: another worker replaces this one
            return
        answer = {"error": opened.public(error, question), "unknown": isinstance(error, UnknownNameError)}
        yield REFUSED + json.dumps(answer).encode()
    except (Exception, pl.exceptions.PanicException) as error:  # an error must not affect later requests
        yield FAILED + _failure(_INTERNAL, error)


def _failure(text: str, error: BaseException) -> bytes:
    """Return the message for the client, and the details for the server's log."""
    return json.dumps({"error": text, "details": "".join(traceback.format_exception(error))}).encode()


def _begin_whole(opened: _Opened, question: Question) -> tuple[dict[str, Any], bytes, Iterator[bytes]]:
    """Call `_begin`, and retry if a run was removed or rewritten meanwhile, so that all rows are of one state."""
    for left in reversed(range(_TRIES)):
        try:
            begun = _begin(opened, question)
        except KdbError as error:
            if not left or not (is_gone(error) or opened.changed()):
                raise
        else:
            if not opened.changed():
                return begun
        opened.refresh()
    raise QueryError("The runs of the warehouse are being changed. Retry in a moment.")


def _begin(opened: _Opened, question: Question) -> tuple[dict[str, Any], bytes, Iterator[bytes]]:
    """Return an answer's head and first chunk. Most errors occur here, before anything was sent to the client."""
    head, body = answers.KINDS[question.kind](opened.at(question), **question.params)
    chunks = iter(body)
    return head, next(chunks, b""), chunks


class _Opened:
    """The warehouse with certain runs, reopened when a request is about other runs or other versions of them."""

    def __init__(self, warehouse: Warehouse, limits: Limits) -> None:
        self.limits, self.lake = limits, warehouse.storage.local.lake
        self._warehouse = warehouse
        self._at: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self._open = contextlib.ExitStack()

    def at(self, question: Question) -> Warehouse:
        """Return the warehouse with the runs of the request."""
        if self._at != (question.runs, question.versions):
            self._open.close()
            self._frozen = self._open.enter_context(self._warehouse.unprotected_snapshot(question.runs, self.limits))
            self._at = (question.runs, question.versions)
        return self._frozen

    def public(self, error: Exception, question: Question) -> str:
        """Return the error's text without anything that the client must not see."""
        return public_message(str(error), self.lake, " ".join(map(str, question.params.values())))

    def changed(self) -> bool:
        """Whether a run was removed or rewritten since it was opened."""
        return self._at is not None and not self._frozen.unchanged()

    def refresh(self) -> None:
        """List the files of the runs again."""
        self._at = None
        self._warehouse.runs()


def _warm_up() -> None:
    """Let Polars reserve its first gigabyte of address space now, so that it does not count as a request's memory."""
    b"".join(encode(pa.table({"warm": [1]}).to_reader(), "json"))


def _limit_memory(limit: int) -> None:
    """Let the operating system refuse memory that DuckDB's own limit does not count, if the system has such a limit."""
    try:
        import resource

        status = Path("/proc/self/status").read_text()
        used = int(status.partition("VmData:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * limit + _ROOM,) * 2)
    except (ImportError, OSError, ValueError):
        return


_ROOM = 512 * 2**20
"""Extra bytes beyond twice DuckDB's limit, for thread stacks, a row group being written, and a page being made."""
