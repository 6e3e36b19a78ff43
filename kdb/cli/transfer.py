"""Commands that use stored probes: on other datasets, and outside of kdb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import kdb
from kdb.cli.options import warehouse_option
from kdb.errors import QueryError
from kdb.queries.domains import CLASSIFIERS

_STORED = """
SELECT dataset FROM current_runs WHERE table_name = 'activations' AND model = ? AND variant = ? ORDER BY dataset
"""


@click.command()
@click.option("--model", required=True, help="Name of a stored model.")
@click.option(
    "--dataset", "datasets", multiple=True, help="Name of a stored dataset; repeatable. Defaults to all of the model."
)
@click.option("--variant", default="default", show_default=True, help="Variant of the runs (`kdb runs`).")
@warehouse_option
def transfer(model: str, datasets: tuple[str, ...], variant: str, warehouse: Path | str) -> None:
    """Apply the probes of each dataset to the hidden states of each one, without the model.

    The scores are stored in the table probe_transfer, one run for each dataset. `kdb query probe-transfer` shows them.

    \b
    kdb transfer --model smollm2-135m
    kdb transfer --model smollm2-135m --dataset world-cities --dataset cities
    """
    from kdb.cli.measure import log_to_stderr, report_outcome, stored_run
    from kdb.ingest.concept.transfer import transfer as transfer_probes

    log_to_stderr()
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


@click.command()
@click.option("--model", required=True, help="Name of a stored model.")
@click.option("--dataset", required=True, help="Name of a stored dataset.")
@click.option("--layer", type=click.IntRange(0), required=True, help="Layer, numbered from 0.")
@click.option(
    "--site",
    type=click.Choice(["resid_post", "ffn_norm"]),
    default="resid_post",
    show_default=True,
    help="Where the hidden state is read.",
)
@click.option(
    "--classifier", type=click.Choice(CLASSIFIERS), default="logistic", show_default=True, help="Kind of the probe."
)
@click.option("--split", help="Split on whose training part the probe was fitted; defaults to the run's default split.")
@click.option("--variant", default="default", show_default=True, help="Variant of the run (`kdb runs`).")
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
