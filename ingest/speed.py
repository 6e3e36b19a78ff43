"""Measured speed of this machine: how long its finished runs took, over their estimates.

The ratios are stored in the user's cache, by host, kind of run and phase; later estimates are multiplied by them.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from kdb.warehouse.files import write_json

if TYPE_CHECKING:
    from kdb.ingest.cost import Cost

SHORTEST = 1.0
"""Seconds, estimated or measured, below which a phase says nothing of others: too much of its time does not grow with
its prompts."""


_MOST = 1e4
"""Largest ratio that is believed."""


def calibrated(cost: Cost) -> Cost:
    """Return a cost whose phases are corrected by the last run of its model, or else of its kind, on this machine."""
    ratios = _ratios()
    found = {name: next((ratios[key] for key in _keys(cost, name) if key in ratios), None) for name in cost.phases}
    phases = {name: seconds * (found[name] or 1.0) for name, seconds in cost.phases.items()}
    return replace(cost, phases=phases, is_calibrated=any(found.values()))


def learn(cost: Cost, took: Mapping[str, float]) -> None:
    """Store the ratio of the time that each phase took, in seconds, to its estimate before `calibrated`.

    If the cache cannot be written, nothing is stored.
    """
    new = {
        key: took[name] / seconds
        for name, seconds in cost.phases.items()
        if name in took and min(took[name], seconds) >= SHORTEST
        for key in _keys(cost, name)
    }
    if new:
        with contextlib.suppress(OSError):
            _path().parent.mkdir(parents=True, exist_ok=True)
            write_json(_path(), _ratios() | new)


def _keys(cost: Cost, phase: str) -> Iterable[str]:
    """Yield the names of a phase's ratio, the most specific one first."""
    kind = f"{platform.node()} {cost.kind} {phase}"
    return [f"{kind} {cost.model}", kind]


def _path() -> Path:
    return user_cache_path("kdb") / "speed.json"


def _ratios() -> dict[str, float]:
    try:
        found: Any = json.loads(_path().read_text())
        return {str(key): float(ratio) for key, ratio in found.items() if 0 < float(ratio) <= _MOST}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged: what follows replaces it
        return {}
