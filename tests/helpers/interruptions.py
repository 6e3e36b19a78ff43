"""Ctrl-C in the n-th call of a function, and a model that must not be loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdb.ingest.models.find import LoadedModel


def no_model() -> LoadedModel:
    raise AssertionError("the model was loaded")


def interrupt_after(n: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which gets a Ctrl-C in its n-th call."""
    left = iter(range(n, -1, -1))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(left) == 1:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted
