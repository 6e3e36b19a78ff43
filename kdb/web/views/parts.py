"""Parts that pages share: the values of an address, tables, charts, and what the warehouse holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl

from kdb.analysis.captions import CAVEAT, FEW, MEANS
from kdb.analysis.figures import FIGURES
from kdb.analysis.style import look_of
from kdb.analysis.variants import PLAIN, shown_variant
from kdb.errors import QueryError, UnknownNameError
from kdb.queries.catalogue import find_query
from kdb.queries.domains import CLASSIFIERS, DOMAINS, Names
from kdb.warehouse.schema import NEURON
from kdb.web.cells import without_ends
from kdb.web.templates import url
from kdb.web.ways import Way, ways_to_ask, ways_to_draw

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


@dataclass(frozen=True)
class UrlParams:
    """The values in a page's query string."""

    values: Mapping[str, Sequence[str]]

    def one(self, name: str) -> str | None:
        """Return the value of that name, or None."""
        return self.values.get(name, [None])[0]

    def many(self, name: str) -> list[str]:
        """Return all values of that name."""
        return list(self.values.get(name, []))

    def needed(self, name: str) -> str:
        """Return the value of that name. Raises QueryError if there is none."""
        value = self.one(name)
        if value is None:
            raise QueryError(f"{name} is missing. Add it to the address, as in ?{name}=…")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Return the value of that name as a number from 0."""
        text = self.needed(name) if default is None else self.one(name) or str(default)
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise QueryError(f"{name}: expected a number from 0, found {text!r}")
        return int(text)

    def only(self, *names: str) -> dict[str, list[str]]:
        """Return the values of those names that have any."""
        return {name: list(self.values[name]) for name in names if name in self.values}

    def run_of(self, *names: str) -> dict[str, Any]:
        """Return the models and further lists of `names`, and one dataset, variant and run each, if given."""
        single = {name: values[0] for name, values in self.only("dataset", "variant", "run").items()}
        return self.only("model", *names) | single


@dataclass(frozen=True)
class Shown:
    """A table on a page.

    ``shared`` are the columns that are equal in all rows, with their value, which stand above the table. ``address``
    is that of its query, and ``ways`` are texts that ask the same elsewhere. ``folded``: a chart says the same.
    """

    title: str
    columns: list[str]
    rows: list[dict[str, Any]]
    address: str | None = None
    note: str = ""
    empty: str = "Nothing is stored."
    shared: list[tuple[str, Any]] = field(default_factory=list)
    ways: list[Way] = field(default_factory=list)
    folded: bool = False

    @property
    def most(self) -> float:
        """Return the largest size of a score, for the bars beside them."""
        return max((abs(row["score"]) for row in self.rows if row.get("score") is not None), default=0.0)


@dataclass(frozen=True)
class Charted:
    """A chart on a page: title, addresses of its Vega-Lite and its numbers, and texts that draw it elsewhere."""

    title: str
    spec: str
    numbers: str
    ways: list[Way]


# Tables and charts -----------------------------------------------------------------------------------------------


def variant_of(wh: Warehouse, models: Iterable[str], study: str) -> dict[str, str]:
    """Return the newest variant, as a parameter, if none of the models has a plain run of the study; else nothing."""
    variant = shown_variant(wh, list(models), study)
    return {} if variant in (None, PLAIN) else {"variant": str(variant)}


def asked(
    wh: Warehouse,
    name: str,
    params: Mapping[str, Any],
    *,
    drop: Sequence[str] = (),
    title: str = "",
    folded: bool = False,
) -> Shown:
    """Return the answer of a saved query as a table, without the columns that the page shows elsewhere."""
    chosen = without_empty(params)
    return shown(name, chosen, wh.query(name, **chosen), drop, title, folded=folded)


def shown(
    name: str,
    chosen: Mapping[str, Any],
    rows: pl.DataFrame,
    drop: Sequence[str] = (),
    title: str = "",
    empty: str = Shown.empty,
    *,
    folded: bool = False,
) -> Shown:
    """Return rows of the saved query ``name`` as a table, with the notes that belong beside its numbers."""
    columns = [column for column in rows.columns if column not in drop]
    of_means = {"n_prompts", "score"} <= set(columns) and "prompt_id" not in columns
    notes = [CAVEAT] * ("jump_percent" in columns) + [MEANS] * of_means
    notes += [f"In brackets: 95 % interval over prompts; {FEW}."] * ("low" in columns)
    return table(
        title or find_query(name).title,
        rows,
        columns,
        address=url(f"/queries/{name}", chosen),
        note=" ".join(notes),
        empty=empty,
        ways=ways_to_ask(name, chosen),
        folded=folded,
    )


def table(title: str, frame: pl.DataFrame, columns: Sequence[str] | None = None, **more: Any) -> Shown:
    """Return a frame as a table of some columns; what is equal in all rows stands above it."""
    rows, names = frame.to_dicts(), list(frame.columns if columns is None else columns)
    shared = [name for name in _MAY_BE_ABOVE if len(rows) > 1 and name in names and frame[name].n_unique() == 1]
    shared = [] if len(shared) == len(names) else shared
    above = [(name, rows[0][name]) for name in names if name in shared and rows[0][name] is not None]
    return Shown(title, [name for name in without_ends(names) if name not in shared], rows, shared=above, **more)


IN_NAME = NEURON
"""Columns that the name of a part says as well."""

_MAY_BE_ABOVE = (
    *("model", "dataset", "variant", "run", "category", "site", "classifier", "split", "n_layers", "component", "lens"),
    *(
        "effect_method",
        "replacement",
        "role",
        "direction",
        "pool",
        "study",
        "neuron_name",
        "head_name",
        "expert_name",
        "method",
    ),
)
"""Columns that stand above a table if they are equal in all rows."""


def chart(name: str, params: Mapping[str, Any], title: str = "") -> Charted:
    """Return the figure of that name as a chart for a page."""
    chosen = without_empty(params)
    figure = FIGURES[name]
    own = {param.name for param in (*figure.drawing, *figure.counting)}
    numbers = {key: value for key, value in chosen.items() if key not in own}
    address = url(f"/queries/{figure.query}", numbers)
    return Charted(title or figure.title, url(f"/charts/{name}", chosen), address, ways_to_draw(name, chosen))


def without_empty(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that have a value."""
    return {key: value for key, value in params.items() if value not in (None, [])}


