"""Charts of knowledge attribution: layers, heads, neurons, methods, overlaps of categories, and one prompt in detail.

Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141). Each function draws the rows of a saved query,
with intervals over prompts if they are means; ``figures.py`` names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from kdb.analysis.prompt_means import with_intervals
from kdb.analysis.style import (
    ATTN,
    FFN,
    Chart,
    Look,
    component_points,
    components,
    depth_axis,
    full_rows,
    layer_components,
    upright,
)
from kdb.errors import QueryError

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

EVERY = 1_000_000
"""Value of k with which a query returns all rows."""

INCREASE = "Δ log p (nat)"
"""Label of the log-probability increase, short enough for the side of a panel."""

_ENDS = ("score", "low", "high")
_OVERLAP = [
    *("category_a", "n_prompts_a", "category_b", "n_prompts_b", "shared"),
    *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("shared_by_chance", "jaccard", "jaccard_by_chance")),
]

EFFECTS = {"mrr": "mean reciprocal rank", "prob_percent": "probability (%)", "logp": "log-probability (nat)"}


# Numbers ---------------------------------------------------------------------------------------------------------


def layer_ranking(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``top-layers`` with the 95 % intervals of each score and rank over the kept prompts."""
    return _ranking(wh, "top-layers", "layer-scores", "layer_name", params)


