"""Zero a chosen set of neurons or heads, and random controls, in every kept prompt of a run."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kdb.errors import QueryError, WarehouseError
from kdb.ingest.attribution.targets import target_token
from kdb.ingest.execution.local import LocalEngine
from kdb.ingest.job import derived_identity
from kdb.ingest.models.find import LoadedModel, ModelSource, check_revision
from kdb.ingest.rows import Rows, timed
from kdb.ingest.settings import Ablating
from kdb.ingest.stages import Advance, ModelStage, Outcome, PlannedRun, Shard, Stage, Subject, carry_out
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.parquet import read_parts
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.storage import Storage

if TYPE_CHECKING:
    from kdb.ingest.forward.ablation import Silenced
    from kdb.ingest.forward.decomposition import Decomposition

_COLUMNS = ("layer", "component", "head", "neuron")


@dataclass(frozen=True, order=True)
class Unit:
    """A neuron, or a whole head if ``neuron`` is −1. ``head`` is −1 for an FFN neuron."""

    layer: int
    component: str
    head: int
    neuron: int


@dataclass(frozen=True)
class Shape:
    """Numbers of layers, heads, head entries and FFN neurons; a unit's numbers must be smaller."""

    n_layers: int
    n_heads: int
    head_dim: int
    n_neurons: int

    def describe(self, unit: Unit) -> str | None:
        """Describe a number of a unit that is out of range; None if the unit exists."""
        limits = [("layer", unit.layer, self.n_layers)]
        if unit.component == "ffn":
            limits.append(("FFN neuron", unit.neuron, self.n_neurons))
        else:
            limits.append(("head", unit.head, self.n_heads))
            if unit.neuron >= 0:
                limits.append(("entry of a head", unit.neuron, self.head_dim))
        return next((f"{what} {n} (0 to {size - 1} exist)" for what, n, size in limits if not 0 <= n < size), None)


def read_units(rows: Sequence[dict[str, Any]], shape: Shape) -> list[Unit]:
    """Convert the rows of a user's SQL to units; raise QueryError for a row that names no neuron or head."""
    if not rows:
        raise QueryError("The query returned no rows, so it names no neuron: change its condition.")
    missing = [c for c in _COLUMNS if c not in rows[0]]
    if missing:
        raise QueryError(f"The query must return the columns {', '.join(_COLUMNS)}; it lacks {', '.join(missing)}.")
    units = []
    for number, row in enumerate(rows, start=1):
        wrong = _wrong(row)
        if wrong is None:
            head = -1 if row["component"] == "ffn" else row["head"]
            unit = Unit(row["layer"], row["component"], head, -1 if row["neuron"] is None else row["neuron"])
            wrong = shape.describe(unit)
            units.append(unit)
        if wrong is not None:
            raise QueryError(f"Row {number} of the query names {wrong}: { ({c: row[c] for c in _COLUMNS}) }.")
    return sorted(set(units))


def _wrong(row: dict[str, Any]) -> str | None:
    if row["component"] not in ("attn", "ffn"):
        return f"the component {row['component']!r} (attn or ffn exist)"
    for name, needed in (("layer", True), ("head", row["component"] == "attn"), ("neuron", row["component"] == "ffn")):
        if not isinstance(row[name], int) and (needed or row[name] is not None):
            return f"no {name} (a whole number is needed)"
    return None


def controls(units: Sequence[Unit], shape: Shape, n: int, seed: int) -> list[list[Unit]]:
    """Draw ``n`` sets of random units. Each has as many of each kind in each layer as ``units``, and none of these.

    Raises QueryError if a layer has too few other units.
    """
    rng = random.Random(seed)
    return [_drawn(units, shape, rng) for _ in range(n)]


def _drawn(units: Sequence[Unit], shape: Shape, rng: random.Random) -> list[Unit]:
    by_kind: dict[tuple[int, str, bool], int] = {}
    for unit in units:
        kind = (unit.layer, unit.component, unit.neuron < 0)
        by_kind[kind] = by_kind.get(kind, 0) + 1
    drawn: list[Unit] = []
    for (layer, component, whole), count in by_kind.items():
        if component == "ffn":
            every = [Unit(layer, "ffn", -1, i) for i in range(shape.n_neurons)]
        else:
            entries = [-1] if whole else range(shape.head_dim)
            every = [Unit(layer, "attn", h, e) for h in range(shape.n_heads) for e in entries]
        others = sorted(set(every) - set(units))
        if len(others) < count:
            raise QueryError(
                f"Layer {layer} has {len(others)} other units, too few to draw {count} random controls: name fewer "
                "units, or give --controls 0."
            )
        drawn += rng.sample(others, count)
    return drawn


