"""Every table and column of the warehouse, declared once.

Arrow schemas, DuckDB views, the empty typed files that keep the views valid, ``kdb schema`` and
``docs/schema.md`` all derive from these SQLAlchemy tables. A column's meaning is its ``comment``; its unit and
the papers' symbol, where it has one, are in ``info``.

Print it: ``kdb schema``.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
)
from sqlalchemy.types import TypeEngine, UserDefinedType

SCHEMA_VERSION = 4
"""Raised when a table or column is added or changed. No part of a run's id: a new column measures nothing anew."""

OLDEST_SCHEMA = 3
"""Runs written since this version are read as they are: what they lack is NULL."""

DEFAULT_PROBE = {"classifier": "logistic", "split": "paper"}
"""The probe whose rows have is_default, and which schema `current` shows; rows without is_default are told by it."""

PARTITIONS = {
    "model": "model, as named in the registry or by --name",
    "dataset": "dataset, as listed by `kdb datasets` or by --dataset-name",
    "run": "run id: 16 hex digits derived from everything that determines the result",
}
"""Columns of every table that come from the path, in the path's order. Always text."""


class Vector(UserDefinedType[Any]):
    """A vector of one length within a run: the model's hidden size."""

    cache_ok = True


class TextList(UserDefinedType[Any]):
    """A short list of names."""

    cache_ok = True


metadata = MetaData()


def _column(
    name: str, type_: TypeEngine[Any], meaning: str, unit: str = "", symbol: str = "", since: int = OLDEST_SCHEMA
) -> Column[Any]:
    """A column; ``since`` is the schema version that brought it, before which it is NULL."""
    return Column(name, type_, comment=meaning, info={"unit": unit, "symbol": symbol, "since": since})


def _table(name: str, rows: str, *columns: Column[Any], key: tuple[str, ...] = ()) -> Table:
    """A table whose comment says what one row is; ``key`` names the columns that tell a run's rows apart."""
    return Table(name, metadata, *columns, comment=rows, info={"key": key})


def _prompt_id() -> Column[Any]:
    return _column("prompt_id", Integer(), "prompt, numbered from 0 in the dataset's order")


def _layer() -> Column[Any]:
    return _column("layer", SmallInteger(), "transformer block, numbered from 0", symbol="i, l")


def _site() -> Column[Any]:
    return _column(
        "site",
        Text(),
        "where the hidden state is read: resid_post (the block's output) or ffn_norm (what enters the FFN)",
    )


def _component() -> Column[Any]:
    return _column("component", Text(), "attn or ffn")


def _head() -> Column[Any]:
    return _column("head", SmallInteger(), "attention head, numbered from 0; NULL for an FFN neuron", symbol="h")


def _neuron() -> Column[Any]:
    return _column(
        "neuron", Integer(), "FFN neuron, or dimension within the attention head, numbered from 0", symbol="k"
    )


def _position() -> Column[Any]:
    return _column("position", SmallInteger(), "token position, numbered from 0", unit="tokens")


def _activates() -> Column[Any]:
    return _column("activates", Text(), "which value neurons are activated: attn or ffn")


def _rank(of: str) -> Column[Any]:
    return _column("rank", Integer(), f"{of}, from 1")


models = _table(
    "models",
    "run",
    _column("family", Text(), "model family, such as llama or gemma"),
    _column("source", Text(), "hub id, or file or folder name, that the weights came from"),
    _column(
        "revision",
        Text(),
        "commit on the hub, or sha256 of the files that determine the model: weights, config, tokenizer",
    ),
    _column("architecture", Text(), "transformers' class"),
    _column("n_layers", SmallInteger(), "transformer blocks", symbol="d, L"),
    _column("n_heads", SmallInteger(), "attention heads per layer", symbol="H"),
    _column("n_kv_heads", SmallInteger(), "key and value heads per layer"),
    _column("head_dim", SmallInteger(), "entries of one head"),
    _column("hidden_size", Integer(), "entries of the residual stream"),
    _column("intermediate_size", Integer(), "FFN neurons per layer", symbol="N"),
    _column("vocab_size", Integer(), "rows of the unembedding", symbol="B"),
    _column("n_params", BigInteger(), "parameters, tied weights counted once"),
    _column("dtype", Text(), "number format of the weights in the forward pass"),
    _column(
        "quantization",
        Text(),
        "how the weights are quantized, with each format's share of the parameters, such as 'Q4_1 81 %, F32 19 %'; "
        "NULL when they are not",
    ),
    _column("weights_dtype", Text(), "number formats of the weights in the file, the most frequent first", since=4),
    _column("base_model", Text(), "model that this one was made from, where its files say so", since=4),
    _column("instruct", Boolean(), "trained to follow instructions, where its files say so; else NULL", since=4),
)

