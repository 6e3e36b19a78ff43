"""Apply the stored probes of one dataset to the stored hidden states of another, without the model.

    transfer(storage, probed=[storage.find(source)], measured=storage.find(target))

A direction that reads truth off cities may read nothing off claims. Prompts whose text or group the probe was fitted to
are left out; on its own dataset the probe is applied to its test part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kdb.errors import WarehouseError
from kdb.ingest.concept.derived import derive
from kdb.ingest.concept.metrics import score_predictions  # reports a missing library before anything is written
from kdb.ingest.concept.probing import Key, layer_shards, read_layer
from kdb.ingest.rows import Rows, rows_of
from kdb.ingest.stages import Outcome, RunInProgress, Shard, StoredStage
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.parquet import read_parts
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.storage import Storage

SAME = ("revision", "dtype", "quantization", "hidden_size", "n_layers")
"""Columns of ``models`` in which two runs must agree: a direction means nothing in another model's states."""


def transfer(storage: Storage, *, probed: Sequence[RunFolder], measured: RunFolder) -> Outcome:
    """Apply the probes of all runs ``probed`` to the vectors of ``measured``, and store the scores as one new run.

    Raises WarehouseError if the runs are of different models, if one has no weights, or ``measured`` no vectors.
    """
    storage.inspect(probed, vectors=False)
    for folder in probed:
        _check(folder, measured)
    stage = StoredStage(
        ("probe_transfer",),
        layer_shards,
        _transferred,
        read=lambda run: [_inputs(storage, folder, measured, run) for folder in probed],
        shown=("Applying probes", "layers"),
    )
    settings = {"probe_runs": {folder.dataset: folder.run for folder in probed}}
    return derive(storage, measured, "transfer", settings, lambda: [stage])


def _check(probed: RunFolder, measured: RunFolder) -> None:
    """Raise WarehouseError unless a run has probe weights, and both runs are of one model."""
    if not table_files(probed.path, "probe_weights"):
        raise WarehouseError(
            f"Run {probed.run} ({probed.model} on {probed.dataset}) has no probe weights: an older kdb measured it. "
            f"Run `kdb probe --model {probed.model} --dataset {probed.dataset}`, then this command again."
        )
    ours, theirs = (read_parts(table_files(folder.path, "models")).to_pylist()[0] for folder in (probed, measured))
    for name in SAME:
        if ours[name] != theirs[name]:
            raise WarehouseError(
                f"Cannot apply probes of run {probed.run} to run {measured.run}: they differ in {name} "
                f"({ours[name]} and {theirs[name]}). Choose runs of one model and dtype; `kdb query runs` lists them."
            )


@dataclass(frozen=True)
class _Inputs:
    """The probes of one source, and the prompts to score.

    ``tested`` has, for each split, the rows (n,) of the prompts that its probes were not fitted to.
    """

    activations: list[Path]
    labels: NDArray[np.int64]
    groups: NDArray[Any] | None
    tested: dict[str, NDArray[np.int64]]
    left_out: dict[str, int]
    weights: dict[Key, list[dict[str, Any]]]
    own: dict[tuple[Any, ...], NDArray[np.float32]]
    source: dict[str, str]


def _inputs(storage: Storage, probed: RunFolder, measured: RunFolder, run: RunInProgress) -> _Inputs:
    prompts = run.table("prompts").sort_by("prompt_id").to_pylist()
    groups = [row["group_id"] for row in prompts]
    weights = _default_weights(probed)
    tests = tested_prompts(probed, {row["split"] for row in weights})
    own, source = probed.dataset == measured.dataset, rows_in(measured_run(storage, probed), "prompts")
    tested = {split: test if own else unseen(prompts, source, test) for split, test in tests.items()}
    whole = {split: len(test) if own else len(prompts) for split, test in tests.items()}
    by_layer: dict[Key, list[dict[str, Any]]] = {}
    for row in weights:
        by_layer.setdefault((row["layer"], row["site"]), []).append(row)
    return _Inputs(
        run.files("activations"),
        np.array([row["label"] for row in prompts], dtype=np.int64),
        None if None in groups else np.asarray(groups, dtype=object),
        tested,
        {split: whole[split] - len(rows) for split, rows in tested.items()},
        by_layer,
        {_name(row): np.asarray(row["weights"], np.float32) for row in _default_weights(measured)},
        {"source_dataset": probed.dataset, "probe_run": probed.run},
    )


