"""Measure where a language model stores what it knows, and query the results in SQL.

import kdb
kdb.open("kdb-warehouse").query("concept-depth")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


def open(path: str | Path | None = None) -> Warehouse:  # noqa: A001  (kdb.open, as one opens a file)
    """Open the warehouse at ``path``, which defaults to ``$KDB_WAREHOUSE``, then to ``./kdb-warehouse``.

    Raises kdb.errors.WarehouseError if there is none.
    """
    # Imported here, so that `import kdb.errors` and `kdb --help` load neither DuckDB nor Polars.
    from kdb.warehouse.store import Warehouse

    return Warehouse(path or os.environ.get("KDB_WAREHOUSE") or "kdb-warehouse")
