"""The figures of both papers by name, each with its title, saved query and parameters.

    from kdb.analysis import figures

    wh = kdb.open("kdb-warehouse")
    figures.chart(wh, "depth-curves", model=["smollm2-135m"])    # an Altair chart
    figures.frame(wh, "depth-curves", model=["smollm2-135m"])    # its numbers, a Polars frame

A figure has the parameters of its saved query, and its own. Nothing here runs a model.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kdb.analysis.captions import CAVEAT, EFFECTS, FEW, READOUTS, sample
from kdb.errors import NothingFoundError, UnknownNameError
from kdb.queries.catalogue import Param, Value, bind, find_query, shared_param

if TYPE_CHECKING:
    import polars as pl

    from kdb.analysis.style import Chart
    from kdb.warehouse.store import Warehouse


@dataclass(frozen=True)
class Figure:
    """One figure.

    ``query`` is the saved query whose rows it draws. ``numbers`` and ``draw`` name functions of modules of this
    package: the first returns the frame if it needs more than these rows, the second the chart. ``defaults`` replaces
    the query's own; ``drawing`` are parameters of the chart, ``counting`` those of the frame. The figure does not take
    the query's parameters ``without``, since it shows each of their values. ``hint`` says what to do if there is
    nothing to draw.
    """

    name: str
    title: str
    marks: str
    query: str
    draw: str
    numbers: str | None = None
    defaults: Mapping[str, Value] | None = None
    drawing: tuple[Param, ...] = ()
    counting: tuple[Param, ...] = ()
    fixed: Mapping[str, Value] | None = None
    without: tuple[str, ...] = ()
    hint: str = "`kdb runs` lists what was measured."

    @property
    def params(self) -> tuple[Param, ...]:
        """Return the saved query's parameters, then its own."""
        defaults, own = self.defaults or {}, {p.name for p in self.counting} | set(self.without)
        asked = [p for p in find_query(self.query).params if p.name not in own]
        asked = [replace(p, default=defaults[p.name]) if p.name in defaults else p for p in asked]
        return (*asked, *self.counting, *self.drawing)


_METRIC = Param(
    "metric",
    "text",
    "accuracy",
    False,
    "metric to draw: accuracy, balanced_accuracy, f1, auc, selectivity or control_accuracy",
)
_SIZE = Param("size", "number", 7.0, False, "number of parameters, in billions")
_WITHIN = Param("within", "number", 1.5, False, "factor by which a model may be smaller or larger")

_BEST_LAYER = Param(
    "layer", "integer", None, False, "layer, from 0; defaults to the best one on each probe's own test part"
)

_POOL = shared_param("pool")

_PART = Param("part", "text", "head", False, "parts to draw: head, attn or ffn")

_J_AND_C = "\n".join(textwrap.wrap(CAVEAT, 100))

_DEPTH_MARKS = (
    "● best layer   □ depth_90   ▲ jump point J   ◇ converging point C   band: 95 % interval   "
    f"thin line: best baseline\n{_J_AND_C}"
)