datasets = _table(
    "datasets",
    "run",
    _column("study", Text(), "concept or knowledge"),
    _column("source", Text(), "where the texts came from"),
    _column("fingerprint", Text(), "sha256 of texts, labels and groups"),
    _column("template", Text(), "prompt template; {text} stands for the text"),
    _column("n_prompts", Integer(), "prompts"),
    _column("n_positive", Integer(), "prompts with label 1"),
)

runs = _table(
    "runs",
    "run",
    _column("study", Text(), "concept or knowledge"),
    _column("variant", Text(), "what sets the run apart from the plain one; 'default' when nothing does"),
    _column("source_run", Text(), "run that a derived run was computed from; NULL for a measured one"),
    _column("tables", TextList(), "tables that the run has rows in"),
    _column("settings", Text(), "what determined the result, as JSON"),
    _column("seed", Integer(), "seed of noise and of further splits"),
    _column("noise", Text(), "text put before each prompt's text, or NULL"),
    _column("kdb_version", Text(), "version of kdb"),
    _column("torch_version", Text(), "version of torch, NULL where no model ran"),
    _column("transformers_version", Text(), "version of transformers, NULL where no model ran"),
    _column("device", Text(), "device that the model ran on"),
    _column("started_at", DateTime(timezone=True), "when the run was begun", unit="UTC"),
    _column("finished_at", DateTime(timezone=True), "when the run was committed", unit="UTC"),
    _column("seconds", Double(), "time spent measuring, interruptions left out", unit="s"),
    _column("imported_from", Text(), "warehouse that the run was copied from; NULL for a run measured here", since=4),
    _column("imported_at", DateTime(timezone=True), "when the run was copied from there", unit="UTC", since=4),
    _column("preferred", Boolean(), "imported to take precedence over runs measured here", since=4),
)

checks = _table(
    "checks",
    "run × check",
    _column("check", Text(), "what was compared with the untouched model, or counted"),
    _column("value", Double(), "largest difference found, in the unit that detail names; or how many prompts"),
    _column("tolerance", Double(), "largest difference allowed; NULL for a count"),
    _column("passed", Boolean(), "value is at most tolerance; NULL for a count"),
    _column("detail", Text(), "how value was computed, and over what"),
    key=("check",),
)

prompts = _table(
    "prompts",
    "prompt",
    _prompt_id(),
    _column("text", Text(), "the prompt as the model read it"),
    _column("label", SmallInteger(), "1 for true, yes, positive, hateful or sarcastic; else 0", symbol="y"),
    _column("group_id", Text(), "what a grouped split keeps on one side, such as the city; NULL if none"),
    _column("category", Text(), "kind of knowledge: language, color, number, capital, country or month"),
    _column("relation", Text(), "relation between subject and answer"),
    _column("subject", Text(), "what the prompt is about"),
    _column("answer", Text(), "the right continuation"),
    _column("target_token_id", Integer(), "first token that the answer adds", symbol="w"),
    _column("target_token", Text(), "that token's text"),
    _column("n_tokens", Integer(), "tokens of the prompt, special ones included", unit="tokens"),
    _column("target_prob", Double(), "the model's probability of the target", symbol="p(w)"),
    _column("target_rank", Integer(), "the target's place among all tokens, from 1"),
    _column("kept", Boolean(), "the target is among the ten best and ahead of its category's other answers"),
    key=("prompt_id",),
)

activations = _table(
    "activations",
    "prompt × layer × site",
    _prompt_id(),
    _layer(),
    _site(),
    _column("vector", Vector(), "hidden state of the last token", symbol="h"),
    key=("prompt_id", "layer", "site"),
)

probe_scores = _table(
    "probe_scores",
    "layer × site × classifier × split",
    _layer(),
    _column("depth", Double(), "layer / n_layers", symbol="i/d"),
    _site(),
    _column("classifier", Text(), "logistic, logistic-paper, logistic-standardised or random-forest"),
    _column("split", Text(), "paper, stratified-SEED or grouped"),
    _column("converged", Boolean(), "the fit met its stopping rule; logistic: proved to 0.001 logit"),
    _column("n_iter", Integer(), "iterations of the fit"),
    _column("n_train", Integer(), "prompts fitted on"),
    _column("n_test", Integer(), "prompts scored"),
    _column("accuracy", Double(), "share of test prompts classified right", symbol="α_i"),
    _column("accuracy_low", Double(), "lower end of the 95 % Wilson interval of accuracy"),
    _column("accuracy_high", Double(), "upper end of the 95 % Wilson interval of accuracy"),
    _column("f1", Double(), "F1 score of label 1"),
    _column("auc", Double(), "area under the ROC curve of the decision function"),
    _column("control_accuracy", Double(), "accuracy of the same classifier where it is fitted to shuffled labels"),
    _column("selectivity", Double(), "accuracy - control_accuracy"),
    _column("is_default", Boolean(), "the default classifier on the default split: what `current` shows", since=4),
    key=("layer", "site", "classifier", "split"),
)

