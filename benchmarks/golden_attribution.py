"""Hold kdb's attribution of prompts against the golden values, quantity by quantity.

golden.py prints it whole, tests/test_golden.py runs a slice of it:

    comparisons = compare(decompose(loaded), json.loads(path.read_text()))

The golden values were computed one prompt at a time, over the whole vocabulary; here prompts are batched as in an
ingest. Scores must agree within 0.002, places in a list wherever the neighbours' scores differ by more than twice that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

from kdb.ingest.attribution.rankings import METHODS, best_neurons
from kdb.ingest.attribution.score_rows import silenced_ffn
from kdb.ingest.attribution.scores import Attribution, Neurons, QueryScores, prompts_at_once
from kdb.ingest.attribution.study import KEPT_RANK
from kdb.ingest.attribution.targets import target_token
from kdb.ingest.forward.ablation import Silenced, Trial, run_trials
from kdb.ingest.forward.activation_cache import run_with_cache
from kdb.ingest.forward.decomposition import Decomposition

SCORE = 2e-3
QUERY = 1e-3
"""Relative, beside SCORE: a query's score is divided by a total that can nearly cancel."""
LETTERS = dict(zip("abcdefgh", METHODS, strict=True))

Prompt = dict[str, Any]


class Comparison:
    """One quantity of one model: values and places are added prompt by prompt, ``problems`` is empty if all agree."""

    def __init__(self, quantity: str) -> None:
        self.quantity = quantity
        self.n_values = self.n_places = self.n_same = 0
        self.largest = 0.0
        self.problems: list[str] = []

    def __repr__(self) -> str:
        return f"{self.quantity}: largest difference {self.largest:.2g}; {'; '.join(self.problems) or 'ok'}"

    def values(self, found: Any, expected: Any, where: str, absolute: float = SCORE, relative: float = 0.0) -> None:
        """Compare numbers: each may be off by ``absolute`` and by ``relative`` times the expected one."""
        a, b = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (found, expected))
        if len(a) != len(b):
            self.problems.append(f"{where}: {len(a)} values, expected {len(b)}")
            return
        off = (a - b).abs()
        self.n_values += len(b)
        self.largest = max(self.largest, float(off.max()))
        n_out = int((~(off <= absolute + relative * b.abs())).sum())  # a NaN is out, too
        if n_out:
            self.problems.append(f"{where}: {n_out} of {len(b)} out, by up to {float(off.max()):.2g}")

    def places(
        self,
        found: Sequence[Hashable],
        expected: Sequence[Hashable],
        values: Sequence[float],
        where: str,
        near: Callable[[float, float], bool],
    ) -> None:
        """Compare an order. Where neighbours among its ``values`` are ``near`` to each other, it is open.

        ``values`` are those that the places are ordered by; one more than there are places, if that is known.
        """
        close = [near(*pair) for pair in itertools.pairwise(values)]
        around = [False, *close, False]  # before and after each place
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            self.n_places += 1
            self.n_same += a == b
            if a != b and not (around[i] or around[i + 1]):
                self.problems.append(f"{where}: place {i + 1} is {a}, expected {b}")

    def best(self, found: dict[Any, float], expected: dict[Any, float], where: str, relative: float = 0.0) -> None:
        """Compare the best of many, in order: ``found`` has more of them than ``expected``, so that none is missed."""
        missing = [key for key in expected if key not in found]
        if missing:
            self.problems.append(f"{where}: {len(missing)} of {len(expected)} not found, such as {missing[0]}")
        both = [key for key in expected if key in found]
        self.values([found[k] for k in both], [expected[k] for k in both], where, relative=relative)
        first = list(found)[: len(expected)]
        values = [*expected.values(), *list(found.values())[len(expected) : len(expected) + 1]]
        self.places(first, list(expected), values, where, lambda a, b: abs(a - b) <= 2 * (SCORE + relative * abs(b)))


def compare(
    decomposition: Decomposition, golden: dict[str, Any], n: int | None = None, n_ranked: int | None = None
) -> list[Comparison]:
    """Compare every quantity on the first ``n`` prompts, the eight rankings of neurons on the first ``n_ranked``."""
    prompts = golden["prompts"][:n]
    to = _Comparisons()
    _model(decomposition, golden, prompts, to)
    with torch.inference_mode():
        _effects(decomposition, golden["prompts"], prompts, to)
        for chunk, a in _attributed(decomposition, prompts):
            _scores(a, chunk, to)
            _best_neurons(a, chunk, to)
            for i, prompt in enumerate(chunk):
                _neuron_tokens(decomposition, prompt, to)
                _top10(a.cache.logits[i], prompt, to)
        for chunk, a in _attributed(decomposition, prompts[:n_ranked]):
            _rankings(a, chunk, to)
    return list(to.values())


