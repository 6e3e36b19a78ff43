"""The figures: the data behind each, on warehouses made by hand and on a large synthetic one, and what files become."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import pytest
from click.testing import Result
from helpers.curves import curve_rows, prediction_rows, warehouse_of
from helpers.stored import assert_same_in_the_shell, needs_shell
from helpers.synthetic import NINE_CONCEPTS, NINE_MODELS, Concept, Model, build, write_manifests
from polars.testing import assert_frame_equal
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from test_queries import BEYOND_PROBES

import kdb
from kdb.analysis import figures
from kdb.analysis.captions import CAVEAT
from kdb.analysis.effects import agreement
from kdb.analysis.figures import FIGURES
from kdb.analysis.importance import _with_gaps
from kdb.analysis.lens import _best
from kdb.analysis.save import save
from kdb.analysis.style import ATTN, FFN, Look, look_of, upright
from kdb.analysis.themes import resized
from kdb.analysis.transfer import pair_map
from kdb.analysis.uncertainty import mean_intervals
from kdb.errors import QueryError, UnknownNameError
from kdb.ingest.concept.metrics import wilson_interval
from kdb.queries.catalogue import find_query
from kdb.warehouse.database import Database
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

TINY = (
    Model("tiny-a", "tiny", 10**8, 4, 2),
    Model("tiny-b", "tiny", 3 * 10**8, 6, 3),
    Model("other", "oth", 10**8, 4, 2),
)
OF_ONE_PROMPT = {"prompt-story", "lens-map"}
CONCEPTS = (Concept("cities", 40, 0.9), Concept("own", 40, 0.8))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    return build(tmp_path_factory.mktemp("small") / "w", TINY, CONCEPTS, prompts_per_category=7, top_k=10)


@pytest.fixture(scope="module")
def two_facts(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """Two datasets of facts with the same categories, and different numbers of prompts."""
    folder = tmp_path_factory.mktemp("two") / "w"
    return build(folder, TINY[:1], [], prompts_per_category=7, top_k=10, more_facts={"relations": 12})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """9 models × 9 datasets × up to 40 layers, with small test sets and few facts."""
    concepts = [Concept(concept.name, 60, concept.best) for concept in NINE_CONCEPTS]
    return build(tmp_path_factory.mktemp("large") / "w", NINE_MODELS, concepts, prompts_per_category=2, top_k=10)


def given_for(name: str) -> dict[str, Any]:
    """Return the parameters that a figure requires."""
    needs = {
        "hidden-states": {"model": "tiny-a", "dataset": "cities"},
        "prompt-story": {"model": "tiny-a", "prompt": 0},
        "lens-map": {"model": "tiny-a", "prompt": 0},
    }
    sizes = {"depth-by-family": {"size": 0.2, "within": 3}}
    return needs.get(name, {}) | sizes.get(name, {})


def spec(chart: Any) -> dict[str, Any]:
    """The chart as Vega-Lite, checked against its schema by Altair."""
    found: dict[str, Any] = chart.to_dict(validate=True)
    return found


# Every figure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_from_rows_and_has_a_title(small: Warehouse, name: str) -> None:
    numbers = figures.frame(small, name, **given_for(name))
    assert len(numbers) > 0
    drawn = spec(figures.chart(small, name, **given_for(name)))
    assert drawn["title"]["text"] == FIGURES[name].title
    assert find_query(FIGURES[name].query)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_asks_a_question_and_names_what_it_is_of(small: Warehouse, name: str) -> None:
    numbers = figures.frame(small, name, **given_for(name))
    title = spec(figures.chart(small, name, **given_for(name)))["title"]
    told = " ".join(title["subtitle"])
    assert title["text"].endswith("?")
    assert all(model in told for model in set(numbers["model"]))
    assert all(dataset in told for dataset in set(numbers["dataset"]))
    assert "variant: default" in told
    assert re.search(r"n = \d+( to \d+)? (test )?prompts|prompt 0: “", told)


def test_a_figure_of_one_run_names_its_variant(small: Warehouse) -> None:
    run = small.sql("SELECT run FROM runs WHERE study = 'knowledge' AND model = 'tiny-a'")["run"][0]
    told = spec(figures.chart(small, "top-heads", run=run))["title"]["subtitle"]
    assert told[0] == "model: tiny-a"
    assert told[1] == "dataset: knowledge; n = 5 to 7 prompts; variant: default"


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_that_shows_j_or_c_says_what_they_are_worth(small: Warehouse, name: str) -> None:
    columns = set(figures.frame(small, name, **given_for(name)).columns)
    shown = {"jump", "converging", "jump_percent", "converging_percent", "moved_percent"} & columns
    assert bool(shown) == ("".join(CAVEAT.split()) in "".join(FIGURES[name].marks.split()))


def test_curves_stand_beside_the_best_baseline_of_their_split(small: Warehouse) -> None:
    frame = figures.frame(small, "depth-curves", model="tiny-a", dataset="cities")
    best = small.query("baselines", model="tiny-a", dataset="cities")["accuracy"][0]
    assert frame["baseline_accuracy"].unique().to_list() == [best]
    assert frame["split"].unique().to_list() == ["grouped"]
    drawn = json.dumps(spec(figures.chart(small, "depth-curves", model="tiny-a", dataset="cities")))
    assert '"field": "baseline_accuracy"' in drawn


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "auc"])
def test_metrics_have_their_intervals(small: Warehouse, metric: str) -> None:
    frame = figures.frame(small, "depth-curves", metric=metric)
    low, high = frame[f"{metric}_low"], frame[f"{metric}_high"]
    assert (low <= frame[metric]).all()
    assert (frame[metric] <= high).all()
    assert f'"field": "{metric}_low"' in json.dumps(spec(figures.chart(small, "depth-curves", metric=metric)))


def test_the_axis_of_curves_begins_just_below_what_is_drawn(small: Warehouse) -> None:
    frame = figures.frame(small, "depth-curves")
    domains = re.findall(r'"domain": \[(0\.\d+), (\d\.\d+)\]', json.dumps(spec(figures.chart(small, "depth-curves"))))
    low, high = map(float, domains[0])
    least = min(frame[name].min() for name in ("accuracy_low", "baseline_accuracy", "zero_shot"))  # type: ignore[type-var]
    assert 0 <= least - low < 0.05  # type: ignore[operator]
    assert high <= 1.05


@pytest.mark.parametrize("name", sorted(set(FIGURES) - {"hidden-states", *OF_ONE_PROMPT}))
def test_every_figure_holds_nine_models_and_nine_datasets(large: Warehouse, name: str) -> None:
    numbers = figures.frame(large, name)
    if "dataset" in numbers.columns and name != "depth-by-family":
        of_facts = find_query(FIGURES[name].query).group == "knowledge"
        assert numbers["dataset"].n_unique() == (1 if of_facts else 9)
    assert numbers["model"].n_unique() == (9 if name != "depth-by-family" else 3)
    spec(figures.chart(large, name))


@pytest.mark.parametrize("name", sorted(set(FIGURES) - OF_ONE_PROMPT))
def test_a_figure_without_rows_says_so(tmp_path: Path, name: str) -> None:
    empty = Warehouse.create(tmp_path / "w")
    with pytest.raises(QueryError, match="no data to draw"):
        figures.chart(empty, name)


def test_an_unknown_figure_and_metric_are_named() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'depth-curves'"):
        figures.find_figure("depth-curve")


def test_a_metric_that_is_none_lists_those_that_are(small: Warehouse) -> None:
    with pytest.raises(QueryError, match="Use one of accuracy, balanced_accuracy, f1, auc, selectivity"):
        figures.chart(small, "depth-curves", metric="precision")


# Numbers that are known ------------------------------------------------------------------------------------------


def test_depth_curves_mark_j_and_c_and_nothing_where_there_is_no_jump(tmp_path: Path) -> None:
    jumping = curve_rows([0.5, 0.5, 0.9, 0.9, 0.5])
    wh = warehouse_of(tmp_path / "a", jumping, prediction_rows([[1]] * 5), 5)
    frame = figures.frame(wh, "depth-curves")
    assert frame.filter("jump")["layer"].to_list() == [2]
    assert frame.filter("converging")["layer"].to_list() == [3], "of several candidates C is the last"
    flat = warehouse_of(tmp_path / "b", curve_rows([0.5] * 5), prediction_rows([[1]] * 5), 5)
    assert figures.frame(flat, "depth-curves").filter("jump").is_empty()
    spec(figures.chart(flat, "depth-curves"))


def test_one_model_is_shown_by_layer_and_models_of_several_depths_in_percent(small: Warehouse) -> None:
    one = json.dumps(spec(figures.chart(small, "depth-curves", model="tiny-a")))
    assert '"title": "layer"' in one
    assert '"title": "depth (%)"' not in one
    assert '"title": "depth (%)"' in json.dumps(spec(figures.chart(small, "depth-curves")))


def test_rankings_agree_with_their_saved_query_and_enclose_its_means(small: Warehouse) -> None:
    for name in ("top-layers", "top-heads"):
        frame = figures.frame(small, name, k=3)
        columns = small.query(name, k=3).columns
        assert frame.select(columns).equals(small.query(name, k=3))
        assert frame.select((pl.col("low") <= pl.col("score") + 1e-6).all()).item()
        assert frame.select((pl.col("score") <= pl.col("high") + 1e-6).all()).item()
        assert frame.select(pl.col("rank").is_between("rank_low", "rank_high").mean()).item() > 0.5


def test_method_intervals_enclose_the_means_of_table_2(small: Warehouse) -> None:
    frame = figures.frame(small, "attribution-methods")
    means = small.query("attribution-methods")
    for effect in ("mrr", "prob_percent", "logp"):
        shown = frame.filter(effect=effect)
        assert shown["value"].to_list() == means[effect].to_list()
        assert shown.select((pl.col("low") - 1e-6 <= pl.col("value")).all()).item()
        assert shown.select((pl.col("value") <= pl.col("high") + 1e-6).all()).item()
        assert shown.filter(pl.col("method") == "none")["rank_high"].max() == 9


def test_shares_of_neurons_add_up_to_100_percent_in_every_panel(small: Warehouse) -> None:
    frame = figures.frame(small, "neurons-by-layer")
    totals = frame.group_by("model", "category", "kind").agg(pl.col("share_percent").sum())["share_percent"]
    assert totals.to_list() == pytest.approx([100.0] * len(totals))


# Several datasets ------------------------------------------------------------------------------------------------

OF_FACTS = [
    name
    for name, figure in FIGURES.items()
    if find_query(figure.query).group == "knowledge" and name not in OF_ONE_PROMPT
]


@pytest.mark.parametrize("name", OF_FACTS)
def test_a_figure_of_two_datasets_shows_each_as_it_is_alone(two_facts: Warehouse, name: str) -> None:
    both = figures.frame(two_facts, name)
    for dataset in ("knowledge", "relations"):
        alone = figures.frame(two_facts, name, dataset=dataset)
        assert not alone.is_empty()
        assert both.filter(dataset=dataset).sort(both.columns).equals(alone.sort(both.columns))


@pytest.mark.parametrize("name", OF_FACTS)
def test_a_figure_of_pooled_datasets_names_them_and_counts_all_their_prompts(two_facts: Warehouse, name: str) -> None:
    apart, pooled = figures.frame(two_facts, name), figures.frame(two_facts, name, pool=True)
    assert set(pooled["dataset"]) == {"knowledge + relations"}
    counted = "n_prompts" if "n_prompts" in pooled.columns else "n_prompts_a"
    most = apart.group_by("dataset").agg(pl.col(counted).max())[counted]
    assert pooled[counted].max() == most.sum()
    assert len(pooled) < len(apart)
    drawn = spec(figures.chart(two_facts, name, pool=True))
    assert any(line.startswith("dataset: knowledge + relations; n = ") for line in drawn["title"]["subtitle"])


def test_pooled_intervals_are_those_of_all_prompts(two_facts: Warehouse) -> None:
    scores = two_facts.query("layer-scores", category="capital").filter(layer_name="f3")["score"].to_numpy()
    low, high = mean_intervals(scores[:, None])
    row = figures.frame(two_facts, "top-layers", category="capital", pool=True).filter(layer_name="f3")
    assert row["n_prompts"].item() == len(scores)
    assert row.select("low", "high").row(0) == pytest.approx((low[0], high[0]), rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("layer-scores", "top-layers", "top-heads", "head-map", "neurons-by-layer"),
        *("effect-map", "layer-effect-map", "score-vs-effect", "answer-by-layer"),
    ],
)
def test_every_panel_is_named_after_its_dataset_category_and_number_of_prompts(two_facts: Warehouse, name: str) -> None:
    frame = figures.frame(two_facts, name)
    drawn = spec(figures.chart(two_facts, name))
    named = {
        f"{dataset}\n{category} (n = {n})"
        for dataset, category, n in frame.select("dataset", "category", "n_prompts").rows()
    }
    panels = drawn["facet"]["sort"]
    assert set(panels) == named
    assert [panel.split("\n")[0] for panel in panels] == ["knowledge"] * 6 + ["relations"] * 6
    assert "datasets: knowledge, relations; n = " in "".join(drawn["title"]["subtitle"])


def test_methods_and_overlaps_have_a_panel_for_each_dataset(two_facts: Warehouse) -> None:
    rows = spec(figures.chart(two_facts, "attribution-methods"))["facet"]["row"]["sort"]
    assert rows == ["knowledge, zero", "relations, zero"]
    for name in ("head-overlap", "neuron-overlap", "attention-vs-ffn"):
        assert spec(figures.chart(two_facts, name))["facet"]["sort"] == ["tiny-a\nknowledge", "tiny-a\nrelations"]


def test_overlaps_say_how_much_is_shared_by_chance(two_facts: Warehouse) -> None:
    drawn = spec(figures.chart(two_facts, "head-overlap", k=2))
    expected = 2 * 2 / (4 * 2)
    begins = f"by chance: shared {expected}, Jaccard index 0."
    assert any(line.startswith(begins) for line in drawn["title"]["subtitle"])
    assert "jaccard_by_chance" in json.dumps(drawn["spec"])


# Effects and readouts --------------------------------------------------------------------------------------------


def test_the_effect_map_holds_every_head_with_the_interval_of_its_effect(two_facts: Warehouse) -> None:
    frame = figures.frame(two_facts, "effect-map", category="capital")
    query = two_facts.query("head-effects", category="capital", effect_method="atp", k=1_000_000)
    assert frame.select(query.columns).equals(query)
    assert len(frame) == 2 * 4 * 2, "every head, in each dataset"
    assert frame.select(((pl.col("low") <= pl.col("effect")) & (pl.col("effect") <= pl.col("high"))).all()).item()
    values = two_facts.scan("effects").filter(dataset="relations", component="head", method="atp", layer=3, head=1)
    prompts = two_facts.scan("prompts").filter(dataset="relations", category="capital").select("prompt_id").collect()
    lost = values.collect().join(prompts, on="prompt_id", how="semi")["logit_diff"].to_numpy()
    low, high = mean_intervals(lost[:, None])
    row = frame.filter(dataset="relations", head_name="a3.1")
    assert row.select("effect", "low", "high").row(0) == pytest.approx((lost.mean(), low[0], high[0]), rel=1e-4)
    drawn = spec(figures.chart(two_facts, "effect-map", effect_method="exact"))
    assert "effect: exact; replacement: mean; role: last; noising" in drawn["title"]["subtitle"]
    assert set(figures.frame(two_facts, "effect-map", effect_method="exact")["layer"]) == {3}


def test_the_layer_effect_map_has_a_row_for_each_component_and_role_that_was_measured(two_facts: Warehouse) -> None:
    frame = figures.frame(two_facts, "layer-effect-map", category="capital")
    query = two_facts.query("layer-effects", category="capital", k=1_000_000)
    assert frame.filter(role="last").select(query.columns).equals(query)
    assert set(frame["role"]) == {"last"}
    tiny = 1e-9  # of rounding
    assert frame.select(
        ((pl.col("low") <= pl.col("effect") + tiny) & (pl.col("effect") <= pl.col("high") + tiny)).all()
    ).item()
    drawn = json.dumps(spec(figures.chart(two_facts, "layer-effect-map", category="capital")))
    assert '"attn, last"' in drawn and '"ffn, last"' in drawn and 'subject"' not in drawn


def test_heads_that_were_measured_in_different_prompts_have_intervals_over_their_own(tmp_path: Path) -> None:
    wh = build(tmp_path / "w", TINY[:1], [], prompts_per_category=12, top_k=10)
    whole = figures.frame(wh, "effect-map", category="language")
    path = next(tmp_path.glob("w/lake/model=tiny-a/*/*/effects/part*.parquet"))
    rows = pl.read_parquet(path, hive_partitioning=False)
    rows.filter(pl.col("head").ne_missing(1) | (pl.col("prompt_id") < 40)).write_parquet(path)
    write_manifests(tmp_path / "w")
    fewer = figures.frame(Warehouse(tmp_path / "w"), "effect-map", category="language")
    assert set(fewer.filter(head=1)["n_prompts"]) == {7}, "of prompts 0, 6, 12, 18, 24, 30, 36"
    columns = ["head_name", "effect", "low", "high"]
    for head, same in ((0, True), (1, False)):
        shown = [frame.filter(head=head).select(columns).sort("head_name") for frame in (fewer, whole)]
        assert shown[0].equals(shown[1]) is same
    within = (pl.col("low") <= pl.col("effect")) & (pl.col("effect") <= pl.col("high"))
    assert fewer.select(within.all()).item()


@pytest.mark.parametrize("part", ["head", "attn", "ffn"])
def test_the_rank_correlation_is_that_of_the_query_and_of_scipy(two_facts: Warehouse, part: str) -> None:
    frame = figures.frame(two_facts, "score-vs-effect", part=part)
    query = two_facts.query("score-vs-effect").filter(component=part)
    for model, dataset, category, spearman, n_parts in query.select(
        "model", "dataset", "category", "spearman", "n_parts"
    ).rows():
        points = frame.filter(model=model, dataset=dataset, category=category)
        assert len(points) == n_parts == points["n_parts"][0]
        assert points["spearman"][0] == pytest.approx(spearman)
        assert points["spearman"][0] == pytest.approx(spearmanr(points["score"], points["loss"]).statistic)
        assert points["spearman_low"][0] <= points["spearman"][0] <= points["spearman_high"][0]
    beside = agreement(two_facts).filter(component=part)
    assert_frame_equal(beside.select(query.columns), query)
    assert beside["low"].null_count() == 0


def test_few_prompts_have_a_rank_correlation_without_an_interval(large: Warehouse) -> None:
    frame = figures.frame(large, "score-vs-effect", model="gemma-2b")
    assert frame["spearman"].null_count() == 0
    assert frame["spearman_low"].null_count() == len(frame)
    drawn = json.dumps(spec(figures.chart(large, "score-vs-effect", model="gemma-2b")))
    assert re.search(r"Spearman -?\d", drawn)
    assert "[" not in "".join(re.findall(r"Spearman [^\"]*", drawn))


def test_a_part_without_scores_or_effects_is_refused(small: Warehouse) -> None:
    with pytest.raises(QueryError, match="parameter part: expected one of head, attn, ffn, found 'resid'"):
        figures.chart(small, "score-vs-effect", part="resid")


def test_shares_of_answers_that_are_first_reach_those_of_the_query(two_facts: Warehouse) -> None:
    frame = figures.frame(two_facts, "answer-by-layer", dataset="relations")
    assert set(frame.filter(layer=3)["first_percent"]) == {100.0}, "the last readout is the model's own output"
    for category, median in (
        two_facts.query("answer-by-layer", dataset="relations").select("category", "median_layer").rows()
    ):
        shares = dict(frame.filter(category=category).select("layer", "first_percent").rows())
        assert shares[median] >= 50 > shares[median - 1] - 1e-9 or shares[median - 1] == 50
    told = frame.drop_nulls("low")
    within = (pl.col("low") <= pl.col("first_percent")) & (pl.col("first_percent") <= pl.col("high"))
    assert told.select(within.all()).item()


def test_the_lens_map_has_a_cell_for_each_place_with_the_best_token(small: Warehouse) -> None:
    drawn = spec(figures.chart(small, "lens-map", model="tiny-a", prompt=0))
    (cells,) = (rows for rows in drawn["datasets"].values() if len(rows) == 9)
    assert [cell["place"] for cell in cells[:4]] == ["0 in", "0 mid", "0 out", "1 mid"]
    assert (cells[0]["best"], cells[-1]["best"]) == (",", "␣right")
    assert cells[-1]["prob"] == pytest.approx(0.9048, abs=1e-4)
    [told] = [line for line in drawn["title"]["subtitle"] if line.endswith("→ “ right”")]
    assert told.startswith("prompt 0: “") and "model: tiny-a" in drawn["title"]["subtitle"]
    with pytest.raises(QueryError, match="--model other --dataset knowledge"):
        figures.chart(small, "lens-map", prompt=0)


@pytest.mark.parametrize(
    ("token", "shown"), [('" \\""', '␣"'), ('"\\n"', "\\n"), ('" internationalisation"', "␣internationa…")]
)
def test_tokens_are_short_and_their_spaces_are_seen(token: str, shown: str) -> None:
    assert _best(f'{token}, ","') == shown


@pytest.mark.parametrize("name", ["effect-map", "score-vs-effect", "answer-by-layer", "lens-map"])
def test_a_warehouse_without_effects_says_what_measures_them(name: str) -> None:
    with kdb.open_demo() as older:
        given = {"prompt": 0} if name == "lens-map" else {}
        if not older.scan("effects", everything=True).collect().is_empty():
            pytest.skip("the demo has effects")
        with pytest.raises(QueryError, match=r"there is no data to draw.*stored by `kdb ingest`"):
            figures.chart(older, name, **given)


# Answers and transfers -------------------------------------------------------------------------------------------


def test_the_zero_shot_accuracy_stands_beside_every_layer(small: Warehouse) -> None:
    frame = figures.frame(small, "depth-curves", model="tiny-a", dataset="cities")
    answers = small.query("zero-shot", model="tiny-a", dataset="cities")
    assert frame["zero_shot"].unique().to_list() == answers["accuracy"].to_list()


def test_transfer_shows_each_pair_at_the_best_layer_of_its_probe_and_the_test_part_on_the_diagonal(
    small: Warehouse,
) -> None:
    frame = figures.frame(small, "probe-transfer", model="tiny-b")
    best = dict(small.query("concept-depth", model="tiny-b", site="resid_post").select("dataset", "best_layer").rows())
    assert dict(frame.select("source_dataset", "layer").rows()) == best
    assert len(frame) == 4
    n = {(source, target): n for source, target, n in frame.select("source_dataset", "dataset", "n").rows()}
    assert n == {(source, target): 16 if source == target else 40 for source in best for target in best}
    assert set(figures.frame(small, "probe-transfer", model="tiny-b", layer=0)["layer"]) == {0}


def test_transfer_has_a_cell_for_each_pair_that_was_measured_and_frames_the_diagonal(small: Warehouse) -> None:
    frame = figures.frame(small, "probe-transfer", model="tiny-a").filter(
        (pl.col("source_dataset") == "cities") | (pl.col("dataset") == "own")
    )
    drawn = spec(pair_map(frame, look_of(small)))
    (cells,) = drawn["datasets"].values()
    assert {(c["source_dataset"], c["dataset"]): c["own"] for c in cells} == {
        ("cities", "cities"): True,
        ("cities", "own"): False,
        ("own", "own"): True,
    }
    assert {c["count"] for c in cells} == {"n = 16", "n = 40"}
    (framed,) = [layer for layer in drawn["concat"][0]["layer"] if "transform" in layer]
    assert framed["transform"] == [{"filter": "datum.own"}]
    assert framed["mark"]["filled"] is False


def test_figures_of_one_model_ask_which_one(small: Warehouse) -> None:
    with pytest.raises(QueryError, match="--model tiny-a --dataset cities"):
        figures.chart(small, "hidden-states")
    with pytest.raises(QueryError, match="--model other --dataset knowledge"):
        figures.chart(small, "prompt-story", prompt=0)


@needs_shell
@pytest.mark.parametrize("name", sorted(BEYOND_PROBES))
def test_saved_query_answers_the_same_in_the_shell(small: Warehouse, name: str) -> None:
    with Database(small.storage.local.lake) as database:
        assert_same_in_the_shell(small.storage.local.lake, database, name)


def test_zero_shot_rates_and_interval_are_those_of_the_answers(small: Warehouse) -> None:
    labels = small.scan("prompts").select("model", "dataset", "prompt_id", "label").collect()
    answers = small.scan("zero_shot").collect().join(labels, on=["model", "dataset", "prompt_id"])
    row = small.query("zero-shot", model="tiny-a", dataset="cities").row(0, named=True)
    mine = answers.filter(model="tiny-a", dataset="cities")
    assert row["accuracy"] == mine["correct"].mean()
    assert row["true_positive_rate"] == mine.filter(label=1)["predicted"].mean()
    assert row["true_negative_rate"] == 1 - mine.filter(label=0)["predicted"].mean()  # type: ignore[operator]
    low, high = wilson_interval(mine["correct"].mean(), len(mine))
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((low, high))
    assert row["auc"] == pytest.approx(roc_auc_score(mine["label"], mine["prob_positive"] - mine["prob_negative"]))


def test_jupyter_and_marimo_can_show_a_chart(small: Warehouse) -> None:
    shown = figures.chart(small, "top-heads")._repr_mimebundle_(None, None)
    assert any("vegalite" in kind or kind == "text/html" for kind in (shown[0] if isinstance(shown, tuple) else shown))


# Looks -----------------------------------------------------------------------------------------------------------


def color_of(look: Look, field: str, shown: list[str], name: str) -> str:
    scale = look.lines(field, shown)["color"].to_dict()["scale"]
    return str(scale["range"][scale["domain"].index(name)])


def test_a_color_stays_with_its_dataset_and_model_whatever_else_is_shown(large: Warehouse) -> None:
    look = look_of(large)
    datasets = [concept.name for concept in NINE_CONCEPTS]
    colors = [color_of(look, "dataset", datasets, name) for name in datasets]
    assert len(set(colors)) == 9
    assert [color_of(look, "dataset", [name], name) for name in datasets] == colors
    models = [model.name for model in NINE_MODELS]
    assert [color_of(look, "model", [m], m) for m in models] == [color_of(look, "model", models, m) for m in models]


def luminance(color: str) -> float:
    """Relative luminance as WCAG defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def told_apart_in_grey(one: str, other: str) -> bool:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05) >= 1.2


