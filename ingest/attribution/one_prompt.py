"""Attribute one answer to the parts of a model, without a warehouse: the stages of the study on a single prompt.

    found = attribute(load_model(find_model("smollm2-135m")), "The capital of France is", "Paris")
    found.heads     # a Polars frame

Nothing is stored, and nothing is filtered: a run keeps only prompts whose answer the model knows, and here the rank of
the answer is part of the result.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa

from kdb.errors import DatasetError
from kdb.ingest.attribution import study
from kdb.ingest.attribution.patch import ESTIMATED, Some, known
from kdb.ingest.attribution.patch import rows as effect_rows
from kdb.ingest.attribution.targets import Target
from kdb.ingest.call import check_option
from kdb.ingest.datasets import Dataset, Example
from kdb.ingest.job import Job
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.guard import model_errors
from kdb.ingest.prompts import Prompt, check_length, targets_of
from kdb.ingest.rows import Rows
from kdb.ingest.settings import Attributing, Measuring, Patching, Probing
from kdb.ingest.stages import Shard
from kdb.text import in_line
from kdb.warehouse.schema import NEURON, arrow_schema

_OF_PARTS = ("head_scores", "head_position_scores", "neuron_scores", "expert_scores", "router")
"""Tables that a model without heads, neurons or experts has no rows of."""

_SHOWN = 5
"""Number of heads and neurons that a notebook shows."""


@dataclass(frozen=True, eq=False)
class PromptAttribution:
    """The parts of a model that raise the log-probability of an answer after one prompt. Scores are in nats.

    ``target`` is the answer's first token, which is explained; ``logp`` and ``rank`` are its log-probability and its
    rank among all tokens, from 1. ``layers``, ``heads`` and ``neurons`` have the direct contributions of attention and
    FFN layers, of all heads, and of the best neurons with the tokens that they promote; the largest come first.
    ``experts`` has those of the experts that are used, with their routing weights; it has no rows for a dense model.
    ``lens`` has what the model would say after each part of each block, ``effects`` what the answer loses or gains when
    a head or layer is replaced; the largest effects come first. docs/schema.md explains the columns.
    """

    model: str
    prompt: str
    answer: str
    target: str
    logp: float
    rank: int
    layers: pl.DataFrame = field(repr=False)
    heads: pl.DataFrame = field(repr=False)
    neurons: pl.DataFrame = field(repr=False)
    experts: pl.DataFrame = field(repr=False)
    lens: pl.DataFrame = field(repr=False)
    effects: pl.DataFrame = field(repr=False)

    @property
    def prob(self) -> float:
        """The probability of the target."""
        return math.exp(self.logp)

    def _repr_html_(self) -> str:
        """Return the answer's probability and the best heads and neurons, for a notebook."""
        said = f"<b>{_code(self.target)}</b> has probability {self.prob:.3g} and rank {self.rank}"
        heads = [
            (f"a{row['layer']}.{row['head']}", f"{row['score']:+.3f}", _code(row["reads"] or ""))
            for row in self.heads.head(_SHOWN).to_dicts()
        ]
        experts = [
            (
                f"f{row['layer']}.{row['expert']}",
                f"{row['score']:+.3f}",
                "" if row["weight"] is None else f"{row['weight']:.3f}",
            )
            for row in self.experts.head(_SHOWN).to_dicts()
        ]
        neurons = [
            (_name(row), f"{row['score']:+.3f}", " ".join(map(_code, row["promotes"][:_SHOWN])))
            for row in self.neurons.head(_SHOWN).to_dicts()
        ]
        return (
            f"<p>{html.escape(in_line(self.model))}: {_code(self.prompt)} → {said}</p>"
            + _table(("head", "score", "reads"), heads)
            + _table(("expert", "score", "weight"), experts)
            + _table(("neuron", "score", "promotes"), neurons)
        )


def attribute(
    loaded: LoadedModel,
    prompt: str,
    answer: str,
    *,
    rival: str | None = None,
    corrupt: str | None = None,
    exact: bool = False,
    top_k: int = 100,
) -> PromptAttribution:
    """Score layers, heads and neurons for one prompt, read it through the logit lens, and find effects.

    Raises DatasetError for a prompt or answer that cannot be used, ModelError if the model cannot be taken apart.
    """
    check_option("top_k", top_k)
    _check_texts(prompt=prompt, answer=answer, rival=rival, corrupt=corrupt)
    job = _job(loaded, Example(prompt, category="", answer=answer, rival=rival, corrupt=corrupt), top_k)
    with model_errors(f"{loaded.source.name} cannot read the prompt"):
        [target] = targets_of(job, loaded.tokenizer)
    _check(job, loaded, target, rival)
    subject = study.PosedFacts(job, (Prompt(0, target.token_ids, target),)).bind(loaded, None)
    every = Shard("prompt", [0])
    _collected(study.checked(subject, every, _unseen))
    tables = _collected([*study.kept(subject, every, _unseen), *study.attributed(subject, every, _unseen)])
    empty = {name: pl.from_arrow(arrow_schema(name).empty_table()) for name in _OF_PARTS if name not in tables}
    tables |= {name: frame for name, frame in empty.items() if isinstance(frame, pl.DataFrame)}
    [row] = tables["prompts"].to_dicts()
    some = Some((known(row),), [0], [(_wanted(target, exact), None)])
    tables |= _collected(effect_rows(subject.patched, Shard("prompt", some), _unseen))
    neurons = tables["neuron_scores"].select(NEURON).unique(maintain_order=True).to_arrow()
    named = arrow_schema("neuron_tokens").empty_table() if not len(neurons) else None
    tokens = (
        study.tokens(subject, Shard("prompt", neurons), _unseen) if named is None else [Rows("neuron_tokens", [named])]
    )
    tables |= _collected(tokens)
    return _result(job, row, tables)


