"""Compute runs from the stored activations of another run, without a model: refitted probes, and projections.

refit(storage, storage.find(source), Probing(splits=5))
project(storage, storage.find(source), ("pca",))
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdb.errors import WarehouseError
from kdb.ingest.concept.probing import Key, layer_shards, probing, read_layer, task_of_tables
from kdb.ingest.job import derived_identity
from kdb.ingest.rows import Rows, arrow_rows
from kdb.ingest.settings import Measuring, Probing
from kdb.ingest.stages import Outcome, PlannedRun, Shard, StoredStage, carry_out
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.parquet import read_parts
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.storage import Storage

if TYPE_CHECKING:
    from kdb.ingest.concept.projections import Project, Projection


def refit(storage: Storage, source: RunFolder, wanted: Probing, *, seed: int = Measuring.seed) -> Outcome:
    """Fit probes on the stored activations of a run, and store them as a new run that names its source.

    Raises WarehouseError if the source run has no activations, and DatasetError if its prompts cannot be split.
    """
    import kdb.ingest.concept.probes  # noqa: F401  (reports a missing library before anything is written)

    def prepare() -> list[StoredStage]:
        # Prompts that cannot be split are refused before anything is written.
        task_of_tables(lambda table: read_parts(table_files(source.path, table)), source.dataset, wanted, seed)
        return probing(wanted, seed)

    return derive(storage, source, "probe", {"seed": seed, **asdict(wanted)}, prepare, seed=seed)


def project(storage: Storage, source: RunFolder, methods: Sequence[str]) -> Outcome:
    """Project the stored activations of a run onto two axes, layer by layer, and store them as a new run.

    ``methods`` are those of ``projector``. Raises KdbError if a method's library is not installed, and WarehouseError
    if the source run has no activations.
    """
    from kdb.ingest.concept.projections import projector

    projectors = {method: projector(method) for method in methods}
    stage = StoredStage(
        ("projections",),
        layer_shards,
        functools.partial(_projected, projectors),
        read=lambda run: run.files("activations"),
        shown=("Projecting", "layers"),
    )
    return derive(storage, source, "project", {"projections": list(methods)}, lambda: [stage])


def derive(
    storage: Storage,
    source: RunFolder,
    kind: str,
    settings: Mapping[str, Any],
    stages: Callable[[], Sequence[StoredStage]],
    **changed: Any,
) -> Outcome:
    """Carry out a run computed from ``source``; ``changed`` are other columns of ``runs``.

    ``stages`` is called only if the run is not stored yet. Raises WarehouseError if the source run lacks vectors.
    """
    storage.inspect([source], vectors=True)
    with _reading(source):
        check_vectors(source, table_files(source.path, "activations"))
        row = read_parts(table_files(source.path, "runs")).to_pylist()[0]
        changed |= {"source_run": source.run, "settings": json.dumps(json.loads(row["settings"]) | settings)}
    identity = derived_identity(kind, "concept", source, settings)
    planned = PlannedRun(
        identity,
        source.model,
        source.dataset,
        row | changed,
        lambda: (None, stages()),
        source=source,
        copied=("models", "datasets"),
    )
    return carry_out(storage, planned)


@contextlib.contextmanager
def _reading(source: RunFolder) -> Iterator[None]:
    """Raise WarehouseError for tables that kdb did not write, since a run may come from elsewhere."""
    try:
        yield
    except (pa.ArrowException, LookupError, ValueError, TypeError, OverflowError) as error:
        raise WarehouseError(
            f"Cannot compute from run {source.run} ({source.model} on {source.dataset}): its tables are not as kdb "
            f"writes them ({type(error).__name__}: {error})."
        ) from error


def check_vectors(source: RunFolder, activations: Sequence[Path]) -> None:
    """Raise WarehouseError unless the run has the vectors of all of its prompts."""
    again = f"To measure them again, use `kdb runs remove {source.run}` and `kdb ingest`."
    if not activations:
        raise WarehouseError(f"Run {source.run} has no activations to compute from. {again}")
    n_prompts = len(read_parts(table_files(source.path, "prompts")))
    kept = sum(pq.ParquetFile(path).metadata.row_group(0).num_rows for path in activations)
    if kept < n_prompts:
        raise WarehouseError(
            f"Run {source.run} has the vectors of only {kept:,} of its {n_prompts:,} prompts (kdb runs keep-vectors), "
            f"and this command needs all of them. {again}"
        )


def _projected(projectors: Mapping[str, Project], activations: list[Path], shard: Shard) -> list[Rows]:
    """The rows of ``projections`` for one layer and site."""
    X = read_layer(activations, shard.work)
    rows = [_projection_rows(shard.work, method, project(X)) for method, project in projectors.items()]
    return [Rows("projections", [pa.concat_tables(rows)])]


def _projection_rows(key: Key, method: str, projection: Projection) -> pa.Table:
    """Rows of ``projections``; prompts are numbered in the order of their vectors."""
    explained = projection.explained or (None, None)
    return arrow_rows(
        "projections",
        {
            "prompt_id": np.arange(len(projection.axes)),
            "layer": key[0],
            "site": key[1],
            "method": method,
            "pc1": projection.axes[:, 0],
            "pc2": projection.axes[:, 1],
            "explained1": explained[0],
            "explained2": explained[1],
        },
    )