class _Comparisons(dict[str, Comparison]):
    def __missing__(self, quantity: str) -> Comparison:
        self[quantity] = Comparison(quantity)
        return self[quantity]


def _attributed(
    decomposition: Decomposition, prompts: Sequence[Prompt]
) -> Iterator[tuple[Sequence[Prompt], Attribution]]:
    at_once = prompts_at_once(decomposition)
    for start in range(0, len(prompts), at_once):
        chunk = prompts[start : start + at_once]
        target = torch.tensor([p["target_id"] for p in chunk], device=decomposition.loaded.device)
        yield chunk, Attribution(decomposition, run_with_cache(decomposition, [p["token_ids"] for p in chunk]), target)


def _name(prompt: Prompt) -> str:
    return f"prompt {prompt['id']}"


# Model, prompts, what the model says -----------------------------------------------------------------------------


def _model(decomposition: Decomposition, golden: dict[str, Any], prompts: Sequence[Prompt], to: _Comparisons) -> None:
    """See that weights and tokens are those that the golden values were made with."""
    revision = decomposition.loaded.source.revision
    if revision != golden["gguf_sha256"]:
        to["weights"].problems.append(f"sha256 {revision[:12]}…, expected {golden['gguf_sha256'][:12]}…")
    for p in prompts:
        ids, target = target_token(decomposition.loaded.tokenizer, p["prompt"], p["answer"])
        to["tokens, target"].values([*ids, target], [*p["token_ids"], p["target_id"]], _name(p), absolute=0)


def _effects(
    decomposition: Decomposition, every: Sequence[Prompt], prompts: Sequence[Prompt], to: _Comparisons
) -> None:
    """Rank, probability and log-probability of the target, as the model is and with neurons zeroed."""
    n = decomposition.ffn_columns(0).shape[0]
    trials, expected, quantities = [], [], []
    for p in prompts:
        rivals = {q["target_id"] for q in every if q["category"] == p["category"]} - {p["target_id"]}
        ablations = {(letter, how): p["ablations"][letter][how] for letter in LETTERS for how in ("last", "all")}
        for (letter, how), effect in {("", ""): p["ablations"]["none"], **ablations}.items():
            zeroed = silenced_ffn([layer * n + i for layer, i in p["methods"][letter]], n) if letter else Silenced()
            trials.append(Trial(p["token_ids"], p["target_id"], zeroed, how == "all", tuple(rivals)))
            expected.append((_name(p) + f", {letter} {how}" * bool(letter), p, effect))
            quantities.append("ablations" if letter else "target")
    found = run_trials(decomposition, trials)
    for i, ((where, p, effect), quantity) in enumerate(zip(expected, quantities, strict=True)):
        to[f"{quantity}: rank"].values(found.rank[i], effect["rank"], where, absolute=0)
        to[f"{quantity}: prob"].values(found.prob[i], effect["prob"], where, absolute=0, relative=0.01)
        to[f"{quantity}: logp"].values(found.logp[i], effect["logp"], where, absolute=0.01)
        if quantity == "target":
            kept = found.rank[i] <= KEPT_RANK and found.ahead[i]
            to["target: kept"].values(float(kept), float(p["kept"]), where, absolute=0)
            for key in ("rank", "prob", "logp"):
                to[f"target: {key}"].values(getattr(found, key)[i], p[key], where, absolute=0, relative=1e-3)


def _top10(logits: torch.Tensor, p: Prompt, to: _Comparisons) -> None:
    best = logits.double().log_softmax(0).topk(2 * len(p["top10"]))
    found = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    to["top10"].best(found, dict(p["top10"]), _name(p))


# Scores ----------------------------------------------------------------------------------------------------------


def _scores(a: Attribution, chunk: Sequence[Prompt], to: _Comparisons) -> None:
    layers, heads = a.layer_scores, a.head_scores
    layer, head, attention, score = a.head_positions(10)
    for i, p in enumerate(chunk):
        for component, found in layers.items():
            to[f"{component}_layer_scores"].values(found[i], p[f"{component}_layer_scores"], _name(p))
        to["head_scores"].values(heads[i], p["head_scores"], _name(p))
        places = [(j, t) for j in range(layer.shape[1]) for t in range(len(p["token_ids"]))]
        keys = [(int(layer[i, j]), int(head[i, j]), t) for j, t in places]
        expected = {tuple(row[:3]): row[3:] for row in p["head_positions"]}
        to["head_positions"].places(keys, list(expected), [], _name(p), lambda *_: False)
        both = [(place, expected[key]) for place, key in zip(places, keys, strict=True) if key in expected]
        for part, name in enumerate(("attention", "score")):
            values = (attention, score)[part]
            found = [values[i, j, t] for (j, t), _row in both]
            to[f"head_positions: {name}"].values(found, [row[part] for _place, row in both], _name(p))


