"""The results of a warehouse in sentences: what each model knows, in which layers and heads, and what to ask next.

print("\n".join(summary(kdb.open("kdb-warehouse"))))
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kdb.analysis.variants import PLAIN, shown_variant
from kdb.numbers import shown, with_interval
from kdb.text import visible
from kdb.warehouse.values import check_known

if TYPE_CHECKING:
    import polars as pl

    from kdb.warehouse.store import Warehouse

NEXT = (
    ("concept", "kdb query concept-depth", "every dataset and site, with all measures"),
    ("concept", "kdb plot depth-curves -o depth.html", "accuracy by layer, as a figure"),
    ("knowledge", "kdb query top-heads", "the ten best heads of each kind of knowledge"),
    ("", "kdb report -o report.html", "tables and figures of both studies on one page"),
    ("", "kdb serve", "all of it as web pages"),
)
"""Commands to continue with, each with the study that it is about, if it is about one."""


def summary(wh: Warehouse, models: Sequence[str] = (), *, options: str = "") -> list[str]:
    """Return the lines about the given models, or about all stored ones; the next commands end with `options`.

    Raises UnknownNameError if a given model is not stored.
    """
    with wh.snapshot() as frozen:
        stored = frozen.sql("SELECT DISTINCT model FROM runs ORDER BY model")["model"].to_list()
        check_known("model", models, stored, "`kdb runs` lists what is stored.")
        chosen = [model for model in stored if not models or model in models]
        lines = [line for model in chosen for line in _model(frozen, model)]
        next_ = list(_next(frozen, chosen, options))
    if not lines:
        return ["Nothing is measured yet. To start: kdb ingest --model smollm2-135m"]
    width = max(len(command) for command, _ in next_)
    return [*lines, "Next:", *(f"  {command:{width}}   # {shows}" for command, shows in next_)]


def _next(wh: Warehouse, models: Sequence[str], options: str) -> Iterator[tuple[str, str]]:
    """Yield the commands that have something to show, each with what it shows."""
    variants = {study: shown_variant(wh, models, study) for study in _HEADINGS}
    for study, command, shows in NEXT:
        variant = variants.get(study, PLAIN)
        if variant is not None:
            yield command + ("" if variant == PLAIN else f" --variant {shlex.quote(variant)}") + options, shows


def _model(wh: Warehouse, model: str) -> Iterator[str]:
    yield visible(model)
    for study, lines in (("concept", _depth), ("knowledge", _knowledge)):
        variant = shown_variant(wh, [model], study)
        if variant is None:
            yield f"  The {study} study is not measured."
            continue
        of = "" if variant == PLAIN else f" (variant {visible(variant)})"
        yield f"  {_HEADINGS[study]}{of}"
        yield from lines(wh, {"model": model, "variant": variant})
    yield ""


_HEADINGS = {
    "concept": "Concepts: the layer at which a probe of the hidden states is most accurate",
    "knowledge": "Knowledge: the head that adds most to the answer, and the share of attention and FFN layers",
}


def _depth(wh: Warehouse, chosen: dict[str, Any]) -> Iterator[str]:
    for row in wh.query("concept-depth", site="resid_post", **chosen).iter_rows(named=True):
        n, last = row["n_test"], row["n_layers"] - 1
        ends = (row["best_accuracy"], row["best_accuracy_low"], row["best_accuracy_high"])
        text = f"    {visible(row['dataset'])}: layer {row['best_layer']} of 0 to {last}, accuracy "
        text += f"{with_interval('accuracy', *ends, n)} on {n} test prompts"
        if row["baseline_accuracy"] is not None:
            text += f"; without the model {shown('accuracy', row['baseline_accuracy'], n)} ({row['baseline']})"
            reached = row["depth_90_layer"]
            text += ", not reliably better" if reached is None else f"; 90 % of the way at layer {reached}"
        yield text


def _knowledge(wh: Warehouse, chosen: dict[str, Any]) -> Iterator[str]:
    kept = wh.query("kept-prompts", **chosen)
    total, passed = kept["n_prompts"].sum(), kept["kept"].sum()
    yield f"    {passed} of {total} prompts are kept: the model knows their answer"
    shares = {(row["dataset"], row["category"]): row for row in _rows(wh.query("attention-vs-ffn", **chosen))}
    for row in _rows(wh.query("top-heads", k=1, **chosen)):
        share = shares[row["dataset"], row["category"]]
        text = f"    {visible(row['category'])} ({visible(row['dataset'])}, {row['n_prompts']} prompts): "
        text += f"head {row['head_name']} adds {shown('score', row['score'])} nat"
        parts = (("attention", "attn_percent"), ("FFN", "ffn_percent"), ("mixers", "mixer_percent"))
        known = [f"{name} {share[column]:.0f} %" for name, column in parts if share[column] is not None]
        text += f"; {', '.join(known)}" if known else ""
        yield text


def _rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return list(frame.iter_rows(named=True))
