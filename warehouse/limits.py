"""Restrictions of a connection: it reads one lake and nothing else, within limits of memory and threads."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from kdb.queries.catalogue import literal
from kdb.warehouse.views import escape_glob


@dataclass(frozen=True)
class Limits:
    """Limits of one connection for untrusted queries: bytes of memory, and number of threads."""

    memory: int
    threads: int


def restrict(
    connection: duckdb.DuckDBPyConnection, lake: Path, limits: Limits | None, also: Sequence[str] = ()
) -> None:
    """Restrict the connection to reading the lake and the paths ``also``, and lock its settings."""
    # DuckDB compares the path with a view's glob as written, including escapes.
    readable = f"[{', '.join(map(literal, [str(lake.resolve()), escape_glob(lake), *also]))}]"
    if limits is not None:
        connection.execute(
            f"SET memory_limit = '{limits.memory}B'; SET threads = {limits.threads};"
            f"SET max_temp_directory_size = '{4 * limits.memory}B';"
            # Committed files never change, so their footers can be cached.
            "SET parquet_metadata_cache = true; SET enable_progress_bar = false"
        )
    spill = Path(tempfile.gettempdir()) / f"kdb-{os.getpid()}-{secrets.token_hex(4)}"
    connection.execute(
        "SET TimeZone = 'UTC';"
        "SET python_enable_replacements = false;"  # FROM name must not find a Python variable
        f"SET temp_directory = {literal(str(spill))};"  # default: .tmp in the current folder; created if needed
        f"SET allowed_directories = {readable};"
        "SET enable_external_access = false;"
        "SET lock_configuration = true"
    )
