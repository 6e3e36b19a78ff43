"""A running ``kdb serve``, for the tests that ask it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx


@dataclass
class Served:
    """The address of a server, its process, and what it has logged."""

    url: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    @property
    def host(self) -> str:
        """Its name and port."""
        return self.url.removeprefix("http://")

    @property
    def address(self) -> tuple[str, int]:
        """Its name, and its port."""
        name, _, port = self.host.rpartition(":")
        return name, int(port)

    def wait_until_busy(self, workers: int) -> None:
        """Return once so many workers are answering."""
        with self.client() as asking:
            while f"kdb_workers_busy {workers}.0" not in asking.get("/metrics").text:
                time.sleep(0.05)

    def line_with(self, text: str) -> str:
        """Return the newest line of the log that holds this text, once there is one."""
        while True:
            for line in reversed(self.log):
                if text in line:
                    return line
            time.sleep(0.05)

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=600, **options)


@contextlib.contextmanager
def served(*args: str | Path, **env: str) -> Iterator[Served]:
    """``kdb serve`` with these options, on a port of its own, until the block ends."""
    command = [str(Path(sys.executable).with_name("kdb")), "serve", "--port", "0", *map(str, args)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
    assert process.stderr is not None
    log = []
    for line in process.stderr:
        log.append(line)
        if found := re.search(r"at (http://\S+)/", line):
            break
    else:
        raise AssertionError("".join(log))
    running = Served(found[1].replace("0.0.0.0", "127.0.0.1"), process, log)
    reader = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        yield running
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=5)
