"""Pages on which a person asks: the saved queries, one of them, SQL, and the schema."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdb.analysis.figures import FIGURES
from kdb.errors import EngineError, KdbError, QueryError
from kdb.formats import read
from kdb.queries.catalogue import SavedQuery, bind, find_query, load_catalogue
from kdb.warehouse.frames import to_frame
from kdb.warehouse.paging import column_types
from kdb.warehouse.schema import PARTITIONS, TABLES, sql_type
from kdb.warehouse.statements import public_message
from kdb.web.cells import rows_of_page
from kdb.web.facets import counts_of, facets, filtered, ordered
from kdb.web.templates import url
from kdb.web.views.parts import Shown, UrlParams, chart, choices
from kdb.web.ways import Way, ways_to_ask

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

PAGE_ROWS = 100
"""Maximum rows of a table that a page shows."""

_MOST_ROWS = 50_000
"""Rows of an answer that a page reads for its facets; a longer answer has none, and only its first page is read."""

DOWNLOADS = ("csv", "json", "parquet", "arrow")
"""Formats in which every answer can be downloaded."""

_OWN = ("page", "name", "filter", "sort")
"""Values in the address of a query's page that are not parameters of the query."""


def queries(_: Warehouse, __: UrlParams) -> dict[str, Any]:
    """Return the saved queries by group."""
    groups: dict[str, list[SavedQuery]] = {}
    for saved in load_catalogue().values():
        groups.setdefault(saved.group.capitalize(), []).append(saved)
    return {"title": "Queries", "groups": groups}


