"""A run of the knowledge study: read the prompts, attribute those that count, intervene, name the neurons' tokens.

Prompts are worked on in chunks of like length, and a chunk is a part of every table: what is finished when a run
is cut off is not computed again.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdb.ingest.attribution.targets import check_candidates, target_token
from kdb.ingest.describe import arrow_rows, check_length, describe_run, read_parts
from kdb.ingest.execution.local import Advance, Engine, Rows, Shard, timed, write_behind, write_part
from kdb.ingest.forward.capture import batches, check_row, chosen_prompts, untouched
from kdb.ingest.forward.length_classes import LengthClasses
from kdb.ingest.forward.memory import room
from kdb.ingest.job import Job
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.guard import told
from kdb.ingest.models.load import load_config, load_tokenizer
from kdb.ingest.models.tokens import check_spelled
from kdb.ingest.progress import progress
from kdb.warehouse.lake import StagedRun
from kdb.warehouse.schema import arrow_schema
from kdb.warehouse.sums import write_neuron_sums

if TYPE_CHECKING:
    import torch

    from kdb.ingest.attribution.scores import Attribution, Neurons, Queries
    from kdb.ingest.forward.decomposition import Decomposition

log = logging.getLogger(__name__)

KEPT_RANK = 10
"""A prompt counts if its target is among so many of the model's best tokens."""

HEADS_BY_POSITION = 10
"""Heads of each prompt whose positions are scored apart."""

QUERY_NEURONS = 100
"""Query neurons of each prompt and kind that are stored."""

TOKENS_OF_A_NEURON = 10
"""Tokens named at either end of a neuron's logits."""

CHUNK_BYTES = 512 * 2**20
"""Memory for the cache of one chunk, and for what is worked out from it."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it. ``rivals`` are the first tokens of its category's other answers."""

    number: int
    token_ids: list[int]
    target: int
    rivals: tuple[int, ...]


def measure(staged: StagedRun, job: Job, engine: Engine) -> None:
    """Write every table of the run that is not finished yet.

    Raises DatasetError for prompts that cannot be used and ModelError for a model whose parts do not add up,
    before anything is measured.
    """
    with told(f"Cannot read the prompts of {job.dataset.name} with {job.source.name}"):
        tokenizer, config = load_tokenizer(job.source), load_config(job.source)
        prompts = read_prompts(job, tokenizer)
        check_length(job, [p.token_ids for p in prompts], config)

    def ask(question: str, *arguments: Any) -> Any:
        staged.remember(device=engine.ask(job, "device"))
        return engine.ask(job, question, *arguments)

    if not staged.has("checks", "part"):
        write_part(staged, ask("check"))
    if not staged.has("datasets", "part"):  # after the checks: a model that is refused leaves nothing behind
        check_spelled(staged, job, tokenizer, [p.token_ids for p in prompts])
        describe_run(staged, job, config)
    if not staged.has("prompts", "part"):
        write_part(staged, ask("judge"))
    if not staged.has("checks", "stored"):
        probs = read_parts(staged.parts("prompts"))["target_prob"].to_pylist()
        write_part(staged, ask("check_stored", [probs[i] for i in ask("chosen")]), "stored")
    kept = [prompts[row["prompt_id"]] for row in read_parts(staged.parts("prompts")).to_pylist() if row["kept"]]
    _attribute(staged, job, kept, LengthClasses(config), ask, engine)
    if kept and not staged.has("neuron_sums", "part"):
        write_neuron_sums(staged)
    if kept and not staged.has("neuron_tokens", "part"):
        write_part(staged, ask("name_tokens", _named_neurons(staged, job.attributing.top_k)))


def read_prompts(job: Job, tokenizer: Any) -> list[Prompt]:
    """Tokenize prompts and answers; raises DatasetError for an answer that cannot be a target."""
    examples = job.dataset.examples
    found = [target_token(tokenizer, t, e.answer or "") for t, e in zip(job.texts, examples, strict=True)]
    targets, categories = [target for _ids, target in found], [e.category or "" for e in examples]
    check_candidates(targets, categories)
    of_category: dict[str, set[int]] = {}
    for target, category in zip(targets, categories, strict=True):
        of_category.setdefault(category, set()).add(target)
    return [
        Prompt(i, ids, target, tuple(sorted(of_category[category] - {target})))
        for i, ((ids, target), category) in enumerate(zip(found, categories, strict=True))
    ]


