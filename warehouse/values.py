"""Checks of parameter values against the content of the warehouse, before a query runs.

Without them, an unknown name would give an empty answer, which looks like a result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import duckdb

from kdb.errors import QueryError, UnknownNameError
from kdb.queries.catalogue import Param, Value
from kdb.queries.domains import DOMAINS, Names, Numbers


def check_values(
    connection: duckdb.DuckDBPyConnection,
    params: Sequence[Param],
    values: Mapping[str, Value],
    see_all: Callable[[], None],
) -> None:
    """Refuse values that are not stored in the warehouse; they must already be set as variables.

    `see_all` makes the runs of all models visible if the connection sees only some. Raises UnknownNameError for an
    unknown name, QueryError for a number beyond the stored ones. Defaults are not checked.
    """
    for param in params:
        domain, value = DOMAINS.get(param.name), values[param.name]
        if domain is None or value is None or value == param.default:
            continue
        if isinstance(domain, Names):
            names = value if isinstance(value, tuple) else (str(value),)
            known = [*domain.fixed, *param.also]
            if domain.stored and not set(names) <= set(known):
                known = _stored(connection, domain.stored, names, known, see_all)
            check_known(param.name, names, known, domain.hint)
        elif isinstance(domain, Numbers) and domain.most:
            _check_number(connection, param, domain, value)


def check_known(kind: str, names: Iterable[str], known: Collection[str], hint: str) -> None:
    """Raise UnknownNameError for the first unknown name."""
    for name in names:
        if name not in known:
            raise UnknownNameError(kind, name, known, hint)


def _stored(
    connection: duckdb.DuckDBPyConnection,
    text: str,
    wanted: tuple[str, ...],
    known: list[str],
    see_all: Callable[[], None],
) -> list[str]:
    """Return the known names, and those that the SQL finds: in all models if the visible ones lack a name."""
    names = _names(connection, text)
    if not set(wanted) <= {*known, *names}:
        see_all()
        names = _names(connection, text)
    return [*known, *sorted(names - {*known})]


def _names(connection: duckdb.DuckDBPyConnection, text: str) -> set[str]:
    return {row[0] for row in connection.execute(text).fetchall()}


def _check_number(connection: duckdb.DuckDBPyConnection, param: Param, domain: Numbers, value: Value) -> None:
    ((most,),) = connection.execute(str(domain.most)).fetchall()
    if most is not None and isinstance(value, int) and value > most:
        raise QueryError(f"parameter {param.name}: expected an integer {domain.expected(most)}, found {value}")
