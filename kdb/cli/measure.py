"""Commands that measure: run a model on datasets, refit probes, project, and list models."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import kdb
from kdb.cli.options import PlanCommand, PlanFile, output_options, say, show, warehouse_option
from kdb.cli.outcome import report_measured, report_outcome, say_next
from kdb.cli.settings import (
    attribution_options,
    dataset_options,
    engine_options,
    model_options,
    probe_options,
    stored_options,
)
from kdb.errors import PlanError, QueryError, UnknownNameError
from kdb.tables import View

if TYPE_CHECKING:
    from kdb.warehouse.store import Warehouse


@click.command(cls=PlanCommand)
@click.argument("plan", required=False, type=PlanFile(), metavar="[PLAN.yaml]")
@model_options
@dataset_options
@probe_options
@attribution_options
@click.option("--dry-run", is_flag=True, help="Estimate time, memory and disk space, and stop.")
@engine_options
@warehouse_option
@click.pass_context
def ingest(
    ctx: click.Context,
    /,
    plan: Path | None,
    warehouse: Path | str,
    dry_run: bool,
    engine: str,
    address: str | None,
    worker_cpus: int | None,
    worker_gpus: int | None,
    **options: Any,
) -> None:
    """Run models on datasets, and measure where they store knowledge.

    For texts with labels: store the last token's hidden state at every layer and two sites, fit probes to it, and store
    the model's own answers. For prompts with answers: score the layers, heads and neurons that raise the answer's
    probability. The same command resumes an interrupted run, and skips a stored one.

    Several models, revisions or datasets are measured one after the other. Failed runs are listed at the end; the
    others continue. A plan is a YAML file with a list `runs` of such options.

    \b
    kdb ingest --model smollm2-135m
    kdb ingest --model smollm2-135m --dataset cities --data-dir data/
    kdb ingest --model EleutherAI/pythia-160m --revision step1000 --revision step2000 --dataset knowledge
    kdb ingest plan.yaml
    kdb ingest plan.yaml --engine ray --address 10.0.0.1:6379
    """
    from kdb.ingest.jobs import jobs
    from kdb.ingest.models.load import pick_device
    from kdb.ingest.plan_file import measure_all
    from kdb.warehouse.store import Warehouse

    log_to_stderr()
    asked = _asked(ctx, plan, options)
    alone = jobs(asked[0]) if len(asked) == 1 else None
    if dry_run:
        from kdb.ingest.cost import cost
        from kdb.ingest.speed import calibrated

        for one in asked:
            for job in alone or jobs(one):
                expected = calibrated(cost(job, pick_device(one.options["device"])))
                say(f"{one.name} on {job.dataset.name}: {expected}")
        return
    opened = Warehouse.create(warehouse)
    with _engines(engine, address, worker_cpus, worker_gpus) as engines:
        if alone is not None and len(alone) == 1:  # a single run: an error is an error of the input
            from kdb.ingest.measure import ingest_on

            begun = time.monotonic()
            with engines(asked[0], alone[0].source) as running:
                outcome = ingest_on(opened.storage, alone[0], running)
            took = time.monotonic() - begun
            report_measured(opened, outcome, alone[0].source.name, alone[0].dataset.name, took)
            return
        ended = measure_all(opened.storage, asked, jobs, engines)
        _report_all(ctx, opened, ended, sum(len(one.datasets) for one in asked))


@contextlib.contextmanager
def _engines(engine: str, address: str | None, cpus: int | None, gpus: int | None) -> Iterator[Callable[..., Any]]:
    """Yield a function that makes the engine for a model: this process, or workers of a Ray cluster."""
    from kdb.ingest.jobs import local_engine

    if engine == "local":
        if address or cpus or gpus is not None:
            raise click.UsageError("--address, --worker-cpus and --worker-gpus need --engine ray.")
        yield local_engine
        return
    from kdb.ingest.execution.ray import Cluster, Needs

    with Cluster(address, Needs(cpus, gpus)) as cluster:
        device = "cuda" if cluster.resources["num_gpus"] else "cpu"

        def there(one: Any, source: Any) -> Any:
            settings = {name: one.options[name] for name in ("dtype", "quantize")}
            return cluster.engine(
                source, {"device": one.options["device"] or device, **settings}, one.options["batch_tokens"]
            )

        yield there


def _asked(ctx: click.Context, plan: Path | None, options: dict[str, Any]) -> list[Any]:
    """Return the models and revisions of a plan or of the options, each with its datasets, after checking the names."""
    from dataclasses import replace

    from kdb.ingest.jobs import complete
    from kdb.ingest.plan_file import SEVERAL, combine, read_plan

    settings = {key: value for key, value in options.items() if key not in ("models_", "revisions", "datasets_")}
    if plan is None:
        if not options["models_"]:
            raise click.UsageError("Missing option '--model': name a model, or a plan of runs.")
        several = dict(zip(SEVERAL, (options["models_"], options["revisions"], options["datasets_"]), strict=True))
        asked = combine({**settings, **several})
    else:
        if options["models_"] or options["revisions"] or options["datasets_"]:
            raise click.UsageError(
                "A plan names its models, revisions and datasets. Remove --model, --revision and --dataset."
            )
        params = {str(param.name): param for param in ctx.command.params if param.name in settings}
        params["classifier"] = params.pop("classifiers")  # in a plan, an option that repeats is a list
        asked = read_plan(plan, {**dict.fromkeys(SEVERAL, str), **{name: _kind(p) for name, p in params.items()}})
        asked = [replace(one, options=_typed(ctx, f"{plan}, {one.name}", params, one.options)) for one in asked]
    return complete(asked, settings)


def _typed(
    ctx: click.Context, where: str, params: dict[str, click.Parameter], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of a plan's run under the names of the command's parameters, checked as these are."""
    typed = {}
    for key, value in options.items():
        several = params[key].multiple
        given = tuple(value) if several and isinstance(value, list) else (value,) if several else value
        try:
            params[key].type_cast_value(ctx, given)
        except click.BadParameter as error:
            raise PlanError(f"{where}: {error.format_message()}") from error
        typed[str(params[key].name)] = given
    return typed


