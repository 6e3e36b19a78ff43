"""Score new texts with stored probes: run the model on them as in the probes' run, and apply the probes to its states.

    probes = find_probes(warehouse, model="smollm2-135m", dataset="world-cities")
    scores = score_texts(warehouse.storage, probes, load_texts(Path("new.csv")), find_model("smollm2-135m"))
    scores.texts     # a row for each text, layer and site

Nothing is stored: the new texts are no dataset of the warehouse.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kdb.ingest.concept.metrics import accuracy_interval, auc_interval
from kdb.ingest.concept.transfer import measured_run, rows_in, tested_prompts, unseen
from kdb.ingest.datasets import Dataset, Example
from kdb.ingest.forward.capture import Capture, shared_prefix
from kdb.ingest.forward.checks import check_capture, chosen_prompts
from kdb.ingest.job import Job
from kdb.ingest.models.find import LoadedModel, ModelSource, check_revision
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.load import load_config, load_model, load_tokenizer, pick_device
from kdb.ingest.models.tokens import count_spelled
from kdb.ingest.progress import progress
from kdb.ingest.prompts import check_length, pose
from kdb.ingest.settings import Measuring, Probing, settings_from
from kdb.queries.domains import SITES
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.probes import Probe
from kdb.warehouse.storage import Storage
from kdb.warehouse.vectors import prompts_per_part


@dataclass(frozen=True)
class Scores:
    """The scores of new texts under the probes.

    ``texts`` has a row for each text, layer and site. ``layers`` has a row for each layer and site: how good the probe
    is on its own test part and, if the texts have labels, on those of them that it was not fitted to.
    """

    texts: pl.DataFrame
    layers: pl.DataFrame


def score_texts(
    storage: Storage,
    probes: Sequence[Probe],
    examples: Sequence[Example],
    model: ModelSource,
    *,
    name: str = "the new texts",
    device: str | None = None,
) -> Scores:
    """Run the model of some probes of one run on new texts, and apply the probes.

    Template, noise, number format and quantization are those of the run. Raises WarehouseError if ``model`` is not the
    run's, ModelError if it cannot be loaded, and DatasetError for a text that it cannot read. ``name`` names the texts.
    """
    folder = storage.find(probes[0].run)
    measured = measured_run(storage, folder)
    check_revision(model, folder.run, probes[0].revision)
    job = _job(measured, model, Dataset(name, name, rows_in(measured, "datasets")[0]["template"], tuple(examples)))
    token_ids = _tokens(job)
    dtype, quantize = job.measuring.dtype, job.measuring.quantize
    loaded = load_model(model, device=pick_device(device), dtype=dtype, quantize=quantize)
    decisions = _decisions(loaded, token_ids, probes)
    fresh = _fresh(job, folder, rows_in(measured, "prompts"), probes[0].split)
    return Scores(_texts(examples, fresh, probes, decisions), _layers(examples, fresh, probes, decisions))


def _job(measured: RunFolder, model: ModelSource, dataset: Dataset) -> Job:
    """Return the job that measures a dataset as a run was measured."""
    settings = json.loads(rows_in(measured, "runs")[0]["settings"])
    return Job(model, dataset, settings_from(Measuring, settings), Probing())


def _tokens(job: Job) -> list[list[int]]:
    tokenizer = load_tokenizer(job.source)
    token_ids = [prompt.token_ids for prompt in pose(job, tokenizer)]
    check_length(job, token_ids, load_config(job.source))
    count_spelled(tokenizer, token_ids).warn(job.dataset.name)
    return token_ids


def _decisions(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], probes: Sequence[Probe]) -> NDArray[np.float64]:
    """Return the decision values (text, probe); the states of a part of the texts are in memory at a time."""
    decisions = np.empty((len(token_ids), len(probes)))
    prefix = token_ids[0][: shared_prefix(token_ids)]
    order = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
    with (
        model_errors(f"{loaded.source.name} cannot be run"),
        progress("Reading texts", sum(map(len, token_ids)), "tokens") as shown,
    ):
        capture = Capture(loaded)
        check_capture(capture, [token_ids[i] for i in chosen_prompts(token_ids)], prefix)
        size = prompts_per_part(*capture.shape)
        for rows in (order[i : i + size] for i in range(0, len(order), size)):
            states, _ = capture.vectors_and_ends([token_ids[i] for i in rows], prefix, on_batch=shown.advance)
            for column, probe in enumerate(probes):
                decisions[rows, column] = probe.decision_function(states[:, probe.layer, SITES.index(probe.site)])
    return decisions


def _fresh(job: Job, probed: RunFolder, source: list[dict[str, Any]], split: str) -> NDArray[np.bool_]:
    """Return whether each text shares neither text nor group with the training part of the probes' dataset."""
    pairs = zip(job.texts, job.dataset.examples, strict=True)
    prompts = [{"text": text, "group_id": example.group} for text, example in pairs]
    fresh = np.zeros(len(prompts), dtype=np.bool_)
    fresh[unseen(prompts, source, tested_prompts(probed, {split})[split])] = True
    return fresh


