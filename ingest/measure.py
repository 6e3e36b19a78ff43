"""Measure a model on a dataset, with the study that the dataset belongs to.

ingest(storage, job, load)
ingest_on(storage, job, engine)
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from kdb.ingest.execution.local import LocalEngine
from kdb.ingest.job import Job
from kdb.ingest.models.find import LoadedModel, training_step
from kdb.ingest.stages import Engine, Outcome, PlannedRun, Stage, Subject, carry_out
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.parquet import read_parts
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.storage import Storage

log = logging.getLogger(__name__)


def ingest(storage: Storage, job: Job, load: Callable[[], LoadedModel], *, batch_tokens: int | None = None) -> Outcome:
    """Measure one model on one dataset in this process, and commit the run; do nothing if the run exists.

    ``load`` loads the model; it is called only if the model is still needed.
    Raises DatasetError, ModelError or WarehouseError. Finished shards stay in staging, and the same job resumes there.
    """
    return ingest_on(storage, job, LocalEngine(load, batch_tokens))


def ingest_on(storage: Storage, job: Job, engine: Engine) -> Outcome:
    """Measure one model on one dataset on ``engine``. Only this process writes to the warehouse."""

    def prepare() -> tuple[Subject[Any], Sequence[Stage]]:
        _warn_of_namesakes(storage, job)
        # The studies import NumPy and more: not needed, and slow, if the run is stored already.
        if job.study == "knowledge":
            from kdb.ingest.attribution.study import prepare as prepare_knowledge

            return prepare_knowledge(job)
        from kdb.ingest.concept.study import prepare as prepare_concept

        return prepare_concept(job)

    planned = PlannedRun(job.identity, job.source.name, job.dataset.name, _columns(job), prepare)
    return carry_out(storage, planned, engine)


def _columns(job: Job) -> dict[str, Any]:
    """The columns of ``runs`` that describe the job."""
    step = training_step(job.source.pinned)
    return {
        "study": job.study,
        "variant": job.variant,
        "settings": json.dumps(job.identity | ({} if step is None else {"step": step})),
        "seed": job.measuring.seed,
        "noise": "aaa or bbb" if job.measuring.noise else None,
    }


def _warn_of_namesakes(storage: Storage, job: Job) -> None:
    """Warn if a different model is stored under this name, when this one is measured for the first time."""
    source, others = job.source, dict[str, int]()
    mark = f"revision={source.pinned}" if source.pinned else ""
    for folder in storage.run_folders():
        if folder.model != source.name:
            continue
        with contextlib.suppress(OSError, LookupError, pa.ArrowException):  # removed a moment ago, or damaged
            variant = _value(folder, "runs", "variant").split(" ")[0]
            if (variant if variant.startswith("revision=") else "") == mark:
                revision = _value(folder, "models", "revision")
                others[revision] = others.get(revision, 0) + 1
    if others and source.revision not in others:
        stored = "; ".join(f"revision {revision[:12]}…, {n} run{'s' * (n > 1)}" for revision, n in others.items())
        log.warning(
            "Another model is stored as %r: its weights, config or tokenizer differ, or an older kdb measured it (%s). "
            "Both are kept; this one has the revision %s…. To store it under another name, add --name.",
            *(source.name, stored, source.revision[:12]),
        )


def _value(folder: RunFolder, table: str, column: str) -> str:
    return str(read_parts(table_files(folder.path, table))[column][0].as_py())
