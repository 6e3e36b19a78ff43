"""The routes of the API. Their types are also their OpenAPI description.

curl localhost:8765/api/queries/top-heads?category=capital
curl localhost:8765/api/tables/layer_scores?filter=layer%3E%3D12&sort=-score&limit=10&format=csv
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from kdb.errors import QueryError, UnknownNameError
from kdb.formats import MEDIA_TYPES
from kdb.queries.catalogue import Param, SavedQuery, load_catalogue
from kdb.warehouse.paging import column_types
from kdb.warehouse.schema import PARTITIONS, TABLES
from kdb.web.answers import catalogue_json

Format = Literal["json", "csv", "arrow", "parquet"]

_TYPES: dict[str, Any] = {"text": str, "texts": list[str], "integer": int, "number": float, "boolean": bool}
_MAX_SQL = 65_536
MAX_PAGE = 10_000
"""Maximum rows of a page; without a limit, the whole table is streamed."""


class Error(BaseModel):
    """Error message: why there is no answer, and what to do."""

    error: str


class Statement(BaseModel):
    """One SELECT statement over the views."""

    sql: str = Field(max_length=_MAX_SQL, examples=["SELECT model, layer, accuracy FROM current.probe_scores"])


class Parameter(BaseModel):
    """A parameter of a saved query."""

    name: str
    type: Literal["text", "texts", "integer", "number", "boolean"]
    required: bool
    default: bool | int | float | str | list[str] | None
    meaning: str


class Catalogued(BaseModel):
    """A saved query."""

    name: str
    group: str
    title: str
    reference: str
    description: str
    params: list[Parameter]


class Column(BaseModel):
    """A column of a table."""

    name: str
    type: str
    unit: str
    meaning: str


class Described(BaseModel):
    """A table of the warehouse."""

    name: str
    rows: str
    columns: list[Column]


def _answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    rows: dict[str, Any] = {media.split(";")[0]: {"schema": {"type": "string"}} for media in MEDIA_TYPES.values()}
    rows["application/json"] = {"schema": {"type": "array", "items": {"type": "object"}}}
    rows["application/vnd.apache.arrow.stream"]["schema"]["format"] = "binary"
    rows["application/vnd.apache.parquet"]["schema"]["format"] = "binary"
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": "Rows", "content": rows},
        304: {"description": "Not modified: the ETag matches If-None-Match"},
        400: {"model": Error, "description": "The request is invalid, or its answer exceeds the limits"},
        401: {"model": Error, "description": "The token is missing or wrong"},
        404: {"model": Error, "description": "A name does not exist"},
        413: {"model": Error, "description": "The request is too long"},
        422: {"model": Error, "description": "A parameter is of the wrong type"},
        503: {"model": Error, "description": "Too many waiting requests; retry after Retry-After seconds"},
    }
    return {status: responses[status] for status in (*statuses, 401, 422)}


def _format(
    request: Request,
    format: Annotated[Format | None, Query(description="Format of the rows; defaults to Accept, then JSON")] = None,  # noqa: A002  (its name in the URL)
) -> str:
    if format is not None:
        return format
    wanted = [(_quality(part), part.split(";")[0].strip()) for part in request.headers.get("accept", "").split(",")]
    known = {media.split(";")[0]: name for name, media in MEDIA_TYPES.items()}
    ranked = sorted((item for item in wanted if item[0] > 0), key=lambda item: -item[0])
    return next((known[media] for _, media in ranked if media in known), "json")


def _quality(part: str) -> float:
    _, _, weight = part.replace(" ", "").partition(";q=")
    try:
        return float(weight.split(";")[0]) if weight else 1.0
    except ValueError:
        return 0.0


_Chosen = Annotated[str, Depends(_format)]

_Equal = Annotated[
    list[str], Query(description="Rows to return: COLUMN=VALUE, or COLUMN is null; repeatable, all must hold")
]

_Sort = Annotated[str | None, Query(description="Column to sort by; put - before it for descending order")]


_router = APIRouter(prefix="/api")


@_router.get("/queries", tags=["queries"], responses=_answers(), response_model=list[Catalogued])
async def queries() -> Response:
    """The saved queries and their parameters."""
    return Response(catalogue_json(), media_type="application/json")


@_router.get("/queries/{name}", include_in_schema=False)
async def _no_query(name: str) -> Response:
    raise UnknownNameError("query", name, load_catalogue(), "/api/queries lists all queries.")


@_router.post("/sql", response_class=Response, tags=["sql"], responses=_answers(200, 304, 400, 413, 503))
async def sql(request: Request, statement: Statement, format: _Chosen) -> Response:  # noqa: A002  (its name in the URL)
    """Answer one SELECT statement, completely or not at all. It can read the views and nothing else."""
    answered: Response = await request.app.state.ask(request, "sql", text=statement.sql, format_=format)
    return answered


@_router.get("/sql", response_class=Response, tags=["sql"], responses=_answers(200, 304, 400, 503))
async def sql_by_link(
    request: Request,
    sql: Annotated[str, Query(max_length=_MAX_SQL)],
    format: _Chosen,  # noqa: A002  (its name in the URL)
) -> Response:
    """Answer one SELECT statement, given in a link that can be shared."""
    answered: Response = await request.app.state.ask(request, "sql", text=sql, format_=format)
    return answered


@_router.get("/tables", tags=["tables"], responses=_answers(), response_model=list[Described])
async def tables() -> list[Described]:
    """The tables and their columns."""
    return [_described(name) for name in TABLES]


@_router.get("/tables/{name}", response_class=Response, tags=["tables"], responses=_answers(200, 304, 400, 404, 503))
async def table(
    request: Request,
    name: Annotated[str, Path(json_schema_extra={"enum": list(TABLES)})],
    format: _Chosen,  # noqa: A002  (its name in the URL)
    filter: Annotated[  # noqa: A002  (its name in the URL)
        list[str],
        Query(description="Condition COLUMN=VALUE, with = != < <= > >=, or COLUMN is null; repeatable, all must hold"),
    ] = [],  # noqa: B006  (FastAPI copies it)
    sort: Annotated[list[str], Query(description="Column to sort by; put - before it for descending order")] = [],  # noqa: B006
    limit: Annotated[
        int | None,
        Query(ge=1, le=MAX_PAGE, description="Maximum rows of a page; without a limit, the whole table is streamed"),
    ] = None,
    cursor: Annotated[str | None, Query(description="X-Kdb-Cursor of the previous page")] = None,
) -> Response:
    """Return rows of a table. With a limit, the headers Link and X-Kdb-Cursor give the next page."""
    _refuse_unknown(request, ("filter", "sort", "limit", "cursor", "format"), "a table")
    asked = {"name": name, "filters": filter, "sort": sort, "limit": limit, "cursor": cursor, "format_": format}
    answered: Response = await request.app.state.ask(request, "table", **asked)
    return answered


def add_routes(app: FastAPI) -> None:
    """Add all routes of the API, including one for each saved query."""
    for saved in load_catalogue().values():
        app.add_api_route(
            f"/api/queries/{saved.name}",
            _endpoint(saved),
            response_class=Response,
            tags=["queries"],
            operation_id=saved.name,
            summary=saved.title,
            description=f"{saved.description}\n\nSource: {saved.reference}",
            responses=_answers(200, 304, 400, 404, 503),
        )
    app.include_router(_router)


def _endpoint(saved: SavedQuery) -> Any:
    """Return a function with the parameters of the saved query as its signature, for FastAPI to check and describe."""

    async def endpoint(request: Request, format: str, filter: list[str], sort: str | None, **params: Any) -> Response:  # noqa: A002  (their names in the URL)
        _refuse_unknown(request, [*(param.name for param in saved.params), "filter", "sort", "format"], saved.name)
        chosen = {name: value for name, value in params.items() if value not in (None, [])}
        asked = {"name": saved.name, "params": chosen, "filters": filter, "sort": sort, "format_": format}
        answered: Response = await request.app.state.ask(request, "query", **asked)
        return answered

    kind = inspect.Parameter.KEYWORD_ONLY
    endpoint.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # FastAPI reads it
        [
            inspect.Parameter("request", kind, annotation=Request),
            *(inspect.Parameter(p.name, kind, **_declared(p)) for p in saved.params),
            inspect.Parameter("filter", kind, annotation=_Equal, default=[]),
            inspect.Parameter("sort", kind, annotation=_Sort, default=None),
            inspect.Parameter("format", kind, annotation=_Chosen),
        ]
    )
    return endpoint


def _refuse_unknown(request: Request, known: Sequence[str], what: str) -> None:
    """Raise QueryError for an unknown parameter, which would otherwise be ignored."""
    for name in request.query_params:
        if name not in known:
            raise QueryError(
                str(UnknownNameError("parameter", name, known, f"{what} has the parameters {', '.join(known)}."))
            )


def _declared(param: Param) -> dict[str, Any]:
    """Return the declaration of a parameter for FastAPI: its type, description and default."""
    default = "" if param.required else f"; default: {param.shown_default}"
    described = Query(description=param.meaning + default)
    annotation = _TYPES[param.type]
    if param.required:
        return {"annotation": Annotated[annotation, described]}
    return {"annotation": Annotated[annotation | None, described], "default": None}


def _described(name: str) -> Described:
    table = TABLES[name]
    types = column_types(name)
    described = {column.name: (column.info["unit"], str(column.comment)) for column in table.columns}
    described |= {partition: ("", meaning) for partition, meaning in PARTITIONS.items()}
    columns = [Column(name=n, type=t, unit=described[n][0], meaning=described[n][1]) for n, t in types.items()]
    return Described(name=name, rows=str(table.comment), columns=columns)
