"""Read a plan of many runs, check it before any work, and measure run after run; failed runs do not stop the others.

A plan is YAML. Options above ``runs`` apply to each of its runs; model, revision and dataset may be lists::

    dtype: bfloat16
    runs:
      - model: EleutherAI/pythia-160m
        revision: [step1000, step2000]
        dataset: [world-cities, knowledge]
      - model: smollm2-135m

Every combination is a run. Keys are the options of ``kdb ingest``, without their dashes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdb.errors import KdbError, PlanError, UnknownNameError
from kdb.faults import explain, is_debugging, is_interrupt
from kdb.ingest.measure import ingest_on

if TYPE_CHECKING:
    from kdb.ingest.job import Job
    from kdb.ingest.models.find import LoadedModel, ModelSource
    from kdb.ingest.stages import Engine
    from kdb.warehouse.storage import Storage


SEVERAL = ("model", "revision", "dataset")
"""Options whose value may be a list."""


@dataclass(frozen=True)
class Asked:
    """The runs of one model at one revision: its options and its datasets; no datasets mean all built-in ones.

    ``loaded`` is the model, if it is in memory already.
    """

    model: str
    revision: str | None
    datasets: tuple[str, ...]
    options: Mapping[str, Any]
    loaded: LoadedModel | None = None

    @property
    def name(self) -> str:
        """The model and its revision, for messages."""
        stored = self.options.get("name") or (Path(self.model).name if Path(self.model).exists() else self.model)
        return stored if self.revision is None else f"{stored} {self.revision}"


def read_plan(path: Path, known: Mapping[str, type]) -> list[Asked]:
    """Read the runs of a plan; ``known`` are the options that it may set, and the types of their values.

    Raises PlanError for a file that is not a plan, UnknownNameError for an unknown option.
    """
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_plan_loader())
    except OSError as error:
        raise PlanError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list) or not content["runs"]:
        raise PlanError(f"{path}: a plan has a list `runs`, each with a `model`.")
    above = {key: value for key, value in content.items() if key != "runs"}
    asked = []
    for number, entry in enumerate(content["runs"], start=1):
        where = f"{path}, run {number}"
        if not isinstance(entry, dict):
            raise PlanError(f"{where}: expected `model: …` and options, found {entry!r}.")
        options = {str(key).replace("-", "_"): value for key, value in {**above, **entry}.items()}
        _check(where, options, known)
        asked += combine(options)
    return asked


def _plan_loader() -> Any:
    """Return PyYAML's safe loader, but one that refuses a key given twice: the first value would be lost in silence."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _value in node.value]
            for key, (at, _value) in zip(keys, node.value, strict=True):
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", at.start_mark)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    return Loader


def combine(options: Mapping[str, Any]) -> list[Asked]:
    """Yield one entry for each combination of model and revision."""
    models, revisions, datasets = (_several(options.get(key)) for key in SEVERAL)
    single = {key: value for key, value in options.items() if key not in SEVERAL}
    return [
        Asked(model, revision, tuple(datasets), single)
        for model, revision in itertools.product(models, revisions or [None])
    ]


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _check(where: str, options: Mapping[str, Any], known: Mapping[str, type]) -> None:
    for key, value in options.items():
        if key not in known:
            raise UnknownNameError("option", key, known, f"({where}) `kdb ingest --help` lists them.")
        for one in _several(value) if key in (*SEVERAL, "classifier") else [value]:
            wanted = (int, float) if known[key] is float else known[key]
            if not isinstance(one, wanted) or (isinstance(one, bool) and known[key] is not bool):
                raise PlanError(f"{where}: {key} is {one!r}, expected {_TYPES[known[key]]}.")
            if isinstance(one, str) and "\0" in one:
                raise PlanError(f"{where}: {key} contains a NUL character: remove it.")
    if not _several(options.get("model")):
        raise PlanError(f"{where}: `model` is missing. Add `model: …`.")


_TYPES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Ended:
    """Outcome of a run: ``status`` is 'committed', 'exists' or 'failed'; ``why`` is the reason of a failure."""

    model: str
    dataset: str
    status: str
    run: str | None = None
    why: str = ""


def measure_all(
    storage: Storage,
    asked: Sequence[Asked],
    jobs: Callable[[Asked], Sequence[Job]],
    engine: Callable[[Asked, ModelSource], Engine],
) -> Iterator[Ended]:
    """Measure all runs, load each model once, and report how each run ended.

    ``jobs`` finds a model and returns its jobs; ``engine`` runs it. After a failed run, the next one is measured.
    """
    for one in asked:
        try:
            planned = jobs(one)
        except BaseException as error:  # such as an unknown revision, or a failed download
            why = _why(error, f"planning {one.name}")
            yield from (Ended(one.name, dataset, "failed", why=why) for dataset in one.datasets)
            continue
        with engine(one, planned[0].source) as running:
            for job in planned:
                yield _measure(storage, one, job, running)


def _measure(storage: Storage, one: Asked, job: Job, engine: Engine) -> Ended:
    try:
        outcome = ingest_on(storage, job, engine)
    except BaseException as error:  # such as out of memory: the next run may be smaller
        why = _why(error, f"measuring {one.name} on {job.dataset.name}")
        return Ended(one.name, job.dataset.name, "failed", why=why)
    return Ended(one.name, job.dataset.name, outcome.status, outcome.run)


def _why(error: BaseException, doing: str) -> str:
    """Return the reason why a job failed; raise errors again that must end all jobs."""
    if isinstance(error, KdbError):
        return str(error)
    # A panic in a Rust library is not an Exception, but it fails only this job.
    if isinstance(error, SystemExit | GeneratorExit) or is_interrupt(error) or is_debugging():
        raise error
    return explain(error, doing).message


def check_distinct(asked: Sequence[Asked]) -> None:
    """Raise PlanError for the same run twice, or for two models under one name."""
    seen: dict[tuple[Any, ...], Asked] = {}
    for one in asked:
        options = tuple(sorted((key, str(value)) for key, value in one.options.items()))
        stored = one.options.get("name") or one.model
        for dataset in one.datasets:
            key = (stored, one.revision, dataset, options)
            if key in seen:
                twice = "planned twice" if seen[key].model == one.model else f"also what {seen[key].model} would be"
                raise PlanError(f"{stored} on {dataset} is {twice}: leave one out, or give one another name.")
            seen[key] = one
