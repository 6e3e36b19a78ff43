"""What the concept study asks of a model: hidden states and the model's own answers, part by part."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdb.ingest.concept.zero_shot import Question, answer, check_answers, pose, zero_shot_rows
from kdb.ingest.cost import estimate
from kdb.ingest.execution.local import Advance, Rows, timed
from kdb.ingest.forward.capture import Capture, check_capture, check_stored, chosen_prompts, shared_prefix
from kdb.ingest.job import Job
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.structure import SITES
from kdb.ingest.models.tokens import read_texts
from kdb.warehouse.schema import arrow_schema
from kdb.warehouse.vectors import activation_groups


class Capturer:
    """A model and the prompts of a job of the concept study."""

    def __init__(self, job: Job, load: Callable[[], LoadedModel], batch_tokens: int | None) -> None:
        self._job, self._load, self._batch_tokens = job, load, batch_tokens

    @functools.cached_property
    def _capture(self) -> Capture:
        return Capture(self._load(), batch_tokens=self._batch_tokens)

    @functools.cached_property
    def _token_ids(self) -> list[list[int]]:
        return read_texts(self._capture.loaded.tokenizer, self._job.texts)

    @functools.cached_property
    def _prefix(self) -> list[int]:
        return self._token_ids[0][: shared_prefix(self._token_ids)]

    @functools.cached_property
    def _question(self) -> Question:
        return pose(self._capture.loaded.tokenizer, self._job.dataset)

    def device(self) -> str:
        """Where the model runs."""
        return str(self._capture.loaded.device)

    def check(self) -> Rows:
        """How some prompts compare with the untouched model. Raises ModelError where that is too far off."""
        texts, begun = [self._token_ids[i] for i in self.chosen()], time.monotonic()
        rows = check_capture(self._capture, texts, self._prefix, self._question.cue)
        return timed("checks", [pa.Table.from_pylist(rows, schema=arrow_schema("checks"))], begun)

    def chosen(self) -> list[int]:
        """The prompts that the run is checked on."""
        return chosen_prompts(self._token_ids)

    def check_stored(self, states: NDArray[np.float32], answers: NDArray[np.float64] | None) -> Rows:
        """How what was stored of the chosen prompts compares with the untouched model.

        ``states`` are (prompt, layer, hidden), ``answers`` probabilities (prompt, 2), or None where none are stored.
        Raises ModelError where a difference is too large.
        """
        texts, begun = [self._token_ids[i] for i in self.chosen()], time.monotonic()
        rows = check_stored(self._capture, texts, states)
        if answers is not None:
            rows.append(check_answers(self._capture, texts, answers, self._question))
        return timed("checks", [pa.Table.from_pylist(rows, schema=arrow_schema("checks"))], begun)

    def cost(self) -> str:
        """What the job takes in memory, disk and time, in a line."""
        config, n_cue = self._capture.loaded.model.config, len(self._question.cue)
        return str(estimate(self._job, config, self._token_ids, self.device(), n_cue=n_cue))

    def measure(self, prompts: Sequence[int], advance: Advance) -> Iterator[Rows]:
        """The rows of ``zero_shot`` and ``activations``; advances by tokens."""
        begun, question = time.monotonic(), self._question
        texts = [self._token_ids[i] for i in prompts]
        vectors, ends = self._capture.vectors_and_ends(texts, self._prefix, question.cue, on_batch=advance)
        if question.tells:
            labels = np.array([self._job.dataset.examples[i].label for i in prompts])
            rows = zero_shot_rows(prompts, labels, answer(self._capture, ends, question), question)
            yield Rows("zero_shot", [rows], 0.0)
        groups = activation_groups(prompts, SITES, vectors, float16=self._job.measuring.store == "float16")
        yield timed("activations", list(groups), begun)