def _kind(param: click.Parameter) -> type:
    """Return the type of an option's values in a plan."""
    kinds = {click.types.IntParamType: int, click.types.FloatParamType: float, click.types.BoolParamType: bool}
    return next((kind for type_, kind in kinds.items() if isinstance(param.type, type_)), str)


def _report_all(ctx: click.Context, opened: Warehouse, ended: Iterator[Any], total: int) -> None:
    """Print a line for each run when it ends, and what to type next.

    Failed runs are listed in the end; if there are any, exit with status 1.
    """
    failed, stored, width = [], [], len(str(total))
    for number, one in enumerate(ended, start=1):
        done = {"exists": "is stored already", "committed": "stored", "failed": "FAILED"}[one.status]
        run = f" (run {one.run})" if one.run else ""
        say(f"[{number:{width}}/{total}] {one.model} on {one.dataset}: {done}{run}")
        failed += [one] * (one.status == "failed")
        stored += [one.run] * (one.status == "committed")
    if stored:
        say_next(opened, stored[-1])
    if failed:
        click.echo(f"\n{len(failed)} of {total} runs failed. Run the same command again to retry them:", err=True)
        for one in failed:
            say(f"  {one.model} on {one.dataset}: {one.why}", err=True)
        ctx.exit(1)


@click.command()
@stored_options
@probe_options
@warehouse_option
def probe(model: str, dataset: str, variant: str, warehouse: Path | str, **options: Any) -> None:
    """Fit probes again on stored activations, without the model.

    The scores are stored as a new run, which names the run that it was computed from.

    \b
    kdb probe --model smollm2-135m --dataset cities --splits 5 --classifier random-forest
    """
    from kdb.ingest.concept.derived import refit
    from kdb.ingest.jobs import probing

    log_to_stderr()
    opened = kdb.open(warehouse)
    source = stored_run(opened.sql, model, dataset, variant)
    outcome = refit(opened.storage, opened.storage.find(source), probing(options), seed=options["seed"])
    report_outcome(outcome, model, dataset)


