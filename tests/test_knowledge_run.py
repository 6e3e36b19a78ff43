"""One run of the knowledge study, from prompts to commit: what it stores, what it repeats, what it refuses.

The tiny model knows nothing, so the answers are asked of it: the letter that it thinks likeliest is right, and the
prompt kept; the second or the last of the letters is an answer that does not count. Every letter is a token, and the
space before an answer too: it counts as the prompt's last.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.command_line import answer, refusal
from helpers.interruptions import interrupt_after, no_model
from transformers import AutoConfig, AutoModelForCausalLM

from kdb.errors import ModelError
from kdb.ingest import measure as studies
from kdb.ingest.attribution import candidates
from kdb.ingest.attribution import scores as attribution
from kdb.ingest.attribution import study as knowledge
from kdb.ingest.datasets import load_dataset
from kdb.ingest.forward import activation_cache as cache
from kdb.ingest.forward.checks import CHECK_PROMPTS
from kdb.ingest.job import Job
from kdb.ingest.models.find import LoadedModel, find_model
from kdb.ingest.models.load import load_model
from kdb.ingest.settings import Attributing, Measuring, Probing
from kdb.ingest.stages import Outcome, Shard
from kdb.warehouse import sums
from kdb.warehouse.staged_run import StagedRun
from kdb.warehouse.store import Warehouse

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

RunKdb = Callable[..., Result]
Rows = list[tuple[Any, ...]]

LAYERS, HEADS, ENTRIES, NEURONS, SPACE = 2, 2, 8, 32, 1
CATEGORIES = {"weather": "The sky of", "water": "The river of", "town": "The old mayor of"}
TOWNS = ("Bonn", "Jena", "Kiel", "Ulm")

SCORES = {
    "layer_scores": ("layer, component", "score"),
    "head_scores": ("layer, head", "score"),
    "head_position_scores": ("layer, head, position, token", "attention, score"),
    "neuron_scores": ("component, layer, head, neuron, position", "coefficient, score"),
    "candidate_scores": ("component, layer, head, neuron", "score"),
    "query_neuron_scores": ("activates, layer, neuron", "score"),
    "query_layer_scores": ("activates, layer, component", "score"),
    "ablations": ("method, positions, mode, k", "logp_before, logp_after, prob_before, prob_after"),
    "effects": ("component, layer, head, role, replacement, method, direction", "logp, logit_diff"),
    "lens_readouts": ("layer, place, position", "target_logp, rival_logp, entropy, kl"),
}
"""The tables of scores: what a row of a prompt is about, and what it says."""

TABLES = (*SCORES, "ablated_parts", "neuron_sums", "neuron_tokens", "prompts", "checks", "models", "datasets")


# The dataset -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranked(tiny_loaded: LoadedModel) -> Callable[[str], list[str]]:
    """The letters by falling probability after a prompt and a space."""
    tokenizer = tiny_loaded.tokenizer
    tokens = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in string.ascii_letters}

    def letters(prompt: str) -> list[str]:
        with torch.inference_mode():
            logits = tiny_loaded.model(torch.tensor([tokenizer(f"{prompt} ")["input_ids"]])).logits[0, -1]
        return sorted(tokens, key=lambda letter: -logits[tokens[letter]])

    return letters


@pytest.fixture(scope="module")
def known(ranked: Callable[[str], list[str]]) -> list[tuple[str, str, str]]:
    """Prompt, answer and category of 12 prompts that are kept and, last, two that are not."""
    rows = [
        (f"{begin} {town} is", ranked(f"{begin} {town} is")[0] + "eb", category)
        for category, begin in CATEGORIES.items()
        for town in TOWNS
    ]
    beaten, unlikely = "The sky of Celle is", "The river of Celle is"
    return [*rows, (beaten, ranked(beaten)[1] + "eb", "weather"), (unlikely, ranked(unlikely)[-1] + "eb", "water")]


def write(path: Path, rows: Iterable[Iterable[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "answer", "category"), *rows])
    return path


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, known: list[tuple[str, str, str]]) -> Path:
    """``facts.csv``, with these prompts."""
    return write(tmp_path_factory.mktemp("datasets") / "facts.csv", known)


# Runs and what they stored ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ingest(run_kdb: RunKdb, tiny_model: Path, facts: Path) -> Callable[..., Result]:
    """``kdb ingest`` of a model and a dataset; further options change it."""

    def ingest(warehouse: Path, *options: str | Path, model: Path = tiny_model, dataset: Path = facts) -> Result:
        return run_kdb("ingest", "--model", model, "--dataset", dataset, "--warehouse", warehouse, *options)

    return ingest


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, ingest: Callable[..., Result]) -> Warehouse:
    """A warehouse with the plain run, to be read."""
    folder = tmp_path_factory.mktemp("stored") / "warehouse"
    answer(ingest(folder))
    return Warehouse(folder)


@pytest.fixture
def opened(tmp_path: Path) -> Warehouse:
    return Warehouse.create(tmp_path / "opened")


@pytest.fixture(scope="module")
def job(tiny_model: Path, facts: Path) -> Callable[..., Job]:
    """The job of ``kdb ingest --model tiny --dataset facts.csv``; keywords are its settings of attribution."""

    def make(dataset: Path = facts, **attributing: Any) -> Job:
        loaded = load_dataset(str(dataset))
        return Job(find_model(str(tiny_model)), loaded, Measuring(), Probing(), False, Attributing(**attributing))

    return make


@pytest.fixture
def measure(opened: Warehouse, job: Callable[..., Job], tiny_loaded: LoadedModel) -> Callable[..., Warehouse]:
    """Measure into an empty warehouse, without the command line."""

    def measure(dataset: Path | None = None, batch_tokens: int | None = None, **attributing: Any) -> Warehouse:
        asked = job(dataset, **attributing) if dataset else job(**attributing)
        studies.ingest(opened.storage, asked, lambda: tiny_loaded, batch_tokens=batch_tokens)
        return opened

    return measure


def rows(warehouse: Warehouse, statement: str) -> Rows:
    return warehouse.sql(statement).rows()


def everything(warehouse: Warehouse) -> dict[str, Rows]:
    found = {table: warehouse.scan(table, everything=True).drop("run").collect() for table in TABLES}
    return {table: frame.sort(frame.columns).rows() for table, frame in found.items()}


def scores(warehouse: Warehouse, table: str) -> dict[tuple[Any, ...], tuple[float, ...]]:
    """The values of a table's rows, by the text of the prompt and the other key columns."""
    about, said = (columns.split(", ") for columns in SCORES[table])
    n = 1 + len(about)
    rows, prompts = (warehouse.scan(name, everything=True) for name in (table, "prompts"))
    named = rows.join(prompts, on=("model", "dataset", "run", "prompt_id"))
    found = named.select("text", *about, *said).collect().rows()
    assert len({row[:n] for row in found}) == len(found)
    return {row[:n]: row[n:] for row in found}


