"""Commands that use stored probes: on other datasets, on new texts, and outside of kdb."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

import kdb
from kdb.cli.completion import stored
from kdb.cli.options import check_output, say, show, table_options, warehouse_option
from kdb.cli.settings import POSITIVE, variant_option
from kdb.errors import QueryError
from kdb.queries.domains import CLASSIFIERS, DEFAULT_CLASSIFIER, SITES
from kdb.tables import View

_STORED = """
SELECT dataset FROM current_runs WHERE table_name = 'activations' AND model = ? AND variant = ? ORDER BY dataset
"""

_SITES = click.Choice(SITES)

_SHOWN = 20
"""Maximum number of texts without labels whose scores the terminal shows."""


@click.command()
@click.option(
    "--model",
    required=True,
    shell_complete=stored("model"),
    help="Name of a stored model; with --to, its hub id, folder or .gguf file works too.",
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    shell_complete=stored("dataset"),
    help="Name of a stored dataset; repeatable. Defaults to all of the model. With --to, the one that the probes were "
    "fitted to.",
)
@variant_option
@click.option(
    "--to",
    "file",
    type=click.Path(path_type=Path),
    help="File of new texts to score (.csv, .tsv, .json, .jsonl, .parquet): column text, and label if known.",
)
@click.option("--classifier", type=click.Choice(CLASSIFIERS), help="With --to: kind of the probe.  [default: logistic]")
@click.option("--split", help="With --to: split of the probe.  [default: the one that `current` shows]")
@click.option("--layer", type=click.IntRange(0), help="With --to: layer, numbered from 0.  [default: all]")
@click.option(
    "--site",
    type=_SITES,
    help="With --to: where the hidden state is read.  [default: both]",
)
@click.option("--group-by", help="With --to: column of groups, which share a subject. Intervals respect them.")
@click.option("--positive", metavar="CLASS", help=f"With --to: {POSITIVE[0].lower()}{POSITIVE[1:]}")
@click.option("--name", help="With --to: name under which the model is stored; defaults to its own name.")
@click.option("--device", help="With --to: device, such as cpu or cuda:1.  [default: cuda if available, else cpu]")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --to: file for the scores of each text by layer and site (.csv, .json, .parquet).",
)
@warehouse_option
@table_options
def transfer(
    model: str,
    datasets: tuple[str, ...],
    variant: str,
    warehouse: Path | str,
    file: Path | None,
    view: View,
    **options: Any,
) -> None:
    """Apply the probes of each dataset to the hidden states of each one, without the model.

    The scores are stored in the table probe_transfer, one run for each dataset. `kdb query probe-transfer` shows them.

    With --to, the model runs on new texts, in the template of the dataset that the probes were fitted to. If the texts
    have labels, the terminal shows AUC and accuracy by layer, at the better site; else the scores at the best layer.
    -o writes the scores of each text. Nothing is stored.

    \b
    kdb transfer --model smollm2-135m
    kdb transfer --model smollm2-135m --dataset world-cities --dataset cities
    kdb transfer --model smollm2-135m --dataset world-cities --to new.csv -o scores.csv
    """
    from kdb.cli.measure import log_to_stderr

    log_to_stderr()
    if file is not None:
        if len(datasets) != 1:
            raise click.UsageError("--to applies the probes of one dataset. Give exactly one --dataset with it.")
        _score(file, model, datasets[0], variant, warehouse, view, **options)
        return
    given = [f"--{option.replace('_', '-')}" for option, value in options.items() if value is not None]
    given += ["the options of tables"] if view != View() else []
    if given:
        raise click.UsageError(f"{', '.join(given)}: only with --to, which names a file of new texts.")
    _transfer_stored(model, datasets, variant, warehouse)


def _transfer_stored(model: str, datasets: tuple[str, ...], variant: str, warehouse: Path | str) -> None:
    from kdb.cli.measure import stored_run
    from kdb.cli.outcome import report_outcome
    from kdb.ingest.concept.transfer import transfer as transfer_probes

    opened = kdb.open(warehouse)
    chosen = dict.fromkeys(datasets or (row[0] for row in opened.sql(_STORED, [model, variant]).rows()))
    if not chosen:
        raise QueryError(
            f"No stored hidden states of model {model!r}, variant {variant!r}. `kdb runs` lists what is stored, "
            "`kdb ingest` measures more."
        )
    vectors = {name: opened.storage.find(stored_run(opened.sql, model, name, variant)) for name in chosen}
    probes = {
        name: opened.storage.find(stored_run(opened.sql, model, name, variant, "probe_weights")) for name in chosen
    }
    for target in chosen:
        outcome = transfer_probes(opened.storage, probed=list(probes.values()), measured=vectors[target])
        report_outcome(outcome, model, target)


def _score(
    file: Path,
    model: str,
    dataset: str,
    variant: str,
    warehouse: Path | str,
    view: View,
    *,
    name: str | None,
    group_by: str | None,
    positive: str | None,
    device: str | None,
    output: Path | None,
    classifier: str | None,
    **chosen: Any,
) -> None:
    """Score the texts of a file, print the scores by layer or of the first texts, and write all of them."""
    from kdb.ingest.datasets.userfile import load_texts
    from kdb.ingest.models.find import find_model
    from kdb.warehouse.probes import find_probes

    if output is not None:
        check_output(output, (".csv", ".json", ".parquet"))
    examples, opened = load_texts(file, group_by, positive), kdb.open(warehouse)
    revision = re.search(r"\brevision=(\S+)", variant)
    source = find_model(model, name=name, revision=revision and revision[1])
    chosen |= {"classifier": classifier or DEFAULT_CLASSIFIER, "variant": variant}
    probes = find_probes(opened, model=source.name, dataset=dataset, **chosen)

    from kdb.ingest.concept.new_texts import score_texts

    scores = score_texts(opened.storage, probes, examples, source, name=file.name, device=device)
    if output is not None:
        show(scores.texts, None, output)
    _print(scores, output, view)


def _print(scores: Any, output: Path | None, view: View) -> None:
    """Print the scores by layer if the texts have labels, else those of the first texts at the best layer."""
    import polars as pl

    layers, texts = scores.layers, scores.texts
    best = layers.sort("source_accuracy", "layer", "site", descending=[True, False, True]).row(0, named=True)
    where = {"layer": best["layer"], "site": best["site"]}
    n = texts["text_id"].n_unique()
    if "auc" in layers.columns:
        show(layers.filter(site=where["site"]), None, None, view)
    else:
        columns = ("text_id", "text", "in_training", "layer", "site", "decision", "probability", "predicted")
        best_texts = texts.filter(pl.col("layer") == where["layer"], site=where["site"])
        show(best_texts.select(columns).head(_SHOWN), None, None, view)
    say(f"{n} texts. The probe's own test part is read best at layer {where['layer']}, {where['site']}.", err=True)
    if output is None:
        say("-o FILE writes the scores of each text at every layer.", err=True)


@click.command()
@click.option("--model", required=True, help="Name of a stored model.", shell_complete=stored("model"))
@click.option("--dataset", required=True, help="Name of a stored dataset.", shell_complete=stored("dataset"))
@click.option("--layer", type=click.IntRange(0), required=True, help="Layer, numbered from 0.")
@click.option("--site", type=_SITES, default="resid_post", show_default=True, help="Where the hidden state is read.")
@click.option(
    "--classifier",
    type=click.Choice(CLASSIFIERS),
    default=DEFAULT_CLASSIFIER,
    show_default=True,
    help="Kind of the probe.",
)
@click.option("--split", help="Split on whose training part the probe was fitted; defaults to the run's default split.")
@variant_option
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File, .npz.")
@warehouse_option
def direction(output: Path, warehouse: Path | str, **chosen: Any) -> None:
    """Export the direction of a stored probe as an .npz file: weights, intercept, and what they belong to.

    \b
    kdb direction --model smollm2-135m --dataset world-cities --layer 15 -o truth.npz
    """
    if output.suffix != ".npz":
        raise QueryError(f"-o {output}: a direction is written as .npz. Name a file that ends in .npz.")
    found = kdb.open(warehouse).direction(**chosen)
    found.save(output)
    click.echo(f"{output}: {len(found.weights)} weights of {found.classifier}, split {found.split}, run {found.run}")