@click.command()
@stored_options
@click.option(
    "--method",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    show_default=True,
    help="Projection: two principal components (pca), or UMAP as well (umap; needs `pip install 'kdb-lm[umap]'`).",
)
@warehouse_option
def project(model: str, dataset: str, variant: str, method: str, warehouse: Path | str) -> None:
    """Project stored activations onto two axes at every layer, without the model.

    The points are stored in the table projections as a new run, which names the run that it was computed from.

    \b
    kdb project --model smollm2-135m --dataset cities
    """
    from kdb.ingest.concept.derived import project as project_run

    log_to_stderr()
    opened = kdb.open(warehouse)
    source = stored_run(opened.sql, model, dataset, variant)
    # Always PCA: queries read the newest run, which must have everything that an older one had.
    methods = tuple(dict.fromkeys(("pca", method)))
    report_outcome(project_run(opened.storage, opened.storage.find(source), methods), model, dataset)


def stored_run(sql: Callable[..., Any], model: str, dataset: str, variant: str, table: str = "activations") -> str:
    """Return the newest run of this model, dataset and variant that has rows in a table."""
    current = sql("SELECT model, dataset, variant, run FROM current_runs WHERE table_name = ?", [table]).rows()
    runs = {row[:3]: row[3] for row in current}
    hint = "`kdb runs` lists what is stored, `kdb ingest` measures more."
    if (model, dataset, variant) not in runs and table in _ABSENT:
        _check_rows(sql, table, model, dataset, variant)
    for kind, level, name in (("model", 0, model), ("dataset", 1, dataset), ("variant", 2, variant)):
        stored = {key[level] for key in runs if key[:level] == (model, dataset)[:level]}
        if name not in stored:
            raise UnknownNameError(f"stored {kind}", name, stored, hint)
    return str(runs[model, dataset, variant])


# Why a stored run may lack rows of a table: the table that shows that the run is stored, and what to say
_ABSENT = {
    "activations": (
        "probe_scores",
        "The vectors of {0} on {1}, variant {2}, are not stored: a reduced copy has none, and `kdb runs keep-vectors` "
        "deletes them. Remove the run, and measure it again with `kdb ingest`.",
    ),
    "layer_scores": (
        "prompts",
        "The run of {0} on {1}, variant {2}, has no scores. Either no prompt is kept (`kdb query kept-prompts`), "
        "or the dataset has texts with labels. Use a run with kept prompts.",
    ),
}


def _check_rows(sql: Callable[..., Any], table: str, model: str, dataset: str, variant: str) -> None:
    """Raise QueryError if the run is stored, and its rows of a table are not."""
    shown_by, message = _ABSENT[table]
    asked = f"FROM current_runs WHERE table_name = '{shown_by}' AND model = ? AND dataset = ? AND variant = ?"
    if not sql(asked, [model, dataset, variant]).is_empty():
        raise QueryError(message.format(model, dataset, variant))


@click.command()
@output_options
def models(format_: str | None, output: Path | None, view: View) -> None:
    """List the models that have a short name, with the source of their weights.

    Any hub id, folder or .gguf file works too. `kdb query models` describes the files of measured models.
    """
    import polars as pl

    from kdb.ingest.models.find import REGISTRY

    rows = [
        (m.name, m.size, m.family, "instruct" if m.instruct else "base", *_weights(m), m.hub_id)
        for m in REGISTRY.values()
    ]
    names = ["name", "size", "family", "trained", "weights", "from", "hub_id"]
    show(pl.DataFrame(rows, names, orient="row"), format_, output, view)


def _weights(model: Any) -> tuple[str, str]:
    """Return the file format of a model's weights, and their source."""
    if model.is_installed:
        return f"GGUF, quantized ({model.packaged})", f"package {model.package}"
    return "safetensors, as published", "the hub"


def log_to_stderr() -> None:
    """Print what kdb logs."""
    from kdb.ingest.log import ToStderr

    logging.basicConfig(level=logging.WARNING, handlers=[ToStderr()])
    logging.getLogger("kdb").setLevel(logging.INFO)
