"""The content of each page, queried from a snapshot of the warehouse."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import polars as pl

from kdb.analysis.captions import CAVEAT, EFFECTS, FEW, MEANS, READOUTS
from kdb.analysis.effects import effects_by_prompt, heads_with_effects, mean_effects
from kdb.analysis.figures import FIGURES
from kdb.analysis.figures import frame as numbers_of_figure
from kdb.analysis.style import look_of
from kdb.errors import EngineError, KdbError, QueryError, UnknownNameError
from kdb.queries.catalogue import bind, find_query, load_catalogue
from kdb.queries.domains import EFFECT_METHODS
from kdb.warehouse.notes import noted
from kdb.warehouse.paging import column_types
from kdb.warehouse.schema import PARTITIONS, TABLES, sql_type
from kdb.warehouse.statements import public_message
from kdb.web.cells import rows_of_page
from kdb.web.templates import render_template, url

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

PAGE_ROWS = 100
"""Maximum rows of a table that a page shows."""


@dataclass(frozen=True)
class UrlParams:
    """The values in a page's query string."""

    values: Mapping[str, Sequence[str]]

    def one(self, name: str) -> str | None:
        """Return the value of that name, or None."""
        return self.values.get(name, [None])[0]

    def many(self, name: str) -> list[str]:
        """Return all values of that name."""
        return list(self.values.get(name, []))

    def needed(self, name: str) -> str:
        """Return the value of that name. Raises QueryError if there is none."""
        value = self.one(name)
        if value is None:
            raise QueryError(f"{name} is missing. Add it to the address, as in ?{name}=…")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Return the value of that name as a number from 0."""
        text = self.needed(name) if default is None else self.one(name) or str(default)
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise QueryError(f"{name}: expected a number from 0, found {text!r}")
        return int(text)

    def only(self, *names: str) -> dict[str, list[str]]:
        """Return the values of those names that have any."""
        return {name: list(self.values[name]) for name in names if name in self.values}


@dataclass(frozen=True)
class Shown:
    """A table on a page: title, rows, the address of its query, a note beside its rows, and a sentence without rows."""

    title: str
    columns: list[str]
    rows: list[dict[str, Any]]
    address: str | None = None
    note: str = ""
    empty: str = "Nothing is stored."


@dataclass(frozen=True)
class Charted:
    """A chart on a page: its title, and the addresses of its Vega-Lite and its numbers."""

    title: str
    spec: str
    numbers: str


def render(wh: Warehouse, name: str, url_params: dict[str, list[str]]) -> str:
    """Return the HTML of a page. Raises KdbError if the address has a name that does not exist."""
    notes: list[str] = []
    with noted(notes):
        context = VIEWS[name](wh, UrlParams(url_params))
    return render_template(f"{name}.html.j2", **context, notes=notes)


# Parts of pages --------------------------------------------------------------------------------------------------


def _asked(wh: Warehouse, name: str, params: Mapping[str, Any], *, drop: Sequence[str] = (), title: str = "") -> Shown:
    """Return the answer of a saved query as a table, without the columns that the page shows elsewhere."""
    return _shown(name, _without_empty(params), wh.query(name, **_without_empty(params)), drop, title)


def _ranked(wh: Warehouse, name: str, params: Mapping[str, Any], *, drop: Sequence[str] = ()) -> Shown:
    """Return the numbers of the figure of that name: the answer of the saved query with its intervals."""
    chosen = _without_empty(params)
    return _shown(name, chosen, numbers_of_figure(wh, name, **chosen), drop)


def _shown(
    name: str,
    chosen: Mapping[str, Any],
    rows: pl.DataFrame,
    drop: Sequence[str],
    title: str = "",
    empty: str = Shown.empty,
) -> Shown:
    columns = [column for column in rows.columns if column not in drop]
    of_means = {"n_prompts", "score"} <= set(columns) and "prompt_id" not in columns
    notes = [CAVEAT] * ("jump_percent" in columns) + [MEANS] * of_means
    notes += [f"low and high: 95 % interval over prompts; {FEW}."] * ("low" in columns)
    address = url(f"/queries/{name}", chosen)
    return Shown(title or find_query(name).title, columns, rows.to_dicts(), address, " ".join(notes), empty)


def _chart(name: str, params: Mapping[str, Any]) -> Charted:
    chosen = _without_empty(params)
    figure = FIGURES[name]
    own = {param.name for param in (*figure.drawing, *figure.counting)}
    numbers = {key: value for key, value in chosen.items() if key not in own}
    return Charted(figure.title, url(f"/charts/{name}", chosen), url(f"/queries/{figure.query}", numbers))


def _without_empty(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that have a value."""
    return {key: value for key, value in params.items() if value not in (None, [])}


