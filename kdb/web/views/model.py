"""Pages of a model, and of one layer of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from kdb.errors import QueryError
from kdb.warehouse.schema import TABLES
from kdb.web.views.parts import (
    IN_NAME,
    Shown,
    UrlParams,
    asked,
    categories,
    chart,
    has,
    known,
    shown,
    studies,
    variant_of,
)

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


def model(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return both studies of a model, its structure, where it comes from, and the checks of its runs."""
    name = url_params.needed("model")
    known(wh, [name])
    chosen = {"dataset": url_params.many("dataset"), "category": url_params.many("category")}
    measured = studies(wh, [name])
    structure = _structure(wh, name)
    concept = [one for one in measured["concept"] if not chosen["dataset"] or one in chosen["dataset"]]
    return {
        "title": name,
        "model": name,
        "structure": structure,
        "anatomy": _anatomy(structure),
        "choices": {
            "dataset": measured["concept"],
            "category": categories(wh) if measured["knowledge"] else [],
        },
        "chosen": chosen,
        "concept": _concept(wh, name, concept) if concept else None,
        "knowledge": _knowledge(wh, name, chosen["category"]) if measured["knowledge"] else None,
        "checks": asked(wh, "checks", {"model": [name]}, drop=["model"], title="Checks of its runs"),
        "runs": asked(wh, "runs", {"model": [name]}, drop=["model"], title="Its runs"),
    }


def _structure(wh: Warehouse, name: str) -> dict[str, Any]:
    one = "SELECT * FROM {} WHERE model = $model ORDER BY run LIMIT 1"
    rows = [wh.sql(one.format(source), {"model": name}) for source in ("current.models", "models")]
    return next(frame for frame in rows if len(frame)).to_dicts()[0]


def _anatomy(structure: dict[str, Any]) -> list[tuple[str, Any, str, str]]:
    described = {column.name: (column.comment, column.info["symbol"]) for column in TABLES["models"].columns}
    return [(name, structure[name], comment or "", symbol) for name, (comment, symbol) in described.items()]


def _concept(wh: Warehouse, name: str, datasets: list[str]) -> dict[str, Any]:
    variant = variant_of(wh, [name], "concept")
    about = {"model": [name], "dataset": datasets, **variant}
    projected = [one for one in datasets if has(wh, "projections", model=name, dataset=one)]
    return {
        "charts": [chart(one, about) for one in ("depth-curves", "depth-measures")],
        "hidden": [
            chart(
                "hidden-states", {"model": [name], "dataset": [one], **variant}, f"Positions of {one}, layer by layer"
            )
            for one in projected
        ],
        "table": asked(wh, "concept-depth", {**about, "site": "resid_post"}, drop=["model"], folded=True),
    }


def _knowledge(wh: Warehouse, name: str, wanted: list[str]) -> dict[str, Any]:
    about = {"model": [name], "category": wanted, **variant_of(wh, [name], "knowledge")}
    effects = has(wh, "effects", model=name)
    figures = ["layer-scores", "head-map", *["effect-map"] * effects]
    further = ["top-layers", "top-heads", "neurons-by-layer", *["layer-effect-map", "score-vs-effect"] * effects]
    further += ["answer-by-layer"] * has(wh, "lens_readouts", model=name)
    experts = has(wh, "expert_scores", model=name)
    figures += ["expert-map"] * experts
    tables = [asked(wh, "head-effects", {**about, "k": 5}, drop=["model"], folded=True)] if effects else []
    tables.append(asked(wh, "top-neurons", {**about, "k": 3}, drop=["model", "bottom_tokens", *IN_NAME]))
    if experts:
        tables.append(asked(wh, "top-experts", {**about, "k": 3}, drop=["model", *IN_NAME]))
    tables.append(asked(wh, "prompts", {**about, "k": 3}, drop=["model", "answer"]))
    charts, more = ([chart(one, about) for one in names] for names in (figures, further))
    return {"charts": charts, "further": more, "tables": tables}


# One layer -------------------------------------------------------------------------------------------------------


def layer(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return what one layer of a model contributes, with its heads and neurons, and what is known at its end."""
    name, number = url_params.needed("model"), url_params.integer("layer")
    known(wh, [name])
    n_layers = _structure(wh, name)["n_layers"]
    if number >= n_layers:
        raise QueryError(f"layer {number}: {name} has the layers 0 to {n_layers - 1}.")
    measured = studies(wh, [name])
    here = pl.col("layer") == number
    tables: list[Shown] = []
    heads: dict[str, Any] | None = None
    if measured["knowledge"]:
        about = {"model": [name], "k": 1_000_000}
        scores = wh.query("top-layers", **about).filter(here)
        tables.append(shown("top-layers", about, scores, ["model", "layer", "component"], _OF_LAYER))
        heads = _heads(wh, name, number)
        tables.append(_neurons(wh, name, number))
        about = {"model": [name], "k": 3}
        routed = wh.query("router-by-category", **about).filter(here)
        if len(routed):
            tables.append(shown("router-by-category", about, routed, ["model", *IN_NAME]))
    if measured["concept"]:
        accuracy = wh.query("layer-accuracy", model=[name]).filter(here)
        tables.append(shown("layer-accuracy", {"model": [name]}, accuracy.select(_ACCURACY), title=_AT_ITS_END))
    return {
        "title": f"Layer {number} of {name}",
        "model": name,
        "number": number,
        "n_layers": n_layers,
        "heads": heads,
        "tables": tables,
    }


_AT_ITS_END = "Accuracy of the probes at its end"
_ACCURACY = (
    "dataset",
    "n_test",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "auc",
    "auc_low",
    "auc_high",
    "baseline_accuracy",
)
_OF_LAYER = "Contribution of its attention and FFN to each kind of knowledge"


def _heads(wh: Warehouse, name: str, number: int) -> dict[str, Any]:
    """Return the mean score of each head of the layer in each category."""
    rows = wh.query("top-heads", model=[name], k=1_000_000).filter(layer=number)
    return {
        "heads": sorted(set(rows["head"])),
        "categories": [one for one in categories(wh) if one in set(rows["category"])],
        "scores": {(row["category"], row["head"]): row for row in rows.to_dicts()},
        "most": rows["score"].abs().max() or 0.0,
    }


def _neurons(wh: Warehouse, name: str, number: int) -> Shown:
    about = {"model": [name], "k": 300}
    rows = wh.query("top-neurons", **about)
    of_layer = rows.filter(layer=number).group_by("dataset", "category", "component", maintain_order=True).head(3)
    drop = ["model", "bottom_tokens", *IN_NAME]
    return shown("top-neurons", about, of_layer, drop, f"Its neurons among the {about['k']} best of a category")
