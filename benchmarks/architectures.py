"""Measure a tiny random model of every architecture that transformers lists, and compare with plain transformers.

    python benchmarks/architectures.py [--only gptj] [--study knowledge] [--dtype float32] [--jobs 2]
    python benchmarks/architectures.py --write docs/architectures.md

Each model is a folder as a user has it, measured by ``kdb.ingest()``. Stored hidden states and scores are compared with
those of plain transformers, one prompt at a time (plain_model.py). A type is measured, refused in one line, or a fault:
a traceback, a crash, a hang or a wrong number, for any of which the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import queue
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiny_architectures import CANNOT_BE_BUILT, is_encoder_decoder, save_model

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

TIME_LIMIT = 240
"""Seconds for all runs of one type."""

ALLOWED = {"float32": {"state": 1e-4, "score": 1e-3}, "bfloat16": {"state": 0.2, "score": 1.0}}
"""Largest difference that rounding explains: of states, relative to their length; of scores, in nats."""

N_TEXTS, N_PROMPTS = 24, 3
WORDS = "river door lamp bread ship cloud garden stone train paper winter bird market glass hill".split()


@dataclass
class Run:
    """What became of one study of one type in one dtype: ``status`` is measured, refused or fault."""

    status: str
    message: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Outcome:
    """What became of one type: ``runs`` by study and dtype."""

    type: str
    kind: str = ""
    model_class: str = ""
    message: str = ""
    runs: dict[str, Run] = field(default_factory=dict)


# One type --------------------------------------------------------------------------------------------------------


def texts() -> list[str]:
    """Texts of three lengths."""
    return [" ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(2 + i % 3)) + f" {i}" for i in range(N_TEXTS)]


def sweep_type(kind: str, studies: Sequence[str], dtypes: Sequence[str], say: Callable[[Outcome], None]) -> None:
    """Build a type and measure it; call ``say`` after each run with all that is known by then."""
    from plain_model import is_causal

    outcome = Outcome(kind)
    if kind in CANNOT_BE_BUILT:
        outcome.message = CANNOT_BE_BUILT[kind]
        return say(outcome)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kind
        try:
            model = save_model(kind, path)
            tokens = _tokens(path)
            causal = is_causal(model, tokens(texts()[2]))
            outcome.model_class, outcome.kind = type(model).__name__, kind_of(kind, model, causal=causal)
        except Exception as error:
            outcome.message = f"cannot be built: {_last_line(error)}"
            return say(outcome)
        say(outcome)
        for study in studies:
            for dtype in dtypes:
                outcome.runs[f"{study} {dtype}"] = _run(type(model), path, study, dtype, tokens)
                say(outcome)
    return None


def kind_of(kind: str, model: Any, *, causal: bool) -> str:
    """Name the kind of an architecture, from its config and the names of its modules."""
    config = model.config
    if is_encoder_decoder(kind):
        return "encoder-decoder"
    if not causal:
        return "masked"
    names = {type(module).__name__.lower() for module in model.modules()}
    mixers = (
        "mamba",
        "mixer",
        "deltanet",
        "shortconv",
        "recurrentblock",
        "rwkv",
        "lstm",
        "lightning",
        "kda",
        "linearattention",
    )
    mixer = any(word in name for name in names for word in mixers)
    attention = any("attention" in name and "linear" not in name and "rwkv" not in name for name in names)
    mixed = "hybrid" if mixer and attention else "state-space" if mixer else ""
    experts = any("expert" in name or "moe" in name.replace("smollm", "") for name in names)
    found = ", ".join(filter(None, (mixed, "experts" if experts else ""))) or "dense"
    return f"wrapper, {found}" if config.get_text_config() is not config else found


def _tokens(folder: Path) -> Callable[[str], list[int]]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def _run(model_class: Any, folder: Path, study: str, dtype: str, tokens: Callable[[str], list[int]]) -> Run:
    from kdb.errors import KdbError

    begun = time.monotonic()
    try:
        run = _measured(model_class, folder, study, dtype, tokens)
    except KdbError as error:
        run = Run("refused", str(error))
    except Exception as error:
        traceback.print_exc()
        run = Run("fault", _last_line(error))
    run.seconds = round(time.monotonic() - begun, 1)
    return run


def _last_line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/ingest/" in f.filename or "/warehouse/" in f.filename or "/kdb/" in f.filename]
    at = (own or frames)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{text} ({Path(at.filename).name}:{at.lineno})"


def _measured(model_class: Any, folder: Path, study: str, dtype: str, tokens: Callable[[str], list[int]]) -> Run:
    import torch

    import kdb

    plain = model_class.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with tempfile.TemporaryDirectory() as place:
        file, warehouse = Path(place) / "texts.csv", Path(place) / "warehouse"
        if study == "concept":
            rows = [("text", "label"), *((text, i % 2) for i, text in enumerate(texts()))]
            options: dict[str, Any] = {}
        else:
            rows = [("prompt", "answer", "category"), *facts(plain, tokens)]
            options = {"answer_prefix": "", "top_k": 30, "query_values": 5, "ablate_k": 3}
        with file.open("w", newline="") as out:
            csv.writer(out).writerows(rows)
        kdb.ingest(folder, file, warehouse=warehouse, dtype=dtype, name="tiny", **options)
        stored = kdb.open(warehouse)
        compare = compare_concept if study == "concept" else compare_knowledge
        return compare(stored, plain, model_class, folder, tokens, dtype)


def facts(plain: Any, tokens: Callable[[str], list[int]]) -> list[tuple[str, str, str]]:
    """Prompts with an answer that the model gives: a letter or digit among its five likeliest tokens.

    Each has a category of its own, with a second prompt whose answer, the rival, is the least likely.
    """
    import torch

    letters = {tokens(letter)[0]: letter for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"}
    found = []
    for i, text in enumerate(texts()):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([tokens(text)]), use_cache=False).logits[0, -1]
        best = [letters[t] for t in logits.float().topk(5).indices.tolist() if t in letters]
        if best and len(found) < 2 * N_PROMPTS:
            rival = min(letters, key=lambda t: float(logits[t]))
            found += [(text, best[0], f"c{i}"), (f"No {text}", letters[rival], f"c{i}")]
    return found or [(texts()[0], "a", "c"), (texts()[1], "b", "c")]


# Comparing -------------------------------------------------------------------------------------------------------


def _verdict(dtype: str, differences: dict[str, float], missing: Sequence[str] = ()) -> Run:
    kinds = {name: "state" if name in ("states", "coefficients") else "score" for name in differences}
    wrong = [name for name, value in differences.items() if not value <= ALLOWED[dtype][kinds[name]]]
    listed = ", ".join(f"{name} differ by {differences[name]:.1e}" for name in wrong)
    message = "; ".join(filter(None, (listed, *(f"not compared: {why}" for why in missing))))
    return Run("fault" if wrong else "measured", message, differences)


def compare_concept(
    stored: Any, plain: Any, _class: Any, _folder: Path, tokens: Callable[[str], list[int]], dtype: str
) -> Run:
    """Compare the stored states of every prompt and layer with those of the plain model."""
    import torch
    from plain_model import NoReferenceError, Plain

    prompts = dict(stored.sql("SELECT text, prompt_id FROM prompts").rows())
    states = stored.sql("SELECT prompt_id, layer, vector FROM activations WHERE site = 'resid_post' ORDER BY layer")
    of: dict[int, list[Any]] = {}
    for prompt, _layer, vector in states.rows():
        of.setdefault(prompt, []).append(vector)
    largest = 0.0
    for text, prompt in prompts.items():
        try:
            expected = Plain(plain, tokens(text)).states
        except NoReferenceError as error:
            return _verdict(dtype, {}, [str(error)])
        found = torch.tensor(of[prompt])
        if found.shape != expected.shape:
            return Run("fault", f"states have the shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        off = (found - expected).norm(dim=1) / expected.norm(dim=1)
        largest = max(largest, float(off.max()))
    return _verdict(dtype, {"states": largest})


def compare_knowledge(
    stored: Any, plain: Any, model_class: Any, folder: Path, tokens: Callable[[str], list[int]], dtype: str
) -> Run:
    """Compare stored scores of layers, heads and neurons with those by definition, in float64."""
    from plain_model import NoReferenceError, Plain, Scores, find_parts

    prompts = stored.sql("SELECT prompt_id, text, target_token_id FROM prompts WHERE kept").rows()
    if not prompts:
        return Run("fault", "no prompt was kept")
    differences: dict[str, float] = {}
    missing: list[str] = []
    parts = None
    for prompt, text, target in prompts:
        ids = tokens(text)
        try:
            if parts is None:
                exact = plain if dtype == "float32" else model_class.from_pretrained(folder).float().eval()
                parts = find_parts(Plain(exact, ids))
            scores = Scores(Plain(plain, ids), parts, target)
        except NoReferenceError as error:
            return _verdict(dtype, {}, [str(error)])
        for name, compare in COMPARED.items():
            try:
                for off in compare(stored, scores, prompt):
                    differences[name] = max(differences.get(name, 0.0), off)
            except NoReferenceError as error:
                if str(error) not in missing:
                    missing.append(str(error))
    return _verdict(dtype, differences, missing)


COMPARED = {
    "layers": lambda *of: _layers(*of),
    "heads": lambda *of: _heads(*of),
    "neurons": lambda *of: _neurons(*of),
    "coefficients": lambda *of: _coefficients(*of),
}
"""What is compared, by its name in the table."""


def _layers(stored: Any, scores: Any, prompt: int) -> Iterator[float]:
    rows = stored.sql(f"SELECT layer, component, score FROM layer_scores WHERE prompt_id = {prompt}").rows()
    for layer, component, score in rows:
        yield abs(score - scores.layer(layer, component))


def _heads(stored: Any, scores: Any, prompt: int) -> Iterator[float]:
    query = f"SELECT layer, score FROM head_scores WHERE prompt_id = {prompt} ORDER BY layer, head"
    by_layer: dict[int, list[float]] = {}
    for layer, score in stored.sql(query).rows():
        by_layer.setdefault(layer, []).append(score)
    for layer, found in by_layer.items():
        expected = scores.heads(layer, len(found)).tolist()
        yield max(abs(a - b) for a, b in zip(found, expected, strict=True))


def _neurons(stored: Any, scores: Any, prompt: int) -> Iterator[float]:
    import torch

    query = (
        "SELECT layer, component, expert, list(coalesce(head, 0)), list(neuron), list(coefficient), list(score) "
        f"FROM neuron_scores WHERE prompt_id = {prompt} GROUP BY layer, component, expert"
    )
    n_heads = dict(
        stored.sql(f"SELECT layer, count(*) FROM head_scores WHERE prompt_id = {prompt} GROUP BY layer").rows()
    )
    for layer, component, expert, heads, neurons, coefficients, found in stored.sql(query).rows():
        of = scores.linear(layer, component, expert)
        size = len(of.entries) // n_heads[layer] if component == "attn" else 0
        entries = torch.tensor(neurons) + size * torch.tensor(heads)
        given = torch.tensor(coefficients).double()
        expected = scores.neurons(layer, component, of.columns[entries], given)
        yield float((expected - torch.tensor(found).double()).abs().max())


def _coefficients(stored: Any, scores: Any, prompt: int) -> Iterator[float]:
    """Relative differences of the coefficients of FFN neurons from what the projection reads."""
    import torch

    query = (
        "SELECT layer, expert, list(neuron), list(coefficient) FROM neuron_scores "
        f"WHERE component = 'ffn' AND prompt_id = {prompt} GROUP BY layer, expert"
    )
    for layer, expert, neurons, found in stored.sql(query).rows():
        entries = scores.linear(layer, "ffn", expert).entries
        yield float((entries[torch.tensor(neurons)] - torch.tensor(found).double()).abs().max() / entries.abs().max())


def _experts(stored: Any, scores: Any, prompt: int) -> Iterator[float]:
    """Differences of the scores of whole experts."""
    query = f"SELECT layer, expert, score FROM expert_scores WHERE prompt_id = {prompt}"
    for layer, expert, score in stored.sql(query).rows():
        yield abs(score - scores.expert(layer, expert))


# All types -------------------------------------------------------------------------------------------------------


def all_types() -> list[str]:
    """Every causal type that the installed transformers lists, and some multimodal ones."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(x for x in WRAPPERS if x not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]


