"""The dataset card: README.md of a folder of runs, for the hub, for `datasets` and for readers.

Its header has a config for each table that has rows. For vectors, it has one for each model, because the vectors of a
config must have the same length. Text above or below kdb's part of the card is preserved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kdb.queries.catalogue import literal
from kdb.text import Code, markdown, markdown_table, one_line
from kdb.warehouse.manifest import RunFolder, row_counts
from kdb.warehouse.schema import PARTITIONS, TABLES, columns_of, has_vectors
from kdb.warehouse.store import Warehouse

BEGIN, END = "<!-- kdb: what stands from here on is written anew -->", "<!-- kdb: until here -->"
UNKNOWN = "unknown"
"""The hub's value for an unspecified licence."""

_LISTED = 200
"""Maximum number of runs that the card lists; the table runs has all of them."""


def write_card(warehouse: Warehouse, name: str, *, licence: str | None = None, before: str = "") -> str:
    """Return the card of a warehouse whose location is ``name``, a folder or hf://datasets/OWNER/NAME.

    ``before`` is the existing card. Its text and its licence, unless another is given, are preserved.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    old = DatasetCard(before or "---\n{}\n---\n", ignore_metadata_errors=True)  # it warns if there is no header
    folders = warehouse.storage.run_folders()
    kept: dict[str, Any] = old.data.to_dict()  # type: ignore[no-untyped-call]  # untyped there
    kept["license"] = licence or kept.get("license") or UNKNOWN
    kept["tags"] = list(dict.fromkeys([*(kept.get("tags") or ()), "kdb", "interpretability"]))
    kept["configs"] = [{"config_name": c, "data_files": files} for c, files in configs(folders).items()]
    above, _, rest = old.text.partition(BEGIN)
    below = rest.partition(END)[2]
    text = "\n".join(_text(warehouse, name, folders, kept["license"]))
    return (
        f"---\n{DatasetCardData(**kept).to_yaml()}\n---\n{above.strip()}\n\n{BEGIN}\n\n{text}\n{END}\n\n{below.strip()}".strip()
        + "\n"
    )


def configs(folders: Sequence[RunFolder]) -> dict[str, str]:
    """Return each config for `datasets`, and the files that it reads."""
    globs = {}
    for name in TABLES:
        having = [folder for folder in folders if row_counts(folder).get(name)]
        if has_vectors(name):
            for model in sorted({folder.path.parents[1].name for folder in having}):
                globs[f"{name}-{model.removeprefix('model=')}"] = f"lake/{model}/*/*/{name}/*.parquet"
        elif having:
            globs[name] = f"lake/*/*/*/{name}/*.parquet"
    return globs


def _text(warehouse: Warehouse, name: str, folders: Sequence[RunFolder], licence: str) -> list[str]:
    title = name.rstrip("/").rpartition("/")[2]
    return [
        f"# {markdown(title)}",
        "",
        "Measurements by kdb of where language models store what they know: runs of models on prompts, as Parquet "
        "files under `lake/model=M/dataset=D/run=R/TABLE/`.",
        "",
        *_models(warehouse),
        *_runs(warehouse),
        *_loading(name, list(configs(folders))),
        *_tables(sorted({table for folder in folders for table, rows in row_counts(folder).items() if rows})),
        "## Licence",
        "",
        f"{_licence(licence)} The models and the datasets of prompts have their own licences.",
        "",
    ]


def _licence(licence: str) -> str:
    if licence == UNKNOWN:
        return "No licence is specified for this data. Ask its authors before you publish it."
    return f"Licence of this data: {markdown(licence)}."


def _models(warehouse: Warehouse) -> list[str]:
    rows = warehouse.sql(
        "SELECT DISTINCT model, source, revision, architecture, n_layers, hidden_size, n_params, dtype, quantization "
        "FROM models ORDER BY ALL"
    ).to_dicts()
    return ["## Models", "", *_table(rows), ""]


def _runs(warehouse: Warehouse) -> list[str]:
    rows = warehouse.sql(
        "SELECT run, model, dataset, study, variant, kdb_version AS kdb, settings FROM runs "
        "ORDER BY finished_at DESC, run"
    ).to_dicts()
    for row in rows:
        row["settings"] = Code(_short(row["settings"]))
    more = [f"… and {len(rows) - _LISTED} more in the table `runs`.", ""] if len(rows) > _LISTED else []
    return ["## Runs and settings", "", *_table(rows[:_LISTED]), "", *more]


def _short(settings: str | None) -> str:
    """Return the settings without those that other columns of the card show."""
    shown = {"study", "model", "dataset", "revision", "fingerprint", "source_run", "units"}
    try:
        options = dict(json.loads(settings or "{}"))
    except (ValueError, TypeError, RecursionError):  # an imported run may contain anything
        return settings or ""
    return json.dumps({k: v for k, v in options.items() if k not in shown and v not in (None, False)})


def _loading(name: str, names: Sequence[str]) -> list[str]:
    name = one_line(name)
    repository = name.removeprefix("hf://datasets/")
    config = "head_scores" if "head_scores" in names else names[0]
    table = config.partition("-")[0]
    files = f"{name.rstrip('/')}/lake/*/*/*/{table}/*.parquet"
    lines = [
        *("## How to read the data", "", "With `datasets`:", "", "```python", "from datasets import load_dataset", ""),
        *(f'rows = load_dataset({json.dumps(repository, ensure_ascii=False)}, "{config}", split="train")', "```", ""),
        *("In DuckDB, without downloading all files:", "", "```sql"),
        *(f"SELECT * FROM read_parquet({literal(files)}, hive_partitioning = true) LIMIT 10;", "```", ""),
    ]
    command = f"kdb pull {name}" if name.startswith("hf:") else f"kdb import {name}"
    return [*lines, "With kdb, into a warehouse with saved queries:", "", f"    {command}", ""]


def _tables(names: Sequence[str]) -> list[str]:
    lines = ["## Tables", "", "Each table is a config. Every table also has these columns:", ""]
    lines += [f"- `{name}` (VARCHAR): {meaning}" for name, meaning in PARTITIONS.items()]
    for name in names:
        lines += ["", f"### {name}", "", f"One row per {TABLES[name].comment}.", "", *columns_of(TABLES[name])]
    return [*lines, ""]


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    return markdown_table(list(rows[0]), (list(map(_cell, row.values())) for row in rows)) if rows else ["None."]


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)
