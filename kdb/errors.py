"""Every error that kdb raises on purpose.

A ``KdbError`` is something that the user can act on: it says what was wrong, where, and what to do. The command line
and the server report it, the former with exit code 2; nothing else catches it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the sentence that suggests the closest of the known names, after a space; empty if none is close."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


class KdbError(Exception):
    """Base of all errors that the user can fix.

    ``shell`` is the message for the command line, if it differs from that for Python (``kdb/wording.py``).
    """

    shell: str | None = None


class UnknownNameError(KdbError):
    """A model, dataset, query or run that does not exist; suggests the closest existing names."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str) -> None:
        super().__init__(f"Unknown {kind} {name!r}.{did_you_mean(name, known)} {hint}")


class DatasetError(KdbError):
    """A dataset file that is missing, unreadable, or has contents that a study cannot use."""


class ModelError(KdbError):
    """A model that cannot be loaded, or whose recorded states fail the checks."""


class PlanError(KdbError):
    """A plan of runs that is invalid, or lists the same run twice."""


class WarehouseError(KdbError):
    """A folder that is not a warehouse, or cannot be read or written as one."""


class QueryError(KdbError):
    """A saved query with wrong parameters, or SQL that is refused or fails."""


class EngineError(QueryError):
    """An internal error of DuckDB; the connection may be unusable afterwards."""


class NothingFoundError(QueryError):
    """A valid query for which the warehouse holds no data."""
