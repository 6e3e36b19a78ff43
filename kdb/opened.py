"""The warehouse that ``kdb.open`` returns: a Warehouse that describes itself in a notebook, and draws."""

from __future__ import annotations

import html
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

import polars as pl

from kdb.analysis import figures
from kdb.queries.catalogue import Param, load_catalogue
from kdb.text import one_line
from kdb.warehouse.store import Warehouse
from kdb.wording import python_words

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_ROWS = 10
"""Maximum number of models that a notebook shows."""

_DATASETS = """
SELECT dataset, any_value(study) AS study, max(n_prompts) AS n_prompts, count(DISTINCT model) AS n_models,
    count(DISTINCT run) AS n_runs
FROM datasets
GROUP BY dataset
ORDER BY study, dataset
"""


class OpenWarehouse(Warehouse):
    """Measurements that can be queried and drawn; ``kdb.open`` and ``kdb.open_demo`` return one.

    ``query``, ``sql``, ``table``, ``scan``, ``models`` and ``datasets`` return Polars frames, ``plot`` an Altair chart.
    A ``with`` block needs no closing, because no connection stays open; it only deletes the copy of the demo.
    """

    kept_with: Any = None
    """The temporary folder of the demo."""

    query = python_words()(Warehouse.query)
    sql = python_words()(Warehouse.sql)
    table = python_words()(Warehouse.table)
    scan = python_words()(Warehouse.scan)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.kept_with is not None:
            self.kept_with.cleanup()

    def models(self) -> pl.DataFrame:
        """Return the stored models with their sizes and sources, as ``query("models")`` does."""
        return self.query("models")

    def datasets(self) -> pl.DataFrame:
        """Return the stored datasets, each with its study and its numbers of prompts, models and runs."""
        return self.sql(_DATASETS)

    def queries(self) -> pl.DataFrame:
        """Return the saved queries for ``query``, with their parameters; * marks a required one."""
        rows = [(one.name, one.title, _names(one.params)) for one in load_catalogue().values()]
        return pl.DataFrame(rows, ["query", "answers", "parameters"], orient="row")

    def figures(self) -> pl.DataFrame:
        """Return the figures for ``plot``, with their parameters; * marks a required one."""
        rows = [(one.name, one.title, _names(one.params)) for one in figures.FIGURES.values()]
        return pl.DataFrame(rows, ["figure", "shows", "parameters"], orient="row")

    def plot(
        self,
        name: str,
        /,
        *,
        width: int | None = None,
        height: int | None = None,
        theme: str = "paper",
        **params: object,
    ) -> Any:
        """Return a figure as an Altair chart, which a notebook shows; ``.save("file.html")`` writes it.

        ``width`` and ``height`` are those of a panel in pixels, ``theme`` is paper or dark. Raises UnknownNameError for
        an unknown figure, QueryError for wrong parameters, and NothingFoundError if there is nothing to draw.
        """
        from kdb.analysis.themes import resized  # loads Altair

        with python_words():
            return resized(figures.chart(self, name, **params), width=width, height=height, theme=theme)

    def __repr__(self) -> str:
        counted = self._counted()
        of = ", ".join(f"{n} {what}{'s' * (n != 1)}" for what, n in self._sizes(counted).items())
        return f"<kdb warehouse {self._where!r}: {of}>"

    def _repr_html_(self) -> str:
        """Return what the warehouse holds, for a notebook: its models and, for each, its datasets and runs."""
        counted = self._counted()
        of = ", ".join(f"{n} {what}{'s' * (n != 1)}" for what, n in self._sizes(counted).items())
        models = sorted({model for model, _dataset in counted})
        rows = [_row(model, {d: n for (m, d), n in counted.items() if m == model}) for model in models[:_MOST_ROWS]]
        more = (
            f"<p>and {len(models) - _MOST_ROWS} more models: <code>.models()</code></p>" if models[_MOST_ROWS:] else ""
        )
        head = "<tr><th>model</th><th>datasets</th><th>runs</th></tr>"
        return (
            f"<p>kdb warehouse <code>{html.escape(self._where)}</code>: {of}</p>"
            f"<table>{head}{''.join(rows)}</table>{more}"
            "<p><code>.queries()</code> lists what can be asked, <code>.figures()</code> what can be drawn.</p>"
        )

    @property
    def _where(self) -> str:
        return "demo" if self.kept_with is not None else one_line(str(self.storage.location))

    def _counted(self) -> Counter[tuple[str, str]]:
        """Return the number of runs of each model and dataset, from the names of folders: no file is read."""
        folders = self._folders if self._shared is not None else self.storage.run_folders()
        return Counter((folder.model, folder.dataset) for folder in folders)

    @staticmethod
    def _sizes(counted: Counter[tuple[str, str]]) -> dict[str, int]:
        models, datasets = ({key[i] for key in counted} for i in (0, 1))
        return {"run": counted.total(), "model": len(models), "dataset": len(datasets)}


def _row(model: str, datasets: dict[str, int]) -> str:
    cells = (model, ", ".join(sorted(datasets)), str(sum(datasets.values())))
    return "<tr>" + "".join(f"<td>{html.escape(one_line(cell))}</td>" for cell in cells) + "</tr>"


def _names(params: Sequence[Param]) -> str:
    return ", ".join(param.name + "*" * param.required for param in params)
