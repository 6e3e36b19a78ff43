"""Start and shutdown of the server."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterable
from pathlib import Path

import click
import uvicorn

from kdb.demo import unpack_demo
from kdb.errors import KdbError
from kdb.web.app import create_app
from kdb.web.guard import Access, access_log, hosts_of
from kdb.web.worker_pool import Settings

_PATIENCE = 10
"""Seconds that answers in progress have to finish when the server stops."""


def run(
    warehouse: Path | str | None,
    *,
    host: str,
    port: int,
    token: str | None,
    names: Iterable[str],
    workers: int,
    memory: int,
    threads: int,
    seconds: float,
    queue: int,
    in_browser: bool = False,
) -> None:
    """Serve a warehouse, or the demo, until the process receives a signal to stop; `in_browser` opens the first page.

    Raises WarehouseError if there is no such warehouse, and KdbError if the server cannot listen on the address.
    """
    if sys.stderr.isatty():
        click.echo("Starting kdb …", err=True)
    with contextlib.nullcontext(warehouse) if warehouse else unpack_demo() as folder:
        settings = Settings(workers=workers, memory=memory, threads=threads, seconds=seconds, queue=queue)
        app = create_app(folder, Access(hosts_of(names), token), settings, prepare=warehouse is None)
        _log_to_stderr()
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,  # the guard logs one line of JSON for each request
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_PATIENCE,
            lifespan="on",
        )
        # uvicorn finishes the open requests, and then raises the signal again: the cleanup here must still run.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with _listen(host, port) as listening, contextlib.suppress(KeyboardInterrupt):
            _Server(config, in_browser).run([listening])


class _Server(uvicorn.Server):
    """A server that prints its address when it is ready, and may open it in a browser."""

    def __init__(self, config: uvicorn.Config, in_browser: bool) -> None:
        super().__init__(config)
        self._in_browser = in_browser

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in (sockets or []) if self.started else []:
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            click.echo(f"kdb is running at http://{shown}:{port}/ (Ctrl-C stops it)", err=True)
            if self._in_browser:
                open_page(f"http://{shown}:{port}/")


def open_page(address: str) -> None:
    """Open a page in a browser, if it can open a window, and return at once, for the server must answer it.

    On Linux without a display, a browser for the terminal would take its place.
    """
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle's algorithm on, and each answer waits 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        taken = "the port is already in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise KdbError(
            f"Cannot listen on {host}, port {port}: {taken}. Choose another address with --host and --port."
        ) from error
    return listening


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