def assert_same_scores(found: Warehouse, expected: Warehouse) -> None:
    for table in SCORES:
        ours, theirs = scores(found, table), scores(expected, table)
        assert ours.keys() == theirs.keys(), table
        off = {about: (ours[about], said) for about, said in theirs.items() if ours[about] != near(said)}
        assert off == {}, table


def near(values: Any) -> Any:
    return pytest.approx(values, rel=0, abs=1e-4)


# What a run stores -----------------------------------------------------------------------------------------------


def test_prompts_are_stored_with_their_targets_and_whether_they_count(
    stored: Warehouse, known: list[tuple[str, str, str]], tiny_loaded: LoadedModel
) -> None:
    columns = "prompt_id, text, answer, category, target_token, target_token_id, n_tokens, target_prob, target_rank"
    found = rows(stored, f"SELECT {columns}, kept FROM prompts ORDER BY prompt_id")
    assert [row[:4] for row in found] == [(i, *row) for i, row in enumerate(known)]
    for _, text, given, _, token, target, n_tokens, prob, rank, _ in found:
        assert (token, n_tokens) == (given[0], len(text) + SPACE)
        ids = tiny_loaded.tokenizer(f"{text} ")["input_ids"]
        with torch.inference_mode():
            p = tiny_loaded.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        assert tiny_loaded.tokenizer.convert_ids_to_tokens(target) == token
        assert prob == pytest.approx(p[target].item(), rel=1e-4)
        assert rank == 1 + int((p > p[target]).sum())
    assert [row[-1] for row in found] == [True] * 12 + [False] * 2
    assert found[-2][-2] <= 10 < found[-1][-2]  # beaten by another answer, and not among the ten best


def test_every_table_has_the_rows_that_the_models_sizes_and_the_kept_prompts_make(stored: Warehouse) -> None:
    lengths = [n for (n,) in rows(stored, "SELECT n_tokens FROM prompts WHERE kept ORDER BY prompt_id")]
    expected = {
        "layer_scores": [2 * LAYERS] * 12,
        "head_scores": [LAYERS * HEADS] * 12,
        "head_position_scores": [LAYERS * HEADS * n for n in lengths],  # all four heads are among the ten best
        "neuron_scores": [LAYERS * NEURONS + min(300, LAYERS * HEADS * ENTRIES * n) for n in lengths],
        "candidate_scores": [LAYERS * NEURONS + LAYERS * HEADS * ENTRIES] * 12,  # so few neurons are all candidates
        "query_neuron_scores": [2 * LAYERS * NEURONS] * 12,
        "query_layer_scores": [2 * (1 + 2 * LAYERS)] * 12,
        "ablations": [3 * 8] * 12,  # zeroed at the last and at all positions, and at their mean
        "effects": [2 * (LAYERS + LAYERS * HEADS)] * 12,  # all four heads are among the ten best, and measured
        "lens_readouts": [1 + 2 * LAYERS] * 12,
    }
    count = "SELECT count(*) FROM {} GROUP BY prompt_id ORDER BY prompt_id"
    assert {t: [n for (n,) in rows(stored, count.format(t))] for t in SCORES} == expected
    settings = rows(stored, "SELECT study, variant, device, tables FROM runs")
    assert settings == [("knowledge", "default", "cpu", sorted([*TABLES, "runs"]))]


@pytest.mark.parametrize("table", SCORES)
def test_a_prompt_that_is_not_kept_has_no_scores(stored: Warehouse, table: str) -> None:
    scored = rows(stored, f"SELECT DISTINCT prompt_id FROM {table} ORDER BY 1")
    assert scored == rows(stored, "SELECT prompt_id FROM prompts WHERE kept ORDER BY 1")


def test_a_layers_score_is_how_much_more_likely_it_makes_its_own_prompts_target(
    stored: Warehouse, tiny_loaded: LoadedModel
) -> None:
    found = scores(stored, "layer_scores")
    prompts = rows(stored, "SELECT text, target_token_id FROM prompts WHERE kept")
    by_hand = {
        (text, *place): (score,)
        for text, target in prompts
        for place, score in layer_increases(tiny_loaded, text, target).items()
    }
    assert found == {key: near(score) for key, score in by_hand.items()}