_ALL = (
    Figure(
        "depth-curves",
        "Accuracy of the probe for each concept at every layer",
        "✚ the model's own answer, read from its output probabilities\n" + _DEPTH_MARKS,
        query="layer-accuracy",
        numbers="depth_measures.curves_with_answers",
        draw="depth.depth_curves",
        drawing=(_METRIC,),
    ),
    Figure(
        "depth-by-family",
        "Model families at one size",
        _DEPTH_MARKS,
        query="layer-accuracy",
        numbers="depth_measures.families_at_size",
        draw="depth.curves_by_model",
        counting=(_SIZE, _WITHIN),
        drawing=(_METRIC,),
    ),
    Figure(
        "depth-by-size",
        "Models of growing size within each family",
        _DEPTH_MARKS,
        query="layer-accuracy",
        numbers="depth_measures.layer_curves",
        draw="depth.curves_by_size",
        drawing=(_METRIC,),
    ),
    Figure(
        "depth-measures",
        "Depth of each concept: best layer and depth_90, beside J and C",
        "bar: 95 % interval of depth_90 over test prompts or their groups, with the fitted probes held fixed\n"
        f"no depth_90 unless the best layer beats the best baseline after its choice (p < 0.05)\n{_J_AND_C}",
        query="concept-depth",
        numbers="depth_measures.summary",
        draw="depth.depth_measures",
        defaults={"site": "resid_post"},
    ),
    Figure(
        "converging-by-size",
        "Depth at which models of growing size know a concept",
        f"no mark if there is no such point\n{_J_AND_C}",
        query="converging-point-by-size",
        draw="depth.points_by_size",
    ),
    Figure(
        "hidden-states",
        "Positions of the prompts, layer by layer",
        "first two components of the hidden states; in brackets their shares of the variance",
        query="hidden-states",
        draw="depth.hidden_states",
    ),
    Figure(
        "depth-by-variant",
        "Effects of noise and precision",
        _DEPTH_MARKS,
        query="layer-accuracy",
        numbers="depth_measures.layer_curves",
        draw="depth.curves_by_variant",
        defaults={"variant": "all"},
        drawing=(_METRIC,),
    ),
    Figure(
        "depth-robustness",
        "Changes of J and C with thresholds, probe and split",
        f"bar: middle 95 % of resampled test sets that have the point, if most have; none: no such layer\n{_J_AND_C}",
        query="depth-robustness",
        numbers="depth_measures.robustness",
        draw="depth.depth_robustness",
    ),
    Figure(
        "probe-transfer",
        "Probes applied to other datasets",
        "number: AUC; below 0.5 (orange), the probe orders the labels the wrong way round\n"
        "n: prompts that share neither text nor group with the probe's training part\n"
        "framed: the probe's own dataset, its test part only\n"
        "empty: not measured (`kdb transfer`)",
        query="probe-transfer",
        numbers="transfer.scores_of_pairs",
        draw="transfer.pair_map",
        counting=(_BEST_LAYER,),
    ),
    Figure(
        "layer-scores",
        "Contribution of each attention and FFN layer",
        f"mean over the kept prompts; band: 95 % interval over prompts\n{FEW}",
        query="layer-scores",
        numbers="importance.scores_by_layer",
        draw="importance.layer_scores",
        counting=(_POOL,),
    ),
    Figure(
        "top-layers",
        "Layers with the largest direct contribution",
        f"mean over the kept prompts; bar: 95 % interval over prompts\n{FEW}",
        query="top-layers",
        numbers="importance.layer_ranking",
        draw="importance.ranking",
        fixed={"item": "layer_name"},
    ),
    Figure(
        "top-heads",
        "Attention heads with the largest direct contribution",
        f"mean over the kept prompts; bar: 95 % interval over prompts\n{FEW}",
        query="top-heads",
        numbers="importance.head_ranking",
        draw="importance.ranking",
        fixed={"item": "head_name"},
    ),
    Figure(
        "head-map",
        "Contribution of every head",
        f"mean over the kept prompts; its 95 % interval over prompts is in the tooltip and in the numbers\n{FEW}",
        query="top-heads",
        numbers="importance.head_means",
        draw="importance.head_map",
        defaults={"k": 1_000_000},
    ),
    Figure(
        "effect-map",
        "What replacing a head does to the answer",
        "blue: the answer loses; orange: it gains (square root scale); no cell: not measured\n"
        "mean over the prompts with it: of log p if measured (exact), of the logit difference if estimated\n"
        f"{FEW}",
        query="head-effects",
        numbers="effects.effect_means",
        draw="effects.effect_map",
        defaults={"k": 1_000_000, "effect_method": "atp"},
        hint=EFFECTS,
    ),
    Figure(
        "layer-effect-map",
        "What replacing a layer does to the answer",
        "blue: the answer loses; orange: it gains (square root scale)\n"
        "last, subject: at the last token of the prompt, of its subject; all: at every token; no row: not measured\n"
        f"{FEW}",
        query="layer-effects",
        numbers="effects.layer_effect_means",
        draw="effects.layer_effect_map",
        defaults={"k": 1_000_000},
        without=("role",),
        hint=EFFECTS,
    ),
    Figure(
        "score-vs-effect",
        "Score of each part, and what the answer loses without it",
        "a dot: one head, or one layer (--part attn, ffn); mean over the kept prompts\n"
        "in brackets: 95 % interval of the rank correlation over prompts; none below five",
        query="score-vs-effect",
        numbers="effects.score_and_effect",
        draw="effects.score_vs_effect",
        counting=(_PART,),
        hint=EFFECTS,
    ),
    Figure(
        "answer-by-layer",
        "Prompts whose answer is the first choice, layer by layer",
        f"readout of the residual stream after each block; band: 95 % interval over prompts\n{FEW}",
        query="answer-by-layer",
        numbers="lens.answers_by_layer",
        draw="lens.answer_by_layer",
        hint=READOUTS,
    ),
    Figure(
        "neurons-by-layer",
        "Layers of the value and query neurons",
        "share of each prompt's best neurons, mean over the kept prompts",
        query="layer-scores",
        numbers="importance.neurons_by_layer",
        draw="importance.neuron_layers",
        counting=(_POOL,),
    ),
    Figure(
        "attribution-methods",
        "Probability of the answer when each method's best neurons are replaced",
        f"mean over the kept prompts; bar: 95 % interval over prompts; lower is better\n{FEW}",
        query="attribution-methods",
        numbers="importance.method_effects",
        draw="importance.methods",
    ),
    Figure(
        "attention-vs-ffn",
        "Total contributions of attention and FFN layers",
        f"sum over layers, mean over the kept prompts; line: 95 % interval over prompts\n{FEW}",
        query="attention-vs-ffn",
        numbers="importance.attention_and_ffn",
        draw="importance.shares",
    ),
    Figure(
        "head-overlap",
        "Heads shared by kinds of knowledge",
        "number: shared among each one's best; by chance: among as many that are drawn at random",
        query="head-overlap",
        draw="importance.overlap",
    ),
    Figure(
        "neuron-overlap",
        "Neurons shared by kinds of knowledge",
        "number: shared among each one's best; by chance: among as many that are drawn at random",
        query="neuron-overlap",
        draw="importance.overlap",
    ),
    Figure(
        "prompt-story",
        "One prompt in detail",
        "blue: attention   orange: FFN",
        query="prompt-story",
        draw="importance.prompt_story",
    ),
    Figure(
        "lens-map",
        "First choice of every layer in one prompt",
        "in, mid, out: before the first block, after attention, after the FFN; ␣ is a space; rank: at the last token",
        query="lens-story",
        draw="lens.lens_map",
        hint=READOUTS,
    ),
)

