"""Causal effects of parts of the model: their means with intervals, and beside attribution scores.

    frame = effect_means(wh, model=["smollm2-135m"], effect_method="atp")
    frame = score_and_effect(wh, model=["smollm2-135m"], part="head")

An effect is what the answer gains when a part is replaced: in log-probability if it was measured, in its logit minus
the rival's if it was estimated (``ranked_by``); its loss is minus that. In denoising, where a part is put back, the
gain counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import polars as pl

from kdb.analysis.importance import grid
from kdb.analysis.prompt_means import groups_of, with_intervals
from kdb.analysis.style import ATTN, FFN, Chart, Look
from kdb.analysis.uncertainty import Floats, spearman, spearman_interval
from kdb.errors import QueryError
from kdb.queries.catalogue import bind, find_query
from kdb.queries.domains import ROLES

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

COMPARED = ("head", "attn", "ffn")
"""Parts that have both a score and an effect in every prompt."""

_PANEL = ("model", "dataset", "category")
_SETTINGS = (
    *("model", "category", "dataset", "variant", "run", "role", "replacement", "effect_method", "direction", "pool"),
)
_CHOSEN = "SELECT * FROM {}(?, ?, ?, ?, ?, ?, ?, ?, ?, wanted_pool := ?)"

_EFFECT = pl.when(ranked_by="logit_diff").then("logit_diff").otherwise("logp")

_DIGITS = 12
"""Decimals of a mean, as in saved queries (``mean_over``): what differs beyond them is a tie."""

MEASURES = {"logp": "log p (nat)", "logit_diff": "logit difference"}
"""Label of each measure by which effects are ranked."""


# Numbers ---------------------------------------------------------------------------------------------------------


def effects_by_prompt(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return the effects of the kept prompts, one row per prompt and part; ``params`` are those of score-vs-effect."""
    return _chosen(wh, "_effects", params)


