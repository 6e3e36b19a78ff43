"""Charts as files: HTML that works offline, PNG, SVG, PDF, or the Vega-Lite JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kdb.errors import QueryError

if TYPE_CHECKING:
    from kdb.analysis.look import Chart

_PNG_SCALE = 2.0
"""Pixels per point: sharp on a screen of high density, and in print."""


def to_svg(chart: Chart) -> str:
    """The chart as SVG text."""
    import vl_convert

    return vl_convert.vegalite_to_svg(chart.to_dict())


def _html(chart: Chart) -> bytes:
    import vl_convert

    # bundle: the scripts are in the file, and nothing is fetched.
    page: str = vl_convert.vegalite_to_html(chart.to_dict(), bundle=True)
    return page.encode()


def to_png(chart: Chart, scale: float = _PNG_SCALE) -> bytes:
    """The chart as PNG, with ``scale`` pixels per point."""
    import vl_convert

    return vl_convert.vegalite_to_png(chart.to_dict(), scale=scale)


def _pdf(chart: Chart) -> bytes:
    import vl_convert

    return vl_convert.vegalite_to_pdf(chart.to_dict())


_WRITERS: dict[str, Callable[[Chart], bytes]] = {
    ".html": _html,
    ".png": to_png,
    ".svg": lambda chart: to_svg(chart).encode(),
    ".pdf": _pdf,
    ".json": lambda chart: chart.to_json().encode(),
}
FORMATS = tuple(_WRITERS)


def check_format(path: Path) -> None:
    """Raise QueryError unless the file's ending names a format."""
    if path.suffix not in _WRITERS:
        raise QueryError(f"{path.name!r}: a chart's file ends in {', '.join(FORMATS)}.")


def save(chart: Chart, path: Path) -> None:
    """Write a chart in the format that the file's ending names; the file appears whole or not at all.

    Raises QueryError for another ending, or where the file cannot be written.
    """
    check_format(path)
    write_whole(path, _WRITERS[path.suffix](chart))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by one rename; QueryError where that fails."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        staged.write_bytes(content)
        staged.replace(path)
    except OSError as error:
        raise QueryError(f"Cannot write {str(path)!r}: {error.strerror or error}.") from error
    finally:
        staged.unlink(missing_ok=True)