def test_lines_can_be_told_apart_in_a_grey_print(large: Warehouse) -> None:
    encodings = look_of(large).lines("dataset", [concept.name for concept in NINE_CONCEPTS])
    colors, dashes = (encodings[kind].to_dict()["scale"]["range"] for kind in ("color", "strokeDash"))
    lines = list(zip(colors, dashes, strict=True))
    for i, (color, dash) in enumerate(lines):
        assert all(dash != other[1] or told_apart_in_grey(color, other[0]) for other in lines[:i])
    assert told_apart_in_grey(ATTN, FFN)


@pytest.mark.parametrize("name", FIGURES)
def test_no_label_is_rotated(small: Warehouse, name: str) -> None:
    drawn = spec(figures.chart(small, name, **given_for(name)))
    assert drawn["config"]["axisX"]["labelAngle"] == 0
    assert set(re.findall(r'"labelAngle": ([-0-9.]+)', json.dumps(drawn))) == {"0"}


@pytest.mark.parametrize("name", ["top-heads", "top-layers", "score-vs-effect", "layer-scores", "depth-curves"])
def test_panels_share_the_scale_of_what_is_measured(small: Warehouse, name: str) -> None:
    resolved = spec(figures.chart(small, name)).get("resolve", {}).get("scale", {})
    assert "x" not in resolved
    assert resolved.get("y") in ((None, "independent") if name.startswith("top-") else (None,))


