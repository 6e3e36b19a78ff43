"""Replace a chosen set of neurons, heads or experts, and control sets, in the kept prompts of a run.

The set is measured in the prompts that its query did not see (`halves`), or in all. Its controls are drawn when the
sizes of all units in these prompts are known, and stored in ``ablated_parts``; the effects are in ``ablations``.
"""

from __future__ import annotations

import functools
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdb.errors import QueryError, WarehouseError
from kdb.ingest.attribution.controls import check_controls, controls, measured_sizes, size_ratio, unit_size
from kdb.ingest.attribution.effects import Known
from kdb.ingest.attribution.patch import Patched, by_category, known, shards_of, stored_experts
from kdb.ingest.attribution.rankings import METHODS
from kdb.ingest.attribution.sets import set_rows
from kdb.ingest.attribution.units import Shape, Unit, read_units, silenced, unit_of
from kdb.ingest.execution.local import LocalEngine
from kdb.ingest.forward.layout import stored_layouts
from kdb.ingest.forward.memory import most_per_shard
from kdb.ingest.job import derived_identity
from kdb.ingest.models.find import LoadedModel, ModelSource, check_revision
from kdb.ingest.models.guard import model_errors
from kdb.ingest.rows import Rows, rows_of, timed
from kdb.ingest.settings import Ablating
from kdb.ingest.stages import Advance, ModelStage, Outcome, PlannedRun, RunInProgress, Shard, Stage, Subject, carry_out
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.parquet import read_parts
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.storage import Storage

if TYPE_CHECKING:
    from kdb.ingest.forward.ablation import Chosen

FAR = 1.5
"""Ratio of the sizes of set and control, or its inverse, beyond which they are not alike."""