def _choices(wh: Warehouse) -> dict[str, list[str]]:
    """Return the choices of a form for parameters whose values are stored in the warehouse."""
    look = look_of(wh)
    categories = wh.sql("SELECT DISTINCT category FROM prompts WHERE category IS NOT NULL")["category"].to_list()
    stored = set(wh.sql("SELECT DISTINCT dataset FROM runs")["dataset"])
    variants = wh.sql("SELECT DISTINCT variant FROM runs ORDER BY variant")["variant"].to_list()
    return {
        "model": list(look.models),
        "dataset": [name for name in look.datasets if name in stored],
        "category": look.order("category", categories),
        "variant": variants,
    }


def _studies(wh: Warehouse, models: Sequence[str]) -> dict[str, list[str]]:
    """Return the datasets of each study on which any of the models was measured."""
    frame = wh.sql(
        "SELECT DISTINCT study, dataset FROM runs WHERE list_contains($models, model) ORDER BY ALL",
        {"models": list(models)},
    )
    return {
        study: [r["dataset"] for r in frame.to_dicts() if r["study"] == study] for study in ("concept", "knowledge")
    }


def _projected(wh: Warehouse, model: str) -> list[str]:
    """Return the datasets whose hidden states were projected."""
    text = "SELECT DISTINCT dataset FROM current_runs WHERE table_name = 'projections' AND model = $model ORDER BY ALL"
    return wh.sql(text, {"model": model})["dataset"].to_list()


def _known(wh: Warehouse, names: Sequence[str]) -> None:
    stored = wh.sql("SELECT DISTINCT model FROM models")["model"].to_list()
    for name in names:
        if name not in stored:
            raise UnknownNameError("model", name, stored, "The home page lists all stored models.")


# Pages -----------------------------------------------------------------------------------------------------------


def _home(wh: Warehouse, _: UrlParams) -> dict[str, Any]:
    look = look_of(wh)
    measured = wh.sql(
        "SELECT study, dataset, model, count(*) AS n_runs, max(n_prompts) AS n_prompts, "
        "strftime(max(finished_at), '%Y-%m-%d %H:%M') AS finished "
        "FROM runs JOIN datasets USING (model, dataset, run, study) GROUP BY ALL ORDER BY ALL"
    ).to_dicts()
    cells = {(row["study"], row["dataset"], row["model"]): row for row in measured}
    datasets = {(study, dataset) for study, dataset, _ in cells}
    order = {name: position for position, name in enumerate(look.datasets)}
    columns = sorted(datasets, key=lambda key: (key[0], order.get(key[1], len(order)), key[1]))
    counted = " UNION ALL ".join(f"SELECT '{name}' AS table_name, count(*) AS n FROM {name}" for name in TABLES)
    rows = {row["table_name"]: row["n"] for row in wh.sql(counted).to_dicts()}
    structure = wh.sql(
        "SELECT model, any_value(family) AS family, any_value(n_params) AS n_params, any_value(n_layers) AS n_layers, "
        "any_value(coalesce(quantization, weights_dtype)) AS weights, any_value(instruct) AS instruct "
        "FROM models GROUP BY model"
    ).to_dicts()
    return {
        "title": "Measured",
        "models": look.models,
        "structure": {row["model"]: row for row in structure},
        "columns": columns,
        "cells": cells,
        "rows": [(name, n, TABLES[name].comment) for name, n in rows.items() if n],
        "runs": _asked(wh, "runs", {}, title="When"),
    }


