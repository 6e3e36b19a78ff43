"""The function ``kdb.ingest()``: what the command ``kdb ingest`` does, with the same options, from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdb.errors import KdbError, PlanError, UnknownNameError
from kdb.ingest.log import logged
from kdb.ingest.settings import CHOICES, LEAST, Attributing, Measuring, Probing
from kdb.queries.domains import CLASSIFIERS, LARGEST
from kdb.warehouse import location_or_default
from kdb.wording import in_python, python_words

if TYPE_CHECKING:
    from kdb.ingest.models.find import LoadedModel
    from kdb.ingest.plan_file import Asked, Ended
    from kdb.warehouse.storage import Storage
    from kdb.warehouse.store import Warehouse

    Model = str | Path | LoadedModel

DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(("device", "batch_tokens", "name", "data_dir", "dataset_name")),
    **dict.fromkeys(("template", "ask", "answers", "group_by", "positive")),
    **{field.name: field.default for kind in (Measuring, Probing, Attributing) for field in fields(kind)},
    "classifiers": (),
}
"""The options of an ingest, beside model, revision and dataset, with their defaults."""

_OF_LOADING = ("device", "dtype", "quantize", "name")
"""Options that are decided when a model is loaded."""


def ingest(
    model: Model | Iterable[Model],
    dataset: str | Path | Iterable[str | Path] = (),
    *,
    warehouse: str | Path | Warehouse | None = None,
    revision: str | Iterable[str] | None = None,
    **options: Any,
) -> list[Ended]:
    """Measure models on datasets, and store each run in a warehouse, which is created if there is none.

    ``model`` is a name (``kdb models`` lists them), a hub id, a folder, a .gguf file, or what ``kdb.load_model``
    returned. ``dataset`` is a name or a file, by default all built-in ones. Both may be lists, and ``revision``, too.
    ``options`` are those of the command, such as ``limit=100``, ``device="cuda"`` or ``effects=False``:
    ``kdb ingest --help`` explains them. A run that is stored already is not measured again.

    Returns an entry for each run, with ``model``, ``dataset``, ``run`` and ``status`` ('committed', or 'exists').
    Raises KdbError for wrong input. If one of several runs fails, the others continue, and the error follows at the
    end.
    """
    with python_words(), logged(in_python):
        asked = _asked(model, dataset, revision, options)
        return _measured(_storage(warehouse), asked)


def _asked(model: Any, dataset: Any, revision: Any, options: dict[str, Any]) -> list[Asked]:
    from kdb.ingest.jobs import complete, forget_datasets
    from kdb.ingest.plan_file import Asked, combine

    given = {name: check_option(name, value) for name, value in options.items()}
    forget_datasets()  # a file may have changed since it was last read here
    asked: list[Asked] = []
    datasets = [str(one) for one in _several(dataset)]
    for one in _several(model):
        if isinstance(one, str | Path):
            asked += combine({"model": str(one), "revision": _several(revision) or None, "dataset": datasets})
        else:
            _check_loaded(given, revision)
            loaded = {"dtype": one.dtype, "quantize": one.quantization}
            asked.append(Asked(one.source.name, None, tuple(datasets), loaded, one))
    return complete(asked, {**DEFAULTS, **given})


def _several(value: Any) -> list[Any]:
    """Return the items of a list, or the one value; a loaded model is no list."""
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _check_loaded(given: Mapping[str, Any], revision: Any) -> None:
    named = [name for name in _OF_LOADING if name in given] + (["revision"] if revision else [])
    if named:
        raise PlanError(f"The model is loaded already. Leave {named[0]} out, or give it to kdb.load_model.")


def check_option(name: str, value: Any) -> Any:
    """Return the value of an option. Raises UnknownNameError for an unknown option, PlanError for a wrong value."""
    if name not in DEFAULTS:
        raise UnknownNameError("option", name, DEFAULTS, f"The options are {', '.join(DEFAULTS)}.")
    if isinstance(value, list):
        value = tuple(value)
    if value is None and DEFAULTS[name] is None:
        return None
    for one in value if name == "classifiers" and isinstance(value, tuple) else [value]:
        if problem := _expected(name, one):
            raise PlanError(f"{name} is {one!r}, expected {problem}.")
    return (value,) if name == "classifiers" and isinstance(value, str) else value


def _expected(name: str, value: Any) -> str | None:
    """Return what an option must be, if the value is not that."""
    if names := {**CHOICES, "classifiers": CLASSIFIERS}.get(name):
        return None if value in names else f"one of {', '.join(names)}"
    if name in LEAST:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return None if is_whole and LEAST[name] <= value <= LARGEST else f"a whole number from {LEAST[name]}"
    if isinstance(DEFAULTS[name], bool):
        return None if isinstance(value, bool) else "True or False"
    if isinstance(value, str) and "\0" in value:
        return "a text without NUL characters"
    kinds = (str, Path, tuple) if name in ("data_dir", "answers") else str
    return None if isinstance(value, kinds) else "a text"


def _storage(warehouse: str | Path | Warehouse | None) -> Storage:
    from kdb.warehouse.store import Warehouse

    if isinstance(warehouse, Warehouse):
        return warehouse.storage
    return Warehouse.create(location_or_default(warehouse)).storage


def _measured(storage: Storage, asked: Sequence[Asked]) -> list[Ended]:
    """Measure all runs. An error of the only run is raised as it is."""
    from kdb.ingest.jobs import jobs, local_engine
    from kdb.ingest.measure import ingest_on
    from kdb.ingest.plan_file import Ended, measure_all

    alone = jobs(asked[0]) if len(asked) == 1 else []
    if len(alone) == 1:
        with local_engine(asked[0], alone[0].source) as engine:
            outcome = ingest_on(storage, alone[0], engine)
        return [Ended(alone[0].source.name, alone[0].dataset.name, outcome.status, outcome.run)]
    ended = list(measure_all(storage, asked, jobs, local_engine))
    if failed := [f"{one.model} on {one.dataset}: {one.why}" for one in ended if one.status == "failed"]:
        listed = "\n".join(failed)
        raise KdbError(f"{len(failed)} of {len(ended)} runs failed; the others are stored.\n{listed}")
    return ended
