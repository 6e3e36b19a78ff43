"""Time `kdb serve` on a warehouse of 20 million neuron scores, with 1, 8 and 64 clients at once.

    python benchmarks/serve.py

The numbers are invented (tests/helpers/synthetic.py), their sizes are realistic: nine models, 2,430 kept prompts. For a
saved query, a web page and a page of a table, prints the median and the 99th percentile of the time until the last
byte: for new requests, and for repeated ones, whose answers are cached. Then it downloads a whole table, prints the
peak memory of all processes, and ingests a run while 8 clients send requests. A failed request ends the benchmark.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.served import Served, served
from helpers.synthetic import CATEGORIES, NINE_CONCEPTS, NINE_MODELS, build

from kdb.warehouse.store import Warehouse

CLIENTS = (1, 8, 64)
REQUESTS = {1: 40, 8: 80, 64: 192}
TOP_K = 4573
"""Neurons of each component stored for a prompt: 9 models × 243 prompts × 2 × 4,573 are 20 million."""

NAMES = [model.name for model in NINE_MODELS]


def saved_query() -> Iterator[str]:
    """`top-neurons` of a model and a category, which reads that model's share of the 20 million rows."""
    for k, model, category in itertools.product(range(10, 1000), NAMES, CATEGORIES):
        yield f"/api/queries/top-neurons?model={model}&category={category}&k={k}"


def page() -> Iterator[str]:
    """A head's page: three saved queries."""
    for head, layer, model in itertools.product(range(8), range(18), NAMES):
        yield f"/head?model={model}&layer={layer}&head={head}"


def table() -> Iterator[str]:
    """A page of the large table, sorted by its key."""
    for prompt, model in itertools.product(range(200), NAMES):
        yield f"/api/tables/neuron_scores?filter=model={model}&filter=prompt_id%3E={prompt}&limit=100"


class Memory:
    """The largest sum of proportional memory of a process and its children, looked at twice a second."""

    def __init__(self, pid: int) -> None:
        self.peak, self._process, self._over = 0, psutil.Process(pid), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._process.is_running() and not self._over.wait(0.5):
            self.peak = max(self.peak, sum(map(_pss, [self._process, *self._children()])))

    def _children(self) -> list[psutil.Process]:
        try:
            return self._process.children(recursive=True)
        except psutil.Error:
            return []


def _pss(process: psutil.Process) -> int:
    """A process's memory, where pages that several share are counted once."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


async def ask(server: Served, paths: list[str], clients: int) -> list[float]:
    """Seconds that each request took."""
    took: list[float] = []
    waiting = iter(paths)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

        async def one() -> None:
            for path in waiting:
                begun = time.perf_counter()
                response = await client.get(path)
                took.append(time.perf_counter() - begun)
                if response.status_code != 200:
                    raise SystemExit(f"{path}: {response.status_code} {response.text[:200]}")

        await asyncio.gather(*(one() for _ in range(clients)))
    return took


def told(took: list[float]) -> str:
    """p50 and p99 in milliseconds."""
    ordered = statistics.quantiles(took, n=100, method="inclusive")
    return f"{1000 * statistics.median(took):9.0f} {1000 * ordered[98]:9.0f}"


def measure(server: Served, kinds: dict[str, Callable[[], Iterator[str]]]) -> None:
    """A row per kind of question and number of clients."""
    print(f"{'ms':24} {'clients':>7} {'p50 new':>9} {'p99':>9} {'p50 kept':>9} {'p99':>9}")
    for name, paths in kinds.items():
        fresh = paths()
        for clients in CLIENTS:
            asked = list(itertools.islice(fresh, REQUESTS[clients]))
            new = asyncio.run(ask(server, asked, clients))
            kept = asyncio.run(ask(server, asked, clients))
            print(f"{name:24} {clients:7} {told(new)} {told(kept)}", flush=True)


def beside_ingest(server: Served, warehouse: Path) -> None:
    """Questions while a run of two million rows is written, and until it has appeared."""

    def runs() -> int:
        return int(httpx.get(f"{server.url}/healthz").json()["runs"])

    before = runs()
    one = NINE_MODELS[0].__class__("llama-beside", "llama", 6_700_000_000, 32, 32)
    writing = threading.Thread(target=build, args=(warehouse, [one], NINE_CONCEPTS[:1], 45, TOP_K))
    writing.start()
    fresh, took = saved_query(), []
    list(itertools.islice(fresh, 5000))
    while writing.is_alive():
        took += asyncio.run(ask(server, list(itertools.islice(fresh, 32)), 8))
    writing.join()
    took += asyncio.run(ask(server, list(itertools.islice(fresh, 32)), 8))
    print(f"beside an ingest: {len(took)} requests, none failed; ms {told(took)}; runs {before}, then {runs()}")


def download(server: Served) -> None:
    """The whole large table, and how fast it came."""
    for format_ in ("arrow", "csv"):
        begun, sent = time.perf_counter(), 0
        with httpx.stream("GET", f"{server.url}/api/tables/neuron_scores?format={format_}", timeout=120) as response:
            for chunk in response.iter_raw():
                sent += len(chunk)
        took = time.perf_counter() - begun
        print(f"whole table as {format_}: {sent / 2**20:,.0f} MiB in {took:.0f} s", flush=True)


def main() -> None:
    """Build, serve, ask, print."""
    with tempfile.TemporaryDirectory() as folder:
        warehouse = Path(folder) / "warehouse"
        begun = time.perf_counter()
        wh: Warehouse = build(warehouse, concepts=NINE_CONCEPTS[:1], top_k=TOP_K)
        rows = wh.sql("SELECT count(*) AS n FROM neuron_scores")["n"][0]
        print(f"built in {time.perf_counter() - begun:.0f} s: {rows:,} neuron scores", flush=True)
        with served("--warehouse", warehouse) as server:
            memory = Memory(server.process.pid)
            measure(server, {"saved query top-neurons": saved_query, "page of a head": page, "page of a table": table})
            asked = memory.peak
            download(server)
            mib = f"{asked / 2**20:,.0f} MiB, with downloads {memory.peak / 2**20:,.0f} MiB"
            print(f"peak memory of all processes: {mib}")
            beside_ingest(server, warehouse)


if __name__ == "__main__":
    main()