def _prompt_rows(
    decomposition: Decomposition, job: Job, prompts: Sequence[Prompt], batch_tokens: int | None
) -> Iterator[dict[str, Any]]:
    """What the untouched model says of each prompt, and whether it counts."""
    from kdb.ingest.forward.ablation import Silenced, Trial, run_trials

    trials = [Trial(p.token_ids, p.target, Silenced(), everywhere=False, rivals=p.rivals) for p in prompts]
    with progress("prompts", len(trials), "prompts") as shown:
        found = run_trials(decomposition, trials, batch_tokens=batch_tokens, on_batch=shown.advance)
    tokenizer = decomposition.loaded.tokenizer
    for prompt, example, text in zip(prompts, job.dataset.examples, job.texts, strict=True):
        i = prompt.number
        yield {
            "prompt_id": i,
            "text": text,
            "category": example.category,
            "relation": example.relation,
            "subject": example.subject,
            "answer": example.answer,
            "target_token_id": prompt.target,
            "target_token": tokenizer.decode([prompt.target]),
            "n_tokens": len(prompt.token_ids),
            "target_prob": float(found.prob[i]),
            "target_rank": int(found.rank[i]),
            "kept": bool(found.rank[i] <= KEPT_RANK and found.ahead[i]),
        }


def _attribute(
    staged: StagedRun,
    job: Job,
    kept: Sequence[Prompt],
    length_class: LengthClasses,
    ask: Callable[..., Any],
    engine: Engine,
) -> None:
    """Write the scores of every chunk of prompts that has none yet."""
    chunks = _chunks(staged, kept, length_class, ask)
    left = [
        Shard(name, tuple(p.number for p in chunk), len(chunk))
        for name, chunk in chunks.items()
        if not staged.has("query_layer_scores", name)
    ]
    if not left:
        return
    staged.remember(device=ask("device"))
    with progress("attribution", len(kept), "prompts", done=len(kept) - sum(s.size for s in left)) as shown:
        write_behind(staged, engine.measure(job, left, shown.advance))


