"""The stages of the knowledge-attribution study (arXiv 2312.12141).

    subject, stages = prepare(job)

They check the model, keep the prompts that it answers, score layers, heads and neurons for these, and find the tokens
that the best neurons promote. Prompts of similar length are attributed together, in chunks.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdb.ingest.attribution.candidates import (
    BOUNDS,
    bound_rows,
    by_category,
    candidate_rows,
    first_candidates,
    further_candidates,
)
from kdb.ingest.attribution.patch import Patched, default_shards
from kdb.ingest.attribution.patch import rows as patch_rows
from kdb.ingest.attribution.score_rows import (
    expert_rows,
    head_position_rows,
    head_rows,
    layer_rows,
    layouts_of,
    method_rows,
    neuron_rows,
    query_layer_rows,
    query_neuron_rows,
    router_rows,
    token_rows,
)
from kdb.ingest.attribution.sets import mean_rows, method_shards
from kdb.ingest.attribution.targets import Target
from kdb.ingest.attribution.whole_answers import whole_answers
from kdb.ingest.forward.capture import batches
from kdb.ingest.forward.checks import check_row, chosen_prompts, untouched_logits
from kdb.ingest.forward.layout import layout_rows
from kdb.ingest.forward.length_classes import LengthClasses
from kdb.ingest.forward.memory import CHUNK_BYTES, most_per_shard, room
from kdb.ingest.job import Job
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.load import load_config, load_tokenizer
from kdb.ingest.progress import ATTRIBUTING
from kdb.ingest.prompts import Posed, Prompt, check_length, description, pose
from kdb.ingest.rows import Rows, rows_of, timed
from kdb.ingest.stages import Advance, ModelStage, RunInProgress, Shard, Stage, StoredStage, single
from kdb.warehouse.schema import NEURON, arrow_schema
from kdb.warehouse.sums import sum_neurons

if TYPE_CHECKING:
    import torch

    from kdb.ingest.cost import Cost
    from kdb.ingest.forward.activation_cache import ActivationCache
    from kdb.ingest.forward.decomposition import Decomposition

KEPT_RANK = 10
"""A prompt is kept if its target has at most this rank among the model's tokens, and beats every rival."""


def _why_not_kept(rank: int, ahead: bool, shared: bool) -> str | None:
    """Name the first condition of the filter that a prompt does not meet; None if it is kept.

    ``shared``: another answer has the same tokens, as far as they are compared.
    """
    if rank > KEPT_RANK:
        return "not_in_top_ten"
    if shared:
        return "shares_first_token"
    return None if ahead else "beaten_by_another_answer"


def prepare(job: Job) -> tuple[PosedFacts, list[Stage]]:
    """Pose a job's prompts, and list the stages of its run.

    Raises DatasetError or ModelError for prompts that cannot be measured, before any work.
    """
    config, tokenizer = load_config(job.source), load_tokenizer(job.source)
    posed = PosedFacts(job, pose(job, tokenizer))
    check_length(job, posed.token_ids, config)
    scores = (
        *("layer_scores", "head_scores", "head_position_scores", "expert_scores", "router", "routing"),
        *("lens_readouts", "neuron_scores"),
    )
    methods = ("ablated_parts", "ablations") if job.attributing.ablate_k else ()
    if job.attributing.answer_tokens == "all":
        longest = max(len(_target(prompt).answer) for prompt in posed.prompts)
        check_length(job, posed.token_ids, config, n_answer=longest - 1)
    return posed, [
        ModelStage(("experts", "checks"), single("model"), checked, shown=("Checking the model", None)),
        description(posed, tokenizer, config),
        ModelStage(
            ("prompts",),
            functools.partial(_prompt_shards, posed.token_ids),
            kept,
            shown=("Filtering prompts", "prompts"),
        ),
        ModelStage(("checks",), _stored_shards, _check_stored, shown=("Checking the prompts", None)),
        ModelStage(
            (*scores, BOUNDS, *methods, "query_neuron_scores", "query_layer_scores"),
            functools.partial(_chunks, posed, LengthClasses(config)),
            attributed,
            shown=(ATTRIBUTING, "prompts"),
            announce=functools.partial(_announce, posed),
        ),
        *(
            ModelStage(
                ("candidate_scores",),
                functools.partial(_candidate_shards, posed, LengthClasses(config), which),
                _candidate_scores,
                shown=("Ranking neurons", "prompts"),
            )
            for which in ("first", "further")
        ),
        *(
            [ModelStage(("effects",), default_shards, _effects, shown=("Patching", "prompts"))]
            if job.attributing.effects
            else []
        ),
        *(
            [ModelStage(("ablations",), method_shards, _method_means, shown=("Mean ablations", "prompts"))]
            if job.attributing.ablate_k
            else []
        ),
        StoredStage(("neuron_sums",), _if_any_is_kept, _sums, shown=("Adding up", None)),
        ModelStage(
            ("neuron_tokens",),
            functools.partial(_named_neurons, job.attributing.top_k),
            tokens,
            shown=("Naming neurons", "neurons"),
        ),
    ]


