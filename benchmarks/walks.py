"""Count what has to be read to follow a number: functions and files from a prompt, an answer and a question.

    python benchmarks/walks.py [--list] [--root CHECKOUT]

A tiny Llama is ingested in this process, both studies, and a saved query is asked. At each end of a walk the functions
of kdb on the stack are noted, from the command line down:

- prompt: where the forward pass begins, and where ``activations`` is written to Parquet
- answer: where the forward pass begins that fills the activation cache, and where ``neuron_scores`` is written
- question: where DuckDB runs the statement

A hop is a call from one function of kdb to another; a stay is a row of hops within one file; a return is a stay in a
file that the walk had left. Where a thread of its own writes files, its stack begins there; that of a statement has the
stack of the thread that waits for it before it. Forward passes of checks and ablations are left out; of several stacks
at one end the last counts. The second half of the table counts all functions of kdb that were entered before the end,
in the order of their first calls.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import string
import sys
import tempfile
import threading
from functools import cache
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

ROOMS = ("kdb", "ingest", "analysis", "queries", "warehouse")
TABLES = ("activations", "neuron_scores")
WALKS = {
    "prompt": ("forward pass of concept", "activations written"),
    "answer": ("forward pass of knowledge", "neuron_scores written"),
    "question": ("statement",),
}

ASIDE = ("check", "ablat", "untouched")
"""Words in the names of what runs the model for another reason: checks, and the comparison of methods."""

Calls = tuple[tuple[str, str], ...]
"""Functions of kdb on a stack, as (file, function), outermost first."""


class Stacks:
    """The last stack at each end, noted by a profiler."""

    def __init__(self, root: Path) -> None:
        self.root, self.phase = root, ""
        self.ends: dict[str, Calls] = {}
        self.entered: dict[tuple[str, str], None] = {}
        self.reading: dict[str, Calls] = {}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Note a call, as ``sys.setprofile`` tells it."""
        if event == "call":
            self.entered.update(dict.fromkeys(self._calls(frame, 1)))
        end = self._end(frame, event, arg)
        if end is None:
            return
        calls = self._calls(frame)
        if end == "statement" and threading.current_thread() is not threading.main_thread():
            calls = self._calls(sys._current_frames()[threading.main_thread().ident or 0]) + calls
        aside = "forward" in end and any(word in f"{file} {name}" for word in ASIDE for file, name in calls)
        if calls and not aside:
            self.ends[end] = calls
            self.reading.setdefault(end, tuple(self.entered))

    def _end(self, frame: FrameType, event: str, arg: Any) -> str | None:
        if event == "call" and frame.f_code.co_qualname == "LlamaModel.forward":
            return f"forward pass of {self.phase}"
        if event == "call" and frame.f_code.co_qualname == "ParquetWriter.write_table":
            where = str(getattr(frame.f_locals["self"], "where", ""))
            return next((f"{table} written" for table in TABLES if f"/{table}/" in where), None)
        asked = event == "c_call" and self.phase == "question" and arg.__name__ in {"execute", "sql"}
        return "statement" if asked and "SELECT" in str(frame.f_locals).upper() else None

    def _calls(self, frame: FrameType | None, most: int = 1000) -> Calls:
        calls = []
        while frame is not None and most:
            if file := self._file(frame.f_code.co_filename):
                calls.append((file, frame.f_code.co_qualname))
            frame, most = frame.f_back, most - 1
        return tuple(reversed(calls))

    @cache  # noqa: B019
    def _file(self, name: str) -> str | None:
        """Return the path of a file of kdb under its root; None for other files."""
        path = Path(name)
        inside = path.is_relative_to(self.root) and path.relative_to(self.root).parts[0] in ROOMS
        return str(path.relative_to(self.root)) if inside else None


def kdb(*args: str | Path) -> None:
    """Run a kdb command in this process."""
    from kdb.cli import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main([str(arg) for arg in args], standalone_mode=False)


def walk(root: Path, folder: Path) -> Stacks:
    """Ingest and ask under the profiler; return the stack at each end."""
    from helpers.tiny_llama import make_tiny_model, weather

    model, texts, facts = make_tiny_model(folder / "tiny"), folder / "texts.csv", folder / "facts.csv"
    texts.write_text(weather(40))
    lines = (f"Line {i} begins with,{letter},{i % 26}" for i, letter in enumerate(2 * string.ascii_letters))
    facts.write_text("\n".join(["prompt,answer,category", *lines]))
    stacks = Stacks(root)
    threading.setprofile_all_threads(stacks) if sys.version_info >= (3, 12) else threading.setprofile(stacks)
    sys.setprofile(stacks)
    for stacks.phase, dataset in (("concept", texts), ("knowledge", facts)):
        stacks.entered.clear()
        kdb("ingest", "--model", model, "--dataset", dataset, "--warehouse", folder / "w")
    stacks.phase = "question"
    stacks.entered.clear()
    kdb("query", "concept-depth", "--warehouse", folder / "w")
    sys.setprofile(None)
    return stacks


def count(calls: Calls) -> tuple[int, int, int, int]:
    """Hops, files, stays and returns of a walk."""
    stays = [file for file, _group in groupby(file for file, _function in calls)]
    return len(calls), len(set(stays)), len(stays), len(stays) - len(set(stays))


def main() -> None:
    """Print a row for each walk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the functions, too")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the installed checkout")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    with tempfile.TemporaryDirectory() as folder:
        stacks = walk(options.root.resolve(), Path(folder))
    print(f"{'walk':10}{'on the stack':>24}{'entered before the end':>34}")
    print(f"{'':10}" + 2 * f"{'hops':>6}{'files':>6}{'stays':>6}{'returns':>8}   ")
    for name, ends in WALKS.items():
        walked = sum((stacks.ends[end] for end in ends), ())
        numbers = [*count(walked), *count(stacks.reading[ends[-1]])]
        print(f"{name:10}" + "{:6}{:6}{:6}{:8}   {:6}{:6}{:6}{:8}".format(*numbers))
        for end in ends if options.list else ():
            print(f"  {end}:", *(f"\n    {file}  {function}" for file, function in stacks.ends[end]))


if __name__ == "__main__":
    main()
