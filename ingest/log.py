"""Print the log of a measurement as lines on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

from kdb.text import visible


class ToStderr(logging.Handler):
    """Prints lines in which untrusted names cannot send escape sequences, after ``reworded`` has changed them.

    A display of progress may replace ``sys.stderr``, so it is looked up for each line.
    """

    def __init__(self, reworded: Callable[[str], str] = str) -> None:
        super().__init__()
        self._reworded = reworded

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        print(visible(self._reworded(self.format(record))), file=sys.stderr, flush=True)


@contextlib.contextmanager
def logged(reworded: Callable[[str], str]) -> Iterator[None]:
    """Print what kdb logs in the block, unless the program prints or records its log itself."""
    logger = logging.getLogger("kdb")
    if logger.hasHandlers():
        yield
        return
    handler, level = ToStderr(reworded), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