def mean_effects(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return the mean effects by category and part; ``params`` are those of score-vs-effect."""
    return _chosen(wh, "mean_effects", params)


def _chosen(wh: Warehouse, macro: str, params: dict[str, Any]) -> pl.DataFrame:
    query = find_query("score-vs-effect")
    values = bind(query.name, query.params, {name: params[name] for name in params if name in _SETTINGS})
    lists = [list(value) if isinstance(value, tuple) else value for value in map(values.get, _SETTINGS)]
    return wh.sql(_CHOSEN.format(macro), lists)


def effect_means(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``head-effects`` with each effect, by what ranks it, and its 95 % interval over prompts."""
    named = pl.format("a{}.{}", "layer", "head").alias("head_name")
    return _with_ends(wh, "head-effects", named, pl.col("component") == "head", params)


def layer_effect_means(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``layer-effects`` for each role that was measured, in the column role, with 95 % intervals."""
    letter = pl.col("component").replace_strict({"attn": "a", "ffn": "f", "resid": "r"}, default="")
    named = pl.format("{}{}", letter, "layer").alias("layer_name")
    layers = pl.col("component").is_in(["attn", "ffn", "resid"])
    return pl.concat(
        _with_ends(wh, "layer-effects", named, layers, params | {"role": role}).with_columns(role=pl.lit(role))
        for role in ROLES
    )


def _with_ends(wh: Warehouse, query: str, named: pl.Expr, parts: pl.Expr, params: dict[str, Any]) -> pl.DataFrame:
    """Add to a query's mean effects their 95 % intervals over prompts; ``named`` makes the name of a part."""
    item = named.meta.output_name()
    means = wh.query(query, **params)
    means = means.with_columns(effect=_EFFECT)
    by_prompt = _shown(effects_by_prompt(wh, **params).filter(parts)).with_columns(named)
    by_prompt = by_prompt.join(means.select(*_PANEL, item, "ranked_by"), on=[*_PANEL, item])
    by_prompt = by_prompt.with_columns(score=_EFFECT).drop_nulls("score")
    # Parts may be measured in different prompts. Those of the same prompts are resampled together.
    same = pl.col("prompt_id").hash().sum().over(*_PANEL, item).alias("same")
    by_prompt = by_prompt.with_columns(same)
    of_part = by_prompt.select(*_PANEL, item, "same").unique()
    listed = means.join(of_part, on=[*_PANEL, item], how="left", maintain_order="left").with_row_index("row")
    found = with_intervals(listed, by_prompt, [*_PANEL, "same"], item, ranks=False)
    return found.sort("row").drop("row", "same")


def _shown(rows: pl.DataFrame) -> pl.DataFrame:
    """Name the datasets as they are shown, and number the prompts anew: pooled datasets use the same numbers."""
    numbers = pl.struct("dataset", "run", "prompt_id").rank("dense").alias("prompt_id")
    return rows.with_columns(numbers, dataset=pl.col("shown_dataset")).drop("shown_dataset")


def score_and_effect(wh: Warehouse, *, part: str = "head", **params: Any) -> pl.DataFrame:
    """Return the mean score and the mean loss of every part, with their rank correlation by category.

    One row per model, dataset, category and part. spearman is the rank correlation of score and loss over the n_parts
    parts of the category, spearman_low and spearman_high its 95 % interval over prompts. Both means are over the
    n_prompts kept prompts with both.
    """
    both = _pairs(wh, part, params)
    parts = [_correlated(rows) for _, rows in groups_of(both, _PANEL)]
    return pl.concat(parts) if parts else _correlated(both)


def agreement(wh: Warehouse, **params: Any) -> pl.DataFrame:
    """Return rows of ``score-vs-effect`` with the 95 % interval of each rank correlation over prompts."""
    rows = wh.query("score-vs-effect", **params)
    ends = {"low": pl.col("spearman_low"), "high": pl.col("spearman_high")}
    found = [
        score_and_effect(wh, part=part, **params).select(*_PANEL, component=pl.lit(part), **ends).unique()
        for part in COMPARED
    ]
    return rows.join(pl.concat(found), on=[*_PANEL, "component"], how="left", maintain_order="left")


def _pairs(wh: Warehouse, part: str, params: dict[str, Any]) -> pl.DataFrame:
    """Return score and loss of every part in every prompt that has both."""
    if part not in COMPARED:
        raise QueryError(f"parameter part: expected one of {', '.join(COMPARED)}, found {part!r}")
    effects = effects_by_prompt(wh, **params).filter(component=part)
    back = params.get("direction") == "denoising"
    estimated = params.get("effect_method", "atp") != "exact"
    has_rival = pl.col("logit_diff").is_not_null().any().over("model", "shown_dataset", "category")
    measure = pl.when(has_rival & estimated).then(pl.lit("logit_diff")).otherwise(pl.lit("logp"))
    effects = effects.with_columns(ranked_by=measure)
    effects = effects.with_columns(loss=_EFFECT if back else -_EFFECT).drop_nulls("loss")
    asked = {name: params[name] for name in ("model", "category", "dataset", "variant", "run") if name in params}
    name = "head_name" if part == "head" else "layer_name"
    scores = wh.query("head-scores" if part == "head" else "layer-scores", **asked)
    scores = scores if part == "head" else scores.filter(component=part).with_columns(head=pl.lit(None, dtype=pl.Int16))
    on = ["model", "category", "dataset", "prompt_id", "layer", "head"]
    both = scores.rename({name: "name"}).join(
        effects.select(*on, "shown_dataset", "run", "ranked_by", "loss"), on=on, nulls_equal=True, maintain_order="left"
    )
    return _shown(both)


def _correlated(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the means of one category's parts, with the rank correlation and its interval."""
    means = rows.group_by(*_PANEL, "name", "layer", "head", maintain_order=True).agg(
        pl.col("score", "loss").mean().round(_DIGITS), pl.col("ranked_by").first(), n_prompts=pl.len()
    )
    whole = rows.filter(pl.len().over("prompt_id") == len(means))
    low, high = spearman_interval(_matrix(whole, len(means), "score"), _matrix(whole, len(means), "loss"))
    estimate = float(spearman(means["score"].to_numpy(), means["loss"].to_numpy())) if len(means) > 1 else np.nan
    numbers = {"spearman": estimate, "spearman_low": low, "spearman_high": high}
    added = [pl.lit(value, dtype=pl.Float64).fill_nan(None).alias(name) for name, value in numbers.items()]
    return means.with_columns(*added, n_parts=pl.len())


def _matrix(rows: pl.DataFrame, n_parts: int, column: str) -> Floats:
    """Return the values of a column (prompt, part)."""
    values: Floats = rows.sort("prompt_id", "layer", "head")[column].to_numpy().reshape(-1, max(1, n_parts))
    return values


def heads_with_effects(wh: Warehouse, heads: pl.DataFrame, **params: Any) -> pl.DataFrame:
    """Add the mean effects of heads to rows of a ranking: logp_exact and logp_atp, NULL where there is none."""
    on = [*_PANEL, "layer", "head"]
    for method in ("exact", "atp"):
        found = mean_effects(wh, **params, effect_method=method).filter(component="head")
        effects = found.select(*on, pl.col("logp").alias(f"logp_{method}"))
        heads = heads.join(effects, on=on, how="left", maintain_order="left")
    return heads


# Pictures --------------------------------------------------------------------------------------------------------


def effect_map(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw every head of every layer, coloured by its mean effect: a panel for each dataset and category."""
    n_heads = int(frame["head"].max()) + 1  # type: ignore[arg-type]  # a number
    axis = alt.Axis(values=list(range(0, n_heads, 4)), grid=False)
    heads = alt.Y("head:O", title="head", axis=axis, scale=_all(n_heads))
    return _map(frame, look, heads, "head_name", n_heads)


def layer_effect_map(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw every layer's mean effect at each measured place: a panel for each dataset and category."""
    frame = frame.with_columns(place=pl.format("{}, {}", "component", "role"))
    shown = [f"{c}, {role}" for c in ("attn", "ffn", "resid") for role in ROLES]
    places = [place for place in shown if place in set(frame["place"])]
    rows = alt.Y("place:O", title=None, axis=alt.Axis(grid=False), scale=alt.Scale(domain=places))
    return _map(frame, look, rows, "layer_name", len(places))


def _map(frame: pl.DataFrame, look: Look, rows: Any, item: str, n_rows: int) -> Chart:
    """Draw layers from left to right and ``rows`` downwards, each cell coloured by its mean effect."""
    n_layers = int(frame["layer"].max()) + 1  # type: ignore[arg-type]  # a number
    side = max(3, min(14, 260 // max(n_layers, n_rows)))
    most = max(1e-6, float(frame["effect"].abs().max()))  # type: ignore[arg-type]  # a number
    # The scale is that of the square root: a few large effects would leave the others white.
    scale = alt.Scale(type="pow", exponent=0.5, domain=[-most, 0, most], range=["#08306b", "#f7f7f7", "#e69f00"])
    told = ("effect", "low", "high", "logp", "logit_diff", "score")
    numbers = [alt.Tooltip(f"{name}:Q", format=".3f") for name in told]
    axis = alt.Axis(values=list(range(0, n_layers, 5)), grid=False)
    legend = alt.Legend(title="change of " + _measure(frame), gradientLength=200)
    cells = alt.Chart(frame).mark_rect()
    cells = cells.encode(
        alt.X("layer:O", title="layer", axis=axis, scale=_all(n_layers)),
        rows,
        alt.Color("effect:Q", scale=scale, legend=legend),
        tooltip=[item, *numbers, "n_prompts"],
    )
    # Rows with words beside them need more room than rows with a number at every fourth.
    drawn = cells.properties(width=side * n_layers, height=max(15 * n_rows if n_rows <= 9 else side * n_rows, 40))
    return grid(drawn, frame, look).resolve_scale(x="independent", y="independent")


def _measure(frame: pl.DataFrame) -> str:
    """Name what ranks the effects of a frame."""
    found = set(frame["ranked_by"])
    return " or ".join(label for measure, label in MEASURES.items() if measure in found)


def _all(n: int) -> alt.Scale:
    """Return a scale with a place for each number, whether it has a cell or not."""
    return alt.Scale(domain=list(range(n)))


def score_vs_effect(frame: pl.DataFrame, look: Look) -> Chart:
    """Draw each part at its mean score and its mean loss: a panel for each dataset and category."""
    told = (
        pl.when(pl.col("spearman_low").is_null())
        .then(pl.format("Spearman {}", _short("spearman")))
        .otherwise(pl.format("Spearman {} [{}, {}]", *map(_short, ("spearman", "spearman_low", "spearman_high"))))
    )
    first = pl.int_range(pl.len()).over(*_PANEL) == 0
    frame = frame.with_columns(told=pl.when(first).then(told).fill_null("") if len(frame) else told)
    ink = FFN if str(frame["name"][0]).startswith("f") else ATTN
    base = alt.Chart()
    points = base.mark_point(size=22, opacity=0.6, color=ink).encode(
        alt.X("score:Q", title="score: " + "Δ log p (nat)", axis=alt.Axis(tickCount=4)),
        alt.Y("loss:Q", title="effect: loss of " + _measure(frame), axis=alt.Axis(tickCount=4)),
        tooltip=["name", *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("score", "loss")), "n_prompts"],
    )
    words = base.mark_text(align="left", baseline="bottom", fontSize=10, color="#444444").encode(
        x=alt.value(2), y=alt.value(-3), text="told:N"
    )
    drawn = alt.layer(points, words).properties(width=190, height=150)
    return grid(drawn, frame, look)


def _short(name: str) -> pl.Expr:
    return pl.col(name).round(2)
