"""The demo warehouse: results of real models that come with kdb, as a ZIP file."""

from __future__ import annotations

import contextlib
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from kdb.errors import WarehouseError

PACKED = Path(__file__).parent / "demo.zip"


@contextlib.contextmanager
def unpacked() -> Iterator[Path]:
    """Unpack the demo warehouse to a temporary folder, which is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="kdb-demo-") as folder:
        save(Path(folder))
        yield Path(folder)


def save(folder: Path) -> None:
    """Write the demo warehouse to a folder that is new or empty. Raises WarehouseError for any other."""
    if folder.exists() and any(folder.iterdir()):
        raise WarehouseError(f"{folder} is not empty. Choose the name of a new folder for the demo warehouse.")
    with zipfile.ZipFile(PACKED) as packed:
        packed.extractall(folder)
