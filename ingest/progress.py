"""Progress of long work: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger(__name__)

_LOG_EVERY = 10.0
"""Seconds between two lines in a log."""


class Progress:
    """Counter of finished work; ``total`` and ``done`` are in ``unit``."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self._bar = tqdm(
            desc=what,
            total=total,
            unit=f" {unit}",
            initial=done,
            disable=not sys.stderr.isatty(),
            leave=False,
        )
        self._what, self._total, self._unit = what, total, unit
        self._first = self._done = done
        self._begun = self._logged = time.monotonic()

    def advance(self, n: int) -> None:
        """Count ``n`` more."""
        self._bar.update(n)
        self._done += n
        if self._bar.disable and time.monotonic() - self._logged > _LOG_EVERY:
            self._logged = time.monotonic()
            rate = (self._done - self._first) / (self._logged - self._begun)
            left = (self._total - self._done) / rate
            log.info(
                "%s: %d of %d %s, %.1f/s, %.0f s left",
                *(self._what, self._done, self._total, self._unit, rate, left),
            )

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self._bar.close()


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show the progress of ``what`` while the block runs; ``done`` is the part that was finished before."""
    shown = Progress(what, total, unit, done)
    try:
        yield shown
    finally:
        shown.close()
