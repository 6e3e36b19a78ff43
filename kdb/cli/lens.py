"""The command `kdb lens`: what each layer of a model would say, for the prompts of a stored run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import kdb
from kdb.cli.options import say, warehouse_option
from kdb.cli.settings import knowledge_run_options
from kdb.ingest.settings import Reading
from kdb.numbers import shown
from kdb.queries import domains

if TYPE_CHECKING:
    from kdb.ingest.models.find import LoadedModel
    from kdb.warehouse.store import Warehouse

_STUDY = "SELECT study FROM runs WHERE run = ?"


@click.command()
@knowledge_run_options
@click.option(
    "--lens",
    "kind",
    type=click.Choice(domains.LENSES),
    default=Reading.lens,
    show_default=True,
    help="Read states as they are (logit), or through an affine map that is fitted to each layer first (tuned).",
)
@click.option(
    "--positions",
    type=click.Choice(domains.POSITIONS),
    help="Token positions to read.  [default: all; last for texts with labels]",
)
@click.option(
    "--corpus",
    type=click.Path(path_type=Path),
    help="With --lens tuned: UTF-8 text file to train on, of which 8 MB are read.  [default: one that comes with kdb]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    help=f"With --lens tuned: seed of the training.  [default: {Reading.seed}]",
)
@click.option("--device", help="Device: cpu, cuda, cuda:1, ….  [default: cuda if available, else cpu]")
@warehouse_option
def lens(
    model: str,
    model_name: str | None,
    revision: str | None,
    dataset: str,
    variant: str,
    kind: str,
    positions: str | None,
    corpus: Path | None,
    seed: int | None,
    device: str | None,
    warehouse: Path | str,
) -> None:
    """Read every layer of a model as if it were the last one, in the prompts of a stored run.

    Prompts that pass the filter are read at every token. Of texts with labels, the stored vectors are read, which are
    those of the last token; the model is not run on them. `kdb query lens-story` and `answer-by-layer`, and the figure
    lens-map, show the readouts.

    A tuned lens is trained on plain text for some minutes. `kdb query lens-fits` compares it with the logit lens on
    text that was held out; layers at which it is worse are left out.

    \b
    kdb lens --model smollm2-135m --dataset knowledge
    kdb lens --model smollm2-135m --dataset knowledge --lens tuned --positions last
    kdb lens --model smollm2-135m --dataset world-cities
    kdb plot lens-map --model smollm2-135m --dataset knowledge --prompt 0 -o lens.html
    """
    from kdb.cli.measure import log_to_stderr, stored_run
    from kdb.cli.outcome import report_outcome
    from kdb.ingest.attribution.intervention import source_options
    from kdb.ingest.corpus import read_corpus
    from kdb.ingest.lens import read_lens
    from kdb.ingest.models import load as loading
    from kdb.ingest.models.find import find_model

    if kind != "tuned" and (corpus is not None or seed is not None):
        raise click.UsageError(f"{'--corpus' if corpus is not None else '--seed'} needs --lens tuned.")
    text = read_corpus(corpus) if kind == "tuned" else None
    log_to_stderr()
    opened = kdb.open(warehouse)
    source = find_model(model, name=model_name, revision=revision)
    run = opened.storage.find(stored_run(opened.sql, source.name, dataset, variant, "prompts"))
    study = opened.sql(_STUDY, [run.run]).item()

    def load() -> LoadedModel:
        return loading.load_model(source, device=loading.pick_device(device), **source_options(run))

    at = positions or ("all" if study == "knowledge" else "last")
    wanted = Reading(kind, at, Reading.seed if seed is None else seed)
    outcome = read_lens(opened.storage, run, wanted, source, load, loading.load_tokenizer(source), text)
    report_outcome(outcome, source.name, dataset)
    if text is not None:
        say(f"  {_closeness(opened, outcome.run, text.name)}")


def _closeness(opened: Warehouse, run: str, corpus: str) -> str:
    """Say how much closer a tuned lens is to the model's output than the logit lens, on held-out text."""
    fits = opened.query("lens-fits", run=run)
    means = fits.mean().to_dicts()[0]
    return (
        f"On held-out text of {corpus}, the tuned lens is kept at {fits['kept'].sum()} of {len(fits)} layers. "
        f"Its mean KL from the model's output is {shown('kl', means['kl_tuned'])} nat, that of the logit lens "
        f"{shown('kl', means['kl_logit'])}. `kdb query lens-fits` has both by layer."
    )
