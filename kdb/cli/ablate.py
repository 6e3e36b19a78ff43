"""The command `kdb ablate`: replace a set of neurons, heads or experts that a SQL query chooses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import kdb
from kdb.cli.measure import log_to_stderr, stored_run
from kdb.cli.options import say, warehouse_option
from kdb.cli.outcome import report_outcome
from kdb.cli.settings import knowledge_run_options
from kdb.errors import QueryError
from kdb.ingest.settings import Ablating, settings_from
from kdb.queries.domains import MODES

if TYPE_CHECKING:
    from kdb.ingest.models.find import LoadedModel
    from kdb.warehouse.store import Warehouse

_MOST_NAMES = 10
"""Names of parts that are printed of a set."""


@click.command()
@knowledge_run_options
@click.option(
    "--query", "query_", required=True, help="SQL query that returns layer, component, head, expert and neuron."
)
@click.option("--label", default="custom", show_default=True, help="Name under which the effect is stored.")
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default=Ablating.mode,
    show_default=True,
    help="Replace by zero, by the mean over the category's other kept prompts, or by the value in the next of them.",
)
@click.option(
    "--positions",
    type=click.Choice(["last", "all"]),
    default=Ablating.positions,
    show_default=True,
    help="Replace at the last token only, or at all tokens.",
)
@click.option(
    "--controls",
    "n_controls",
    type=click.IntRange(0),
    default=Ablating.n_controls,
    show_default=True,
    help="Number of control sets: other neurons, heads or experts of the same layers, the nearest in |coefficient| × "
    "norm.",
)
@click.option(
    "--held-out/--no-held-out",
    default=Ablating.held_out,
    show_default=True,
    help="Let the query see one half of the kept prompts of each category, and measure the other half.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=Ablating.seed,
    show_default=True,
    help="Seed of the control sets and of the halves.",
)
@click.option("--device", help="Device: cpu, cuda, cuda:1, ….  [default: cuda if available, else cpu]")
@warehouse_option
def ablate(
    model: str,
    model_name: str | None,
    revision: str | None,
    dataset: str,
    variant: str,
    query_: str,
    label: str,
    device: str | None,
    warehouse: Path | str,
    **options: Any,
) -> None:
    """Replace a set of neurons, heads or experts in prompts that pass the filter, and store the effect and controls.

    The SQL query returns the columns layer, component (attn or ffn), head and neuron, and for a model with experts also
    expert. If neuron is NULL, the whole head or expert is replaced. The effect is stored as a new run of the variant
    'ablate=LABEL'; `kdb query attribution-methods` shows it with its controls.

    By default, the query sees the run without one half of its kept prompts, and the effect is measured in that half.
    With --no-held-out, it sees the whole warehouse, and all kept prompts are measured.

    \b
    kdb ablate --model smollm2-135m --label best-heads --query "
        SELECT layer, 'attn' AS component, head, NULL AS neuron FROM current.head_scores
        WHERE model = 'smollm2-135m' AND dataset = 'knowledge' GROUP BY ALL ORDER BY avg(score) DESC LIMIT 5"
    """
    from kdb.ingest.attribution import intervention
    from kdb.ingest.models import load as loading
    from kdb.ingest.models.find import find_model

    log_to_stderr()
    opened, wanted = kdb.open(warehouse), settings_from(Ablating, options)
    source = find_model(model, name=model_name, revision=revision)
    run = opened.storage.find(stored_run(opened.sql, source.name, dataset, variant, "layer_scores"))
    rows, measured = _chosen(opened, run, query_, wanted)

    def load() -> LoadedModel:
        return loading.load_model(source, device=loading.pick_device(device), **intervention.source_options(run))

    asked = intervention.Asked(label, rows, wanted, measured)
    tokenizer = loading.load_tokenizer(source)
    outcome = intervention.ablate(opened.storage, run, asked, source, load, tokenizer)
    report_outcome(outcome, source.name, dataset)
    say(f"  Replaced: {_names(opened, outcome.run, label)}")
    for note in intervention.notes(opened.storage, outcome.run):
        say(f"Note: {note}", err=True)


def _names(opened: Warehouse, run: str, label: str) -> str:
    """Return the names of the parts of a stored set, or of its first ones."""
    from kdb.warehouse.schema import NEURON

    neuron = ", ".join(NEURON)
    named = (
        f"SELECT DISTINCT ON ({neuron}) coalesce(neuron_name({neuron}), head_name(layer, head), "
        "expert_name(layer, expert)) AS name "
        f'FROM ablated_parts WHERE run = ? AND "method" = ? ORDER BY {neuron}'
    )
    names = opened.sql(named, [run, label])["name"].to_list()
    return ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" if names[_MOST_NAMES:] else "")


def _chosen(opened: Any, run: Any, query: str, wanted: Ablating) -> tuple[list[dict[str, Any]], list[int] | None]:
    """Return the rows of the query, and the kept prompts that it did not see; None if it saw all."""
    from kdb.ingest.attribution.intervention import halves
    from kdb.warehouse.halves import without_prompts

    if not wanted.held_out:
        return opened.sql(query).rows(named=True), None
    _seen, measured = halves(opened.storage, run, wanted.seed)
    with without_prompts(opened.storage, run, measured) as half:
        rows = half.sql(query).rows(named=True)
    if not rows and opened.sql(query).rows():
        raise QueryError(
            f"The query returned no rows: with --held-out it sees run {run.run} without the prompts to be measured, "
            "and runs computed from it. Give --no-held-out to query the whole warehouse."
        )
    return rows, measured
