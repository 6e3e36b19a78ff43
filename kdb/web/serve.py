"""From the command line to a running server, and to its end."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import socket
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import uvicorn

from kdb.errors import KdbError
from kdb.web.app import create_app
from kdb.web.guard import Access, access_log, hosts_of
from kdb.web.worker_pool import Settings

DEMO = Path(__file__).parent / "demo.zip"

_PATIENCE = 10
"""Seconds that answers under way have to end in, once the server is told to stop."""


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
) -> None:
    """Serve a warehouse, or the demonstration one, until the process is told to stop.

    Raises WarehouseError if there is no such warehouse, and KdbError where the address cannot be listened on.
    """
    with contextlib.nullcontext(warehouse) if warehouse else _demo() as folder:
        settings = Settings(workers=workers, memory=memory, threads=threads, seconds=seconds, queue=queue)
        app = create_app(folder, Access(hosts_of(names), token), settings)
        _log_to_stderr()
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,  # the guard's has one line of JSON for each request
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_PATIENCE,
            lifespan="on",
        )
        # uvicorn ends what is under way, and then raises the signal again: it must not skip what is cleaned up here.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with _listen(host, port) as listening, contextlib.suppress(KeyboardInterrupt):
            _Server(config).run([listening])


class _Server(uvicorn.Server):
    """Says where it can be reached, once it can be."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in (sockets or []) if self.started else []:
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            click.echo(f"kdb serves at http://{shown}:{port}/ (Ctrl-C stops it)", err=True)


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
        taken = "it is taken" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise KdbError(
            f"Cannot listen at {host}, port {port}: {taken}. --host and --port name another place."
        ) from error
    return listening


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False


@contextlib.contextmanager
def _demo() -> Iterator[Path]:
    """The warehouse that comes with kdb, unpacked for as long as it is served."""
    with tempfile.TemporaryDirectory(prefix="kdb-demo-") as folder, zipfile.ZipFile(DEMO) as packed:
        packed.extractall(folder)
        yield Path(folder)
