"""Texts that ask the same as a page, to be copied: a command, Python, and SQL."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from kdb.analysis.figures import FIGURES
from kdb.queries.catalogue import Param, find_query


class Way(NamedTuple):
    """One way to ask: its name, and the text to copy."""

    name: str
    text: str


def ways_to_ask(name: str, params: Mapping[str, Any]) -> list[Way]:
    """Return the command and the Python of a saved query with these parameters."""
    known = {param.name: param for param in find_query(name).params}
    return [
        Way("Command", " ".join(["kdb query", name, *_options(params, known)])),
        Way("Python", f'kdb.open("WAREHOUSE").query({_arguments(name, params, known)})'),
    ]


def ways_to_draw(name: str, params: Mapping[str, Any]) -> list[Way]:
    """Return the command and the Python of a figure with these parameters."""
    known = {param.name: param for param in FIGURES[name].params}
    python = f'figures.chart(kdb.open("WAREHOUSE"), {_arguments(name, params, known)})'
    return [
        Way("Command", " ".join(["kdb plot", name, *_options(params, known), "-o", f"{name}.svg"])),
        Way("Python", f"from kdb.analysis import figures\n\n{python}"),
    ]


def _options(params: Mapping[str, Any], known: Mapping[str, Param]) -> list[str]:
    options = []
    for name, value in params.items():
        values = value if isinstance(value, list | tuple) else [value]
        option = f"--{name.replace('_', '-')}"
        if known[name].type == "boolean":
            options += [option] if known[name].parse(values[-1]) else []
        else:
            options += [f"{option} {shlex.quote(str(one))}" for one in values]
    return options


def _arguments(name: str, params: Mapping[str, Any], known: Mapping[str, Param]) -> str:
    given = [f"{key}={_literal(value, known[key])}" for key, value in params.items()]
    return ", ".join([f'"{name}"', *given])


def _literal(value: Any, param: Param) -> str:
    parsed = param.parse(value)
    return repr(list(parsed) if isinstance(parsed, tuple) else parsed)
