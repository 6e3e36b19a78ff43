"""The demo warehouse that comes with kdb: measured results to look at, without a model."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

DEMO = Path(__file__).parent / "web/demo.zip"


def unpack_demo() -> tempfile.TemporaryDirectory[str]:
    """Unpack the demo warehouse into a temporary folder, which is deleted when the returned object is."""
    folder = tempfile.TemporaryDirectory(prefix="kdb-demo-")
    with zipfile.ZipFile(DEMO) as packed:
        packed.extractall(folder.name)
    return folder
