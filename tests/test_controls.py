"""Sets that a query chooses: their controls, the prompts in which they are measured, and what is said about them.

The tiny model knows nothing, so its own best letters are the answers, and every prompt is kept.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from helpers.knowledge_rows import add_knowledge, prompt
from helpers.stored import Rows, create_lake
from helpers.tiny_models import LAYERS, loaded, prompts, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb.errors import QueryError
from kdb.ingest.attribution.controls import check_controls, controls, measured_sizes, n_distinct, unit_size
from kdb.ingest.attribution.effects import Category, Known
from kdb.ingest.attribution.sets import set_rows
from kdb.ingest.attribution.units import Shape, Unit, silenced
from kdb.ingest.forward.ablation import Chosen, Intervention, Silenced, intervene
from kdb.ingest.forward.decomposition import Decomposition, decompose
from kdb.warehouse.database import Database
from kdb.warehouse.halves import without_prompts
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.usefixtures("one_thread")

RunKdb = Callable[..., Result]
IDS = prompts([7, 9, 7, 4])
KNOWN = tuple(Known(i, tuple(ids), target=3 + i, category="c") for i, ids in enumerate(IDS))


@cache
def made(architecture: str) -> Decomposition:
    return decompose(loaded(tiny_model(architecture)))


# Effects ---------------------------------------------------------------------------------------------------------

SET = Silenced(ffn={0: [3, 7], 2: [1]}, attn={1: [0, 5]})


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox"])
def test_a_set_set_to_zero_from_a_cache_is_the_set_zeroed_in_a_whole_pass(architecture: str) -> None:
    category = Category(made(architecture), KNOWN)
    chosen = Chosen("mine", SET, 5)
    found = set_rows(category, {i: [chosen] for i in range(4)}, "zero")
    whole = intervene(
        made(architecture), [Intervention(p.number, p.token_ids, p.target, "last", chosen) for p in KNOWN]
    )
    for one, other in zip(found.to_pylist(), whole.to_pylist(), strict=True):
        assert {k: v for k, v in one.items() if "_after" not in k and "_before" not in k} == {
            k: v for k, v in other.items() if "_after" not in k and "_before" not in k
        }
        for name in ("logp_before", "logp_after", "prob_after"):
            assert one[name] == pytest.approx(other[name], abs=1e-4)
        assert abs(one["logp_after"] - one["logp_before"]) > 1e-4


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_a_sets_replacement_leaves_its_own_prompt_out(mode: str) -> None:
    category = Category(made("llama"), KNOWN)
    [row] = set_rows(category, {1: [Chosen("mine", Silenced(ffn={1: [4, 9]}), 2)]}, mode).to_pylist()
    values = category.values("last", "ffn_neuron")
    others = [0, 2, 3] if mode == "mean" else [2]
    new = torch.stack([values[i][1, 0, [4, 9]] for i in others]).mean(0)
    model = made("llama").loaded.model

    def put(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = args[0].clone()
        states[0, -1, [4, 9]] = new
        return (states, *args[1:])

    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(put)
    with torch.no_grad():
        expected = model(torch.tensor([IDS[1]])).logits[0, -1].double().log_softmax(0)
    hook.remove()
    assert row["logp_after"] == pytest.approx(expected[KNOWN[1].target].item(), abs=1e-5)
    assert row["rank_after"] == 1 + int((expected > expected[KNOWN[1].target]).sum())


def test_the_only_prompt_of_a_category_has_no_mean() -> None:
    category = Category(made("llama"), KNOWN[:1])
    assert len(set_rows(category, {0: [Chosen("mine", SET, 5)]}, "mean")) == 0
    assert len(set_rows(category, {0: [Chosen("mine", SET, 5)]}, "zero")) == 1


# Controls --------------------------------------------------------------------------------------------------------

SHAPE = Shape(n_layers=3, n_heads=9, head_dim=4, n_neurons=400)


def sizes_of(shape: Shape, seed: int = 0) -> dict[tuple[str, int], Any]:
    rng = np.random.default_rng(seed)
    places = [(kind, layer) for kind in ("head", "attn", "ffn") for layer in range(shape.n_layers)]
    return {place: rng.lognormal(size=shape.count(*place)) for place in places}


units_of = st.builds(
    lambda numbers: sorted({SHAPE.unit(kind, layer, n % SHAPE.count(kind, layer)) for kind, layer, n in numbers}),
    st.lists(
        st.tuples(st.sampled_from(["head", "attn", "ffn"]), st.integers(0, 2), st.integers(0, 10**6)),
        min_size=1,
        max_size=8,
    ),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(units_of, st.integers(0, 25), st.integers(0, 3))
def test_controls_are_distinct_sets_of_the_same_kinds_and_layers_and_none_of_the_set(
    units: list[Unit], n: int, seed: int
) -> None:
    drawn = controls(units, SHAPE, sizes_of(SHAPE), n, seed)
    assert len(drawn) == n_distinct(units, SHAPE, n) == len(set(map(tuple, drawn)))
    kinds = sorted((unit.kind, unit.layer) for unit in units)
    for one in drawn:
        assert sorted((unit.kind, unit.layer) for unit in one) == kinds
        assert not set(one) & set(units)
        assert len(set(one)) == len(units)
    assert drawn == controls(units, SHAPE, sizes_of(SHAPE), n, seed)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 399), min_size=1, max_size=20))
def test_controls_of_neurons_share_none_where_the_layer_has_enough(numbers: set[int]) -> None:
    units = [Unit(1, "ffn", -1, i) for i in sorted(numbers)]
    drawn = [unit for one in controls(units, SHAPE, sizes_of(SHAPE), 19, 0) for unit in one]
    assert len(set(drawn)) == 19 * len(units)


def test_the_controls_of_a_neuron_are_its_nearest_by_ratio() -> None:
    sizes = {("ffn", 0): np.arange(1.0, 101.0)}
    shape = Shape(1, 2, 4, 100)
    drawn = controls([Unit(0, "ffn", -1, 49)], shape, sizes, 4, 0)  # of size 50
    assert sorted(unit.neuron for [unit] in drawn) == [47, 48, 50, 51]


def test_where_fewer_sets_exist_each_is_a_control() -> None:
    shape = Shape(1, 4, 2, 8)
    drawn = controls([Unit(0, "attn", 1, -1)], shape, {("head", 0): np.ones(4)}, 19, 0)
    assert sorted(unit.head for [unit] in drawn) == [0, 2, 3]
    with pytest.raises(QueryError, match=r"Layer 0 has 1 other heads, too few for a control set of 3"):
        check_controls([Unit(0, "attn", h, -1) for h in range(3)], shape)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_size_is_the_length_of_what_a_unit_adds_to_the_residual(architecture: str) -> None:
    decomposition = made(architecture)
    category = Category(decomposition, KNOWN)
    n_heads, width = decomposition.n_heads, decomposition.attn_columns(0).shape[0]
    shape = Shape(LAYERS, n_heads, width // n_heads, decomposition.ffn_columns(0).shape[0])
    units = [Unit(1, "attn", 1, -1), Unit(1, "attn", 0, 2), Unit(1, "ffn", -1, 5)]
    sizes = measured_sizes(decomposition, [(category, [0, 2])], [(u.kind, u.layer) for u in units])
    for unit in units:
        component, whole = ("ffn_neuron", "ffn") if unit.component == "ffn" else ("head", "attn")
        entries = silenced([unit], shape)
        some = (entries.ffn or entries.attn)[1]
        columns = decomposition.ffn_columns(1) if unit.component == "ffn" else decomposition.attn_columns(1)
        lengths = []
        for i in (0, 2):
            m, written = category.values("last", component)[i][1, 0], category.values("last", whole)[i][1, 0]
            scale = written.norm() / (m @ columns).norm()
            lengths.append(float((m[some] @ columns[some]).norm() * scale))
        assert unit_size(unit, shape, sizes) == pytest.approx(np.mean(lengths), rel=1e-4)


# The rank p ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind", "k"),
    [
        (Shape(2, 4, 2, 300), "ffn", 5),
        (Shape(5, 9, 2, 8), "head", 5),
        (Shape(5, 4, 2, 8), "head", 5),
        (Shape(1, 9, 2, 8), "head", 3),
    ],
    ids=["neurons", "heads", "few heads", "heads of one layer"],
)
def test_the_rank_p_of_a_random_set_is_at_most_as_often_small_as_it_says(
    tmp_path: Path, shape: Shape, kind: str, k: int
) -> None:
    rng = np.random.default_rng(0)
    places = [(layer, i) for layer in range(shape.n_layers) for i in range(shape.count(kind, layer))]
    found = []
    for number in range(400):
        some = [places[i] for i in rng.choice(len(places), k, replace=False)]
        units = sorted(shape.unit(kind, *place) for place in some)
        if n_distinct(units, shape, 1):
            sizes = {(kind, layer): rng.lognormal(size=shape.count(kind, layer)) for layer in range(shape.n_layers)}
            sets = [units, *controls(units, shape, sizes, 19, number)]
            effect = {place: rng.normal() * sizes[kind, place[0]][place[1]] for place in places}
            mine, *others = [sum(effect[u.layer, shape.number(u)] for u in one) for one in sets]
            found.append((sum(t >= mine for t in others), len(others), n_independent(sets[1:])))
    p = rank_p(tmp_path, found)
    for level in (0.05, 0.1, 0.2, 0.5):
        error = math.sqrt(level * (1 - level) / len(p))
        assert np.mean(p <= level + 1e-9) <= level + 3 * error
    if kind == "ffn":  # no two controls share a neuron, and p is uniform
        assert np.mean(p <= 0.5 + 1e-9) == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(len(p)))


def test_neurons_beside_a_head_do_not_make_its_p_smaller(tmp_path: Path) -> None:
    rng, shape, found = np.random.default_rng(0), Shape(2, 9, 2, 300), []
    for number in range(400):
        head, neurons = Unit(0, "attn", int(rng.integers(9)), -1), rng.choice(300, 20, replace=False)
        units = sorted([head, *(Unit(1, "ffn", -1, int(n)) for n in neurons)])
        sizes = {("head", 0): rng.lognormal(size=9), ("ffn", 1): rng.lognormal(size=300)}
        sets = [units, *controls(units, shape, sizes, 19, number)]
        effect = 100 * rng.normal(size=9)  # the head makes the whole effect
        mine, *others = [sum(effect[u.head] for u in one if u.kind == "head") for one in sets]
        found.append((sum(t >= mine for t in others), len(others), n_independent(sets[1:])))
    p = rank_p(tmp_path, found)
    for level in (0.05, 0.06, 0.1, 0.2):
        assert np.mean(p <= level) <= level + 3 * math.sqrt(level * (1 - level) / len(p))


def n_independent(sets: Sequence[Sequence[Unit]]) -> float:
    """Kish's effective number of control sets, of the units of the layer and kind that are shared most."""
    uses = Counter(u for one in sets for u in one)
    places = {(u.kind, u.layer) for u in uses}
    groups = [np.array([n for u, n in uses.items() if (u.kind, u.layer) == place]) for place in places]
    return float(min(len(sets) * some.sum() / (some * some).sum() for some in groups))