def test_long_names_below_a_figure_are_broken_into_lines() -> None:
    names = ["coinflip-synthetic", "a very long name", "x" * 25, 'quote"]', "own"]
    lines = json.loads(upright(names, 10).to_dict()["labelExpr"].removesuffix("[datum.label]")[1:-1])
    assert lines["coinflip-synthetic"] == ["coinflip-", "synthetic"]
    assert lines["own"] == ["own"]
    assert all(len(line) <= 10 for broken in lines.values() for line in broken)
    assert {name: "".join(lines[name]) for name in names} == {name: name.replace(" ", "") for name in names} | {
        "a very long name": "a verylong name"
    }


def test_models_are_ordered_by_family_and_size_and_categories_as_in_the_paper(large: Warehouse) -> None:
    look = look_of(large)
    assert look.models[:4] == ("gemma-2b", "gemma-7b", "llama-7b", "llama-13b")
    assert look.order("category", ["zoo", "month", "language"]) == ["language", "month", "zoo"]


# Files -----------------------------------------------------------------------------------------------------------


def test_plot_writes_every_format(small: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result]) -> None:
    begins = {"html": b"<!DOCTYPE html>", "png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF", "json": b"{"}
    begins |= {"csv": b"model,dataset", "parquet": b"PAR1"}
    for ending, start in begins.items():
        path = tmp_path / f"depth.{ending}"
        result = run_kdb(
            "plot", "depth-curves", "--model", "tiny-a", "-o", path, "--warehouse", small.storage.local.path
        )
        assert result.exit_code == 0, result.output
        assert path.read_bytes().lstrip()[:40].lower().startswith(start.lower())


