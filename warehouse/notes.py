"""Notes about an answer: which runs it leaves out, apart from runs that were measured again.

Two models, or a measured and an imported run, may be stored under the same name. An answer shows one of them
(`current_runs` in ``queries/macros.sql``). A note says so: it is a Python warning, which the command line prints and
the server sends as a header.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb

from kdb.queries.catalogue import SavedQuery, Value
from kdb.wording import in_python


class KdbNote(UserWarning):
    """A note about an answer, in the words of Python; ``shell`` is the note for the command line and the server."""

    def __init__(self, shell: str) -> None:
        super().__init__(in_python(shell))
        self.shell = shell


_ALIKE = """
SELECT count(DISTINCT (model, revision)) = count(DISTINCT model) AND count(*) FILTER (standing != 2) = 0
FROM known_runs
"""
"""SQL that is true if all runs were measured here and each name stands for one model, so that no notes are needed."""

_SHADOWED = """
SELECT model, reason, count(DISTINCT (dataset, run)) AS n, list_sort(list(DISTINCT revision[:12])) AS revisions
FROM shadowed_runs
WHERE among(model, $model) AND among(dataset, $dataset) AND ($study IS NULL OR study = $study)
    AND ($variant IS NULL OR CASE WHEN $checkpoints THEN without_revision(variant) ELSE variant END = $variant)
GROUP BY model, reason
ORDER BY model, reason
"""

_OTHER_VARIANTS = """
SELECT model, list_sort(list(DISTINCT variant)) AS variants,
    bool_or(CASE WHEN $checkpoints THEN without_revision(variant) ELSE variant END = $variant) AS shown
FROM known_runs
WHERE among(dataset, $dataset) AND ($study IS NULL OR study = $study)
GROUP BY model
ORDER BY model
"""
"""SQL for the models of a study, with their variants, and whether the one that was asked for is among them."""

_MIXED = """
SELECT model, list_sort(list(DISTINCT revision[:12])) AS revisions
FROM known_runs
WHERE revision = shown_revision AND NOT contains(variant, 'revision=')
    AND among(model, $model) AND among(dataset, $dataset) AND ($study IS NULL OR study = $study)
GROUP BY model
HAVING count(DISTINCT revision) > 1
ORDER BY model
"""

_VARIANTS = """
SELECT DISTINCT variant
FROM runs
WHERE among(model, $model) AND among(dataset, $dataset) AND ($study IS NULL OR study = $study)
ORDER BY variant
"""

_EFFECTS = """
SELECT DISTINCT
    concat_ws(' ', '--effect-method', method, '--replacement', replacement, '--role', role, '--direction', direction)
FROM effects JOIN runs USING (model, dataset, run)
WHERE among(model, $model) AND among(dataset, $dataset) AND variant = $variant
ORDER BY ALL
"""

_LENSES = """
SELECT DISTINCT '--lens ' || lens
FROM lens_readouts JOIN runs USING (model, dataset, run)
WHERE among(model, $model) AND among(dataset, $dataset) AND variant = $variant
ORDER BY ALL
"""

_STORED = {
    ("effect_method", "replacement", "role", "direction"): (_EFFECTS, "No effects are stored: use `kdb patch`"),
    ("lens",): (_LENSES, "No lens readouts are stored: use `kdb lens`"),
}
"""Parameters that choose what was measured, with SQL for their stored values, and the note if there are none."""

_MOST = 5
"""Maximum number of notes about one answer."""

_NEAREST = 2
"""Number of stored combinations of options that a note names, those with the fewest changes first."""


def notes(connection: duckdb.DuckDBPyConnection, saved: SavedQuery, values: Mapping[str, Value]) -> list[str]:
    """Return notes about the answer to a saved query, one sentence each; none if one run was chosen by its id."""
    if "variant" not in values or values.get("run"):
        return []
    asked = {name: _several(values.get(name)) for name in ("model", "dataset")}
    about = {**asked, "study": _study(saved, values)}
    variant = values["variant"] if values["variant"] != "all" else None
    filters = {**about, "variant": variant, "checkpoints": saved.of_checkpoints}
    notes = _models_left_out(connection, filters) if variant is not None and asked["model"] is None else []
    if _rows(connection, _ALIKE) == [(True,)]:
        return notes
    notes += [_shadowed(*row) for row in _rows(connection, _SHADOWED, filters)]
    if variant is None:
        notes += [_mixed(*row) for row in _rows(connection, _MIXED, about)]
    return _at_most(notes)


def _models_left_out(connection: duckdb.DuckDBPyConnection, filters: Mapping[str, object]) -> list[str]:
    """Return a note that names the models without a run of the variant, if others have one."""
    chosen = {name: filters[name] for name in ("dataset", "study", "variant", "checkpoints")}
    rows = _rows(connection, _OTHER_VARIANTS, chosen)
    others = [f"{model} ({', '.join(variants[:_NEAREST])})" for model, variants, shown in rows if not shown]
    if not others or len(others) == len(rows):
        return []
    named = ", ".join(others[:_MOST]) + (f" and {len(others) - _MOST} more" if len(others) > _MOST else "")
    return [f"Not shown, without a run of the variant {chosen['variant']!r}: {named}. --variant chooses another."]


def _at_most(notes: list[str]) -> list[str]:
    more = [f"The same applies to {len(notes) - _MOST} more models."] if len(notes) > _MOST else []
    return notes[:_MOST] + more


def notes_on_current(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Return notes about an answer from schema `current`: the runs of all models and datasets that it leaves out."""
    if _rows(connection, _ALIKE) == [(True,)]:
        return []
    every = dict.fromkeys(("model", "dataset", "study")) | {"variant": "default", "checkpoints": False}
    return _at_most([_shadowed(*row) for row in _rows(connection, _SHADOWED, every)])


