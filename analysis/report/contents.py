"""Contents of the report, in order: the tables and figures of both papers, with remarks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl

from kdb.analysis import depth_measures, effects, importance
from kdb.analysis.captions import CAVEAT, EFFECTS, FEW, READOUTS
from kdb.analysis.variants import PLAIN, shown_variant

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


@dataclass(frozen=True)
class Tabled:
    """A table: the function that computes its rows, and the saved query or the data from which they are computed."""

    title: str
    note: str
    query: str
    params: dict[str, Any]
    frame: Callable[[], pl.DataFrame]
    hint: str = "nothing is stored (`kdb ingest`)."


@dataclass(frozen=True)
class Drawn:
    """A figure, by its name in figures.py."""

    title: str
    note: str
    figure: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Remark:
    """A remark about a chapter; it is listed with the missing data."""

    title: str
    text: str


Contents = Iterator[Tabled | Drawn | Remark]

_PROBED = "nothing is stored (`kdb ingest --dataset world-cities`)."
_ASKED = "nothing is stored (`kdb ingest --dataset knowledge`)."


def models_and_runs(wh: Warehouse, models: Sequence[str]) -> Contents:
    """Yield the models and runs that were measured, and the checks of their reliability."""
    params = {"model": list(models)}

    def files() -> pl.DataFrame:
        of_file = ("model", "source", "weights_dtype", "quantization", "base_model", "instruct", "dtype", "n_params")
        return wh.query("models", **params).select(*of_file, pl.col("revision").str.slice(0, 12), "n_runs")

    yield Tabled("Models", "The models that were measured, described by their files.", "models", params, files)
    columns = ("model", "dataset", "study", "variant", "dtype", "device", "finished_at", "seconds", "run")

    def runs() -> pl.DataFrame:
        frame = wh.query("runs", **params)
        return frame.select(name for name in columns if name in frame.columns)

    yield Tabled("Runs", "All runs of these models.", "runs", params, runs)

    def failed() -> pl.DataFrame:
        checks = wh.query("checks", **params)
        return checks.group_by("model", "check", maintain_order=True).agg(
            pl.len().alias("runs"),
            pl.col("value").max().alias("largest"),
            pl.col("tolerance").max(),
            pl.col("passed").all().alias("all passed"),
        )

    text = "Largest difference over all runs from the loaded model without hooks. Counts of prompts have no tolerance."
    yield Tabled("Checks", text, "checks", params, failed)


def concept_depth(wh: Warehouse, models: Sequence[str]) -> Contents:
    """Yield the first study: Jin et al., arXiv 2404.07066."""
    params = yield from _asked_for(wh, models, "concept", _PROBED)
    if params is None:
        return
    curves = wh.query("layer-accuracy", **params)
    yield Drawn("Experiment 1: datasets within each model", "", "depth-curves", params)
    yield _measures(wh, params)
    yield Drawn("Depth of each concept", "", "depth-measures", params)
    yield _asked(wh, "Baselines", _BASELINES, "baselines", params, "no run of these models has baselines.")
    yield _asked(wh, "Datasets by best accuracy", CAVEAT, "datasets-by-model", params, _PROBED)
    yield from _paper_points(wh, params)
    for model in models[:_ROBUST]:
        yield Drawn(
            f"Dependence of J and C on the procedure: {model}", "", "depth-robustness", params | {"model": [model]}
        )
    yield Drawn(
        "Selectivity",
        "Accuracy of the probe above its accuracy on the control task, one random label for each group.",
        "depth-curves",
        params | {"metric": "selectivity"},
    )
    yield _asked(
        wh, "The model's own answers", "Computed over all prompts, without a probe.", "zero-shot", params, _PROBED
    )
    if curves["model"].n_unique() > 1:
        yield from _side_by_side(curves, params)
    yield Drawn("Probes on other datasets (`kdb transfer`)", _TRANSFER, "probe-transfer", params)
    yield Drawn("Experiment 3: depth by family and size", "", "converging-by-size", params)
    variants = wh.query("layer-accuracy", **params | {"variant": "all"})
    if variants["variant"].n_unique() > 1:
        yield Drawn("Noise, precision and other variants", "", "depth-by-variant", {"model": list(models)})
    projected = wh.query("hidden-states", **params, layers=1, prompts=1).select("model", "dataset").unique()
    pairs = projected.sort("model", "dataset").rows() or [(model, None) for model in models[:1]]
    for model, dataset in pairs[:_PROJECTED]:
        named = params | {"model": [model]} | ({"dataset": [dataset]} if dataset else {})
        yield Drawn(f"Hidden states: {model} on {dataset or 'any dataset'} (`kdb project`)", "", "hidden-states", named)


_TRANSFER = (
    "Whether the direction that separates the labels of one dataset separates those of another. AUC comes first, since "
    "a threshold seldom carries over."
)

_BASELINES = (
    "A probe that is not better than the words may have found the words. A small below_chance_p says that the split "
    "itself gives labels away, with the wrong sign: a recovery from below chance then looks like a jump."
)


def _measures(wh: Warehouse, params: dict[str, Any]) -> Tabled:
    note = (
        "best_layers are those that cannot be told from the best one. depth_90 is the first depth at which 90 % of the "
        "way from the best baseline to the best layer is made; a dash unless the best layer beats the baseline "
        "(p_beats_baseline below 0.05, which allows for the choice of the layer). p_any_rise below 0.05 says that "
        "accuracy rises somewhere, not that it does at J. area is the mean over layers of accuracy minus the "
        "baseline's. Intervals (95 %) are over test prompts, or their groups, with the fitted probes held fixed; "
        f"`kdb plot depth-measures -o measures.csv` writes all of them. {CAVEAT}"
    )

    def rows() -> pl.DataFrame:
        frame = depth_measures.summary(wh, **params)
        shown = ("model", "dataset", "split", "n_test", "n_groups", "best_layer", "best_accuracy", "best_layers")
        against = ("baseline", "baseline_accuracy", "p_beats_baseline")
        ends = [_with_ends(name, name) for name in ("depth_90_percent", "area")]
        beside = ("p_any_rise", "jump_percent", "converging_percent")
        return frame.select(*shown, *against, *ends, *beside)

    return Tabled("Measures of depth", note, "concept-depth", params | {"site": "resid_post"}, rows, _PROBED)


def _paper_points(wh: Warehouse, params: dict[str, Any]) -> Contents:
    yield Tabled(
        "Robustness of J and C",
        "The range holds the middle 95 % of resampled test sets that have the point; it is missing if most have none, "
        "and none_percent % have none. depends_on names the choices that move the point by more than a tenth of the "
        "depth, or remove it: then it is an artefact of the procedure. A C in the last layer is one by its definition: "
        f"it only says that the curve ends flat. {CAVEAT}",
        "depth-robustness",
        params,
        lambda: depth_measures.verdicts(wh, **params),
        "nothing is stored of the paper's probe and split.",
    )
    yield Tabled(
        "J and C of every probe",
        "In percent of depth, on the split of the paper; agree says whether all probes have the point within a tenth "
        f"of the depth, or none has it. {CAVEAT}",
        "depth-robustness",
        params,
        lambda: depth_measures.disagreements(wh, **params),
        "nothing is stored of the paper's probe and split.",
    )


_ROBUST, _PROJECTED = 3, 2
"""Maximum number of models and datasets that get a figure of their own."""


def _side_by_side(curves: pl.DataFrame, params: dict[str, Any]) -> Contents:
    """Yield experiments 2 and 3, for several models of one size, and for families with several sizes."""
    middle = float(curves.unique("model")["size_billions"].median() or 1)  # type: ignore[arg-type]  # numbers
    note = "Models within a factor of 3 of the median size."
    yield Drawn("Experiment 2: families at one size", note, "depth-by-family", params | {"size": middle, "within": 3})
    sizes = curves.group_by("family").agg(pl.col("model").n_unique())
    if sizes["model"].max() > 1:  # type: ignore[operator]  # numbers
        yield Drawn("Experiment 3: sizes within each family", "", "depth-by-size", params)


def knowledge(wh: Warehouse, models: Sequence[str]) -> Contents:
    """Yield the second study: Yu and Ananiadou, arXiv 2312.12141."""
    params = yield from _asked_for(wh, models, "knowledge", _ASKED)
    if params is None:
        return
    yield _asked(
        wh,
        "Prompts that pass the filter",
        "Only these prompts are used: the model knows their answers.",
        "kept-prompts",
        params,
        _ASKED,
    )
    yield Drawn("Attention and FFN", "", "attention-vs-ffn", params)
    yield Tabled(
        "Attention and FFN",
        f"Sums over layers, as means over the n_prompts kept prompts of each dataset with 95 % intervals; {FEW}.",
        "attention-vs-ffn",
        params,
        lambda: importance.attention_and_ffn(wh, **params),
        _ASKED,
    )
    yield from _layers_and_heads(wh, params)
    if len(wh.query("top-experts", **params, k=1)):
        yield from _experts(wh, params)
    yield from _neurons_and_methods(wh, params)
    for model, dataset, prompt in _examples(wh, params):
        named = params | {"model": [model], "dataset": dataset, "prompt": prompt}
        yield Drawn(f"One prompt in {model}", "", "prompt-story", named)


def _layers_and_heads(wh: Warehouse, params: dict[str, Any]) -> Contents:
    yield Drawn("Every layer", "", "layer-scores", params)
    ranks = (
        "By the mean over the n_prompts kept prompts of each dataset. The brackets show the range of the rank in the "
        "middle 95 % of resampled prompts: a narrow one means a stable rank. There is none below five prompts."
    )
    yield Tabled(
        "Table 4: the ten best layers",
        ranks,
        "top-layers",
        params,
        lambda: _compact(importance.layer_ranking(wh, **params), "layer_name"),
        _ASKED,
    )
    yield Drawn("The ten best layers", "", "top-layers", params)
    yield Tabled(
        "Table 10: the ten best heads",
        f"{ranks} {_BESIDE}",
        "top-heads",
        params,
        lambda: _heads(wh, params),
        _ASKED,
    )
    yield Drawn("Every head", "", "head-map", params)
    yield from _effects_and_readouts(wh, params)
    yield _asked(
        wh,
        "Tokens that the best heads read",
        _WITHOUT_INTERVALS,
        "position-attention",
        params | {"k": 1, "tokens": 3},
        _ASKED,
    )


_BESIDE = (
    "The effects, in the order of the heads, are mean changes of the answer's log-probability (nat) when a head's "
    "output at the last token is replaced by its mean over the category's other kept prompts: measured by running the "
    f"model (exact), or estimated from a gradient (atp). A dash: not stored. {EFFECTS}"
)

_AGREEMENT = (
    "spearman is the rank correlation, over all parts of a kind, of the mean score and the mean loss of the answer's "
    "log-probability (atp) when the part is replaced by its mean. low and high are its 95 % interval over prompts; "
    "there is none below five. A score is what a part adds directly; an effect is what the model needs it for."
)


def _effects_and_readouts(wh: Warehouse, params: dict[str, Any]) -> Contents:
    yield Drawn("Effect of every head (atp)", "", "effect-map", params)
    yield Drawn("Score and effect of heads", "", "score-vs-effect", params)
    yield Tabled(
        "Agreement of scores and effects",
        _AGREEMENT,
        "score-vs-effect",
        params,
        lambda: effects.agreement(wh, **params),
        EFFECTS,
    )
    yield Drawn("Prompts whose answer is the first choice after each layer", "", "answer-by-layer", params)
    yield _asked(
        wh, "First layer at which the answer is the first choice", _SETTLED, "answer-by-layer", params, READOUTS
    )


_SETTLED = (
    "Quartiles over the n_settled prompts whose answer is the first choice of the last layer, of n_prompts kept ones."
)


def _experts(wh: Warehouse, params: dict[str, Any]) -> Contents:
    yield Tabled(
        "The ten best experts",
        "By the mean over the n_prompts kept prompts of each dataset, with its 95 % interval. An expert counts as 0 "
        f"in a prompt in which it is not chosen; {FEW}.",
        "top-experts",
        params,
        lambda: importance.expert_means(wh, **params).with_columns(score=_with_ends("score")).drop("low", "high"),
        _ASKED,
    )
    yield Drawn("Every expert", "", "expert-map", params)
    if len(wh.query("router-by-category", **params, k=1)):
        yield _asked(wh, "Experts that the routers choose most often", _ROUTED, "router-by-category", params, _ASKED)


_ROUTED = (
    "The three of each layer that are chosen in most of the n_prompts kept prompts, at the last token, with the 95 % "
    "Wilson interval of their share. weight is a mean over the prompts in which the expert is chosen."
)


def _neurons_and_methods(wh: Warehouse, params: dict[str, Any]) -> Contents:
    yield Drawn("Figure 2: layers of the value and query neurons", "", "neurons-by-layer", params)
    yield Tabled(
        "The best neurons",
        f"By the mean over the n_prompts kept prompts of each dataset, with its 95 % interval; {FEW}.",
        "top-neurons",
        params | {"k": 3},
        lambda: _neurons(wh, params | {"k": 3}),
        _ASKED,
    )
    yield Drawn("Table 2: methods compared", "", "attribution-methods", params)
    yield Tabled(
        "Table 2: methods compared",
        f"With 95 % intervals over prompts; round brackets show the range of the rank. Lower is better; {FEW}.",
        "attribution-methods",
        params,
        lambda: _methods(importance.method_effects(wh, **params)),
        _ASKED,
    )
    yield Drawn("Heads shared by categories", "", "head-overlap", params)
    yield Drawn("Neurons shared by categories", "", "neuron-overlap", params)
    for kind, query in (("Heads", "head-overlap"), ("Neurons", "neuron-overlap")):
        yield _asked(wh, f"{kind} shared by categories", _BY_CHANCE, query, params, _ASKED)


_WITHOUT_INTERVALS = (
    "Means over the n_prompts kept prompts that contain the token, without intervals, because most tokens occur in "
    "only a few prompts."
)

_BY_CHANCE = (
    "Among the best of each, beside the level by chance: what as many that are drawn at random share on average. "
    "n_prompts_a and n_prompts_b are the numbers of prompts behind the two lists."
)


CHAPTERS = {
    "Models and runs": models_and_runs,
    "Concept depth": concept_depth,
    "Knowledge attribution": knowledge,
}


def _asked_for(
    wh: Warehouse, models: Sequence[str], study: str, hint: str
) -> Generator[Remark, None, dict[str, Any] | None]:
    """Return the models, and the newest variant if none of them has a run of the study with the variant 'default'.

    Returns None if no run of the study is stored. Then the chapter is one remark, which says how to measure it.
    """
    params: dict[str, Any] = {"model": list(models)}
    variant = shown_variant(wh, models, study)
    if variant is None:
        yield Remark(f"Study {study}", hint)
        return None
    if variant != PLAIN:
        yield Remark(f"Study {study}", f"there is no run of the variant 'default'; the variant {variant!r} is shown.")
        params["variant"] = variant
    return params


def _asked(wh: Warehouse, title: str, note: str, query: str, params: dict[str, Any], hint: str) -> Tabled:
    """Return a table that is the answer of a saved query."""
    return Tabled(title, note, query, params, lambda: wh.query(query, **params), hint)


def _compact(ranking: pl.DataFrame, item: str) -> pl.DataFrame:
    """Return a row for each model, dataset and category: names in order, each with the interval of its rank."""
    if ranking.is_empty():
        return ranking
    entry = pl.concat_str(item, _ranks())
    return ranking.group_by("model", "dataset", "category", maintain_order=True).agg(
        entry.str.join(", ").alias("best first"), n_prompts=pl.col("n_prompts").first()
    )


def _heads(wh: Warehouse, params: dict[str, Any]) -> pl.DataFrame:
    """Return the best heads of each category in order, and their effects in the same order."""
    ranking = importance.head_ranking(wh, **params)
    if ranking.is_empty():
        return ranking
    beside = effects.heads_with_effects(wh, ranking, **params)
    shown = {"exact effect": _signed("logp_exact"), "estimated effect (atp)": _signed("logp_atp")}
    listed = beside.group_by("model", "dataset", "category", maintain_order=True).agg(
        *(text.str.join(", ").alias(name) for name, text in shown.items())
    )
    named = _compact(ranking, "head_name").join(listed, on=["model", "dataset", "category"], maintain_order="left")
    return named.select(pl.exclude("n_prompts"), "n_prompts")


def _signed(name: str) -> pl.Expr:
    """Return a number with its sign and two decimals as text; a dash without one."""
    return pl.col(name).map_elements(lambda value: f"{value:+.2f}", return_dtype=pl.String).fill_null("–")


def _ranks() -> pl.Expr:
    """Return the range of a rank in brackets; empty without one."""
    return pl.format(" ({}–{})", "rank_low", "rank_high").fill_null("")


def _with_ends(value: str, prefix: str = "") -> pl.Expr:
    """Return a number with its interval, whose columns begin with ``prefix``; alone without one."""
    names = [f"{prefix.removesuffix('_percent')}_{end}" if prefix else end for end in ("low", "high")]
    number, *ends = (pl.col(name).round_sig_figs(3) for name in (value, *names))
    text = pl.concat_str(number.cast(pl.String), pl.format(" [{}, {}]", *ends).fill_null(""))
    return text.alias(value)


def _methods(effects: pl.DataFrame) -> pl.DataFrame:
    """Return a row for each model, dataset and method, with a column for each effect."""
    keys = ["model", "dataset", "letter", "method", "k", "mode", "n_prompts"]
    keys += ["logp_controls", "n_controls", "control_ratio", "p", "held_out"]
    cells = effects.with_columns(cell=pl.concat_str(_with_ends("value"), _ranks()))
    return cells.pivot("effect", index=keys, values="cell") if len(cells) else cells


def _neurons(wh: Warehouse, params: dict[str, Any]) -> pl.DataFrame:
    ranking = importance.neuron_ranking(wh, **params)
    if ranking.is_empty():
        return ranking
    named = ("model", "dataset", "category", "component", "rank", "neuron_name")
    return ranking.select(*named, score=_with_ends("score"), n_prompts="n_kept", tokens="top_tokens")


def _examples(wh: Warehouse, params: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Return, for each of the first models, the prompt with the most probable answer."""
    examples = wh.query("prompts", **params | {"model": params["model"][:_PROJECTED], "k": 1}).filter("kept")
    best = examples.sort("target_prob", descending=True).unique("model", keep="first", maintain_order=True)
    return best.select("model", "dataset", "prompt_id").sort("model").rows()
