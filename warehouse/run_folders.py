"""Names and versions of the folders of committed runs, which are read as untrusted input.

    lake/model=M/dataset=D/run=R/<table>/<part>.parquet

Names are percent-encoded, so that every engine decodes them to the same text. A folder that kdb would have named
differently is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote, unquote

from kdb.errors import QueryError, UnknownNameError, WarehouseError
from kdb.warehouse.manifest import MANIFEST, RUN_ID, RunFolder

PLACEHOLDER = "__none__"
"""Model, dataset and run of the empty typed files, which keep every view valid before the first run."""

_LONGEST_NAME = 200
"""Maximum bytes of a name in its encoded form; the limit of file systems is 255."""

_RESERVED = {PLACEHOLDER, "__HIVE_DEFAULT_PARTITION__", "all"}
"""Names with a special meaning: the empty typed files, no value, and all names."""

_MOST_RUNS = 10
"""Maximum number of runs that a message lists."""


def partitions(model: str, dataset: str, run: str) -> str:
    """Return a run's folder within the lake. Raises WarehouseError for a name that no folder can have."""
    return f"model={_encoded(model)}/dataset={_encoded(dataset)}/run={run}"


def list_run_folders(lake: Path) -> list[RunFolder]:
    """Return the runs in a lake, by model, dataset and run.

    Raises WarehouseError for a folder that kdb would not have written: a link, a name in another encoding, or a
    duplicate run id.
    """
    folders: dict[str, RunFolder] = {}
    for model in _subfolders(lake, "model="):
        for dataset in _subfolders(model, "dataset="):
            for path in _subfolders(dataset, "run="):
                run = path.name.partition("=")[2]
                if run == PLACEHOLDER:
                    continue
                if not RUN_ID.fullmatch(run):
                    raise _foreign(path, "run ids are 16 hex digits")
                if run in folders:
                    raise _foreign(path, f"run {run} is also at {str(folders[run].path)!r}")
                version = version_of(path)
                if version is not None:
                    folders[run] = RunFolder(run, _decoded(model), _decoded(dataset), path, version)
    return in_order(folders.values())


def run_named(digits: str, runs: Mapping[str, str]) -> str:
    """Return the id that begins with these digits; ``runs`` says of each id what it is the run of.

    Raises UnknownNameError if there is none, QueryError if there are several.
    """
    found = [run for run in runs if run.startswith(digits.lower())]
    if not found:
        raise UnknownNameError("run", digits, runs, "`kdb runs` lists them.")
    if len(found) > 1:
        each = ", ".join(f"{run} ({runs[run]})" for run in found[:_MOST_RUNS])
        more = f" and {len(found) - _MOST_RUNS} more" if len(found) > _MOST_RUNS else ""
        raise QueryError(f"Several runs begin with {digits!r}: {each}{more}. Give more digits.")
    return found[0]


def in_order(folders: Iterable[RunFolder]) -> list[RunFolder]:
    """Return runs sorted by model, dataset and run."""
    return sorted(folders, key=lambda folder: (folder.model, folder.dataset, folder.run))


def version_of(run: Path) -> str | None:
    """Return a text that changes when the run in this folder is rewritten; None if removed, empty without manifest."""
    try:
        status = os.lstat(f"{run}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        return "" if run.is_dir() else None
    except OSError:  # a folder without read permission: reported when its files are inspected
        return ""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def table_files(run: Path, table: str) -> list[Path]:
    """Return the Parquet files of a table in a committed run's folder."""
    return sorted((run / table).glob("*.parquet"))


def empty_file(lake: Path, table: str) -> Path:
    """Return the path of the empty typed file that keeps a table's view valid."""
    return lake / f"model={PLACEHOLDER}/dataset={PLACEHOLDER}/run={PLACEHOLDER}" / table / "empty.parquet"


def _encoded(name: str) -> str:
    """Return a model's or dataset's name as a partition value, which every engine decodes to the same text."""
    text = quote(name, safe="", errors="surrogatepass")
    if name in _RESERVED or not name.strip() or len(text) > _LONGEST_NAME:
        raise WarehouseError(f"{name[:200]!r} cannot be stored as a name. Give another with --name or --dataset-name.")
    # DuckDB reads a bare null as NULL.
    return f"%{ord(text[0]):02X}{text[1:]}" if text.lower() == "null" else text


def _decoded(folder: Path) -> str:
    """Return the name encoded in a partition's folder. Raises WarehouseError if kdb would encode it differently."""
    value = folder.name.partition("=")[2]
    if value == PLACEHOLDER:
        return value
    name = unquote(value, errors="surrogatepass")
    try:
        expected = _encoded(name)
    except (WarehouseError, UnicodeError):
        raise _foreign(folder, "this name cannot be stored") from None
    if expected != value:
        raise _foreign(folder, f"the encoded name would be {expected!r}")
    return name


def _subfolders(parent: Path, prefix: str) -> list[Path]:
    # A folder can disappear between two checks, when another process removes a run.
    try:
        with os.scandir(parent) as entries:
            matching = [entry for entry in entries if entry.name.startswith(prefix)]
            for entry in matching:
                if not entry.is_dir(follow_symlinks=False):
                    raise _foreign(Path(entry.path), "it is a link or a file")
            return sorted(Path(entry.path) for entry in matching)
    except FileNotFoundError:
        return []
    except PermissionError as error:
        raise WarehouseError(f"{str(parent)!r} cannot be read: {error.strerror}. Check its permissions.") from error


def _foreign(path: Path, why: str) -> WarehouseError:
    return WarehouseError(
        f"{str(path)!r} was not written by kdb: {why}. Delete it, or move it out of the warehouse, then retry."
    )