def layer_increases(loaded: LoadedModel, text: str, target: int) -> dict[tuple[int, str], float]:
    """log p(target) with a layer's output less that without it, the final norm's scale being that of the whole."""
    heard: dict[Any, torch.Tensor] = {}

    def hear(name: Any, module: Any, *, reads: bool = False) -> Any:
        def hook(_module: Any, args: Any, output: Any) -> None:
            heard[name] = (args[0] if reads else output[0] if isinstance(output, tuple) else output)[0, -1]

        return module.register_forward_hook(hook)

    model = loaded.model.model
    hooks = [hear("last", model.norm, reads=True)]
    for i, block in enumerate(model.layers):
        hooks += [hear(i, block, reads=True), hear((i, "attn"), block.self_attn), hear((i, "ffn"), block.mlp)]
    with torch.inference_mode():
        loaded.model(torch.tensor([loaded.tokenizer(f"{text} ")["input_ids"]]))
        scale = (heard["last"].square().mean() + model.norm.variance_epsilon).rsqrt()

        def logp(residual: torch.Tensor) -> float:
            logits = loaded.model.lm_head(residual * scale * model.norm.weight)
            return float(logits.double().log_softmax(-1)[target])

        found = {}
        for i in range(LAYERS):
            middle = heard[i] + heard[i, "attn"]
            found[i, "attn"] = logp(middle) - logp(heard[i])
            found[i, "ffn"] = logp(middle + heard[i, "ffn"]) - logp(middle)
    for hook in hooks:
        hook.remove()
    return found


def test_a_heads_attention_is_told_token_by_token_and_sums_to_one(stored: Warehouse) -> None:
    tokens = "string_agg(token, '' ORDER BY position)"
    found = rows(
        stored,
        f"SELECT layer, head, text, n_tokens, {tokens}, sum(attention), max(position) FROM head_position_scores"
        " JOIN prompts USING (run, prompt_id) GROUP BY ALL",
    )
    assert len(found) == 12 * LAYERS * HEADS
    for _layer, _head, text, n_tokens, read, attention, last in found:
        assert read == f"{text} "
        assert last == n_tokens - 1
        assert attention == pytest.approx(1, abs=1e-5)


def test_neurons_are_ranked_by_falling_score_and_certified(stored: Warehouse) -> None:
    columns = "prompt_id, component, rank, score, lower <= score AND score <= upper AND upper - lower < 1e-3, exact"
    found = rows(stored, f"SELECT {columns} FROM neuron_scores ORDER BY prompt_id, component, rank")
    assert all(certified and exact for *_, certified, exact in found)
    assert_ranked(found)
    heads = "SELECT DISTINCT component, head IS NULL, position IS NULL FROM neuron_scores ORDER BY 1"
    assert rows(stored, heads) == [("attn", False, False), ("ffn", True, True)]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory, ingest: Callable[..., Result]) -> dict[tuple[Any, ...], float]:
    """The sum of every neuron's scores over all kept prompts of each category, from a run that stores all of them."""
    folder = tmp_path_factory.mktemp("every") / "warehouse"
    answer(ingest(folder, "--all-neurons", "--no-effects"))
    totals = f"SELECT {NEURON}, sum(score) FROM neuron_scores JOIN prompts USING (run, prompt_id) GROUP BY ALL"
    return {tuple(place): total for *place, total in rows(Warehouse(folder), totals)}


def test_sums_are_those_of_the_kept_prompts_scores(stored: Warehouse, every: dict[tuple[Any, ...], float]) -> None:
    assert neuron_totals(stored) == {place: (pytest.approx(total, abs=1e-3), 4) for place, total in every.items()}
    assert {category for category, *_ in neuron_totals(stored)} == set(CATEGORIES)
    assert rows(stored, "SELECT DISTINCT exact FROM neuron_sums") == [(True,)]


def neuron_totals(stored: Warehouse, where: str = "true") -> dict[tuple[Any, ...], tuple[float, int]]:
    found = rows(stored, f"SELECT {NEURON}, total, n_prompts FROM neuron_sums WHERE {where}")
    return {place: (total, n) for *place, total, n in map(list, found) for place in [tuple(place)]}


NEURON = "category, component, layer, head, neuron"


