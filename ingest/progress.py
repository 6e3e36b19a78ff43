"""Progress of long work: on a terminal or in a notebook a line that moves, in a log a line a phase and one a minute.

with phase("Loading smollm2-135m"): ...
with progress("Attributing", 319, "prompts") as shown: shown.advance(1)
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import Progress as Display
from rich.progress import ProgressColumn, SpinnerColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from kdb.numbers import duration
from kdb.text import visible

log = logging.getLogger(__name__)

LOG_EVERY = 60.0
"""Seconds between two lines about a phase in a log."""

LOADING, CAPTURING, FITTING, ATTRIBUTING = "Loading", "Capturing activations", "Fitting probes", "Attributing"
"""Titles of the phases whose time is estimated; all that comes before the second one of a run belongs to the first."""

_BAR = 20
"""Columns of a bar."""

_displays: list[Display] = []
"""The display, while a phase is in progress; phases inside a phase add lines to it."""


class Progress:
    """Finished work of a phase; ``total`` and ``done`` are in ``unit``, and ``total`` is None if nothing is counted."""

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._before, self._begun = done, time.monotonic()

    def advance(self, n: int) -> None:
        """Count ``n`` more."""
        self.done += n

    def __str__(self) -> str:
        """Finished work, rate and remaining time; before any work is finished, the time so far."""
        took = time.monotonic() - self._begun
        if self.total is None:
            return duration(took)
        counted, fresh = f"{self.done:,} of {self.total:,} {self.unit}", self.done - self._before
        if not fresh:
            return f"{counted}, {duration(took)}"
        rate = f"{fresh / took:,.1f}/s" if fresh > took else f"{took / fresh:,.1f} s each"
        return f"{counted}, {rate}, {duration((self.total - self.done) * took / fresh)} left"


@contextmanager
def progress(what: str, total: int | None, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show the progress of ``what`` while the block runs; ``done`` is the part that was finished before."""
    shown = Progress(what, total, unit, done)
    with _moving(shown) if sys.stderr.isatty() or _in_notebook() else _in_log(shown):
        yield shown


def phase(what: str) -> AbstractContextManager[Progress]:
    """Show that ``what`` is in progress while the block runs, and how long it has taken."""
    return progress(what, None, "")


# On a terminal, in a notebook ------------------------------------------------------------------------------------


def _in_notebook() -> bool:
    """Whether rich can draw in a notebook, for which it needs ipywidgets."""
    return Console().is_jupyter and importlib.util.find_spec("ipywidgets") is not None


class _What(ProgressColumn):
    """The name of a phase."""

    def render(self, task: Task) -> Text:
        return Text(visible(task.fields["shown"].what))


class _Bar(ProgressColumn):
    """The share of a phase's work that is finished."""

    def render(self, task: Task) -> ProgressBar | Text:
        shown: Progress = task.fields["shown"]
        return Text() if shown.total is None else ProgressBar(shown.total or 1, shown.done, width=_BAR)


class _State(ProgressColumn):
    """The numbers of a phase."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["shown"]), style="dim")


@contextmanager
def _moving(shown: Progress) -> Iterator[None]:
    """Draw a line that is drawn anew ten times a second, by a thread, and removed in the end."""
    if _displays:
        task = _displays[0].add_task("", shown=shown)
        try:
            yield
        finally:
            _displays[0].remove_task(task)
        return
    columns = (SpinnerColumn(), *(column(Column(no_wrap=True)) for column in (_What, _Bar, _State)))
    with Display(*columns, console=Console(stderr=True), transient=True) as display:
        _displays.append(display)
        display.add_task("", shown=shown)
        try:
            yield
        finally:
            _displays.clear()


# In a log --------------------------------------------------------------------------------------------------------


@contextmanager
def _in_log(shown: Progress) -> Iterator[None]:
    """Log a line now, and one a minute from a thread."""
    log.info("%s%s", shown.what, "" if shown.total is None else f": {shown.total - shown.done:,} {shown.unit}")
    over = threading.Event()
    ticking = threading.Thread(target=_log_until, args=(shown, over), name="progress", daemon=True)
    ticking.start()
    try:
        yield
    finally:
        over.set()
        ticking.join()


def _log_until(shown: Progress, over: threading.Event) -> None:
    while not over.wait(LOG_EVERY):
        log.info("%s: %s", shown.what, shown)