@dataclass(frozen=True)
class PosedFacts(Posed):
    """The prompts of a job, and their targets."""

    def bind(self, loaded: LoadedModel, batch_tokens: int | None) -> Attributed:
        """Combine the prompts with the decomposed model. Raises ModelError if parts of the model are not found."""
        from kdb.ingest.forward.decomposition import decompose

        with model_errors(f"{loaded.source.name} cannot be run"):
            return Attributed(self, decompose(loaded), batch_tokens)


class Attributed:
    """The prompts of a job and a decomposed model."""

    def __init__(self, posed: PosedFacts, decomposition: Decomposition, batch_tokens: int | None) -> None:
        self.job, self.prompts, self.chosen = posed.job, posed.prompts, chosen_prompts(posed.token_ids)
        self.decomposition, self.batch_tokens = decomposition, batch_tokens
        self.loaded = decomposition.loaded

    @functools.cached_property
    def patched(self) -> Patched:
        """The model, and what it writes in the prompts of one category."""
        return Patched(self.decomposition)

    @functools.cached_property
    def alone(self) -> dict[int, torch.Tensor]:
        """The logits of the chosen prompts, each run alone through the untouched model."""
        return {i: self._untouched(self.prompts[i].token_ids) for i in self.chosen}

    @property
    def whole(self) -> bool:
        """Whether whole answers are compared, rather than their first tokens."""
        return self.job.attributing.answer_tokens == "all"

    def own_probability(self, number: int) -> float:
        """The untouched model's probability of a prompt's target, or of its whole answer."""
        prompt, answer = self.prompts[number], _target(self.prompts[number]).answer
        first = self.alone[number].double().softmax(-1)[answer[0]].item()
        rest = range(1, len(answer)) if self.whole else ()
        return math.prod([first, *(self._after([*prompt.token_ids, *answer[:n]], answer[n]) for n in rest)])

    def _after(self, token_ids: Sequence[int], token: int) -> float:
        return self._untouched(token_ids).double().softmax(-1)[token].item()

    def _untouched(self, token_ids: Sequence[int]) -> torch.Tensor:
        return untouched_logits(self.loaded, self.decomposition.structure, token_ids)


# Before attribution ----------------------------------------------------------------------------------------------


def checked(subject: Attributed, _shard: Shard, _advance: Advance) -> Iterator[Rows]:
    """Check that the contributions to the residual stream add up on the chosen prompts. Raises ModelError if not."""
    from kdb.ingest.attribution.scores import prompts_at_once
    from kdb.ingest.forward.activation_cache import check_decomposition

    begun = time.monotonic()
    with model_errors(f"{subject.loaded.source.name} cannot be run"):
        rows = check_decomposition(
            subject.decomposition,
            [subject.prompts[i].token_ids for i in subject.chosen],
            functools.partial(_unexplained, subject),
            prompts_at_once(subject.decomposition),
        )
    experts = layout_rows(layouts_of(subject.decomposition))
    if experts:
        yield rows_of("experts", experts)
    yield rows_of("checks", rows, begun)


