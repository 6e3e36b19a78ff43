"""Neurons and heads that a user's SQL names: checked, and as the entries that an intervention replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdb.errors import QueryError

if TYPE_CHECKING:
    from kdb.ingest.forward.ablation import Silenced

_COLUMNS = ("layer", "component", "head", "neuron")


@dataclass(frozen=True, order=True)
class Unit:
    """A neuron, or a whole head if ``neuron`` is −1. ``head`` is −1 for an FFN neuron."""

    layer: int
    component: str
    head: int
    neuron: int

    @property
    def kind(self) -> str:
        """The kind of unit: ffn (an FFN neuron), attn (an attention neuron) or head."""
        return "head" if self.component == "attn" and self.neuron < 0 else self.component


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

    def count(self, kind: str) -> int:
        """Return the number of units of a kind in a layer."""
        return {"head": self.n_heads, "attn": self.n_heads * self.head_dim, "ffn": self.n_neurons}[kind]

    def unit(self, kind: str, layer: int, number: int) -> Unit:
        """Return the unit with this number among those of its kind in its layer."""
        if kind == "head":
            return Unit(layer, "attn", number, -1)
        return Unit(layer, "attn", *divmod(number, self.head_dim)) if kind == "attn" else Unit(layer, "ffn", -1, number)

    def number(self, unit: Unit) -> int:
        """Return a unit's number among those of its kind in its layer."""
        if unit.kind == "head":
            return unit.head
        return unit.head * self.head_dim + unit.neuron if unit.kind == "attn" else unit.neuron


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
        if row[name] is None and not needed:
            continue
        if not isinstance(row[name], int) or isinstance(row[name], bool):
            return f"no {name} (a whole number is needed)"
        if row[name] < 0:
            return f"{name} {row[name]} (use NULL for a whole head)" if name == "neuron" else f"{name} {row[name]}"
    return None


def silenced(units: Sequence[Unit], shape: Shape) -> Silenced:
    """Convert units to the entries that an intervention replaces."""
    from kdb.ingest.forward.ablation import Silenced

    ffn: dict[int, list[int]] = {}
    attn: dict[int, list[int]] = {}
    for unit in units:
        if unit.component == "ffn":
            ffn.setdefault(unit.layer, []).append(unit.neuron)
        else:
            first = shape.number(unit) * (shape.head_dim if unit.kind == "head" else 1)
            size = shape.head_dim if unit.kind == "head" else 1
            attn.setdefault(unit.layer, []).extend(range(first, first + size))
    return Silenced(ffn, {layer: sorted(set(entries)) for layer, entries in attn.items()})
