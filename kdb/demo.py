"""The demo warehouse that comes with kdb, as a ZIP file: measured results to look at, without a model."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from kdb.errors import WarehouseError

DEMO = Path(__file__).parent / "web/demo.zip"


def unpack_demo() -> tempfile.TemporaryDirectory[str]:
    """Unpack the demo warehouse into a temporary folder, which is deleted when the returned object is."""
    folder = tempfile.TemporaryDirectory(prefix="kdb-demo-")
    save_demo(Path(folder.name))
    return folder


def save_demo(folder: Path) -> None:
    """Write the demo warehouse to a folder that is new or empty. Raises WarehouseError for any other."""
    if folder.exists() and any(folder.iterdir()):
        raise WarehouseError(f"{folder} is not empty. Choose the name of a new folder for the demo warehouse.")
    with zipfile.ZipFile(DEMO) as packed:
        packed.extractall(folder)
