"""Run a model's stages in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

from kdb.ingest.models.find import LoadedModel
from kdb.ingest.progress import phase
from kdb.ingest.stages import Advance, Shard, Subject, Work

S = TypeVar("S")
T = TypeVar("T")


class LocalEngine:
    """The engine of this process (`kdb.ingest.stages.Engine`); the model is loaded when it is first needed."""

    def __init__(self, load: Callable[[], LoadedModel], batch_tokens: int | None = None) -> None:
        self._load, self._batch_tokens = load, batch_tokens
        self._held: tuple[Subject[Any], Any] | None = None

    def map(
        self, work: Work[S, T], subject: Subject[S], shards: Iterable[Shard], advance: Advance
    ) -> Iterator[tuple[Shard, T]]:
        """Yield the results of the shards in turn."""
        if self._held is None or self._held[0] is not subject:
            self._held = None  # freed before the next subject is made, since both may not fit into memory
            with phase(f"Loading {subject.source.name}"):
                self._held = subject, subject.bind(self._load(), self._batch_tokens)
        for shard in shards:
            for result in work(self._held[1], shard, advance):
                yield shard, result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held = None
