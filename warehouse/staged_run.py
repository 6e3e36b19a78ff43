"""A run that is being measured: finished parts stay in staging until one commit makes the complete run visible.

    with storage.stage(run, model, dataset, identity=identity) as staged:
        if not staged.committed:
            staged.write("activations", "part-00000", groups)
            staged.commit(run_row)

A part is valid when it has its final name, which it gets by a rename. How a complete run becomes visible is up to the
storage: `CommitTarget`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import Timeout

from kdb.errors import WarehouseError
from kdb.warehouse.checksums import file_record
from kdb.warehouse.files import is_partial, storage_errors, write_json
from kdb.warehouse.manifest import FORMULA, MANIFEST, Manifest, run_id
from kdb.warehouse.parquet import read_parts, seconds_of, with_partitions, write_parquet
from kdb.warehouse.run_folders import partitions
from kdb.warehouse.schema import arrow_schema, has_vectors
from kdb.warehouse.staging import Staging

_MERGE_BELOW = 64 * 2**20
"""A table whose parts are smaller than this in total is committed as one file, because few files keep queries fast."""


class CommitTarget(Protocol):
    """The place where complete runs become visible."""

    def has_run(self, staged: StagedRun) -> bool:
        """Whether a run with this id is committed."""

    def publish(self, staged: StagedRun) -> None:
        """Make a complete run, which has its manifest, visible in one step, and remove it from staging."""


class StagedRun:
    """A run in progress. Finished parts remain, whatever happens to the writer.

    ``committed`` says whether the run is already visible, so that nothing remains to be written. ``folder`` is its
    folder within the lake. ``hashed`` is the manifest if this process has hashed all files.
    """

    def __init__(
        self,
        staging: Staging,
        target: CommitTarget,
        run: str,
        model: str,
        dataset: str,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if identity is not None and run_id(identity) != run:
            raise AssertionError(f"the run id {run} does not follow from its identity")
        self.run, self.model, self.dataset, self.identity = run, model, dataset, identity
        self.path = staging.path / run
        self.folder = partitions(model, dataset, run)
        self.committed = False
        self.hashed: Manifest | None = None
        self._target = target
        self._lock = staging.lock(run)

    def __enter__(self) -> StagedRun:
        """Take the run's lock. Raises WarehouseError if another process holds it."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise WarehouseError(
                    f"Run {self.run} ({self.model} on {self.dataset}) is being measured by another process. "
                    "Wait for it to finish, then retry."
                ) from None
            try:
                self._begin()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; finished parts remain in staging."""
        if self.path.is_dir() and not any(self.path.rglob("*.parquet")):
            shutil.rmtree(self.path, ignore_errors=True)
        if self.committed:
            # A process that still waits for the removed lock file finds the run committed, and has nothing to write.
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _begin(self) -> None:
        self.committed = self._target.has_run(self)
        if self.committed:  # by the process that held the lock before
            shutil.rmtree(self.path, ignore_errors=True)
            return
        if (self.path / MANIFEST).exists():  # its commit was interrupted
            self._publish()
            return
        for partial in filter(is_partial, self.path.rglob("*")):
            partial.unlink()
        if not (self.path / "run.json").exists():
            begun = datetime.now(UTC).isoformat()
            names = {"run": self.run, "model": self.model, "dataset": self.dataset}
            write_json(self.path / "run.json", {**names, "started_at": begun})

    @property
    def facts(self) -> dict[str, Any]:
        """Return the recorded facts of the run: its names, ``started_at``, and those added by `remember`."""
        facts: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        return facts

    def remember(self, **facts: object) -> None:
        """Record facts of a run in progress that a resumed run needs."""
        write_json(self.path / "run.json", {**self.facts, **facts})

    def restart(self, **facts: object) -> None:
        """Delete all finished parts and recorded facts, except the run's names, its start, and the facts given."""
        with storage_errors(self.path):
            for child in self.path.iterdir():
                if child.is_dir():
                    shutil.rmtree(child)
            kept = {name: self.facts[name] for name in ("run", "model", "dataset", "started_at")}
            write_json(self.path / "run.json", {**kept, **facts})

    def part(self, table: str, name: str) -> Path:
        """Return the path of a finished part."""
        return self.path / table / f"{name}.parquet"

    def has(self, table: str, name: str) -> bool:
        """Whether a part is finished."""
        return self.part(table, name).exists()

    def parts(self, table: str) -> list[Path]:
        """Return the finished parts of a table, in order of their names."""
        return sorted(path for path in (self.path / table).glob("*.parquet") if path.stem != "all")

    def table(self, table: str) -> pa.Table:
        """Return the rows of the finished parts of a table."""
        return read_parts(self.parts(table))

    def write(self, table: str, name: str, groups: Iterable[pa.Table], *, seconds: float = 0.0) -> None:
        """Write one part, with a row group for each Arrow table; it is valid when it is complete.

        ``seconds`` is the time spent measuring its content; the run's time is the sum over its parts.
        """
        with storage_errors(self.path):
            write_parquet(self.part(table, name), map(self.named, groups), seconds=seconds)

    def write_rows(self, table: str, name: str, rows: Sequence[Mapping[str, Any]], *, seconds: float = 0.0) -> None:
        """Write one part of a small table from dictionaries; absent columns are NULL."""
        self.write(table, name, [pa.Table.from_pylist(list(rows), schema=arrow_schema(table))], seconds=seconds)

    def named(self, rows: pa.Table) -> pa.Table:
        """Return rows with model, dataset and run of this run as columns."""
        return with_partitions(rows, self.model, self.dataset, self.run)

    def commit(self, run_row: Mapping[str, Any]) -> None:
        """Make the complete run visible in one step.

        ``run_row`` is the row of ``runs``; times and the list of tables are filled in here. The manifest, which defines
        the run, is written last. An interrupted commit is completed by the next process that takes the lock.
        """
        with storage_errors(self.path):
            self._write_manifest(run_row)
            self._publish()

    def commit_copy(self, copy: Path, manifest: Manifest) -> None:
        """Make a folder with all files of the manifest, which were just hashed, visible as this run."""
        with storage_errors(self.path):
            self.hashed = manifest
            write_json(copy / MANIFEST, manifest.content())
            write_json(copy / "run.json", self.facts)
            shutil.rmtree(self.path)
            copy.rename(self.path)  # from here on, the next process that takes the lock completes the commit
            self._publish()

    def _publish(self) -> None:
        self._target.publish(self)
        self.committed = True

    def _write_manifest(self, run_row: Mapping[str, Any]) -> None:
        """Write the run's row, merge small parts, and list all files in the manifest."""
        # Tables whose names begin with _ are of use only while the run is in progress.
        folders = {folder.name for folder in self.path.iterdir() if folder.is_dir()}
        tables = {name for name in folders if not name.startswith("_")} | {"runs"}
        parts = {table: self.parts(table) for table in sorted(tables - {"runs"})}
        row = {
            **run_row,
            "tables": sorted(tables),
            "started_at": datetime.fromisoformat(self.facts["started_at"]),
            "finished_at": datetime.now(UTC),
            "seconds": sum(seconds_of(path) for paths in parts.values() for path in paths),
        }
        self.write_rows("runs", "all", [row])
        files = [self.part("runs", "all")]
        for table, paths in parts.items():
            files += self._merged(table, paths)
        records = tuple(file_record(path, self.path) for path in files)
        formula = None if self.identity is None else FORMULA
        self.hashed = Manifest(records, formula=formula, identity=self.identity)
        write_json(self.path / MANIFEST, self.hashed.content())

    def _merged(self, table: str, paths: list[Path]) -> list[Path]:
        # Vectors are not merged: their row groups let a reader skip all other layers.
        if has_vectors(table) or len(paths) < 2 or sum(path.stat().st_size for path in paths) >= _MERGE_BELOW:
            return paths
        whole = self.part(table, "all")
        write_parquet(whole, [pa.concat_tables(self.named(pq.ParquetFile(path).read()) for path in paths)])
        return [whole]