@pytest.mark.parametrize("n_first", [5, 12])
def test_the_best_neurons_of_a_category_have_the_largest_means_over_all_its_prompts(
    n_first: int,
    every: dict[tuple[Any, ...], float],
    measure: Callable[..., Warehouse],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each prompt lists two neurons only, and the first candidates are too few, or more than enough."""
    for module in (candidates, sums):
        monkeypatch.setattr(module, "PROVED_RANKS", 5)
    monkeypatch.setattr(candidates, "FIRST", n_first)
    found = measure(top_k=2, query_values=2, ablate_k=0, effects=False)
    ranked = rows(found, f"SELECT {NEURON}, total, rank, n_prompts FROM neuron_sums WHERE rank IS NOT NULL")
    for category in CATEGORIES:
        for component in ("attn", "ffn"):
            of = {place: total for place, total in every.items() if place[:2] == (category, component)}
            best = sorted(of.values(), reverse=True)[:5]
            mine = sorted((row for row in ranked if row[:2] == (category, component)), key=lambda row: row[6])
            assert [row[6] for row in mine] == [1, 2, 3, 4, 5]
            assert [row[5] for row in mine] == [pytest.approx(total, abs=1e-3) for total in best]
            assert all(of[row[:5]] == pytest.approx(row[5], abs=1e-3) for row in mine)
            assert {row[7] for row in mine} == {4}  # every kept prompt counts
    assert neuron_totals(found, "NOT exact")
    further = rows(
        found,
        "SELECT count(DISTINCT (layer, head, neuron)) FROM candidate_scores JOIN prompts "
        "USING (run, prompt_id) GROUP BY category, component",
    )
    assert (max(further) > (n_first,)) == (n_first == 5)


def test_a_run_that_was_stopped_among_the_candidates_ends_as_one_in_one_go(
    stored: Warehouse, measure: Callable[..., Warehouse], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(knowledge, "candidate_rows", interrupt_after(2, knowledge.candidate_rows))
        measure()
    assert_same_scores(measure(), stored)
    assert not list(tmp_path.rglob("_neuron_bounds"))


def assert_ranked(found: Rows) -> None:
    """Rows of prompt, component, rank and score, in order: rank counts from 1 while the score falls."""
    expected: Counter[tuple[int, str]] = Counter()
    for i, (prompt, component, rank, score, *_) in enumerate(found):
        expected[prompt, component] += 1
        assert rank == expected[prompt, component]
        assert rank == 1 or score <= found[i - 1][3]


def test_what_activates_the_value_neurons_adds_up_to_their_scores(stored: Warehouse) -> None:
    # A residual is the sum of the embedding and of what all earlier layers added: no more, in a model without biases.
    best = rows(
        stored,
        "SELECT prompt_id, component, sum(score) FROM neuron_scores WHERE rank <= 30 GROUP BY ALL ORDER BY ALL",
    )
    sources = "SELECT prompt_id, activates, sum(score) FROM query_layer_scores GROUP BY ALL ORDER BY ALL"
    for (*about, total), (*told, expected) in zip(rows(stored, sources), best, strict=True):
        assert about == told
        assert total == pytest.approx(expected, abs=1e-3)


def test_ablations_begin_from_the_untouched_model(stored: Warehouse) -> None:
    found = rows(
        stored,
        "SELECT method, positions, mode, k, count(*), bool_and(rank_before = target_rank),"
        " max(abs(prob_before - target_prob)) < 1e-6, max(abs(logp_before - ln(target_prob))) < 1e-4"
        " FROM ablations JOIN prompts USING (run, prompt_id) GROUP BY ALL",
    )
    assert len(found) == 8 * 3
    assert {row[3:] for row in found} == {(10, 12, True, True, True)}
    hurt = "SELECT avg(logp_after) < avg(logp_before) FROM ablations WHERE method = 'log_prob_increase'"
    assert rows(stored, hurt) == [(True,)]


def test_every_neuron_of_a_list_has_its_tokens_at_both_ends(stored: Warehouse) -> None:
    listed = (
        "SELECT component, layer, head, neuron FROM neuron_scores"
        " UNION SELECT 'ffn', layer, NULL, neuron FROM query_neuron_scores"
    )
    ends = "SELECT component, layer, head, neuron, sign FROM neuron_tokens"
    found = rows(stored, f"{ends} GROUP BY ALL HAVING list(rank ORDER BY rank) = range(1, 11) ORDER BY ALL")
    expected = f"SELECT *, unnest(['bottom', 'top']) AS sign FROM ({listed}) ORDER BY ALL"
    assert found == rows(stored, expected)
    assert len(rows(stored, "FROM neuron_tokens")) == 10 * len(found)
    falls = "lag(logit) OVER (PARTITION BY component, layer, head, neuron, sign ORDER BY rank) >= logit"
    falling = f"SELECT sign, {falls} AS falls FROM neuron_tokens QUALIFY falls IS NOT NULL"
    assert rows(stored, f"SELECT DISTINCT * FROM ({falling}) ORDER BY 1") == [("bottom", False), ("top", True)]


def test_a_run_carries_how_far_it_can_be_trusted(stored: Warehouse) -> None:
    found = rows(stored, 'SELECT "check", value <= tolerance, passed, tolerance FROM checks WHERE passed ORDER BY 1')
    names = (
        "ffn_keys",
        "ffn_sum",
        "frozen_readout",
        "frozen_readout_kl",
        "head_sum",
        "layer_score_sum",
        "logits",
        "logits_kl",
        "residual_sum",
        "stored_probs",
        "value_keys",
    )
    own = {"frozen_readout_kl": 1e-8, "layer_score_sum": 1e-4}
    assert found == [(name, True, True, own.get(name, 1e-3)) for name in names]
    counts = rows(stored, 'SELECT "check", value, tolerance FROM checks WHERE passed IS NULL ORDER BY 1')
    assert counts == [("doubled_bos", 0, None), ("special_tokens_in_text", 0, None)]


def test_bfloat16_is_checked_to_its_own_tolerance(tmp_path: Path, ingest: Callable[..., Result]) -> None:
    answer(ingest(tmp_path / "half", "--dtype", "bfloat16"))
    half = Warehouse(tmp_path / "half")
    found = "SELECT DISTINCT tolerance, passed, value <= tolerance, detail LIKE '%bfloat16' FROM checks WHERE value > 0"
    assert rows(half, f"{found} ORDER BY 1") == [(0.005, True, True, True), (0.1, True, True, True)]
    assert rows(half, "SELECT count(*) FROM checks WHERE \"check\" = 'layer_score_sum'") == [(0,)]
    assert rows(half, "SELECT variant FROM runs") == [("bfloat16",)]
    assert rows(half, "SELECT dtype FROM models") == [("bfloat16",)]
    kept = rows(half, "SELECT prompt_id FROM prompts WHERE kept ORDER BY 1")
    assert len(kept) > 0
    assert rows(half, "SELECT DISTINCT prompt_id FROM neuron_scores ORDER BY 1") == kept
    assert rows(half, "SELECT count(*) FROM neuron_scores WHERE isnan(score) OR score NOT BETWEEN lower AND upper") == [
        (0,)
    ]


# What the options of attribution do ------------------------------------------------------------------------------


def test_top_k_stores_so_many_of_the_same_neurons(
    tmp_path: Path, ingest: Callable[..., Result], stored: Warehouse
) -> None:
    answer(ingest(tmp_path / "few", "--top-k", "5"))
    few = Warehouse(tmp_path / "few")
    assert rows(few, "SELECT variant FROM runs") == [("top-k=5",)]
    best = "SELECT prompt_id, component, layer, head, neuron, position, rank FROM neuron_scores"
    assert rows(few, f"{best} ORDER BY ALL") == rows(stored, f"{best} WHERE rank <= 5 ORDER BY ALL")
    assert len(rows(few, best)) == 12 * 2 * 5
    # What is traced back are the 30 best value neurons, though no more than 5 of them are stored.
    sources = scores(stored, "query_layer_scores")
    assert scores(few, "query_layer_scores") == {about: near(score) for about, score in sources.items()}


def test_all_neurons_are_stored_with_intervals_that_hold_their_exact_scores(
    tmp_path: Path, ingest: Callable[..., Result]
) -> None:
    answer(ingest(tmp_path / "new", "--all-neurons", "--top-k", "5", "--ablate-k", "0"))
    answer(ingest(tmp_path / "new", "--top-k", "10000", "--ablate-k", "0"))
    both = Warehouse(tmp_path / "new")
    variants = ["top-k=5 all-neurons ablate-k=0", "top-k=10000 ablate-k=0"]
    assert rows(both, "SELECT variant FROM runs ORDER BY finished_at") == [(variant,) for variant in variants]
    of = "SELECT prompt_id, component, rank, score, exact FROM neuron_scores JOIN runs USING (run)"
    for variant in variants:
        found = rows(both, f"{of} WHERE variant = '{variant}' ORDER BY prompt_id, component, rank")
        assert_ranked(found)
        assert Counter(row[:2] for row in found) == {
            (prompt, component): LAYERS * NEURONS if component == "ffn" else LAYERS * HEADS * ENTRIES * n
            for prompt, n in rows(both, "SELECT prompt_id, n_tokens FROM prompts WHERE kept")
            for component in ("attn", "ffn")
        }
    place = ("prompt_id", "component", "layer", "head", "neuron", "position")
    same = " AND ".join(f"every.{column} IS NOT DISTINCT FROM best.{column}" for column in place)
    intervals = rows(
        both,
        "WITH named AS (FROM neuron_scores JOIN runs USING (run)),"
        f" every AS (FROM named WHERE variant = '{variants[0]}'), best AS (FROM named WHERE variant = '{variants[1]}')"
        " SELECT every.exact, best.exact AS certain, every.rank <= 5 AS best,"
        " every.lower <= best.score AND best.score <= every.upper AS holds,"
        f" every.lower <= every.score AND every.score <= every.upper AS ordered FROM every JOIN best ON {same}",
    )
    assert len(intervals) == len(rows(both, "FROM neuron_scores")) / 2
    assert all(certain and holds and ordered for _exact, certain, _best, holds, ordered in intervals)
    assert all(exact for exact, _certain, best, *_ in intervals if best)
    assert not all(exact for exact, *_ in intervals)


def test_query_values_are_how_many_value_neurons_are_traced_back(
    tmp_path: Path, ingest: Callable[..., Result], stored: Warehouse
) -> None:
    answer(ingest(tmp_path / "one", "--query-values", "1", "--ablate-k", "0"))
    one = Warehouse(tmp_path / "one")
    assert rows(one, "SELECT variant FROM runs") == [("query-values=1 ablate-k=0",)]
    sources = "SELECT prompt_id, activates, sum(score) FROM query_layer_scores GROUP BY ALL ORDER BY ALL"
    best = "SELECT prompt_id, component, score FROM neuron_scores WHERE rank = 1 ORDER BY ALL"
    for (*about, total), (*told, expected) in zip(rows(one, sources), rows(stored, best), strict=True):
        assert about == told
        assert total == near(expected)
    assert scores(one, "neuron_scores").keys() == scores(stored, "neuron_scores").keys()


def test_without_ablations_the_rest_is_the_same(
    tmp_path: Path, ingest: Callable[..., Result], stored: Warehouse, run_kdb: RunKdb
) -> None:
    answer(ingest(tmp_path / "none", "--ablate-k", "0"))
    none = Warehouse(tmp_path / "none")
    found, expected = everything(none), everything(stored)
    for table in ("ablations", "ablated_parts"):
        assert found.pop(table) == []
        assert expected.pop(table) != []
    assert found == expected
    assert rows(none, "SELECT variant, list_contains(tables, 'ablations') FROM runs") == [("ablate-k=0", False)]
    query = run_kdb("query", "attribution-methods", "--variant", "ablate-k=0", "--warehouse", none.storage.local.path)
    assert (query.exit_code, query.stderr) == (
        0,
        "No rows. `kdb runs` lists what was measured; with --help, a query says what it needs.\n",
    )


def test_ablate_k_is_how_many_neurons_are_zeroed(measure: Callable[..., Warehouse]) -> None:
    found = measure(ablate_k=LAYERS * NEURONS)
    assert rows(found, "SELECT DISTINCT k FROM ablations") == [(LAYERS * NEURONS,)]
    # All FFN neurons are zeroed then, whatever the method.
    spread = "SELECT max(logp_after) - min(logp_after) < 1e-4 FROM ablations GROUP BY prompt_id, positions, mode"
    assert rows(found, f"SELECT DISTINCT * FROM ({spread})") == [(True,)]


def test_a_recorded_chunk_that_gives_other_logits_than_the_prompt_alone_is_refused(
    opened: Warehouse, job: Callable[..., Job], tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cache.run_with_cache

    def wrong_in_the_runs_batches(decomposition: Any, token_ids: Any) -> Any:
        made = real(decomposition, token_ids)
        return replace(made, logits=made.logits.roll(1, -1)) if len(token_ids) > CHECK_PROMPTS else made

    monkeypatch.setattr(cache, "run_with_cache", wrong_in_the_runs_batches)
    with pytest.raises(ModelError, match=r"^tiny cannot be measured: logits is off by "):
        studies.ingest(opened.storage, job(), lambda: tiny_loaded)
    assert opened.storage.run_folders() == []


def test_prompts_on_both_sides_of_a_long_rope_are_scored_as_each_alone(
    tmp_path: Path, job: Callable[..., Job], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "long"))
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.1, 2.0, 8.0, 32.0]}
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.5, "pad_token_id": 0}
    config = AutoConfig.for_model("phi3", **sizes, **more, original_max_position_embeddings=32, rope_parameters=rope)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    begin = ["The sky of", "The old and very large house of the mayor of"]
    some = [(f"{b} {town} {n} is", "ab"[n % 2], "c") for b in begin for town in TOWNS for n in range(4)]
    facts = write(tmp_path / "facts.csv", some)
    monkeypatch.setattr(knowledge, "KEPT_RANK", 256)
    together, alone = (Warehouse.create(tmp_path / name) for name in ("together", "alone"))
    asked = replace(job(facts, ablate_k=2), source=find_model(str(folder)))
    studies.ingest(together.storage, asked, lambda: load_model(asked.source))
    monkeypatch.setattr(knowledge, "CHUNK_BYTES", 1)
    studies.ingest(alone.storage, asked, lambda: load_model(asked.source), batch_tokens=1)
    assert {n > 32 for (n,) in rows(together, "SELECT n_tokens FROM prompts WHERE kept")} == {True, False}
    assert_same_scores(together, alone)


# What is done once -----------------------------------------------------------------------------------------------


def make_chunks_small(patch: pytest.MonkeyPatch) -> None:
    """Chunks of three prompts at most: four of them, of like length."""
    patch.setattr(knowledge, "CHUNK_BYTES", 200_000)
    patch.setattr(attribution, "BASES_BYTES", 3 * 2 * LAYERS * 256 * 4)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_chunks_small(monkeypatch)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each recorded forward pass."""
    calls: list[int] = []
    real = cache.run_with_cache

    def counted(decomposition: Any, token_ids: Any) -> Any:
        calls.append(len(token_ids))
        return real(decomposition, token_ids)

    monkeypatch.setattr(cache, "run_with_cache", counted)
    return calls


def test_the_same_ingest_again_loads_no_model_and_changes_nothing(
    stored: Warehouse, ingest: Callable[..., Result], job: Callable[..., Job], recorded: list[int]
) -> None:
    before = everything(stored)
    (folder,) = stored.storage.run_folders()
    assert studies.ingest(stored.storage, job(), no_model) == Outcome(folder.run, "exists")
    assert answer(ingest(stored.storage.local.path)) == f"tiny on facts: is stored already (run {folder.run})\n"
    assert everything(stored) == before
    assert recorded == []


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, job: Callable[..., Job], tiny_loaded: LoadedModel
) -> dict[str, Rows]:
    """The tables of a run of four chunks without interruption."""
    plain = Warehouse.create(tmp_path_factory.mktemp("uninterrupted") / "warehouse")
    with pytest.MonkeyPatch.context() as patch:
        make_chunks_small(patch)
        studies.ingest(plain.storage, job(), lambda: tiny_loaded)
    return everything(plain)


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_attribution_goes_on_from_its_last_finished_chunk(
    opened: Warehouse,
    uninterrupted: dict[str, Rows],
    recorded: list[int],
    job: Callable[..., Job],
    run_kdb: RunKdb,
    tiny_loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "run_with_cache", interrupt_after(5, cache.run_with_cache))
        with pytest.raises(KeyboardInterrupt):
            studies.ingest(opened.storage, job(), lambda: tiny_loaded)
    assert recorded == [3, 3, 2, 3]  # the checks, and one chunk
    assert opened.storage.run_folders() == []
    assert everything(opened) == {table: [] for table in TABLES}
    listed = run_kdb("runs", "--warehouse", opened.storage.local.path)
    assert f"Interrupted: tiny on facts (run {job().run}), " in listed.stderr
    recorded.clear()
    with monkeypatch.context() as patch:  # that chunks are as they were begun is remembered, whatever fits now
        patch.setattr(knowledge, "CHUNK_BYTES", 2**29)
        assert studies.ingest(opened.storage, job(), lambda: tiny_loaded).status == "committed"
    assert recorded == [3, 3, 3]
    assert everything(opened) == uninterrupted


