"""Pages of one neuron and of one attention head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl

from kdb.analysis.captions import EFFECTS
from kdb.analysis.effects import heads_with_effects, mean_effects
from kdb.errors import QueryError
from kdb.queries.domains import EFFECT_METHODS
from kdb.web.templates import tokens, url
from kdb.web.views.parts import Shown, UrlParams, asked, shown, table
from kdb.web.views.prompt import MEAN_EFFECT

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


def _hidden(url_params: UrlParams, *columns: str) -> list[str]:
    """Return the columns with the same value in all rows of a page; includes the model if there is only one."""
    return [*columns, "model"] if len(url_params.many("model")) == 1 else list(columns)


def neuron(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return the tokens that a neuron raises and lowers, what it adds to each category, and its best prompts."""
    name = url_params.needed("neuron")
    about = {"neuron": name, **url_params.run_of("category")}
    drop = _hidden(url_params, "neuron_name")
    tables = [asked(wh, "neuron-by-category", about, drop=drop), *_effects_of_neuron(wh, about, drop)]
    prompts = asked(wh, "neuron-in-prompts", about | {"k": 20}, drop=drop)
    _mark(prompts.rows, _read_by_neuron(wh, about))
    chosen = {key: value for key, value in about.items() if key in ("neuron", "model", "variant", "run")}
    found = wh.query("neuron-tokens", **chosen).to_dicts()
    if not found and not any(one.rows for one in (*tables, prompts)):
        raise QueryError(
            f"{name}: not stored with any prompt. Names of neurons are like f29_1234, f29.3_45 or a23.12_45."
        )
    return {
        "title": f"Neuron {name}",
        "name": name,
        "models": url_params.many("model"),
        "place": _place(name),
        "tokens": _by_sign(found),
        "tokens_address": url("/queries/neuron-tokens", chosen),
        "tables": [*tables, prompts],
    }


def _place(name: str) -> dict[str, int | None]:
    """Return the numbers in the name of a neuron; its head is None in an FFN, its expert unless it is in one."""
    part, _, neuron = name[1:].partition("_")
    layer, _, within = part.partition(".")
    found = {"layer": int(layer), "head": None, "expert": None, "neuron": int(neuron)}
    return found | ({"head" if name.startswith("a") else "expert": int(within)} if within else {})


def _by_sign(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the tokens by model, and by the end of the order in which they stand."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["model"], {"top": [], "bottom": []})[row["sign"]].append(row)
    return found


_READ_BY_NEURON = """
SELECT neuron_scores.model, neuron_scores.dataset, neuron_scores.prompt_id, arg_max(token, neuron_scores.score) AS token
FROM neuron_scores
JOIN head_position_scores AS read USING (model, dataset, run, prompt_id, layer, head, position)
WHERE neuron_scores.component = 'attn' AND layer = $layer AND head = $head AND neuron = $neuron
GROUP BY ALL
"""


def _read_by_neuron(wh: Warehouse, about: dict[str, Any]) -> dict[tuple[Any, ...], str | None]:
    """Return the token at the best position of an attention neuron in each prompt; nothing for one of an FFN."""
    place = _place(about["neuron"])
    if place["head"] is None:
        return {}
    rows = wh.sql(_READ_BY_NEURON, {name: place[name] for name in ("layer", "head", "neuron")})
    return {_of_prompt(row): row["token"] for row in rows.to_dicts()}


def _of_prompt(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["dataset"], row["prompt_id"]


def _first(listed: str | None) -> str | None:
    return next(iter(tokens(listed)), None)


def _mark(rows: list[dict[str, Any]], read: dict[tuple[Any, ...], str | None]) -> None:
    """Add to each row its text in three pieces, of which the second is where the part acts: read, or the last word."""
    for row in rows:
        token = read.get(_of_prompt(row))
        row["marked"] = _three(row["text"], token)


def _three(text: str, token: str | None) -> tuple[str, str, str]:
    """Divide a text at a token; without one at its last word, which is where the answer is computed."""
    if token is not None:
        before, found, after = text.rpartition(token)
        return (before, found, after) if found else (after, "", "")
    before, _, last = text.rpartition(" ")
    return f"{before} ", last, ""


def _effects_of_neuron(wh: Warehouse, about: dict[str, Any], drop: Sequence[str]) -> list[Shown]:
    """Return the mean effects of an FFN neuron by category; nothing if it was never replaced."""
    place = _place(about["neuron"])
    if place["head"] is not None:
        return []
    chosen = {name: value for name, value in about.items() if name != "neuron"}
    columns = ("model", "dataset", "category", "logp", "logit_diff", "kl", "n_prompts")
    frames = [
        mean_effects(wh, **chosen, effect_method=method)
        .filter(
            pl.col("expert").eq_missing(place["expert"]),
            component="ffn_neuron",
            layer=place["layer"],
            neuron=place["neuron"],
        )
        .select(*columns, effect_method=pl.lit(method))
        for method in EFFECT_METHODS
    ]
    rows = pl.concat(frames).sort("model", "dataset", "category")
    kept = [name for name in rows.columns if name not in drop]
    return [table("Effect of replacing the neuron", rows.select(kept), note=MEAN_EFFECT)] if len(rows) else []


# Heads -----------------------------------------------------------------------------------------------------------


def head(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return what a head adds to each category, the tokens that it reads, and its best prompts."""
    about = {"layer": url_params.integer("layer"), "head": url_params.integer("head"), **url_params.run_of("category")}
    drop = _hidden(url_params, "head_name", "layer", "head")
    tables = [_beside_effects(wh, about, drop), asked(wh, "position-attention", about, drop=drop)]
    prompts = asked(wh, "head-in-prompts", about, drop=[*drop, "reads"])
    _mark(prompts.rows, {_of_prompt(row): _first(row["reads"]) for row in prompts.rows})
    title = f"a{about['layer']}.{about['head']}"
    if not any(one.rows for one in (*tables, prompts)):
        raise QueryError(f"{title}: not stored with any prompt. Check the numbers of layer and head, counted from 0.")
    return {
        "title": f"Head {title}",
        "models": url_params.many("model"),
        "layer": about["layer"],
        "tables": [*tables, prompts],
    }


def _beside_effects(wh: Warehouse, about: dict[str, Any], drop: Sequence[str]) -> Shown:
    """Return the head's score in each category, with its effects beside."""
    scores = wh.query("head-by-category", **about)
    chosen = {name: value for name, value in about.items() if name not in ("layer", "head")}
    both = heads_with_effects(wh, scores, **chosen)
    stored = [name for name in ("logp_exact", "logp_atp") if both[name].count()]
    both = both.select(*(name for name in both.columns if not name.startswith("logp_") or name in stored))
    found = shown("head-by-category", about, both, drop)
    return replace(found, note=f"{found.note} {_LOGP if stored else EFFECTS}")


_LOGP = f"logp_exact and logp_atp are mean effects. {MEAN_EFFECT}"