def _model(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    model = url_params.needed("model")
    _known(wh, [model])
    chosen = {"dataset": url_params.many("dataset"), "category": url_params.many("category")}
    studies = _studies(wh, [model])
    one = "SELECT * FROM {} WHERE model = $model ORDER BY run LIMIT 1"
    shown = [wh.sql(one.format(table), {"model": model}) for table in ("current.models", "models")]
    structure = next(frame for frame in shown if len(frame)).to_dicts()[0]
    descriptions = {column.name: (column.comment, column.info["symbol"]) for column in TABLES["models"].columns}
    charts, tables = [], []
    if concept := [name for name in studies["concept"] if not chosen["dataset"] or name in chosen["dataset"]]:
        charts += [_chart(name, {"model": [model], "dataset": concept}) for name in ("depth-curves", "depth-measures")]
        charts += [
            _chart("hidden-states", {"model": [model], "dataset": [name]})
            for name in _projected(wh, model)
            if name in concept
        ]
        tables.append(_asked(wh, "concept-depth", {"model": [model], "dataset": concept}, drop=["model"]))
    if studies["knowledge"]:
        about = {"model": [model], "category": chosen["category"]}
        of_scores = ("layer-scores", "top-layers", "top-heads", "head-map", "neurons-by-layer")
        of_effects = ("effect-map", "layer-effect-map", "score-vs-effect") if _has_effects(wh, model) else ()
        charts += [_chart(name, about) for name in (*of_scores, *of_effects)]
        tables += [_ranked(wh, name, {**about, "k": 5}, drop=["model"]) for name in ("top-layers", "top-heads")]
        if of_effects:
            tables.append(_asked(wh, "head-effects", {**about, "k": 5}, drop=["model"]))
        tables.append(_asked(wh, "top-neurons", {**about, "k": 2}, drop=["model", "bottom_tokens"]))
        tables.append(_asked(wh, "prompts", {**about, "k": 3}, drop=["model"]))
    return {
        "title": model,
        "model": model,
        "summary": f"{structure['architecture']}, {structure['n_layers']} layers of {structure['n_heads']} heads "
        f"and {_counted(structure['intermediate_size'])} neurons, hidden size {_counted(structure['hidden_size'])}; "
        f"weights {structure['quantization'] or structure['weights_dtype'] or 'in an unknown format'}"
        f"{', instruction-tuned' * bool(structure['instruct'])}",
        "structure": [(name, structure[name], *descriptions[name]) for name in descriptions],
        "choices": {
            "dataset": studies["concept"],
            "category": _choices(wh)["category"] if studies["knowledge"] else [],
        },
        "chosen": chosen,
        "charts": charts,
        "tables": tables,
        "runs": _asked(wh, "runs", {"model": [model]}),
    }


def _has_effects(wh: Warehouse, model: str) -> bool:
    asked = "SELECT count(*) AS n FROM current_runs WHERE model = $model AND table_name = 'effects'"
    return bool(wh.sql(asked, {"model": model})["n"].item())


def _counted(number: int | None) -> str:
    """Write a size of a model, which some files do not say."""
    return "unknown" if number is None else f"{number:,}"


def _compare(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    choices = _choices(wh)
    models = url_params.many("model") or choices["model"][:4]
    _known(wh, models)
    chosen = {"model": models, "dataset": url_params.many("dataset"), "category": url_params.many("category")}
    studies = _studies(wh, models)
    concept = [name for name in studies["concept"] if not chosen["dataset"] or name in chosen["dataset"]]
    charts, tables, beside = [], [], []
    if concept:
        about = {"model": models, "dataset": concept}
        charts += [_chart("depth-by-size", about), _chart("converging-by-size", about)]
        tables.append(_asked(wh, "concept-depth", {**about, "site": "resid_post"}, title="Depth of each concept"))
    if studies["knowledge"]:
        about = {"model": models, "category": chosen["category"]}
        charts += [_chart("layer-scores", about), _chart("attention-vs-ffn", about)]
        beside = [_beside(wh, "top-layers", "layer_name", about), _beside(wh, "top-heads", "head_name", about)]
    return {
        "title": "Compare",
        "choices": {**choices, "dataset": studies["concept"], "variant": []},
        "chosen": chosen,
        "models": models,
        "charts": charts,
        "tables": tables,
        "beside": beside,
    }


def _beside(wh: Warehouse, query: str, item: str, about: dict[str, Any]) -> dict[str, Any]:
    """Return the five best items of each dataset and category, with a column for each model."""
    rows = wh.query(query, k=5, **_without_empty(about)).to_dicts()
    ranked: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        group = ranked.setdefault((row["dataset"], row["category"]), {})
        group.setdefault(row["rank"], {})[row["model"]] = row
    return {
        "title": find_query(query).title,
        "item": item,
        "groups": ranked,
        "address": url(f"/queries/{query}", about),
    }


def _prompt(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    about = url_params.only("model", "variant", "run")
    one = {name: values[0] for name, values in url_params.only("dataset", "variant", "run").items()}
    if url_params.one("prompt") is None:
        listed = _asked(wh, "prompts", {**url_params.only("model", "category"), **one, "k": 20}, drop=["answer"])
        choices = _choices(wh)
        kinds = ("model", "category")
        return {
            "title": "Prompts",
            "listed": listed,
            "choices": {kind: choices[kind] for kind in kinds},
            "chosen": {kind: url_params.many(kind) for kind in kinds},
            "story": None,
        }
    number = url_params.integer("prompt")
    asked = {"prompt": number, "model": about.get("model", []), **one}
    story = wh.query("prompt-story", **_without_empty(asked)).to_dicts()
    if not story:
        raise QueryError(
            "No such prompt, or it does not pass the filter: the model does not predict its answer. /prompt lists the "
            "prompts."
        )
    datasets = sorted({row["dataset"] for row in story})
    if len(datasets) > 1:
        raise QueryError(
            f"Prompt {number} exists in several datasets: {', '.join(datasets)}. Add one to the address, as in "
            f"&dataset={datasets[0]}"
        )
    measured = _add_effects(wh, story, asked)
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in story:
        parts.setdefault(f"{row['part']}, {row['model']}", []).append(row)
    columns = ["rank", "name", "position", "attention", "score", *_EFFECT_COLUMNS.values(), "tokens"]
    tables = [
        Shown(title, [c for c in columns if any(row[c] is not None for row in rows)], rows)
        for title, rows in parts.items()
    ]
    lens = wh.query("lens-story", **_without_empty(asked))
    last = lens.filter(pl.col("position") == pl.col("position").max())
    return {
        "title": f"Prompt {number}",
        "story": story[0],
        "charts": [_chart("prompt-story", asked), *([_chart("lens-map", asked)] if len(lens) else [])],
        "tables": tables,
        "effects": _MEAN_EFFECT if measured else EFFECTS,
        "lens": _shown("lens-story", _without_empty(asked), last, [*_OF_PROMPT, "rival_token"], empty=READOUTS),
        "address": url("/queries/prompt-story", asked),
        "next": url("/prompt", {**url_params.values, "prompt": [str(number + 1)]}),
        "before": url("/prompt", {**url_params.values, "prompt": [str(number - 1)]}) if number else None,
    }


_OF_PROMPT = ("model", "dataset", "text", "target_token")
"""Columns that are equal in all rows about a prompt."""

_EFFECT_COLUMNS = {"exact": "effect (exact)", "atp": "effect (atp)"}

_MEAN_EFFECT = (
    "An effect is the change of the answer's log-probability in nat when a part's output at the last token is replaced "
    "by its mean over other kept prompts of the category: measured (exact), or estimated from a gradient (atp)."
)


def _add_effects(wh: Warehouse, story: list[dict[str, Any]], asked: Mapping[str, Any]) -> bool:
    """Add each part's effects in this prompt to its row of the story; return whether there are any."""
    chosen = {name: value for name, value in _without_empty(asked).items() if name != "prompt"}
    found: dict[tuple[Any, ...], float] = {}
    for method in _EFFECT_COLUMNS:
        rows = effects_by_prompt(wh, **chosen, effect_method=method).filter(prompt_id=asked["prompt"])
        for row in rows.iter_rows(named=True):
            found[(method, row["model"], row["component"], row["layer"], row["head"], row["neuron"])] = row["logp"]
    for row in story:
        part = {"head": "head", "layer": row["component"], "ffn value neuron": "ffn_neuron"}.get(row["part"])
        key = (row["model"], part, row["layer"], row["head"], row["neuron"])
        row |= {column: found.get((method, *key)) for method, column in _EFFECT_COLUMNS.items()}
    return bool(found)


def _hidden(url_params: UrlParams, *columns: str) -> list[str]:
    """Return the columns with the same value in all rows of a page; includes the model if there is only one."""
    return [*columns, "model"] if len(url_params.many("model")) == 1 else list(columns)


def _neuron(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    about = url_params.only("model", "category") | {
        k: v[0] for k, v in url_params.only("dataset", "variant", "run").items()
    }
    asked = {"neuron": url_params.needed("neuron"), **about}
    drop = _hidden(url_params, "neuron_name")
    tables = [
        _asked(wh, "neuron-by-category", asked, drop=drop),
        _asked(wh, "neuron-in-prompts", asked | {"k": 20}, drop=drop),
    ]
    tokens = {key: value for key, value in asked.items() if key in ("neuron", "model", "variant", "run")}
    tables.insert(1, _asked(wh, "neuron-tokens", tokens, drop=drop))
    tables += _effects_of_neuron(wh, asked, drop)
    if not any(table.rows for table in tables):
        raise QueryError(
            f"{asked['neuron']}: not stored with any prompt. Names of neurons are like f29_1234 or a23.12_45."
        )
    return {"title": f"Neuron {asked['neuron']}", "models": url_params.many("model"), "tables": tables}


def _effects_of_neuron(wh: Warehouse, asked: Mapping[str, Any], drop: Sequence[str]) -> list[Shown]:
    """Return the mean effects of an FFN neuron by category; nothing if it was never replaced."""
    layer, _, number = asked["neuron"].removeprefix("f").partition("_")
    if not asked["neuron"].startswith("f"):
        return []
    chosen = {name: value for name, value in asked.items() if name != "neuron"}
    shown = ("model", "dataset", "category", "logp", "logit_diff", "kl", "n_prompts")
    frames = [
        mean_effects(wh, **chosen, effect_method=method)
        .filter(component="ffn_neuron", layer=int(layer), neuron=int(number))
        .select(*shown, effect_method=pl.lit(method))
        for method in EFFECT_METHODS
    ]
    rows = pl.concat(frames).sort("model", "dataset", "category")
    columns = [name for name in rows.columns if name not in drop]
    return [Shown("Effect of replacing the neuron", columns, rows.to_dicts(), note=_MEAN_EFFECT)] if len(rows) else []


def _beside_effects(wh: Warehouse, asked: Mapping[str, Any], drop: Sequence[str]) -> Shown:
    """Return the head's score in each category, with its effects beside."""
    scores = wh.query("head-by-category", **asked)
    chosen = {name: value for name, value in asked.items() if name not in ("layer", "head")}
    both = heads_with_effects(wh, scores, **chosen)
    stored = [name for name in ("logp_exact", "logp_atp") if both[name].count()]
    both = both.select(*(name for name in both.columns if not name.startswith("logp_") or name in stored))
    shown = _shown("head-by-category", asked, both, drop)
    return replace(shown, note=f"{shown.note} {_LOGP if stored else EFFECTS}")


_LOGP = f"logp_exact and logp_atp are mean effects. {_MEAN_EFFECT}"


def _head(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    about = url_params.only("model", "category") | {
        k: v[0] for k, v in url_params.only("dataset", "variant", "run").items()
    }
    asked = {"layer": url_params.integer("layer"), "head": url_params.integer("head"), **about}
    drop = _hidden(url_params, "head_name", "layer", "head")
    tables = [_asked(wh, name, asked, drop=drop) for name in ("position-attention", "head-in-prompts")]
    tables.insert(0, _beside_effects(wh, asked, drop))
    title = f"a{asked['layer']}.{asked['head']}"
    if not any(table.rows for table in tables):
        raise QueryError(f"{title}: not stored with any prompt. Check the numbers of layer and head, counted from 0.")
    return {"title": f"Head {title}", "models": url_params.many("model"), "tables": tables}


def _queries(_: Warehouse, __: UrlParams) -> dict[str, Any]:
    groups: dict[str, list[Any]] = {}
    for saved in load_catalogue().values():
        groups.setdefault(saved.group.capitalize(), []).append(saved)
    return {"title": "Queries", "groups": groups}


def _query(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    saved = find_query(url_params.needed("name"))
    names = [param.name for param in saved.params]
    chosen: dict[str, Any] = {
        param.name: url_params.many(param.name) if param.type == "texts" else url_params.one(param.name)
        for param in saved.params
        if url_params.many(param.name)
    }
    context: dict[str, Any] = {
        "title": saved.title,
        "saved": saved,
        "url_params": url_params,
        "choices": _choices(wh),
        "charts": [],
        "chosen": chosen,
        "problem": None,
        "answer": None,
    }
    try:
        bind(
            saved.name,
            saved.params,
            {**chosen, **{n: "" for n in url_params.values if n not in (*names, "page", "name")}},
        )
        context |= _found(
            lambda: wh.opened.public_query(saved.name, **chosen), url_params, f"/queries/{saved.name}", chosen
        )
    except KdbError as error:
        asked_nothing = not chosen and any(param.required for param in saved.params)
        return context | {"problem": None if asked_nothing else str(error)}
    # A figure with its own defaults shows other rows than these.
    fitting = [figure for figure in FIGURES.values() if figure.query == saved.name and not figure.defaults]
    drawn = fitting if context["answer"].rows else []
    context["charts"] = [_chart(figure.name, chosen) for figure in drawn]
    return context | {"downloads": [(f, url(f"/api/queries/{saved.name}", chosen, format=f)) for f in _DOWNLOADS]}


_DOWNLOADS = ("csv", "json", "parquet", "arrow")


def _found(ask: Callable[[], Any], url_params: UrlParams, path: str, params: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of one page of an answer, the time it took, and the addresses of the pages before and after."""
    page = max(1, url_params.integer("page", 1))
    begun = time.perf_counter()
    names, rows, more = rows_of_page(ask(), (page - 1) * PAGE_ROWS, PAGE_ROWS)
    return {
        "answer": Shown("Answer", names, [dict(zip(names, row, strict=True)) for row in rows]),
        "cells": rows,
        "first": (page - 1) * PAGE_ROWS + 1,
        "took": time.perf_counter() - begun,
        "previous": url(path, params, page=page - 1) if page > 1 else None,
        "following": url(path, params, page=page + 1) if more else None,
    }


_EXAMPLE = "SELECT model, dataset, layer, accuracy\nFROM current.probe_scores\nWHERE site = 'resid_post'\nORDER BY ALL"


def _sql(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    text = url_params.one("q")
    context: dict[str, Any] = {
        "title": "SQL",
        "text": text or "",
        "problem": None,
        "answer": None,
        "tables": {name: column_types(name) for name in TABLES},
        "example": _EXAMPLE,
    }
    if text is None:
        return context
    try:
        context |= _found(lambda: wh.opened.public_sql(text), url_params, "/sql", {"q": text})
    except EngineError:
        raise
    except QueryError as error:
        if str(error).startswith("Out of Memory"):
            raise
        return context | {"problem": public_message(str(error), wh.storage.local.lake, text)}
    return context | {"downloads": [(f, url("/api/sql", sql=text, format=f)) for f in _DOWNLOADS]}


def _schema(_: Warehouse, __: UrlParams) -> dict[str, Any]:
    return {"title": "Schema", "partitions": PARTITIONS, "tables": TABLES, "sql_type": sql_type}


VIEWS: dict[str, Callable[[Warehouse, UrlParams], dict[str, Any]]] = {
    "home": _home,
    "model": _model,
    "compare": _compare,
    "prompt": _prompt,
    "neuron": _neuron,
    "head": _head,
    "queries": _queries,
    "query": _query,
    "sql": _sql,
    "schema": _schema,
}
