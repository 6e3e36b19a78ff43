"""Measured speed of this machine: how long its finished runs took, over their estimates.

The ratios are stored in the user's cache, by host and by kind of run; estimates of later runs are multiplied by them.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from kdb.warehouse.files import write_json

if TYPE_CHECKING:
    from kdb.ingest.cost import Cost

SHORTEST = 2.0
"""Seconds, estimated or measured, below which a run says nothing of others: too much of its time does not grow with its
prompts."""


def calibrated(cost: Cost) -> Cost:
    """Return a cost whose time is corrected by the last run of its model, or else of its kind, on this machine."""
    ratios = _ratios()
    found = [ratios[key] for key in _keys(cost) if key in ratios]
    return replace(cost, seconds=cost.seconds * found[0], is_calibrated=True) if found else cost


def learn(cost: Cost, took: float) -> None:
    """Store the ratio of the time that a run took, in seconds, to its estimate before `calibrated`.

    If the cache cannot be written, nothing is stored.
    """
    if min(took, cost.seconds) < SHORTEST:
        return
    with contextlib.suppress(OSError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        write_json(_path(), _ratios() | dict.fromkeys(_keys(cost), took / cost.seconds))


def _keys(cost: Cost) -> Iterable[str]:
    """Yield the names of a cost's ratio, the most specific one first."""
    return [f"{platform.node()} {cost.kind} {cost.model}", f"{platform.node()} {cost.kind}"]


def _path() -> Path:
    return user_cache_path("kdb") / "speed.json"


def _ratios() -> dict[str, float]:
    try:
        found: Any = json.loads(_path().read_text())
        return {str(key): float(ratio) for key, ratio in found.items() if 0 < float(ratio) < float("inf")}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged: what follows replaces it
        return {}