def _best_neurons(a: Attribution, chunk: Sequence[Prompt], to: _Comparisons) -> None:
    """Value neurons, and the query neurons and layers of the thirty best."""
    ffn, attn = a.ffn_top(300), a.attn_top(300)
    queries = {"attn": a.attn_queries(attn.first(30)), "ffn": a.ffn_queries(ffn.first(30))}
    for i, p in enumerate(chunk):
        for name, top in (("ffn_top", ffn), ("attn_top", attn)):
            found, coefficients = _neurons(top, i)
            rows = [(tuple(row[:-2]), *row[-2:]) for row in p[name]]
            to[name].best(found, {key: score for key, _m, score in rows}, _name(p))
            both = [(coefficients[key], m) for key, m, _score in rows if key in coefficients]
            to[f"{name}: coefficient"].values(*zip(*both, strict=True), _name(p), absolute=1e-4, relative=1e-3)
        for kind, query in queries.items():
            _queries(query, kind, i, p, to)


def _neurons(top: Neurons, i: int) -> tuple[dict[Any, float], dict[Any, float]]:
    """Scores and coefficients of one prompt's neurons, by their place."""
    place = [x[i].tolist() for x in (top.layer, top.head, top.neuron, top.position) if x is not None]
    keys = list(zip(*place, strict=True))
    return dict(zip(keys, top.score[i].tolist(), strict=True)), dict(
        zip(keys, top.coefficient[i].tolist(), strict=True)
    )


def _queries(query: QueryScores, kind: str, i: int, p: Prompt, to: _Comparisons) -> None:
    n = query.neurons.shape[2]
    expected = {tuple(row[:2]): row[2] for row in p[f"query_ffn_for_{kind}"]}
    best = query.neurons[i].flatten().topk(2 * len(expected))
    found = {divmod(place, n): score for place, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
    to[f"query_ffn_for_{kind}"].best(found, expected, _name(p), relative=QUERY)
    for part in ("embed", "attn", "ffn"):
        layers = p[f"query_layers_for_{kind}"][part]
        to[f"query_layers_for_{kind}"].values(getattr(query, part)[i], layers, _name(p), relative=QUERY)


# Rankings and tokens ---------------------------------------------------------------------------------------------


def _rankings(a: Attribution, chunk: Sequence[Prompt], to: _Comparisons) -> None:
    """The ten best by each method. Equal values are no near tie: a rule decides between them."""
    best, n = best_neurons(a, 10), a.ffn_coefficients.shape[2]
    for i, p in enumerate(chunk):
        for letter, method in LETTERS.items():
            found = [divmod(place, n) for place in best[method][i].tolist()]
            expected = [tuple(row) for row in p["methods"][letter]]
            values = p["method_values_11"][letter]
            to[f"methods: {method}"].places(
                found, expected, values, _name(p), lambda x, y: 0 < abs(x - y) <= 1e-4 * abs(x)
            )


def _neuron_tokens(decomposition: Decomposition, p: Prompt, to: _Comparisons) -> None:
    """Tokens at both ends of the best neurons' columns, under the unembedding with the final norm's weight in it.

    (The unembedding without it has 67 of 300 tokens of three prompts of SmolLM2 in the same place.)
    """
    for row in p["neuron_tokens"]:
        logits = decomposition.readout.table @ decomposition.ffn_columns(row["layer"])[row["neuron"]]
        for end, sign in (("top", 1), ("bottom", -1)):
            best = (sign * logits).topk(len(row[end]) + 1)
            where = f"{_name(p)}, f{row['layer']}.{row['neuron']} {end}"
            found, values = best.indices.tolist()[:-1], best.values.tolist()
            to["neuron_tokens"].places(found, row[end], values, where, lambda x, y: abs(x - y) <= 1e-4 * abs(x))


# Every neuron ----------------------------------------------------------------------------------------------------


def compare_sums(decomposition: Decomposition, golden: dict[str, Any], n: int) -> list[Comparison]:
    """Score every neuron of the first ``n`` prompts over the whole vocabulary: minutes for each prompt."""
    to = _Comparisons()
    with torch.inference_mode():
        for p in golden["prompts"][:n]:
            _chunk, a = next(_attributed(decomposition, [p]))
            for name, exact, bounds in (("ffn", a.ffn_exact, a.ffn_bounds), ("attn", a.attn_exact, a.attn_bounds)):
                every = torch.arange(bounds[0].shape[1], device=a.target.device)
                scores = exact(torch.zeros_like(every), every)
                open_ = p[f"{name}_abs_below_1e-7"]  # rounding can turn the sign of so small a score
                to[f"n_{name}"].values(len(scores), p[f"n_{name}"], _name(p), absolute=0)
                to[f"{name}_sum"].values(scores.sum(), p[f"{name}_sum"], _name(p), relative=1e-3)
                to[f"{name}_negative"].values((scores < 0).sum(), p[f"{name}_negative"], _name(p), absolute=open_)
    return list(to.values())
