"""An S3 server on loopback, which counts what it is asked, and can be slow, refuse, or cut a connection."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

KEY, SECRET = "AKIATESTKEYOFTHETESTS", "secret-of-the-tests"

CUT, LOSE = b"cut", b"lose"

Fault = Callable[[str, str], bytes | None]
"""The fault of a request, by method and path: None is no fault, CUT cuts the connection before the request is carried
out, LOSE after it, and anything else is the body of a 403."""


@dataclass
class ObjectStore:
    """The server's address and environment, the requests it had, and what goes wrong."""

    endpoint: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    latency: float = 0.0
    fault: Fault | None = None
    client: Any = field(default=None, repr=False)

    def empty(self) -> None:
        """Delete every object."""
        for found in self.client.list_objects_v2(Bucket="lab").get("Contents", ()):
            self.client.delete_object(Bucket="lab", Key=found["Key"])

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a process that uses this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[str]]:
        """The requests made in the block, such as 'GET /bucket/key'."""
        begun, seen = len(self.requests), []
        yield seen
        seen.extend(f"{method} {path}" for method, path in self.requests[begun:])

    @contextlib.contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Let requests go wrong in the block."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        time.sleep(self.latency)
        said = self.fault(method, path) if self.fault else None
        if said is None:
            return self.app(environ, start_response)
        if said == LOSE:
            list(self.app(environ, lambda *_: None))
        if said in (CUT, LOSE):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(said)))])
        return [said]

    app: Any = field(default_factory=lambda: DomainDispatcherApplication(create_backend_app), repr=False)


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object, **__: object) -> None:
        pass


def extension(name: str) -> Path | None:
    """The file of an extension of DuckDB, where its package is installed for this version of it."""
    package = importlib.util.find_spec(f"duckdb_extension_{name}")
    if package is None or package.origin is None:
        return None
    found = Path(package.origin).parent.rglob(f"v{duckdb.__version__}/*.duckdb_extension")
    return next(found, None)


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A server with an empty bucket ``lab``, until the block ends."""
    import boto3

    store = ObjectStore("")
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Quiet)
    store.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        store.client = boto3.client(
            "s3",
            endpoint_url=store.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        store.client.create_bucket(Bucket="lab")
        yield store
    finally:
        server.shutdown()
        thread.join()
