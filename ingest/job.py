"""A run that was asked for: everything that determines its result, known before a model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kdb.ingest.datasets import Dataset, prompts
from kdb.ingest.models.find import ModelSource
from kdb.warehouse.manifest import RunFolder, run_id

CONCEPT_VERSION = 1
"""Part of the id of every run of the concept study, and of what is derived from one.

Raised by hand when a change of kdb changes numbers that it stored before: by more than rounding, for the same model,
texts and settings. A new column or table, a faster way or another message does not raise it.
"""

KNOWLEDGE_VERSION = 1
"""The same for the knowledge study."""

KDB_VERSIONS = {"concept": CONCEPT_VERSION, "knowledge": KNOWLEDGE_VERSION}

ALWAYS_FITTED = ("logistic", "logistic-paper")
"""Saved queries read ``logistic``, so every run has it; ``--classifier`` adds to these."""


@dataclass(frozen=True)
class Measuring:
    """What determines the hidden states of a run, beyond model, dataset and template.

    ``limit`` is already in the dataset's fingerprint; it is kept so that the run can say it.
    """

    dtype: str = "float32"
    quantize: str | None = None
    noise: bool = False
    seed: int = 42
    store: str = "float32"
    limit: int | None = None


@dataclass(frozen=True)
class Probing:
    """What determines the probe scores of a run, beyond its hidden states.

    ``splits`` counts the paper's split and the seeded stratified ones after it.
    """

    classifiers: tuple[str, ...] = ALWAYS_FITTED
    splits: int = 1


@dataclass(frozen=True)
class Attributing:
    """What determines the scores of a run of the knowledge study, beyond model and prompts.

    ``top_k`` neurons of each component are stored for a prompt, or ``all_neurons``; the best ``query_values`` of
    them are traced back to query neurons; ``ablate_k`` are zeroed to compare the methods, or none where it is 0.
    """

    top_k: int = 300
    all_neurons: bool = False
    query_values: int = 30
    ablate_k: int = 10


@dataclass(frozen=True)
class Job:
    """A run that was asked for: everything that determines its result, known before a model is loaded."""

    source: ModelSource
    dataset: Dataset
    measuring: Measuring
    probing: Probing
    custom_template: bool = False
    attributing: Attributing = Attributing()

    @property
    def study(self) -> str:
        """'concept' or 'knowledge': the dataset's."""
        return self.dataset.study

    @property
    def identity(self) -> dict[str, Any]:
        """What the run id is derived from."""
        return {
            "study": self.study,
            "kdb": KDB_VERSIONS[self.study],
            "model": self.source.name,
            "revision": self.source.revision,
            "dataset": self.dataset.name,
            "fingerprint": self.dataset.fingerprint,
            "template": self.dataset.template,
            **asdict(self.measuring),
            **(self._concept if self.study == "concept" else self._knowledge),
        }

    @property
    def _concept(self) -> dict[str, Any]:
        """What determines the result of the concept study alone."""
        return {"answers": self.dataset.answers, "cue": self.dataset.cue, **asdict(self.probing)}

    @property
    def _knowledge(self) -> dict[str, Any]:
        """What determines the result of the knowledge study alone, which stores no vectors."""
        return {"store": Measuring.store, **asdict(self.attributing)}

    @property
    def run(self) -> str:
        """The run's id."""
        return run_id(self.identity)

    @property
    def variant(self) -> str:
        """What sets the run apart from the plain one, such as 'noise bfloat16'; 'default' if nothing does."""
        m = self.measuring
        template = hashlib.sha256(self.dataset.template.encode()).hexdigest()[:8]
        marks = [
            f"revision={self.source.pinned}" if self.source.pinned else "",
            f"limit={m.limit}" if m.limit else "",
            f"template={template}" if self.custom_template else "",
            ("noise" if m.seed == Measuring.seed else f"noise={m.seed}") if m.noise else "",
            m.dtype if m.dtype != Measuring.dtype else "",
            m.quantize or "",
            f"store={m.store}" if self.study == "concept" and m.store != Measuring.store else "",
            *(
                field.name.replace("_", "-")
                + ("" if field.default is False else f"={getattr(self.attributing, field.name)}")
                for field in fields(Attributing)
                if self.study == "knowledge" and getattr(self.attributing, field.name) != field.default
            ),
        ]
        return " ".join(filter(None, marks)) or "default"

    @property
    def texts(self) -> list[str]:
        """The prompts as the model reads them."""
        return prompts(self.dataset, noise=self.measuring.noise, seed=self.measuring.seed)


def derived_identity(kind: str, study: str, source: RunFolder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the id of a run computed from another one is derived from; ``kind`` says how it is computed."""
    names = {"derived": kind, "kdb": KDB_VERSIONS[study], "model": source.model, "dataset": source.dataset}
    return {**names, "source_run": source.run, **settings}