def _serve(pipe: Any, studies: Sequence[str], dtypes: Sequence[str]) -> None:
    """Work of a process: for each type that comes, send its outcome as it grows, then None."""
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    while (kind := pipe.recv()) is not None:
        sweep_type(kind, studies, dtypes, lambda outcome: pipe.send(outcome))
        pipe.send(None)


class Worker:
    """A process that measures types one after the other; a crash or a hang costs the type, not the sweep."""

    def __init__(self, studies: Sequence[str], dtypes: Sequence[str]) -> None:
        self.studies, self.dtypes = studies, dtypes
        self.process: Any = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.studies, self.dtypes), daemon=True)
        self.process.start()
        other.close()

    def outcome(self, kind: str) -> Outcome:
        """Measure a type."""
        if self.process is None or not self.process.is_alive():
            self._start()
        outcome, until = Outcome(kind), time.monotonic() + TIME_LIMIT
        try:
            self.pipe.send(kind)
            while self.pipe.poll(max(0.0, until - time.monotonic())):
                if (found := self.pipe.recv()) is None:
                    return outcome
                outcome = found
            why = f"took more than {TIME_LIMIT} s"
        except (EOFError, OSError):
            self.process.join(5)
            why = f"the process ended with exit code {self.process.exitcode}"
        self.stop()
        return _broken(outcome, why, self.studies, self.dtypes)

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _broken(outcome: Outcome, why: str, studies: Sequence[str], dtypes: Sequence[str]) -> Outcome:
    names = [f"{study} {dtype}" for study in studies for dtype in dtypes]
    left = [name for name in names if name not in outcome.runs]
    if not outcome.kind or not left:
        outcome.message = f"cannot be built: {why}"
        return outcome
    outcome.runs[left[0]] = Run("fault", why)
    for name in left[1:]:
        outcome.runs[name] = Run("fault", "not tried, since another run crashed")
    return outcome


