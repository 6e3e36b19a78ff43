"""The settings of a run and their defaults, which the command line, plans and Python all read from here.

measuring = settings_from(Measuring, {"dtype": "bfloat16", "top_k": 5})  # ignores the settings of other classes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")

DTYPES = ("float32", "bfloat16", "float16")
"""Weight dtypes of the forward pass."""

STORED_DTYPES = ("float32", "float16")
"""Number formats of the vectors on disk."""

QUANTIZATIONS = ("int8",)
"""Quantizations of the weights by kdb."""

ANSWER_TOKENS = ("first", "all")
"""Tokens of an answer whose probability is stored, and compared with that of other answers."""

CHOICES = {"dtype": DTYPES, "store": STORED_DTYPES, "quantize": QUANTIZATIONS, "answer_tokens": ANSWER_TOKENS}
"""The values of settings that are names."""

LEAST = {"limit": 1, "splits": 1, "seed": 0, "top_k": 1, "query_values": 1, "ablate_k": 0, "batch_tokens": 1}
"""The smallest value of settings that are whole numbers."""

ALWAYS_FITTED = ("logistic", "logistic-raw", "logistic-paper", "mean-difference")
"""Saved queries read ``logistic``, so every run has it; ``--classifier`` adds to these."""


@dataclass(frozen=True)
class Measuring:
    """Settings that determine the hidden states of a run, beside model, dataset and template.

    ``limit`` is part of the dataset's fingerprint already; it is repeated here so that the run stores it.
    """

    dtype: str = "float32"
    quantize: str | None = None
    noise: bool = False
    seed: int = 42
    store: str = "float32"
    limit: int | None = None


@dataclass(frozen=True)
class Probing:
    """Settings that determine the probe scores of a run, beside its hidden states.

    ``splits`` counts the paper's split and the seeded stratified ones after it.
    """

    classifiers: tuple[str, ...] = ALWAYS_FITTED
    splits: int = 1


@dataclass(frozen=True)
class Attributing:
    """Settings that determine the scores of a knowledge run, beside model and prompts.

    ``answer_prefix`` is the text between prompt and answer, if it is the same for all prompts. ``answer_tokens``, one
    of ``ANSWER_TOKENS``, are those of the answer that decide whether a prompt is kept.

    For each prompt, the best ``top_k`` neurons of each component are stored, or ``all_neurons``. The best
    ``query_values`` of them are traced back to query neurons. ``ablate_k`` neurons are replaced, by zero and by their
    mean, to compare the methods; 0 skips the comparison. With ``effects``, the causal effects of heads and layers are
    stored beside their scores.
    """

    answer_prefix: str | None = None
    answer_tokens: str = "first"
    top_k: int = 300
    all_neurons: bool = False
    query_values: int = 30
    ablate_k: int = 10
    effects: bool = True


@dataclass(frozen=True)
class Ablating:
    """Settings of ``kdb ablate``.

    ``mode``, one of ``kdb.queries.domains.MODES``, is what takes the place of the set at ``positions`` (last, all).
    ``n_controls`` sets are drawn beside it. With ``held_out``, it is measured in the prompts that its query did not
    see. ``seed`` draws both.
    """

    mode: str = "zero"
    positions: str = "last"
    n_controls: int = 19
    held_out: bool = True
    seed: int = 42


@dataclass(frozen=True)
class Patching:
    """Settings of ``kdb patch``: every combination of these is measured.

    ``components`` are kinds of parts to replace (head, attn, ffn, ffn_neuron, resid), ``replacements`` what takes their
    place, ``methods`` how the effect is found, ``roles`` where in the prompt, and ``directions`` in which prompt.
    """

    components: tuple[str, ...] = ("head",)
    replacements: tuple[str, ...] = ("mean",)
    methods: tuple[str, ...] = ("exact",)
    roles: tuple[str, ...] = ("last",)
    directions: tuple[str, ...] = ("noising",)


@dataclass(frozen=True)
class Reading:
    """Settings of ``kdb lens``: the lens (logit or tuned), token positions (last or all), and the seed of training."""

    lens: str = "logit"
    positions: str = "last"
    seed: int = 42


def settings_from(settings: type[T], options: Mapping[str, Any]) -> T:
    """Build settings from those options that belong to them; absent options have their defaults."""
    names = {field.name for field in fields(settings)}  # type: ignore[arg-type]  # T is a dataclass
    return settings(**{name: value for name, value in options.items() if name in names})
