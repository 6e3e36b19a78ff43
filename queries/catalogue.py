"""The catalogue of saved queries: plain SQL files whose header comment describes the query and its parameters.

A query is named after its file. Its header reads::

    -- Title
    -- Reference to the paper
    --
    -- Description of one row, and of its columns.
    --
    -- Parameters:
    --   model
    --   limit    integer = 20      maximum number of rows
    --   prompt   integer required  prompt to show

A name alone is a parameter that queries share, declared in ``parameters.sql``. If two there have the same name, its
type follows it (``dataset texts``). Types are text, texts (one or several), integer, number and boolean (yes or no).
``= all`` means no restriction; the parameter is then NULL. ``= default|all`` has the default ``default``, and also
accepts the word ``all``. The allowed values of a parameter depend on its name (``domains.py``). The body reads each
parameter with ``getvariable('name')``; defaults are only in the header. Nothing here opens a database.

Print it: ``kdb queries``, ``kdb queries concept-depth``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from pathlib import Path

from kdb.errors import QueryError, UnknownNameError
from kdb.queries.domains import DOMAINS, LARGEST, Numbers, Spelled

Value = str | int | float | bool | tuple[str, ...] | None
"""Type of a parameter's value; None is SQL's NULL, a tuple is a list."""

FOLDER = Path(__file__).parent
ALL = "all"

_PARAM = re.compile(
    r"(?P<name>[a-z]\w*)\s+(?P<type>texts?|integer|number|boolean)\s+(?:=\s*(?P<default>\S+)|required)\s+(?P<meaning>\S.*)"
)
_VARIABLE = re.compile(r"getvariable\('(\w+)'\)")
_TABLE_MACRO = re.compile(r"^CREATE MACRO (?P<name>\w+)\([^;]*?\) AS TABLE\b.*?;\n", re.MULTILINE | re.DOTALL)
_WORD = re.compile(r"\w+")


def literal(value: Value) -> str:
    """Return a value as SQL text. All quoting of kdb is done here; values of queries are bound instead."""
    if value is None:
        return "NULL"
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


@dataclass(frozen=True)
class Param:
    """A parameter of a saved query. If it is not required, a default of None means no restriction.

    ``also`` are words that it accepts in addition to the known names.
    """

    name: str
    type: str
    default: Value
    required: bool
    meaning: str
    also: tuple[str, ...] = ()

    @property
    def shown_default(self) -> str:
        """Return the default in words."""
        if isinstance(self.default, bool):
            return _WORDS[self.default]
        return ALL if self.default is None else str(self.default)

    def parse(self, raw: object) -> Value:
        """Return the given value, from Python or as text from a command line. Raises QueryError for an invalid one.

        This does not check whether a name is stored in the warehouse.
        """
        if isinstance(raw, Iterable) and not isinstance(raw, str):
            raw = tuple(raw)
        if raw in (None, ALL, (ALL,)) and self.default is None and not self.required:
            return None
        expected, convert = _TYPES[self.type]
        try:
            value = convert(raw)
        except (TypeError, ValueError, KeyError):
            raise QueryError(f"parameter {self.name}: expected {expected}, found {raw!r}") from None
        self._check(value, expected)
        return value

    def _check(self, value: Value, expected: str) -> None:
        """Raise QueryError for a value that is invalid in any warehouse."""
        domain = DOMAINS.get(self.name)
        if isinstance(domain, Spelled) and not domain.pattern.fullmatch(str(value)):
            raise QueryError(f"parameter {self.name}: expected a name such as {domain.example}, found {value!r}")
        if isinstance(value, int) and value > LARGEST:
            raise QueryError(f"parameter {self.name}: expected {expected} up to {LARGEST}, found {value}")
        if isinstance(domain, Numbers) and isinstance(value, int | float) and not domain.holds(value):
            raise QueryError(f"parameter {self.name}: expected {expected} {domain.expected()}, found {value}")


def _text(raw: object) -> str:
    if not isinstance(raw, str) or "\0" in raw:
        raise TypeError
    raw.encode()  # raises for invalid Unicode, which DuckDB does not accept
    return raw


def _texts(raw: object) -> tuple[str, ...]:
    names = raw if isinstance(raw, tuple) else (raw,)
    if not names:
        raise ValueError
    return tuple(map(_text, names))


def _integer(raw: object) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int | str):
        raise TypeError
    return int(raw)


def _number(raw: object) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise TypeError
    if not math.isfinite(number := float(raw)):
        raise ValueError
    return number


def _boolean(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    return _YES_OR_NO[_text(raw).lower()]


_WORDS = {True: "yes", False: "no"}
_YES_OR_NO = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_TYPES: dict[str, tuple[str, Callable[[object], Value]]] = {
    "text": ("a text", _text),
    "texts": ("one or several texts", _texts),
    "integer": ("an integer", _integer),
    "number": ("a number", _number),
    "boolean": ("yes or no", _boolean),
}
"""Each type of parameter, with its name in messages, and the function that converts a value."""


@dataclass(frozen=True)
class SavedQuery:
    """One saved query. `sql` is the whole file, header included."""

    name: str
    title: str
    reference: str
    description: str
    params: tuple[Param, ...]
    sql: str
    path: Path

    @property
    def of_checkpoints(self) -> bool:
        """Whether it compares checkpoints: its parameter variant then has no revision."""
        return "checkpoints(" in self.sql

    @property
    def group(self) -> str:
        """Return the name of its folder: a study, or another subject."""
        return self.path.parent.name

    def bind(self, values: Mapping[str, object]) -> dict[str, Value]:
        """Return a value for every parameter: the given one or the default.

        Raises UnknownNameError for an unknown parameter, and QueryError for one that is missing or has the wrong type.
        """
        return bind(self.name, self.params, values)

    def shell_script(self, values: Mapping[str, object] | None = None) -> str:
        """Return SQL to paste into a DuckDB shell: the parameters as variables, then the query.

        Without ``values``, the variables are the defaults, with notes.
        """
        given = {p.name: p.default for p in self.params} if values is None else self.bind(values)
        notes = {p.name: _shell_note(p) if values is None else "" for p in self.params}
        lines = [f"SET VARIABLE {name} = {literal(value)};{notes[name]}" for name, value in given.items()]
        return "\n".join([*lines, "", self.sql])


def bind(name: str, params: Sequence[Param], values: Mapping[str, object]) -> dict[str, Value]:
    """Return a value for every parameter of the query or figure ``name``; see `SavedQuery.bind`."""
    names = [param.name for param in params]
    for unknown in (n for n in values if n not in names):
        raise UnknownNameError("parameter", unknown, names, f"{name} has the parameters {', '.join(names)}.")
    missing = [param for param in params if param.required and param.name not in values]
    if missing:
        needs = "; ".join(f"{param.name} ({param.type}: {param.meaning})" for param in missing)
        raise QueryError(f"{name} needs {needs}")
    return {p.name: p.parse(values[p.name]) if p.name in values else p.default for p in params}


def _shell_note(param: Param) -> str:
    """Return a comment with facts about a parameter that its default does not show."""
    notes = ["required"] * param.required + ["a list: ['a', 'b']"] * (param.type == "texts")
    return f" -- {param.meaning}" + (f" ({', '.join(notes)})" if notes else "")


@cache
def load_catalogue(folder: Path = FOLDER) -> Mapping[str, SavedQuery]:
    """Return all saved queries by name, grouped by study. Raises QueryError for a file with a wrong header."""
    return {path.stem: _read_query(path) for path in sorted(folder.glob("*/*.sql"))}


def find_query(name: str) -> SavedQuery:
    """Return the saved query of that name. Raises UnknownNameError with the closest names if there is none."""
    catalogue = load_catalogue()
    if name not in catalogue:
        raise UnknownNameError("query", name, catalogue, "`kdb queries` lists them.")
    return catalogue[name]


def macros(needed_by: str | None = None) -> str:
    """Return the SQL of the views and macros for saved queries and the shell.

    With `needed_by`, a statement, the SQL has only the table macros that the statement depends on: DuckDB takes 2 to
    3 ms to create each of the larger ones.
    """
    text = (FOLDER / "macros.sql").read_text(encoding="utf-8")
    if needed_by is None:
        return text
    bodies = {match["name"]: match[0] for match in _TABLE_MACRO.finditer(text)}
    needed: set[str] = set()
    unread = [_TABLE_MACRO.sub("", text), needed_by]
    while unread:
        named = (set(_WORD.findall(unread.pop())) & bodies.keys()) - needed
        needed |= named
        unread += [bodies[name] for name in named]
    return _TABLE_MACRO.sub(lambda match: match[0] if match["name"] in needed else "", text)


def neuron_sums() -> str:
    """Return the SQL that adds one part's scores to the sums of a run."""
    return (FOLDER / "neuron_sums.sql").read_text(encoding="utf-8")


