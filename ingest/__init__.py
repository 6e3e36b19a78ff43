"""Measure models on datasets: find and load models, read datasets, and run the two studies.

The package can be called: ``kdb.ingest(model="smollm2-135m", dataset="world-cities")`` is the function in ``call.py``.
"""

from __future__ import annotations

import inspect
import sys
import types
from typing import TYPE_CHECKING, Any

from kdb.ingest import call

if TYPE_CHECKING:
    from kdb.ingest.plan_file import Ended


class _Ingest(types.ModuleType):
    """A package that is a function, too: importing a module of it would put the package in the function's place."""

    __signature__ = inspect.signature(call.ingest)

    def __call__(self, *args: Any, **kwargs: Any) -> list[Ended]:
        return call.ingest(*args, **kwargs)

    __call__.__doc__ = call.ingest.__doc__


sys.modules[__name__].__class__ = _Ingest
