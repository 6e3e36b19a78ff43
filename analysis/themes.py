"""The size and the theme of a finished chart: `kdb plot --width 300 --height 200 --theme dark`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import altair as alt

from kdb.errors import QueryError

if TYPE_CHECKING:
    from kdb.analysis.style import Chart

THEMES = ("paper", "dark")
SIZES = (20, 4000)
"""Smallest and largest width and height of a panel, in pixels."""

_PAGE, _INK, _FAINT, _LINES = "#15181c", "#e8e8e8", "#bdbdbd", "#3a3f45"
_LIGHTER = {
    "#332288": "#8f80e8",
    "#117733": "#4fbf73",
    "#882255": "#d0659c",
    "#aa4499": "#cf7fc4",
    "#999933": "#bdbd55",
    "#cc6677": "#e58a99",
    "#44aa99": "#5cc4b3",
    "#0072b2": "#4aa3dd",
    "#d55e00": "#f08040",
    "#000000": "#ffffff",
    "#444444": _FAINT,
}
"""Colors of lines and marks that are too dark on a dark page, with lighter ones of the same hue."""


def resized(chart: Chart, *, width: int | None = None, height: int | None = None, theme: str = "paper") -> Chart:
    """Return the chart with panels of this width and height in pixels, in a theme, one of THEMES.

    Where panels differ in size, the largest one gets it, and the others keep their proportion to it. Raises QueryError
    for a theme that does not exist, and for a size outside of SIZES.
    """
    _check(width, height, theme)
    if width is None and height is None and theme == "paper":
        return chart
    spec = chart.to_dict()
    data = spec.pop("datasets", {})
    for side, wanted in (("width", width), ("height", height)):
        spec = spec if wanted is None else _scaled(spec, side, wanted)
    if theme == "dark":
        spec = _mapped(spec, lambda _key, value: _LIGHTER.get(value, value) if isinstance(value, str) else value)
        spec = _darkened(spec)
    return alt.Chart.from_dict({**spec, "datasets": data})


def _check(width: int | None, height: int | None, theme: str) -> None:
    least, most = SIZES
    for side, pixels in (("width", width), ("height", height)):
        if pixels is not None and (not isinstance(pixels, int) or not least <= pixels <= most):
            raise QueryError(f"{side}: expected {least} to {most} pixels, found {pixels!r}.")
    if theme not in THEMES:
        raise QueryError(f"Unknown theme {theme!r}. Use one of {', '.join(THEMES)}.")


def _scaled(spec: dict[str, Any], side: str, wanted: int) -> dict[str, Any]:
    """Return the chart with its largest panel of the wanted width or height, the others in proportion."""
    found: list[float] = []

    def seen(key: str, value: Any) -> Any:
        found.extend([value] if key == side and isinstance(value, int | float) else [])
        return value

    _mapped(spec, seen)
    factor = wanted / max(found, default=wanted)
    scaled: dict[str, Any] = _mapped(
        spec, lambda key, value: round(value * factor) if key == side and isinstance(value, int | float) else value
    )
    return scaled


def _mapped(value: Any, change: Callable[[str, Any], Any], key: str = "") -> Any:
    """Return a tree of dicts and lists with each leaf changed, given the key that it stands under."""
    if isinstance(value, Mapping):
        return {name: _mapped(inner, change, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, change, key) for inner in value]
    return change(key, value)


def _darkened(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the chart with light words and lines on a dark page."""
    config = spec["config"]
    words = {"labelColor": _INK, "titleColor": _INK}
    changes = {
        "view": {"stroke": _LINES},
        "title": {"color": _INK, "subtitleColor": _FAINT},
        "axis": words | {"gridColor": _LINES, "domainColor": _FAINT, "tickColor": _FAINT},
        "legend": words,
        "header": words,
        "text": {"color": _INK},
        "rule": {"color": _INK},
    }
    merged = {name: config.get(name, {}) | change for name, change in changes.items()}
    return {**spec, "background": _PAGE, "config": config | merged}
