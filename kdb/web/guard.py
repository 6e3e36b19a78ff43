"""Middleware for every request: access control, security headers, logging and metrics.

It is plain ASGI, because it must see every message of a streamed answer.
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
"""Paths that need no token."""

_QUIET = ("/static/", "/favicon.ico")
"""Paths that are logged only if they fail: each page loads several of them."""

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
    """Host names under which the server answers, without ports, and the access token, if one is required."""

    hosts: frozenset[str]
    token: str | None = None

    @property
    def session(self) -> str:
        """Return the value of the session cookie that a browser gets after login."""
        return hmac.new((self.token or "").encode(), b"kdb session", "sha256").hexdigest()

    def knows_token(self, token: str) -> bool:
        """Whether the token is valid, compared in constant time."""
        return self.token is not None and hmac.compare_digest(token.encode(), self.token.encode())

    def admits(self, headers: Headers) -> bool:
        """Whether a request has a valid token or session cookie."""
        if self.token is None:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.knows_token(token.strip())
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.session.encode())

    def refusal(self, scope: Scope) -> Response | None:
        """Return the response to a request without access; None for a request with access."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _name(host) not in self.hosts:
            # Otherwise a foreign page whose host name resolves to this address could read the warehouse.
            return _refused(400, f"Host {host!r} is not allowed. `kdb serve --allow-host NAME` adds a host name.")
        origin = headers.get("origin")
        if origin is not None and origin != f"{scope['scheme']}://{host}":
            return _refused(403, f"Requests from origin {origin!r} are refused. Use this server's own pages.")
        if self.admits(headers) or scope["path"].startswith(_OPEN):
            return None
        if "text/html" in headers.get("accept", "") and scope["method"] == "GET":
            return RedirectResponse("/login", 303)
        refused = _refused(401, "Token required: send `Authorization: Bearer TOKEN`, or use /login in a browser")
        refused.headers["www-authenticate"] = "Bearer"
        return refused


class Guard:
    """The middleware around the whole application."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or forward one request, and log it."""
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
                if not body.whole:  # otherwise the server would read and discard the rest
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
            if status >= 400 or not scope["path"].startswith(_QUIET):
                access_log.info(json.dumps(_entry(scope, status, sent, took), ensure_ascii=False))


_BODY = 2**19
"""Maximum bytes of a request's body: the longest statement, with every character escaped."""
_BODY_SECONDS = 10.0
"""Maximum seconds for a body to arrive."""


_TOO_LONG = f"The request is longer than {_BODY:,} bytes"


class _Body:
    """A request's body, whose limits are enforced while it is read, whatever its headers say."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        self._receive, self._taken, self._end = receive, 0, time.monotonic() + _BODY_SECONDS
        self._announced = headers.get("content-length", "0")
        self.whole = self._announced == "0" and "transfer-encoding" not in headers

    def refusal(self) -> Response | None:
        """Return the response to a request that announces a body beyond the limit; None for any other."""
        fits = self._announced.isdecimal() and int(self._announced[:20]) <= _BODY
        return None if fits else _refused(413, _TOO_LONG)

    async def receive(self) -> Message:
        """Return the next part of the body, or the client's disconnection. Raises HTTPException beyond a limit."""
        if self.whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._end - time.monotonic()))
        except TimeoutError:
            raise HTTPException(408, "The request's body did not arrive in time") from None
        self._taken += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self._taken > _BODY:
            self.whole = False
            raise HTTPException(413, _TOO_LONG)
        return message


_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


def hosts_of(names: Iterable[str]) -> frozenset[str]:
    """Return host names in lower case, for comparison."""
    return frozenset(name.lower() for name in names)


def _name(host: str) -> str:
    """Return the host name in a Host header, without its port."""
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
        "status": status,  # 0: the client disconnected before there was an answer
        "bytes": sent,
        "seconds": round(took, 4),
    }


def _refused(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)
