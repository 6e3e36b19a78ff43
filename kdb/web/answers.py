"""Functions that a worker runs to answer one request; each returns a head (JSON) and the chunks of the body.

Each takes a snapshot of the warehouse. Errors are raised as KdbError before the first chunk.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from kdb.analysis import figures
from kdb.errors import NothingFoundError, QueryError
from kdb.formats import MEDIA_TYPES, encode, read
from kdb.warehouse.frames import to_frame
from kdb.warehouse.notes import noted
from kdb.warehouse.paging import Page
from kdb.web import views
from kdb.web.facets import filtered, ordered

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

Answer: TypeAlias = tuple[dict[str, Any], Iterator[bytes]]

MAX_ROWS = 1_000_000
MAX_BYTES = 2**28
"""Maximum rows and bytes of the answer to one SELECT. A whole table has no such limit, because it is streamed."""

_COPY = 2**18


def sql(wh: Warehouse, text: str, format_: str) -> Answer:
    """Answer one SELECT, completely or not at all: an answer beyond the limits is refused, not truncated."""
    begun, notes = time.perf_counter(), list[str]()
    with noted(notes):
        reader = wh.opened.public_sql(text)
    head, body = _whole(reader, format_, begun)
    return _noted(head, notes), body


def query(
    wh: Warehouse, name: str, params: dict[str, Any], filters: list[str], sort: str | None, format_: str
) -> Answer:
    """Answer a saved query with the rows for which the filters hold."""
    begun, notes = time.perf_counter(), list[str]()
    with noted(notes):
        reader = wh.opened.public_query(name, **params)
    if filters or sort:
        rows = to_frame(pa.Table.from_batches(read(_limited(reader)), reader.schema))
        reader = ordered(filtered(rows, filters), sort).to_arrow().to_reader()
    head, body = _whole(reader, format_, begun, stem=name)
    return _noted(head, notes), body


def table(
    wh: Warehouse,
    name: str,
    filters: list[str],
    sort: list[str],
    limit: int | None,
    cursor: str | None,
    format_: str,
) -> Answer:
    """Answer with rows of a table: a page and the cursor of the next one, or, without a limit, all rows streamed."""
    page = Page.of(name, filters=filters, sort=sort, limit=limit, cursor=cursor)
    reader = wh.opened.batches(page.sql, page.params)
    head = _head(format_, name)
    if limit is None:
        return head, encode(reader, format_)
    rows = pa.Table.from_batches(read(reader), reader.schema)
    if len(rows) > limit:
        rows = rows.slice(0, limit)
        head["next"] = page.cursor(rows.slice(limit - 1).to_pylist()[0])
    return head, encode(rows.to_reader(), format_)


def chart(wh: Warehouse, name: str, params: dict[str, list[str]]) -> Answer:
    """Answer with a figure as Vega-Lite, or with ``{"nothing": "why"}`` if there is no data for it."""
    several = {param.name for param in figures.find_figure(name).params if param.type == "texts"}
    chosen = {key: values if key in several else values[-1] for key, values in params.items()}
    try:
        drawn = figures.chart(wh, name, **chosen).to_json(indent=None)
    except NothingFoundError as error:
        drawn = json.dumps({"nothing": str(error)})
    return {"media_type": "application/json"}, iter([drawn.encode()])


def page(wh: Warehouse, name: str, params: dict[str, list[str]]) -> Answer:
    """Answer with a page as HTML."""
    return {"media_type": "text/html; charset=utf-8"}, iter([views.render(wh, name, params).encode()])


KINDS: dict[str, Callable[..., Answer]] = {"sql": sql, "query": query, "table": table, "chart": chart, "page": page}
"""The kinds of requests, with the function that answers each."""


def _noted(head: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    return head | {"note": ascii(" ".join(notes))[1:-1]} if notes else head


def _head(format_: str, stem: str) -> dict[str, Any]:
    return {"media_type": MEDIA_TYPES[format_], "filename": f"{stem}.{format_}"}


def _whole(reader: pa.RecordBatchReader, format_: str, begun: float, stem: str = "answer") -> Answer:
    """Write the answer to a temporary file first, so that one that fails or is too large is refused, not truncated."""
    rows = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal rows
        for batch in _limited(reader):
            rows += batch.num_rows
            yield batch

    file = tempfile.SpooledTemporaryFile(max_size=2**24)  # noqa: SIM115  (closed when it has been sent)
    for chunk in encode(pa.RecordBatchReader.from_batches(reader.schema, counted()), format_):
        file.write(chunk)
        if file.tell() > MAX_BYTES:
            raise QueryError(f"The answer has more than {MAX_BYTES // 2**20:,} MiB. Add LIMIT or select fewer columns.")
    file.seek(0)
    head = {**_head(format_, stem), "rows": rows, "seconds": round(time.perf_counter() - begun, 4)}

    def sent() -> Iterator[bytes]:
        with file:
            yield from iter(lambda: file.read(_COPY), b"")

    return head, sent()


def _limited(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an answer. Raises QueryError if there are too many rows."""
    rows = 0
    for batch in reader:
        rows += batch.num_rows
        if rows > MAX_ROWS:
            raise QueryError(
                f"The answer has more than {MAX_ROWS:,} rows. Add LIMIT or aggregate; "
                "/api/tables/NAME streams a table of any size."
            )
        yield batch


def catalogue_json() -> str:
    """Return the saved queries with their parameters, for JSON."""
    from kdb.queries.catalogue import load_catalogue

    return json.dumps(
        [
            {
                "name": saved.name,
                "group": saved.group,
                "title": saved.title,
                "reference": saved.reference,
                "description": saved.description,
                "params": [
                    {
                        "name": param.name,
                        "type": param.type,
                        "required": param.required,
                        "default": param.default,
                        "meaning": param.meaning,
                    }
                    for param in saved.params
                ],
            }
            for saved in load_catalogue().values()
        ]
    )