def rank_p(folder: Path, found: Sequence[tuple[float, ...]]) -> np.ndarray:
    """The p-values of counts of stronger controls, of controls, and of independent ones, by the SQL macro."""
    asked = "SELECT rank_p(a, n, d) AS p FROM (SELECT unnest(?) AS a, unnest(?) AS n, unnest(?) AS d)"
    with Database(create_lake(folder)) as database:
        return database.sql(asked, [list(map(float, column)) for column in zip(*found, strict=True)])["p"].to_numpy()


def test_controls_that_share_units_count_as_fewer(tmp_path: Path) -> None:
    def row(method: str, logp: float, **more: Any) -> dict[str, Any]:
        answers = {"rank_before": 1, "rank_after": 1, "prob_before": 0.5, "prob_after": 0.5, "logp_before": -1.0}
        return (
            {"prompt_id": 0, "method": method, "k": 1, "positions": "last", "mode": "zero"}
            | answers
            | {
                "logp_after": logp,
                "held_out": True,
                **more,
            }
        )

    control = {"control_of": "mine", "control_ratio": 2.0}
    effects = [row("mine", -3.0), *(row(f"control-{i}", -2.0, **control) for i in (1, 2, 3, 4))]
    part = {"layer": 0, "component": "ffn", "rank": 1, "size": 1.0}
    other = {**part, "layer": 1}
    parts = [{"method": "mine", "neuron": 9, **part}, {"method": "mine", "neuron": 9, **other}]
    parts += [{"method": f"control-{i}", "neuron": i % 2, **part} for i in (1, 2, 3, 4)]
    parts += [{"method": f"control-{i}", "neuron": i, **other} for i in (1, 2, 3, 4)]
    tables: dict[str, Rows] = {"prompts": [prompt(0, "language")], "ablations": effects, "ablated_parts": parts}
    lake = create_lake(tmp_path)
    add_knowledge(lake, "alpha", "facts", "a" * 16, tables, variant="ablate=mine")
    with Database(lake) as database:
        [_none, mine] = database.query("attribution-methods", variant="ablate=mine").to_dicts()
    assert (mine["method"], mine["n_controls"], mine["control_ratio"], mine["held_out"]) == ("mine", 4, 2.0, True)
    assert mine["logp_controls"] == -2
    assert mine["n_independent"] == 2  # in layer 0 two neurons, each twice; in layer 1 four, each once
    assert mine["p"] == pytest.approx(1 / 3)


