"""Unexpected errors as one line of text, with the details in a log file.

The error handlers around each command and each run of a plan call `explain`. KDB_DEBUG=1 shows the traceback too.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from kdb.text import one_line

USERS, INTERNAL, INTERRUPTED = 2, 70, 130
"""Exit codes: an error that the user can fix, an internal error, an interruption by the user."""

_LONGEST = 300
_MEMORY = {"MemoryError", "OutOfMemoryError", "OutOfMemoryException"}
"""Class names of out-of-memory errors; PyTorch and DuckDB have their own."""


@dataclass(frozen=True)
class Fault:
    """Message for an error, and the exit code of a command that ends with it."""

    message: str
    exit_code: int


def explain(error: BaseException, doing: str) -> Fault:
    """Return the message for an error while `doing` something, such as "kdb report"; may write a log file."""
    if is_interrupt(error):
        return Fault("Interrupted. Finished parts are kept. Run the same command again to resume.", INTERRUPTED)
    if known := _known(error):
        return Fault(f"{doing}: {known}", USERS)
    details = _write_details(error, doing)
    return Fault(f"Internal error in {doing}: {summary(error)}. Details are in {details}; please report it.", INTERNAL)


def is_debugging() -> bool:
    """Whether to show tracebacks: KDB_DEBUG is set, and not to 0."""
    return os.environ.get("KDB_DEBUG", "0") not in ("", "0")


def is_interrupt(error: BaseException) -> bool:
    """Whether the error is a Ctrl-C, as Python or DuckDB raises it."""
    return any(
        isinstance(one, KeyboardInterrupt)
        or type(one).__name__ == "InterruptException"
        or (isinstance(one, RuntimeError) and "interrupted" in str(one).lower())
        for one in _chain(error)
    )


def summary(error: BaseException) -> str:
    """Return the error's class and text in one line, shortened if necessary."""
    text = one_line(str(error))
    return f"{type(error).__name__}: {text[:_LONGEST]}{'…' * (len(text) > _LONGEST)}".removesuffix(": ").rstrip(".")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        following = following.__cause__


def _known(error: BaseException) -> str | None:
    """Return the message for an error of the machine or of a file, which the user can fix; None for any other."""
    if extra := missing_extra(error):
        return extra
    if type(error).__name__ in _MEMORY:
        return "not enough memory. Request less at a time, or close other programs."
    if isinstance(error, UnicodeDecodeError) or _is_from_json(error):
        return f"a file is damaged or is not text: {summary(error)}. `kdb verify` lists damaged files of a warehouse."
    if isinstance(error, OSError):
        where = f"{str(error.filename)!r}: " if error.filename else ""
        reason = error.strerror or summary(error)
        return one_line(f"{where}{reason}. Check that the path exists, its permissions, and the free space.")
    return None


EXTRAS = {
    "measure": "torch transformers accelerate sklearn scipy joblib threadpoolctl gguf rich yaml",
    "serve": "fastapi uvicorn starlette cachetools prometheus_client pydantic",
    "plot": "altair vl_convert jinja2 markupsafe scipy",
    "cloud": "boto3 fsspec obstore",
    "excel": "xlsxwriter",
}
"""Extras of the package, and the libraries that each brings: `pip install 'kdb-lm[measure]'`."""


def missing_extra(error: BaseException) -> str | None:
    """The message for a library that is not installed because its extra is not; None for any other error."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    library = error.name.partition(".")[0]
    ways = [f"`pip install 'kdb-lm[{extra}]'`" for extra, brought in EXTRAS.items() if library in brought.split()]
    return f"this needs {library}, which is not installed: {' or '.join(ways)}." if ways else None


def _is_from_json(error: BaseException) -> bool:
    """Whether the error is that of invalid or too deeply nested JSON."""
    if not isinstance(error, ValueError | RecursionError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parent.name == "json"


def _write_details(error: BaseException, doing: str) -> str:
    """Write the traceback to a new log file, and return its path."""
    now = datetime.now(UTC)
    head = (
        f"{doing}\n{now.isoformat()} kdb {version('kdb-lm')} Python {platform.python_version()} {platform.platform()}"
    )
    text = f"{head}\n\n{''.join(traceback.format_exception(error))}".encode(errors="backslashreplace")
    for folder in _folders():
        path = folder / f"kdb-{now:%Y%m%d-%H%M%S}-{os.getpid()}-{now:%f}.log"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
            return str(path)
    return "no file, because none can be written (set KDB_DEBUG=1 to show them)"


def _folders() -> Iterator[Path]:
    from platformdirs import user_log_path

    yield user_log_path("kdb", appauthor=False)
    with contextlib.suppress(OSError):  # there is no folder for temporary files
        yield Path(tempfile.gettempdir())