def _default_weights(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the weights of all classifiers on a run's default split; none if the run has none."""
    files = table_files(folder.path, "probe_weights")
    rows = read_parts(files).to_pylist() if files else []
    default = {row["split"] for row in rows if row["is_default"]}
    return [row for row in rows if row["split"] in default]


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["layer"], row["site"], row["classifier"]


def tested_prompts(folder: RunFolder, splits: set[str]) -> dict[str, NDArray[np.int64]]:
    """Return the prompt numbers in the test part of each split."""
    table = read_parts(table_files(folder.path, "probe_predictions")).select(["prompt_id", "split"])
    frame = pl.DataFrame(table).filter(pl.col("split").is_in(splits)).unique()
    return {split: np.sort(frame.filter(split=split)["prompt_id"].to_numpy()).astype(np.int64) for split in splits}


def measured_run(storage: Storage, folder: RunFolder) -> RunFolder:
    """Return the run that ran the model: this one, or the one from which its probes were computed."""
    source = rows_in(folder, "runs")[0]["source_run"]
    return storage.find(source) if source else folder


def rows_in(folder: RunFolder, table: str) -> list[dict[str, Any]]:
    """Return all rows of a table of a run."""
    rows: list[dict[str, Any]] = read_parts(table_files(folder.path, table)).to_pylist()
    return rows


def unseen(prompts: list[dict[str, Any]], source: list[dict[str, Any]], test: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of the prompts that share neither text nor group with the training part of the source."""
    kept = set(test.tolist())
    seen = [row for row in source if row["prompt_id"] not in kept]
    texts, groups = {row["text"] for row in seen}, {row["group_id"] for row in seen} - {None}
    fresh = [i for i, row in enumerate(prompts) if row["text"] not in texts and row["group_id"] not in groups]
    return np.array(fresh, dtype=np.int64)


def _transferred(sources: list[_Inputs], shard: Shard) -> list[Rows]:
    """Score the probes of all sources at one layer and site."""
    X = read_layer(sources[0].activations, shard.work).astype(np.float64)
    return [rows_of("probe_transfer", [row for inputs in sources for row in _scored(inputs, shard.work, X)])]


def _scored(inputs: _Inputs, key: Key, X: NDArray[np.float64]) -> Iterator[dict[str, Any]]:
    """Yield the row of each probe that is applied to the states (n, hidden) of a layer."""
    for probe in inputs.weights.get(key, []):
        tested, weights = inputs.tested[probe["split"]], np.asarray(probe["weights"], np.float64)
        labels = inputs.labels[tested]
        if len(np.unique(labels)) < 2:
            continue  # with one label there is nothing to score
        scores = X[tested] @ weights
        decision = scores + probe["intercept"]
        groups = None if inputs.groups is None else inputs.groups[tested]
        score = score_predictions(labels, decision > 0, decision, groups)
        yield (
            inputs.source
            | {name: probe[name] for name in ("layer", "site", "classifier", "split")}
            | {"n": len(tested), "n_left_out": inputs.left_out[probe["split"]]}
            | {name: getattr(score, name) for name in ("auc", "auc_low", "auc_high")}
            | {name: getattr(score, name) for name in ("accuracy", "accuracy_low", "accuracy_high")}
            | {"accuracy_refitted": _refitted(labels, scores), "cosine": _cosine(weights, inputs.own.get(_name(probe)))}
        )


def _refitted(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """Return the accuracy if as many prompts are predicted as label 1 as have it: those with the largest scores."""
    predicted = np.zeros(len(labels), dtype=np.int64)
    predicted[np.argsort(-scores, kind="stable")[: int(labels.sum())]] = 1
    return float(np.mean(predicted == labels))


def _cosine(a: NDArray[np.float64], b: NDArray[np.float32] | None) -> float | None:
    if b is None or not a.any() or not b.any():
        return None
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
