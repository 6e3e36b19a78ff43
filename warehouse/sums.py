"""Sums of scores, computed when a run is stored, so that queries about all prompts need not read each one.

    write_neuron_sums(staged)

Code that writes a run's scores must write their sums, too: readers do not check that they exist.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa

from kdb.queries.catalogue import exact_sums, neuron_sums
from kdb.queries.domains import PROVED_RANKS
from kdb.warehouse.schema import arrow_schema
from kdb.warehouse.staged_run import StagedRun


def write_neuron_sums(staged: StagedRun) -> None:
    """Write ``neuron_sums`` of a run that has its ``neuron_scores`` and ``prompts``. Raises WarehouseError."""
    begun = time.monotonic()
    sums = sum_neurons(*(staged.parts(table) for table in ("neuron_scores", "candidate_scores", "prompts")))
    staged.write("neuron_sums", "part", [sums], seconds=time.monotonic() - begun)


def sum_neurons(scores: Sequence[Path], candidates: Sequence[Path], prompts: Sequence[Path]) -> pa.Table:
    """Return the rows of ``neuron_sums`` for the parts of ``neuron_scores``, each with different prompts.

    The sums of candidates come from the parts of ``candidate_scores``, which have them in every prompt. Parts are added
    one by one, so that they fit into memory, and rows in their order, so that the same parts give the same sums to the
    last bit.
    """
    schema, files = arrow_schema("neuron_sums"), [str(path) for path in prompts]
    summed = schema.empty_table()
    with duckdb.connect(config={"threads": 1}) as connection:
        for path in scores:
            connection.register("summed", summed)
            added = connection.sql(neuron_sums(), params={"scores": str(path), "prompts": files})
            summed = added.to_arrow_table().cast(schema)
        if candidates:
            connection.register("summed", summed)
            paths = [str(path) for path in candidates]
            params = {"candidates": paths, "prompts": files, "n_proved": PROVED_RANKS}
            ranked = connection.sql(exact_sums(), params=params)
            summed = ranked.to_arrow_table().cast(schema)
    return summed
