"""Pages of a table of the warehouse, filtered and ordered by its address, and of one of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdb.errors import QueryError
from kdb.warehouse.paging import Page, column_types
from kdb.warehouse.schema import PARTITIONS, TABLES
from kdb.web.facets import COLUMNS, Facet, condition, facets
from kdb.web.templates import url
from kdb.web.views.ask import DOWNLOADS, PAGE_ROWS, opposite
from kdb.web.views.parts import UrlParams
from kdb.web.ways import Way

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

_MOST_COUNTED = 5_000_000
"""Rows of a table up to which its facets are counted."""


def table(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return a page of a table's rows with facets, and a link to each row."""
    name, filters, sort = url_params.needed("name"), url_params.many("filter"), url_params.many("sort")
    cursor, path = url_params.one("cursor"), f"/tables/{url_params.needed('name')}"
    page = Page.of(name, filters=filters, sort=sort, limit=PAGE_ROWS, cursor=cursor)
    found = _rows(wh, page)
    rows = found[:PAGE_ROWS]
    total = _rows(wh, _counting(name, filters, "count(*) AS n"))[0]["n"]
    more = len(found) > PAGE_ROWS
    return {
        "title": f"Table {name}",
        "name": name,
        "comment": TABLES[name].comment,
        "types": column_types(name),
        "rows": [(row, address_of(name, row)) for row in rows],
        "total": total,
        "filters": [(one, url(path, {"filter": [f for f in filters if f != one], "sort": sort})) for one in filters],
        "facets": _facets(wh, name, filters, sort, path) if total <= _MOST_COUNTED else [],
        "sorts": {
            c: url(path, {"filter": filters, "sort": opposite(c, next(iter(sort), None))}) for c in column_types(name)
        },
        "chosen_sort": sort,
        "columns": [c for c, type_ in column_types(name).items() if not type_.endswith("[]")],
        "start": url(path, {"filter": filters, "sort": sort}) if cursor else None,
        "following": url(path, {"filter": filters, "sort": sort, "cursor": page.cursor(rows[-1])}) if more else None,
        "downloads": [(f, url(f"/api/tables/{name}", filter=filters, sort=sort, format=f)) for f in DOWNLOADS],
        "ways": _ways(name, filters),
    }


def _rows(wh: Warehouse, page: Page) -> list[dict[str, Any]]:
    return wh.sql(page.sql, list(page.params)).to_dicts()


def _counting(name: str, filters: Sequence[str], selected: str, rest: str = "") -> Page:
    """Return the page of a table with its filters, which selects other columns."""
    page = Page.of(name, filters=filters)
    _, _, source = page.sql.partition(f" FROM {name}")
    return Page(f"SELECT {selected} FROM {name}{source}{rest}", page.params, ())


def _facets(wh: Warehouse, name: str, filters: Sequence[str], sort: Sequence[str], path: str) -> list[Facet]:
    counts = []
    for column in (c for c in COLUMNS if c in column_types(name)):
        counted = _counting(
            name, filters, f'"{column}" AS value, count(*) AS n', " GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 15"
        )
        counts.append((column, [(row["value"], row["n"]) for row in _rows(wh, counted)]))
    return facets(counts, filters, lambda changed: url(path, {"filter": changed, "sort": list(sort)}))


def _ways(name: str, filters: Sequence[str]) -> list[Way]:
    where = " AND ".join(_as_sql(one) for one in filters)
    text = f"SELECT * FROM {name}{f' WHERE {where}' if where else ''}"
    return [
        Way("SQL", text),
        Way("Command", f'kdb sql "{text}"'),
        Way("Python", f'kdb.open("WAREHOUSE").sql("{text}")'),
    ]


def _as_sql(text: str) -> str:
    """Return a filter of an address as SQL, with its value as a text, which DuckDB compares with any type."""
    for operator in ("<=", ">=", "!=", "=", "<", ">"):
        column, found, value = text.partition(operator)
        if found:
            quoted = value.replace("'", "''")
            return f"{column} {operator} '{quoted}'"
    return text


def address_of(name: str, row: Mapping[str, Any]) -> str:
    """Return the address of a row's page, which does not change when rows are added."""
    key = [column for column in (*PARTITIONS, *TABLES[name].info["key"]) if column in row]
    return url(f"/rows/{name}", filter=[condition(column, row[column]) for column in key])


def row(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return one row, a line for each column."""
    name, filters = url_params.needed("name"), url_params.many("filter")
    found = _rows(wh, Page.of(name, filters=filters, limit=1))
    if not filters or not found:
        raise QueryError(
            f"There is no such row in {name}. Its run may have been removed. The page of the table lists the rows."
        )
    return {
        "title": f"Row of {name}",
        "name": name,
        "row": found[0],
        "types": column_types(name),
        "downloads": [(f, url(f"/api/tables/{name}", filter=filters, format=f)) for f in DOWNLOADS],
    }
