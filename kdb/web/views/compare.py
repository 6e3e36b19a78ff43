"""The page on which models are compared side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdb.queries.catalogue import find_query
from kdb.web.templates import url
from kdb.web.views.parts import UrlParams, asked, chart, choices, known, studies, without_empty

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


def compare(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return curves and rankings of several models, of the chosen datasets and categories."""
    offered = choices(wh)
    models = url_params.many("model") or offered["model"][:4]
    known(wh, models)
    chosen = {"model": models, "dataset": url_params.many("dataset"), "category": url_params.many("category")}
    measured = studies(wh, models)
    concept = [name for name in measured["concept"] if not chosen["dataset"] or name in chosen["dataset"]]
    charts, further, tables, beside = [], [], [], []
    if concept:
        about = {"model": models, "dataset": concept}
        charts += [chart("depth-by-family", {**about, "size": 1, "within": 1e6}, "Accuracy by depth, all models")]
        further += [chart("depth-by-size", about), chart("converging-by-size", about)]
        depth = {**about, "site": "resid_post"}
        tables.append(asked(wh, "concept-depth", depth, title="Depth of each concept", folded=True))
    if measured["knowledge"]:
        about = {"model": models, "category": chosen["category"]}
        charts.append(chart("attention-vs-ffn", about))
        (charts if chosen["category"] else further).append(chart("layer-scores", about))
        beside = [_beside(wh, "top-layers", "layer_name", about), _beside(wh, "top-heads", "head_name", about)]
    return {
        "title": "Compare",
        "choices": {name: offered[name] for name in ("model", "category")} | {"dataset": measured["concept"]},
        "chosen": chosen,
        "models": models,
        "charts": charts,
        "further": further,
        "tables": tables,
        "beside": beside,
    }


def _beside(wh: Warehouse, query: str, item: str, about: dict[str, Any]) -> dict[str, Any]:
    """Return the five best items of each dataset and category, with a column for each model."""
    rows = wh.query(query, k=5, **without_empty(about)).to_dicts()
    ranked: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        group = ranked.setdefault((row["dataset"], row["category"]), {})
        group.setdefault(row["rank"], {})[row["model"]] = row
    return {
        "title": find_query(query).title,
        "item": item,
        "groups": ranked,
        "most": max((row["score"] for row in rows), default=0.0),
        "address": url(f"/queries/{query}", about),
    }