def query(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return the form of a saved query, and its answer if it is complete."""
    saved = find_query(url_params.needed("name"))
    chosen: dict[str, Any] = {
        param.name: url_params.many(param.name) if param.type == "texts" else url_params.one(param.name)
        for param in saved.params
        if url_params.many(param.name)
    }
    context: dict[str, Any] = {
        "title": saved.title,
        "saved": saved,
        "url_params": url_params,
        "choices": choices(wh),
        "charts": [],
        "chosen": chosen,
        "problem": None,
        "answer": None,
    }
    names = [param.name for param in saved.params]
    try:
        bind(saved.name, saved.params, {**chosen, **{n: "" for n in url_params.values if n not in (*names, *_OWN)}})
        context |= _answer(wh, saved, url_params, chosen)
    except KdbError as error:
        asked_nothing = not chosen and any(param.required for param in saved.params)
        return context | {"problem": None if asked_nothing else str(error)}
    # A figure with its own defaults shows other rows than these.
    fitting = [figure for figure in FIGURES.values() if figure.query == saved.name and not figure.defaults]
    drawn = fitting if context["answer"].rows else []
    asked = {**chosen, **url_params.only("filter"), "sort": url_params.one("sort")}
    return context | {
        "charts": [chart(figure.name, chosen) for figure in drawn],
        "downloads": [(f, url(f"/api/queries/{saved.name}", asked, format=f)) for f in DOWNLOADS],
        "ways": [*ways_to_ask(saved.name, chosen), Way("SQL", saved.shell_script(chosen))],
    }


def _answer(wh: Warehouse, saved: SavedQuery, url_params: UrlParams, chosen: dict[str, Any]) -> dict[str, Any]:
    """Return a page of the rows of a saved query, filtered and ordered as the address says, with its facets."""
    path, begun = f"/queries/{saved.name}", time.perf_counter()
    whole = _whole(wh.opened.public_query(saved.name, **chosen))
    if whole is None:
        found = _found(lambda: wh.opened.public_query(saved.name, **chosen), url_params, path, chosen)
        return found | {"facets": [], "filters": [], "sorts": {}}
    filters, sort = url_params.many("filter"), url_params.one("sort")
    frame = ordered(filtered(whole, filters), sort)
    page = max(1, url_params.integer("page", 1))
    first = (page - 1) * PAGE_ROWS
    rows = frame.slice(first, PAGE_ROWS)
    asked = {**chosen, "filter": filters, "sort": sort}
    return {
        "answer": Shown("Answer", frame.columns, rows.to_dicts()),
        "cells": rows.rows(),
        "first": first + 1,
        "total": len(frame),
        "took": time.perf_counter() - begun,
        "previous": url(path, asked, page=page - 1) if page > 1 else None,
        "following": url(path, asked, page=page + 1) if first + PAGE_ROWS < len(frame) else None,
        "facets": facets(counts_of(frame), filters, lambda changed: url(path, {**asked, "filter": changed})),
        "filters": [(one, url(path, {**asked, "filter": [f for f in filters if f != one]})) for one in filters],
        "sorts": {name: url(path, {**asked, "sort": opposite(name, sort)}) for name in frame.columns},
    }


def opposite(column: str, sort: str | None) -> str:
    """Return the order by a column after a click on its head: descending first, for numbers are read from the top."""
    return column if sort == f"-{column}" else f"-{column}"


def _whole(reader: pa.RecordBatchReader) -> Any:
    """Return an answer as a frame; None if it is too long for its facets to be counted."""
    batches, n_rows = [], 0
    for batch in read(reader):
        batches.append(batch)
        n_rows += batch.num_rows
        if n_rows > _MOST_ROWS:
            return None
    return to_frame(pa.Table.from_batches(batches, reader.schema))


def _found(ask: Callable[[], Any], url_params: UrlParams, path: str, params: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of one page of an answer, the time it took, and the addresses of the pages before and after."""
    page = max(1, url_params.integer("page", 1))
    begun = time.perf_counter()
    names, rows, more = rows_of_page(ask(), (page - 1) * PAGE_ROWS, PAGE_ROWS)
    return {
        "answer": Shown("Answer", names, [dict(zip(names, row, strict=True)) for row in rows]),
        "cells": rows,
        "first": (page - 1) * PAGE_ROWS + 1,
        "total": None,
        "took": time.perf_counter() - begun,
        "previous": url(path, params, page=page - 1) if page > 1 else None,
        "following": url(path, params, page=page + 1) if more else None,
    }


_EXAMPLE = "SELECT model, dataset, layer, accuracy\nFROM current.probe_scores\nWHERE site = 'resid_post'\nORDER BY ALL"


def sql(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return the editor, and the answer to the statement in it."""
    text = url_params.one("q")
    context: dict[str, Any] = {
        "title": "SQL",
        "text": text or "",
        "problem": None,
        "answer": None,
        "tables": {name: column_types(name) for name in TABLES},
        "example": _EXAMPLE,
    }
    if text is None:
        return context
    try:
        context |= _found(lambda: wh.opened.public_sql(text), url_params, "/sql", {"q": text})
    except EngineError:
        raise
    except QueryError as error:
        if str(error).startswith("Out of Memory"):
            raise
        return context | {"problem": public_message(str(error), wh.storage.local.lake, text)}
    return context | {
        "downloads": [(f, url("/api/sql", sql=text, format=f)) for f in DOWNLOADS],
        "ways": ways_of_sql(text),
    }


def ways_of_sql(text: str) -> list[Way]:
    """Return the command and the Python of a statement."""
    import shlex

    return [Way("Command", f"kdb sql {shlex.quote(text)}"), Way("Python", f'kdb.open("WAREHOUSE").sql({text!r})')]


def schema(wh: Warehouse, _: UrlParams) -> dict[str, Any]:
    """Return the tables with their numbers of rows, and the columns."""
    counted = " UNION ALL ".join(f"SELECT '{name}' AS name, count(*) AS n FROM {name}" for name in TABLES)
    sizes = dict(wh.sql(counted).rows())
    return {"title": "Schema", "partitions": PARTITIONS, "tables": TABLES, "sql_type": sql_type, "sizes": sizes}