def test_rows_that_are_waited_for_leave_torchs_mode_alone(
    job: Callable[..., Job], tiny_loaded: LoadedModel, known: list[tuple[str, str, str]]
) -> None:
    subject = knowledge.prepare(job())[0].bind(tiny_loaded, None)
    measured = knowledge.attributed(subject, Shard("part", list(range(len(known)))), lambda _: None)
    assert next(measured).table == "layer_scores"
    assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        measured.close()  # as when it is forgotten while the next run is under way
        assert torch.is_inference_mode_enabled()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("table", "time", "left"),
    [
        ("prompts", 1, [3, 3, 3, 3]),
        ("neuron_scores", 2, [3, 3, 3]),
        ("lens_readouts", 2, [3, 3, 3]),
        ("ablations", 3, [3, 3]),
        ("ablations", 5, []),
        ("query_layer_scores", 4, [3]),
        ("effects", 1, []),
        ("effects", 2, []),
        ("neuron_sums", 1, []),
        ("neuron_tokens", 1, []),
    ],
)
def test_an_ingest_that_is_cut_off_at_any_table_goes_on_to_the_same_rows(
    opened: Warehouse,
    uninterrupted: dict[str, Rows],
    recorded: list[int],
    job: Callable[..., Job],
    tiny_loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    table: str,
    time: int,
    left: list[int],
) -> None:
    writes: Counter[str] = Counter()
    real = StagedRun.write

    def interrupted(staged: StagedRun, name: str, *args: Any, **kwargs: Any) -> None:
        writes[name] += 1
        if (name, writes[name]) == (table, time):
            raise KeyboardInterrupt
        real(staged, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StagedRun, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            studies.ingest(opened.storage, job(), lambda: tiny_loaded)
    assert everything(opened) == {name: [] for name in TABLES}
    recorded.clear()
    studies.ingest(opened.storage, job(), lambda: tiny_loaded)
    assert recorded == left
    assert everything(opened) == uninterrupted
    assert list(opened.storage.verify()) == []
    assert opened.storage.local.staging.unfinished_runs() == []


# What changes speed and memory, but no score ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "size"),
    [(knowledge, "CHUNK_BYTES", 1), (attribution, "BASES_BYTES", 5 * 2 * LAYERS * 256 * 4)],
)
def test_the_size_of_a_chunk_changes_no_score(
    measure: Callable[..., Warehouse],
    stored: Warehouse,
    recorded: list[int],
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    size: int,
) -> None:
    monkeypatch.setattr(module, name, size)
    assert_same_scores(measure(), stored)
    assert len(recorded) > 2  # the checks, and more than one chunk


