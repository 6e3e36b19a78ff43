"""Runs computed from the stored activations of another: probes fitted again, and projections. No model is loaded.

refit(lake, lake.find(source), Probing(splits=5))
project(lake, lake.find(source), ("pca",))
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdb.errors import WarehouseError
from kdb.ingest.concept.study import Key, Outcome, layer_keys, part_name, probe_layers, read_layer
from kdb.ingest.describe import arrow_rows, made_by, read_parts, table_files
from kdb.ingest.job import Measuring, Probing, begin, derived_identity
from kdb.ingest.progress import progress
from kdb.warehouse.lake import Lake, StagedRun
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.migration import upgraded

if TYPE_CHECKING:
    from kdb.ingest.concept.projections import Project, Projection


def refit(lake: Lake, source: RunFolder, probing: Probing, *, seed: int = Measuring.seed) -> Outcome:
    """Fit probes on the stored activations of a run, as a run of its own that names its source.

    Raises WarehouseError if the source run has no activations.
    """

    def fill(staged: StagedRun, activations: Sequence[Path]) -> None:
        probe_layers(staged, table_files(source.path, "prompts"), activations, probing, seed)

    return _derive(lake, source, "probe", {"seed": seed, **asdict(probing)}, fill, seed=seed)


def project(lake: Lake, source: RunFolder, methods: Sequence[str]) -> Outcome:
    """Project the stored activations of a run onto two axes, layer by layer, as a run of its own.

    ``methods`` are those of ``projector``. Raises KdbError where one's library is not installed, and WarehouseError if
    the source run has no activations.
    """
    from kdb.ingest.concept.projections import projector

    projectors = {method: projector(method) for method in methods}

    def fill(staged: StagedRun, activations: Sequence[Path]) -> None:
        _project_layers(staged, activations, projectors)

    return _derive(lake, source, "project", {"projections": list(methods)}, fill)


def _derive(
    lake: Lake,
    source: RunFolder,
    kind: str,
    settings: Mapping[str, Any],
    fill: Callable[[StagedRun, Sequence[Path]], None],
    **changed: Any,
) -> Outcome:
    """Let ``fill`` write the tables of a run that is ``source`` but for its settings and ``changed`` of its row."""
    lake.look([source], vectors=True)
    activations = table_files(source.path, "activations")
    with _told_of(source):
        _check_vectors(source, activations)
        copied = {t: upgraded(t, read_parts(table_files(source.path, t))) for t in ("models", "datasets")}
        row = read_parts(table_files(source.path, "runs")).to_pylist()[0]
        changed |= {"source_run": source.run, "settings": json.dumps(json.loads(row["settings"]) | settings)}
    identity = derived_identity(kind, "concept", source, settings)
    with begin(lake, identity, source.model, source.dataset) as staged:
        if staged.committed:
            return Outcome(staged.run, "exists")
        for table, rows in copied.items():
            staged.write(table, "part", [rows])
        fill(staged, activations)
        staged.commit(row | changed | made_by("cpu", with_model=False))
    return Outcome(staged.run, "committed")


@contextlib.contextmanager
def _told_of(source: RunFolder) -> Iterator[None]:
    """Raise a WarehouseError where the tables of a run are not what kdb writes: a folder may be a stranger's."""
    try:
        yield
    except (pa.ArrowException, LookupError, ValueError, TypeError, OverflowError) as error:
        raise WarehouseError(
            f"Run {source.run} ({source.model} on {source.dataset}) cannot be computed from: its tables are not as kdb "
            f"writes them ({type(error).__name__}: {error})."
        ) from error


def _check_vectors(source: RunFolder, activations: Sequence[Path]) -> None:
    """Raise WarehouseError unless the run has the vectors of all of its prompts."""
    again = f"To have them again, `kdb runs remove {source.run}` and `kdb ingest`."
    if not activations:
        raise WarehouseError(f"Run {source.run} has no activations to compute from. {again}")
    n_prompts = len(read_parts(table_files(source.path, "prompts")))
    kept = sum(pq.ParquetFile(path).metadata.row_group(0).num_rows for path in activations)
    if kept < n_prompts:
        raise WarehouseError(
            f"Run {source.run} keeps the vectors of {kept:,} of its {n_prompts:,} prompts (kdb runs keep-vectors), and "
            f"this needs all of them. {again}"
        )


def _project_layers(staged: StagedRun, activations: Sequence[Path], projectors: Mapping[str, Project]) -> None:
    """Project every layer and site that has no finished part yet."""
    keys = layer_keys(read_parts(staged.parts("models")).to_pylist()[0])
    left = [key for key in keys if not staged.has("projections", part_name(key))]
    with progress("projections", len(keys), "layers", done=len(keys) - len(left)) as shown:
        for key in left:
            begun = time.monotonic()
            X = read_layer(list(activations), key)
            rows = [_projection_rows(key, method, project(X)) for method, project in projectors.items()]
            staged.write("projections", part_name(key), [pa.concat_tables(rows)], seconds=time.monotonic() - begun)
            shown.advance(1)


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