def test_a_figure_has_the_size_and_theme_that_are_asked_for(small: Warehouse) -> None:
    chart = figures.chart(small, "prompt-story", **given_for("prompt-story"))
    wide, dark = spec(resized(chart, width=200)), spec(resized(chart, theme="dark"))
    widths = set(re.findall(r'"width": (\d+)', json.dumps(wide)))
    assert max(map(int, widths)) == 200
    assert len(widths) == len(set(re.findall(r'"width": (\d+)', json.dumps(spec(chart)))))
    assert dark["background"] != spec(chart)["background"]
    assert spec(resized(chart)) == spec(chart)
    for wrong in ({"width": 3}, {"height": 10**6}, {"theme": "pink"}):
        with pytest.raises(QueryError, match=r"expected 20 to 4000 pixels|Use one of paper, dark"):
            resized(chart, **wrong)  # type: ignore[arg-type]


def test_plot_writes_the_numbers_beside_the_picture(
    small: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    where = ("--warehouse", small.storage.local.path)
    picture, data = tmp_path / "x.svg", tmp_path / "x.csv"
    result = run_kdb("plot", "top-heads", "--width", 90, "--theme", "dark", "-o", picture, "--data", data, *where)
    assert result.exit_code == 0, result.output
    assert pl.read_csv(data).height == figures.frame(small, "top-heads").height
    assert picture.read_text().startswith("<svg")


def test_a_figure_without_title_prints_its_words_for_a_caption(
    small: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    bare = tmp_path / "bare.json"
    result = run_kdb("plot", "top-heads", "--no-title", "-o", bare, "--warehouse", small.storage.local.path)
    words = spec(figures.chart(small, "top-heads"))["title"]
    assert result.stdout.splitlines() == [words["text"], *words["subtitle"]]
    assert words["text"] not in bare.read_text()


def test_no_line_crosses_a_layer_that_lacks_the_part() -> None:
    row = {"model": "m", "dataset": "d", "category": "c", "component": "attn", "n_layers": 4}
    scores = [{**row, "layer": i, "score": float(i), "depth_percent": 25.0 * i} for i in (1, 3)]
    found = _with_gaps(pl.DataFrame(scores).with_columns(pl.col("layer").cast(pl.Int16)))
    assert found.select("layer", "score", "depth_percent").rows() == [
        (0, None, 0.0),
        (1, 1.0, 25.0),
        (2, None, 50.0),
        (3, 3.0, 75.0),
    ]


def test_many_datasets_of_one_model_have_a_panel_each(tmp_path: Path) -> None:
    concepts = [Concept(f"set-{i}", 40, 0.9) for i in range(8)]
    wh = build(tmp_path / "w", [Model("one", "tiny", 10**8, 4, 2)], concepts, prompts_per_category=0)
    drawn = spec(figures.chart(wh, "depth-curves"))
    assert (drawn["facet"]["field"], drawn["columns"]) == ("dataset", 2)  # eight panels fill rows of two
    few = spec(figures.chart(wh, "depth-curves", dataset=["set-0", "set-1"]))
    assert few["facet"]["field"] == "model"


def test_the_gallery_names_every_figure_and_its_script_draws_all(small: Warehouse, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    commands = re.findall(r"`kdb plot ([a-z-]+) ", (root / "docs/gallery.md").read_text())
    assert sorted(commands) == sorted(FIGURES)
    page = tmp_path / "all.html"
    script = [sys.executable, str(root / "benchmarks/gallery.py"), str(small.storage.local.path), "-o", str(page)]
    told = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert f"with {len(FIGURES)} of {len(FIGURES)} figures" in told
    assert page.read_text().count("<img ") == len(FIGURES)


def test_html_fetches_nothing(small: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result]) -> None:
    path = tmp_path / "depth.html"
    run_kdb("plot", "depth-curves", "-o", path, "--warehouse", small.storage.local.path)
    page = path.read_text()
    assert "<script src=" not in page
    assert "cdn." not in page.partition("<body")[0].partition("<script")[0]


def test_no_text_of_the_data_ends_the_script_of_a_page(tmp_path: Path) -> None:
    text = "</script><script>alert(1)</script>"
    chart = alt.Chart(pl.DataFrame({"text": [text], "x": [1]})).mark_point().encode(x="x", tooltip="text")
    save(chart, tmp_path / "hostile.html")
    page = (tmp_path / "hostile.html").read_text()
    assert "alert(1)" in page
    assert "<script>alert(1)" not in page


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["depth-curves", "-o", "x.gif"], "expected a file that ends in .html, .png, .svg, .pdf, .json, .csv"),
        (["depth-curves", "--model", "nobody", "-o", "x.png"], "Unknown model 'nobody'"),
        (["depth-curve", "-o", "x.png"], "Did you mean 'depth-curves'"),
        (["depth-curves", "-o", "no/such/folder/x.png"], "Cannot write"),
        (["depth-curves"], "Missing option '-o'"),
        (["depth-curves", "--width", "3", "-o", "x.png"], "20<=x<=4000"),
        (["depth-curves", "--theme", "pink", "-o", "x.png"], "'pink' is not one of 'paper', 'dark'"),
        (["depth-curves", "-o", "x.png", "--data", "x.gif"], "expected a file that ends in .csv, .parquet"),
    ],
)
def test_what_cannot_be_drawn_is_one_message(
    small: Warehouse,
    tmp_path: Path,
    run_kdb: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_kdb("plot", *args, "--warehouse", small.storage.local.path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