def _unexplained(subject: Attributed, cache: ActivationCache, token_ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the part of log p that layer scores do not explain, at most; empty if that is not checked."""
    import torch

    from kdb.ingest.attribution.scores import Attribution

    targets = {tuple(subject.prompts[i].token_ids): subject.prompts[i].target for i in subject.chosen}
    target = torch.tensor([targets[tuple(ids)] for ids in token_ids], device=subject.loaded.device)
    left = Attribution(subject.decomposition, cache, target).unexplained
    return {} if left is None else {"layer_score_sum": float(left.abs().max())}


def _prompt_shards(token_ids: Sequence[Sequence[int]], run: RunInProgress) -> list[Shard]:
    """Divide the prompts, in their order, into shards of about a minute of work."""
    longest = max(map(len, token_ids))
    most = most_per_shard(run.device, 2 * run.table("models").to_pylist()[0]["n_params"] * longest)
    starts = run.remembered("asked", lambda: list(range(0, len(token_ids), most)))
    numbers = [range(a, b) for a, b in itertools.pairwise([*starts, len(token_ids)])]
    return [Shard(f"part-{i:05}", some, len(some)) for i, some in enumerate(numbers)]


def kept(subject: Attributed, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """Rows of ``prompts``: the untouched model's answer to each prompt, and whether the prompt is kept."""
    begun = time.monotonic()
    yield rows_of("prompts", list(_prompt_rows(subject, shard.work, advance)), begun)


def _prompt_rows(subject: Attributed, numbers: Sequence[int], advance: Advance) -> Iterator[dict[str, Any]]:
    from kdb.ingest.forward.ablation import Silenced, Trial, run_trials

    prompts = [subject.prompts[i] for i in numbers]
    trials = [Trial(p.token_ids, p.target, Silenced(), everywhere=False, rivals=p.rivals) for p in prompts]
    run = functools.partial(run_trials, subject.decomposition, batch_tokens=subject.batch_tokens)
    effects = run(trials, on_batch=advance)
    prob, ahead, whole = effects.prob, effects.ahead, subject.whole
    if whole:
        among = (effects.rank <= KEPT_RANK).nonzero()[0].tolist()
        logp, ahead = whole_answers(run, [_target(p) for p in prompts], effects, among)
        prob = np.exp(logp)
    tokenizer, job, texts = subject.loaded.tokenizer, subject.job, subject.job.texts
    for i, prompt in enumerate(prompts):
        example, text, target = job.dataset.examples[prompt.number], texts[prompt.number], _target(prompt)
        why_not = _why_not_kept(int(effects.rank[i]), bool(ahead[i]), target.is_shared and not whole)
        yield {
            "prompt_id": prompt.number,
            "text": text,
            "category": example.category,
            "relation": example.relation,
            "subject": example.subject,
            "answer": example.answer,
            "target_token_id": prompt.target,
            "target_token": tokenizer.decode([prompt.target]),
            "n_tokens": len(prompt.token_ids),
            "token_ids": prompt.token_ids,
            "target_prob": float(prob[i]),
            "target_rank": int(effects.rank[i]),
            "kept": why_not is None,
            "not_kept_because": why_not,
            "shares_first_token": target.is_shared,
            "answer_prefix": target.prefix,
            "answer_token_ids": target.answer,
            "corrupt": example.corrupt,
            "corrupt_token_ids": target.corrupt,
            "rival_token_id": int(effects.rival[i]) if prompt.rivals else None,
            "rival_token": tokenizer.decode([effects.rival[i]]) if prompt.rivals else None,
            "rival_logp": float(effects.rival_logp[i]) if prompt.rivals else None,
        }


def _target(prompt: Prompt) -> Target:
    assert prompt.answer is not None  # every prompt of this study has an answer
    return prompt.answer


def _stored_shards(run: RunInProgress) -> list[Shard]:
    return [Shard("stored", run.table("prompts")["target_prob"].to_pylist())]


def _check_stored(subject: Attributed, shard: Shard, _advance: Advance) -> Iterator[Rows]:
    """Compare the stored target probabilities of the chosen prompts with the untouched model's. Raises ModelError."""
    begun = time.monotonic()
    own = [subject.own_probability(i) for i in subject.chosen]
    off = [abs(shard.work[i] - prob) for i, prob in zip(subject.chosen, own, strict=True)]
    yield rows_of("checks", [check_row("stored_probs", off, subject.loaded, len(own))], begun)


# Attribution -----------------------------------------------------------------------------------------------------


def _announce(posed: PosedFacts, run: RunInProgress) -> Cost:
    return run.once(_cost, Shard("cost", [len(prompt.token_ids) for prompt in _kept_prompts(posed, run)]))


def _cost(subject: Attributed, shard: Shard, _advance: Advance) -> Iterator[Cost]:
    from kdb.ingest.cost import attribution_cost

    yield attribution_cost(subject.job, subject.loaded.model.config, shard.work, str(subject.loaded.device))


def _kept_prompts(posed: PosedFacts, run: RunInProgress) -> list[Prompt]:
    return [posed.prompts[row["prompt_id"]] for row in run.table("prompts").to_pylist() if row["kept"]]


def _chunks(posed: PosedFacts, length_class: LengthClasses, run: RunInProgress) -> list[Shard]:
    """Divide the kept prompts by falling length into chunks that fit into memory; a resumed run has the same chunks."""
    kept = _kept_prompts(posed, run)
    chunks = run.remembered("chunks", lambda: _chunked(kept, length_class, run) if kept else [])
    return [Shard(f"part-{i:05}", chunk, len(chunk)) for i, chunk in enumerate(chunks)]


def _chunked(kept: Sequence[Prompt], length_class: LengthClasses, run: RunInProgress) -> list[list[int]]:
    """Numbers of the prompts of each chunk. What fits into memory takes at most a minute or two."""
    per_token, at_most, memory = run.once(_room, Shard("memory", CHUNK_BYTES))
    order = sorted(kept, key=lambda p: (-len(p.token_ids), p.number))
    chunks = batches([len(p.token_ids) for p in order], memory // per_token, length_class, at_most)
    return [[order[i].number for i in batch] for batch in chunks]


def _room(subject: Attributed, shard: Shard, _advance: Advance) -> Iterator[tuple[int, int, int]]:
    """Yield the bytes to cache one token, the largest number of prompts in a chunk, and the bytes of memory for both.

    If the model is not on a GPU, the memory is the shard's ``work``.
    """
    from kdb.ingest.attribution.scores import prompts_at_once
    from kdb.ingest.forward.activation_cache import bytes_per_token

    decomposition = subject.decomposition
    yield bytes_per_token(decomposition), prompts_at_once(decomposition), room(subject.loaded.device, shard.work)


def attributed(subject: Attributed, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of every table of scores; advances by prompts."""
    import torch

    begun, chunk = time.monotonic(), [subject.prompts[i] for i in shard.work]
    # inference_mode belongs to the thread: if it were on during a yield, the caller would run in it, too.
    for table, rows in torch.inference_mode()(_scores)(subject, chunk, subject.alone):
        yield timed(table, [rows], begun)
        begun = time.monotonic()
    advance(len(chunk))


def _scores(
    subject: Attributed, chunk: Sequence[Prompt], alone: Mapping[int, torch.Tensor]
) -> Iterator[tuple[str, pa.Table]]:
    """The rows of every table of scores for a chunk of prompts.

    ``alone`` are logits of some prompts run alone. Raises ModelError if the cached logits differ from them.
    """
    import torch

    from kdb.ingest.attribution.lens import lens_rows
    from kdb.ingest.attribution.scores import Attribution
    from kdb.ingest.forward.activation_cache import check_logits, run_with_cache

    wanted, decomposition = subject.job.attributing, subject.decomposition
    target = torch.tensor([p.target for p in chunk], device=subject.loaded.device)
    cache = run_with_cache(decomposition, [p.token_ids for p in chunk])
    for row, prompt in enumerate(chunk):
        if prompt.number in alone:
            check_logits(subject.loaded, cache.logits[row], alone[prompt.number])
    a = Attribution(decomposition, cache, target)
    ids = np.array([p.number for p in chunk], dtype=np.int32)
    yield "layer_scores", layer_rows(ids, a)
    has_values = decomposition.n_heads > 0 and decomposition.has_positions
    if decomposition.n_heads:
        yield "head_scores", head_rows(ids, a)
    if has_values:
        yield "head_position_scores", head_position_rows(ids, a, subject.loaded.tokenizer, chunk)
    if cache.chosen is not None:
        yield "expert_scores", expert_rows(ids, a)
        yield from zip(("router", "routing"), router_rows(ids, a), strict=True)
    yield "lens_readouts", lens_rows(ids, decomposition, cache, chunk)
    k, layouts = max(wanted.top_k, wanted.query_values, wanted.ablate_k), layouts_of(decomposition)
    ffn = a.ffn_top(k) if decomposition.n_slots else None
    attn = a.attn_top(k) if has_values else None
    best = {name: of for name, of in (("ffn", ffn), ("attn", attn)) if of is not None}
    if not best:
        yield "query_layer_scores", arrow_schema("query_layer_scores").empty_table()
        return
    if wanted.all_neurons:
        every = {"ffn": a.ffn_every, "attn": a.attn_every}
        stored = [every[name](of) for name, of in best.items()]
    else:
        stored = [of.first(wanted.top_k) for of in best.values()]
    yield "neuron_scores", pa.concat_tables(neuron_rows(ids, layouts, n) for n in stored)
    categories = [subject.job.dataset.examples[p.number].category or "" for p in chunk]
    yield BOUNDS, bound_rows(categories, best)
    if wanted.ablate_k and ffn is not None:
        chosen, zeroed = method_rows(a, ffn, chunk, wanted.ablate_k, subject.batch_tokens)
        yield "ablated_parts", chosen
        yield "ablations", zeroed
    sources = {"attn": a.attn_queries, "ffn": a.ffn_queries}
    queries = {name: sources[name](best[name].first(wanted.query_values)) for name in sources if name in best}
    yield "query_neuron_scores", pa.concat_tables(query_neuron_rows(ids, layouts, k, q) for k, q in queries.items())
    yield "query_layer_scores", pa.concat_tables(query_layer_rows(ids, a, k, q) for k, q in queries.items())


def _candidate_shards(posed: PosedFacts, length_class: LengthClasses, which: str, run: RunInProgress) -> list[Shard]:
    """Divide the kept prompts of each category that has candidates into chunks that fit into memory."""
    if not run.files(BOUNDS):
        return []
    candidates = dict(by_category((first_candidates if which == "first" else further_candidates)(run)))
    kept: dict[str, list[Prompt]] = {category: [] for category in candidates}
    for row in run.table("prompts").to_pylist():
        if row["kept"] and row["category"] in kept:
            kept[row["category"]].append(posed.prompts[row["prompt_id"]])
    chunks = run.remembered(
        f"{which} candidates", lambda: {c: _chunked(some, length_class, run) for c, some in kept.items()}
    )
    work = [(chunk, candidates[category]) for category in sorted(kept) for chunk in chunks[category]]
    return [Shard(f"{which}-{i:05}", one, len(one[0])) for i, one in enumerate(work)]


def _candidate_scores(subject: Attributed, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of ``candidate_scores``; advances by prompts."""
    begun, (numbers, wanted) = time.monotonic(), shard.work
    chunk = [subject.prompts[i] for i in numbers]
    yield timed("candidate_scores", [candidate_rows(subject.decomposition, chunk, wanted)], begun)
    advance(len(chunk))


def _effects(subject: Attributed, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of ``effects``: estimates for all heads and layers, and the measured effects of the best heads."""
    return patch_rows(subject.patched, shard, advance)


def _method_means(subject: Attributed, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of ``ablations`` with each method's best neurons at their mean."""
    return mean_rows(subject.patched, shard, advance)


# After attribution -----------------------------------------------------------------------------------------------


def _if_any_is_kept(run: RunInProgress) -> list[Shard]:
    return [Shard("part")] if run.files("neuron_scores") else []


def _sums(run: RunInProgress, _shard: Shard) -> list[Rows]:
    files = (run.files(table) for table in ("neuron_scores", "candidate_scores", "prompts"))
    return [Rows("neuron_sums", [sum_neurons(*files)])]


def _named_neurons(top_k: int, run: RunInProgress) -> list[Shard]:
    """Every neuron in a top list, by the columns that identify it."""
    if not run.files("neuron_scores"):
        return []
    scores = run.table("neuron_scores")
    best = scores.filter(pc.less_equal(scores["rank"], top_k))
    neurons = pa.concat_tables([best.select(NEURON), run.table("candidate_scores").select(NEURON)])
    queries = run.table("query_neuron_scores").select(["layer", "expert", "neuron"])
    queries = queries.append_column("component", pa.array(["ffn"] * len(queries)))
    every = pa.concat_tables([neurons, queries], promote_options="default").group_by(neurons.column_names).aggregate([])
    every = every.sort_by([(c, "ascending") for c in neurons.column_names])
    model = run.table("models").to_pylist()[0]
    most = most_per_shard(run.device, 2 * model["vocab_size"] * model["hidden_size"])
    starts = run.remembered("named", lambda: list(range(0, len(every), most)))
    parts = [every.slice(a, b - a) for a, b in itertools.pairwise([*starts, len(every)])]
    return [Shard(f"part-{i:05}", part, len(part)) for i, part in enumerate(parts)]


def tokens(subject: Attributed, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of ``neuron_tokens``: the tokens with the largest and the smallest logits of each neuron."""
    begun = time.monotonic()
    yield timed("neuron_tokens", list(token_rows(subject.decomposition, shard.work, advance)), begun)