def _chunks(
    staged: StagedRun, kept: Sequence[Prompt], length_class: LengthClasses, ask: Callable[..., Any]
) -> dict[str, list[Prompt]]:
    """Prompts by falling length, as many together as fit into memory; the same ones after an interruption."""
    if "chunks" not in staged.facts:
        per_token, at_most, memory = ask("room", CHUNK_BYTES)
        order = sorted(kept, key=lambda p: (-len(p.token_ids), p.number))
        found = batches([len(p.token_ids) for p in order], memory // per_token, length_class, at_most)
        staged.remember(chunks=[[order[i].number for i in batch] for batch in found])
    by_number = {p.number: p for p in kept}
    return {f"part-{i:05}": [by_number[n] for n in chunk] for i, chunk in enumerate(staged.facts["chunks"])}


def _named_neurons(staged: StagedRun, top_k: int) -> pa.Table:
    """Every neuron in a top list: component, layer, head and neuron."""
    scores = read_parts(staged.parts("neuron_scores"))
    best = scores.filter(pc.less_equal(scores["rank"], top_k))
    neurons = best.select(["component", "layer", "head", "neuron"])
    queries = read_parts(staged.parts("query_neuron_scores")).select(["layer", "neuron"])
    queries = queries.append_column("component", pa.array(["ffn"] * len(queries)))
    every = pa.concat_tables([neurons, queries], promote_options="default").group_by(neurons.column_names).aggregate([])
    return every.sort_by([(c, "ascending") for c in neurons.column_names])


# What needs the model --------------------------------------------------------------------------------------------


class Attributor:
    """A model taken apart, and the prompts of a job of the knowledge study."""

    def __init__(self, job: Job, load: Callable[[], LoadedModel], batch_tokens: int | None) -> None:
        self._job, self._load, self._batch_tokens = job, load, batch_tokens

    @functools.cached_property
    def _decomposition(self) -> Decomposition:
        from kdb.ingest.forward.decomposition import decompose

        return decompose(self._load())

    @functools.cached_property
    def _prompts(self) -> list[Prompt]:
        return read_prompts(self._job, load_tokenizer(self._job.source))

    def device(self) -> str:
        """Where the model runs."""
        return str(self._decomposition.loaded.device)

    def check(self) -> Rows:
        """How the recorded parts of some prompts add up. Raises ModelError where they do not."""
        from kdb.ingest.forward.activation_cache import check_decomposition

        decomposition, begun = self._decomposition, time.monotonic()
        rows = check_decomposition(decomposition, [self._prompts[i].token_ids for i in self.chosen()])
        return timed("checks", [pa.Table.from_pylist(rows, schema=arrow_schema("checks"))], begun)

    def chosen(self) -> list[int]:
        """The prompts that the run is checked on."""
        return chosen_prompts([p.token_ids for p in self._prompts])

    def check_stored(self, probs: Sequence[float]) -> Rows:
        """How the probabilities that were stored of the chosen prompts' targets compare with the untouched model's.

        Raises ModelError where a difference is too large.
        """
        begun, chosen = time.monotonic(), self.chosen()
        own = [self._alone[i].double().softmax(-1)[self._prompts[i].target].item() for i in chosen]
        off = [abs(a - b) for a, b in zip(probs, own, strict=True)]
        row = check_row("stored_probs", off, self._decomposition.loaded, len(chosen))
        return timed("checks", [pa.Table.from_pylist([row], schema=arrow_schema("checks"))], begun)

    @functools.cached_property
    def _alone(self) -> dict[int, torch.Tensor]:
        """The logits of the chosen prompts, each run alone through the untouched model."""
        return {i: untouched(self._decomposition.loaded, self._prompts[i].token_ids)[1] for i in self.chosen()}

    def judge(self) -> Rows:
        """What the untouched model says of each prompt, and whether it counts: the rows of ``prompts``."""
        decomposition, begun = self._decomposition, time.monotonic()
        rows = list(_prompt_rows(decomposition, self._job, self._prompts, self._batch_tokens))
        return timed("prompts", [pa.Table.from_pylist(rows, schema=arrow_schema("prompts"))], begun)

    def room(self, otherwise: int) -> tuple[int, int, int]:
        """Bytes that caching a token takes, prompts attributed at once at most, and bytes that there are for both.

        ``otherwise`` are those where the model is not on a GPU.
        """
        from kdb.ingest.attribution.scores import prompts_at_once
        from kdb.ingest.forward.activation_cache import bytes_per_token

        memory = room(self._decomposition.loaded.device, otherwise)
        return bytes_per_token(self._decomposition), prompts_at_once(self._decomposition), memory

    def measure(self, prompts: Sequence[int], advance: Advance) -> Iterator[Rows]:
        """The rows of every table of scores; advances by prompts."""
        import torch

        begun, chunk = time.monotonic(), [self._prompts[i] for i in prompts]
        # The mode is the thread's: held across a yield it would be the caller's too, and end when this is let go.
        scores = torch.inference_mode()(_scores)
        for table, rows in scores(self._decomposition, self._job, chunk, self._alone, self._batch_tokens):
            yield timed(table, [rows], begun)
            begun = time.monotonic()
        advance(len(prompts))

    def name_tokens(self, neurons: pa.Table) -> Rows:
        """The tokens at both ends of the logits of each neuron: the rows of ``neuron_tokens``."""
        decomposition, begun = self._decomposition, time.monotonic()
        with progress("tokens", len(neurons), "neurons") as shown:
            return timed("neuron_tokens", list(_token_rows(decomposition, neurons, shown.advance)), begun)


def _scores(
    decomposition: Decomposition,
    job: Job,
    chunk: Sequence[Prompt],
    alone: Mapping[int, torch.Tensor],
    batch_tokens: int | None,
) -> Iterator[tuple[str, pa.Table]]:
    """The rows of every table of scores for a chunk of prompts, the table last that tells that all are there.

    ``alone`` are logits of some prompts run alone. Raises ModelError where those recorded here are others.
    """
    import torch

    from kdb.ingest.attribution.scores import Attribution
    from kdb.ingest.forward.activation_cache import check_logits, run_with_cache

    wanted = job.attributing
    target = torch.tensor([p.target for p in chunk], device=decomposition.loaded.device)
    cache = run_with_cache(decomposition, [p.token_ids for p in chunk])
    for row, prompt in enumerate(chunk):
        if prompt.number in alone:
            check_logits(decomposition.loaded, cache.logits[row], alone[prompt.number])
    a = Attribution(decomposition, cache, target)
    ids = np.array([p.number for p in chunk], dtype=np.int32)
    yield "layer_scores", _layer_rows(ids, a)
    yield "head_scores", _head_rows(ids, a)
    yield "head_position_scores", _head_position_rows(ids, a, decomposition.loaded.tokenizer, chunk)
    k = max(wanted.top_k, wanted.query_values, wanted.ablate_k)
    ffn, attn = a.ffn_top(k), a.attn_top(k)
    if wanted.all_neurons:
        stored = [a.ffn_every(ffn), a.attn_every(attn)]
    else:
        stored = [ffn.first(wanted.top_k), attn.first(wanted.top_k)]
    yield "neuron_scores", pa.concat_tables(_neuron_rows(ids, n) for n in stored)
    if wanted.ablate_k:
        yield "ablations", _method_rows(a, ffn, chunk, wanted.ablate_k, batch_tokens)
    queries = {
        "attn": a.attn_queries(attn.first(wanted.query_values)),
        "ffn": a.ffn_queries(ffn.first(wanted.query_values)),
    }
    yield "query_neuron_scores", pa.concat_tables(_query_neuron_rows(ids, k, q) for k, q in queries.items())
    yield "query_layer_scores", pa.concat_tables(_query_layer_rows(ids, k, q) for k, q in queries.items())


def _layer_rows(ids: Any, a: Attribution) -> pa.Table:
    layers = np.arange(a.n_layers)
    return pa.concat_tables(
        arrow_rows("layer_scores", {"prompt_id": ids[:, None], "layer": layers, "component": c, "score": score})
        for c, score in a.layer_scores.items()
    )


def _head_rows(ids: Any, a: Attribution) -> pa.Table:
    _b, n_layers, n_heads = a.head_scores.shape
    place = {"prompt_id": ids[:, None, None], "layer": np.arange(n_layers)[:, None], "head": np.arange(n_heads)}
    return arrow_rows("head_scores", place | {"score": a.head_scores})


def _head_position_rows(ids: Any, a: Attribution, tokenizer: Any, chunk: Sequence[Prompt]) -> pa.Table:
    layer, head, attention, score = a.head_positions(HEADS_BY_POSITION)
    n_tokens = attention.shape[2]
    texts = [[tokenizer.decode([token]) for token in p.token_ids] + [""] * (n_tokens - len(p.token_ids)) for p in chunk]
    table = arrow_rows(
        "head_position_scores",
        {
            "prompt_id": ids[:, None, None],
            "layer": layer[..., None],
            "head": head[..., None],
            "position": np.arange(n_tokens),
            "token": np.array(texts, dtype=object)[:, None, :],
            "attention": attention.double(),
            "score": score,
        },
    )
    lengths = np.array([len(p.token_ids) for p in chunk])[:, None, None]
    real = np.broadcast_to(np.arange(n_tokens) < lengths, attention.shape)
    return table.filter(pa.array(real.ravel()))


def _neuron_rows(ids: Any, n: Neurons) -> pa.Table:
    table = arrow_rows(
        "neuron_scores",
        {
            "prompt_id": ids[:, None],
            "component": "ffn" if n.head is None else "attn",
            "layer": n.layer,
            "head": n.head,
            "neuron": n.neuron,
            "position": n.position,
            "coefficient": n.coefficient.double(),
            "score": n.score,
            "lower": n.lower,
            "upper": n.upper,
            "exact": n.exact,
            "rank": np.arange(1, n.layer.shape[1] + 1),
        },
    )
    return table.filter(pa.array((n.layer >= 0).cpu().numpy().ravel()))


def _query_neuron_rows(ids: Any, activates: str, q: Queries) -> pa.Table:
    n = q.neurons.shape[2]
    best = q.neurons.flatten(1).topk(min(QUERY_NEURONS, q.neurons[0].numel()), dim=1)
    return arrow_rows(
        "query_neuron_scores",
        {
            "prompt_id": ids[:, None],
            "activates": activates,
            "layer": best.indices // n,
            "neuron": best.indices % n,
            "score": best.values.double(),
            "rank": np.arange(1, best.indices.shape[1] + 1),
        },
    )


def _query_layer_rows(ids: Any, activates: str, q: Queries) -> pa.Table:
    place = {"prompt_id": ids[:, None], "activates": activates}
    rows = [
        arrow_rows("query_layer_scores", place | {"component": c, "layer": np.arange(score.shape[1]), "score": score})
        for c, score in (("attn", q.attn), ("ffn", q.ffn))
    ]
    return pa.concat_tables(
        [arrow_rows("query_layer_scores", place | {"component": "embed", "score": q.embed[:, None]}), *rows]
    )


# Interventions and tokens ----------------------------------------------------------------------------------------


def _method_rows(a: Attribution, top: Neurons, chunk: Sequence[Prompt], k: int, batch_tokens: int | None) -> pa.Table:
    """What becomes of the target when the best neurons of every method are zeroed, at the last position and at all."""
    from kdb.ingest.attribution.rankings import best_neurons
    from kdb.ingest.forward.ablation import Intervention, intervene

    n = a.ffn_coefficients.shape[2]
    best = {method: places.tolist() for method, places in best_neurons(a, k, top).items()}
    interventions = [
        Intervention(
            prompt.number,
            prompt.token_ids,
            prompt.target,
            method,
            positions,
            silenced_ffn(places[i], n),
            len(places[i]),
        )
        for method, places in best.items()
        for i, prompt in enumerate(chunk)
        for positions in ("last", "all")
    ]
    return intervene(a.decomposition, interventions, batch_tokens=batch_tokens)


def silenced_ffn(places: Sequence[int], n: int) -> Any:
    """FFN neurons given by place in (l · n), as what an intervention silences."""
    from kdb.ingest.forward.ablation import Silenced

    by_layer: dict[int, list[int]] = {}
    for place in places:
        by_layer.setdefault(place // n, []).append(place % n)
    return Silenced(ffn=by_layer)


def _token_rows(decomposition: Decomposition, neurons: pa.Table, on_batch: Callable[[int], None]) -> Iterator[pa.Table]:
    import torch

    table, tokenizer = decomposition.readout.table, decomposition.loaded.tokenizer
    text = functools.cache(lambda token: tokenizer.decode([token]))
    for (component, layer), group in _by(neurons.to_pylist(), "component", "layer"):
        columns = decomposition.ffn_columns(layer) if component == "ffn" else decomposition.attn_columns(layer)
        width = columns.shape[0] // decomposition.n_heads
        for start in range(0, len(group), 256):
            some = group[start : start + 256]
            rows = [r["neuron"] if component == "ffn" else r["head"] * width + r["neuron"] for r in some]
            with torch.inference_mode():
                logits = columns[rows] @ table.T
                ends = [logits.topk(TOKENS_OF_A_NEURON, dim=1, largest=largest) for largest in (True, False)]
            n = min(TOKENS_OF_A_NEURON, logits.shape[1])
            for sign, end in zip(("top", "bottom"), ends, strict=True):
                yield pa.Table.from_pylist(
                    [
                        {**row, "sign": sign, "rank": j + 1, "token": text(end_tokens[j]), "logit": end_logits[j]}
                        for row, end_tokens, end_logits in zip(
                            some, end.indices.tolist(), end.values.tolist(), strict=True
                        )
                        for j in range(n)
                    ],
                    arrow_schema("neuron_tokens"),
                )
            on_batch(len(some))


def _by(rows: Sequence[dict[str, Any]], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    yield from groups.items()
