"""Charts as files: HTML that works offline, PNG, SVG, PDF, or the Vega-Lite JSON."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from kdb.errors import QueryError
from kdb.text import visible_within
from kdb.warehouse.files import appears_whole

if TYPE_CHECKING:
    from kdb.analysis.style import Chart

_PNG_SCALE = 2.0
"""Pixels per point, sharp on high-resolution screens and in print."""


def to_spec(chart: Chart) -> dict[str, Any]:
    """Return the chart as Vega-Lite, without characters on which vl-convert or a browser fails."""
    spec: dict[str, Any] = visible_within(chart.to_dict())
    return spec


def to_svg(chart: Chart) -> str:
    """Return the chart as SVG text."""
    import vl_convert

    return vl_convert.vegalite_to_svg(to_spec(chart))


_PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="UTF-8">
<title>kdb</title>
<style>#chart.vega-embed {{ width: 100%; display: flex; }}</style>
<script>{vega}</script>
</head>
<body>
<div id="chart"></div>
<script>vegaEmbed("#chart", {chart}, {{"renderer": "svg"}}).catch(console.error);</script>
</body>
</html>
"""


def _html(chart: Chart) -> bytes:
    # The scripts are in the file, and nothing is downloaded. No text in the data may end its script element.
    text = json.dumps(to_spec(chart)).replace("<", "\\u003c")
    return _PAGE.format(vega=_vega(), chart=text).encode()


def _vega() -> str:
    """Return Vega, Vega-Lite and vega-embed in one script, cached for the user, because building it takes a second."""
    import vl_convert

    kept = user_cache_path("kdb") / f"vega-{version('vl-convert-python')}.js"
    with contextlib.suppress(OSError):
        return kept.read_text(encoding="utf-8")
    script = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub requires an unneeded argument
    with contextlib.suppress(OSError, QueryError):  # pages can be written even if the cache cannot
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, script.encode())
    return script


def to_png(chart: Chart, scale: float = _PNG_SCALE) -> bytes:
    """Return the chart as PNG, with ``scale`` pixels per point."""
    import vl_convert

    return vl_convert.vegalite_to_png(to_spec(chart), scale=scale)


def _pdf(chart: Chart) -> bytes:
    import vl_convert

    return vl_convert.vegalite_to_pdf(to_spec(chart))


_WRITERS: dict[str, Callable[[Chart], bytes]] = {
    ".html": _html,
    ".png": to_png,
    ".svg": lambda chart: to_svg(chart).encode(),
    ".pdf": _pdf,
    ".json": lambda chart: json.dumps(to_spec(chart), indent=2).encode(),
}
FORMATS = tuple(_WRITERS)


def save(chart: Chart, path: Path) -> None:
    """Write a chart in the format of the file's ending, one of FORMATS, completely or not at all.

    Raises QueryError if the file cannot be written.
    """
    write_whole(path, _WRITERS[path.suffix.lower()](chart))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by one rename. Raises QueryError if that fails; the old file is then unchanged."""
    try:
        target = path.resolve()  # the target of a link is written, and the link kept
        if target.exists() and not target.is_file():  # a device or a pipe must not be replaced
            target.write_bytes(content)
        else:
            _replace(target, content)
    except (OSError, RuntimeError) as error:  # for circular links
        raise QueryError(f"Cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}.") from error


def _replace(target: Path, content: bytes) -> None:
    """Replace a file, and keep its permissions."""
    with appears_whole(target) as partial:
        partial.write_bytes(content)
        if target.exists():
            shutil.copymode(target, partial)