def test_the_tokens_of_a_batch_change_no_score(measure: Callable[..., Warehouse], stored: Warehouse) -> None:
    assert_same_scores(measure(batch_tokens=30), stored)


def test_the_order_of_the_prompts_changes_no_score(
    tmp_path: Path, measure: Callable[..., Warehouse], stored: Warehouse, known: list[tuple[str, str, str]]
) -> None:
    turned = measure(write(tmp_path / "facts.csv", reversed(known)))
    assert rows(turned, "SELECT text FROM prompts ORDER BY prompt_id") == [(text,) for text, *_ in reversed(known)]
    assert_same_scores(turned, stored)


# What can be asked of it -----------------------------------------------------------------------------------------


def asked(run_kdb: RunKdb, warehouse: Path, query: str, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        answer(run_kdb("query", query, "--warehouse", warehouse, "--format", "json", *options))
    )
    return found


@pytest.mark.parametrize(
    ("query", "n"),
    [
        ("top-layers", 3 * 2 * LAYERS),
        ("top-heads", 3 * LAYERS * HEADS),
        ("top-neurons", 3 * 2 * 10),
        ("attribution-methods", 2 * (1 + 8)),
        ("query-neurons", 3 * 2 * 10),
        ("query-layers", 3 * 2 * (1 + 2 * LAYERS)),
        ("attention-vs-ffn", 3),
        ("position-attention", 3 * LAYERS * HEADS * 5),
        ("value-neurons-by-layer", 3 * 2 * LAYERS),
        ("neuron-overlap", 3),
        ("head-overlap", 3),
        ("head-effects", 3 * LAYERS * HEADS),
        ("layer-effects", 3 * 2 * LAYERS),
        ("score-vs-effect", 3 * 3),
        ("answer-by-layer", 3),
        ("kept-prompts", 3),
        ("checks", 13),
        ("runs", 1),
    ],
)
def test_a_saved_query_answers(stored: Warehouse, run_kdb: RunKdb, query: str, n: int) -> None:
    found = asked(run_kdb, stored.storage.local.path, query)
    assert len(found) == n
    assert {row["category"] for row in found if "category" in row} in (set(), set(CATEGORIES))
    assert {row["model"] for row in found} == {"tiny"}