def halves(storage: Storage, source: RunFolder, seed: int) -> tuple[list[int], list[int]]:
    """Divide the kept prompts of a run, by category: the numbers that a query sees, and those that are measured.

    Raises WarehouseError if no category has two kept prompts.
    """
    storage.inspect([source], vectors=False)
    rng, seen = random.Random(seed), []
    kept = _kept(source)
    for category in sorted({row["category"] for row in kept}):
        some = sorted(row["prompt_id"] for row in kept if row["category"] == category)
        seen += rng.sample(some, len(some) // 2)
    if not seen:
        raise WarehouseError(
            f"Run {source.run} has no category with two kept prompts, so a query cannot choose in one half and be "
            "measured in the other. Measure more prompts, or give --no-held-out."
        )
    return sorted(seen), sorted({row["prompt_id"] for row in kept} - set(seen))


@dataclass(frozen=True)
class Asked:
    """The rows of a query that chooses a set, its label, how to measure it, and in which kept prompts; None: in all."""

    name: str
    rows: Sequence[dict[str, Any]]
    wanted: Ablating
    measured: Sequence[int] | None = None


def ablate(
    storage: Storage,
    source: RunFolder,
    asked: Asked,
    model: ModelSource,
    load: Callable[[], LoadedModel],
    tokenizer: Any = None,
) -> Outcome:
    """Replace a set in the prompts to be measured, and commit the effects as a derived run.

    Raises QueryError for units that do not exist and for settings that contradict each other. Raises WarehouseError if
    the run's model is not ``model``, or if the run has no kept prompt.
    """
    storage.inspect([source], vectors=False)
    stored, wanted = _first(source, "models"), asked.wanted
    shape = _shape(source, stored)
    units = read_units(asked.rows, shape)
    _check(asked, units, shape)
    kept = _kept(source)
    if not kept:
        raise WarehouseError(f"Run {source.run} has no kept prompt, so nothing can be ablated.")
    check_revision(model, source.run, stored["revision"])
    prompts = tuple(known(row, tokenizer) for row in kept)
    _check_prompts(wanted, prompts)
    measured = frozenset(p.number for p in prompts) if asked.measured is None else frozenset(asked.measured)
    ablated = Ablated(model, asked.name, tuple(units), shape, prompts, measured, wanted)
    settings = {
        "source_run": source.run,
        "name": asked.name,
        "units": [unit.described() for unit in units],
        **asdict(wanted),
        "measured": sorted(measured),
    }
    # A set at all positions, or the cached beginning of a prompt: a pass for each set at most.
    each = 2 + (2 + wanted.n_controls if wanted.positions == "all" else 0)
    flops = 2 * stored["n_params"] * (each * max(row["n_tokens"] for row in kept) + 1 + wanted.n_controls)

    def prepare() -> tuple[Subject[Any], list[Stage]]:
        shards = functools.partial(_shards, ablated, flops)
        return ablated, [
            ModelStage(
                ("ablated_parts",),
                lambda _run: [Shard("part", size=len(measured))],
                _drawn,
                shown=("Drawing controls", None),
            ),
            ModelStage(("ablations",), shards, _effects, shown=("Ablating", "prompts")),
        ]

    row = _first(source, "runs")
    changed = {"source_run": source.run, "seed": wanted.seed, "settings": json.dumps(settings)}
    identity = derived_identity("ablate", "knowledge", source, settings)
    columns = row | changed | {"variant": _variant(row["variant"], asked)}
    planned = PlannedRun(
        identity, source.model, source.dataset, columns, prepare, source=source, copied=("models", "datasets")
    )
    return carry_out(storage, planned, LocalEngine(load))


def _variant(source: str, asked: Asked) -> str:
    """Name what differs from the defaults, so that a set measured in two ways is shown in both."""
    marks = [
        source if source != "default" else "",
        f"ablate={asked.name}",
        f"mode={asked.wanted.mode}" if asked.wanted.mode != Ablating.mode else "",
        "no-held-out" if not asked.wanted.held_out else "",
    ]
    return " ".join(filter(None, marks))


def _check(asked: Asked, units: Sequence[Unit], shape: Shape) -> None:
    wanted = asked.wanted
    if wanted.positions == "all" and wanted.mode != "zero":
        raise QueryError(f"--positions all needs --mode zero: prompts of different lengths have no {wanted.mode}.")
    if asked.name in ("none", *METHODS) or asked.name.startswith(_CONTROL):
        raise QueryError(f"--label {asked.name!r} is the name of another row. Choose another label.")
    if not _LABEL.fullmatch(asked.name):
        raise QueryError(f"--label {asked.name!r} is not a name: use letters, digits and . _ -, without spaces.")
    if wanted.n_controls:
        check_controls(units, shape)


def _check_prompts(wanted: Ablating, prompts: Sequence[Known]) -> None:
    if wanted.mode != "zero" and all(len(some) == 1 for some in by_category(prompts).values()):
        raise QueryError(f"Each category has one kept prompt, and a {wanted.mode} needs another. Use --mode zero.")


def notes(storage: Storage, run: str) -> list[str]:
    """Return what a reader of stored effects should know: missing and distant controls, and prompts left out."""
    folder = storage.find(run)
    settings = json.loads(_first(folder, "runs")["settings"])
    rows = read_parts(table_files(folder.path, "ablations")).to_pylist()
    ratios = {row["method"]: row["control_ratio"] for row in rows if row["control_of"] is not None}
    found = []
    if len(ratios) < settings["n_controls"]:
        found.append(f"Only {len(ratios)} of {settings['n_controls']} controls: no more distinct sets exist.")
    idle = sum(ratio == float("inf") for ratio in ratios.values())
    if idle:
        found.append(
            f"{idle} of {len(ratios)} controls replace what is 0 in these prompts, such as experts not chosen."
        )
    far = [ratio for ratio in ratios.values() if not 1 / FAR <= ratio <= FAR and ratio != float("inf")]
    if far:
        found.append(
            f"In {len(far)} of {len(ratios)} controls the set is {min(far):.2f} to {max(far):.2f} times as large as "
            "its control, in |coefficient| × norm. Nearer ones of these layers are in other controls, or do not exist."
        )
    n_asked, n_measured = len(settings["measured"]), len({row["prompt_id"] for row in rows})
    if n_measured < n_asked:
        found.append(
            f"{n_asked - n_measured} of {n_asked} prompts were left out: each is the only kept prompt of its category, "
            f"which has no {settings['mode']}."
        )
    return found


def source_options(source: RunFolder) -> dict[str, Any]:
    """Return the loading options of a run's model: number format and quantization by kdb."""
    settings = json.loads(_first(source, "runs")["settings"])
    return {"dtype": _first(source, "models")["dtype"], "quantize": settings.get("quantize")}


def _shape(source: RunFolder, model: Mapping[str, Any]) -> Shape:
    experts = stored_experts(source)
    layouts = stored_layouts(model, experts) if experts else ()
    entries = model.get("value_head_dim") or model["head_dim"] or 0  # runs of schema 5 and older have no value_head_dim
    return Shape(model["n_layers"], model["n_heads"] or 0, entries, model["intermediate_size"] or 0, layouts)


def _first(run: RunFolder, table: str) -> dict[str, Any]:
    row: dict[str, Any] = read_parts(table_files(run.path, table)).to_pylist()[0]
    return row


def _kept(source: RunFolder) -> list[dict[str, Any]]:
    return [row for row in read_parts(table_files(source.path, "prompts")).to_pylist() if row["kept"]]


# Stages ----------------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"\w[\w.:+-]*")
"""Label of a set, which is a part of its variant."""

_CONTROL = "control-"


@dataclass(frozen=True)
class Ablated:
    """A set of units, the kept prompts of a run, and the numbers of those to measure; before the model is loaded."""

    source: ModelSource
    name: str
    units: tuple[Unit, ...]
    shape: Shape
    prompts: tuple[Known, ...]
    measured: frozenset[int]
    wanted: Ablating

    def bind(self, loaded: LoadedModel, batch_tokens: int | None) -> Bound:
        """Combine the set with the decomposed model. Raises ModelError if parts of the model are not found."""
        from kdb.ingest.forward.decomposition import decompose

        with model_errors(f"{loaded.source.name} cannot be run"):
            return Bound(self, Patched(decompose(loaded)), batch_tokens)

    def indices(self, prompts: Sequence[Known]) -> list[int]:
        """The indices of those prompts that are measured."""
        return [i for i, prompt in enumerate(prompts) if prompt.number in self.measured]


@dataclass(frozen=True)
class Bound:
    """A set of units and the decomposed model."""

    asked: Ablated
    patched: Patched
    batch_tokens: int | None

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        return self.patched.loaded


def _drawn(subject: Bound, _shard: Shard, _advance: Advance) -> Iterator[Rows]:
    """The rows of ``ablated_parts``: the set and its controls, with the sizes of their units."""
    begun, asked = time.monotonic(), subject.asked
    groups = by_category(asked.prompts).values()
    categories = ((subject.patched.category(some), asked.indices(some)) for some in groups)
    places = [(unit.kind, unit.layer) for unit in asked.units]
    sizes = measured_sizes(subject.patched.decomposition, categories, places)
    drawn = controls(asked.units, asked.shape, sizes, asked.wanted.n_controls, asked.wanted.seed)
    sets = {asked.name: asked.units} | {f"{_CONTROL}{i}": one for i, one in enumerate(drawn, start=1)}
    rows = [
        {
            "method": method,
            "rank": rank,
            "layer": unit.layer,
            "component": unit.component,
            "head": None if unit.head < 0 else unit.head,
            "neuron": None if unit.neuron < 0 else unit.neuron,
            "expert": None if unit.expert < 0 else unit.expert,
            "size": unit_size(unit, asked.shape, sizes),
        }
        for method, units in sets.items()
        for rank, unit in enumerate(units, start=1)
    ]
    yield rows_of("ablated_parts", rows, begun)


def _shards(asked: Ablated, flops: float, run: RunInProgress) -> list[Shard]:
    """The prompts to measure, by category, and the sets that were drawn."""
    chosen = _chosen(asked, run.table("ablated_parts").to_pylist())
    size = run.remembered("ablations", lambda: most_per_shard(run.device, flops))
    return shards_of(asked.prompts, size, lambda _category: chosen, asked.indices)


def _chosen(asked: Ablated, rows: Sequence[Mapping[str, Any]]) -> list[Chosen]:
    from kdb.ingest.forward.ablation import Chosen

    units: dict[str, list[Unit]] = {}
    sizes: dict[str, float] = {}
    for row in rows:
        units.setdefault(row["method"], []).append(unit_of(row))
        sizes[row["method"]] = sizes.get(row["method"], 0.0) + row["size"]
    return [
        Chosen(
            method,
            silenced(some, asked.shape),
            len(some),
            control_of=None if method == asked.name else asked.name,
            control_ratio=None if method == asked.name else size_ratio(sizes[asked.name], sizes[method]),
            held_out=asked.wanted.held_out,
        )
        for method, some in units.items()
    ]


def _effects(subject: Bound, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of ``ablations`` for one shard; advances by prompts."""
    begun, some, wanted = time.monotonic(), shard.work, subject.asked.wanted
    with model_errors(f"{subject.loaded.source.name} cannot be patched"):
        if wanted.positions == "all":
            made = _everywhere(subject, [some.prompts[i] for i in some.indices], some.wanted)
        else:
            category = subject.patched.category(some.prompts)
            made = set_rows(category, dict.fromkeys(some.indices, some.wanted), wanted.mode)
    yield timed("ablations", [made], begun)
    advance(len(some.indices))


def _everywhere(subject: Bound, prompts: Sequence[Known], sets: Sequence[Chosen]) -> pa.Table:
    from kdb.ingest.forward.ablation import Intervention, intervene

    interventions = [Intervention(p.number, p.token_ids, p.target, "all", one) for p in prompts for one in sets]
    return intervene(subject.patched.decomposition, interventions, batch_tokens=subject.batch_tokens)
