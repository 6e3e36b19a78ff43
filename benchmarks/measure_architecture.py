"""Measure one tiny model by ``kdb.ingest()``, and compare what was stored with plain transformers.

The model is a folder as a user has it. Prompts run one at a time through plain transformers (plain_model.py), and
scores are computed there by their definition in float64 (plain_scores.py).
"""

from __future__ import annotations

import csv
import functools
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from plain_model import NoReferenceError, Plain, WrongRowError, find_parts, is_causal
from plain_scores import Scores
from tiny_architectures import CANNOT_BE_BUILT, is_encoder_decoder, save_model

import kdb
from kdb.errors import KdbError

ALLOWED = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest difference that rounding explains: of states and coefficients, relative; of scores, in nats."""

NOT_DECODERS = ("encoder-decoder", "masked")
N_TEXTS, N_PROMPTS = 24, 2
WORDS = ("river", "door", "lamp", "bread", "ship", "cloud", "garden", "stone", "train", "paper", "winter", "bird")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

Tokens = Callable[[str], list[int]]


@dataclass
class Run:
    """Outcome of one study in one dtype: ``status`` is measured, refused or fault.

    ``differences`` are the largest ones by what was compared; ``missing`` says what could not be compared, and why.
    """

    status: str
    message: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Outcome:
    """Outcome of one type: ``runs`` by study and dtype. ``message`` says why there are none."""

    type: str
    kind: str = ""
    message: str = ""
    runs: dict[str, Run] = field(default_factory=dict)


def measure_type(kind: str, studies: Sequence[str], dtypes: Sequence[str], say: Callable[[Outcome], None]) -> None:
    """Build a type and measure it; call ``say`` after each step with all that is known by then."""
    outcome = Outcome(kind, message=CANNOT_BE_BUILT.get(kind, ""))
    with tempfile.TemporaryDirectory() as folder:
        model = None if outcome.message else _built(outcome, Path(folder) / kind)
        say(outcome)
        for study, dtype in [(study, dtype) for study in studies for dtype in dtypes] if model else ():
            tiny = TinyModel(type(model), Path(folder) / kind, dtype)
            outcome.runs[f"{study} {dtype}"] = measure(tiny, study, outcome.kind)
            say(outcome)


def _built(outcome: Outcome, folder: Path) -> Any:
    """Save a model of a type; return it, or None with a message in the outcome."""
    try:
        model = save_model(outcome.type, folder)
        causal = is_causal(model, tokens_of(folder)(texts()[2]))
    except Exception as error:
        traceback.print_exc()
        outcome.message = f"cannot be built: {last_line(error)}"
        return None
    outcome.kind = kind_of(outcome.type, model, causal=causal)
    return model


@dataclass(frozen=True)
class TinyModel:
    """A saved model, as kdb and plain transformers load it."""

    model_class: Any
    folder: Path
    dtype: str

    def plain(self, dtype: str | None = None) -> Any:
        """Load it by plain transformers."""
        return self.model_class.from_pretrained(self.folder, dtype=getattr(torch, dtype or self.dtype)).eval()

    @functools.cached_property
    def runs(self) -> bool:
        """Whether plain transformers runs it in this dtype: some models' code mixes number formats."""
        plain, tokens = self.plain(), tokens_of(self.folder)
        try:
            for text in texts()[:3]:  # one of each length
                plain(input_ids=torch.tensor([tokens(text)]), use_cache=False)
        except RuntimeError:
            return False
        return True


# Kinds -----------------------------------------------------------------------------------------------------------

_MIXERS = ("mamba", "mixer", "deltanet", "shortconv", "recurrentblock", "rwkv", "lstm", "lightning", "deltaattention")


def kind_of(name: str, model: Any, *, causal: bool) -> str:
    """Name the kind of an architecture, from its config and the classes of its modules."""
    if is_encoder_decoder(name):
        return "encoder-decoder"
    if not causal:
        return "masked"
    text = model.config.get_text_config()
    prefix = type(text).__name__.replace("TextConfig", "").replace("Config", "")
    classes = {type(module).__name__.replace(prefix, "").lower() for module in model.modules()}
    rwkv = prefix == "Rwkv"  # which calls its mixer attention
    mixer = rwkv or prefix == "xLSTM" or any(word in one for one in classes for word in _MIXERS)
    attention = not rwkv and any("attention" in x and not any(word in x for word in _MIXERS) for x in classes)
    experts = any("expert" in one or "moe" in one for one in classes)
    own = attention and not getattr(model, "_supports_sdpa", True)
    kinds = ["hybrid" if mixer and attention else "state-space" if mixer else "", "experts" if experts else ""]
    found = ", ".join(filter(None, kinds)) or "dense"
    return ("wrapper, " if text is not model.config else "") + found + (", eager" if own else "")


# Data ------------------------------------------------------------------------------------------------------------