def _check_texts(**texts: Any) -> None:
    """Raise DatasetError for a text that is blank or is no text; rival and corrupt prompt may be None."""
    for name, text in texts.items():
        optional = text is None and name in ("rival", "corrupt")
        if not optional and not (isinstance(text, str) and text.strip()):
            raise DatasetError(f"{name} is {text!r}: expected a text.")


def _job(loaded: LoadedModel, example: Example, top_k: int) -> Job:
    dataset = Dataset("prompt", "one prompt", "{text}", (example,), study="knowledge")
    measuring = Measuring(dtype=loaded.dtype, quantize=loaded.quantization)
    attributing = Attributing(top_k=top_k, ablate_k=0, effects=False)
    return Job(loaded.source, dataset, measuring, Probing(), attributing=attributing)


def _check(job: Job, loaded: LoadedModel, target: Target, rival: str | None) -> None:
    """Raise DatasetError for a prompt of the wrong length, and for a rival or corrupt prompt that does not fit."""
    check_length(job, [target.token_ids], loaded.model.config)
    if target.is_shared:
        raise DatasetError(f"The rival {rival!r} begins with the same token as the answer. Use another rival.")
    if target.corrupt is not None and len(target.corrupt) != len(target.token_ids):
        raise DatasetError(
            f"The corrupt prompt has {len(target.corrupt)} tokens, and the prompt {len(target.token_ids)}. Use a "
            "corrupt prompt with as many tokens."
        )


def _wanted(target: Target, exact: bool) -> Patching:
    """Return the settings of the effects. A single prompt has no mean of others: it has its pair, or zero."""
    replacement = "zero" if target.corrupt is None else "pair"
    methods = (*ESTIMATED.methods, *(("exact",) if exact else ()))
    return Patching(components=ESTIMATED.components, replacements=(replacement,), methods=methods)


def _unseen(_n: int) -> None:
    """Take the progress of a stage, which a single prompt does not show."""


def _collected(measured: Iterable[Rows]) -> dict[str, pl.DataFrame]:
    """Return the rows of each table, which a run would store. Working tables of a run are left out."""
    tables = {rows.table: rows.groups for rows in measured if not rows.table.startswith("_")}
    frames = {name: pl.from_arrow(pa.concat_tables(groups)) for name, groups in tables.items()}
    return {name: frame for name, frame in frames.items() if isinstance(frame, pl.DataFrame)}


def _result(job: Job, row: Mapping[str, Any], tables: Mapping[str, pl.DataFrame]) -> PromptAttribution:
    [example] = job.dataset.examples
    tables = {name: frame.drop("prompt_id", strict=False) for name, frame in tables.items()}
    lens = tables["lens_readouts"].drop("position", "token", "lens")
    return PromptAttribution(
        model=job.source.name,
        prompt=example.text,
        answer=example.answer or "",
        target=row["target_token"],
        logp=lens["target_logp"][-1],  # the last readout is the model's own output
        rank=row["target_rank"],
        layers=tables["layer_scores"].sort("score", descending=True),
        heads=_heads(tables),
        neurons=_neurons(tables),
        experts=_experts(tables),
        lens=lens,
        effects=tables["effects"].drop("neuron", "role", "direction").sort(pl.col("logp").abs(), descending=True),
    )


def _heads(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Return all heads, and of the best ones also the token that they read most."""
    reads = tables["head_position_scores"].group_by("layer", "head").agg(reads=pl.col("token").sort_by("score").last())
    return tables["head_scores"].join(reads, on=["layer", "head"], how="left").sort("score", descending=True)


def _experts(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Return the experts that are used, with their routing weights; those of shared ones are NULL."""
    weights = tables["router"].filter("chosen").select("layer", "expert", "weight")
    return tables["expert_scores"].join(weights, on=["layer", "expert"], how="left").sort("score", descending=True)


def _neurons(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Return the best neurons, with the tokens that they make more and less probable in this prompt.

    A neuron with a negative coefficient promotes the tokens at the bottom of its logits.
    """
    rises = pl.col("coefficient") >= 0
    ends = tables["neuron_tokens"].sort("rank").group_by(*NEURON, "sign").agg("token")
    named = tables["neuron_scores"]
    for sign in ("top", "bottom"):
        own = ends.filter(sign=sign).select(*NEURON, pl.col("token").alias(sign))
        named = named.join(own, on=NEURON, how="left", nulls_equal=True)
    promotes = pl.when(rises).then("top").otherwise("bottom").alias("promotes")
    suppresses = pl.when(rises).then("bottom").otherwise("top").alias("suppresses")
    named = named.with_columns(promotes, suppresses).drop("top", "bottom").sort("score", descending=True)
    return named if named["expert"].count() else named.drop("expert")


def _name(row: Mapping[str, Any]) -> str:
    layer = f"f{row['layer']}" if row["component"] == "ffn" else f"a{row['layer']}"
    within = row["head"] if row.get("expert") is None else row["expert"]
    return f"{layer}_{row['neuron']}" if within is None else f"{layer}.{within}_{row['neuron']}"


def _code(text: str) -> str:
    """Return a token or a prompt as HTML, with its spaces."""
    return f"<code>{html.escape(in_line(text)).replace(' ', '&nbsp;')}</code>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table of cells that are HTML already; nothing without rows."""
    rows = list(rows)
    if not rows:
        return ""
    cells = [[f"<th>{one}</th>" for one in head], *([f"<td>{one}</td>" for one in row] for row in rows)]
    lines = [f"<tr>{''.join(line)}</tr>" for line in cells]
    return f"<table>{''.join(lines)}</table>"
