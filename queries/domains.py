"""The allowed values of a saved query's parameters, by the name of the parameter.

An unknown name is an error that suggests the closest names. Known names are fixed, or stored in the warehouse; this
module says where they are stored, and opens no database.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

CATEGORIES = ("language", "color", "number", "capital", "country", "month")
"""The paper's categories of knowledge, in its order. The macro ``category_order`` repeats them in SQL."""

PROVED_RANKS = 50
"""Number of neurons of each category and component that a run proves to have the largest mean scores."""

CLASSIFIERS = (
    "logistic",
    "logistic-raw",
    "logistic-paper",
    "mean-difference",
    "logistic-standardised",
    "random-forest",
)
"""Names of the probes' classifiers."""

DEFAULT_CLASSIFIER = "logistic"
"""The classifier that schema `current` shows, on the split by group where there are groups, else the paper's."""

SITES = ("resid_post", "ffn_norm")
"""Sites at which a hidden state is read: the block's output, and the input of the FFN."""


PARTS = ("head", "attn", "ffn", "ffn_neuron", "resid")
"""Kinds of parts whose causal effects are measured."""

REPLACEMENTS = ("zero", "mean", "resample", "pair")
"""Values that can take the place of a part's own."""

MODES = ("zero", "mean", "resample")
"""Those that can take the place of a whole set of parts."""

EFFECT_METHODS = ("exact", "atp", "relp")
"""How an effect is found: measured, or estimated by a gradient or by relevance propagation."""

ROLES = ("last", "subject", "all")
"""Where in the prompt a part is replaced."""

DIRECTIONS = ("noising", "denoising")
"""In which prompt a part is replaced: the prompt itself, or its pair."""

LENSES = ("logit", "tuned")
"""Lenses through which the residual stream is read."""

POSITIONS = ("last", "all")
"""Token positions of a prompt."""


@dataclass(frozen=True)
class Names:
    """Known names: `fixed` ones, and those found by the SQL in `stored`."""

    hint: str
    fixed: tuple[str, ...] = ()
    stored: str | None = None


@dataclass(frozen=True)
class Numbers:
    """Numbers from `least`, inclusive or not (`above`), up to the result of the SQL in `most`.

    That SQL may read the query's parameters; NULL means no limit.
    """

    least: int
    above: bool = False
    most: str | None = None

    def expected(self, most: object = None) -> str:
        """Return the range in words."""
        text = f"above {self.least}" if self.above else f"from {self.least}"
        return text if most is None else f"{text} to {most}"

    def holds(self, value: float) -> bool:
        """Whether the value is large enough."""
        return value > self.least if self.above else value >= self.least


@dataclass(frozen=True)
class Spelled:
    """Names of a fixed pattern."""

    pattern: re.Pattern[str]
    example: str


Domain = Names | Numbers | Spelled

LARGEST = 2**31 - 1
"""Largest integer in any key column of the warehouse."""

_RUNS = "`kdb runs` lists what is stored."


def _one_of(*names: str, stored: str | None = None) -> Names:
    return Names(f"Use one of {', '.join(names)}.", names, stored)


def _stored(column: str, *fixed: str) -> Names:
    return Names(_RUNS, fixed, f"SELECT DISTINCT {column} FROM known_runs")


_OF_MODELS = "FROM models WHERE among(model, getvariable('model'))"
_PROMPTS = (
    "FROM prompts WHERE among(model, getvariable('model')) "
    "AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))"
)

DOMAINS: Mapping[str, Domain] = {
    "model": _stored("model"),
    "dataset": _stored("dataset"),
    "run": _stored("run"),
    "variant": Names(
        "`kdb runs` lists the variants that are stored.",
        ("default",),
        "SELECT DISTINCT unnest([variant, without_revision(variant)]) FROM known_runs",
    ),
    "study": _one_of("concept", "knowledge"),
    "category": Names(
        "`kdb query kept-prompts` lists the stored ones.",
        CATEGORIES,
        "SELECT DISTINCT category FROM prompts WHERE category IS NOT NULL",
    ),
    "site": _one_of(*SITES, stored="SELECT DISTINCT site FROM probe_scores"),
    "classifier": _one_of(
        *("default", *CLASSIFIERS),
        stored="SELECT DISTINCT classifier FROM probe_scores",
    ),
    "split": _one_of("default", "paper", "grouped", stored="SELECT DISTINCT split FROM probe_scores"),
    "method": _one_of("pca", "umap"),
    "component": _one_of("attn", "ffn"),
    "activates": _one_of("attn", "ffn"),
    "positions": _one_of(*POSITIONS),
    "lens": _one_of(*LENSES),
    "mode": _one_of(*MODES),
    "role": _one_of(*ROLES),
    "replacement": _one_of(*REPLACEMENTS),
    "effect_method": _one_of(*EFFECT_METHODS),
    "direction": _one_of(*DIRECTIONS),
    "neuron": Spelled(
        re.compile(r"(f\d{1,5}(\.\d{1,5})?|a\d{1,5}\.\d{1,5})_\d{1,8}"),
        "f29_1234, f29.3_45 in an expert, or a23.12_45 in an attention head",
    ),
    "layer": Numbers(0, most=f"SELECT max(n_layers) - 1 {_OF_MODELS}"),
    "head": Numbers(0, most=f"SELECT max(n_heads) - 1 {_OF_MODELS}"),
    "prompt": Numbers(0, most=f"SELECT max(prompt_id) {_PROMPTS}"),
    "position": Numbers(0, most=f"SELECT max(n_tokens) - 1 {_PROMPTS}"),
    **dict.fromkeys(("k", "limit", "layers", "prompts", "tokens", "min_prompts"), Numbers(1)),
    "within": Numbers(1),
    **dict.fromkeys(("size", "jump_ratio", "convergence_tolerance"), Numbers(0, above=True)),
}
"""The domain of each parameter whose values are checked."""