# The command -----------------------------------------------------------------------------------------------------

TOWNS = ("Rome", "Bern", "Kyiv", "Oslo", "Lima")
NEURON = "SELECT 0 AS layer, 'ffn' AS component, NULL AS head, 1 AS neuron"


@pytest.fixture(scope="module")
def ingested(
    tmp_path_factory: pytest.TempPathFactory, run_kdb: RunKdb, tiny_model: Path, best: Callable[[str], str]
) -> Path:
    """A warehouse with one knowledge run, which keeps five prompts of one category and four of another."""
    texts = [*(("sky", f"The sky of {t} is") for t in TOWNS), *(("sea", f"The sea of {t} is") for t in TOWNS[:4])]
    lines = ["prompt,answer,category", *(f"{text},{best(text)}x,{kind}" for kind, text in texts)]
    # Another answer in each category, which the prompts' own ones beat.
    lines += [f"The {kind} is,{min(set('qk') - {best(f'The {kind} is')})}x,{kind}" for kind in ("sky", "sea")]
    folder = tmp_path_factory.mktemp("controls")
    (folder / "facts.csv").write_text("\n".join(lines) + "\n")
    given = ("--model", tiny_model, "--dataset", folder / "facts.csv", "--ablate-k", "0", "--no-effects")
    answered(run_kdb("ingest", *given, "--warehouse", folder / "w"))
    return folder / "w"


