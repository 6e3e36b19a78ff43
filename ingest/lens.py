"""Read more of a stored run through the logit lens or a tuned lens, as a derived run (`kdb lens`).

In prompts with answers, at the last or at every position; of texts with labels, the stored vectors. A tuned lens is
trained first; how close it comes to the model's output is stored in ``lens_fits``.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdb.errors import QueryError, WarehouseError
from kdb.ingest.attribution.patch import known
from kdb.ingest.concept.derived import check_vectors
from kdb.ingest.concept.read_vectors import stored_texts, vector_rows
from kdb.ingest.corpus import Corpus, passages
from kdb.ingest.execution.local import LocalEngine
from kdb.ingest.forward.memory import most_per_shard
from kdb.ingest.job import derived_identity
from kdb.ingest.models.find import LoadedModel, ModelSource, check_revision
from kdb.ingest.models.guard import model_errors
from kdb.ingest.models.structure import ModelStructure, find_structure
from kdb.ingest.rows import Rows, rows_of, timed
from kdb.ingest.settings import Reading
from kdb.ingest.stages import Advance, ModelStage, Outcome, PlannedRun, RunInProgress, Shard, Stage, Subject, carry_out
from kdb.warehouse.manifest import RunFolder
from kdb.warehouse.parquet import read_parts
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.storage import Storage

if TYPE_CHECKING:
    from kdb.ingest.forward.decomposition import Decomposition


def read_lens(
    storage: Storage,
    source: RunFolder,
    wanted: Reading,
    model: ModelSource,
    load: Callable[[], LoadedModel],
    tokenizer: Any,
    corpus: Corpus | None = None,
) -> Outcome:
    """Read the prompts of a run through a lens, and commit the readouts as a derived run.

    ``corpus`` is the text on which a tuned lens is trained. Raises WarehouseError if the run's model is not ``model``,
    if no prompt is kept, or if vectors are not stored; DatasetError for a corpus that is too small.
    """
    tables = functools.partial(_rows, source)
    [row], [stored] = tables("runs"), tables("models")
    is_concept = row["study"] == "concept"
    storage.inspect([source], vectors=is_concept)
    check_revision(model, source.run, stored["revision"])
    work = _texts(source, wanted, tables, tokenizer) if is_concept else _prompts(source, tables, tokenizer)
    text = None if corpus is None else passages(tokenizer, corpus)
    about: dict[str, Any] = (
        {} if corpus is None else {"corpus": corpus.name, "corpus_sha256": corpus.fingerprint, "seed": wanted.seed}
    )
    settings = {"source_run": source.run, "lens": wanted.lens, "positions": wanted.positions} | about

    def prepare() -> tuple[Subject[Any], list[Stage]]:
        parts = tuple(table_files(source.path, "activations")) if is_concept else None
        return ToRead(model, wanted, parts, text), _stages(wanted, work, stored, text is not None)

    changed: dict[str, Any] = {"source_run": source.run, "settings": json.dumps(settings)}
    changed |= {} if corpus is None else {"seed": wanted.seed}
    identity = derived_identity("lens", row["study"], source, settings)
    planned = PlannedRun(
        identity, source.model, source.dataset, row | changed, prepare, source=source, copied=("models", "datasets")
    )
    return carry_out(storage, planned, LocalEngine(load))


def _rows(source: RunFolder, table: str) -> list[dict[str, Any]]:
    files = table_files(source.path, table)
    rows: list[dict[str, Any]] = read_parts(files).to_pylist() if files else []
    return rows


def _prompts(source: RunFolder, tables: Callable[[str], list[dict[str, Any]]], tokenizer: Any) -> list[Any]:
    kept = [known(row, tokenizer) for row in tables("prompts") if row["kept"]]
    if not kept:
        raise WarehouseError(f"Run {source.run} has no kept prompt, so there is nothing to read.")
    return kept


def _texts(
    source: RunFolder, wanted: Reading, tables: Callable[[str], list[dict[str, Any]]], tokenizer: Any
) -> list[Any]:
    if wanted.positions == "all":
        raise QueryError(
            f"{source.dataset} is a dataset of texts with labels, of which only the vectors of the last token are "
            "stored. Use --positions last."
        )
    check_vectors(source, table_files(source.path, "activations"))
    return stored_texts(tables("prompts"), tables("zero_shot"), tokenizer)


def _stages(wanted: Reading, work: Sequence[Any], model: Mapping[str, Any], is_tuned: bool) -> list[Stage]:
    n_tokens = 1 if wanted.positions == "last" else max(len(one.token_ids) for one in work)
    each = 2 * model["n_params"] + 4 * model["n_layers"] * model["vocab_size"] * model["hidden_size"] * n_tokens

    def shards(run: RunInProgress) -> list[Shard]:
        size = run.remembered("read", lambda: most_per_shard(run.device, each))
        some = [work[i : i + size] for i in range(0, len(work), size)]
        return [Shard(f"part-{i:05}", one, len(one)) for i, one in enumerate(some)]

    fits: list[Stage] = (
        [ModelStage(("lens_fits",), lambda _run: [Shard("part")], _fits, shown=("Fitting the tuned lens", None))]
        if is_tuned
        else []
    )
    return [*fits, ModelStage(("lens_readouts",), shards, _readouts, shown=("Reading the lens", "prompts"))]


@dataclass(frozen=True)
class ToRead:
    """The model of a run, and what to read, before the model is loaded.

    ``parts`` are the files of stored vectors; None if prompts are run. ``text`` are passages to train a tuned lens on,
    and held-out ones.
    """

    source: ModelSource
    wanted: Reading
    parts: tuple[Path, ...] | None
    text: tuple[list[list[int]], list[list[int]]] | None

    def bind(self, loaded: LoadedModel, batch_tokens: int | None) -> Reader:
        """Combine the wish with the model. Raises ModelError if parts of the model are not found."""
        from kdb.ingest.forward.decomposition import decompose

        with model_errors(f"{loaded.source.name} cannot be run"):
            if self.parts is not None:
                return Reader(self, loaded, find_structure(loaded.model), None)
            decomposition = decompose(loaded)
            return Reader(self, loaded, decomposition.structure, decomposition)


class Reader:
    """A loaded model that is read through a lens."""

    def __init__(
        self, wish: ToRead, loaded: LoadedModel, structure: ModelStructure, decomposition: Decomposition | None
    ) -> None:
        self.wish, self.loaded, self.structure, self.decomposition = wish, loaded, structure, decomposition

    @functools.cached_property
    def fits(self) -> Any:
        """The translators of a tuned lens, and how good they are. A resumed run trains them again, to the same."""
        from kdb.ingest.forward.tuned_lens import fit

        assert self.wish.text is not None  # only a tuned lens has fits
        with model_errors(f"{self.loaded.source.name} cannot be run"):
            return fit(self.loaded, self.structure, *self.wish.text, seed=self.wish.wanted.seed)

    @functools.cached_property
    def translators(self) -> Any:
        """The translators that are used, by place; None for the logit lens."""
        if self.wish.text is None:
            return None
        return {one.place: one.translator for one in self.fits if one.is_better}


def _fits(subject: Reader, _shard: Shard, _advance: Advance) -> Iterator[Rows]:
    """The rows of ``lens_fits``."""
    begun = time.monotonic()
    yield rows_of("lens_fits", [one.row() for one in subject.fits], begun)


def _readouts(subject: Reader, shard: Shard, advance: Advance) -> Iterator[Rows]:
    """The rows of ``lens_readouts``; advances by prompts."""
    from kdb.ingest.attribution.read_prompts import prompt_rows

    begun, translators = time.monotonic(), subject.translators
    with model_errors(f"{subject.loaded.source.name} cannot be read"):
        if subject.wish.parts is not None:
            tables = vector_rows(subject.loaded, subject.structure, subject.wish.parts, shard.work, translators)
        else:
            assert subject.decomposition is not None  # made by bind
            tables = prompt_rows(subject.decomposition, shard.work, subject.wish.wanted.positions, translators)
        found = list(tables)
    yield timed("lens_readouts", found, begun)
    advance(len(shard.work))
