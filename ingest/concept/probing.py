"""The stages that fit baselines and probes to stored prompts and vectors, without the model.

    stages = probing(Probing(splits=3), seed=42)

``study.py`` ends with them, and ``derived.py`` carries them out again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from kdb.ingest.datasets.paper import PAPER_DATASETS
from kdb.ingest.progress import FITTING
from kdb.ingest.rows import Rows, arrow_rows, rows_of
from kdb.ingest.settings import Probing
from kdb.ingest.stages import RunInProgress, Shard, StoredStage, single
from kdb.queries.domains import DEFAULT_CLASSIFIER, SITES
from kdb.warehouse.vectors import read_vectors, stored_places

if TYPE_CHECKING:
    from kdb.ingest.concept.baselines import Baseline
    from kdb.ingest.concept.probes import Probe, ProbeScore
    from kdb.ingest.concept.splits import Task

log = logging.getLogger(__name__)

Key = tuple[int, str]
"""A layer and a site."""

_PROBE_MEMORY = 4 * 2**30
_MATRIX_COPIES = 5
"""Copies of a layer's float64 matrix in memory at the peak of fitting."""

_SMALL = 100_000
"""Numbers in the vectors of one site, below which probes are fitted sooner than processes start."""

BELOW_CHANCE = 0.01
"""P-value below which a baseline is reported that does worse than chance."""


@dataclass(frozen=True)
class _Fits:
    """Inputs that all probes of a run share."""

    activations: list[Path]
    task: Task
    classifiers: tuple[str, ...]
    n_layers: int
    hidden_size: int


def probing(wanted: Probing, seed: int) -> list[StoredStage]:
    """Return the stages that fit the baselines, and every probe on every layer and site.

    They read the prompts and the vectors of the run, or of its source run.
    """
    texts = functools.partial(_texts, wanted, seed)
    return [
        StoredStage(("baseline_predictions", "baselines"), single(), _baselines, read=texts),
        StoredStage(
            ("probe_predictions", "probe_weights", "probe_scores"),
            layer_shards,
            _probed,
            read=functools.partial(_fits, wanted, seed),
            n_jobs=lambda fits: _n_jobs(len(fits.task.labels), fits.n_layers, fits.hidden_size),
            shown=(FITTING, "layers"),
        ),
    ]


def _fits(wanted: Probing, seed: int, run: RunInProgress) -> _Fits:
    model = run.table("models").to_pylist()[0]
    task = task_of_tables(run.table, run.staged.dataset, wanted, seed)
    return _Fits(run.files("activations"), task, wanted.classifiers, model["n_layers"], model["hidden_size"])


def task_of_tables(table: Callable[[str], pa.Table], dataset: str, wanted: Probing, seed: int) -> Task:
    """Return the task of a run whose tables ``prompts`` and ``datasets`` are stored.

    Raises DatasetError for prompts that cannot be split.
    """
    prompts, first_label = table("prompts"), table("datasets").to_pylist()[0].get("first_label")
    if first_label is None:  # an older kdb measured the run, and put label 0 first for every dataset
        paper = PAPER_DATASETS.get(dataset)
        first_label = 1 if paper is None else paper.first_label
    return task_of_labels(prompts["label"].to_pylist(), prompts["group_id"].to_pylist(), wanted, seed, first_label)


def task_of_labels(
    labels: ArrayLike, groups: Sequence[str | None], wanted: Probing, seed: int, first_label: int
) -> Task:
    """Return the task that a run probes, with a split by group if every prompt has a group.

    Raises DatasetError for prompts that cannot be split.
    """
    from kdb.ingest.concept.splits import make_splits, make_task

    known = [group for group in groups if group is not None]
    grouped = known if len(known) == len(groups) else None
    splits = make_splits(labels, n_splits=wanted.splits, groups=grouped, seed=seed, first_label=first_label)
    return make_task(labels, splits, groups=grouped, first_label=first_label, seed=seed)


def layer_shards(run: RunInProgress) -> list[Shard]:
    """Return one shard for each layer and site with stored vectors."""
    keys = sorted(stored_places(run.files("activations")[0]), key=lambda key: (SITES.index(key[1]), key[0]))
    return [Shard(f"{site}-{layer:04}", (layer, site)) for layer, site in keys]


def read_layer(activations: Sequence[Path], key: Key) -> NDArray[np.float32]:
    """Read the hidden states (prompt, hidden) of one layer and site, in the order of the prompts."""
    return read_vectors(activations, *key)


