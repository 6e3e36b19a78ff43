"""Ingest killed (SIGKILL) at random moments and resumed, while a reader asks: nothing lost, doubled or half visible.

    python benchmarks/kills.py                       # 1,000 kills of writers into local folders
    python benchmarks/kills.py --bucket --kills 200  # into an S3 server on loopback, from two machines' caches in turn
    python benchmarks/kills.py --upkeep --kills 300  # commands that change committed runs

A tiny random model is measured on 40 prompts in ten parts. After each commit the rows are compared with those of an
ingest that was left alone, and every file with its checksum. With ``--upkeep``, compact, keep-vectors, remove, import
and migrate are killed, and each answer is compared with what those commands may leave
(tests/helpers/killing_commands.py). Exits with 1 unless all of it is as it should be.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.killing import Tally, Writers, kill_writers
from helpers.killing_commands import Commands
from helpers.object_store import object_store
from helpers.tiny_llama import make_tiny_model, preload, weather

from kdb.warehouse import bucket_storage


def forks() -> ForkServerContext:
    """Context that forks processes from one that has imported what they use."""
    context = multiprocessing.get_context("forkserver")
    helpers = ["helpers.killing", "helpers.killing_commands"]
    context.set_forkserver_preload([name for name in preload() if name not in ("pytest", "hypothesis")] + helpers)
    return context


@contextlib.contextmanager
def writers(folder: Path, *, bucket: bool) -> Iterator[Writers]:
    """Yield an object that starts writing processes, whose warehouses are folders or in a bucket."""
    context = forks()
    model = make_tiny_model(folder / "tiny")
    dataset = folder / "weather.csv"
    dataset.write_text(weather(40))
    if not bucket:
        yield Writers(context, model, dataset, lambda number: str(folder / f"warehouse-{number}"), folder)
        return
    bucket_storage.user_cache_path = lambda _: folder / "reader"  # type: ignore[assignment]  # a cache of its own
    with object_store() as store:
        os.environ.update(store.environment)
        location = "s3://lab/{}".format
        yield Writers(context, model, dataset, location, folder, store.environment)


@click.command()
@click.option("--kills", default=1000, show_default=True)
@click.option("--bucket", is_flag=True, help="Write into an object store.")
@click.option("--upkeep", is_flag=True, help="Kill commands that change committed runs.")
@click.option("--seed", default=3, show_default=True)
def main(kills: int, bucket: bool, upkeep: bool, seed: int) -> None:
    """Kill writers, and say what came of it."""
    begun, shown = time.monotonic(), 0

    def tell(tally: Tally) -> None:
        nonlocal shown
        if tally.kills >= shown + max(1, kills // 10):
            shown = tally.kills
            print(f"{time.monotonic() - begun:6.0f} s: {tally}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        if upkeep:
            os.environ["XDG_CACHE_HOME"] = folder
            tally = Commands(Path(folder), forks(), seed, told=tell).rounds(kills)
        else:
            with writers(Path(folder), bucket=bucket) as started:
                tally = kill_writers(started, kills, seed=seed, told=tell)
    print(tally)
    for trouble in tally.troubles[:5]:
        print(f"  {trouble}")
    sys.exit(0 if tally.sound else 1)


if __name__ == "__main__":
    main()
