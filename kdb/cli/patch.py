"""The command `kdb patch`: causal effects of parts of a model in the prompts of a stored run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import kdb
from kdb.cli.measure import log_to_stderr, stored_run
from kdb.cli.options import warehouse_option
from kdb.cli.outcome import report_outcome
from kdb.cli.settings import knowledge_run_options
from kdb.ingest.settings import Patching
from kdb.queries import domains

if TYPE_CHECKING:
    from kdb.ingest.models.find import LoadedModel

_CHOICES = {
    "components": (
        "--component",
        domains.PARTS,
        "Kind of part to replace: a head, an attention or FFN layer, an FFN neuron, or the residual stream after a "
        "block; repeatable.",
    ),
    "replacements": (
        "--replacement",
        domains.REPLACEMENTS,
        "By zero, the mean over the category's other kept prompts, the value in the next of them, or the value in a "
        "prompt of the same relation and length with another answer; repeatable.",
    ),
    "methods": (
        "--method",
        domains.EFFECT_METHODS,
        "Run the model with each replacement (exact), or estimate all by one gradient (atp) or by relevance "
        "propagation (relp); repeatable.",
    ),
    "roles": (
        "--role",
        domains.ROLES,
        "Where to replace: at the last token, at the last token of the subject, or at every token; repeatable.",
    ),
    "directions": (
        "--direction",
        domains.DIRECTIONS,
        "Replace in the prompt (noising), or put the prompt's value into its pair (denoising); repeatable.",
    ),
}


def _choices(command: Any) -> Any:
    for name, (option, values, text) in reversed(_CHOICES.items()):
        command = click.option(
            option,
            name,
            type=click.Choice(values),
            multiple=True,
            default=getattr(Patching, name),
            show_default=True,
            help=text,
        )(command)
    return command


@click.command()
@knowledge_run_options
@_choices
@click.option(
    "--only",
    multiple=True,
    help="Part to replace, such as a5.2 (head), a5, f5 (layers), f5_123 (FFN neuron), f5.3_123 (that of an expert) or "
    "r5 (residual stream); repeatable.  [default: all]",
)
@click.option("--device", help="Device: cpu, cuda, cuda:1, ….  [default: cuda if available, else cpu]")
@warehouse_option
def patch(
    model: str,
    model_name: str | None,
    revision: str | None,
    dataset: str,
    variant: str,
    only: tuple[str, ...],
    device: str | None,
    warehouse: Path | str,
    **choices: tuple[str, ...],
) -> None:
    """Replace parts of the model, one at a time, in every prompt that passes the filter, and store the effect.

    An effect is the change of the answer's log-probability, and of its logit minus the rival's, with the replacement
    minus without. `kdb query head-effects` and `layer-effects` show them, `score-vs-effect` compares them with the
    scores of the attribution study.

    \b
    kdb patch --model smollm2-135m --component head --replacement mean
    kdb patch --model smollm2-135m --component attn --component ffn --method exact --method relp
    kdb patch --model smollm2-135m --component head --only a20.3 --replacement zero --role all
    """
    from kdb.ingest.attribution.intervention import source_options
    from kdb.ingest.attribution.patch import patch as patch_run
    from kdb.ingest.models import load as loading
    from kdb.ingest.models.find import find_model

    log_to_stderr()
    opened = kdb.open(warehouse)
    source = find_model(model, name=model_name, revision=revision)
    run = opened.storage.find(stored_run(opened.sql, source.name, dataset, variant, "layer_scores"))

    def load() -> LoadedModel:
        return loading.load_model(source, device=loading.pick_device(device), **source_options(run))

    wanted = Patching(**{name: tuple(dict.fromkeys(values)) for name, values in choices.items()})
    tokenizer = loading.load_tokenizer(source)
    outcome = patch_run(opened.storage, run, wanted, source, load, only=only, tokenizer=tokenizer)
    report_outcome(outcome, source.name, dataset)