def answered(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def ablate(run_kdb: RunKdb, tiny_model: Path, ingested: Path) -> Callable[..., Result]:
    def ablate(*options: str, query: str = NEURON, variant: str = "ablate-k=0 no-effects") -> Result:
        given = ("--model", tiny_model, "--dataset", "facts", "--variant", variant, "--device", "cpu")
        return run_kdb("ablate", *given, "--query", query, *options, "--warehouse", ingested)

    return ablate


def kept(folder: Path) -> dict[str, set[int]]:
    rows = Warehouse(folder).sql("SELECT category, list(prompt_id) FROM prompts WHERE kept GROUP BY ALL").rows()
    return {category: set(ids) for category, ids in rows}


def test_a_set_is_measured_in_the_prompts_that_its_query_did_not_see(
    ablate: Callable[..., Result], ingested: Path
) -> None:
    answered(ablate("--label", "half", "--controls", "3"))
    opened = Warehouse(ingested)
    found = opened.sql(
        "SELECT DISTINCT prompt_id, held_out FROM ablations JOIN runs USING (run) WHERE variant LIKE '%ablate=half'"
    ).rows()
    stored = opened.sql("SELECT settings FROM runs WHERE variant LIKE '%ablate=half'").item()
    measured = {prompt_id for prompt_id, _held in found}
    assert {held for _prompt, held in found} == {True}
    assert sorted(measured) == json.loads(stored)["measured"]
    for some in kept(ingested).values():
        assert len(some & measured) == len(some) - len(some) // 2


def test_the_query_sees_no_row_and_no_sum_of_a_prompt_that_is_measured(ingested: Path) -> None:
    opened = Warehouse(ingested)
    [folder] = [
        f for f in opened.storage.run_folders() if opened.sql("SELECT run FROM prompts LIMIT 1").item() == f.run
    ]
    hidden = {min(kept(ingested)["sky"]), max(kept(ingested)["sea"])}
    with without_prompts(opened.storage, opened.storage.find(folder.run), hidden) as half:
        for table in ("prompts", "head_scores", "neuron_scores", "query_neuron_scores", "lens_readouts"):
            shown = {row[0] for row in half.sql(f"SELECT DISTINCT prompt_id FROM {table}").rows()}
            assert shown == {row[0] for row in opened.sql(f"SELECT DISTINCT prompt_id FROM {table}").rows()} - hidden
        sums = "SELECT category, component, layer, head, neuron, {} FROM {} GROUP BY ALL ORDER BY ALL"
        built = half.sql(sums.format("sum(total), sum(n_prompts)", "neuron_sums")).rows()
        scores = "neuron_scores JOIN prompts USING (run, prompt_id)"
        expected = opened.sql(
            "SELECT category, component, layer, head, neuron, sum(score), count(DISTINCT prompt_id) "
            f"FROM {scores} WHERE prompt_id NOT IN (SELECT unnest(?)) GROUP BY ALL ORDER BY ALL",
            [sorted(hidden)],
        ).rows()
        assert len(built) == len(expected)
        for one, other in zip(built, expected, strict=True):
            assert one[:5] == other[:5]
            assert one[5:] == pytest.approx(other[5:])
        path = half.storage.local.path
    assert not path.exists()


def test_a_set_measured_in_all_prompts_has_another_name(ablate: Callable[..., Result], ingested: Path) -> None:
    answered(ablate("--label", "named", "--controls", "0", "--no-held-out", "--mode", "mean"))
    found = Warehouse(ingested).sql(
        "SELECT variant, held_out, mode, count(DISTINCT prompt_id) FROM ablations JOIN runs USING (run) "
        "WHERE variant LIKE '%named%' GROUP BY ALL"
    )
    n = sum(map(len, kept(ingested).values()))
    assert found.rows() == [("ablate-k=0 no-effects ablate=named mode=mean no-held-out", False, "mean", n)]


def test_fewer_and_distant_controls_are_told(ablate: Callable[..., Result], ingested: Path) -> None:
    head = "SELECT 0 AS layer, 'attn' AS component, 0 AS head, NULL AS neuron"
    result = ablate("--label", "head", "--no-held-out", query=head)
    answered(result)
    assert "Note: Only 1 of 19 controls: no more distinct sets exist." in result.stderr
    ratio = Warehouse(ingested).sql("SELECT any_value(control_ratio) FROM ablations WHERE control_of = 'head'").item()
    assert ("times as large as its control" in result.stderr) == (not 1 / 1.5 <= ratio <= 1.5)


LAYER = "SELECT 0 AS layer, 'ffn' AS component, NULL AS head, unnest(range(32))::INTEGER AS neuron"
BAD = {
    "a head that does not exist": (
        ("--query", "SELECT 0 AS layer, 'attn' AS component, 99 AS head, NULL AS neuron"),
        "Row 1 of the query names head 99",
    ),
    "a neuron that does not exist": (
        ("--query", "SELECT 0 AS layer, 'ffn' AS component, NULL AS head, 99999 AS neuron"),
        "Row 1 of the query names FFN neuron 99999",
    ),
    "a negative neuron": (
        ("--query", "SELECT 0 AS layer, 'attn' AS component, 0 AS head, -1 AS neuron"),
        "Row 1 of the query names neuron -1 (use NULL for a whole head or expert)",
    ),
    "a truth value": (
        ("--query", "SELECT true AS layer, 'attn' AS component, 0 AS head, NULL AS neuron"),
        "Row 1 of the query names no layer (a whole number is needed)",
    ),
    "no row": (("--query", f"{NEURON} WHERE false"), "The query returned no rows"),
    "rows only in hidden runs": (
        (
            "--query",
            "SELECT 0 AS layer, 'ffn' AS component, NULL AS head, 1 AS neuron FROM runs WHERE variant LIKE '%x=%'",
        ),
        "The query returned no rows",
    ),
    "a whole layer": (("--query", LAYER), "Layer 0 has 0 other FFN neurons, too few for a control set of 32"),
    "a mean at all positions": (
        ("--mode", "mean", "--positions", "all"),
        "--positions all needs --mode zero: prompts of different lengths have no mean.",
    ),
    "the name of a method": (("--label", "norm"), "--label 'norm' is the name of another row."),
    "no label": (("--label", ""), "--label '' is not a name: use letters, digits"),
    "a label with a space": (("--label", "x mode=mean"), "--label 'x mode=mean' is not a name: use letters, digits"),
    "the name of a control": (("--label", "control-1"), "--label 'control-1' is the name of another row."),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_ablated_is_refused_with_one_message(
    ablate: Callable[..., Result], ingested: Path, what: str
) -> None:
    options, message = BAD[what]
    before = Warehouse(ingested).runs()
    query = dict(zip(options[::2], options[1::2], strict=True)).get("--query", NEURON)
    result = ablate(*(o for o in options if o not in ("--query", query)), query=query)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert Warehouse(ingested).runs() == before


def test_prompts_that_cannot_be_halved_are_refused(
    tmp_path: Path, run_kdb: RunKdb, tiny_model: Path, ingested: Path
) -> None:
    lines = (ingested.parent / "facts.csv").read_text().splitlines()
    alone = [lines[0], lines[1], lines[6], *lines[-2:]]
    (tmp_path / "two.csv").write_text("\n".join(alone) + "\n")
    given = ("--model", tiny_model, "--ablate-k", "0", "--no-effects", "--warehouse", tmp_path / "w")
    answered(run_kdb("ingest", *given, "--dataset", tmp_path / "two.csv"))
    assert [len(some) for some in kept(tmp_path / "w").values()] == [1, 1]
    asked = ("--model", tiny_model, "--dataset", "two", "--variant", "ablate-k=0 no-effects", "--query", NEURON)
    result = run_kdb("ablate", *asked, "--warehouse", tmp_path / "w")
    assert result.exit_code == 2
    assert "has no category with two kept prompts" in result.stderr
    result = run_kdb("ablate", *asked, "--no-held-out", "--mode", "mean", "--warehouse", tmp_path / "w")
    assert result.exit_code == 2
    assert "Each category has one kept prompt, and a mean needs another. Use --mode zero." in result.stderr