def notes_on_nothing(
    connection: duckdb.DuckDBPyConnection, saved: SavedQuery, values: Mapping[str, Value]
) -> list[str]:
    """Return a note that names what is stored, if an answer has no rows because something else was asked for."""
    if values.get("variant") in (None, "all") or values.get("run"):
        return []
    about = {name: _several(values.get(name)) for name in ("model", "dataset")} | {"study": _study(saved, values)}
    variants = [variant for (variant,) in _rows(connection, _VARIANTS, about)]
    if not variants:
        return []
    if values["variant"] in variants:
        return _stored_instead(connection, values, about)
    named = ", ".join(variants[:_MOST]) + (", …" if len(variants) > _MOST else "")
    return [f"No matching run of the variant {values['variant']!r}. Stored: {named} (--variant {variants[0]!r})."]


def _stored_instead(
    connection: duckdb.DuckDBPyConnection, values: Mapping[str, Value], about: Mapping[str, object]
) -> list[str]:
    """Return a note with the effects or lenses of the variant that are stored."""
    filters = {name: about[name] for name in ("model", "dataset")} | {"variant": values["variant"]}
    notes = []
    for names, (text, absent) in ((names, stored) for names, stored in _STORED.items() if names[0] in values):
        options = [option for (option,) in _rows(connection, text, filters)]
        asked = " ".join(f"--{name.replace('_', '-')} {values[name]}" for name in names)
        others = sorted((option for option in options if option != asked), key=lambda o: _n_changes(o, asked))
        named = " or ".join(others[:_NEAREST])
        notes += [f"No rows for {asked}. Stored: {named}."] if others and asked not in options else []
        notes += [] if options else [f"{absent}. Runs of schema 5 and older have none."]
    return notes


def _n_changes(options: str, asked: str) -> int:
    """Count the words in which stored options differ from those that were asked for."""
    return sum(a != b for a, b in zip(options.split(), asked.split(), strict=True))


@contextlib.contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Collect the notes about answers in a list, each once; other warnings are not affected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KdbNote)
        try:
            yield
        finally:
            notes += dict.fromkeys(w.message.shell for w in caught if isinstance(w.message, KdbNote))
    for other in caught:
        if not issubclass(other.category, KdbNote):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


def _rows(connection: duckdb.DuckDBPyConnection, text: str, params: Mapping[str, object] | None = None) -> list[Any]:
    return connection.execute(text, params).fetchall()


def _several(value: Value) -> list[str] | None:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else None


def _study(saved: SavedQuery, values: Mapping[str, Value]) -> Value:
    return saved.group if saved.group in ("concept", "knowledge") else values.get("study")


def _shadowed(model: str, reason: str, n: int, revisions: list[str]) -> str:
    where = "`kdb query runs` lists all runs with their revisions, --run shows one."
    runs, are = ("1 run", "is") if n == 1 else (f"{n} runs", "are")
    if reason == "revision":
        named = ", ".join(filter(None, revisions)) or "unknown"
        return f"{runs} of another model stored under the name {model!r} (revision {named}) {are} not shown; {where}"
    if reason == "imported":
        return f"{runs} of {model!r} imported from elsewhere {are} not shown beside those measured here; {where}"
    return f"{runs} of {model!r} measured here {are} not shown, because imported runs take precedence; {where}"


def _mixed(model: str, revisions: list[str]) -> str:
    named = ", ".join(revision or "unknown" for revision in revisions)
    return f"Variants of {model!r} were measured with different models stored under that name (revisions {named})."
