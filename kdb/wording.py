"""Messages in the words of Python: kdb's errors name options of its commands, which functions do not have.

with python_words():
    ...  # an error says "Use `answer_tokens='all'`", not "Use --answer-tokens all"
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from kdb.errors import KdbError
from kdb.faults import missing_extra

_COMMANDS = {
    "`kdb queries`": "`Warehouse.queries()`",
    "`kdb plot --help`": "`Warehouse.figures()`",
    "`kdb runs`": "`Warehouse.query('runs')`",
    "`kdb schema`": "`Warehouse.tables()`",
    "`kdb ingest`": "`kdb.ingest()`",
}
"""Commands that have a function of their own."""

_VALUES = (
    r"'[^']*'|(?:int8|float\d+|bfloat16|cpu|auto|all|last|subject|zero|mean|resample|pair|exact|atp|relp|noising"
    r"|denoising|logit|tuned)\b"
)
"""Values of options: quoted ones, and words that are one in every message."""

_QUOTE = "'"

_QUERY = re.compile(r"`kdb query ([a-z-]+)`")

_OPTION = re.compile(
    r"(?P<code>`[^`]*`)"
    rf"|(?<![^\s(])--(?P<name>[a-z]+(?:-[a-z]+)*)(?: (?P<value>{_VALUES}))?"
)
"""An option outside code, with the value that follows it."""


@contextlib.contextmanager
def python_words() -> Iterator[None]:
    """Raise the errors of the block in the words of Python; the command line shows ``error.shell``, the original.

    A library that is not installed becomes a KdbError that says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if extra := missing_extra(error):
            raise KdbError(extra[0].upper() + extra[1:]) from error
        raise
    except KdbError as error:
        error.shell = error.shell or str(error)
        error.args = (in_python(str(error)),)
        raise


def in_python(message: str) -> str:
    """Return a message with its options as keywords: "--answer-tokens all" is "`answer_tokens='all'`"."""
    return _OPTION.sub(_keyword, _QUERY.sub(r"`Warehouse.query('\1')`", message))


def _keyword(match: re.Match[str]) -> str:
    if code := match["code"]:
        return _COMMANDS.get(code, code)
    name, value = match["name"].replace("-", "_"), match["value"]
    return f"`{name}`" if value is None else f"`{name}='{value.strip(_QUOTE)}'`"
