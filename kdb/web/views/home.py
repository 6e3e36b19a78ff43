"""The first page: the answer of each study at a glance, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import polars as pl

from kdb.analysis.style import look_of
from kdb.web.templates import url
from kdb.web.views.parts import Charted, UrlParams, asked, categories, chart, variant_of

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


def home(wh: Warehouse, _: UrlParams) -> dict[str, Any]:
    """Return the largest comparison of each study, a matrix of models and datasets, and what is stored."""
    look, kinds = look_of(wh), categories(wh)
    measured = wh.sql(_MEASURED)
    concept, knowledge = (variant_of(wh, look.models, study) for study in ("concept", "knowledge"))
    depth = (
        wh.query("concept-depth", site="resid_post", **concept)
        if len(measured.filter(study="concept"))
        else pl.DataFrame()
    )
    return {
        "title": "Home",
        "models": look.models,
        "structure": {row["model"]: row for row in wh.sql(_STRUCTURE).to_dicts()},
        "measured": {(row["study"], row["dataset"], row["model"]): row for row in measured.to_dicts()},
        "datasets": {study: _datasets(measured, look.datasets, study) for study in ("concept", "knowledge")},
        "depth": {(row["dataset"], row["model"]): row for row in depth.to_dicts()},
        "n_tested": _equal(depth.to_dicts()),
        "kept": _kept(wh, knowledge) if len(measured.filter(study="knowledge")) else {},
        "heads": _heads(wh, kinds, knowledge) if len(measured.filter(study="knowledge")) else None,
        "depth_chart": _comparison(measured, concept),
        "n_runs": int(measured["n_runs"].sum() or 0),
        "newest": str(measured["finished"].max())[:10],
        "runs": asked(wh, "runs", {}, title="Runs"),
        "suggested": [*look.models, *sorted(set(measured["dataset"])), *kinds],
    }


_MEASURED = (
    "SELECT study, dataset, model, count(*) AS n_runs, max(n_prompts) AS n_prompts, "
    "strftime(max(finished_at), '%Y-%m-%d %H:%M:%S') AS finished "
    "FROM runs JOIN datasets USING (model, dataset, run, study) GROUP BY ALL ORDER BY ALL"
)
_STRUCTURE = (
    "SELECT model, any_value(n_params) AS n_params, any_value(n_layers) AS n_layers, "
    "any_value(coalesce(quantization, weights_dtype)) AS weights, any_value(instruct) AS instruct "
    "FROM models GROUP BY model"
)


def _datasets(measured: pl.DataFrame, order: tuple[str, ...], study: str) -> list[str]:
    stored = set(measured.filter(study=study)["dataset"])
    return [name for name in order if name in stored]


def _comparison(measured: pl.DataFrame, variant: Mapping[str, str]) -> tuple[str, Charted] | None:
    """Return the dataset that compares most: measured on most models, with most prompts; the newest of equals."""
    concept = measured.filter(study="concept")
    if concept.is_empty():
        return None
    by_dataset = concept.group_by("dataset").agg(pl.col("n_prompts", "finished").max(), models=pl.len())
    order = ("models", "n_prompts", "finished", "dataset")
    largest = by_dataset.sort(order, descending=[True, True, True, False])["dataset"][0]
    # All models in one panel, whatever their size.
    params = {"dataset": [largest], "size": 1, "within": 1_000_000, **variant}
    return largest, chart("depth-by-family", params, f"How deep does each model know it? {largest}")


def _kept(wh: Warehouse, variant: Mapping[str, str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the number of prompts that pass the filter, by dataset and model."""
    rows = wh.query("kept-prompts", **variant).group_by("dataset", "model").agg(pl.col("n_prompts", "kept").sum())
    return {(row["dataset"], row["model"]): row for row in rows.to_dicts()}


def _equal(depth: list[dict[str, Any]]) -> dict[str, int]:
    """Return the number of tested prompts of each dataset on which all models were tested on as many."""
    found: dict[str, set[int]] = {}
    for row in depth:
        found.setdefault(row["dataset"], set()).add(row["n_test"])
    return {dataset: next(iter(counts)) for dataset, counts in found.items() if len(counts) == 1}


def _heads(wh: Warehouse, kinds: list[str], variant: Mapping[str, str]) -> dict[str, Any]:
    """Return the best head of each category and model, of the model's first dataset of the study."""
    rows = wh.query("top-heads", k=1, **variant).unique(["model", "category"], keep="first", maintain_order=True)
    found = {(row["category"], row["model"]): row for row in rows.to_dicts()}
    return {
        "categories": kinds,
        "best": found,
        "most": rows["score"].max() or 0.0,
        "address": url("/queries/top-heads", {"k": 1, **variant}),
    }
