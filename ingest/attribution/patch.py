"""Replace parts of the model in the kept prompts of a run, and store the effects.

Every knowledge run estimates the effect of all heads and layers, and measures that of the best heads of each category
(`default_shards`); `patch` measures more of a stored run, as a derived run.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdb.errors import ModelError, QueryError, WarehouseError
from kdb.ingest.attribution.effects import Category, Known, Parts, effect_rows, every_part
from kdb.ingest.attribution.targets import target_token
from kdb.ingest.execution.local import LocalEngine
from kdb.ingest.forward.layout import FfnLayout, stored_layouts
from kdb.ingest.forward.memory import most_per_shard
from kdb.ingest.forward.patching import Part, can_be_replaced, has_part
from kdb.ingest.job import derived_identity
from kdb.ingest.models.find import LoadedModel, ModelSource, check_revision
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.tokens import read_texts
from kdb.ingest.rows import Rows, timed
from kdb.ingest.settings import Patching
from kdb.ingest.stages import Advance, ModelStage, Outcome, PlannedRun, RunInProgress, Shard, Stage, Subject, carry_out
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.parquet import read_parts
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.storage import Storage

if TYPE_CHECKING:
    from kdb.ingest.forward.decomposition import Decomposition

log = logging.getLogger(__name__)

BEST_HEADS = 10
"""Number of heads of each category whose effect every knowledge run measures exactly."""

ESTIMATED = Patching(components=("head", "attn", "ffn"), methods=("atp",))
MEASURED = Patching(components=("head",))
"""Settings of every knowledge run's effects: estimates for all heads and layers, exact ones for the best heads."""

_PASSES = 8
"""About as many forward passes a prompt as a run's default effects cost."""


@dataclass(frozen=True)
class Some:
    """The work of a shard: the kept prompts of a category, the indices of those to measure, and what to measure.

    For effects, ``wanted`` are settings, each with the parts to replace; None: all.
    """

    prompts: tuple[Known, ...]
    indices: Sequence[int]
    wanted: Any


class Patched:
    """A decomposed model, and what it writes in the prompts of one category."""

    def __init__(self, decomposition: Decomposition) -> None:
        self.decomposition = decomposition
        self._category: Category | None = None
        self.told = False
        """Whether a warning has said which effects are left out."""

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        return self.decomposition.loaded

    def category(self, prompts: tuple[Known, ...]) -> Category:
        """The category of these prompts; that of the last call stays in memory."""
        if self._category is None or self._category.prompts != prompts:
            self._category = Category(self.decomposition, prompts)
        return self._category


