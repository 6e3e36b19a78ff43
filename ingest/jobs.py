"""From the options of an ingest to its runs: which datasets, which jobs, and the engine of this process.

    asked = complete(combine({"model": "smollm2-135m", **options}), options)
    for one in asked:
        with local_engine(one) as engine:
            outcomes = [ingest_on(storage, job, engine) for job in jobs(one)]

The options are those of ``kdb ingest`` and of ``kdb.ingest()``, by the names of ``settings.py`` and ``DEFAULTS``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdb.errors import PlanError
from kdb.ingest.datasets import Dataset, available_datasets, load_dataset
from kdb.ingest.execution.local import LocalEngine
from kdb.ingest.job import Job
from kdb.ingest.models.find import LoadedModel, check_named, find_model
from kdb.ingest.plan_file import Asked, check_distinct
from kdb.ingest.settings import ALWAYS_FITTED, Attributing, Measuring, Probing, settings_from

_TEXTS = ("dataset_name", "template", "limit", "group_by", "positive", "ask", "answers")
"""Options of ``load_dataset``."""


def complete(asked: Iterable[Asked], options: Mapping[str, Any]) -> list[Asked]:
    """Add the options to each model's own, and the built-in datasets where none is named; check all names.

    Raises PlanError for the same run twice, UnknownNameError for an unknown model or dataset.
    """
    named = [
        replace(one, datasets=one.datasets or tuple(_built_in(options["data_dir"])), options={**options, **one.options})
        for one in asked
    ]
    check_distinct(named)
    for one in named:
        if one.loaded is None:
            check_named(one.model)
        for dataset in one.datasets:  # find wrong names before looking for any model
            _dataset(dataset, one.options)
    return named


def jobs(asked: Asked) -> list[Job]:
    """Return all runs of a model at a revision, found and checked before any work."""
    options = asked.options
    if options["dataset_name"] and len(asked.datasets) != 1:
        raise PlanError("--dataset-name names one dataset. Give exactly one --dataset with it.")
    texts = [_dataset(name, options) for name in asked.datasets]
    loaded = asked.loaded
    source = loaded.source if loaded else find_model(asked.model, name=options["name"], revision=asked.revision)
    custom = options["template"] is not None
    measuring, attributing = settings_from(Measuring, options), settings_from(Attributing, options)
    return [Job(source, dataset, measuring, probing(options), custom, attributing) for dataset in texts]


def probing(options: Mapping[str, Any]) -> Probing:
    """Return the settings of the probes, with the classifiers that are always fitted."""
    return Probing(tuple(dict.fromkeys((*ALWAYS_FITTED, *options["classifiers"]))), options["splits"])


def local_engine(asked: Asked, source: Any) -> LocalEngine:
    """Return the engine of this process, which loads the model when it is first needed."""
    options = asked.options

    @functools.cache
    def load() -> LoadedModel:
        if asked.loaded is not None:
            return asked.loaded
        from kdb.ingest.models import load as loading  # torch

        return loading.load_model(
            source,
            device=loading.pick_device(options["device"]),
            dtype=options["dtype"],
            quantize=options["quantize"],
        )

    return LocalEngine(load, options["batch_tokens"])


def forget_datasets() -> None:
    """Read the files of datasets again when they are next needed."""
    _load_dataset.cache_clear()


def _built_in(data_dir: Path | None) -> Sequence[str]:
    return [info.name for info in available_datasets(data_dir) if info.status == "built in" and info.by_default]


def _dataset(name: str, options: Mapping[str, Any]) -> Dataset:
    return _load_dataset(name, options["data_dir"], **{option: options[option] for option in _TEXTS})


@functools.cache
def _load_dataset(name: str, data_dir: Any, **texts: Any) -> Dataset:
    return load_dataset(name, data_dir=Path(data_dir) if data_dir else None, **texts)
