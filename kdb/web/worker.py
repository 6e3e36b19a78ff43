"""A process that answers questions one after the other, and can be killed in the middle of one.

Processes, not threads: DuckDB's memory limit does not count the texts that a function makes (``repeat('x', 3000000)``
took 5.9 GB under a limit of 300 MB), and such a function looks at no interrupt until it has ended.
"""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdb.errors import KdbError, UnknownNameError
from kdb.formats import encode
from kdb.warehouse.database import Limits, is_gone
from kdb.warehouse.notes import KdbNote
from kdb.warehouse.store import Warehouse
from kdb.web import answers


@dataclass(frozen=True)
class Question:
    """What is asked: a kind of `answers.KINDS`, its parameters, and the runs that the answer is about."""

    kind: str
    params: dict[str, Any]
    runs: tuple[str, ...] = field(repr=False)


HEAD, CHUNK, END, REFUSED, FAILED, EXHAUSTED = b"H", b"C", b"E", b"R", b"F", b"X"
"""First byte of each message: of an answer the head, its chunks and the end; or why there is none."""


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
        try:
            head, first, chunks = _begin(opened, question)
        except KdbError as error:
            if not is_gone(error):
                raise
            opened.refresh()  # a run was compacted meanwhile: it has other files now, and the same rows
            head, first, chunks = _begin(opened, question)
        yield HEAD + json.dumps(head).encode()
        yield CHUNK + first
        for chunk in chunks:
            yield CHUNK + chunk
        yield END
    except (KdbError, MemoryError) as error:
        if isinstance(error, MemoryError) or str(error).startswith("Out of Memory"):
            yield EXHAUSTED  # what is left of the memory is in pieces: another worker takes this one's place
            return
        text = str(error).replace(str(opened.lake), "lake")
        yield REFUSED + json.dumps({"error": text, "unknown": isinstance(error, UnknownNameError)}).encode()
    except Exception as error:  # one question that fails must not take the next ones with it
        yield FAILED + json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()


def _begin(opened: _Opened, question: Question) -> tuple[dict[str, Any], bytes, Iterator[bytes]]:
    """An answer's head, and its first chunk: what fails, fails here mostly, while it can still be said."""
    head, body = answers.KINDS[question.kind](opened.at(question.runs), **question.params)
    chunks = iter(body)
    return head, next(chunks, b""), chunks


class _Opened:
    """The warehouse with some runs, opened anew when other runs are asked about."""

    def __init__(self, warehouse: Warehouse, limits: Limits) -> None:
        self.limits, self.lake = limits, warehouse.lake.root
        self._warehouse = warehouse
        self._runs: tuple[str, ...] | None = None
        self._open = contextlib.ExitStack()

    def at(self, runs: tuple[str, ...]) -> Warehouse:
        """The warehouse as it was with these runs."""
        if runs != self._runs:
            self._open.close()
            self._frozen = self._open.enter_context(self._warehouse.snapshot(list(runs), self.limits))
            self._runs = runs
        return self._frozen

    def refresh(self) -> None:
        """Look anew which files the runs have."""
        self._runs = None
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