def rows(subject: Patched, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of ``effects`` for one shard; advances by prompts."""
    begun, some = time.monotonic(), shard.work
    category = subject.category(some.prompts)
    with model_errors(f"{subject.loaded.source.name} cannot be patched"):
        tables = [
            effect_rows(category, some.indices, _possible(subject, wanted, found), found)
            for wanted, parts in some.wanted
            for found in [_parts(subject.decomposition, wanted, parts)]
        ]
    yield timed("effects", [pa.concat_tables(tables)], begun)
    advance(len(some.indices))


def _possible(subject: Patched, wanted: Patching, parts: Parts) -> Patching:
    """The settings without the components that the model lacks, and those that no module computes.

    Raises ModelError if nothing is left of what a user asked for.
    """
    name = subject.loaded.source.name
    present = [c for c in wanted.components if parts[c]]
    left_out = [c for c in present if not can_be_replaced(subject.decomposition, c)]
    possible = tuple(c for c in present if c not in left_out)
    asked = " and ".join(wanted.components)
    if not possible and wanted != MEASURED and wanted.components != ESTIMATED.components:
        why = "no single module computes the output" if left_out else "no layer has one"
        raise ModelError(f"{name} has nothing to replace of the component {asked}: {why}.")
    if left_out and not subject.told:
        subject.told = True
        log.warning(
            "%s: effects of %s are left out, because no single module computes their output.",
            name,
            " and ".join(left_out),
        )
    return replace(wanted, components=possible)


def _parts(decomposition: Decomposition, wanted: Patching, parts: Sequence[Part] | None) -> Parts:
    if parts is None:
        return {component: every_part(decomposition, component) for component in wanted.components}
    for part in parts:
        if not has_part(decomposition, part):
            raise ModelError(
                f"{decomposition.loaded.source.name} has no {_NOUN[part.component]} in its layer {part.layer}."
            )
    return {component: [p for p in parts if p.component == component] for component in wanted.components}


def default_shards(run: RunInProgress) -> list[Shard]:
    """The shards of a knowledge run's own effects: the kept prompts, by category."""
    kept = [row for row in run.table("prompts").to_pylist() if row["kept"]]
    if not kept:
        return []
    categories = {row["prompt_id"]: row["category"] for row in kept}
    has_heads = bool(run.files("head_scores"))
    best = _best_heads(run.table("head_scores"), categories) if has_heads else {}
    n_params = run.table("models").to_pylist()[0]["n_params"]
    flops = _PASSES * 2 * n_params * max(row["n_tokens"] for row in kept)
    prompts = [known(row) for row in kept]
    size = run.remembered("effects", lambda: most_per_shard(run.device, flops))
    return shards_of(prompts, size, lambda category: ((ESTIMATED, None), (MEASURED, best.get(category, ()))))


def by_category(prompts: Sequence[Known]) -> dict[str, tuple[Known, ...]]:
    """The prompts of each category, in the order of their names."""
    groups: dict[str, list[Known]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    return {category: tuple(some) for category, some in sorted(groups.items())}


def shards_of(
    prompts: Sequence[Known],
    size: int,
    wanted: Callable[[str], Any],
    measured: Callable[[Sequence[Known]], Sequence[int]] = lambda some: range(len(some)),
    name: str = "part",
) -> list[Shard]:
    """Divide prompts into shards of one category and at most ``size`` prompts.

    ``measured`` returns the indices of those prompts of a category that are measured.
    """
    work = [
        Some(some, indices[start : start + size], wanted(category))
        for category, some in by_category(prompts).items()
        for indices in [measured(some)]
        for start in range(0, len(indices), size)
    ]
    return [Shard(f"{name}-{i:05}", one, len(one.indices)) for i, one in enumerate(work)]


def _best_heads(scores: pa.Table, category_of: Mapping[int, str]) -> dict[str, tuple[Part, ...]]:
    """The heads with the largest mean scores of each category, the best first."""
    import polars as pl

    categories = pl.DataFrame({"prompt_id": list(category_of), "category": list(category_of.values())})
    frame = pl.DataFrame(scores.select(["prompt_id", "layer", "head", "score"]))
    means = (
        frame.join(categories.with_columns(pl.col("prompt_id").cast(frame["prompt_id"].dtype)), on="prompt_id")
        .group_by("category", "layer", "head")
        .agg(pl.col("score").mean())
        .sort("category", -pl.col("score"), "layer", "head")
    )
    best: dict[str, tuple[Part, ...]] = {}
    for (category,), some in means.group_by("category", maintain_order=True):
        best[str(category)] = tuple(Part("head", layer, head) for _c, layer, head, _s in some.head(BEST_HEADS).rows())
    return best


def known(row: Mapping[str, Any], tokenizer: Any = None) -> Known:
    """Build a kept prompt from its row of ``prompts``; a tokenizer finds the subject's end, and ids not stored."""
    ids, rival = row.get("token_ids"), row.get("rival_token_id")
    if ids is None:  # a run of schema 5 or older
        ids = target_token(tokenizer, row["text"], row["answer"], " ")[0]
    end = None if tokenizer is None else _subject_end(tokenizer, row["text"], row["subject"], ids)
    return Known(
        row["prompt_id"],
        tuple(ids),
        row["target_token_id"],
        row["category"],
        -1 if rival is None else rival,
        row["relation"],
        end,
        None if (corrupt := row.get("corrupt_token_ids")) is None else tuple(corrupt),
    )


def _subject_end(tokenizer: Any, text: str, subject: str | None, ids: Sequence[int]) -> int | None:
    """The position of the token in which the subject's last character is; None if the prompt does not name it."""
    start = text.find(subject) if subject else -1
    if start < 0:
        return None
    [until] = read_texts(tokenizer, [text[: start + len(subject or "")]])
    return len(until) - 1 if list(until[:-1]) == list(ids[: len(until) - 1]) else None


# Derived runs ----------------------------------------------------------------------------------------------------

_NAME = re.compile(
    r"(?:a(?P<attn>\d+)(?:\.(?P<head>\d+))?|f(?P<ffn>\d+)(?:(?:\.(?P<expert>\d+))?_(?P<neuron>\d+))?|r(?P<resid>\d+))"
)


def read_part(name: str, model: Mapping[str, Any], experts: Sequence[Mapping[str, Any]] = ()) -> Part:
    """Read a part's name: a5.2 (head), a5 (attention layer), f5 (FFN layer), f5_123 (FFN neuron) or r5 (residual).

    f5.3_123 is a neuron of an expert. ``model`` is the run's row of ``models``, and ``experts`` are its rows of the
    table of that name. Raises QueryError for other names, and for parts that do not exist.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise QueryError(
            f"Unknown part {name!r}: write a5.2 for a head, a5 or f5 for an attention or FFN layer, f5_123 for an FFN "
            "neuron, f5.3_123 for that of an expert, r5 for the residual stream after block 5. `kdb ablate` replaces "
            "whole experts."
        )
    number = {key: int(value) for key, value in match.groupdict().items() if value is not None}
    layer = next(number[key] for key in ("attn", "ffn", "resid") if key in number)
    component = next(c for c, key in _KEY_OF.items() if key in number)
    if layer >= model["n_layers"]:
        raise QueryError(f"{name} does not exist: layers 0 to {model['n_layers'] - 1} do.")
    if number.get("head", -1) >= (n_heads := model["n_heads"] or 0):
        exist = f"heads 0 to {n_heads - 1} do" if n_heads else "the model has no heads"
        raise QueryError(f"{name} does not exist: {exist}.")
    slot = -1
    if "neuron" in number:
        slot = _slot(name, stored_layouts(model, experts)[layer], number.get("expert"), number["neuron"])
    return Part(component, layer, number.get("head", -1), slot)


def _slot(name: str, layout: FfnLayout, expert: int | None, neuron: int) -> int:
    """Return the slot of a neuron; raise QueryError if it does not exist."""
    n_experts = len(layout.starts)
    if n_experts and expert is None:
        raise QueryError(f"{name} names no expert: write {name.replace('_', '.0_')} for expert 0 of {n_experts}.")
    if expert is not None and expert >= n_experts:
        there = f"experts 0 to {n_experts - 1} do" if n_experts else "the layer has no experts"
        raise QueryError(f"{name} does not exist: {there}.")
    width = len(layout.slots(expert or 0))
    if not width:
        raise QueryError(f"{name} does not exist: the layer has no FFN neurons.")
    if neuron >= width:
        raise QueryError(f"{name} does not exist: FFN neurons 0 to {width - 1} do.")
    return layout.slot(expert, neuron)


_NOUN = {"head": "such head", "attn": "attention", "ffn": "FFN", "ffn_neuron": "such FFN neuron"}

_KEY_OF = {"head": "head", "ffn_neuron": "neuron", "attn": "attn", "ffn": "ffn", "resid": "resid"}
"""The group of ``_NAME`` that tells each component, in the order in which they are looked for."""


@dataclass(frozen=True)
class ToPatch:
    """The model of a run whose prompts are patched, before it is loaded."""

    source: ModelSource

    def bind(self, loaded: LoadedModel, batch_tokens: int | None) -> Patched:
        """Decompose the model. Raises ModelError if parts of it are not found."""
        from kdb.ingest.forward.decomposition import decompose

        with model_errors(f"{loaded.source.name} cannot be run"):
            return Patched(decompose(loaded))


def stored_experts(source: RunFolder) -> list[dict[str, Any]]:
    """Return a run's rows of ``experts``; a model without experts has none."""
    files = table_files(source.path, "experts")
    rows: list[dict[str, Any]] = read_parts(files).to_pylist() if files else []
    return rows


def patch(
    storage: Storage,
    source: RunFolder,
    wanted: Patching,
    model: ModelSource,
    load: Callable[[], LoadedModel],
    *,
    only: Sequence[str] = (),
    tokenizer: Any = None,
) -> Outcome:
    """Measure effects in every kept prompt of a run, and commit them as a derived run.

    ``only`` names the parts to replace; all of each component otherwise. Raises QueryError for parts that do not exist
    and for settings that fit no prompt; WarehouseError if the run's model is not ``model``, or no prompt is kept.
    """
    storage.inspect([source], vectors=False)
    [row], [stored] = (read_parts(table_files(source.path, name)).to_pylist() for name in ("runs", "models"))
    kept = [r for r in read_parts(table_files(source.path, "prompts")).to_pylist() if r["kept"]]
    if not kept:
        raise WarehouseError(f"Run {source.run} has no kept prompt, so there is nothing to patch.")
    check_revision(model, source.run, stored["revision"])
    experts = stored_experts(source)
    parts = tuple(sorted({read_part(name, stored, experts) for name in only})) or None
    _check(wanted, parts)
    prompts = [known(r, tokenizer) for r in kept]
    _check_prompts(wanted, prompts)
    settings = {"source_run": source.run, "only": sorted(set(only)), **asdict(wanted)}
    flops = _flops(wanted, parts, stored, max(len(p.token_ids) for p in prompts))

    def prepare() -> tuple[Subject[Any], list[Stage]]:
        def shards(run: RunInProgress) -> list[Shard]:
            size = run.remembered("effects", lambda: most_per_shard(run.device, flops))
            return shards_of(prompts, size, lambda _category: ((wanted, parts),))

        return ToPatch(model), [ModelStage(("effects",), shards, rows, shown=("Patching", "prompts"))]

    changed = {"source_run": source.run, "settings": json.dumps(settings)}
    identity = derived_identity("patch", "knowledge", source, settings)
    planned = PlannedRun(
        identity, source.model, source.dataset, row | changed, prepare, source=source, copied=("models", "datasets")
    )
    return carry_out(storage, planned, LocalEngine(load))


def _flops(wanted: Patching, parts: Sequence[Part] | None, model: Mapping[str, Any], n_tokens: int) -> float:
    """Operations for one prompt, roughly: some whole passes, and one of the patched tokens for each exact patch."""
    layers = model["n_layers"]
    every = sum(layers * (model["n_heads"] or 0 if component == "head" else 1) for component in wanted.components)
    n_patches = (every if parts is None else len(parts)) * len(wanted.replacements) * len(wanted.directions)
    behind = sum(1 if role == "last" else n_tokens for role in wanted.roles)
    exact = n_patches * behind if "exact" in wanted.methods else 0
    return float(2 * model["n_params"] * (_PASSES * n_tokens + exact))


def _check(wanted: Patching, parts: Sequence[Part] | None) -> None:
    """Raise QueryError for settings that contradict each other."""
    if parts is None and "ffn_neuron" in wanted.components:
        raise QueryError("There are too many FFN neurons to replace each: name some with --only, such as f5_123.")
    without = set(wanted.components) - {part.component for part in parts or ()} if parts is not None else set()
    if without:
        raise QueryError(
            f"--only names no part of the component {min(without)!r}. Name one, or leave the component out."
        )
    for role, replacement in itertools.product(wanted.roles, wanted.replacements):
        if role == "all" and replacement in ("mean", "resample"):
            raise QueryError(
                f"--role all needs --replacement zero or pair: prompts of different lengths have no {replacement}."
            )
    if "denoising" in wanted.directions and wanted.replacements != ("pair",):
        raise QueryError("--direction denoising needs --replacement pair, and no other replacement.")


def _check_prompts(wanted: Patching, prompts: Sequence[Known]) -> None:
    """Raise QueryError if no prompt has what the settings ask for."""
    from kdb.ingest.attribution.effects import pairs

    if wanted.roles == ("subject",) and all(p.subject_end is None for p in prompts):
        raise QueryError("No kept prompt has a subject that its text contains, so --role subject has no place.")
    counts = by_category(prompts)
    if "pair" in wanted.replacements:
        _check_lengths(prompts)
    own = any(p.corrupt is not None for p in prompts)
    if wanted.replacements == ("pair",) and not own and not any(pairs(some) for some in counts.values()):
        raise QueryError(
            "No two kept prompts make a pair: the same relation, the same number of tokens, and different answers. "
            "Use --replacement mean or resample."
        )
    if not {"zero", "pair"} & set(wanted.replacements) and all(len(some) == 1 for some in counts.values()):
        raise QueryError(
            "Each category has one kept prompt, and a mean or resample needs another. Use --replacement zero."
        )


def _check_lengths(prompts: Sequence[Known]) -> None:
    """Raise QueryError for corrupt texts with more or fewer tokens than their prompts."""
    uneven = [(p, len(p.corrupt)) for p in prompts if p.corrupt is not None and len(p.corrupt) != len(p.token_ids)]
    if uneven:
        prompt, n_tokens = uneven[0]
        raise QueryError(
            f"The corrupt text of prompt {prompt.number} has {n_tokens} tokens, its prompt {len(prompt.token_ids)}; "
            f"--replacement pair needs equal numbers. Prompts with this fault: {len(uneven)}. Change their corrupt "
            "texts, and ingest the file again."
        )
