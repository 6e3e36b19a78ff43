"""Pages of prompts: a list, a prompt of the knowledge study, and a labelled text with each layer's verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from kdb.analysis.captions import EFFECTS, READOUTS
from kdb.analysis.effects import effects_by_prompt
from kdb.analysis.style import look_of
from kdb.errors import QueryError
from kdb.web.templates import url
from kdb.web.views.parts import Shown, UrlParams, asked, chart, choices, shown, table, without_empty
from kdb.web.ways import ways_to_ask

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


def prompt(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    """Return the list of prompts, or one of them."""
    if url_params.one("prompt") is None:
        return _list(wh, url_params)
    about = url_params.run_of() | {"prompt": url_params.integer("prompt")}
    labelled = _labelled(wh, about)
    if labelled:
        return _verdicts(wh, url_params, about, labelled)
    story = wh.query("prompt-story", **about).to_dicts()
    if not story:
        raise QueryError(
            "No such prompt, or it does not pass the filter: the model does not predict its answer. /prompt lists the "
            "prompts."
        )
    _one_dataset({row["dataset"] for row in story}, about["prompt"])
    return _story(wh, url_params, about, story)


def _one_dataset(found: Iterable[str], number: int) -> None:
    """Raise QueryError if a prompt's number is that of prompts in several datasets."""
    datasets = sorted(found)
    if len(datasets) > 1:
        raise QueryError(
            f"Prompt {number} exists in several datasets: {', '.join(datasets)}. Add one to the address, as in "
            f"&dataset={datasets[0]}"
        )


def _list(wh: Warehouse, url_params: UrlParams) -> dict[str, Any]:
    about = url_params.run_of("category")
    offered, kinds = choices(wh), ("model", "category")
    return {
        "title": "Prompts",
        "template": "prompts",
        "listed": asked(wh, "prompts", {**about, "k": 20}, drop=["answer"]),
        "choices": {kind: offered[kind] for kind in kinds},
        "chosen": {kind: url_params.many(kind) for kind in kinds},
        "datasets": wh.sql("SELECT DISTINCT dataset FROM runs WHERE study = 'concept' ORDER BY ALL")[
            "dataset"
        ].to_list(),
    }


def _neighbours(url_params: UrlParams, number: int) -> dict[str, str | None]:
    return {
        "following": url("/prompt", {**url_params.values, "prompt": [str(number + 1)]}),
        "previous": url("/prompt", {**url_params.values, "prompt": [str(number - 1)]}) if number else None,
    }


# One prompt of the knowledge study -------------------------------------------------------------------------------

_PARTS = {
    "layer": "Layers",
    "head": "Heads",
    "head reads": "Tokens that heads read",
    "expert": "Experts",
    "ffn value neuron": "FFN neurons that add to the answer",
    "attn value neuron": "Attention neurons that add to the answer",
    "query neuron of attn": "FFN neurons that activate those in attention",
    "query neuron of ffn": "FFN neurons that activate those in the FFN",
}
"""Title of each part of a prompt's story."""


