"""The routes of the pages. A worker makes each page (`views`), except those that need no data of the warehouse."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import RedirectResponse, Response

from kdb.formats import MEDIA_TYPES
from kdb.queries.catalogue import find_query
from kdb.warehouse.paging import column_types
from kdb.web.templates import render_template

PAGES = {
    "/": "home",
    "/search": "search",
    "/model": "model",
    "/layer": "layer",
    "/dataset": "dataset",
    "/category": "category",
    "/compare": "compare",
    "/prompt": "prompt",
    "/neuron": "neuron",
    "/head": "head",
    "/queries": "queries",
    "/sql": "sql",
    "/schema": "schema",
}
"""Path of each page, with the view that makes it. The query string chooses the content."""


def add_routes(app: FastAPI) -> None:
    """Add all pages, and the charts on them."""
    for path, view in PAGES.items():
        app.add_api_route(path, _page(view), response_class=Response, include_in_schema=False)

    @app.get("/queries/{name}", include_in_schema=False)
    async def query(request: Request, name: str) -> Response:
        stem, _, format_ = name.rpartition(".")
        if format_ in MEDIA_TYPES:
            return _download(request, f"/api/queries/{stem}", format_)
        find_query(name)
        answered: Response = await request.app.state.ask(
            request, "page", name="query", params=_url_params(request, name=name)
        )
        return answered

    @app.get("/tables/{name}", include_in_schema=False)
    async def table(request: Request, name: str) -> Response:
        stem, _, format_ = name.rpartition(".")
        if format_ in MEDIA_TYPES:
            return _download(request, f"/api/tables/{stem}", format_)
        column_types(name)
        answered: Response = await request.app.state.ask(
            request, "page", name="table", params=_url_params(request, name=name)
        )
        return answered

    @app.get("/rows/{name}", include_in_schema=False)
    async def row(request: Request, name: str) -> Response:
        column_types(name)
        answered: Response = await request.app.state.ask(
            request, "page", name="row", params=_url_params(request, name=name)
        )
        return answered

    @app.get("/charts/{name}", include_in_schema=False)
    async def chart(request: Request, name: str) -> Response:
        answered: Response = await request.app.state.ask(request, "chart", name=name, params=_url_params(request))
        return answered

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return RedirectResponse("/static/icon.svg")


def _page(view: str):  # type: ignore[no-untyped-def]  # FastAPI reads the type of what it returns
    async def page(request: Request) -> Response:
        answered: Response = await request.app.state.ask(request, "page", name=view, params=_url_params(request))
        return answered

    return page


def _download(request: Request, path: str, format_: str) -> Response:
    """Return the way to the rows in a format, which the API has."""
    following = request.url.replace(path=path).include_query_params(format=format_)
    return RedirectResponse(f"{following.path}?{following.query}", 307)


def _url_params(request: Request, **also: str) -> dict[str, list[str]]:
    """Return the values in the query string by name, without empty ones, which forms send for empty fields."""
    names = request.query_params.keys()
    params = {name: [value for value in request.query_params.getlist(name) if value] for name in names}
    return {name: values for name, values in params.items() if values} | {name: [value] for name, value in also.items()}


def login(*, wrong: bool) -> str:
    """Return the page that asks for the token."""
    return render_template("login.html.j2", title="Log in", wrong=wrong)


def error(status: int, text: str) -> str:
    """Return the page that shows an error."""
    return render_template("error.html.j2", title=str(status), text=text)
