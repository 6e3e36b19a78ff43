"""Two concept runs side by side: accuracy at the same depth on the same prompts, and the measures of each run.

    pairs = matched_prompts(wh, "1f0c9a3b5d7e2468", "a2b3c4d5e6f70819").pairs
    by_depth(wh, "1f0c9a3b5d7e2468", "a2b3c4d5e6f70819", pairs).table

The probe is the default one of each run; ``classifier``, ``split`` and ``site`` choose another, as in saved queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kdb.analysis.curves import Differences, differences
from kdb.analysis.depth_measures import Curve, curves, depth_intervals, summary
from kdb.errors import NothingFoundError

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


@dataclass(frozen=True)
class ByDepth:
    """Accuracies of two runs at the same depths, on the ``n`` prompts that are in both test parts.

    ``table`` has a row for each layer of the model with fewer layers: depth_percent, layer_a, layer_b (the nearest one
    in depth), n, accuracy_a, accuracy_b, difference (b − a) with its 95 % interval low to high, only_a and only_b
    (prompts that only one of them predicts correctly), and p_value, McNemar's. ``p_largest`` is that of the largest
    difference, after the choice of the depth; None without such prompts, and the table is empty.
    """

    table: pl.DataFrame
    n: int
    n_groups: int | None = None
    p_largest: float | None = None


def by_depth(wh: Warehouse, run_a: str, run_b: str, pairs: pl.DataFrame, **probe: str) -> ByDepth | None:
    """Compare the accuracies of two runs; ``pairs`` are their prompts with the same text.

    None if a run has no predictions. Raises NothingFoundError if it has none of a classifier or split that is given.
    """
    a, b = (next(curves(wh, **_only(wh, run), **probe), None) for run in (run_a, run_b))
    if a is None or b is None:
        _check_asked(run_a if a is None else run_b, probe)
        return None
    rows = _common(a, b, pairs)
    if not len(rows):
        return ByDepth(pl.DataFrame(schema=_COLUMNS), 0)
    columns = aligned(a, b)
    correct_a, correct_b = (c.correct[np.ix_(rows[:, side], columns[:, side])] for side, c in enumerate((a, b)))
    found = differences(correct_a, correct_b, _groups(a, b, rows))
    table = _table(a, b, columns, found).with_columns(n=pl.lit(len(rows), dtype=pl.Int64))
    return ByDepth(table.select(*_COLUMNS), len(rows), found.n_groups, found.p_largest)


def _check_asked(run: str, probe: Mapping[str, str]) -> None:
    asked = ", ".join(f"{name} {probe[name]}" for name in ("classifier", "split") if name in probe)
    if asked:
        raise NothingFoundError(
            f"Run {run} has no predictions of {asked}. Choose a probe that both runs have, or fit it with `kdb probe`."
        )


_COLUMNS = {
    "depth_percent": pl.Float64,
    **dict.fromkeys(("layer_a", "layer_b", "n"), pl.Int64),
    **dict.fromkeys(("accuracy_a", "accuracy_b", "difference", "low", "high"), pl.Float64),
    **dict.fromkeys(("only_a", "only_b"), pl.Int64),
    "p_value": pl.Float64,
}


def _table(a: Curve, b: Curve, columns: NDArray[np.int64], found: Differences) -> pl.DataFrame:
    layers = [[curve.layers[i] for i in columns[:, side]] for side, curve in enumerate((a, b))]
    shallow = min((a, b), key=lambda curve: len(curve.layers))
    return pl.DataFrame(
        {
            "depth_percent": [100 * layer / shallow.n_layers for layer in shallow.layers],
            "layer_a": layers[0],
            "layer_b": layers[1],
            "difference": found.accuracy_b - found.accuracy_a,
            "p_value": found.p_values,
            **{name: getattr(found, name) for name in ("accuracy_a", "accuracy_b", "low", "high", "only_a", "only_b")},
        }
    ).with_columns(pl.col("low", "high").fill_nan(None))


def _groups(a: Curve, b: Curve, rows: NDArray[np.int64]) -> NDArray[Any] | None:
    """Return the group of each pair of prompts, from the run that has groups."""
    if a.groups is not None:
        return a.groups[rows[:, 0]]
    return None if b.groups is None else b.groups[rows[:, 1]]


def _only(wh: Warehouse, run: str) -> dict[str, Any]:
    """Return the parameters with which saved queries show one run alone."""
    return {"run": run, "model": wh.sql("SELECT model FROM runs WHERE run = ?", [run])["model"].to_list()}


def _common(a: Curve, b: Curve, pairs: pl.DataFrame) -> NDArray[np.int64]:
    """Return the rows of both curves for each pair of prompts that are in both test parts: (pair, 2)."""
    row_a, row_b = ({prompt: row for row, prompt in enumerate(curve.prompts)} for curve in (a, b))
    found = [(row_a[i], row_b[j]) for i, j in pairs.iter_rows() if i in row_a and j in row_b]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def aligned(a: Curve, b: Curve) -> NDArray[np.int64]:
    """Return columns of both curves at the same relative depth, layer / n_layers: (depth, 2).

    Each layer of the curve with fewer layers stands with the nearest one of the other, of two the lower.
    """
    if len(a.layers) > len(b.layers):
        return aligned(b, a)[:, ::-1]
    depth_a, depth_b = (np.array(curve.layers) / curve.n_layers for curve in (a, b))
    apart = np.round(np.abs(depth_a[:, None] - depth_b), 12)
    return np.stack([np.arange(len(depth_a)), apart.argmin(axis=1)], axis=1)


# Measures --------------------------------------------------------------------------------------------------------


def measures(wh: Warehouse, run_a: str, run_b: str, **probe: str) -> pl.DataFrame:
    """Return measures of both runs, each on its own test prompts, as text: columns measure, a and b."""
    a, b = (_measures(wh, {**_only(wh, run), **probe}) for run in (run_a, run_b))
    return pl.DataFrame({"measure": list(a), "a": list(a.values()), "b": list(b.values())})


def _measures(wh: Warehouse, params: dict[str, Any]) -> dict[str, str]:
    row = summary(wh, **params).row(0, named=True)
    best = wh.query("layer-accuracy", **params).filter("best").row(0, named=True)
    points = {point["point"]: point for point in depth_intervals(wh, **params).to_dicts()}
    groups = f" in {row['n_groups']} groups" if row["n_groups"] else ""
    return {
        "probe, split": f"{row['classifier']}, {row['split']}",
        "layers": str(row["n_layers"]),
        "test prompts": f"{row['n_test']}{groups}",
        "best layer": _at(row, "best_layer", "best_percent"),
        "not told from it": row["best_layers"] or "",
        "accuracy there": _within(f"{best['accuracy']:.3f}", best["accuracy_low"], best["accuracy_high"], ".3f"),
        "best baseline": "none" if row["baseline"] is None else f"{row['baseline_accuracy']:.3f}, {row['baseline']}",
        "p against it": "" if row["p_beats_baseline"] is None else f"{row['p_beats_baseline']:.2g}",
        "depth_90": _within(
            _at(row, "depth_90_layer", "depth_90_percent"), row["depth_90_low"], row["depth_90_high"], ".0f"
        ),
        **{name: _point(points.get(name)) for name in ("J", "C")},
    }


def _at(row: dict[str, Any], layer: str, percent: str) -> str:
    return "none" if row[layer] is None else f"layer {row[layer]}, {row[percent]:.0f} %"


def _within(text: str, low: float | None, high: float | None, form: str) -> str:
    return text if low is None or high is None else f"{text} ({low:{form}} to {high:{form}})"


def _point(point: dict[str, Any] | None) -> str:
    """Return J or C as text, with its range over resampled test prompts."""
    if point is None:
        return "not stored"
    percent = None if point["layer"] is None else 100 * point["layer"] / point["n_layers"]
    layer = None if point["layer"] is None else int(point["layer"])
    shown = _at({"layer": layer, "percent": percent}, "layer", "percent")
    return _within(shown, point["low_percent"], point["high_percent"], ".0f")