def test_it_is_told_how_many_prompts_count_and_why_the_others_do_not(stored: Warehouse, run_kdb: RunKdb) -> None:
    found = asked(run_kdb, stored.storage.local.path, "kept-prompts")
    columns = ("category", "n_prompts", "kept", "not_in_top_ten", "beaten_by_another_answer")
    assert [tuple(row[c] for c in columns) for row in found] == [
        ("town", 4, 4, 0, 0),
        ("water", 5, 4, 1, 0),
        ("weather", 5, 4, 0, 1),
    ]


def test_where_no_prompt_counts_the_run_says_so(
    tmp_path: Path, ingest: Callable[..., Result], run_kdb: RunKdb, ranked: Callable[[str], list[str]]
) -> None:
    prompts = [f"The sky of {town} is" for town in TOWNS]
    unlikely = [(prompt, ranked(prompt)[-1 - i % 2] + "eb", "weather") for i, prompt in enumerate(prompts)]
    answer(ingest(tmp_path / "new", dataset=write(tmp_path / "unknown.csv", unlikely)))
    opened = Warehouse(tmp_path / "new")
    assert rows(opened, "SELECT count(*), bool_or(kept), min(target_rank) > 10 FROM prompts") == [(4, False, True)]
    assert {table for table, found in everything(opened).items() if found} == {
        *("prompts", "checks", "models", "datasets")
    }
    empty = run_kdb("query", "top-heads", "--warehouse", tmp_path / "new", "--format", "csv")
    assert (empty.exit_code, empty.stdout) == (0, "model,dataset,category,rank,head_name,layer,head,score,n_prompts\n")
    (told,) = asked(run_kdb, tmp_path / "new", "kept-prompts")
    assert (told["n_prompts"], told["kept"], told["not_in_top_ten"]) == (4, 0, 4)
    again = answer(ingest(tmp_path / "new", dataset=tmp_path / "unknown.csv"))
    assert again.startswith("tiny on unknown: is stored already")


def test_both_studies_of_one_model_and_dataset_live_side_by_side(
    warehouse: Path, ingest: Callable[..., Result], run_kdb: RunKdb
) -> None:
    depth = asked(run_kdb, warehouse, "concept-depth")
    answer(ingest(warehouse, "--dataset-name", "weather"))
    opened = Warehouse(warehouse)
    listed = rows(opened, "SELECT study, model, dataset, variant FROM runs ORDER BY 1")
    assert listed == [(study, "tiny", "weather", "default") for study in ("concept", "knowledge")]
    both = "SELECT study, count(*), count(label), count(kept) FROM prompts JOIN runs USING (run) GROUP BY 1 ORDER BY 1"
    assert rows(opened, both) == [("concept", 40, 40, 0), ("knowledge", 14, 0, 14)]
    assert asked(run_kdb, warehouse, "concept-depth") == depth
    assert len(asked(run_kdb, warehouse, "top-heads")) == 3 * LAYERS * HEADS
    assert len(asked(run_kdb, warehouse, "kept-prompts")) == 3
    assert Counter(row["study"] for row in asked(run_kdb, warehouse, "checks")) == {"concept": 10, "knowledge": 13}
    assert answer(run_kdb("verify", "--warehouse", warehouse)) == "All files of 2 runs are as they were committed.\n"


