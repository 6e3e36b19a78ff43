"""Hold kdb's causal effects and lens readouts against the golden values, quantity by quantity.

golden.py prints it whole, tests/test_golden.py runs a slice of it:

    comparisons = compare(decompose(loaded), json.loads(path.read_text()), prompts_csv)

The golden values were computed one prompt at a time, with plain hooks and no cache. Values must agree within 0.001, the
five best tokens wherever the log-probabilities of neighbours differ by more than twice that.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from golden_attribution import Comparison

from kdb.ingest.attribution.effects import Category, Known, effect_rows, every_part
from kdb.ingest.attribution.lens import lens_rows
from kdb.ingest.attribution.targets import find_targets
from kdb.ingest.forward.activation_cache import run_with_cache
from kdb.ingest.forward.decomposition import Decomposition
from kdb.ingest.prompts import Prompt
from kdb.ingest.settings import Patching

NEAR = 1e-3
REPLACEMENTS = ("zero", "mean", "resample")
EVERYWHERE = Patching(replacements=("zero",), roles=("all",))
WANTED = (
    Patching(("head", "attn", "ffn"), REPLACEMENTS, ("exact",)),
    Patching(("head",), REPLACEMENTS, ("atp",)),
    EVERYWHERE,
)


def compare(
    decomposition: Decomposition, golden: dict[str, Any], prompts: Path, n: int | None = None
) -> list[Comparison]:
    """Compare every effect and readout of the first ``n`` golden prompts; ``prompts`` is the whole dataset, as CSV."""
    with prompts.open(newline="") as file:
        asked = [(row["prompt"], row["answer"], row["category"]) for row in csv.DictReader(file)]
    targets = find_targets(decomposition.loaded.tokenizer, asked, [None] * len(asked))
    every = [Prompt(i, target.token_ids, target) for i, target in enumerate(targets)]
    rivals = {p["prompt"]: p["rival_token_id"] for p in golden["prompts"]}
    known = [
        Known(prompt.number, tuple(prompt.token_ids), prompt.target, category, rivals.get(text, -1))
        for prompt, (text, _answer, category) in zip(every, asked, strict=True)
    ]
    number = {text: i for i, (text, *_) in enumerate(asked)}
    to: dict[str, Comparison] = {}
    for p in golden["prompts"][:n]:
        i = number[p["prompt"]]
        _values(to, "target_token_id", every[i].target, p["target_token_id"], p, absolute=0)
        category = Category(decomposition, [one for one in known if one.category == p["category"]])
        _effects(category, i, p, to)
        _lens(decomposition, every[i], p, to)
    return list(to.values())


def _values(to: dict[str, Comparison], quantity: str, found: Any, expected: Any, p: Any, **near: float) -> None:
    to.setdefault(quantity, Comparison(quantity)).values(found, expected, p["prompt"], **{"absolute": NEAR, **near})


def _effects(category: Category, number: int, p: dict[str, Any], to: dict[str, Comparison]) -> None:
    """Compare the effects of every head and layer, in the order of :func:`every_part`."""
    index = [one.number for one in category.prompts].index(number)
    for wanted in WANTED:
        parts = {component: every_part(category.decomposition, component) for component in wanted.components}
        rows = effect_rows(category, [index], wanted, parts).to_pandas()
        for (component, by, method), some in rows.groupby(["component", "replacement", "method"]):
            estimate = "_attribution_patching" if method == "atp" else ""
            everywhere = "_all_positions" if wanted is EVERYWHERE else ""
            key, some = f"{component}_{by}{estimate}{everywhere}", some.sort_values(["layer", "head"])
            expected = {"logp": p["effects"][key]} if estimate else p["effects"][key]
            for measure, values in expected.items():
                _values(to, f"{key}: {measure}", some[measure].tolist(), np.ravel(values).tolist(), p)


def _lens(decomposition: Decomposition, prompt: Prompt, p: dict[str, Any], to: dict[str, Comparison]) -> None:
    """Compare the readouts; kdb stores that before a block once, as the one after the block before."""
    cache = run_with_cache(decomposition, [prompt.token_ids])
    rows = lens_rows(np.array([prompt.number], dtype=np.int32), decomposition, cache, [prompt]).to_pylist()
    found = {(row["place"], row["layer"]): row for row in rows}
    for place, expected in p["lens"].items():
        for layer in range(len(decomposition.blocks)):
            before = place == "pre" and layer > 0
            row = found["resid_post", layer - 1] if before else found[f"resid_{place}", layer]
            names = {"target_logp": "logp", "entropy": "entropy", "kl": "kl_from_final"}
            for ours, theirs in names.items():
                _values(to, f"lens: {theirs}", row[ours], expected[theirs][layer], p)
            # Far down the list logits are dense, and rounding changes ranks by a few thousandths.
            _values(to, "lens: rank", row["target_rank"], expected["rank"][layer], p, absolute=0, relative=2e-3)
            _best(decomposition, row, expected["top5"][layer], f"{p['prompt']}, {place} {layer}", to)


def _best(
    decomposition: Decomposition, row: dict[str, Any], ids: Sequence[int], where: str, to: dict[str, Comparison]
) -> None:
    expected = [decomposition.loaded.tokenizer.decode([token]) for token in ids]
    best = to.setdefault("lens: top5", Comparison("lens: top5"))
    best.places(row["tokens"], expected, row["logps"], where, lambda a, b: abs(a - b) <= 2 * NEAR)
