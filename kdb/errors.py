"""Every error that kdb raises on purpose.

A ``KdbError`` is something the user can act on: what was wrong, where, and what to do. The front doors print
it and exit with code 2; nothing else catches it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KdbError(Exception):
    """Base of all errors that are the user's to mend."""


class UnknownNameError(KdbError):
    """A model, dataset, query or run that does not exist; suggests the nearest that do."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str) -> None:
        near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
        guess = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        super().__init__(f"Unknown {kind} {name!r}.{guess} {hint}")


class DatasetError(KdbError):
    """A dataset file that is missing, unreadable or holds what a study cannot use."""


class ModelError(KdbError):
    """A model that cannot be loaded, or whose recorded states fail the checks."""


class PlanError(KdbError):
    """A plan of runs that is no plan, or asks for the same run twice."""


class WarehouseError(KdbError):
    """A folder that is not a warehouse, or cannot be read or written as one."""


class QueryError(KdbError):
    """A saved query with wrong parameters, or SQL that is refused or fails."""


class EngineError(QueryError):
    """A statement on which DuckDB fails by a fault of its own; its connection may be of no more use."""


class NothingFoundError(QueryError):
    """A question that is right, and to which this warehouse has no answer."""
