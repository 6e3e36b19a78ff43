"""The specification of a run: everything that determines its result, known before a model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from kdb.ingest.datasets import Dataset, prompts
from kdb.ingest.models.find import ModelSource
from kdb.ingest.settings import Attributing, Measuring, Probing
from kdb.warehouse.manifest import RunFolder, run_id

CONCEPT_VERSION = 2
"""Numeric version of the concept study: part of the id of each of its runs, and of each run derived from one.

Raise it by hand when a change of kdb changes stored numbers by more than rounding, for the same model, texts and
settings. A new column or table, a faster algorithm or another message does not raise it.
"""

KNOWLEDGE_VERSION = 2
"""Numeric version of the knowledge study."""

KDB_VERSIONS = {"concept": CONCEPT_VERSION, "knowledge": KNOWLEDGE_VERSION}


@dataclass(frozen=True)
class Job:
    """One model, one dataset and the settings: everything that determines the result of a run."""

    source: ModelSource
    dataset: Dataset
    measuring: Measuring
    probing: Probing
    custom_template: bool = False
    attributing: Attributing = field(default_factory=Attributing)

    @property
    def study(self) -> str:
        """Study of the dataset: 'concept' or 'knowledge'."""
        return self.dataset.study

    @property
    def identity(self) -> dict[str, Any]:
        """Names and values that the run id is derived from."""
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
        """Part of the identity that only the concept study has."""
        dataset = self.dataset
        return {
            "answers": dataset.answers,
            "cue": dataset.cue,
            "first_label": dataset.first_label,
            **asdict(self.probing),
        }

    @property
    def _knowledge(self) -> dict[str, Any]:
        """Part of the identity that only the knowledge study has. It stores no vectors, so ``store`` is the default."""
        return {"store": Measuring.store, **asdict(self.attributing)}

    @property
    def run(self) -> str:
        """The run's id."""
        return run_id(self.identity)

    @property
    def variant(self) -> str:
        """Differences from the default settings, such as 'noise bfloat16'; 'default' if there are none."""
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
                _mark(setting.name.replace("_", "-"), getattr(self.attributing, setting.name))
                for setting in fields(Attributing)
                if self.study == "knowledge" and getattr(self.attributing, setting.name) != setting.default
            ),
        ]
        return " ".join(filter(None, marks)) or "default"

    @property
    def texts(self) -> list[str]:
        """The prompts as the model reads them."""
        return prompts(self.dataset, noise=self.measuring.noise, seed=self.measuring.seed)


def _mark(name: str, value: Any) -> str:
    """Name a setting that is not the default: a switch by its option, another one with its value.

    Quotes show a value of white space, or none.
    """
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    return f"{name}={value if str(value).isalnum() else repr(value)}"


def derived_identity(kind: str, study: str, source: RunFolder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names and values for the id of a run computed from ``source``; ``kind`` names the computation."""
    names = {"derived": kind, "kdb": KDB_VERSIONS[study], "model": source.model, "dataset": source.dataset}
    return {**names, "source_run": source.run, **settings}
