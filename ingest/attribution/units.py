"""Neurons, heads and experts that a user's SQL names: checked, and as the entries that an intervention replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kdb.errors import QueryError
from kdb.ingest.forward.layout import FfnLayout

if TYPE_CHECKING:
    from kdb.ingest.forward.ablation import Silenced

_COLUMNS = ("layer", "component", "head", "neuron")


@dataclass(frozen=True, order=True)
class Unit:
    """A neuron, or a whole head or expert if ``neuron`` is −1.

    ``head`` is −1 in an FFN, ``expert`` in attention and in a dense FFN.
    """

    layer: int
    component: str
    head: int
    neuron: int
    expert: int = -1

    @property
    def kind(self) -> str:
        """The kind of unit: ffn (an FFN neuron), attn (an attention neuron), head or expert."""
        return self.component if self.neuron >= 0 else "head" if self.component == "attn" else "expert"

    def described(self) -> dict[str, Any]:
        """Return the unit's numbers; without an expert, as before there were any, so that run ids stay the same."""
        return {name: value for name, value in asdict(self).items() if name != "expert" or value >= 0}


@dataclass(frozen=True)
class Shape:
    """Numbers of layers, heads, head entries and FFN neurons; a unit's numbers must be smaller.

    ``layouts`` are those of the layers of a model with experts.
    """

    n_layers: int
    n_heads: int
    head_dim: int
    n_neurons: int
    layouts: tuple[FfnLayout, ...] = ()

    def layout(self, layer: int) -> FfnLayout:
        """Return which neurons are in the FFN of a layer."""
        return self.layouts[layer] if self.layouts else FfnLayout(self.n_neurons)

    def describe(self, unit: Unit) -> str | None:
        """Describe a number of a unit that is out of range, or that it lacks; None if the unit exists."""
        if unit.layer >= self.n_layers:
            return f"layer {unit.layer} (0 to {self.n_layers - 1} exist)"
        limits = self._in_ffn(unit) if unit.component == "ffn" else self._in_attention(unit)
        wrong = [(what, n, size) for what, n, size in limits if not 0 <= n < size]
        for what, n, size in wrong[:1]:
            if size == 0:
                return f"{what} {n} of layer {unit.layer}, which has none (use NULL)"
            return f"{what} {n} (0 to {size - 1} exist)" if n >= 0 else f"no {what} (0 to {size - 1} exist)"
        return None

    def _in_ffn(self, unit: Unit) -> list[tuple[str, int, int]]:
        """The numbers of an FFN unit after its layer, with their names and limits."""
        layout = self.layout(unit.layer)
        n_experts = len(layout.starts)
        of_expert = [("expert", unit.expert, n_experts)] if n_experts or unit.expert >= 0 else []
        if unit.neuron < 0 or (of_expert and not 0 <= unit.expert < n_experts):
            return of_expert
        return [*of_expert, ("FFN neuron", unit.neuron, len(layout.slots(unit.expert)))]

    def _in_attention(self, unit: Unit) -> list[tuple[str, int, int]]:
        whole = [("head", unit.head, self.n_heads)]
        return [*whole, ("entry of a head", unit.neuron, self.head_dim)] if unit.neuron >= 0 else whole

    def count(self, kind: str, layer: int) -> int:
        """Return the number of units of a kind in a layer."""
        in_ffn = {"ffn": self.layout(layer).size, "expert": len(self.layout(layer).starts)}
        return {"head": self.n_heads, "attn": self.n_heads * self.head_dim, **in_ffn}[kind]

    def unit(self, kind: str, layer: int, number: int) -> Unit:
        """Return the unit with this number among those of its kind in its layer."""
        if kind in ("head", "attn"):
            return Unit(layer, "attn", *((number, -1) if kind == "head" else divmod(number, self.head_dim)))
        if kind == "expert":
            return Unit(layer, "ffn", -1, -1, number)
        [expert], [neuron] = self.layout(layer).experts([number]), self.layout(layer).neurons([number])
        return Unit(layer, "ffn", -1, int(neuron), int(expert))

    def number(self, unit: Unit) -> int:
        """Return a unit's number among those of its kind in its layer."""
        if unit.component == "ffn":
            return unit.expert if unit.neuron < 0 else self.slots(unit)[0]
        return unit.head if unit.neuron < 0 else unit.head * self.head_dim + unit.neuron

    def slots(self, unit: Unit) -> Sequence[int]:
        """Return the slots of an FFN neuron, or of a whole expert."""
        layout = self.layout(unit.layer)
        if unit.neuron < 0:
            return layout.slots(unit.expert)
        return [layout.slot(unit.expert if layout.starts else None, unit.neuron)]


def read_units(rows: Sequence[dict[str, Any]], shape: Shape) -> list[Unit]:
    """Convert the rows of a user's SQL to units; raise QueryError for a row that names no neuron, head or expert.

    The column expert is needed for a model with experts only.
    """
    if not rows:
        raise QueryError("The query returned no rows, so it names no neuron: change its condition.")
    columns = (*_COLUMNS, "expert") if shape.layouts or "expert" in rows[0] else _COLUMNS
    missing = [c for c in columns if c not in rows[0]]
    if missing:
        raise QueryError(f"The query must return the columns {', '.join(columns)}; it lacks {', '.join(missing)}.")
    units = []
    for number, row in enumerate(rows, start=1):
        wrong = _wrong(row)
        if wrong is None:
            unit = unit_of(row)
            wrong = shape.describe(unit)
            units.append(unit)
        if wrong is not None:
            raise QueryError(f"Row {number} of the query names {wrong}: { ({c: row[c] for c in columns}) }.")
    return sorted(set(units))


def unit_of(row: Mapping[str, Any]) -> Unit:
    """Return the unit that a row names by its columns; a head in an FFN and an expert in attention are ignored."""
    numbers = {name: -1 if row.get(name) is None else row[name] for name in ("head", "neuron", "expert")}
    numbers["head" if row["component"] == "ffn" else "expert"] = -1
    return Unit(row["layer"], row["component"], **numbers)


def _wrong(row: dict[str, Any]) -> str | None:
    if row["component"] not in ("attn", "ffn"):
        return f"the component {row['component']!r} (attn or ffn exist)"
    in_ffn = row["component"] == "ffn"
    needed = {"layer": True, "head": not in_ffn, "expert": False, "neuron": in_ffn and row.get("expert") is None}
    for name, is_needed in needed.items():
        if row.get(name) is None and not is_needed:
            continue
        if not isinstance(row[name], int) or isinstance(row[name], bool):
            return f"no {name} (a whole number is needed)"
        if row[name] < 0:
            return (
                f"{name} {row[name]} (use NULL for a whole head or expert)"
                if name == "neuron"
                else f"{name} {row[name]}"
            )
    return None


def silenced(units: Sequence[Unit], shape: Shape) -> Silenced:
    """Convert units to the entries that an intervention replaces."""
    from kdb.ingest.forward.ablation import Silenced

    ffn: dict[int, list[int]] = {}
    attn: dict[int, list[int]] = {}
    for unit in units:
        if unit.component == "ffn":
            ffn.setdefault(unit.layer, []).extend(shape.slots(unit))
        else:
            first = shape.number(unit) * (shape.head_dim if unit.kind == "head" else 1)
            size = shape.head_dim if unit.kind == "head" else 1
            attn.setdefault(unit.layer, []).extend(range(first, first + size))
    return Silenced(*({layer: sorted(set(entries)) for layer, entries in of.items()} for of in (ffn, attn)))
