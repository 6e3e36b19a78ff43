"""Directions of stored probes, for those who read or steer a model with them.

direction = kdb.open("kdb-warehouse").direction(model="smollm2-135m", dataset="world-cities", layer=15)
direction.decision(vectors) > 0     # label 1
direction.save("truth.npz")
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdb.errors import QueryError
from kdb.warehouse.files import appears_whole

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


@dataclass(frozen=True, eq=False)
class Direction:
    """The direction of a linear probe in the hidden states of one layer.

    ``weights`` (hidden,) are in the coordinates of the stored states, in float32. The sign: a state x is classified as
    label 1 where ``weights`` · x + ``intercept`` > 0, so adding the weights to a state moves it towards label 1. They
    belong to one ``site`` (resid_post: output of the block; ffn_norm: input of its FFN) and one ``revision`` of the
    model.
    """

    weights: NDArray[np.float32]
    intercept: float
    model: str
    revision: str
    dtype: str
    quantization: str | None
    dataset: str
    run: str
    layer: int
    n_layers: int
    site: str
    classifier: str
    split: str

    @property
    def unit(self) -> NDArray[np.float32]:
        """The weights divided by their length."""
        length = float(np.linalg.norm(self.weights))
        return self.weights / np.float32(length or 1.0)

    def decision(self, vectors: ArrayLike) -> NDArray[np.float64]:
        """Return the decision values (n,) of states (n, hidden): log-odds of label 1 for logistic classifiers."""
        states = np.asarray(vectors, dtype=np.float64)
        if states.shape[-1] != len(self.weights):
            raise QueryError(
                f"The direction has {len(self.weights)} entries, but the hidden states have {states.shape[-1]}: they "
                f"are not of {self.model}, or not of a layer."
            )
        return states @ self.weights.astype(np.float64) + self.intercept

    def predict(self, vectors: ArrayLike) -> NDArray[np.int16]:
        """Return the predicted labels (n,) of hidden states (n, hidden)."""
        return (self.decision(vectors) > 0).astype(np.int16)

    def save(self, path: Path | str) -> None:
        """Write the direction to an .npz file: the weights, the intercept, and what they belong to."""
        with appears_whole(Path(path)) as partial, partial.open("wb") as file:
            entries: dict[str, Any] = {name: "" if value is None else value for name, value in asdict(self).items()}
            np.savez(file, **entries)


def find_direction(
    warehouse: Warehouse,
    *,
    model: str,
    dataset: str,
    layer: int,
    site: str = "resid_post",
    classifier: str = "logistic",
    split: str | None = None,
    variant: str = "default",
) -> Direction:
    """Return the direction of a stored probe; of the default split, unless one is named.

    Raises QueryError if there is no such probe, or the run was measured before kdb stored directions.
    """
    chosen = [model, dataset, layer, site, classifier, split or "default", variant]
    rows = warehouse.sql("FROM probe_directions(?, ?, ?, ?, ?, ?, ?)", chosen).to_dicts()
    if not rows:
        stored = warehouse.sql("SELECT DISTINCT model, dataset FROM probe_weights ORDER BY ALL").rows()
        listed = "; ".join(f"{m} on {d}" for m, d in stored) or "none"
        raise QueryError(
            f"No stored direction of {model} on {dataset} at layer {layer}, {site}, {classifier}"
            f"{f', split {split}' if split else ''}. Stored: {listed}. For runs of an older kdb, `kdb probe` fits the "
            "probes again and stores directions."
        )
    (row,) = rows
    return Direction(weights=np.asarray(row.pop("weights"), dtype=np.float32), **row)
