"""Search for everything that has a name: models, datasets, categories, parts, tokens, prompts and queries."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from kdb.analysis.style import look_of
from kdb.queries.catalogue import load_catalogue
from kdb.web.templates import token, url
from kdb.web.views.parts import UrlParams, categories

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

_MOST = 24
"""Maximum number of results of each kind."""
_LONGEST = 200
"""Maximum number of characters to search for."""


class Found(NamedTuple):
    """One result: its name, its page, and a few words about it."""

    name: str
    address: str
    about: str = ""


def search(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return what has the text of ``q`` in its name or text, by kind."""
    wanted = (url_params.one("q") or "").strip()[:_LONGEST]
    kinds: dict[str, list[Found]] = {}
    if wanted:
        kinds = {
            "Models": _named(look_of(wh).models, wanted, "model"),
            "Datasets": _named(_datasets(wh), wanted, "dataset"),
            "Categories": _named(categories(wh), wanted, "category"),
            "Layers, heads and neurons": _parts(wh, wanted),
            "Neurons by the tokens that they raise": _by_token(wh, wanted),
            "Prompts": _prompts(wh, wanted),
            "Saved queries": _queries(wanted),
        }
    return {
        "title": "Search",
        "wanted": wanted,
        "kinds": {kind: found for kind, found in kinds.items() if found},
        "most": _MOST,
    }


def _named(names: tuple[str, ...] | list[str], wanted: str, kind: str) -> list[Found]:
    return [Found(name, url(f"/{kind}", {kind: name})) for name in names if wanted.lower() in name.lower()]


def _datasets(wh: Warehouse) -> list[str]:
    return wh.sql("SELECT DISTINCT dataset FROM runs ORDER BY dataset")["dataset"].to_list()


_PART = re.compile(r"(?P<kind>[af]?)(?P<layer>\d{1,4})(\.(?P<within>\d{1,4}))?(_(?P<neuron>\d{1,7}))?")
_SIZES = """
SELECT model, max(n_layers) AS n_layers, max(n_heads) AS a, max(n_experts) AS f
FROM models
LEFT JOIN (
    SELECT model, dataset, run, max(expert) + 1 AS n_experts FROM experts GROUP BY ALL
) USING (model, dataset, run)
GROUP BY model
ORDER BY model
"""
"""Numbers of layers of each model, and of heads in its attention (a) and of experts in its FFN (f)."""


def _parts(wh: Warehouse, wanted: str) -> list[Found]:
    """Return the part of each model that has this name, if the model is large enough."""
    match = _PART.fullmatch(wanted.lower())
    if match is None or not (match["kind"] or match["within"]):
        return []
    kind, within, neuron = match["kind"] or "a", match["within"], match["neuron"]
    found = []
    for row in wh.sql(_SIZES).to_dicts():
        if int(match["layer"]) >= row["n_layers"] or (within is not None and int(within) >= (row[kind] or 0)):
            continue
        if neuron is not None:
            address = url("/neuron", model=row["model"], neuron=wanted.lower())
        elif within is not None and kind == "a":
            address = url("/head", model=row["model"], layer=match["layer"], head=within)
        else:
            address = url("/layer", model=row["model"], layer=match["layer"])
        found.append(Found(wanted.lower(), address, row["model"]))
    return found


_BY_TOKEN = f"""
SELECT
    model, neuron_name(component, layer, head, expert, neuron) AS name, arg_min(token, rank) AS token,
    min(rank) AS rank
FROM neuron_tokens
JOIN current_runs USING (model, dataset, run)
WHERE table_name = 'neuron_tokens' AND variant = 'default' AND sign = 'top' AND contains(lower(token), lower($wanted))
GROUP BY ALL
ORDER BY bool_or(lower(trim(token)) = lower($wanted)) DESC, rank, model, name
LIMIT {_MOST}
"""


def _by_token(wh: Warehouse, wanted: str) -> list[Found]:
    rows = wh.sql(_BY_TOKEN, {"wanted": wanted}).to_dicts()
    return [
        Found(
            row["name"],
            url("/neuron", model=row["model"], neuron=row["name"]),
            f"“{token(row['token'])}”, rank {row['rank']}, in {row['model']}",
        )
        for row in rows
    ]


_PROMPTS = f"""
SELECT min(model) AS model, dataset, prompt_id, text, any_value(target_token) AS target_token
FROM prompts
WHERE contains(lower(text), lower($wanted)) OR lower(trim(coalesce(target_token, ''))) = lower($wanted)
GROUP BY dataset, prompt_id, text
ORDER BY any_value(kept) IS NULL, dataset, prompt_id
LIMIT {_MOST}
"""


def _prompts(wh: Warehouse, wanted: str) -> list[Found]:
    rows = wh.sql(_PROMPTS, {"wanted": wanted}).to_dicts()
    return [
        Found(
            row["text"],
            url("/prompt", model=row["model"], dataset=row["dataset"], prompt=row["prompt_id"]),
            row["dataset"] if row["target_token"] is None else f"→ “{row['target_token'].strip()}”, {row['dataset']}",
        )
        for row in rows
    ]


def _queries(wanted: str) -> list[Found]:
    return [
        Found(saved.name, f"/queries/{saved.name}", saved.title)
        for saved in load_catalogue().values()
        if wanted.lower() in f"{saved.name} {saved.title}".lower()
    ][:_MOST]
