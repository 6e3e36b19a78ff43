"""What the runs of both studies store about themselves before they measure, and how they write and read tables."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdb.errors import DatasetError, ModelError
from kdb.ingest.job import Job
from kdb.ingest.models.load import count_params, model_row
from kdb.ingest.models.provenance import provenance
from kdb.warehouse.lake import StagedRun
from kdb.warehouse.schema import arrow_schema


def describe_run(staged: StagedRun, job: Job, config: Any) -> None:
    """Write the rows of ``models`` and ``datasets``."""
    m = job.measuring
    shape = model_row(job.source, config, count_params(config), m.dtype)
    staged.write_rows("models", "part", [shape | provenance(job.source, m.quantize)])
    dataset = {
        "study": job.study,
        "source": job.dataset.source,
        "fingerprint": job.dataset.fingerprint,
        "template": job.dataset.template,
        "n_prompts": len(job.dataset.examples),
        "n_positive": job.dataset.n_positive,
    }
    staged.write_rows("datasets", "part", [dataset])


def made_by(device: str | None, *, with_model: bool = True) -> dict[str, Any]:
    """The columns of ``runs`` that say which versions computed a run, and where; ``with_model`` if a model ran.

    What is computed here is not imported, wherever the run comes from that it is computed of.
    """
    libraries = ("torch", "transformers")
    return {
        "kdb_version": importlib.metadata.version("kdb-lm"),
        **{f"{name}_version": importlib.metadata.version(name) if with_model else None for name in libraries},
        "device": device,
        **dict.fromkeys(("imported_from", "imported_at", "preferred")),
    }


def check_length(job: Job, token_ids: Sequence[Sequence[int]], config: Any, *, n_cue: int = 0) -> None:
    """Raise DatasetError for a prompt without tokens, or with more, its cue's included, than the model reads.

    Raise ModelError for a tokenizer that is another model's: it has tokens that this one does not.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    largest = max((max(ids) for ids in token_ids if ids), default=0)
    if largest >= text.vocab_size:
        raise ModelError(
            f"The tokenizer of {job.source.name} does not belong to its weights: it gives token {largest:,}, and there "
            f"are {text.vocab_size:,}, numbered from 0."
        )
    for number, ids in enumerate(token_ids):
        if limit is not None and len(ids) + n_cue > limit:
            cue = f" and {n_cue} of its cue" if n_cue else ""
            raise DatasetError(
                f"Prompt {number} of {job.dataset.name!r} has {len(ids):,} tokens{cue}, and {job.source.name} reads "
                f"at most {limit:,}: shorten the text, or take a model with a longer context."
            )
        if not ids:
            raise DatasetError(f"Prompt {number} of {job.dataset.name!r} has no tokens for {job.source.name}.")


def arrow_rows(table: str, columns: dict[str, Any]) -> pa.Table:
    """Rows of a table from arrays of one shape, or of shapes that broadcast; columns left out are NULL."""
    arrays = {k: np.asarray(v.cpu() if hasattr(v, "cpu") else v) for k, v in columns.items() if v is not None}
    shape = np.broadcast_shapes(*(a.shape for a in arrays.values()))
    n = int(np.prod(shape))
    schema = arrow_schema(table)
    return pa.table(
        [
            pa.array(np.broadcast_to(arrays[f.name], shape).ravel()).cast(f.type)
            if f.name in arrays
            else pa.nulls(n, f.type)
            for f in schema
        ],
        schema=schema,
    )


def table_files(run: Path, table: str) -> list[Path]:
    """The Parquet files of a table in a committed run's folder."""
    return sorted((run / table).glob("*.parquet"))


def read_parts(parts: Sequence[Path]) -> pa.Table:
    """The rows of some Parquet files of one table."""
    return pa.concat_tables((pq.ParquetFile(part).read() for part in parts), promote_options="default")
