"""What every request passes: who may ask, what browsers are told, what is logged and counted.

Plain ASGI, since it must see every message of a streamed answer.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kdb.web.metrics import REQUESTS, SECONDS

access_log = logging.getLogger("kdb.access")

COOKIE = "kdb_session"
_OPEN = ("/healthz", "/login", "/static/")
"""What is answered without the token."""

_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """Names that the service answers to, without their ports, and the token that it wants, if any."""

    hosts: frozenset[str]
    token: str | None = None

    @property
    def session(self) -> str:
        """What a browser that gave the token is given for it."""
        return hmac.new((self.token or "").encode(), b"kdb session", "sha256").hexdigest()

    def knows_token(self, given: str) -> bool:
        """Whether the token is right; takes as long for a wrong one."""
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())

    def admits(self, headers: Headers) -> bool:
        """Whether a request brings the token or the cookie that stands for it."""
        if self.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.knows_token(given.strip())
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.session.encode())

    def refusal(self, scope: Scope) -> Response | None:
        """What is answered to a request that may not ask; None for one that may."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _name(host) not in self.hosts:
            # A page on a name of its own that resolves to this address would else read the warehouse.
            return _refused(
                400, f"This server does not answer to the host {host!r}; `kdb serve --allow-host NAME` names more"
            )
        origin = headers.get("origin")
        if origin is not None and origin != f"{scope['scheme']}://{host}":
            return _refused(403, f"Requests from {origin!r} are refused: ask from this server's own pages")
        if self.admits(headers) or scope["path"].startswith(_OPEN):
            return None
        if "text/html" in headers.get("accept", "") and scope["method"] == "GET":
            return RedirectResponse("/login", 303)
        refused = _refused(401, "This server wants its token: `Authorization: Bearer TOKEN`, or /login in a browser")
        refused.headers["www-authenticate"] = "Bearer"
        return refused


class Guard:
    """The middleware around the whole application."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or pass on one request, and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, sent = time.perf_counter(), 0, 0
        body = _Body(scope, receive)

        async def watched(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if not body.whole:  # else the server would read the rest, to throw it away
                    headers["connection"] = "close"
            sent += len(message.get("body", b""))
            await send(message)

        try:
            refused = self._access.refusal(scope) or body.refusal()
            await (refused or self._app)(scope, body.receive, watched)
        finally:
            took = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "other")
            REQUESTS.labels(scope["method"] if scope["method"] in _METHODS else "other", route, status).inc()
            SECONDS.labels(route).observe(took)
            access_log.info(json.dumps(_entry(scope, status, sent, took), ensure_ascii=False))


_BODY = 2**19
"""Bytes of a request's body at most: the longest statement, every character of it escaped."""
_BODY_SECONDS = 10.0
"""Seconds in which a body must arrive."""


_TOO_LONG = f"The request is longer than {_BODY:,} bytes"


class _Body:
    """A request's body, kept to its limits while it is read, whatever its headers say."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        self._receive, self._taken, self._end = receive, 0, time.monotonic() + _BODY_SECONDS
        self._announced = headers.get("content-length", "0")
        self.whole = self._announced == "0" and "transfer-encoding" not in headers

    def refusal(self) -> Response | None:
        """The answer to a request that announces a longer body than is read."""
        fits = self._announced.isdecimal() and int(self._announced[:20]) <= _BODY
        return None if fits else _refused(413, _TOO_LONG)

    async def receive(self) -> Message:
        """The next part of the body, or that the client left. Raises HTTPException beyond a limit."""
        if self.whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._end - time.monotonic()))
        except TimeoutError:
            raise HTTPException(408, "The request's body did not come in time") from None
        self._taken += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self._taken > _BODY:
            self.whole = False
            raise HTTPException(413, _TOO_LONG)
        return message


_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


def hosts_of(names: Iterable[str]) -> frozenset[str]:
    """Names as they are compared: in lower case."""
    return frozenset(name.lower() for name in names)


def _name(host: str) -> str:
    """The name of a Host header without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _entry(scope: Scope, status: int, sent: int, took: float) -> dict[str, object]:
    client = scope.get("client")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "query": scope["query_string"].decode("latin-1"),
        "status": status,  # 0: the client left before there was an answer
        "bytes": sent,
        "seconds": round(took, 4),
    }


def _refused(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)