def exact_sums() -> str:
    """Return the SQL that puts the sums of candidates in the place of those of a run's lists."""
    return (FOLDER / "exact_sums.sql").read_text(encoding="utf-8")


def _read_query(path: Path) -> SavedQuery:
    sql = path.read_text(encoding="utf-8")
    header = [line[2:].strip() for line in takewhile(lambda line: line.startswith("--"), sql.splitlines())]
    if "Parameters:" not in header or header.index("Parameters:") < 3 or not all(header[:2]):
        raise QueryError(f"{path}: the header needs a title, a reference, a description and 'Parameters:'")
    start = header.index("Parameters:")
    params = tuple(_param(path, number, header[number]) for number in range(start + 1, len(header)))
    body = "\n".join(sql.splitlines()[len(header) :])
    _check_names(path, [param.name for param in params], set(_VARIABLE.findall(body)))
    title, reference, *description = header[:start]
    return SavedQuery(path.stem, title, reference, " ".join(description).strip(), params, sql, path)


def _param(path: Path, number: int, line: str) -> Param:
    """The parameter on a header line: one that queries share and that is named here, or one declared here."""
    name, _, type_ = line.partition(" ")
    if type_.strip() in ("", *_TYPES):
        for shared in _shared_params():
            if shared.name == name and type_.strip() in ("", shared.type):
                return shared
    return _read_param(path, number, line)