_OF_ONE_PROMPT = ("prompt-story", "lens-map")

FIGURES: Mapping[str, Figure] = {figure.name: figure for figure in _ALL}


def find_figure(name: str) -> Figure:
    """Return the figure of that name. Raises UnknownNameError with the closest names if there is none."""
    if name not in FIGURES:
        raise UnknownNameError("figure", name, FIGURES, "`kdb plot --help` lists them.")
    return FIGURES[name]


def frame(wh: Warehouse, name: str, /, **params: object) -> pl.DataFrame:
    """Return the numbers that a figure draws.

    Raises UnknownNameError for an unknown figure, QueryError for wrong parameters.
    """
    figure = find_figure(name)
    with wh.snapshot() as frozen:
        return _frame(frozen, figure, bind(name, figure.params, params))


def chart(wh: Warehouse, name: str, /, **params: object) -> Chart:
    """Return the figure as an Altair chart, which Jupyter and marimo display.

    Raises UnknownNameError and QueryError as ``frame``, and NothingFoundError if the warehouse has no data for it.
    """
    from kdb.analysis.style import finished, look_of

    figure = find_figure(name)
    values = bind(name, figure.params, params)
    with wh.snapshot() as frozen:
        numbers, look = _frame(frozen, figure, values), look_of(frozen)
    if numbers.is_empty():
        raise NothingFoundError(f"{name}: there is no data to draw. {figure.hint}")
    own = {param.name: values[param.name] for param in figure.drawing} | dict(figure.fixed or {})
    marks = figure.marks + (_of_prompt(numbers) if name in _OF_ONE_PROMPT else "")
    marks += f"\nlens: {values['lens']}" if "lens" in values else ""
    if "effect_method" in values:
        marks += "\neffect: {effect_method}; replacement: {replacement}; ".format(**values)
        marks += (f"role: {values['role']}; " if "role" in values else "") + str(values["direction"])
    if find_query(figure.query).group == "knowledge":
        marks += "".join(f"\n{line}" for line in sample(numbers))
    drawn = _function(figure.draw)(numbers, look, **own)
    return finished(drawn, figure.title, marks)


def _of_prompt(numbers: pl.DataFrame) -> str:
    """Lines that name the one model, prompt and answer of a figure; texts with labels may have no answer."""
    answer = numbers["target_token"][0]
    text = textwrap.wrap(f"“{numbers['text'][0]}”" + ("" if answer is None else f" → “{answer}”"), 100, max_lines=3)
    return "\n" + "\n".join([f"model: {numbers['model'][0]}", *text])


def _frame(wh: Warehouse, figure: Figure, values: Mapping[str, Value]) -> pl.DataFrame:
    drawing = {param.name for param in figure.drawing}
    asked = {name: value for name, value in values.items() if name not in drawing}
    numbers = functools.partial(wh.query, figure.query) if figure.numbers is None else _wh(figure.numbers, wh)
    return numbers(**asked)


def _wh(name: str, wh: Warehouse) -> Callable[..., pl.DataFrame]:
    return functools.partial(_function(name), wh)


def _function(name: str) -> Callable[..., Any]:
    """Return a function of this package, imported only when needed, so that listing figures does not load Altair."""
    from importlib import import_module

    module, _, function = name.partition(".")
    drawing: Callable[..., Any] = getattr(import_module(f"kdb.analysis.{module}"), function)
    return drawing