# What the warehouse holds ----------------------------------------------------------------------------------------


def choices(wh: Warehouse) -> dict[str, list[str]]:
    """Return the allowed values of parameters that have a list of them, stored or fixed."""
    look = look_of(wh)
    stored = set(wh.sql("SELECT DISTINCT dataset FROM runs")["dataset"])
    fixed = {name: list(domain.fixed) for name, domain in DOMAINS.items() if isinstance(domain, Names) and domain.fixed}
    return fixed | {
        "model": list(look.models),
        "dataset": [name for name in look.datasets if name in stored],
        "category": categories(wh),
        "variant": wh.sql("SELECT DISTINCT variant FROM runs ORDER BY variant")["variant"].to_list(),
        "run": wh.sql("SELECT run FROM runs ORDER BY finished_at DESC, run")["run"].to_list(),
        "classifier": ["default", *CLASSIFIERS],
    }


def categories(wh: Warehouse) -> list[str]:
    """Return the categories of stored prompts that have an answer, the paper's first."""
    found = wh.sql("SELECT DISTINCT category FROM prompts WHERE category IS NOT NULL AND kept IS NOT NULL")
    return look_of(wh).order("category", found["category"].to_list())


def studies(wh: Warehouse, models: Sequence[str]) -> dict[str, list[str]]:
    """Return the datasets of each study on which any of the models was measured."""
    frame = wh.sql(
        "SELECT DISTINCT study, dataset FROM runs WHERE list_contains($models, model) ORDER BY ALL",
        {"models": list(models)},
    )
    return {
        study: [r["dataset"] for r in frame.to_dicts() if r["study"] == study] for study in ("concept", "knowledge")
    }


def known(wh: Warehouse, names: Sequence[str]) -> None:
    """Raise UnknownNameError if a model is not stored."""
    stored = wh.sql("SELECT DISTINCT model FROM models")["model"].to_list()
    for name in names:
        if name not in stored:
            raise UnknownNameError("model", name, stored, "The home page lists all stored models.")


def has(wh: Warehouse, table_name: str, **where: str) -> bool:
    """Whether a current run has rows of that table, of the given model, dataset or both."""
    conditions = "".join(f" AND {name} = ${name}" for name in where)
    text = f"SELECT count(*) AS n FROM current_runs WHERE table_name = $table_name{conditions}"
    return bool(wh.sql(text, {"table_name": table_name, **where})["n"].item())
