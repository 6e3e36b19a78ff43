"""A process that answers questions one after the other, and can be killed in the middle of one.

Processes, not threads: DuckDB's memory limit does not count the texts that a function makes (``repeat('x', 3000000)``
took 5.9 GB under a limit of 300 MB), and such a function looks at no interrupt until it has ended.
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
from kdb.warehouse.database import Limits, is_gone
from kdb.warehouse.notes import KdbNote
from kdb.warehouse.statements import public_message
from kdb.warehouse.store import Warehouse
from kdb.web import answers


@dataclass(frozen=True)
class Question:
    """What is asked: a kind of `answers.KINDS`, its parameters, and the runs that the answer is about.

    A run's version changes whenever its rows do.
    """

    kind: str
    params: dict[str, Any]
    runs: tuple[str, ...] = field(repr=False)
    versions: tuple[str, ...] = field(repr=False)


HEAD, CHUNK, END, REFUSED, FAILED, EXHAUSTED = b"H", b"C", b"E", b"R", b"F", b"X"
"""First byte of each message: of an answer the head, its chunks and the end; or why there is none."""

_PIECE = 2**16
"""Bytes of a message at most: the server holds no more for a client that reads slowly."""

_TRIES = 5
"""How often a question is asked while runs are being changed."""

_INTERNAL = "Internal error. Details are in the server's log; please report it."


def serve(connection: Connection, warehouse: Path | str, limits: Limits, folder: Path) -> None:
    """Answer what comes over the connection until it is closed; spill into the folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's: it lets answers end first
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tempfile.tempdir = str(folder)
    _warm_up()
    _limit_memory(limits.memory)
    warnings.simplefilter("ignore", KdbNote)  # whoever asks is told of them
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
    except EngineError as error:  # DuckDB is of no more use to this process: another takes its place
        yield FAILED + _failure(opened.public(error, question), error)
    except (KdbError, MemoryError) as error:
        if isinstance(error, MemoryError) or str(error).startswith("Out of Memory"):
            yield EXHAUSTED  # what is left of the memory is in pieces: another worker takes this one's place
            return
        said = {"error": opened.public(error, question), "unknown": isinstance(error, UnknownNameError)}
        yield REFUSED + json.dumps(said).encode()
    except (Exception, pl.exceptions.PanicException) as error:  # one question must not take the next ones with it
        yield FAILED + _failure(_INTERNAL, error)


def _failure(told: str, error: BaseException) -> bytes:
    """The message to the client, and the details for the server's log."""
    return json.dumps({"error": told, "details": "".join(traceback.format_exception(error))}).encode()


def _begin_whole(opened: _Opened, question: Question) -> tuple[dict[str, Any], bytes, Iterator[bytes]]:
    """As `_begin`, again where a run was removed or written anew meanwhile: all rows are of before, or of after."""
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
    raise QueryError("The runs of the warehouse are changed all the time: ask again in a moment.")


def _begin(opened: _Opened, question: Question) -> tuple[dict[str, Any], bytes, Iterator[bytes]]:
    """An answer's head, and its first chunk: what fails, fails here mostly, while it can still be said."""
    head, body = answers.KINDS[question.kind](opened.at(question), **question.params)
    chunks = iter(body)
    return head, next(chunks, b""), chunks


class _Opened:
    """The warehouse with some runs, opened anew when other runs, or other versions of them, are asked about."""

    def __init__(self, warehouse: Warehouse, limits: Limits) -> None:
        self.limits, self.lake = limits, warehouse.lake.root
        self._warehouse = warehouse
        self._at: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self._open = contextlib.ExitStack()

    def at(self, question: Question) -> Warehouse:
        """The warehouse as it was with the runs of the question."""
        if self._at != (question.runs, question.versions):
            self._open.close()
            self._frozen = self._open.enter_context(self._warehouse.unheld(question.runs, self.limits))
            self._at = (question.runs, question.versions)
        return self._frozen

    def public(self, error: Exception, question: Question) -> str:
        """The error's text as the client may read it."""
        return public_message(str(error), self.lake, " ".join(map(str, question.params.values())))

    def changed(self) -> bool:
        """Whether a run was removed or written anew since it was opened."""
        return self._at is not None and not self._frozen.unchanged()

    def refresh(self) -> None:
        """Look anew which files the runs have."""
        self._at = None
        self._warehouse.runs()


def _warm_up() -> None:
    """Let Polars reserve its first gigabyte of addresses now, so that it is not counted against a question."""
    b"".join(encode(pa.table({"warm": [1]}).to_reader(), "json"))


def _limit_memory(limit: int) -> None:
    """Let the operating system refuse what DuckDB's own limit overlooks. Nothing, where there is no such limit."""
    try:
        import resource

        status = Path("/proc/self/status").read_text()
        used = int(status.partition("VmData:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * limit + _ROOM,) * 2)
    except (ImportError, OSError, ValueError):
        return


_ROOM = 512 * 2**20
"""Bytes beyond twice DuckDB's limit: stacks of threads, a row group being written, a page being made."""
