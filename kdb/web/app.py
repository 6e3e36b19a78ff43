"""The HTTP application: routes, negotiation, caching, and errors as responses. It never reads a table."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from weakref import WeakValueDictionary

from cachetools import LRUCache
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from kdb.errors import KdbError, UnknownNameError
from kdb.warehouse.store import Warehouse
from kdb.web import api, pages
from kdb.web.guard import COOKIE, Access, Guard, access_log
from kdb.web.metrics import FROM_MEMORY, REGISTRY, RUNS, TURNED_AWAY, WAITING
from kdb.web.worker import Question
from kdb.web.worker_pool import Answer, BusyError, FailedError, Settings, WorkerPool

VERSION = importlib.metadata.version("kdb-lm")
STATIC = Path(__file__).parent / "static"

_SMALL = 2**20
"""Maximum bytes of an answer that is cached, and completed even if its client disconnects."""

_KEPT = 2**26
"""Maximum bytes of all cached answers."""

_STALLED = 5.0
"""Seconds in which a client must read 64 KiB of an answer; a slower client would block a worker."""


def create_app(
    warehouse: Path | str, access: Access, settings: Settings | None = None, *, prepare: bool = False
) -> Guard:
    """Return the application for one warehouse. Raises WarehouseError if there is none.

    With `prepare`, the first page is computed at the start, so that its first visitor does not wait for it.
    """
    opened = Warehouse(warehouse)
    pool = WorkerPool(opened.storage.location, settings or Settings())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with pool:
            if prepare:
                await app.state.ask.prepare()
            yield

    app = FastAPI(
        title="kdb",
        version=VERSION,
        description="Measurements of where language models store what they know; read-only. "
        "Every answer has an ETag that changes when runs are added, removed or rewritten.",
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.state.ask = Asking(opened, pool)
    api.add_routes(app)
    pages.add_routes(app)
    _add_operation(app, access)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _add_errors(app)
    return Guard(app, access)


@dataclass(frozen=True)
class _Begun:
    """The start of an answer: its head, its first bytes, and the rest of the stream, if there is more."""

    head: dict[str, Any]
    first: bytes
    rest: Answer | None = None


class Asking:
    """Passes each request to the worker pool; answers 304 if the answer has not changed, and streams it otherwise.

    Small answers are cached, since the same runs give the same answer. If equal requests arrive while the first one is
    being answered, the others wait for that answer.
    """

    def __init__(self, warehouse: Warehouse, pool: WorkerPool) -> None:
        self._warehouse, self._pool = warehouse, pool
        self._kept: LRUCache[str, _Begun] = LRUCache(_KEPT, getsizeof=lambda begun: len(begun.first) + 1000)
        self._waiting = 0
        self._asked: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def runs(self) -> dict[str, str]:
        """Return the committed runs with their versions."""
        versions = await asyncio.to_thread(lambda: {f.run: f.version for f in self._warehouse.storage.run_folders()})
        RUNS.set(len(versions))
        return dict(sorted(versions.items()))

    async def prepare(self) -> None:
        """Compute the first page."""
        runs, params = await self.runs(), {"name": "home", "params": {}}
        with contextlib.suppress(KdbError, BusyError, FailedError):  # the first request for the page reports the error
            await self._begun(_etag("page", params, runs), Question("page", params, tuple(runs), tuple(runs.values())))

    async def __call__(self, request: Request, kind: str, **params: Any) -> Response:
        """Return the response to a request; the arguments say what to ask the worker."""
        runs = await self.runs()
        etag = _etag(kind, params, runs)
        headers = {"etag": etag, "cache-control": "private, no-cache", "vary": "accept, cookie, authorization"}
        if request.method in ("GET", "HEAD") and etag in _etags(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        begun = await _unless_left(
            request, self._begun(etag, Question(kind, params, tuple(runs), tuple(runs.values())))
        )
        head = begun.head
        if "filename" in head:
            headers["content-disposition"] = f'inline; filename="{head["filename"]}"'
        for name in ("rows", "seconds", "note"):
            if name in head:
                headers[f"x-kdb-{name}"] = str(head[name])
        if "next" in head:
            following = request.url.include_query_params(cursor=head["next"])
            headers["x-kdb-cursor"] = head["next"]
            headers["link"] = f'<{following.path}?{following.query}>; rel="next"'
        if begun.rest is None:
            return Response(begun.first, headers=headers, media_type=head["media_type"])
        return _Streamed(begun.first, begun.rest, headers)

    async def _begun(self, etag: str, question: Question) -> _Begun:
        if self._waiting >= self._pool.settings.workers + self._pool.settings.queue:
            raise BusyError
        self._waiting += 1
        WAITING.set(self._waiting)
        try:
            async with self._asked.setdefault(etag, asyncio.Lock()):
                if etag in self._kept:
                    FROM_MEMORY.inc()
                    return self._kept[etag]
                begun = await self._ask(question)
                if begun.rest is None:
                    self._kept[etag] = begun
                return begun
        finally:
            self._waiting -= 1
            WAITING.set(self._waiting)

    async def _ask(self, question: Question) -> _Begun:
        answer = await self._pool.ask(question)
        first = b""
        try:
            async for chunk in answer:
                first += chunk
                if len(first) > _SMALL:
                    return _Begun(answer.head, first, answer)
        except BaseException:
            await answer.close()
            raise
        return _Begun(answer.head, first)


class _Streamed(StreamingResponse):
    """A response that is streamed while it is computed, and cancelled if its client stops reading."""

    def __init__(self, first: bytes, rest: Answer, headers: dict[str, str]) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield first
            async for chunk in rest:
                yield chunk

        super().__init__(body(), headers=headers, media_type=rest.head["media_type"])
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stalled = False

        async def unless_stalled(message: Message) -> None:
            nonlocal stalled
            try:
                await asyncio.wait_for(send(message), _STALLED)
            except TimeoutError:
                stalled = True
                raise

        try:
            await super().__call__(scope, receive, unless_stalled)
        except Exception:
            if not stalled:
                raise
        finally:
            await self._rest.close()


def _etag(kind: str, params: dict[str, Any], runs: dict[str, str]) -> str:
    key = json.dumps([VERSION, kind, params, runs], sort_keys=True)
    return f'"{hashlib.sha256(key.encode()).hexdigest()[:32]}"'


def _etags(header: str) -> list[str]:
    return [tag.strip().removeprefix("W/") for tag in header.split(",")]


async def _unless_left(request: Request, asking: Coroutine[Any, Any, _Begun]) -> _Begun:
    """Return the answer, or cancel the request if its client disconnects first."""

    async def left() -> None:
        with contextlib.suppress(HTTPException):  # a body longer than announced, or than allowed
            while (await request.receive())["type"] != "http.disconnect":
                pass

    answered, gone = asyncio.ensure_future(asking), asyncio.ensure_future(left())
    try:
        await asyncio.wait((answered, gone), return_when=asyncio.FIRST_COMPLETED)
        if answered.done():
            return answered.result()
        raise ClientLeftError
    finally:
        answered.cancel()
        gone.cancel()


class ClientLeftError(Exception):
    """The client disconnected before the answer was complete."""


def _add_operation(app: FastAPI, access: Access) -> None:
    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> JSONResponse:
        """Report whether the warehouse can be read."""
        return JSONResponse({"status": "ok", "version": VERSION, "runs": len(await app.state.ask.runs())})

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    @app.get("/login", include_in_schema=False)
    async def login() -> Response:
        return Response(pages.login(wrong=False), media_type="text/html")

    @app.post("/login", include_in_schema=False)
    async def enter(request: Request) -> Response:
        token = parse_qs((await _body(request, 4096)).decode("utf-8", "replace")).get("token", [""])[0]
        if not access.knows_token(token):
            return Response(pages.login(wrong=True), status_code=401, media_type="text/html")
        entered = RedirectResponse("/", 303)
        secure = request.url.scheme == "https"
        entered.set_cookie(COOKIE, access.session, httponly=True, samesite="strict", secure=secure, max_age=30 * 86400)
        return entered


async def _body(request: Request, limit: int) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"The request is longer than {limit:,} bytes")
    return body


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(KdbError)
    async def refused(request: Request, error: KdbError) -> Response:
        unknown = getattr(error, "unknown", isinstance(error, UnknownNameError))
        return _error_response(request, 404 if unknown else 400, str(error))

    @app.exception_handler(BusyError)
    async def busy(request: Request, _: BusyError) -> Response:
        TURNED_AWAY.inc()
        response = _error_response(request, 503, "Too many waiting requests; retry later")
        response.headers["retry-after"] = "2"
        return response

    @app.exception_handler(ClientLeftError)
    async def left(_: Request, __: ClientLeftError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(FailedError)
    async def failed(request: Request, error: FailedError) -> Response:
        access_log.error(json.dumps({"path": request.url.path, "error": str(error), "details": error.details}))
        return _error_response(request, 500, str(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = _error_response(request, error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        details = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors())
        return _error_response(request, 422, details)


def _error_response(request: Request, status: int, text: str) -> Response:
    """Return an error as a page for browsers, or as JSON for programs."""
    if "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/"):
        return Response(pages.error(status, text), status, media_type="text/html")
    return JSONResponse({"error": text}, status)
