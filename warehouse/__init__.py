"""The warehouse: schema, folders and DuckDB. The only package that imports duckdb."""

from __future__ import annotations

import os
from pathlib import Path


def location_or_default(location: str | Path | None) -> str | Path:
    """Return the location of a warehouse, which defaults to ``$KDB_WAREHOUSE``, then to ``./kdb-warehouse``."""
    return location or os.environ.get("KDB_WAREHOUSE") or "kdb-warehouse"