def _probed(fits: _Fits, shard: Shard) -> list[Rows]:
    """Fit the probes of one layer and site."""
    from kdb.ingest.concept.probes import fit_probes

    key: Key = shard.work
    probes = fit_probes(read_layer(fits.activations, key), fits.task, fits.classifiers)
    position, default = {"layer": key[0], "site": key[1]}, fits.task.default_split
    predictions = pa.concat_tables(_prediction_rows(key, probe, fits.task) for probe in probes)
    weights = [
        position | _direction(probe) | {"is_default": _is_default(probe.score, default)}
        for probe in probes
        if probe.weights is not None
    ]
    scores = [
        position
        | {"depth": key[0] / fits.n_layers, **asdict(probe.score), "is_default": _is_default(probe.score, default)}
        for probe in probes
    ]
    return [
        Rows("probe_predictions", [predictions]),
        rows_of("probe_weights", weights),
        rows_of("probe_scores", scores),
    ]


def _direction(probe: Probe) -> dict[str, Any]:
    assert probe.weights is not None
    named = {"classifier": probe.score.classifier, "split": probe.score.split}
    return {**named, "weights": probe.weights.tolist(), "intercept": probe.intercept}


def _is_default(score: ProbeScore, default_split: str) -> bool:
    return (score.classifier, score.split) == (DEFAULT_CLASSIFIER, default_split)


def _prediction_rows(key: Key, probe: Probe, task: Task) -> pa.Table:
    """Build rows of ``probe_predictions``; prompts are numbered in the order of their vectors."""
    test = task.tested_rows(probe.score.split)
    return arrow_rows(
        "probe_predictions",
        {
            "prompt_id": test,
            "layer": key[0],
            "site": key[1],
            "classifier": probe.score.classifier,
            "split": probe.score.split,
            "predicted": probe.predicted,
            "correct": probe.predicted == task.labels[test],
            "is_default": _is_default(probe.score, task.default_split),
        },
    )


# Baselines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    """The prompts as texts, and the task."""

    texts: list[str]
    n_tokens: list[int]
    task: Task


def _texts(wanted: Probing, seed: int, run: RunInProgress) -> _Texts:
    prompts, task = run.table("prompts"), task_of_tables(run.table, run.staged.dataset, wanted, seed)
    return _Texts(prompts["text"].to_pylist(), prompts["n_tokens"].to_pylist(), task)


def _baselines(inputs: _Texts, _shard: Shard) -> list[Rows]:
    """Fit the baselines; warn of one that does worse than guessing, because probes then may, too."""
    from kdb.ingest.concept.baselines import fit_baselines

    baselines = fit_baselines(inputs.texts, inputs.n_tokens, inputs.task)
    for baseline in baselines:
        if baseline.below_chance_p < BELOW_CHANCE:
            log.warning(
                "Below chance: the baseline %r is right on %.0f %% of the test prompts of the split %r. Texts that go "
                "with one label in the training part go with the other in the test part, and this can mislead probes, "
                "too. Give related prompts one group (--group-by), and read the split 'grouped'.",
                *(baseline.baseline, 100 * baseline.accuracy, baseline.split),
            )
    predictions = pa.concat_tables(_baseline_rows(baseline, inputs.task) for baseline in baselines)
    scores = [
        {name: value for name, value in vars(one).items() if name != "predicted"}
        | {"is_default": one.split == inputs.task.default_split}
        for one in baselines
    ]
    return [Rows("baseline_predictions", [predictions]), rows_of("baselines", scores)]


def _baseline_rows(baseline: Baseline, task: Task) -> pa.Table:
    """Build rows of ``baseline_predictions``."""
    test = task.tested_rows(baseline.split)
    return arrow_rows(
        "baseline_predictions",
        {
            "prompt_id": test,
            "baseline": baseline.baseline,
            "split": baseline.split,
            "predicted": baseline.predicted,
            "correct": baseline.predicted == task.labels[test],
            "is_default": baseline.split == task.default_split,
        },
    )


def _n_jobs(n_prompts: int, n_layers: int, hidden_size: int) -> int:
    """Number of probing processes: one per core if their matrices fit into ``_PROBE_MEMORY``; one for small work."""
    import joblib

    if n_prompts * n_layers * hidden_size < _SMALL:
        return 1
    each = 8 * n_prompts * hidden_size * _MATRIX_COPIES
    return max(1, min(int(joblib.cpu_count()), _PROBE_MEMORY // each))