def texts() -> list[str]:
    """Texts of three lengths."""
    return [" ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(2 + i % 3)) + f" {i}" for i in range(N_TEXTS)]


def tokens_of(folder: Path) -> Tokens:
    """Return the function that tokenizes a text, without special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


ANY_FACTS = [(texts()[0], "a", "c"), (texts()[1], "b", "c")]
"""Prompts for a model that gives no answer."""


def facts(plain: Any, tokens: Tokens) -> list[tuple[str, str, str]]:
    """Prompts with an answer that the model gives: a letter or digit among its five likeliest tokens.

    Each has a category of its own, with a second prompt whose answer, the rival, is the least likely.
    """
    letters, found = {tokens(letter)[0]: letter for letter in LETTERS}, []
    for i, text in enumerate(texts()):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([tokens(text)]), use_cache=False).logits[0, -1].float()
        best = [letters[t] for t in logits.topk(5).indices.tolist() if t in letters]
        if best and len(found) < 2 * N_PROMPTS:
            rival = min(letters, key=lambda t: float(logits[t]))
            found += [(text, best[0], f"c{i}"), (f"No {text}", letters[rival], f"c{i}")]
    return found or ANY_FACTS


# Measuring -------------------------------------------------------------------------------------------------------


def measure(tiny: TinyModel, study: str, kind: str) -> Run:
    """Measure a model; anything that is raised except kdb's own errors is a fault."""
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as place:
            run = _compared(ingested(tiny, study, Path(place)), tiny, study, kind)
    except KdbError as error:
        # A library's own error may be the reason; one of these is a mistake of kdb's, since the model runs.
        mistake = isinstance(error.__cause__, TypeError | AttributeError | LookupError | RuntimeError | AssertionError)
        mistake = mistake and tiny.runs
        run = Run("fault" if mistake else "refused", " ".join(str(error).split()))
    except Exception as error:
        traceback.print_exc()
        run = Run("fault", last_line(error))
    run.seconds = round(time.monotonic() - begun, 1)
    return run


def _compared(warehouse: Any, tiny: TinyModel, study: str, kind: str) -> Run:
    compare = compare_concept if study == "concept" else compare_knowledge
    with warehouse.snapshot() as stored:  # one connection for all questions
        run = compare(stored, tiny)
        return _wrong_sizes(stored, tiny, kind) or run


def last_line(error: Exception) -> str:
    """Describe an unexpected error in one line, with the place in kdb where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if any(f"/{part}/" in f.filename for part in ("ingest", "warehouse", "kdb", "queries"))]
    at = (own or frames)[-1]
    return f"{' '.join(f'{type(error).__name__}: {error}'.split())[:200]} ({Path(at.filename).name}:{at.lineno})"


def ingested(tiny: TinyModel, study: str, place: Path) -> Any:
    """Measure a model as a user would, and return the open warehouse."""
    rows: Sequence[tuple[Any, ...]]
    if study == "concept":
        options: dict[str, Any] = {}
        rows = [("text", "label"), *((text, i % 2) for i, text in enumerate(texts()))]
    else:
        options = {"answer_prefix": "", "top_k": 30, "query_values": 5, "ablate_k": 3}
        rows = [
            ("prompt", "answer", "category"),
            *(facts(tiny.plain(), tokens_of(tiny.folder)) if tiny.runs else ANY_FACTS),
        ]
    with (place / "texts.csv").open("w", newline="") as out:
        csv.writer(out).writerows(rows)
    where = place / "warehouse"
    kdb.ingest(tiny.folder, place / "texts.csv", warehouse=where, dtype=tiny.dtype, name="tiny", **options)
    return kdb.open(where)


def _wrong_sizes(stored: Any, tiny: TinyModel, kind: str) -> Run | None:
    """Return a fault if a model is stored as what it is not, or with another number of parameters."""
    found, n_params = stored.sql("SELECT architecture_kind, n_params FROM models").row(0)
    expected = next(one for one in (*NOT_DECODERS, "state-space", "hybrid", "experts", "dense") if one in kind)
    own = sum(weight.numel() for weight in tiny.plain().parameters())
    if found != expected:
        return Run("fault", f"its kind is stored as {found}, expected {expected}")
    if n_params != own and "wrapper" not in kind:  # of a wrapper, only the text model counts
        return Run("fault", f"{n_params:,} parameters are stored, expected {own:,}")
    return None


# Comparing -------------------------------------------------------------------------------------------------------


def _verdict(dtype: str, differences: dict[str, float], missing: list[str]) -> Run:
    wrong = [name for name, value in differences.items() if not value <= ALLOWED[dtype]]
    message = ", ".join(f"{name} differ by {differences[name]:.1e}" for name in wrong)
    return Run("fault" if wrong else "measured", message, differences, missing)


def compare_concept(stored: Any, tiny: TinyModel) -> Run:
    """Compare the stored states of every prompt and layer with those of the plain model."""
    plain, tokens = tiny.plain(), tokens_of(tiny.folder)
    query = "SELECT prompt_id, vector FROM activations WHERE site = 'resid_post' ORDER BY prompt_id, layer"
    of: dict[int, list[Any]] = {}
    for prompt, vector in stored.sql(query).rows():
        of.setdefault(prompt, []).append(vector)
    largest = 0.0
    try:
        for prompt, text in stored.sql("SELECT prompt_id, text FROM prompts").rows():
            expected, found = Plain(plain, tokens(text)).states, torch.tensor(of[prompt])
            if found.shape != expected.shape:
                return Run("fault", f"states have the shape {tuple(found.shape)}, not {tuple(expected.shape)}")
            largest = max(largest, float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()))
    except NoReferenceError as error:
        return _verdict(tiny.dtype, {}, [str(error)])
    return _verdict(tiny.dtype, {"states": largest}, [])


def compare_knowledge(stored: Any, tiny: TinyModel) -> Run:
    """Compare the stored scores of every kept prompt with those by definition."""
    differences: dict[str, float] = {}
    missing: list[str] = []
    kept = stored.sql("SELECT prompt_id, text, target_token_id FROM prompts WHERE kept").rows()
    if not kept:
        return Run("fault", "no prompt was kept")
    try:
        for prompt, scores in _references(tiny, kept):
            _compare(stored, scores, prompt, differences, missing)
    except NoReferenceError as error:
        missing.append(str(error))
    except WrongRowError as error:
        return Run("fault", str(error))
    return _verdict(tiny.dtype, differences, list(dict.fromkeys(missing)))


def _references(tiny: TinyModel, kept: Sequence[tuple[int, str, int]]) -> Iterator[tuple[int, Scores]]:
    """Yield the scores of each prompt; what adds to the residual is found in float32, where sums are exact."""
    plain, tokens = tiny.plain(), tokens_of(tiny.folder)
    exact = plain if tiny.dtype == "float32" else tiny.plain("float32")
    parts = find_parts(Plain(exact, tokens(kept[0][1])))
    for prompt, text, target in kept:
        yield prompt, Scores(Plain(plain, tokens(text)), parts, target)


def _compare(stored: Any, scores: Scores, prompt: int, differences: dict[str, float], missing: list[str]) -> None:
    for name, compare in COMPARED.items():
        try:
            for off in compare(stored, scores, prompt):
                differences[name] = max(differences.get(name, 0.0), off)
        except NoReferenceError as error:
            missing.append(str(error))


def _layers(stored: Any, scores: Scores, prompt: int) -> Iterator[float]:
    rows = stored.sql(f"SELECT layer, component, score FROM layer_scores WHERE prompt_id = {prompt}").rows()
    for layer, component, score in rows:
        yield abs(score - scores.layer(layer, component))


def _heads(stored: Any, scores: Scores, prompt: int) -> Iterator[float]:
    query = f"SELECT layer, list(score ORDER BY head) FROM head_scores WHERE prompt_id = {prompt} GROUP BY layer"
    for layer, found in stored.sql(query).rows():
        yield float((scores.heads(layer, len(found)) - torch.tensor(found).double()).abs().max())


def _neurons(stored: Any, scores: Scores, prompt: int) -> Iterator[float]:
    """Differences of the scores of neurons, each with its stored coefficient."""
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
        columns = of.columns[torch.tensor(neurons) + size * torch.tensor(heads)]
        expected = scores.neurons(layer, component, columns, torch.tensor(coefficients))
        yield float((expected - torch.tensor(found).double()).abs().max())


def _coefficients(stored: Any, scores: Scores, prompt: int) -> Iterator[float]:
    """Relative differences of the coefficients of FFN neurons from what the projection reads."""
    query = (
        "SELECT layer, expert, list(neuron), list(coefficient) FROM neuron_scores "
        f"WHERE component = 'ffn' AND prompt_id = {prompt} GROUP BY layer, expert"
    )
    for layer, expert, neurons, found in stored.sql(query).rows():
        entries = scores.linear(layer, "ffn", expert).entries
        off = (entries[torch.tensor(neurons)] - torch.tensor(found).double()).abs()
        yield float(off.max() / entries.abs().max())


def _experts(stored: Any, scores: Scores, prompt: int) -> Iterator[float]:
    """Differences of the scores of whole experts."""
    query = f"SELECT layer, expert, score FROM expert_scores WHERE prompt_id = {prompt}"
    for layer, expert, score in stored.sql(query).rows():
        yield abs(score - scores.expert(layer, expert))


COMPARED: dict[str, Callable[[Any, Scores, int], Iterator[float]]] = {
    "layers": _layers,
    "heads": _heads,
    "neurons": _neurons,
    "coefficients": _coefficients,
    "experts": _experts,
}
"""Quantities that the comparison of the knowledge study covers."""