def silenced(units: Sequence[Unit], head_dim: int) -> Silenced:
    """Convert units to the entries that an intervention sets to zero."""
    from kdb.ingest.forward.ablation import Silenced

    ffn: dict[int, list[int]] = {}
    attn: dict[int, list[int]] = {}
    for unit in units:
        if unit.component == "ffn":
            ffn.setdefault(unit.layer, []).append(unit.neuron)
        else:
            entries = range(head_dim) if unit.neuron < 0 else [unit.neuron]
            attn.setdefault(unit.layer, []).extend(unit.head * head_dim + e for e in entries)
    return Silenced(ffn, attn)


def ablate(
    storage: Storage,
    source: RunFolder,
    rows: Sequence[dict[str, Any]],
    model: ModelSource,
    load: Callable[[], LoadedModel],
    *,
    name: str,
    positions: str = Ablating.positions,
    n_controls: int = Ablating.n_controls,
    seed: int = Ablating.seed,
) -> Outcome:
    """Zero the units in ``rows`` in every kept prompt of a run, and commit the effects as a derived run.

    Raises QueryError for units that do not exist. Raises WarehouseError if the run's model is not ``model``, or if the
    run has no kept prompt.
    """
    storage.inspect([source], vectors=False)
    stored = _first(source, "models")
    shape = Shape(stored["n_layers"], stored["n_heads"], stored["head_dim"], stored["intermediate_size"])
    units = read_units(rows, shape)
    sets = {name: units} | {f"random-{i}": s for i, s in enumerate(controls(units, shape, n_controls, seed), start=1)}
    settings = {
        "source_run": source.run,
        "name": name,
        "units": [asdict(unit) for unit in units],
        "positions": positions,
        "n_controls": n_controls,
        "seed": seed,
    }
    prompts = [row for row in read_parts(table_files(source.path, "prompts")).to_pylist() if row["kept"]]
    if not prompts:
        raise WarehouseError(f"Run {source.run} has no kept prompt, so nothing can be ablated.")
    check_revision(model, source.run, stored["revision"])

    def prepare() -> tuple[Subject[Any], list[Stage]]:
        silenced_sets = {method: silenced(some, shape.head_dim) for method, some in sets.items()}
        subject = Interventions(model, tuple(prompts), silenced_sets, len(units), positions)
        trials = [Shard("part", size=len(prompts) * (len(sets) + 1))]
        return subject, [ModelStage(("ablations",), lambda _run: trials, _ablated, shown=("interventions", "trials"))]

    row = _first(source, "runs")
    variant = " ".join(filter(None, [row["variant"] if row["variant"] != "default" else "", f"ablate={name}"]))
    changed = {"source_run": source.run, "seed": seed, "variant": variant, "settings": json.dumps(settings)}
    identity = derived_identity("ablate", "knowledge", source, settings)
    planned = PlannedRun(
        identity, source.model, source.dataset, row | changed, prepare, source=source, copied=("models", "datasets")
    )
    return carry_out(storage, planned, LocalEngine(load))


def source_options(source: RunFolder) -> dict[str, Any]:
    """Return the loading options of a run's model: number format and quantization by kdb."""
    settings = json.loads(_first(source, "runs")["settings"])
    return {"dtype": _first(source, "models")["dtype"], "quantize": settings.get("quantize")}


@dataclass(frozen=True)
class Interventions:
    """The kept prompts of a run and the sets of units to zero, before the model is loaded.

    ``sets`` are the entries to zero, by method; the user named ``k`` units.
    """

    source: ModelSource
    prompts: tuple[dict[str, Any], ...]
    sets: dict[str, Silenced]
    k: int
    positions: str

    def bind(self, loaded: LoadedModel, batch_tokens: int | None) -> Decomposed:
        """The interventions and the decomposed model."""
        from kdb.ingest.forward.decomposition import decompose

        return Decomposed(self, decompose(loaded), batch_tokens)


@dataclass(frozen=True)
class Decomposed:
    """Interventions and the decomposed model that runs them."""

    wanted: Interventions
    decomposition: Decomposition
    batch_tokens: int | None

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        return self.decomposition.loaded


def _ablated(subject: Decomposed, _shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of ``ablations``."""
    from kdb.ingest.forward.ablation import Intervention, intervene

    begun, wanted = time.monotonic(), subject.wanted
    interventions = [
        Intervention(
            row["prompt_id"],
            # Runs of schema 5 and older have no token ids, and join every answer by a space.
            row.get("token_ids") or target_token(subject.loaded.tokenizer, row["text"], row["answer"], " ")[0],
            row["target_token_id"],
            method,
            wanted.positions,
            what,
            wanted.k,
        )
        for row in wanted.prompts
        for method, what in wanted.sets.items()
    ]
    rows = intervene(subject.decomposition, interventions, batch_tokens=subject.batch_tokens, on_batch=advance)
    yield timed("ablations", [rows], begun)


def _first(run: RunFolder, table: str) -> dict[str, Any]:
    row: dict[str, Any] = read_parts(table_files(run.path, table)).to_pylist()[0]
    return row