def sweep(
    kinds: Sequence[str], studies: Sequence[str] = STUDIES, dtypes: Sequence[str] = DTYPES, jobs: int = 2
) -> Iterator[Outcome]:
    """Measure types in processes of their own; yield outcomes as they come."""
    waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    for kind in [*kinds, *[None] * jobs]:
        waiting.put(kind)

    def work() -> None:
        worker = Worker(studies, dtypes)
        while (kind := waiting.get()) is not None:
            done.put(worker.outcome(kind))
        worker.stop()

    for _ in range(jobs):
        threading.Thread(target=work, daemon=True).start()
    for _ in kinds:
        yield done.get()


# The table -------------------------------------------------------------------------------------------------------

NOT_DECODERS = ("encoder-decoder", "masked")


def table(outcomes: Sequence[Outcome], studies: Sequence[str], dtypes: Sequence[str]) -> str:
    """Return the Markdown table: a line for each type."""
    columns = [f"{study} {dtype}" for study in studies for dtype in dtypes]
    lines = [f"| type | kind | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
    for outcome in outcomes:
        cells = [_cell(outcome.runs[c]) if c in outcome.runs else "" for c in columns]
        cells = cells if outcome.runs else [outcome.message, *[""] * (len(columns) - 1)]
        lines.append(f"| {outcome.type} | {outcome.kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(run: Run) -> str:
    message = run.message.replace("|", "/")
    if run.status == "measured":
        found = ", ".join(f"{name} {value:.0e}" for name, value in run.differences.items())
        return found + (f" ({message})" if message else "")
    return f"{'**fault**' if run.status == 'fault' else 'refused'}: {message}"


def summary(outcomes: Sequence[Outcome], studies: Sequence[str], dtypes: Sequence[str]) -> str:
    """Return the line that counts the decoder types that were measured."""
    decoders = [o for o in outcomes if o.runs and o.kind not in NOT_DECODERS]
    counts = []
    for study in studies:
        n = sum(all(o.runs[f"{study} {dtype}"].status == "measured" for dtype in dtypes) for o in decoders)
        counts.append(f"{study} study: {n} of {len(decoders)} decoder types measured")
    return "; ".join(counts) + f"; {len(faults(outcomes))} faults."


def faults(outcomes: Sequence[Outcome]) -> list[str]:
    """Names of what is neither measured nor refused."""
    found = [
        f"{o.type} {name}: {run.message}" for o in outcomes for name, run in o.runs.items() if run.status == "fault"
    ]
    built = [f"{o.type}: {o.message}" for o in outcomes if o.message and o.type not in CANNOT_BE_BUILT]
    return [*built, *found]


def main() -> None:
    """Run the sweep; exit with 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="TYPE", help="this type; repeatable")
    parser.add_argument("--study", action="append", choices=STUDIES)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    options = parser.parse_args()
    kinds, studies, dtypes = options.only or all_types(), options.study or STUDIES, options.dtype or DTYPES
    outcomes: dict[str, Outcome] = {}
    for n, outcome in enumerate(sweep(kinds, studies, dtypes, options.jobs), start=1):
        outcomes[outcome.type] = outcome
        print(f"{n}/{len(kinds)} {outcome.type} [{outcome.kind}] {outcome.message}", file=sys.stderr)
        for name, run in outcome.runs.items():
            print(f"    {name}: {_cell(run)} ({run.seconds} s)", file=sys.stderr, flush=True)
    ordered = [outcomes[kind] for kind in kinds]
    print(table(ordered, studies, dtypes))
    print(summary(ordered, studies, dtypes))
    if options.json:
        options.json.write_text(json.dumps([asdict(o) for o in ordered], indent=1))
    sys.exit(bool(faults(ordered)))


if __name__ == "__main__":
    main()
