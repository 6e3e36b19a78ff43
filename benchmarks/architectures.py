"""Measure a tiny random model of every architecture that transformers lists, and compare with plain transformers.

    python benchmarks/architectures.py [--only gptj] [--study knowledge] [--dtype float32] [--jobs 2]
    python benchmarks/architectures.py --write docs/architectures.md

A type is measured, refused in one line, or a fault: a traceback, a crash, a hang or a wrong number, for any of which
the exit code is 1. Models are measured in processes of their own, so that none of them ends the sweep. Progress is on
stderr, the page on stdout. All types take about half an hour on two free cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure_architecture import NOT_DECODERS, Outcome, Run, measure_type
from tiny_architectures import CANNOT_BE_BUILT

STUDIES = ("concept", "knowledge")
DTYPES = ("float32", "bfloat16")
WRAPPERS = (
    "aya_vision",
    "idefics3",
    "internvl",
    "llava",
    "mistral3",
    "paligemma",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
)
"""Multimodal types beyond those that transformers lists as causal language models."""


def all_types() -> list[str]:
    """Every causal type that the installed transformers lists, and some multimodal ones."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(x for x in WRAPPERS if x not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]


# Processes -------------------------------------------------------------------------------------------------------


def serve(pipe: Any, studies: Sequence[str], dtypes: Sequence[str]) -> None:
    """Work of a process: for each type that comes, send its outcome as it grows, then None."""
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    while (kind := pipe.recv()) is not None:
        measure_type(kind, studies, dtypes, pipe.send)
        pipe.send(None)


class Worker:
    """A process that measures types one after the other; a crash or a hang costs the type, not the sweep."""

    def __init__(
        self, studies: Sequence[str], dtypes: Sequence[str], limit: float, work: Callable[..., None] = serve
    ) -> None:
        """``limit``: seconds for all runs of a type. ``work``: what the process does."""
        self.studies, self.dtypes, self.limit, self.work = studies, dtypes, limit, work
        self.process: Any = None

    def outcome(self, kind: str) -> Outcome:
        """Measure a type."""
        if self.process is None:
            self._start()
        outcome, until = Outcome(kind), time.monotonic() + self.limit
        try:
            self.pipe.send(kind)
            while self.pipe.poll(max(0.0, until - time.monotonic())):
                if (found := self.pipe.recv()) is None:
                    return outcome
                outcome = found
            why = f"took more than {self.limit:.0f} s"
        except (EOFError, OSError):
            self.process.join(5)
            why = f"the process ended with exit code {self.process.exitcode}"
        self.stop()
        return self._broken(outcome, why)

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=self.work, args=(other, self.studies, self.dtypes), daemon=True)
        self.process.start()
        other.close()

    def _broken(self, outcome: Outcome, why: str) -> Outcome:
        """Name the run in which the process ended; those after it were not tried."""
        names = [f"{study} {dtype}" for study in self.studies for dtype in self.dtypes]
        left = [name for name in names if name not in outcome.runs]
        if not outcome.kind or not left:
            outcome.message = why
            return outcome
        outcome.runs |= {name: Run("fault", "not tried, since the run before it failed") for name in left}
        outcome.runs[left[0]] = Run("fault", why)
        return outcome


def sweep(
    kinds: Sequence[str],
    studies: Sequence[str] = STUDIES,
    dtypes: Sequence[str] = DTYPES,
    jobs: int = 2,
    limit: float = 300,
) -> Iterator[Outcome]:
    """Measure types in ``jobs`` processes of their own; yield outcomes as they come."""
    waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    for kind in [*kinds, *[None] * jobs]:
        waiting.put(kind)

    def work() -> None:
        worker = Worker(studies, dtypes, limit)
        while (kind := waiting.get()) is not None:
            done.put(worker.outcome(kind))
        worker.stop()

    for _ in range(jobs):
        threading.Thread(target=work, daemon=True).start()
    for _ in kinds:
        yield done.get()


# The page --------------------------------------------------------------------------------------------------------

ABOVE = """\
# Architectures

A tiny random model of every architecture that transformers {version} lists was measured in both studies, and what was
stored was compared with plain transformers, one prompt at a time: hidden states, and scores of layers, heads, neurons
and experts by their definition in float64. The table gives the largest difference in {dtypes}: of hidden states
relative to their length, of scores in nats, of coefficients relative to the largest.

A model that is not listed is checked in the same way before it is measured, and is refused if a sum is off by more
than rounding explains. In bfloat16, that happens where rounding changes which experts are chosen.
`python benchmarks/architectures.py{options}` prints this page; `--only TYPE` measures one architecture.

"""


def page(outcomes: Sequence[Outcome], studies: Sequence[str], dtypes: Sequence[str]) -> str:
    """Return docs/architectures.md."""
    import transformers

    options = "".join(f" --dtype {dtype}" for dtype in dtypes) if tuple(dtypes) != DTYPES else ""
    return "\n".join(
        [
            ABOVE.format(version=transformers.__version__, dtypes=" and in ".join(dtypes), options=options)
            + summary(outcomes, studies, dtypes)
            + "\n",
            f"| type | kind | {' | '.join(f'{study} study' for study in studies)} |",
            "| --- " * (2 + len(studies)) + "|",
            *(line(outcome, studies, dtypes) for outcome in outcomes),
            "",
        ]
    )