def _texts(
    examples: Sequence[Example], fresh: NDArray[np.bool_], probes: Sequence[Probe], decisions: NDArray[np.float64]
) -> pl.DataFrame:
    """Return a row for each text and probe; there are no probabilities if the classifier has none."""
    each, one = len(probes), probes[0]
    log_odds = pl.col("decision") if one.has_probabilities else pl.lit(None, pl.Float64)
    texts = pl.DataFrame(
        {
            "text_id": range(len(examples)),
            "text": [example.text for example in examples],
            "label": pl.Series([example.label for example in examples], dtype=pl.Int16),
            "in_training": ~fresh,
        }
    )
    return (
        texts.select(pl.all().repeat_by(each).explode())
        .with_columns(
            layer=np.tile([probe.layer for probe in probes], len(examples)),
            site=pl.Series([probe.site for probe in probes] * len(examples), dtype=pl.String),
            decision=decisions.ravel(),
        )
        .with_columns(
            probability=1 / (1 + (-log_odds).exp()),
            predicted=(pl.col("decision") > 0).cast(pl.Int16),
            model=pl.lit(one.model),
            source_dataset=pl.lit(one.dataset),
            classifier=pl.lit(one.classifier),
            split=pl.lit(one.split),
            probe_run=pl.lit(one.run),
        )
    )


def _layers(
    examples: Sequence[Example], fresh: NDArray[np.bool_], probes: Sequence[Probe], decisions: NDArray[np.float64]
) -> pl.DataFrame:
    """Return a row for each probe; with its scores if the texts have labels."""
    labels = np.array([-1 if example.label is None else example.label for example in examples])[fresh]
    groups = np.array([i if e.group is None else e.group for i, e in enumerate(examples)], dtype=object)[fresh]
    rows = [
        {"layer": probe.layer, "site": probe.site, "source_accuracy": probe.accuracy, "source_auc": probe.auc}
        | (_scores(labels, decision, groups) if (labels >= 0).all() else {})
        | {"n": len(labels), "n_left_out": int((~fresh).sum())}
        for probe, decision in zip(probes, decisions[fresh].T, strict=True)
    ]
    return pl.DataFrame(rows)


def _scores(labels: NDArray[Any], decision: NDArray[np.float64], groups: NDArray[Any]) -> dict[str, float | None]:
    """Return AUC and accuracy with their intervals: no AUC if all labels are equal, neither if there are no texts."""
    names = ("auc", "auc_low", "auc_high", "accuracy", "accuracy_low", "accuracy_high")
    values: list[float | None] = [None] * len(names)
    _, group_of = np.unique(groups.astype(str), return_inverse=True)
    if len(np.unique(labels)) == 2:
        values[:3] = auc_interval(labels, decision, group_of)
    if len(labels):
        correct = (decision > 0) == labels
        values[3:] = float(np.mean(correct)), *accuracy_interval(correct, group_of)
    return dict(zip(names, values, strict=True))
