"""Which variant of a study to show: the plain one, or the newest one if there is no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse

PLAIN = "default"


def shown_variant(wh: Warehouse, models: Sequence[str], study: str) -> str | None:
    """Return 'default' if one of the models has such a run of the study, else the newest variant; None without a run.

    Runs of `kdb ablate` come last.
    """
    variants = wh.sql(
        "SELECT variant FROM runs WHERE study = ? AND list_contains(?, model) "
        "ORDER BY variant = 'default' DESC, starts_with(variant, 'ablate='), finished_at DESC LIMIT 1",
        [study, list(models)],
    )["variant"].to_list()
    return variants[0] if variants else None