def test_the_template_and_the_limit_make_variants_of_their_own(tmp_path: Path, ingest: Callable[..., Result]) -> None:
    answer(ingest(tmp_path / "new", "--template", "Well: {text}", "--limit", "4"))
    opened = Warehouse(tmp_path / "new")
    ((variant,),) = rows(opened, "SELECT variant FROM runs")
    assert re.fullmatch("limit=4 template=[0-9a-f]{8}", variant)
    assert rows(opened, "SELECT count(*), bool_and(text LIKE 'Well: The %') FROM prompts") == [(12, True)]


def test_a_dry_run_says_the_cost_and_stores_nothing(tmp_path: Path, ingest: Callable[..., Result]) -> None:
    assert answer(ingest(tmp_path / "new", "--dry-run")).startswith("tiny on facts: 14 prompts, ")
    assert not (tmp_path / "new").exists()


# What is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model, with a tokenizer that drops what is not ASCII."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "narrow"))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {piece: i for piece, i in vocab.items() if piece.isascii() or piece == "Ġ"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


# Why kdb cannot measure models of some architectures, and what these are set to beyond the common sizes.
STRANGE: dict[str, tuple[dict[str, Any], str]] = {
    "openai-gpt": ({}, "openai-gpt cannot be measured: residual_sum is off by"),
    "bert": ({}, "BertLMHeadModel is no causal language model: the state of a token depends on the tokens after it"),
}


BAD_ROWS = {
    "an empty answer": (
        [("The sky is", "blue", "sky"), ("The sea is", " ", "sky")],
        "bad.csv, line 3: expected an answer in column 'answer', found ' '",
    ),
    "two answers": (
        [("The sky is", "blue", "sky"), ("The sun is", "red", "sky"), ("The sky is", "grey", "sky")],
        "bad.csv, line 4: expected the answer 'blue' that bad.csv, line 2 has for the prompt 'The sky is', found "
        "'grey': keep one of the two rows",
    ),
    "one answer in a category": (
        [("The sky is", "blue", "sky"), ("The sea is", "blue", "sky")],
        "Dataset 'bad' (bad.csv, a user's file) has only the answer 'blue' in the category 'sky'; an answer is "
        "compared with the others of its category",
    ),
    "one first token in a category": (
        [("The sky is", "blue", "sky"), ("The sea is", "black", "sky")],
        "All answers of the category 'sky' begin with the same token of this model",
    ),
    "a prompt that is too long": (
        [("x" * 128, "blue", "sky"), ("The sea is", "red", "sky")],
        f"Prompt 0 of 'bad', '{'x' * 56}..., has 129 tokens, and tiny reads at most 128",
    ),
}


def assert_nothing_stored(folder: Path) -> None:
    if folder.exists():
        lake = Warehouse(folder).storage
        assert lake.run_folders() == []
        assert lake.local.staging.unfinished_runs() == []


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_dataset_that_cannot_be_measured_is_refused_whole(
    tmp_path: Path, ingest: Callable[..., Result], what: str
) -> None:
    content, message = BAD_ROWS[what]
    result = ingest(tmp_path / "new", dataset=write(tmp_path / "bad.csv", content))
    assert refusal(result).startswith(message)
    assert_nothing_stored(tmp_path / "new")


def test_an_answer_that_the_models_tokenizer_drops_is_refused(
    tmp_path: Path, ingest: Callable[..., Result], narrow_model: Path
) -> None:
    bad = write(tmp_path / "bad.csv", [("The sky is", "blue", "sky"), ("The sea is", "蓝色", "sky")])
    assert refusal(ingest(tmp_path / "new", model=narrow_model, dataset=bad)) == (
        "The answer '蓝色' to the prompt 'The sea is' adds no token to the prompt: use another answer."
    )
    assert_nothing_stored(tmp_path / "new")


def test_a_template_without_a_place_for_the_text_is_refused(tmp_path: Path, ingest: Callable[..., Result]) -> None:
    message = "The template 'no place' has no place for the text"
    assert refusal(ingest(tmp_path / "new", "--template", "no place")).startswith(message)
    assert_nothing_stored(tmp_path / "new")


@pytest.mark.parametrize("architecture", STRANGE)
def test_a_model_that_has_no_place_in_the_description_is_refused(
    tmp_path: Path, ingest: Callable[..., Result], tiny_model: Path, architecture: str
) -> None:
    settings, message = STRANGE[architecture]
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path / architecture
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes | settings)).save_pretrained(folder)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    assert refusal(ingest(tmp_path / "new", model=folder)).startswith(message)
    assert_nothing_stored(tmp_path / "new")


def test_an_ablation_says_its_own_versions_device_and_duration(
    ingest: Callable[..., Result], run_kdb: RunKdb, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(ingest(tmp_path / "w", "--dtype", "bfloat16"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} of tomorrow")
    neuron = "SELECT 0 AS layer, 'ffn' AS component, NULL AS head, 1 AS neuron"
    given = ["--model", tiny_model, "--dataset", "facts", "--variant", "bfloat16", "--query", neuron, "--controls", "1"]
    answer(run_kdb("ablate", *given, "--device", "cpu", "--warehouse", tmp_path / "w"))
    warehouse = Warehouse(tmp_path / "w")
    names = ("kdb_version", "torch_version", "transformers_version", "device", "seconds")
    [found] = rows(warehouse, f"SELECT {', '.join(names)} FROM runs WHERE source_run IS NOT NULL")
    assert found[:4] == ("kdb-lm of tomorrow", "torch of tomorrow", "transformers of tomorrow", "cpu")
    assert found[4] > 0
    assert rows(warehouse, "SELECT DISTINCT dtype, weights_dtype, quantization FROM models") == [
        ("bfloat16", "float32", None)
    ]
