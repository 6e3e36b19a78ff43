"""The figures of both papers by name, each with the question that it answers, saved query and parameters.

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
    "● best layer · □ depth_90 · ▲ jump point J · ◇ converging point C · band: 95 % interval · "
    f"thin line: best baseline\n{_J_AND_C}"
)

_ALL = (
    Figure(
        "depth-curves",
        "At which depth can a probe read each concept?",
        "✚ the model's own answer, read from its output probabilities\n" + _DEPTH_MARKS,
        query="layer-accuracy",
        numbers="depth_measures.curves_with_answers",
        draw="depth.depth_curves",
        drawing=(_METRIC,),
    ),
    Figure(
        "depth-by-family",
        "Do model families of one size hold a concept at the same depth?",
        _DEPTH_MARKS,
        query="layer-accuracy",
        numbers="depth_measures.families_at_size",
        draw="depth.curves_by_model",
        counting=(_SIZE, _WITHIN),
        drawing=(_METRIC,),
    ),
    Figure(
        "depth-by-size",
        "How does accuracy by depth change with the size of a model?",
        _DEPTH_MARKS,
        query="layer-accuracy",
        numbers="depth_measures.layer_curves",
        draw="depth.curves_by_size",
        drawing=(_METRIC,),
    ),
    Figure(
        "depth-measures",
        "How deep is each concept?",
        "bar: 95 % interval of depth_90 over test prompts or their groups, with the fitted probes held fixed\n"
        f"no depth_90 unless the best layer beats the best baseline after its choice (p < 0.05)\n{_J_AND_C}",
        query="concept-depth",
        numbers="depth_measures.summary",
        draw="depth.depth_measures",
        defaults={"site": "resid_post"},
    ),
    Figure(
        "converging-by-size",
        "Do larger models know a concept at a smaller depth?",
        f"no mark if there is no such point\n{_J_AND_C}",
        query="converging-point-by-size",
        draw="depth.points_by_size",
    ),
    Figure(
        "hidden-states",
        "At which layers do the hidden states of two classes separate?",
        "first two components of the hidden states; in brackets their shares of the variance",
        query="hidden-states",
        draw="depth.hidden_states",
    ),
    Figure(
        "depth-by-variant",
        "What do noise and precision change?",
        _DEPTH_MARKS,
        query="layer-accuracy",
        numbers="depth_measures.layer_curves",
        draw="depth.curves_by_variant",
        defaults={"variant": "all"},
        drawing=(_METRIC,),
    ),
    Figure(
        "depth-robustness",
        "How much do J and C depend on thresholds, probe and split?",
        f"bar: middle 95 % of resampled test sets that have the point, if most have; none: no such layer\n{_J_AND_C}",
        query="depth-robustness",
        numbers="depth_measures.robustness",
        draw="depth.depth_robustness",
    ),
    Figure(
        "probe-transfer",
        "Does the probe of one dataset work on another?",
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
        "How much does each attention and FFN layer add to the answer?",
        f"mean over the kept prompts; band: 95 % interval over prompts\n{FEW}",
        query="layer-scores",
        numbers="importance.scores_by_layer",
        draw="importance.layer_scores",
        counting=(_POOL,),
    ),
    Figure(
        "top-layers",
        "Which layers add most to the answer?",
        f"mean over the kept prompts; bar: 95 % interval over prompts\n{FEW}",
        query="top-layers",
        numbers="importance.layer_ranking",
        draw="importance.ranking",
        fixed={"item": "layer_name"},
    ),
    Figure(
        "top-heads",
        "Which attention heads add most to the answer?",
        f"mean over the kept prompts; bar: 95 % interval over prompts\n{FEW}",
        query="top-heads",
        numbers="importance.head_ranking",
        draw="importance.ranking",
        fixed={"item": "head_name"},
    ),
    Figure(
        "head-map",
        "How much does every head add to the answer?",
        f"mean over the kept prompts; its 95 % interval over prompts is in the tooltip and in the numbers\n{FEW}",
        query="top-heads",
        numbers="importance.head_means",
        draw="importance.part_map",
        defaults={"k": 1_000_000},
        fixed={"part": "head"},
    ),
    Figure(
        "expert-map",
        "How much does every expert add to the answer?",
        "no cell: not used in any prompt; where the router does not choose an expert, it counts as 0\n"
        f"mean over the kept prompts; its 95 % interval over prompts is in the tooltip and in the numbers\n{FEW}",
        query="top-experts",
        numbers="importance.expert_means",
        draw="importance.part_map",
        defaults={"k": 1_000_000},
        fixed={"part": "expert"},
        hint="Only a mixture of experts has experts; `kdb runs` lists what was measured.",
    ),
    Figure(
        "effect-map",
        "What happens to the answer when a head is replaced?",
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
        "What happens to the answer when a layer is replaced?",
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
        "Does the answer need the parts with the largest scores?",
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
        "After which layer is the answer the first choice?",
        f"readout of the residual stream after each block; band: 95 % interval over prompts\n{FEW}",
        query="answer-by-layer",
        numbers="lens.answers_by_layer",
        draw="lens.answer_by_layer",
        hint=READOUTS,
    ),
    Figure(
        "neurons-by-layer",
        "In which layers are the best neurons?",
        "share of each prompt's best neurons, mean over the kept prompts",
        query="layer-scores",
        numbers="importance.neurons_by_layer",
        draw="importance.neuron_layers",
        counting=(_POOL,),
    ),
    Figure(
        "attribution-methods",
        "Which method finds the neurons that the answer needs?",
        f"mean over the kept prompts; bar: 95 % interval over prompts; lower is better\n{FEW}",
        query="attribution-methods",
        numbers="importance.method_effects",
        draw="importance.methods",
    ),
    Figure(
        "attention-vs-ffn",
        "Does the answer come from attention or from FFN layers?",
        f"sum over layers, mean over the kept prompts; line: 95 % interval over prompts\n{FEW}",
        query="attention-vs-ffn",
        numbers="importance.attention_and_ffn",
        draw="importance.shares",
    ),
    Figure(
        "head-overlap",
        "Do kinds of knowledge share their heads?",
        "number: shared among each one's best; by chance: among as many that are drawn at random",
        query="head-overlap",
        draw="importance.overlap",
    ),
    Figure(
        "neuron-overlap",
        "Do kinds of knowledge share their neurons?",
        "number: shared among each one's best; by chance: among as many that are drawn at random",
        query="neuron-overlap",
        draw="importance.overlap",
    ),
    Figure(
        "prompt-story",
        "Which parts of the model add to the answer of this prompt?",
        "blue: attention · orange: FFN",
        query="prompt-story",
        draw="importance.prompt_story",
    ),
    Figure(
        "lens-map",
        "What is the first choice of every layer in this prompt?",
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
        subtitle = _subtitle(frozen, figure, numbers, values)
    own = {param.name: values[param.name] for param in figure.drawing} | dict(figure.fixed or {})
    drawn = _function(figure.draw)(numbers, look, **own)
    return finished(drawn, figure.title, subtitle)


def _subtitle(wh: Warehouse, figure: Figure, numbers: pl.DataFrame, values: Mapping[str, Value]) -> list[str]:
    """Return the lines below a figure's title: of what it is, with which settings, and what its marks are."""
    lines = sample(numbers, _variants(wh, numbers, values))
    lines += _of_prompt(numbers, values) if figure.name in _OF_ONE_PROMPT else []
    lines += [f"lens: {values['lens']}"] if "lens" in values else []
    if "effect_method" in values:
        settings = "effect: {effect_method}; replacement: {replacement}; ".format(**values)
        settings += (f"role: {values['role']}; " if "role" in values else "") + str(values["direction"])
        lines.append(settings)
    return [*lines, *figure.marks.split("\n")]


def _variants(wh: Warehouse, numbers: pl.DataFrame, values: Mapping[str, Value]) -> list[str]:
    """Return the variants of the runs that a figure shows."""
    if "variant" in numbers.columns:
        return numbers["variant"].unique(maintain_order=True).to_list()
    if values.get("run") is None:
        return [str(values["variant"])]
    found = wh.sql("SELECT DISTINCT variant FROM runs WHERE starts_with(run, ?) ORDER BY variant", [values["run"]])
    return found["variant"].to_list()


def _of_prompt(numbers: pl.DataFrame, values: Mapping[str, Value]) -> list[str]:
    """Return the number, text and answer of the one prompt of a figure; texts with labels may have no answer."""
    answer = numbers["target_token"][0]
    text = f"prompt {values['prompt']}: “{numbers['text'][0]}”" + ("" if answer is None else f" → “{answer}”")
    return textwrap.wrap(text, 100, max_lines=3)


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