def shared_param(name: str) -> Param:
    """Return the parameter of that name that queries share."""
    return next(param for param in _shared_params() if param.name == name)


@cache
def _shared_params() -> tuple[Param, ...]:
    """The parameters that are declared once, in ``parameters.sql``."""
    path = FOLDER / "parameters.sql"
    header = [line[2:].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    start = header.index("Parameters:")
    return tuple(_read_param(path, number, header[number]) for number in range(start + 1, len(header)))


def _read_param(path: Path, number: int, line: str) -> Param:
    """Return the parameter declared on a header line; `number` counts lines from 0."""
    match = _PARAM.fullmatch(line)
    if match is None:
        expected = (
            "expected the name of a parameter in parameters.sql, or 'name text|texts|integer|number|boolean = default "
            "meaning' or '… required meaning'"
        )
        raise QueryError(f"{path}, line {number + 1}: {expected}, found {line!r}")
    name, type_, default, meaning = match.group("name", "type", "default", "meaning")
    if default is None:
        return Param(name, type_, None, True, meaning)
    default, *also = default.split("|")
    param = Param(name, type_, None, False, meaning, tuple(also))
    return replace(param, default=param.parse(default))


def _check_names(path: Path, declared: list[str], used: set[str]) -> None:
    """Raise QueryError unless header and body name the same parameters; otherwise one would silently be NULL."""
    problems = [f"{name!r} is declared twice" for name in sorted(set(declared)) if declared.count(name) > 1]
    problems += [f"{name!r} is declared but not used" for name in sorted(set(declared) - used)]
    problems += [f"{name!r} is used but not declared" for name in sorted(used - set(declared))]
    if problems:
        raise QueryError(f"{path}: " + "; ".join(problems))