def _story(wh: Warehouse, url_params: UrlParams, about: dict[str, Any], story: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one prompt in one model: tokens and heads that read them, parts and effects, and the lens."""
    models = look_of(wh).order("model", {row["model"] for row in story})
    story = [row for row in story if row["model"] == models[0]]
    about |= {"model": [models[0]], "dataset": story[0]["dataset"]}
    measured = _add_effects(wh, story, about)
    lens = wh.query("lens-story", **about)
    number = about["prompt"]
    return {
        "title": f"Prompt {number}",
        "story": story[0],
        "models": models,
        "others": {name: url("/prompt", {**url_params.values, "model": [name]}) for name in _measured_on(wh, about)},
        "strip": _strip(_reads(wh, about), story[0]["text"]),
        "parts_": _parts(story, ways_to_ask("prompt-story", about), url("/queries/prompt-story", about)),
        "effects": MEAN_EFFECT if measured else EFFECTS,
        "routers": _routers(wh, about),
        "charts": [chart("lens-map", about, "First choice after each part of each block")] if len(lens) else [],
        "lens": _lens(about, lens),
        **_neighbours(url_params, number),
    }


def _measured_on(wh: Warehouse, about: Mapping[str, Any]) -> list[str]:
    """Return the models of which the prompt is stored and kept."""
    text = "SELECT DISTINCT model FROM prompts WHERE dataset = $dataset AND prompt_id = $prompt AND kept IS NOT false"
    rows = wh.sql(text, {"dataset": about["dataset"], "prompt": about["prompt"]})
    return look_of(wh).order("model", rows["model"])


def _parts(story: list[dict[str, Any]], ways: Any, address: str) -> list[Shown]:
    """Return a table for each part of the story, without columns that it does not have."""
    columns = ["name", "position", "attention", "score", *_EFFECT_COLUMNS.values(), "tokens"]
    found = []
    for part, title in _PARTS.items():
        rows = [row for row in story if row["part"] == part]
        own = [column for column in columns if any(row[column] is not None for row in rows)]
        if rows:
            found.append(Shown(title, own, rows, address=address, ways=ways))
    return found


_ROUTERS = """
SELECT layer, expert_name(layer, expert) AS expert_name, weight, probability, entropy
FROM router
JOIN routing USING (model, dataset, run, prompt_id, layer)
JOIN chosen_runs('router', $variant, $run) USING (model, dataset, run)
WHERE chosen AND model = $model AND dataset = $dataset AND prompt_id = $prompt
ORDER BY layer, rank
"""


def _routers(wh: Warehouse, about: Mapping[str, Any]) -> Shown | None:
    """Return the experts that the routers choose in a prompt; None in a model without experts."""
    rows = wh.sql(_ROUTERS, _of_story(about))
    return table("Experts that each layer's router chooses at the last token", rows, folded=True) if len(rows) else None


def _lens(about: Mapping[str, Any], lens: pl.DataFrame) -> Shown:
    """Return the readouts at the last position."""
    last = lens.filter(pl.col("position") == pl.col("position").max())
    return shown("lens-story", about, last, [*_OF_PROMPT, "rival_token"], empty=READOUTS, folded=True)


_OF_PROMPT = ("model", "dataset", "text", "target_token")
"""Columns that are equal in all rows about a prompt."""

_EFFECT_COLUMNS = {"exact": "effect (exact)", "atp": "effect (atp)"}

MEAN_EFFECT = (
    "An effect is the change of the answer's log-probability in nat when a part's output at the last token is replaced "
    "by its mean over other kept prompts of the category: measured (exact), or estimated from a gradient (atp)."
)
"""Explanation beside effects."""


def _add_effects(wh: Warehouse, story: list[dict[str, Any]], about: Mapping[str, Any]) -> bool:
    """Add each part's effects in this prompt to its row of the story; return whether there are any."""
    chosen = {name: value for name, value in without_empty(about).items() if name != "prompt"}
    found: dict[tuple[Any, ...], float] = {}
    for method in _EFFECT_COLUMNS:
        rows = effects_by_prompt(wh, **chosen, effect_method=method).filter(prompt_id=about["prompt"])
        for row in rows.iter_rows(named=True):
            found[(method, row["model"], row["component"], row["layer"], row["head"], row["expert"], row["neuron"])] = (
                row["logp"]
            )
    for row in story:
        part = {"head": "head", "layer": row["component"], "ffn value neuron": "ffn_neuron"}.get(row["part"])
        key = (row["model"], part, row["layer"], row["head"], row["expert"], row["neuron"])
        row |= {column: found.get((method, *key)) for method, column in _EFFECT_COLUMNS.items()}
    return bool(found)


# Tokens of a prompt ----------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A piece of a prompt's text; a ``position`` if it is a token that a stored head reads, with its reads."""

    text: str
    position: int | None = None
    total: float = 0.0
    reads: tuple[dict[str, Any], ...] = ()


class Strip(NamedTuple):
    """A prompt's text in pieces, the heads that read them, the largest sum of scores, and the largest score."""

    pieces: list[Piece]
    heads: list[str]
    most: float
    most_of_head: float


_READS = """
SELECT position, token, 'a' || layer || '.' || head AS head, attention, score
FROM head_position_scores
JOIN current_runs USING (model, dataset, run)
WHERE table_name = 'head_position_scores' AND model = $model AND dataset = $dataset AND prompt_id = $prompt
    AND CASE WHEN $run IS NULL THEN variant = $variant ELSE run = $run END
ORDER BY position, score DESC
"""


def _reads(wh: Warehouse, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each stored head reads at each position of a prompt."""
    return wh.sql(_READS, _of_story(about)).to_dicts()


def _of_story(about: Mapping[str, Any]) -> dict[str, Any]:
    params = {"model": about["model"][0], "dataset": about["dataset"], "prompt": about["prompt"]}
    return params | {"variant": about.get("variant", "default"), "run": about.get("run")}


def _strip(reads: list[dict[str, Any]], text: str) -> Strip:
    """Find the tokens in the text, and put the reads of the heads to them."""
    at: dict[int, list[dict[str, Any]]] = {}
    for row in reads:
        at.setdefault(row["position"], []).append(row)
    pieces, begun = [], 0
    for position, rows in at.items():
        token, total = rows[0]["token"] or "", sum(row["score"] for row in rows)
        found = text.find(token, begun) if token else -1
        if found > begun:
            pieces.append(Piece(text[begun:found]))
        begun = max(begun, found + len(token) if found >= 0 else begun)
        pieces.append(Piece(token, position, total, tuple(rows)))
    pieces += [Piece(text[begun:])] if begun < len(text) else []
    best: dict[str, float] = {}
    for row in reads:
        best[row["head"]] = best.get(row["head"], 0.0) + row["score"]
    heads = sorted(best, key=lambda head: -best[head])
    most = max((abs(piece.total) for piece in pieces), default=0.0)
    return Strip(pieces, heads, most, max((abs(row["score"]) for row in reads), default=0.0))


# One labelled text -----------------------------------------------------------------------------------------------

_LABELLED = (
    "SELECT model, dataset, run, text, label, n_tokens FROM prompts JOIN runs USING (model, dataset, run) "
    "WHERE study = 'concept' AND prompt_id = $prompt AND variant = $variant "
    "AND ($dataset IS NULL OR dataset = $dataset) ORDER BY finished_at DESC"
)
_VERDICTS = (
    "SELECT model, layer, predicted, correct FROM current.probe_predictions "
    "WHERE dataset = $dataset AND prompt_id = $prompt AND site = 'resid_post' ORDER BY model, layer"
)
_NEXT_TESTED = (
    "SELECT min(prompt_id) AS prompt_id FROM current.probe_predictions WHERE dataset = $dataset AND prompt_id > $prompt"
)
_ANSWERS = "SELECT * FROM current.zero_shot WHERE dataset = $dataset AND prompt_id = $prompt"
_BASELINES = (
    "SELECT DISTINCT baseline, predicted, correct FROM current.baseline_predictions "
    "WHERE dataset = $dataset AND prompt_id = $prompt ORDER BY ALL"
)


def _labelled(wh: Warehouse, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the labelled text of that number in each run; none if it is of the knowledge study."""
    params = {"prompt": about["prompt"], "dataset": about.get("dataset"), "variant": about.get("variant", "default")}
    rows = wh.sql(_LABELLED, params).to_dicts()
    if about.get("dataset") is None and wh.query("prompt-story", **about).height:
        return []
    _one_dataset({row["dataset"] for row in rows}, about["prompt"])
    return rows


def _verdicts(
    wh: Warehouse, url_params: UrlParams, about: dict[str, Any], stored: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what the probe of each layer of each model says of one labelled text."""
    one = {"dataset": stored[0]["dataset"], "prompt": about["prompt"]}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in wh.sql(_VERDICTS, one).to_dicts():
        found.setdefault(row["model"], []).append(row)
    answers = {row["model"]: row for row in wh.sql(_ANSWERS, one).to_dicts()}
    models = look_of(wh).order("model", {row["model"] for row in stored})
    lenses = [name for name in models if len(wh.query("lens-story", model=[name], **one))]
    baselines = wh.sql(_BASELINES, one)
    following = wh.sql(_NEXT_TESTED, one)["prompt_id"].item()
    return {
        "title": f"Text {about['prompt']} of {one['dataset']}",
        "template": "verdicts",
        "text": stored[0],
        "models": models,
        "verdicts": found,
        "answers": answers,
        "baselines": table("Predictors that need no model", baselines) if len(baselines) else None,
        "charts": [
            chart("lens-map", {**one, "model": [name]}, f"What {name} would say after each part") for name in lenses
        ],
        "address": url(
            "/tables/probe_predictions", filter=[f"dataset={one['dataset']}", f"prompt_id={about['prompt']}"]
        ),
        "tested": url("/prompt", {**one, "prompt": following}) if following is not None else None,
        **_neighbours(url_params, about["prompt"]),
    }