probe_predictions = _table(
    "probe_predictions",
    "test prompt × layer × site × classifier × split",
    _prompt_id(),
    _layer(),
    _site(),
    _column("classifier", Text(), "as in probe_scores"),
    _column("split", Text(), "as in probe_scores"),
    _column("predicted", SmallInteger(), "label that the classifier reads off the hidden state", symbol="z"),
    _column("correct", Boolean(), "predicted is the prompt's label"),
    key=("prompt_id", "layer", "site", "classifier", "split"),
)

zero_shot = _table(
    "zero_shot",
    "prompt",
    _prompt_id(),
    _column("positive", Text(), "answer that says label 1, such as yes"),
    _column("negative", Text(), "answer that says label 0, such as no"),
    _column("prob_positive", Double(), "the model's probability that its next token begins that answer"),
    _column("prob_negative", Double(), "the same for the other answer"),
    _column("predicted", SmallInteger(), "label of the likelier answer"),
    _column("correct", Boolean(), "predicted is the prompt's label"),
    key=("prompt_id",),
)

projections = _table(
    "projections",
    "prompt × layer × site × method",
    _prompt_id(),
    _layer(),
    _site(),
    _column("method", Text(), "pca, or umap, whose two axes then stand in pc1 and pc2"),
    _column("pc1", Double(), "first principal component"),
    _column("pc2", Double(), "second principal component"),
    _column("explained1", Double(), "share of the layer's variance along pc1; NULL for umap"),
    _column("explained2", Double(), "share of the layer's variance along pc2; NULL for umap"),
    key=("prompt_id", "layer", "site", "method"),
)

layer_scores = _table(
    "layer_scores",
    "prompt × layer × component",
    _prompt_id(),
    _layer(),
    _component(),
    _column("score", Double(), "log-probability increase of the target", unit="nat"),
    key=("prompt_id", "layer", "component"),
)

head_scores = _table(
    "head_scores",
    "prompt × layer × head",
    _prompt_id(),
    _layer(),
    _head(),
    _column("score", Double(), "log-probability increase of the target", unit="nat"),
    key=("prompt_id", "layer", "head"),
)

head_position_scores = _table(
    "head_position_scores",
    "prompt × layer × head × position, for the best heads",
    _prompt_id(),
    _layer(),
    _head(),
    _position(),
    _column("token", Text(), "token at that position"),
    _column("attention", Double(), "attention weight from the last token"),
    _column("score", Double(), "log-probability increase of the target", unit="nat"),
    key=("prompt_id", "layer", "head", "position"),
)

neuron_scores = _table(
    "neuron_scores",
    "prompt × neuron, the best ones or all",
    _prompt_id(),
    _component(),
    _layer(),
    _head(),
    _neuron(),
    _position(),
    _column("coefficient", Double(), "the neuron's activation", symbol="m"),
    _column("score", Double(), "log-probability increase of the target", unit="nat"),
    _column("lower", Double(), "certified lower bound of score", unit="nat"),
    _column("upper", Double(), "certified upper bound of score", unit="nat"),
    _column("exact", Boolean(), "score was computed over the whole vocabulary, not bounded"),
    _rank("place among the prompt's neurons of this component"),
    key=("prompt_id", "component", "layer", "head", "neuron", "position"),
)

neuron_sums = _table(
    "neuron_sums",
    "category × neuron, of those in neuron_scores",
    _column("category", Text(), "kind of knowledge, as in prompts"),
    _component(),
    _layer(),
    _head(),
    _neuron(),
    _column("total", Double(), "sum of score over the category's kept prompts, and over positions", unit="nat"),
    _column("n_prompts", Integer(), "kept prompts that have the neuron"),
    key=("category", "component", "layer", "head", "neuron"),
)

query_neuron_scores = _table(
    "query_neuron_scores",
    "prompt × FFN neuron",
    _prompt_id(),
    _activates(),
    _layer(),
    _neuron(),
    _column("score", Double(), "share of the value neurons' activation, weighted by their scores"),
    _rank("place among the prompt's query neurons"),
    key=("prompt_id", "activates", "layer", "neuron"),
)

