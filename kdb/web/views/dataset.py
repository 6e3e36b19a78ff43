"""Pages of a dataset and of a category: what each model knows of it, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import polars as pl

from kdb.analysis.style import look_of
from kdb.analysis.variants import PLAIN
from kdb.errors import UnknownNameError
from kdb.web.views.parts import IN_NAME, UrlParams, asked, categories, chart, has, known, table, variant_of

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

_ABOUT = (
    "SELECT study, any_value(source) AS source, any_value(template) AS template, max(n_prompts) AS n_prompts, "
    "max(n_positive) AS n_positive FROM datasets WHERE dataset = $dataset GROUP BY study"
)
_EXAMPLES = (
    "SELECT min(model) AS model, dataset, prompt_id, text, any_value(label) AS label, "
    "any_value(target_token) AS target_token, any_value(category) AS category "
    "FROM prompts JOIN runs USING (model, dataset, run) WHERE dataset = $dataset AND variant = $variant "
    "GROUP BY dataset, prompt_id, text ORDER BY prompt_id LIMIT 12"
)


def dataset(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return what a dataset consists of, and the results of each model on it."""
    name = url_params.needed("dataset")
    about = wh.sql(_ABOUT, {"dataset": name}).to_dicts()
    if not about:
        stored = wh.sql("SELECT DISTINCT dataset FROM datasets")["dataset"].to_list()
        raise UnknownNameError("dataset", name, stored, "The home page lists all stored datasets.")
    models = set(wh.sql("SELECT DISTINCT model FROM runs WHERE dataset = $dataset", {"dataset": name})["model"])
    variant = variant_of(wh, models, about[0]["study"])
    examples = wh.sql(_EXAMPLES, {"dataset": name, "variant": variant.get("variant", PLAIN)})
    context = {
        "title": f"Dataset {name}",
        "dataset": name,
        "about": about[0],
        "models": look_of(wh).order("model", models),
        "examples": table("Its first prompts", examples, _with_values(examples)),
        "charts": [],
        "further": [],
        "tables": [],
        "kept": None,
    }
    return context | (_concept(wh, name, variant) if about[0]["study"] == "concept" else _knowledge(wh, name, variant))


def _with_values(frame: pl.DataFrame) -> list[str]:
    shown = ("prompt_id", "category", "text", "label", "target_token")
    return [name for name in shown if frame[name].null_count() < len(frame)]


def _concept(wh: Warehouse, name: str, variant: Mapping[str, str]) -> dict[str, Any]:
    about = {"dataset": [name], **variant}
    charts = [chart("depth-by-family", {**about, "size": 1, "within": 1e6}, f"How deep does each model know {name}?")]
    charts.append(chart("depth-measures", about))
    models = [one for one in look_of(wh).models if has(wh, "projections", dataset=name, model=one)]
    hidden = [chart("hidden-states", {"model": [one], **about}, f"Positions of its prompts in {one}") for one in models]
    tables = [asked(wh, "concept-depth", {**about, "site": "resid_post"}, folded=True)]
    tables += [asked(wh, one, about) for one in ("zero-shot", "baselines")]
    return {"charts": charts, "further": hidden, "tables": [one for one in tables if one.rows]}


def _knowledge(wh: Warehouse, name: str, variant: Mapping[str, str]) -> dict[str, Any]:
    about = {"dataset": name, **variant}
    return {
        "kept": {
            "categories": categories(wh),
            "cells": {(row["category"], row["model"]): row for row in wh.query("kept-prompts", **about).to_dicts()},
        },
        "charts": [chart(one, about) for one in ("attention-vs-ffn", "layer-scores")],
    }


def category(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return where each model keeps one kind of knowledge: layers, heads, neurons, and its prompts."""
    stored, name = categories(wh), url_params.needed("category")
    if name not in stored:
        raise UnknownNameError("category", name, stored, "The home page lists all stored categories.")
    models = url_params.many("model")
    known(wh, models)
    about = {"category": [name], "model": models, **variant_of(wh, models or look_of(wh).models, "knowledge")}
    figures = ["layer-scores", "top-heads", "head-map"]
    figures += ["answer-by-layer"] if has(wh, "lens_readouts") else []
    figures += ["effect-map"] if has(wh, "effects") else []
    return {
        "title": f"Category {name}",
        "category": name,
        "categories": stored,
        "all_models": list(look_of(wh).models),
        "models": models,
        "kept": asked(wh, "kept-prompts", about, drop=["category"]),
        "charts": [chart(one, about) for one in figures],
        "tables": [
            asked(wh, "top-neurons", {**about, "k": 5}, drop=["bottom_tokens", *IN_NAME]),
            asked(wh, "position-attention", {**about, "k": 3, "tokens": 3}, title="Tokens that its best heads read"),
            asked(wh, "prompts", {**about, "k": 8}, drop=["category", "answer"]),
        ],
    }
