"""Measuring: run a model on datasets, refit probes, project, and list what can be measured."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

import kdb
from kdb.cli.options import Command, warehouse_option
from kdb.errors import UnknownNameError


def _dataset_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option(
                "--dataset",
                "datasets_",
                multiple=True,
                help="Name or .csv, .jsonl or .parquet file; repeatable. Else every built-in one.",
            ),
            click.option("--dataset-name", help="Name to store a file of your own under; else its stem."),
            click.option(
                "--data-dir",
                type=click.Path(path_type=Path),
                envvar="KDB_DATA_DIR",
                help="Folder with the papers' original files; else $KDB_DATA_DIR, else the cache.",
            ),
            click.option("--template", help="Prompt template, such as 'Is it true? {text}'."),
            click.option("--limit", type=int, help="Take the first N of each class."),
            click.option("--group-by", help="Column that a grouped split keeps on one side."),
            click.option("--noise", is_flag=True, help="Put aaa or bbb before each text, by seed."),
        )
    ):
        command = option(command)
    return command


def _probe_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option(
                "--classifier",
                "classifiers",
                multiple=True,
                type=click.Choice(["logistic", "logistic-paper", "logistic-standardised", "random-forest"]),
                help="Fit this too; logistic and logistic-paper always are.",
            ),
            click.option(
                "--splits",
                type=click.IntRange(1),
                default=1,
                show_default=True,
                help="Splits in all: the paper's, then seeded stratified ones.",
            ),
            click.option(
                "--seed",
                type=int,
                default=42,
                show_default=True,
                help="Seed of noise, of shuffled labels and of all splits but the paper's.",
            ),
        )
    ):
        command = option(command)
    return command


def _attribution_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option(
                "--top-k",
                type=click.IntRange(1),
                default=300,
                show_default=True,
                help="Knowledge: neurons of each component to store for a prompt, proved to be the best.",
            ),
            click.option(
                "--all-neurons",
                is_flag=True,
                help="Knowledge: store every neuron, with a certified interval of its score.",
            ),
            click.option(
                "--query-values",
                type=click.IntRange(1),
                default=30,
                show_default=True,
                help="Knowledge: value neurons that are traced back to query neurons.",
            ),
            click.option(
                "--ablate-k",
                type=click.IntRange(0),
                default=10,
                show_default=True,
                help="Knowledge: neurons of each method that are zeroed; 0 skips the comparison.",
            ),
        )
    ):
        command = option(command)
    return command


def _model_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option("--model", required=True, help="Name (`kdb models`), hub id, folder, or .gguf file."),
            click.option("--name", help="Name to store the model under; else its own."),
            click.option("--revision", help="Branch, tag or commit on the hub."),
            click.option("--device", help="cpu, cuda, cuda:1, …; else CUDA where there is one."),
            click.option(
                "--dtype",
                type=click.Choice(["float32", "bfloat16", "float16"]),
                default="float32",
                show_default=True,
                help="Of the weights in the forward pass.",
            ),
            click.option("--quantize", type=click.Choice(["int8"]), help="Quantize the weights alone."),
            click.option(
                "--store",
                type=click.Choice(["float32", "float16"]),
                default="float32",
                show_default=True,
                help="Of the vectors on disk.",
            ),
            click.option(
                "--batch-tokens",
                type=click.IntRange(1),
                help="Tokens per batch; changes speed and memory, not results.",
            ),
        )
    ):
        command = option(command)
    return command


@click.command()
@_model_options
@_dataset_options
@_probe_options
@_attribution_options
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and stop.")
@warehouse_option
def ingest(warehouse: Path, dry_run: bool, **options: Any) -> None:
    """Run a model on datasets, and measure where it knows what they ask.

    Texts with labels: stores the last token's hidden state at every layer and two sites, probes them, and stores
    what the model itself answers. Prompts with answers: scores the layers, heads and neurons that raise the answer's
    probability. The same command goes on from where it was interrupted, and does nothing where the run is stored.

    \b
    kdb ingest --model smollm2-135m
    kdb ingest --model smollm2-135m --dataset cities --data-dir data/
    kdb ingest --model smollm2-135m --dataset knowledge
    kdb ingest --model ./my-model --dataset my.csv
    """
    from kdb.ingest import models as found
    from kdb.ingest.run import ingest as measure

    _log_to_stderr()
    jobs = _jobs(options)
    if dry_run:
        from kdb.ingest.plan import plan

        for job in jobs:
            click.echo(f"{job.source.name} on {job.dataset.name}: {plan(job, found.pick_device(options['device']))}")
        return
    from kdb.warehouse.store import Warehouse

    opened = Warehouse.create(warehouse)

    @functools.cache
    def load() -> found.LoadedModel:
        device = found.pick_device(options["device"])
        return found.load_model(jobs[0].source, device=device, dtype=options["dtype"], quantize=options["quantize"])

    for job in jobs:
        outcome = measure(opened.lake, job, load, batch_tokens=options["batch_tokens"])
        _report(outcome, job.source.name, job.dataset.name)


def _jobs(options: dict[str, Any]) -> list[Any]:
    """Everything that was asked for, found and checked before any work."""
    from kdb.ingest.datasets import available_datasets, load_dataset
    from kdb.ingest.job import Attributing, Job, Measuring
    from kdb.ingest.models import find_model

    built_in = [info.name for info in available_datasets(options["data_dir"]) if info.status == "built in"]
    if options["dataset_name"] and len(options["datasets_"]) != 1:
        raise click.UsageError("--dataset-name names one dataset: give one --dataset with it.")
    names = ("data_dir", "dataset_name", "template", "limit", "group_by")
    texts = [load_dataset(name, **{n: options[n] for n in names}) for name in options["datasets_"] or built_in]
    source = find_model(options["model"], name=options["name"], revision=options["revision"])
    measuring = Measuring(**{n: options[n] for n in ("dtype", "quantize", "noise", "seed", "store", "limit")})
    custom = options["template"] is not None
    attributing = Attributing(**{n: options[n] for n in ("top_k", "all_neurons", "query_values", "ablate_k")})
    return [Job(source, dataset, measuring, _probing(options), custom, attributing) for dataset in texts]


def _probing(options: dict[str, Any]) -> Any:
    from kdb.ingest.job import ALWAYS_FITTED, Probing

    return Probing(tuple(dict.fromkeys((*ALWAYS_FITTED, *options["classifiers"]))), options["splits"])


def _report(outcome: Any, model: str, dataset: str) -> None:
    done = "is stored already" if outcome.status == "exists" else "stored"
    click.echo(f"{model} on {dataset}: {done} (run {outcome.run})")


def _stored_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option("--model", required=True, help="Model, as stored."),
            click.option("--dataset", required=True, help="Dataset, as stored."),
            click.option("--variant", default="default", show_default=True, help="Variant of the run (`kdb runs`)."),
        )
    ):
        command = option(command)
    return command


@click.command()
@_stored_options
@_probe_options
@warehouse_option
def probe(model: str, dataset: str, variant: str, warehouse: Path, **options: Any) -> None:
    """Fit probes again on stored activations, without the model.

    The scores are a run of their own that names its source.

    \b
    kdb probe --model smollm2-135m --dataset cities --splits 5 --classifier random-forest
    """
    from kdb.ingest.derived import refit

    _log_to_stderr()
    opened = kdb.open(warehouse)
    source = _stored_run(opened.sql, model, dataset, variant)
    outcome = refit(opened.lake, opened.lake.find(source), _probing(options), seed=options["seed"])
    _report(outcome, model, dataset)


@click.command()
@_stored_options
@click.option(
    "--method",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    show_default=True,
    help="Two principal components; or UMAP too (`pip install 'kdb-lm[umap]'`).",
)
@warehouse_option
def project(model: str, dataset: str, variant: str, method: str, warehouse: Path) -> None:
    """Project stored activations onto two axes at every layer, without the model.

    The points are a run of their own that names its source, in the table projections.

    \b
    kdb project --model smollm2-135m --dataset cities
    """
    from kdb.ingest.derived import project as project_run

    _log_to_stderr()
    opened = kdb.open(warehouse)
    source = _stored_run(opened.sql, model, dataset, variant)
    # PCA every time: queries read the newest run, and it must not lack what an older one had.
    methods = tuple(dict.fromkeys(("pca", method)))
    _report(project_run(opened.lake, opened.lake.find(source), methods), model, dataset)


@click.command()
@click.option("--model", required=True, help="Name (`kdb models`), hub id, folder, or .gguf file.")
@click.option("--name", "model_name", help="Name that the model is stored under; else its own.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--dataset", default="knowledge", show_default=True, help="Dataset, as stored.")
@click.option("--variant", default="default", show_default=True, help="Variant of the run (`kdb runs`).")
@click.option("--query", "query_", required=True, help="SQL that gives layer, component, head and neuron.")
@click.option("--label", default="custom", show_default=True, help="Name to store the set's effect under.")
@click.option(
    "--positions",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Zero at the last token, or at all.",
)
@click.option(
    "--controls",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Sets of as many random neurons of the same layers.",
)
@click.option("--seed", type=int, default=42, show_default=True, help="Of the random sets.")
@click.option("--device", help="cpu, cuda, cuda:1, …; else CUDA where there is one.")
@warehouse_option
def ablate(
    model: str,
    model_name: str | None,
    revision: str | None,
    dataset: str,
    variant: str,
    query_: str,
    label: str,
    warehouse: Path,
    **options: Any,
) -> None:
    """Zero the neurons or heads that a query names, in every prompt that counts.

    The query gives the columns layer, component (attn or ffn), head and neuron; a head without a neuron is zeroed
    whole. The effect is a run of its own, of the variant 'ablate=LABEL', beside that of random neurons.

    \b
    kdb ablate --model smollm2-135m --label best-heads --query "
        SELECT layer, 'attn' AS component, head, NULL AS neuron FROM head_scores
        GROUP BY ALL ORDER BY avg(score) DESC LIMIT 5"
    """
    from kdb.ingest import models as found
    from kdb.ingest.intervention import ablate as intervene

    _log_to_stderr()
    opened = kdb.open(warehouse)
    source = found.find_model(model, name=model_name, revision=revision)
    run = opened.lake.find(_stored_run(opened.sql, source.name, dataset, variant, "head_scores"))
    rows = opened.sql(query_).rows(named=True)
    stored = opened.sql("SELECT dtype, quantization FROM models WHERE run = ?", [run.run]).rows()[0]

    def load() -> found.LoadedModel:
        device = found.pick_device(options["device"])
        return found.load_model(source, device=device, dtype=stored[0], quantize=stored[1])

    outcome = intervene(
        opened.lake,
        run,
        rows,
        load,
        name=label,
        positions=options["positions"],
        n_controls=options["controls"],
        seed=options["seed"],
    )
    _report(outcome, source.name, dataset)


def _stored_run(sql: Callable[..., Any], model: str, dataset: str, variant: str, table: str = "activations") -> str:
    """The newest run of this model, dataset and variant that has rows in a table."""
    current = sql("SELECT model, dataset, variant, run FROM current_runs WHERE table_name = ?", [table]).rows()
    runs = {row[:3]: row[3] for row in current}
    hint = "`kdb runs` lists what is stored; `kdb ingest` measures more."
    for kind, place, name in (("model", 0, model), ("dataset", 1, dataset), ("variant", 2, variant)):
        stored = {key[place] for key in runs if key[:place] == (model, dataset)[:place]}
        if name not in stored:
            raise UnknownNameError(f"stored {kind}", name, stored, hint)
    return str(runs[model, dataset, variant])


@click.command()
def models() -> None:
    """List the models that have a short name.

    Any hub id, folder or .gguf file works too.
    """
    from kdb.ingest.models import REGISTRY

    _columns([(m.name, m.family, m.size, _weights(m)) for m in REGISTRY.values()], ("name", "family", "size", "source"))


def _weights(model: Any) -> str:
    from importlib.util import find_spec

    packaged = model.package is not None and find_spec(model.package) is not None
    return f"{model.hub_id} (installed: {model.package})" if packaged else model.hub_id


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    envvar="KDB_DATA_DIR",
    help="Folder to look in; else $KDB_DATA_DIR.",
)
def datasets(data_dir: Path | None) -> None:
    """List the datasets that have a name, and which can be had here."""
    from kdb.ingest.datasets import available_datasets

    rows = [(i.name, i.size, f"{i.status} {i.where}".strip(), i.source) for i in available_datasets(data_dir)]
    _columns(rows, ("name", "prompts", "here", "source"))


def _columns(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("kdb").setLevel(logging.INFO)