query_layer_scores = _table(
    "query_layer_scores",
    "prompt × layer × component",
    _prompt_id(),
    _activates(),
    _column("layer", SmallInteger(), "transformer block, numbered from 0; NULL for embed", symbol="i, l"),
    _column("component", Text(), "embed, attn or ffn"),
    _column("score", Double(), "share of the value neurons' activation, weighted by their scores"),
    key=("prompt_id", "activates", "layer", "component"),
)

ablations = _table(
    "ablations",
    "prompt × method × k",
    _prompt_id(),
    _column("method", Text(), "how the zeroed neurons were ranked"),
    _column("k", Integer(), "neurons zeroed"),
    _column("positions", Text(), "where they were zeroed: last or all"),
    _column("rank_before", Integer(), "the target's rank in the untouched model, from 1"),
    _column("rank_after", Integer(), "the target's rank after zeroing, from 1"),
    _column("prob_before", Double(), "the target's probability in the untouched model"),
    _column("prob_after", Double(), "the target's probability after zeroing"),
    _column("logp_before", Double(), "the target's log-probability in the untouched model", unit="nat"),
    _column("logp_after", Double(), "the target's log-probability after zeroing", unit="nat"),
    key=("prompt_id", "method", "k", "positions"),
)

neuron_tokens = _table(
    "neuron_tokens",
    "neuron × end × rank",
    _component(),
    _layer(),
    _head(),
    _neuron(),
    _column("sign", Text(), "top or bottom end of the neuron's logits"),
    _rank("place from that end"),
    _column("token", Text(), "token"),
    _column("logit", Double(), "the neuron's logit of that token", unit="logit"),
    key=("component", "layer", "head", "neuron", "sign", "rank"),
)

TABLES: dict[str, Table] = dict(metadata.tables)

_TYPES: dict[type[TypeEngine[Any]], tuple[pa.DataType, str]] = {
    BigInteger: (pa.int64(), "BIGINT"),
    Boolean: (pa.bool_(), "BOOLEAN"),
    DateTime: (pa.timestamp("us", tz="UTC"), "TIMESTAMPTZ"),
    Double: (pa.float64(), "DOUBLE"),
    Integer: (pa.int32(), "INTEGER"),
    SmallInteger: (pa.int16(), "SMALLINT"),
    Text: (pa.string(), "VARCHAR"),
    TextList: (pa.list_(pa.string()), "VARCHAR[]"),
    Vector: (pa.list_(pa.float32()), "FLOAT[]"),
}
"""Each column type's Arrow type, and the name that DuckDB gives it."""


def has_vectors(table: str) -> bool:
    """Whether a table's rows hold vectors, which make it the largest by far."""
    return any(isinstance(column.type, Vector) for column in TABLES[table].columns)


def arrow_schema(table: str, *, vector_size: int | None = None, float16: bool = False) -> pa.Schema:
    """The Arrow schema of a table's Parquet files; partition columns are not in them.

    ``vector_size`` is the model's hidden size, ``float16`` the half-width storage of vectors.
    """
    vector = pa.list_(pa.float16() if float16 else pa.float32(), -1 if vector_size is None else vector_size)
    return pa.schema(
        pa.field(column.name, vector if isinstance(column.type, Vector) else _TYPES[type(column.type)][0])
        for column in TABLES[table].columns
    )


def column_names(table: str, version: int = SCHEMA_VERSION) -> list[str]:
    """The columns that a table's files have in a run of this schema version; those from its path are left out."""
    return [column.name for column in TABLES[table].columns if column.info["since"] <= version]


def sql_type(column: Column[Any]) -> str:
    """A column's type as DuckDB names it."""
    return _TYPES[type(column.type)][1]


def data_dictionary() -> str:
    """The data dictionary as Markdown: what ``kdb schema`` prints and ``docs/schema.md`` holds."""
    lines = ["# The warehouse's tables", "", "Every table also has these columns, from its path:", ""]
    lines += [f"- `{name}` (VARCHAR): {meaning}" for name, meaning in PARTITIONS.items()]
    for table in TABLES.values():
        lines += ["", f"## {table.name}", "", f"One row per {table.comment}.", "", *columns_of(table)]
    return "\n".join(lines) + "\n"


def columns_of(table: Table) -> list[str]:
    """A table's columns as the lines of a Markdown table; those from its path are left out."""
    lines = ["| column | type | unit | meaning | symbol |", "| --- | --- | --- | --- | --- |"]
    for column in table.columns:
        info = column.info
        cells = (f"`{column.name}`", sql_type(column), info["unit"], column.comment, info["symbol"])
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines
