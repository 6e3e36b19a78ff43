"""Activations on disk, with a row group for each layer and site, so that reading a layer skips all others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdb.errors import WarehouseError
from kdb.warehouse.schema import arrow_schema

PART_BYTES = 64 * 2**20
GPU_PART_BYTES = 256 * 2**20
"""Bytes of one part if a GPU captures, because smaller batches of a large model would leave it idle."""


def prompts_per_part(n_layers: int, n_sites: int, hidden_size: int, part_bytes: int = PART_BYTES) -> int:
    """Return the number of prompts whose float32 vectors fill one part, which is held in memory."""
    return max(1, part_bytes // (4 * n_layers * n_sites * hidden_size))


def activation_groups(
    prompt_ids: Sequence[int],
    sites: Sequence[str],
    vectors: NDArray[np.float32],
    *,
    float16: bool = False,
    lacking: Collection[tuple[int, str]] = (),
) -> Iterator[pa.Table]:
    """Convert vectors (prompt, layer, site, hidden) into Arrow tables, one per site and layer.

    ``lacking`` are layers and sites that the model does not have: a block without an FFN has no input of one.
    Raises WarehouseError if ``float16`` is set and a value exceeds its range (65,504).
    """
    order = np.argsort(prompt_ids)
    ids = pa.array(np.asarray(prompt_ids, dtype=np.int32)[order])
    schema = arrow_schema("activations", vector_size=vectors.shape[-1], float16=float16)
    for s, site in enumerate(sites):
        for layer in (i for i in range(vectors.shape[1]) if (i, site) not in lacking):
            rows = _narrow(vectors[order, layer, s], layer, site) if float16 else vectors[order, layer, s]
            flat = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[-1])
            same = [pa.array([layer] * len(ids), pa.int16()), pa.array([site] * len(ids))]
            yield pa.table([ids, *same, flat], schema=schema)


def stored_places(part: Path) -> set[tuple[int, str]]:
    """Return the layers and sites of which a part has vectors: all of them, unless blocks lack an FFN."""
    table = pq.read_table(part, columns=["layer", "site"]).group_by(["layer", "site"]).aggregate([])
    return set(zip(table["layer"].to_pylist(), table["site"].to_pylist(), strict=True))


def read_vectors(parts: Sequence[Path], layer: int, site: str) -> NDArray[np.float32]:
    """Return the vectors (prompt, hidden) of one layer and site, in order of prompt_id."""
    wanted = (pc.field("layer") == layer) & (pc.field("site") == site)
    tables = [pq.read_table(part, columns=["prompt_id", "vector"], filters=wanted) for part in parts]
    table = pa.concat_tables(tables).combine_chunks()
    column = table["vector"].chunk(0)
    rows = column.flatten().to_numpy().reshape(len(table), -1)
    order = np.argsort(table["prompt_id"].to_numpy())
    return np.ascontiguousarray(rows[order], dtype=np.float32)


def read_states(parts: Sequence[Path], prompt_ids: Sequence[int], site: str) -> NDArray[np.float32]:
    """Return the vectors (prompt, layer, hidden) of some prompts at one site, in the order given."""
    wanted = (pc.field("site") == site) & pc.field("prompt_id").isin(prompt_ids)
    table = pa.concat_tables(pq.read_table(part, filters=wanted) for part in parts).combine_chunks()
    flat: NDArray[np.float32] = table["vector"].chunk(0).flatten().to_numpy().astype(np.float32)
    rows = flat.reshape(len(table), -1)
    position = {prompt: i for i, prompt in enumerate(prompt_ids)}
    order = np.lexsort((table["layer"].to_numpy(), [position[i] for i in table["prompt_id"].to_pylist()]))
    return np.ascontiguousarray(rows[order]).reshape(len(prompt_ids), -1, rows.shape[1])


def _narrow(rows: NDArray[np.float32], layer: int, site: str) -> NDArray[np.float16]:
    largest = float(np.abs(rows).max())
    if largest > float(np.finfo(np.float16).max):
        raise WarehouseError(
            f"Layer {layer} ({site}) has values up to {largest:,.0f}, but the limit of float16 is 65,504. "
            "Store these vectors with --store float32."
        )
    return rows.astype(np.float16)
