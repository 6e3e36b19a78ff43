"""The content of each page, queried from a snapshot of the warehouse; a module for each kind of page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kdb.warehouse.notes import noted
from kdb.web.templates import render_template
from kdb.web.views.ask import queries, query, schema, sql
from kdb.web.views.browse import row, table
from kdb.web.views.compare import compare
from kdb.web.views.dataset import category, dataset
from kdb.web.views.home import home
from kdb.web.views.model import layer, model
from kdb.web.views.parts import UrlParams
from kdb.web.views.places import head, neuron
from kdb.web.views.prompt import prompt
from kdb.web.views.search import search

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


def render(wh: Warehouse, name: str, url_params: dict[str, list[str]]) -> str:
    """Return the HTML of a page. Raises KdbError if the address has a name that does not exist."""
    notes: list[str] = []
    with noted(notes):
        context = VIEWS[name](wh, UrlParams(url_params))
    return render_template(f"{context.pop('template', name)}.html.j2", **context, notes=notes)


VIEWS: dict[str, Callable[[Warehouse, UrlParams], dict[str, Any]]] = {
    "home": home,
    "search": search,
    "model": model,
    "layer": layer,
    "dataset": dataset,
    "category": category,
    "compare": compare,
    "prompt": prompt,
    "neuron": neuron,
    "head": head,
    "queries": queries,
    "query": query,
    "table": table,
    "row": row,
    "sql": sql,
    "schema": schema,
}
