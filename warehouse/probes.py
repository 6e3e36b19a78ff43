"""Stored probes, for those who read or steer a model with them; NumPy alone, no model library.

probe = kdb.open("kdb-warehouse").probe(model="smollm2-135m", dataset="world-cities", layer=15)
probe.predict(vectors)      # labels, from hidden states (n, hidden)
probe.save("truth.npz")
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdb.errors import QueryError
from kdb.queries.domains import DEFAULT_CLASSIFIER
from kdb.warehouse.files import appears_whole

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe of the hidden states of one layer, with the methods of a fitted scikit-learn classifier.

    Labels: a state x is classified as label 1, the affirmative class, where ``weights`` · x + ``intercept`` > 0. So
    adding the weights to a state moves it towards label 1. Scale: ``weights`` (hidden,) take states as the model gives
    them, unscaled, in float32. ``scale`` is the root mean square distance of the training states from their mean; None
    for classifiers that do not use it. The states must be of the same ``site`` (resid_post: output of the block;
    ffn_norm: input of its FFN) and ``revision`` of the model. ``accuracy`` and ``auc`` are those of the probe's own
    test part.
    """

    weights: NDArray[np.float32]
    intercept: float
    scale: float | None
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
    accuracy: float
    auc: float

    def __repr__(self) -> str:
        where = f"layer {self.layer} of {self.n_layers}, {self.site}"
        return f"<Probe {self.classifier} of {self.model} on {self.dataset}, {where}, accuracy {self.accuracy:.3f}>"

    @property
    def unit(self) -> NDArray[np.float32]:
        """The weights divided by their length."""
        length = float(np.linalg.norm(self.weights))
        return self.weights / np.float32(length or 1.0)

    @property
    def has_probabilities(self) -> bool:
        """Whether decision values are log-odds of label 1; those of ``mean-difference`` are not."""
        return self.classifier.startswith("logistic")

    def decision_function(self, vectors: ArrayLike) -> NDArray[np.float64]:
        """Return the decision values (n,) of states (n, hidden): log-odds of label 1 for logistic classifiers.

        Raises QueryError for states of another width, and for values that are not finite numbers.
        """
        try:
            states = np.asarray(vectors, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise QueryError(f"The hidden states are not an array of numbers (n, hidden): {error}.") from error
        if states.ndim not in (1, 2) or states.shape[-1] != len(self.weights):
            raise QueryError(
                f"The probe has {len(self.weights)} weights, but the hidden states have the shape {states.shape}: give "
                f"states (n, {len(self.weights)}) of {self.model}, layer {self.layer}, {self.site}."
            )
        if not np.isfinite(states).all():
            raise QueryError("The hidden states contain infinite values or NaN: run the model in float32.")
        return states @ self.weights.astype(np.float64) + self.intercept

    def predict(self, vectors: ArrayLike) -> NDArray[np.int16]:
        """Return the predicted labels (n,) of hidden states (n, hidden): 0 or 1."""
        return (self.decision_function(vectors) > 0).astype(np.int16)

    def predict_proba(self, vectors: ArrayLike) -> NDArray[np.float64]:
        """Return the probabilities (n, 2) of labels 0 and 1. Raises QueryError if the classifier has none."""
        if not self.has_probabilities:
            raise QueryError(f"{self.classifier} has no probabilities: use decision_function, or a logistic probe.")
        decision = self.decision_function(vectors)
        return np.stack([np.exp(-np.logaddexp(0.0, sign * decision)) for sign in (1.0, -1.0)], axis=-1)

    def save(self, path: Path | str) -> None:
        """Write the probe to an .npz file: the weights, the intercept, and what they belong to."""
        with appears_whole(Path(path)) as partial, partial.open("wb") as file:
            entries: dict[str, Any] = {name: "" if value is None else value for name, value in asdict(self).items()}
            np.savez(file, **entries)


def find_probe(warehouse: Warehouse, *, layer: int, site: str = "resid_post", **chosen: Any) -> Probe:
    """Return the probe of one layer and site; the other parameters are those of ``find_probes``."""
    return find_probes(warehouse, layer=layer, site=site, **chosen)[0]


def find_probes(
    warehouse: Warehouse,
    *,
    model: str,
    dataset: str,
    layer: int | None = None,
    site: str | None = None,
    classifier: str = DEFAULT_CLASSIFIER,
    split: str | None = None,
    variant: str = "default",
) -> list[Probe]:
    """Return the stored probes of one run, of all layers and sites unless one is named, by site and layer.

    They are of the default split, unless one is named. Raises QueryError if there is no such probe, or the run was
    measured before kdb stored weights.
    """
    asked = [model, dataset, layer, site, classifier, split or "default", variant]
    rows = warehouse.sql("FROM stored_probes(?, ?, ?, ?, ?, ?, ?)", asked).to_dicts()
    if not rows:
        wanted = {"layer": layer, "site": site, "classifier": classifier, "split": split}
        raise QueryError(_why_none(warehouse, (model, dataset, variant), wanted))
    return [Probe(weights=np.asarray(row.pop("weights"), dtype=np.float32), **row) for row in rows]


def _why_none(warehouse: Warehouse, run: tuple[str, str, str], wanted: dict[str, Any]) -> str:
    """Say why there is no such probe: no run, no weights of this run, or other layers, sites, classifiers, splits."""
    model, dataset, variant = run
    stored = warehouse.sql(_STORED, [model, dataset, variant])
    named = f"No stored probe of {model} on {dataset}, variant {variant}"
    for column, value in wanted.items():
        values = stored[column].unique().sort().to_list()
        if values and value is not None and value not in values:
            shown = f"{values[0]} to {values[-1]}" if column == "layer" else ", ".join(values)
            return f"{named}, has the {column} {value!r}. Stored: {shown}."
    if not stored.is_empty():
        return f"{named}, has {', '.join(f'{c} {v}' for c, v in wanted.items() if v is not None)}."
    variants = warehouse.sql(_VARIANTS, [model, dataset])["variant"].to_list()
    if variants and variant not in variants:
        return f"{named}. It has the variants {', '.join(variants)}."
    if warehouse.sql(_MEASURED, [model, dataset, variant]).is_empty():
        others = warehouse.sql("SELECT DISTINCT model, dataset FROM probe_weights ORDER BY ALL").rows()
        return f"{named}. Stored: {'; '.join(f'{m} on {d}' for m, d in others) or 'none'}. `kdb ingest` measures more."
    return (
        f"{named}: the weights are not stored, because the run is a reduced copy, or an older kdb measured it, "
        f"without weights. Run `kdb probe --model {model} --dataset {dataset}` first."
    )


_STORED = """
SELECT DISTINCT layer, site, classifier, split FROM probe_weights
JOIN chosen_runs('probe_weights', $3, NULL) USING (model, dataset, run) WHERE model = $1 AND dataset = $2
"""

_VARIANTS = """
SELECT DISTINCT variant FROM current_runs WHERE table_name = 'probe_weights' AND model = ? AND dataset = ? ORDER BY ALL
"""

_MEASURED = """
FROM current_runs WHERE table_name = 'probe_scores' AND model = ? AND dataset = ? AND variant = ?
"""