def line(outcome: Outcome, studies: Sequence[str], dtypes: Sequence[str]) -> str:
    """Return the line of a type."""
    cells = [cell([outcome.runs[f"{study} {dtype}"] for dtype in dtypes], dtypes) for study in studies if outcome.runs]
    if len(set(cells)) == 1 and len(cells) > 1 and cells[0].startswith("refused"):
        cells = [cells[0], *["the same"] * (len(cells) - 1)]
    if not cells:
        why = "not built" if outcome.type in CANNOT_BE_BUILT else "**fault**"
        cells = [f"{why}: {_plain(outcome.message)}", *[""] * (len(studies) - 1)]
    return f"| {outcome.type} | {outcome.kind} | {' | '.join(cells)} |"


def cell(runs: Sequence[Run], dtypes: Sequence[str]) -> str:
    """Describe the runs of one study: the largest differences, or why there are none."""
    texts = [_described(run, dtype) for run, dtype in zip(runs, dtypes, strict=True)]
    missing = list(dict.fromkeys(why for run in runs for why in run.missing))
    texts = list(dict.fromkeys(texts)) if all(run.status != "measured" for run in runs) else texts
    return ", ".join(texts) + (f" (not compared: {_plain('; '.join(missing))})" if missing else "")


def _described(run: Run, dtype: str) -> str:
    if run.status == "measured":
        return bound(max(run.differences.values()), dtype) if run.differences else "measured"
    return f"{'**fault**' if run.status == 'fault' else 'refused'}: {_plain(run.message)}"


def bound(value: float, dtype: str) -> str:
    """Return a power of ten that another machine's rounding keeps: above thrice the value, and the dtype's rounding."""
    import torch

    return f"< 1e{math.ceil(math.log10(max(3 * value, torch.finfo(getattr(torch, dtype)).eps)))}"


def _plain(message: str) -> str:
    """Return a message without what would break a table."""
    return message.replace("|", "/").replace("<", "&lt;").replace("tiny", "It", 1) if message else ""


def summary(outcomes: Sequence[Outcome], studies: Sequence[str], dtypes: Sequence[str]) -> str:
    """Return the line that counts the decoder types that were measured."""
    decoders = [o for o in outcomes if o.runs and o.kind not in NOT_DECODERS]
    counts = []
    for study in studies:
        n = {d: sum(o.runs[f"{study} {d}"].status == "measured" for o in decoders) for d in dtypes}
        each = " and ".join(f"{measured} in {dtype}" for dtype, measured in n.items())
        counts.append(f"{study} study: {each} of {len(decoders)} decoder types measured")
    return f"{'; '.join(counts)}; {len(faults(outcomes))} faults.".capitalize()


def faults(outcomes: Sequence[Outcome]) -> list[str]:
    """Describe what is neither measured nor refused."""
    built = [f"{o.type}: {o.message}" for o in outcomes if o.message and o.type not in CANNOT_BE_BUILT]
    runs = [(o, name, run) for o in outcomes for name, run in o.runs.items() if run.status == "fault"]
    return [*built, *(f"{o.type} {name}: {run.message}" for o, name, run in runs)]


# The command -----------------------------------------------------------------------------------------------------


def _told(outcome: Outcome) -> Iterator[str]:
    """Lines of progress about a type."""
    yield f"{outcome.type} [{outcome.kind}] {outcome.message}"
    for name, run in outcome.runs.items():
        found = ", ".join(f"{what} {value:.0e}" for what, value in run.differences.items())
        missing = "; ".join(f"not compared: {why}" for why in run.missing)
        yield f"    {name}: {', '.join(filter(None, (run.status, found, run.message, missing)))} ({run.seconds} s)"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="TYPE", help="measure this type; repeatable")
    parser.add_argument("--study", action="append", choices=STUDIES)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--limit", type=float, default=300, help="seconds for all runs of a type")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file as they come")
    parser.add_argument("--write", type=Path, help="write the page to this file")
    return parser.parse_args()


def main() -> None:
    """Run the sweep; exit with 1 if there is a fault."""
    options = _options()
    kinds, studies, dtypes = options.only or all_types(), options.study or STUDIES, options.dtype or DTYPES
    found: dict[str, Outcome] = {}
    for outcome in sweep(kinds, studies, dtypes, options.jobs, options.limit):
        found[outcome.type] = outcome
        print(f"{len(found)}/{len(kinds)}", *_told(outcome), sep="\n", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(one) for one in found.values()], indent=1))
    outcomes = [found[kind] for kind in kinds]
    text = page(outcomes, studies, dtypes)
    if options.write:
        options.write.write_text(text)
    print(text if not options.write else summary(outcomes, studies, dtypes))
    print(*faults(outcomes), sep="\n", file=sys.stderr)
    sys.exit(bool(faults(outcomes)))


if __name__ == "__main__":
    main()
