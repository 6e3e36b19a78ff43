"""Write measured rows while the next ones are measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from kdb.warehouse.staged_run import StagedRun

if TYPE_CHECKING:
    from kdb.ingest.rows import Rows


def write_behind(staged: StagedRun, measured: Iterable[tuple[str, Rows]], *, last: str, n_writers: int = 1) -> None:
    """Write rows as parts of the given names, each while the next ones are measured.

    At most ``n_writers`` writes run at once, so that memory is bounded. A part of the table ``last`` completes its
    shard, so it is written after the shard's other parts. An error of a write is raised at the next rows.
    """
    pending: deque[tuple[str, Future[None]]] = deque()
    with ThreadPoolExecutor(n_writers, thread_name_prefix="writer") as writer:
        for name, rows in measured:
            while len(pending) >= n_writers or (rows.table == last and any(of == name for of, _ in pending)):
                pending.popleft()[1].result()
            written = writer.submit(staged.write, rows.table, name, rows.groups, seconds=rows.seconds)
            pending.append((name, written))
        for _, written in pending:
            written.result()