def head_ranking(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``top-heads`` with the 95 % intervals of each score and rank over the kept prompts."""
    return _ranking(wh, "top-heads", "head-scores", "head_name", params)


def neuron_ranking(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``top-neurons`` with the 95 % interval of each score over the kept prompts.

    Ranks have no interval: it would need every neuron's score in every prompt, but only those of the best and of
    candidates are stored.
    """
    ranking = wh.query("top-neurons", **params)
    keys = keys_of(params, "category", "component")
    scores, prompts = (
        wh.query("neuron-scores", **of_prompts(params)),
        list(dict.fromkeys((*keys, "dataset", "prompt_id"))),
    )
    listed = scores.join(ranking, on=[*keys, "neuron_name"], how="semi")
    # A prompt without any of them is also counted.
    others = scores.select(prompts).unique().join(ranking.select(*keys, "neuron_name").unique(keys), on=keys)
    others = others.with_columns(score=pl.lit(0.0))
    both = pl.concat([listed.select(others.columns), others])
    return with_intervals(ranking, both, keys, "neuron_name", ranks=False)


def _ranking(
    wh: Warehouse, ranking: str, scores: str, item: str, params: dict[str, Any], *, ranks: bool = True
) -> pl.DataFrame:
    listed, by_prompt = wh.query(ranking, **params), wh.query(scores, **of_prompts(params))
    return with_intervals(listed, by_prompt, keys_of(params, "category"), item, ranks=ranks)


def keys_of(params: dict[str, Any], *columns: str) -> list[str]:
    """Return the columns that define separate rankings: datasets are kept apart unless they are pooled."""
    return ["model", *([] if params.get("pool") else ["dataset"]), *columns]


def of_prompts(params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that a query of single prompts has in common with one of their means."""
    return {name: value for name, value in params.items() if name not in ("k", "pool")}


def method_effects(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return the means of ``attribution-methods`` in long form with their 95 % intervals over the kept prompts.

    One row per model, dataset, method, k, mode and effect (mrr, prob_percent, logp): letter, value, low, high, rank_low
    and rank_high (1 for the method with the lowest value in this mode), n_prompts, and what the query says of controls.
    """
    means = wh.query("attribution-methods", **params)
    effects = wh.query("ablation-effects", **{name: value for name, value in params.items() if name != "pool"})
    item = pl.format("{} {}", "method", "k").alias("item")
    # Lower is better: the loss is ranked.
    losses = effects.unpivot(
        list(EFFECTS), index=["model", "dataset", "prompt_id", "method", "k", "mode"], variable_name="effect"
    ).select("model", "dataset", "prompt_id", "effect", "mode", item, score=-pl.col("value"))
    index = [name for name in means.columns if name not in EFFECTS]
    long = means.unpivot(list(EFFECTS), index=index, variable_name="effect").with_columns(item)
    intervals = with_intervals(long, losses, keys_of(params, "effect", "mode"), "item").drop("item")
    return intervals.with_columns(low=-pl.col("high"), high=-pl.col("low"))


def attention_and_ffn(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return the sums of ``attention-vs-ffn`` in long form, with their 95 % intervals over the kept prompts.

    One row per model, dataset, category and component: score, percent, low, high, n_prompts.
    """
    sums, scores = wh.query("attention-vs-ffn", **params), wh.query("layer-scores", **of_prompts(params))
    panel = ["model", "dataset", "category"]
    long = pl.concat(
        sums.select(*panel, "n_prompts", component=pl.lit(c), score=f"{c}_score", percent=f"{c}_percent")
        for c in ("attn", "ffn", "mixer")
    ).filter(pl.col("score").is_not_null())  # a model has no row for what it lacks
    by_prompt = scores.group_by(*panel, "prompt_id", "component").agg(pl.col("score").sum())
    return with_intervals(long, by_prompt, keys_of(params, "category"), "component", ranks=False)


def head_means(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``top-heads`` with the 95 % interval of each score over the kept prompts; ranks have none."""
    return _ranking(wh, "top-heads", "head-scores", "head_name", params, ranks=False)


def expert_means(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``top-experts`` with the 95 % interval of each score over the kept prompts; ranks have none."""
    return _ranking(wh, "top-experts", "expert-scores", "expert_name", params, ranks=False)


def neurons_by_layer(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return ``value-neurons-by-layer`` and ``query-neurons-by-layer`` together, distinguished by the column kind."""
    values = wh.query("value-neurons-by-layer", **params)
    queries = wh.query("query-neurons-by-layer", **params)
    columns = ["model", "dataset", "category", "layer", "neurons", "share_percent", "n_prompts"]
    both = pl.concat(
        [
            values.select(*columns, kind=pl.format("{} value", "component")),
            queries.select(*columns, kind=pl.format("query of {}", "activates")),
        ]
    )
    return with_depth(wh, "neuron_scores", both, params)


def scores_by_layer(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return all rows of ``top-layers``, with intervals over prompts and each layer's depth in percent."""
    return with_depth(wh, "layer_scores", layer_ranking(wh, **params, k=EVERY), params)


def with_depth(wh: Warehouse, table: str, frame: pl.DataFrame, params: dict[str, Any]) -> pl.DataFrame:
    """Add each model's number of layers, from the runs of the rows, and each layer's depth in percent."""
    depths = wh.sql(
        "SELECT model, max(n_layers) AS n_layers FROM known_runs "
        "JOIN chosen_runs(?, ?, ?) USING (model, dataset, run) GROUP BY model",
        [table, params.get("variant", "default"), params.get("run")],
    )
    frame = frame.join(depths, on="model", maintain_order="left")
    return frame.with_columns(depth_percent=100 * pl.col("layer") / pl.col("n_layers"))


# Pictures --------------------------------------------------------------------------------------------------------


def layer_scores(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw the log-probability increase by layer: a panel for each dataset and category."""
    frame = _with_gaps(frame)
    base = alt.Chart().encode(x=depth_axis(frame))
    title = INCREASE
    encodings = components(names=layer_components(frame))
    band = base.mark_area(opacity=0.2).encode(alt.Y("low:Q", title=title), alt.Y2("high:Q"), encodings["color"])
    alone = {"filled": True, "size": 14} if frame["score"].null_count() else False  # no line ends at a layer alone
    line = base.mark_line(strokeWidth=1.6, point=alone).encode(
        alt.Y("score:Q", title=title),
        tooltip=["layer_name", alt.Tooltip("score:Q", format=".3f"), "n_prompts"],
        **encodings,
    )
    return grid(alt.layer(band, line).properties(width=210, height=130), frame, look)


def _with_gaps(frame: pl.DataFrame) -> pl.DataFrame:
    """Add rows without a score for layers that lack a part, such as attention, so that no line crosses them."""
    parts = frame.select("model", "dataset", "category", "component", "n_layers").unique(maintain_order=True)
    every = parts.with_columns(layer=pl.int_ranges("n_layers")).explode("layer")
    every = every.with_columns(pl.col("layer").cast(frame["layer"].dtype))
    every = every.with_columns(depth_percent=100 * pl.col("layer") / pl.col("n_layers"))
    found = frame.drop("n_layers", "depth_percent")
    return every.join(found, on=["model", "dataset", "category", "component", "layer"], how="left")


def ranking(frame: pl.DataFrame, look: Look, *, item: str) -> Chart:
    """Draw the best items with their intervals, the best on top: a panel for each dataset and category."""
    rule, dot = alt.Chart().mark_rule(strokeWidth=2.5, opacity=0.45), alt.Chart().mark_point(filled=True, size=45)
    if "component" in frame.columns:
        color, shape = component_points(layer_components(frame))
        rule, dot = rule.encode(color), dot.encode(color, shape)
    else:
        rule, dot = rule.encode(color=alt.value(ATTN)), dot.encode(color=alt.value(ATTN))
    y = alt.Y(f"{item}:N", sort=alt.EncodingSortField("rank", order="ascending"), title=None)
    title = INCREASE
    axis = alt.Axis(tickCount=4)
    tooltip = [item, alt.Tooltip("score:Q", format=".3f"), "rank_low", "rank_high", "n_prompts"]
    drawn = alt.layer(
        rule.encode(alt.X("low:Q", title=title, axis=axis), alt.X2("high:Q"), y),
        dot.encode(alt.X("score:Q", title=title, axis=axis), y, tooltip=tooltip),
    )
    shown = int(frame["rank"].max())  # type: ignore[arg-type]  # numbers
    drawn = drawn.properties(width=170, height=14 * shown)
    return grid(drawn, frame, look).resolve_scale(y="independent")


def part_map(frame: pl.DataFrame, look: Look, *, part: str) -> Chart:
    """Draw every head or expert of every layer, coloured by its mean score: a panel for each dataset and category."""
    n_layers, n_parts = (int(frame[name].max()) + 1 for name in ("layer", part))  # type: ignore[arg-type]  # numbers
    side, step = max(3, min(14, 260 // max(n_layers, n_parts))), 4 if n_parts > 12 else 1
    # In a panel of its own size, layers without such a part have their place, too.
    places = list(range(n_layers)) if frame["model"].n_unique() == 1 else alt.Undefined
    axis = alt.Axis(values=list(range(0, n_layers, 5 if n_layers > 12 else 1)), grid=False)
    legend = alt.Legend(title=INCREASE, gradientLength=200)
    drawn = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            alt.X("layer:O", title="layer", axis=axis, scale=alt.Scale(domain=places)),
            alt.Y(f"{part}:O", title=part, axis=alt.Axis(values=list(range(0, n_parts, step)), grid=False)),
            # The positive end is darker than the negative one, so that both differ in a grey print.
            alt.Color("score:Q", scale=alt.Scale(domainMid=0, range=["#e69f00", "#f7f7f7", "#08306b"]), legend=legend),
            tooltip=[f"{part}_name", *(alt.Tooltip(f"{n}:Q", format=".3f") for n in _ENDS), "rank", "n_prompts"],
        )
        .properties(width=side * n_layers, height=max(side * n_parts, 40))
    )
    return grid(drawn, frame, look).resolve_scale(x="independent", y="independent")


def neuron_layers(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw the layers of the best value and query neurons: a panel for each dataset and category."""
    names = ["attn value", "ffn value", "query of attn", "query of ffn"]
    line = alt.Chart(frame).mark_line(strokeWidth=1.6)
    y = alt.Y("share_percent:Q", title="share of neurons (%)")
    tooltip = ["kind", "layer", alt.Tooltip("share_percent:Q", format=".1f"), "n_prompts"]
    drawn = line.encode(depth_axis(frame), y, tooltip=tooltip, **components("kind", names))
    return grid(drawn.properties(width=210, height=130), frame, look)


_OF_SETS = ["n_prompts", "logp_controls", "n_controls", "control_ratio", "p", "held_out"]
"""Columns of ``attribution-methods`` about a set and its controls."""


def methods(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw table 2, a row for each dataset and mode: the right answer when each method's best neurons are replaced."""
    frame = frame.with_columns(
        row=pl.when(pl.col("letter").str.len_chars() > 0)
        .then(pl.format("{}  {}", "letter", "method"))
        .otherwise(pl.format("{} (k = {})", "method", "k")),
        title=pl.col("effect").replace_strict(EFFECTS),
        panel=pl.format("{}, {}", "dataset", "mode"),
    )
    rows = frame["row"].unique(maintain_order=True).to_list()
    y = alt.Y("row:N", sort=rows, title=None, axis=alt.Axis(grid=True, labelLimit=200))
    models = look.order("model", frame["model"])
    color = look.lines("model", models)["color"]
    color.legend = alt.Legend(title="model", symbolType="circle")
    offset = alt.YOffset("model:N", sort=models)
    base = alt.Chart().encode(y=y, yOffset=offset, color=color)
    drawn = alt.layer(
        base.mark_rule(strokeWidth=2.5, opacity=0.45).encode(alt.X("low:Q", title=None), alt.X2("high:Q")),
        base.mark_point(filled=True, size=45, opacity=1).encode(
            alt.X("value:Q", title=None),
            tooltip=["model", "dataset", "method", "mode", "value", "low", "high", *_OF_SETS],
        ),
        data=frame,
    ).properties(width=200, height=max(20, 9 * len(models)) * len(rows))
    column = alt.Column("title:N", title=None, sort=list(EFFECTS.values()))
    panels = frame["panel"].unique(maintain_order=True).to_list()
    row = alt.Row("panel:N", title=None, sort=panels)
    return drawn.facet(row=row, column=column).resolve_scale(x="independent")


_PAIR_WIDTH = 54
"""Width of the cell of a pair of categories, in pixels: that of nine characters below it."""


def overlap(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw the overlap of categories: a square for each pair, a panel for each model and dataset."""
    names = look.order("category", [*frame["category_a"], *frame["category_b"]])
    x = alt.X("category_a:N", sort=names, title=None, scale=alt.Scale(domain=names[:-1]), axis=upright(names, 9))
    y = alt.Y("category_b:N", sort=names, title=None, scale=alt.Scale(domain=names[1:]))
    top = max(0.1, float(frame["jaccard"].max()))  # type: ignore[arg-type]  # numbers
    scale = alt.Scale(scheme="cividis", domain=[0, top])
    base = alt.Chart().encode(x, y)
    ink = alt.when(f"datum.jaccard > {0.6 * top}").then(alt.value("black")).otherwise(alt.value("white"))
    drawn = alt.layer(
        base.mark_rect().encode(
            alt.Color("jaccard:Q", scale=scale, legend=alt.Legend(title="Jaccard index")), tooltip=_OVERLAP
        ),
        base.mark_text(fontSize=10).encode(text="shared:Q", color=ink, tooltip=_OVERLAP),
    ).properties(width=_PAIR_WIDTH * (len(names) - 1), height=32 * (len(names) - 1))
    return _by_model(drawn, frame, look)


def shares(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw the total contributions of attention and FFN layers: a panel for each model and dataset."""
    names = look.order("category", frame["category"])
    color = components(names=layer_components(frame))["color"]
    color.legend = alt.Legend(title=None, symbolType="square")
    y = alt.Y("category:N", sort=names, title=None, axis=alt.Axis(labelLimit=200))
    base = alt.Chart().encode(y=y, yOffset="component:N")
    n = alt.Chart().mark_text(fontSize=9, align="left", dx=4, color="#444444")
    x = alt.X("score:Q", title=INCREASE)
    drawn = alt.layer(
        base.mark_bar().encode(x, color, tooltip=["dataset", "category", "component", "score", "percent", "n_prompts"]),
        base.mark_rule().encode(alt.X("low:Q", title=INCREASE), alt.X2("high:Q")),
        n.transform_filter("datum.component === 'attn'").encode(y, x=alt.value("width"), text="n:N"),
    ).properties(width=220, height=28 * len(names))
    panels = _by_model(drawn, frame.with_columns(n=pl.format("n={}", "n_prompts")), look)
    panels.spacing = 50  # room for n
    return panels


def prompt_story(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw one prompt in one model: layers, heads and what they read, neurons and their tokens, as bars."""
    del look
    check_single(frame, "prompt-story")
    parts = frame["part"].unique(maintain_order=True)
    columns = ([part for part in parts if _wide(part) is wide] for wide in (False, True))
    drawn = [alt.vconcat(*(_bars(frame.filter(part=part)) for part in column)) for column in columns if column]
    return alt.hconcat(*drawn)


def check_single(frame: pl.DataFrame, figure: str) -> None:
    """Raise QueryError unless the rows of a figure of one prompt are of one model and one dataset."""
    pairs = frame.select("model", "dataset").unique(maintain_order=True).rows()
    if len(pairs) > 1:
        named = "--model {} --dataset {}".format(*pairs[0])
        raise QueryError(f"{figure} shows one model and one dataset. Name them, such as {named}.")


def _wide(part: str) -> bool:
    """Whether a part of the story has texts beside its bars."""
    return "neuron" in part


def _bars(part: pl.DataFrame) -> Any:
    """Draw the best items of one part of the story, best on top, with the tokens of each."""
    at_position = pl.format("{} @ {}", "name", "position")
    label = pl.when(pl.col("position").is_null()).then("name").otherwise(at_position)
    tokens = pl.col("tokens").fill_null("").str.slice(0, 90)
    part = part.with_columns(
        label=label, tokens=tokens, ink=pl.when(component="attn").then(pl.lit(ATTN)).otherwise(pl.lit(FFN))
    )
    name, height = part["part"][0], 14 * len(part)
    order = alt.EncodingSortField("rank", order="ascending")
    base = alt.Chart(part, height=height)
    bars = base.mark_bar(size=9).encode(
        alt.X("score:Q", title="share" if "query" in name else INCREASE, axis=alt.Axis(tickCount=4)),
        alt.Y("label:N", sort=order, title=None),
        alt.Color("ink:N", scale=None),
        tooltip=["name", "score", "attention", "tokens"],
    )
    bars = bars.properties(width=150, title=alt.TitleParams(name, fontSize=11, anchor="start"))
    if not part["tokens"].str.len_chars().max():
        return bars
    words = base.mark_text(align="left", fontSize=9).encode(
        alt.Y("label:N", sort=order, axis=None), x=alt.value(0), text="tokens:N"
    )
    width = 440 if _wide(name) else 60
    return alt.hconcat(bars, words.properties(width=width, view=alt.ViewConfig(stroke=None)), spacing=6)


def grid(drawn: Any, frame: pl.DataFrame, look: Look) -> Any:
    """Draw a panel for each category with its number of prompts; models and datasets begin a row if there are several.

    A panel is named after whichever of them there are several of.
    """
    several = [name for name in ("model", "dataset") if frame[name].n_unique() > 1]
    n_categories = frame["category"].n_unique()
    n = pl.max("n_prompts").over("model", "dataset", "category")
    names = [*(pl.format("{}\n", name) for name in several), pl.format("{} (n = {})", "category", n)]
    return _faceted(drawn, frame, look, pl.concat_str(names), n_categories if several else min(3, n_categories))


def _by_model(drawn: Any, frame: pl.DataFrame, look: Look) -> Any:
    """Draw a panel for each model, and for each of its datasets if there are several."""
    several = frame["dataset"].n_unique() > 1
    name = pl.format("{}\n{}", "model", "dataset") if several else pl.col("model")
    return _faceted(drawn, frame, look, name, 3)


def _faceted(drawn: Any, frame: pl.DataFrame, look: Look, name: pl.Expr, columns: int) -> Any:
    """Draw a panel for each name, in the fixed order of models, datasets and categories."""
    frame = frame.with_columns(panel=name)
    fields = [field for field in ("model", "dataset", "category") if field in frame.columns]
    orders = {field: look.order(field, frame[field]) for field in fields}
    rows = frame.select(*fields, "panel").unique(maintain_order=True).rows()
    rows.sort(key=lambda row: [orders[field].index(value) for field, value in zip(fields, row[:-1], strict=True)])
    panels = list(dict.fromkeys(row[-1] for row in rows))
    header = alt.Header(labelExpr="split(datum.label, '\\n')")
    facet = alt.Facet("panel:N", title=None, sort=panels, header=header)
    return drawn.properties(data=frame).facet(facet, columns=full_rows(len(panels), columns))
