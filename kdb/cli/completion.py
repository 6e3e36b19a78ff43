"""Completion of names by the shell, and the command that installs it.

Names come from the folders of the warehouse: no database is opened, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from kdb.queries.catalogue import load_catalogue
from kdb.queries.domains import CATEGORIES

if TYPE_CHECKING:
    from kdb.warehouse.manifest import RunFolder

    Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

DEFAULT_WAREHOUSE = "kdb-warehouse"
STORED = ("model", "dataset", "run", "variant", "category")
"""Kinds of stored names that are completed."""

_MOST_FILES = 200
"""Maximum number of files that one completion reads: the shell waits for it."""


def stored(kind: str) -> Completion:
    """Return the completion of stored names: model, dataset, run, variant or category."""
    return _completion(lambda ctx: _STORED[kind](_chosen(ctx, kind)))


def measurable(kind: str) -> Completion:
    """Return the completion of what can be measured: a model or dataset by name, or a file."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = _completion(lambda _: _known(kind))(ctx, param, incomplete)
        return names or [CompletionItem(incomplete, type="file")]

    return complete


def queries() -> Completion:
    """Return the completion of names of saved queries."""
    return _completion(lambda _: ((saved.name, saved.title) for saved in load_catalogue().values()))


def tables() -> Completion:
    """Return the completion of names of tables."""

    def names(_: click.Context) -> Iterator[tuple[str, str]]:
        from kdb.warehouse.schema import TABLES

        yield from ((name, str(table.comment)) for name, table in TABLES.items())

    return _completion(names)


def _completion(names: Callable[[click.Context], Iterable[tuple[str, str]]]) -> Completion:
    """Return a completion from pairs of name and explanation."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            found = dict(names(ctx))
        except Exception:  # an error in the middle of a command line helps nobody; the command itself reports it
            return []
        return [
            CompletionItem(name, help=help_ or None) for name, help_ in found.items() if name.startswith(incomplete)
        ]

    return complete


def _known(kind: str) -> Iterator[tuple[str, str]]:
    if kind == "model":
        from kdb.ingest.models.find import REGISTRY

        names = list(REGISTRY)
    else:
        from kdb.ingest.datasets import available_datasets

        names = [info.name for info in available_datasets()]
    yield from ((name, "") for name in names)


def _chosen(ctx: click.Context, kind: str) -> list[RunFolder]:
    """Return the runs of the warehouse, of the models and datasets that the command line names before `kind`."""
    from kdb.warehouse.run_folders import list_run_folders

    where = _given(ctx, "warehouse") or [os.environ.get("KDB_WAREHOUSE") or DEFAULT_WAREHOUSE]
    runs = [] if "://" in str(where[0]) else list_run_folders(Path(str(where[0])) / "lake")
    models = [] if kind == "model" else _given(ctx, "model", "models", "models_")
    datasets = [] if kind in ("model", "dataset") else _given(ctx, "dataset", "datasets", "datasets_")
    return [run for run in runs if run.model in (models or [run.model]) and run.dataset in (datasets or [run.dataset])]


def _given(ctx: click.Context, *names: str) -> list[Any]:
    """Return the values that the command line gives for a parameter, which has one of these names."""
    context: click.Context | None = ctx
    while context is not None:
        for name in names:
            if value := context.params.get(name):
                return list(value) if isinstance(value, tuple) else [value]
        context = context.parent
    return []


def _runs(runs: list[RunFolder]) -> Iterator[tuple[str, str]]:
    yield from ((run.run, f"{run.model} on {run.dataset}") for run in runs)


def _variants(runs: list[RunFolder]) -> Iterator[tuple[str, str]]:
    yield from ((variant, "") for variant in sorted(_values(runs, "runs", "variant")))


def _categories(runs: list[RunFolder]) -> Iterator[tuple[str, str]]:
    of_datasets = {run.dataset: run for run in runs}.values()  # all runs on a dataset have the same categories
    found = _values(of_datasets, "prompts", "category")
    yield from ((name, "") for name in sorted(found | (set() if found else set(CATEGORIES))))


def _values(runs: Iterable[RunFolder], table: str, column: str) -> set[str]:
    import pyarrow.parquet as pq

    from kdb.warehouse.run_folders import table_files

    files = [file for run in runs for file in table_files(run.path, table)][:_MOST_FILES]
    columns = (pq.ParquetFile(file).read([column])[column].to_pylist() for file in files)
    return {value for values in columns for value in values if value is not None}


_STORED: dict[str, Callable[[list[RunFolder]], Iterable[tuple[str, str]]]] = {
    "model": lambda runs: ((run.model, "") for run in runs),
    "dataset": lambda runs: ((run.dataset, "") for run in runs),
    "run": _runs,
    "variant": _variants,
    "category": _categories,
}


_SHELLS = ("bash", "zsh", "fish")
_INSTALL = {
    "bash": "echo 'eval \"$(kdb completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(kdb completion zsh)\"' >> ~/.zshrc",
    "fish": "kdb completion fish > ~/.config/fish/completions/kdb.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS), required=False)
@click.pass_context
def completion(ctx: click.Context, shell: str | None) -> None:
    """Print the script that completes commands, options and stored names in a shell.

    Without SHELL, it is the one of $SHELL. The last line of the script says how to install it.

    \b
    eval "$(kdb completion bash)"
    kdb completion fish > ~/.config/fish/completions/kdb.fish
    """
    shell = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(shell) if shell in _SHELLS else None
    if kind is None:
        raise click.UsageError(f"Name the shell: {', '.join(_SHELLS)}.")
    click.echo(kind(ctx.find_root().command, {}, "kdb", "_KDB_COMPLETE").source())
    click.echo(f"# To install: {_INSTALL[shell]}")
