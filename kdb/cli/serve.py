"""Commands that serve a warehouse as web pages and an API: one's own, or the one that comes with kdb."""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
from pathlib import Path
from typing import Any

import click

from kdb.cli.options import FiniteRange, warehouse_option


@click.command()
@warehouse_option
@click.option("--demo", is_flag=True, help="Serve a small warehouse that comes with kdb.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; one that other machines can reach needs --token.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8765,
    show_default=True,
    help="Port to listen on; 0 picks a free one.",
)
@click.option("--token", envvar="KDB_TOKEN", help="Access token that clients must send; defaults to $KDB_TOKEN.")
@click.option(
    "--allow-host",
    "names",
    multiple=True,
    help="Additional host name under which clients reach the server; repeatable.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    help="Number of worker processes.  [default: half the processors, at least 2]",
)
@click.option(
    "--memory",
    type=FiniteRange(0.1, 2**20),
    default=1.0,
    show_default=True,
    help="Memory limit of DuckDB in each worker, in GiB.",
)
@click.option(
    "--seconds",
    type=FiniteRange(0.1, 86400),
    default=30.0,
    show_default=True,
    help="Time limit of a query, in seconds.",
)
@click.option(
    "--queue",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Number of requests that may wait; further ones get HTTP status 503.",
)
def serve(
    warehouse: Path | str,
    demo: bool,
    host: str,
    port: int,
    token: str | None,
    names: tuple[str, ...],
    workers: int | None,
    memory: float,
    seconds: float,
    queue: int,
) -> None:
    """Serve the warehouse to browsers and programs, read-only.

    New runs appear without a restart. Ctrl-C stops the server after it has sent the answers in progress.

    \b
    kdb serve
    kdb serve --demo
    KDB_TOKEN=… kdb serve --host 0.0.0.0 --allow-host lab.example.org
    """
    if not _is_local(host) and not token:
        raise click.UsageError(f"--host {host} can be reached from other machines. Give --token, or set KDB_TOKEN.")
    own = _LOCAL if _is_local(host) else {"localhost", "127.0.0.1", host, socket.gethostname()}
    _run(
        None if demo else warehouse,
        host=host,
        port=port,
        token=token,
        names={*own, *names},
        workers=workers,
        memory=int(memory * 2**30),
        seconds=seconds,
        queue=queue,
    )


@click.command()
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open the page in a browser.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port to listen on.  [default: a free one]",
)
@click.option(
    "--save",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the warehouse to this new folder instead, so that other commands can query it.",
)
def demo(browser: bool, port: int, folder: Path | None) -> None:
    """Show results of real models in a browser, without running a model.

    The results are a small warehouse that comes with kdb. Ctrl-C stops the server.

    \b
    kdb demo
    kdb demo --save demo-warehouse
    kdb query top-heads --warehouse demo-warehouse
    """
    if folder is not None:
        from kdb.demo import save_demo

        save_demo(folder)
        where = shlex.quote(str(folder))
        click.echo(f"Wrote {folder}. To query it: kdb summary --warehouse {where}")
        click.echo(f"For the DuckDB shell, kdb rebuild --warehouse {where} writes {folder / 'kdb.duckdb'}.")
        return
    _run(None, port=port, names=_LOCAL, in_browser=browser)


_LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names of this machine."""


def _run(
    warehouse: Path | str | None,
    *,
    host: str = "127.0.0.1",
    workers: int | None = None,
    memory: int = 2**30,
    seconds: float = 30.0,
    queue: int = 64,
    token: str | None = None,
    **where: Any,
) -> None:
    """Run the server with half the processors, at least 2, and all of them together for the threads of its workers."""
    from kdb.web.serve import run

    processors = os.cpu_count() or 2
    workers = workers or max(2, processors // 2)
    run(
        warehouse,
        host=host,
        token=token,
        workers=workers,
        memory=memory,
        threads=max(1, processors // workers),
        seconds=seconds,
        queue=queue,
        **where,
    )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
