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

from kdb.errors import UnknownNameError

SCHEMA_VERSION = 6
"""Increased when a table or column is added or changed. Run ids do not depend on it."""

OLDEST_SCHEMA = 3
"""Oldest schema version that is still read; columns that a run lacks are NULL."""

NEURON = ("component", "layer", "head", "expert", "neuron")
"""The columns that identify a neuron of a model: two experts of a layer have neurons of the same number."""

PARTITIONS = {
    "model": "name of the model, as listed by `kdb models` or given by --name",
    "dataset": "name of the dataset, as listed by `kdb datasets` or given by --dataset-name",
    "run": "run id: 16 hex digits derived from everything that determines the result",
}
"""Columns of every table that come from the path, in the order of the path. They are always text."""


class Vector(UserDefinedType[Any]):
    """A vector whose length is the model's hidden size."""

    cache_ok = True


class FloatList(UserDefinedType[Any]):
    """A list of float32 numbers, of which a run has few: not the hidden states."""

    cache_ok = True


class IntList(UserDefinedType[Any]):
    """A short list of whole numbers, such as token ids."""

    cache_ok = True


class TextList(UserDefinedType[Any]):
    """A short list of names."""

    cache_ok = True


metadata = MetaData()


def _column(
    name: str, type_: TypeEngine[Any], meaning: str, unit: str = "", symbol: str = "", since: int = OLDEST_SCHEMA
) -> Column[Any]:
    """Declare a column; ``since`` is the schema version that added it. In older runs it is NULL."""
    return Column(name, type_, comment=meaning, info={"unit": unit, "symbol": symbol, "since": since})


def _table(name: str, rows: str, *columns: Column[Any], key: tuple[str, ...] = ()) -> Table:
    """Declare a table whose comment describes one row; ``key`` names the columns that identify a row within a run."""
    return Table(name, metadata, *columns, comment=rows, info={"key": key})


def _prompt_id() -> Column[Any]:
    return _column("prompt_id", Integer(), "prompt, numbered from 0 in the dataset's order")


def _layer() -> Column[Any]:
    return _column("layer", SmallInteger(), "transformer block, numbered from 0", symbol="i, l")


def _site() -> Column[Any]:
    return _column(
        "site",
        Text(),
        "where the hidden state is read: resid_post (the block's output) or ffn_norm (the FFN's input; no rows for a "
        "block without an FFN)",
    )


def _component() -> Column[Any]:
    return _column("component", Text(), "attn or ffn")


def _head() -> Column[Any]:
    return _column("head", SmallInteger(), "attention head, numbered from 0; NULL for an FFN neuron", symbol="h")


def _neuron() -> Column[Any]:
    return _column(
        "neuron", Integer(), "FFN neuron, or dimension within the attention head, numbered from 0", symbol="k"
    )


def _expert(
    meaning: str = "expert to which the FFN neuron belongs, numbered from 0; NULL in a dense FFN",
) -> Column[Any]:
    return _column("expert", SmallInteger(), meaning, since=6)


def _expert_of_layer() -> Column[Any]:
    return _expert("expert of the layer's FFN, numbered from 0; shared experts follow those that the router chooses")


def _total_share() -> Column[Any]:
    return _column(
        "total_share",
        Double(),
        "least share, over the value neurons, of |total| in the sum of the absolute products of embedding and layers "
        "with their keys; near 0, these cancel and scores, which are divided by the total, are inflated",
        since=6,
    )


def _position() -> Column[Any]:
    return _column("position", SmallInteger(), "token position, numbered from 0", unit="tokens")


def _activates() -> Column[Any]:
    return _column("activates", Text(), "component of the value neurons that are activated: attn or ffn")


def _rank(of: str) -> Column[Any]:
    return _column("rank", Integer(), f"{of}, from 1")


models = _table(
    "models",
    "run",
    _column("family", Text(), "model family, such as llama or gemma"),
    _column("source", Text(), "source of the weights: hub id, or name of a file or folder"),
    _column(
        "revision",
        Text(),
        "commit on the hub, or sha256 of the files that determine the model: weights, config, tokenizer",
    ),
    _column("architecture", Text(), "model class of the transformers library"),
    _column(
        "architecture_kind",
        Text(),
        "dense; experts (some FFNs are mixtures of experts); hybrid (attention, and layers or parts of layers that mix "
        "tokens in another way, such as state-space models); state-space (no attention)",
        since=6,
    ),
    _column("n_layers", SmallInteger(), "blocks that a text runs through", symbol="d, L"),
    _column(
        "n_heads",
        SmallInteger(),
        "attention heads per layer; the most of any layer; NULL without attention",
        symbol="H",
    ),
    _column("n_kv_heads", SmallInteger(), "key and value heads per layer"),
    _column("head_dim", SmallInteger(), "entries of a query or key of one head"),
    _column(
        "value_head_dim",
        SmallInteger(),
        "entries of a value of one head; equal to head_dim in most models",
        since=6,
    ),
    _column("hidden_size", Integer(), "entries of the residual stream"),
    _column(
        "intermediate_size",
        Integer(),
        "FFN neurons per layer; in a mixture of experts, per expert; NULL without FFNs",
        symbol="N",
    ),
    _column("n_experts", SmallInteger(), "experts per layer that a router chooses from; NULL without", since=6),
    _column("experts_per_token", SmallInteger(), "experts that the router chooses for a token", since=6),
    _column("vocab_size", Integer(), "rows of the unembedding", symbol="B"),
    _column("n_tokens", Integer(), "tokens of the tokenizer; the unembedding may have more rows", since=6),
    _column("n_params", BigInteger(), "parameters, tied weights counted once"),
    _column("dtype", Text(), "number format of the weights in the forward pass"),
    _column(
        "quantization",
        Text(),
        "quantization of the weights, with each format's share of the parameters, such as 'Q4_1 81 %, F32 19 %'; "
        "NULL if they are not quantized",
    ),
    _column("weights_dtype", Text(), "number formats of the weights in the file, the most frequent first", since=4),
    _column("base_model", Text(), "model from which this one was made, if its files say so; otherwise NULL", since=4),
    _column(
        "instruct",
        Boolean(),
        "whether the model was trained to follow instructions, if its files say so; otherwise NULL",
        since=4,
    ),
)

experts = _table(
    "experts",
    "layer × expert, of a model with experts or with layers of different widths",
    _column("layer", SmallInteger(), "transformer block, numbered from 0", symbol="i, l", since=6),
    _expert("expert, numbered from 0; shared ones follow those that the router chooses; NULL if the layer is dense"),
    _column(
        "shared", Boolean(), "whether the expert is used at every token, rather than chosen by the router", since=6
    ),
    _column("n_neurons", Integer(), "number of the expert's FFN neurons, or of the dense layer's", since=6),
    key=("layer", "expert"),
)

datasets = _table(
    "datasets",
    "run",
    _column("study", Text(), "concept or knowledge"),
    _column("source", Text(), "source of the texts"),
    _column("fingerprint", Text(), "sha256 of texts, labels and groups"),
    _column("template", Text(), "prompt template; {text} stands for the text"),
    _column("n_prompts", Integer(), "number of prompts"),
    _column("n_positive", Integer(), "number of prompts with label 1"),
    _column(
        "first_label",
        SmallInteger(),
        "label of the prompts that the paper split puts first, as the published code does; NULL for knowledge",
        since=5,
    ),
)

runs = _table(
    "runs",
    "run",
    _column("study", Text(), "concept or knowledge"),
    _column("variant", Text(), "settings that differ from the default ones, such as 'bfloat16'; 'default' if none do"),
    _column("source_run", Text(), "run from which this run was computed; NULL for a measured run"),
    _column("tables", TextList(), "tables in which the run has rows"),
    _column("settings", Text(), "settings that determine the result, as JSON"),
    _column("seed", Integer(), "seed of the noise and of all splits except the paper's"),
    _column("noise", Text(), "noise put before the text of each prompt; NULL if there is none"),
    _column("kdb_version", Text(), "version of kdb"),
    _column("torch_version", Text(), "version of torch; NULL if no model ran"),
    _column("transformers_version", Text(), "version of transformers; NULL if no model ran"),
    _column("device", Text(), "device on which the model ran"),
    _column("started_at", DateTime(timezone=True), "time at which the run was started", unit="UTC"),
    _column("finished_at", DateTime(timezone=True), "time at which the run was committed", unit="UTC"),
    _column("seconds", Double(), "time spent measuring, without interruptions", unit="s"),
    _column(
        "imported_from", Text(), "warehouse from which the run was imported; NULL for a run measured here", since=4
    ),
    _column("imported_at", DateTime(timezone=True), "time at which the run was imported", unit="UTC", since=4),
    _column("preferred", Boolean(), "whether the imported run takes precedence over runs measured here", since=4),
)

checks = _table(
    "checks",
    "run × check",
    _column("check", Text(), "name of the check: a comparison with the unmodified model, or a count"),
    _column("value", Double(), "largest difference found, in the unit given in detail; or number of prompts"),
    _column("tolerance", Double(), "largest difference allowed; NULL for a count"),
    _column("passed", Boolean(), "whether value is at most tolerance; NULL for a count"),
    _column("detail", Text(), "how value was computed, and from which data"),
    key=("check",),
)

prompts = _table(
    "prompts",
    "prompt",
    _prompt_id(),
    _column("text", Text(), "text of the prompt, as given to the model"),
    _column("label", SmallInteger(), "1 for true, yes, positive, hateful or sarcastic; otherwise 0", symbol="y"),
    _column(
        "group_id",
        Text(),
        "group, such as the city, that a grouped split does not divide between training and test; NULL if none",
    ),
    _column("category", Text(), "kind of knowledge: language, color, number, capital, country or month"),
    _column("relation", Text(), "relation between subject and answer"),
    _column("subject", Text(), "subject of the prompt"),
    _column("answer", Text(), "correct continuation of the prompt"),
    _column(
        "answer_prefix", Text(), "text between prompt and answer; NULL in older runs, which have one space", since=6
    ),
    _column(
        "answer_token_ids",
        IntList(),
        "token ids of the answer as it follows prompt and prefix; the first one is the target",
        since=6,
    ),
    _column(
        "shares_first_token",
        Boolean(),
        "whether another answer of the category begins with the target, so that scores, which explain the first token "
        "only, do not tell them apart",
        since=6,
    ),
    _column("target_token_id", Integer(), "token id of the answer's first token, the target", symbol="w"),
    _column("target_token", Text(), "text of the target token"),
    _column("n_tokens", Integer(), "number of tokens of the prompt, including special tokens", unit="tokens"),
    _column(
        "target_prob",
        Double(),
        "the model's probability of the target; of the whole answer in runs with --answer-tokens all",
        symbol="p(w)",
    ),
    _column("target_rank", Integer(), "rank of the target among all tokens, from 1"),
    _column(
        "kept",
        Boolean(),
        "whether the prompt passes the filter: the target is among the ten most probable tokens, no other answer of "
        "its category begins with it, and it is more probable than they are; with --answer-tokens all, the whole "
        "answer is more probable than each of them",
    ),
    _column(
        "not_kept_because",
        Text(),
        "first condition of the filter that is not met: not_in_top_ten, shares_first_token or "
        "beaten_by_another_answer; NULL if kept",
        since=6,
    ),
    _column(
        "token_ids",
        IntList(),
        "token ids of the prompt, special tokens included; where the tokenizer makes the space before an answer, such "
        "as 1984, a token of its own, it is the last one, as is a prefix that is not white space",
        since=6,
    ),
    _column(
        "rival_token_id",
        Integer(),
        "token id of the rival: the dataset's, or the category's other answer with the largest logit; NULL without one",
        since=6,
    ),
    _column("rival_token", Text(), "text of the rival's token", since=6),
    _column("rival_logp", Double(), "the model's log-probability of the rival", unit="nat", since=6),
    _column("corrupt", Text(), "prompt of the dataset that patching compares this one with; NULL without", since=6),
    _column("corrupt_token_ids", IntList(), "token ids of the corrupt prompt", since=6),
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
    _column(
        "classifier",
        Text(),
        "logistic (scaled vectors, C chosen by validation), logistic-raw (the paper's objective at its optimum), "
        "logistic-paper (the published procedure), mean-difference, logistic-standardised or random-forest",
    ),
    _column("split", Text(), "paper, stratified-SEED or grouped; label-0-first in runs of kdb 0.2 and older"),
    _column(
        "converged",
        Boolean(),
        "whether the fit met its stopping rule; for logistic and logistic-raw, an error below 0.001 logit is proved",
    ),
    _column("n_iter", Integer(), "number of iterations of the fit"),
    _column("n_train", Integer(), "number of training prompts"),
    _column("n_test", Integer(), "number of test prompts"),
    _column("accuracy", Double(), "share of test prompts classified correctly", symbol="α_i"),
    _column("accuracy_low", Double(), "lower end of the 95 % Wilson interval of accuracy"),
    _column("accuracy_high", Double(), "upper end of the 95 % Wilson interval of accuracy"),
    _column("f1", Double(), "F1 score of label 1"),
    _column("auc", Double(), "area under the ROC curve of the decision function"),
    _column(
        "control_accuracy",
        Double(),
        "mean accuracy on the control task, one random label for each group (Hewitt and Liang 2019); NULL unless "
        "groups are on both sides of the split",
    ),
    _column("selectivity", Double(), "accuracy - control_accuracy"),
    _column(
        "is_default",
        Boolean(),
        "whether the row is of the default classifier and split, which `current` shows",
        since=4,
    ),
    _column("balanced_accuracy", Double(), "mean of the accuracies on the two labels", since=5),
    _column("f1_paper", Double(), "F1 score as published: of the label that the paper split puts second", since=5),
    _column("auc_low", Double(), "lower end of the 95 % interval of auc (DeLong)", since=5),
    _column("auc_high", Double(), "upper end of the 95 % interval of auc (DeLong)", since=5),
    _column("control_sd", Double(), "standard deviation of control_accuracy over its draws of labels", since=5),
    _column(
        "shuffled_accuracy",
        Double(),
        "accuracy of the classifier fitted to labels shuffled over prompts; in runs of kdb 0.2 and older only",
        since=5,
    ),
    _column("c", Double(), "inverse strength of the penalty on scaled vectors, C; NULL if it is not chosen", since=5),
    _column(
        "scale",
        Double(),
        "root mean square distance of the training vectors from their mean, by which they are divided; 0 if they are "
        "all equal, so that the majority is predicted; NULL if vectors are not scaled by it",
        since=5,
    ),
    _column("c_at_end", Boolean(), "whether c is the smallest or the largest of the grid", since=5),
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
    _column("predicted", SmallInteger(), "label that the classifier predicts from the hidden state", symbol="z"),
    _column("correct", Boolean(), "whether predicted is the prompt's label"),
    _column("is_default", Boolean(), "as in probe_scores", since=5),
    key=("prompt_id", "layer", "site", "classifier", "split"),
)

baselines = _table(
    "baselines",
    "baseline × split",
    _column(
        "baseline",
        Text(),
        "majority (the more frequent label of the training part), words (bag of words of the text) or token-count "
        "(number of tokens)",
    ),
    _column("split", Text(), "as in probe_scores"),
    _column("n_train", Integer(), "number of training prompts"),
    _column("n_test", Integer(), "number of test prompts"),
    _column("n_groups", Integer(), "number of groups among the test prompts; NULL without groups"),
    _column("accuracy", Double(), "share of test prompts classified correctly"),
    _column("accuracy_low", Double(), "lower end of the 95 % Wilson interval of accuracy"),
    _column("accuracy_high", Double(), "upper end of the 95 % Wilson interval of accuracy"),
    _column("balanced_accuracy", Double(), "mean of the accuracies on the two labels"),
    _column("auc", Double(), "area under the ROC curve of the decision function"),
    _column("auc_low", Double(), "lower end of the 95 % interval of auc (DeLong)"),
    _column("auc_high", Double(), "upper end of the 95 % interval of auc (DeLong)"),
    _column("below_chance_p", Double(), "p-value of so few correct predictions if they had nothing to do with labels"),
    _column("is_default", Boolean(), "whether the row is of the default split, which `current` shows", since=5),
    key=("baseline", "split"),
)

baseline_predictions = _table(
    "baseline_predictions",
    "test prompt × baseline × split",
    _prompt_id(),
    _column("baseline", Text(), "as in baselines"),
    _column("split", Text(), "as in probe_scores"),
    _column("predicted", SmallInteger(), "label that the baseline predicts"),
    _column("correct", Boolean(), "whether predicted is the prompt's label"),
    _column("is_default", Boolean(), "as in baselines", since=5),
    key=("prompt_id", "baseline", "split"),
)

probe_weights = _table(
    "probe_weights",
    "layer × site × classifier × split",
    _layer(),
    _site(),
    _column("classifier", Text(), "as in probe_scores; only linear classifiers have weights"),
    _column("split", Text(), "as in probe_scores"),
    _column(
        "weights",
        FloatList(),
        "weights in the coordinates of the stored hidden state: a prompt is classified as label 1 if the inner product "
        "with its state plus the intercept is above 0",
        symbol="w",
    ),
    _column("intercept", Double(), "constant added to the inner product", unit="logit", symbol="b"),
    _column("is_default", Boolean(), "as in probe_scores", since=5),
    key=("layer", "site", "classifier", "split"),
)

probe_transfer = _table(
    "probe_transfer",
    "source dataset × layer × site × classifier × split",
    _column("source_dataset", Text(), "dataset to which the probe was fitted; `dataset` is the one it is applied to"),
    _column("probe_run", Text(), "run that holds the probe's weights"),
    _layer(),
    _site(),
    _column("classifier", Text(), "as in probe_scores"),
    _column("split", Text(), "split to whose training part the probe was fitted"),
    _column("n", Integer(), "prompts that the probe is applied to; on its own dataset, those of the test part"),
    _column(
        "n_left_out",
        Integer(),
        "prompts left out because their text or group is in the probe's training part",
    ),
    _column("auc", Double(), "area under the ROC curve of the probe's decision values"),
    _column("auc_low", Double(), "lower end of the 95 % interval of auc (DeLong)"),
    _column("auc_high", Double(), "upper end of the 95 % interval of auc (DeLong)"),
    _column("accuracy", Double(), "share of prompts classified correctly with the probe's own intercept"),
    _column("accuracy_low", Double(), "lower end of the 95 % Wilson interval of accuracy"),
    _column("accuracy_high", Double(), "upper end of the 95 % Wilson interval of accuracy"),
    _column(
        "accuracy_refitted",
        Double(),
        "share classified correctly if the intercept predicts as many prompts of each label as there are",
    ),
    _column(
        "cosine",
        Double(),
        "cosine between the probe's weights and those of the same classifier fitted to this dataset; NULL if none",
    ),
    key=("source_dataset", "layer", "site", "classifier", "split"),
)

zero_shot = _table(
    "zero_shot",
    "prompt",
    _prompt_id(),
    _column("positive", Text(), "answer for label 1, such as yes"),
    _column("negative", Text(), "answer for label 0, such as no"),
    _column("prob_positive", Double(), "the model's probability that the next token begins the positive answer"),
    _column("prob_negative", Double(), "the model's probability that the next token begins the negative answer"),
    _column("predicted", SmallInteger(), "label of the more probable answer"),
    _column("correct", Boolean(), "whether predicted is the prompt's label"),
    key=("prompt_id",),
)

projections = _table(
    "projections",
    "prompt × layer × site × method",
    _prompt_id(),
    _layer(),
    _site(),
    _column("method", Text(), "pca or umap; for umap, pc1 and pc2 hold its two axes"),
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
    _column("component", Text(), "attn, ffn or mixer (a state-space layer and the like); a layer has what it adds"),
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

router = _table(
    "router",
    "prompt × layer × expert, for the experts that are chosen at the last position and the next four",
    _prompt_id(),
    _column("layer", SmallInteger(), "transformer block, numbered from 0", symbol="i, l", since=6),
    _expert_of_layer(),
    _column("chosen", Boolean(), "whether the router chooses the expert", since=6),
    _column("weight", Double(), "factor of the expert's output in the FFN's; 0 if it is not chosen", since=6),
    _column("probability", Double(), "the router's probability of the expert", since=6),
    _rank("rank among the layer's experts: those that are chosen first, then by probability"),
    key=("prompt_id", "layer", "expert"),
)

routing = _table(
    "routing",
    "prompt × layer, for layers with a router",
    _prompt_id(),
    _column("layer", SmallInteger(), "transformer block, numbered from 0", symbol="i, l", since=6),
    _column(
        "entropy",
        Double(),
        "entropy of the router's probabilities at the last position, divided by their sum: ln(number of experts) if "
        "all are equal, 0 if it is sure of one",
        unit="nat",
        since=6,
    ),
    key=("prompt_id", "layer"),
)

expert_scores = _table(
    "expert_scores",
    "prompt × layer × expert, for those that are used at the last position",
    _prompt_id(),
    _column("layer", SmallInteger(), "transformer block, numbered from 0", symbol="i, l", since=6),
    _expert_of_layer(),
    _column("score", Double(), "log-probability increase of the target by the expert's output", unit="nat", since=6),
    key=("prompt_id", "layer", "expert"),
)

neuron_scores = _table(
    "neuron_scores",
    "prompt × neuron, for the best neurons or all",
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
    _column(
        "exact",
        Boolean(),
        "whether score was computed over the whole vocabulary; otherwise it lies between lower and upper",
    ),
    _rank("rank among the prompt's neurons of this component"),
    _expert(),
    key=("prompt_id", *NEURON, "position"),
)

candidate_scores = _table(
    "candidate_scores",
    "prompt × candidate: a neuron that may be among the best of the prompt's category",
    _prompt_id(),
    _component(),
    _layer(),
    _head(),
    _neuron(),
    _column("score", Double(), "log-probability increase of the target, summed over positions", unit="nat"),
    _column("lower", Double(), "certified lower bound of score", unit="nat"),
    _column("upper", Double(), "certified upper bound of score", unit="nat"),
    _expert(),
    key=("prompt_id", *NEURON),
)

neuron_sums = _table(
    "neuron_sums",
    "category × neuron, for the neurons in neuron_scores and candidate_scores",
    _column("category", Text(), "kind of knowledge, as in prompts"),
    _component(),
    _layer(),
    _head(),
    _neuron(),
    _column("total", Double(), "sum of score over the category's kept prompts and all positions", unit="nat"),
    _column("n_prompts", Integer(), "number of kept prompts that total counts"),
    _column(
        "exact",
        Boolean(),
        "whether total is that of candidate_scores, over every kept prompt; otherwise it adds up neuron_scores, "
        "over the prompts that list the neuron (also if NULL, in runs of schema 5 and older)",
        since=6,
    ),
    _column(
        "rank",
        Integer(),
        "rank by total in the category and component, 1 to 50, with proof that no other neuron's is larger",
        since=6,
    ),
    _expert(),
    key=("category", *NEURON),
)

query_neuron_scores = _table(
    "query_neuron_scores",
    "prompt × FFN neuron",
    _prompt_id(),
    _activates(),
    _layer(),
    _neuron(),
    _column("score", Double(), "share of the value neurons' activation, weighted by their scores"),
    _rank("rank among the prompt's query neurons"),
    _total_share(),
    _expert(),
    key=("prompt_id", "activates", "layer", "expert", "neuron"),
)

query_layer_scores = _table(
    "query_layer_scores",
    "prompt × layer × component",
    _prompt_id(),
    _activates(),
    _column("layer", SmallInteger(), "transformer block, numbered from 0; NULL for embed", symbol="i, l"),
    _column("component", Text(), "embed, attn, ffn or mixer"),
    _column("score", Double(), "share of the value neurons' activation, weighted by their scores"),
    _total_share(),
    key=("prompt_id", "activates", "layer", "component"),
)

ablations = _table(
    "ablations",
    "prompt × set × positions × mode",
    _prompt_id(),
    _column("method", Text(), "name of the set: a label, control-N, or the attribution method that ranked its neurons"),
    _column("k", Integer(), "number of neurons, heads and experts in the set"),
    _column("positions", Text(), "token positions at which the set was replaced: last or all"),
    _column("rank_before", Integer(), "the target's rank in the unmodified model, from 1"),
    _column("rank_after", Integer(), "the target's rank with the set replaced, from 1"),
    _column("prob_before", Double(), "the target's probability in the unmodified model"),
    _column("prob_after", Double(), "the target's probability with the set replaced"),
    _column("logp_before", Double(), "the target's log-probability in the unmodified model", unit="nat"),
    _column("logp_after", Double(), "the target's log-probability with the set replaced", unit="nat"),
    _column(
        "mode",
        Text(),
        "by what the set was replaced: zero, mean (over the other kept prompts of the category) or resample (the next "
        "kept prompt of the category)",
        since=6,
    ),
    _column("control_of", Text(), "set of which this is a control, of the same layers and sizes; else NULL", since=6),
    _column(
        "control_ratio",
        Double(),
        "size of the set of which this is a control over the size of this, see ablated_parts; else NULL",
        since=6,
    ),
    _column(
        "held_out",
        Boolean(),
        "whether the set was chosen by a query that did not see this prompt; NULL if a method ranked this prompt's own "
        "neurons, and in older runs",
        since=6,
    ),
    key=("prompt_id", "method", "k", "positions", "mode"),
)

ablated_parts = _table(
    "ablated_parts",
    "set × neuron, head or expert",
    _column("prompt_id", Integer(), "prompt for which a method chose the set; NULL if it is the same in all", since=6),
    _column("method", Text(), "name of the set, as in ablations", since=6),
    _column("rank", Integer(), "rank by the method, from 1; number within a set that a query chose", since=6),
    _column("layer", SmallInteger(), "transformer block, numbered from 0", symbol="i, l", since=6),
    _column("component", Text(), "attn or ffn", since=6),
    _column("head", SmallInteger(), "attention head, numbered from 0; NULL for an FFN neuron", symbol="h", since=6),
    _column(
        "neuron",
        Integer(),
        "FFN neuron, or dimension within the attention head, numbered from 0; NULL for a whole head or expert",
        symbol="k",
        since=6,
    ),
    _column(
        "size",
        Double(),
        "|coefficient| × length of the neuron's column, or length of the output of the head or expert, at the last "
        "position: mean over the prompts measured; NULL for a method's neurons",
        since=6,
    ),
    _expert("expert, or that of the FFN neuron, numbered from 0; NULL in a dense FFN and in attention"),
    key=("prompt_id", "method", "rank"),
)

neuron_tokens = _table(
    "neuron_tokens",
    "neuron × end × rank",
    _component(),
    _layer(),
    _head(),
    _neuron(),
    _column("sign", Text(), "top or bottom end of the neuron's logits"),
    _rank("rank from that end"),
    _column("token", Text(), "text of the token"),
    _column("token_id", Integer(), "id of the token", since=6),
    _column("logit", Double(), "the neuron's logit of that token", unit="logit"),
    _expert(),
    key=(*NEURON, "sign", "rank"),
)

effects = _table(
    "effects",
    "prompt × component × role × replacement × method",
    _prompt_id(),
    _column(
        "component",
        Text(),
        "what is replaced: head, attn (a whole attention layer), ffn (a whole FFN layer), "
        "ffn_neuron, or resid (the residual stream after the block)",
        since=6,
    ),
    _column("layer", SmallInteger(), "transformer block, numbered from 0", symbol="i, l", since=6),
    _column("head", SmallInteger(), "attention head, numbered from 0; NULL for other components", since=6),
    _column("neuron", Integer(), "FFN neuron, numbered from 0; NULL for other components", since=6),
    _column(
        "role",
        Text(),
        "where it is replaced: last (the last token), subject (the last token of the subject) or all (every token)",
        since=6,
    ),
    _column(
        "replacement",
        Text(),
        "by what: zero; mean (over the other kept prompts of the category); resample (the "
        "next kept prompt of the category); pair (a prompt with another answer)",
        since=6,
    ),
    _column(
        "method",
        Text(),
        "exact (the model is run with the replacement), atp (attribution patching: gradient "
        "times difference) or relp (the same with the rules of layer-wise relevance propagation)",
        since=6,
    ),
    _column(
        "direction",
        Text(),
        "noising (this prompt, with a part replaced) or denoising (the pair's prompt, with a part of this one)",
        since=6,
    ),
    _column(
        "logp",
        Double(),
        "change of the target's log-probability, with the replacement minus without",
        unit="nat",
        since=6,
    ),
    _column(
        "logit_diff",
        Double(),
        "change of the target's logit minus the rival's; NULL without a rival",
        unit="logit",
        since=6,
    ),
    _column(
        "kl",
        Double(),
        "KL divergence of the output with the replacement from that without; NULL unless exact",
        unit="nat",
        since=6,
    ),
    _expert(),
    key=("prompt_id", *NEURON, "role", "replacement", "method", "direction"),
)

lens_readouts = _table(
    "lens_readouts",
    "prompt × layer × place × position × lens",
    _prompt_id(),
    _column("layer", SmallInteger(), "transformer block, numbered from 0", symbol="i, l", since=6),
    _column(
        "place",
        Text(),
        "resid_pre (before the block, of layer 0 only), resid_mid (between attention and FFN) or "
        "resid_post (after the block)",
        since=6,
    ),
    _column("position", SmallInteger(), "token position, numbered from 0", unit="tokens", since=6),
    _column("token", Text(), "text of the prompt's token at this position", since=6),
    _column(
        "lens", Text(), "logit (final norm and unembedding) or tuned (after an affine map fitted to the layer)", since=6
    ),
    _column("target_rank", Integer(), "rank of the target among all tokens, from 1; NULL if nothing is asked", since=6),
    _column("target_logp", Double(), "log-probability of the target", unit="nat", since=6),
    _column("rival_rank", Integer(), "rank of the rival, from 1; NULL without a rival", since=6),
    _column("rival_logp", Double(), "log-probability of the rival; NULL without one", unit="nat", since=6),
    _column("entropy", Double(), "entropy of the distribution over tokens", unit="nat", since=6),
    _column(
        "kl",
        Double(),
        "KL divergence of this distribution from the model's output at the same position",
        unit="nat",
        since=6,
    ),
    _column("tokens", TextList(), "texts of the five most probable tokens, the best first", since=6),
    _column("logps", FloatList(), "log-probabilities of these tokens", unit="nat", since=6),
    key=("prompt_id", "layer", "place", "position", "lens"),
)

lens_fits = _table(
    "lens_fits",
    "layer × place, of a tuned lens",
    _column("layer", SmallInteger(), "transformer block, numbered from 0", symbol="i, l", since=6),
    _column("place", Text(), "resid_pre (before the block, of layer 0 only) or resid_post (after the block)", since=6),
    _column("n_tokens", Integer(), "tokens of held-out text on which both lenses are compared", unit="tokens", since=6),
    _column("n_passages", Integer(), "passages of held-out text that these tokens are from", since=6),
    _column(
        "kl_logit",
        Double(),
        "KL divergence of the logit lens from the model's output, mean over these tokens",
        unit="nat",
        since=6,
    ),
    _column("kl_tuned", Double(), "the same of the tuned lens", unit="nat", since=6),
    _column(
        "gain_low",
        Double(),
        "lower end of the 95 % interval, over passages, of kl_logit − kl_tuned; NULL below five passages",
        unit="nat",
        since=6,
    ),
    _column("gain_high", Double(), "upper end of this interval", unit="nat", since=6),
    _column("kept", Boolean(), "whether the tuned lens is not worse, so that its readouts are stored", since=6),
    key=("layer", "place"),
)

TABLES: dict[str, Table] = dict(metadata.tables)

_NAMES_OF_OLDER = {
    "classifier": "CASE WHEN {older} AND classifier = 'logistic' THEN 'logistic-raw' ELSE classifier END",
    "split": "CASE WHEN {older} AND split = 'paper' AND dataset NOT IN ('stsa', 'imdb') THEN 'label-0-first' "
    "ELSE split END",
    "is_default": "COALESCE(is_default, classifier = 'logistic' AND split = 'paper')",
}

OLDER_ROWS: dict[str, dict[str, str]] = {
    "probe_scores": {name: sql.format(older="f1_paper IS NULL") for name, sql in _NAMES_OF_OLDER.items()}
    | {
        "control_accuracy": "CASE WHEN f1_paper IS NULL THEN NULL ELSE control_accuracy END",
        "selectivity": "CASE WHEN f1_paper IS NULL THEN NULL ELSE selectivity END",
        "shuffled_accuracy": "COALESCE(shuffled_accuracy, CASE WHEN f1_paper IS NULL THEN control_accuracy END)",
    },
    "probe_predictions": {name: sql.format(older="is_default IS NULL") for name, sql in _NAMES_OF_OLDER.items()},
    "ablations": {"mode": "COALESCE(mode, 'zero')"},
}
"""SQL, for DuckDB and Polars, of columns in rows of older schemas, in which names had another meaning, or none.

Rows that were read like this once, and those of today, stay as they are.
"""

_TYPES: dict[type[TypeEngine[Any]], tuple[pa.DataType, str]] = {
    BigInteger: (pa.int64(), "BIGINT"),
    Boolean: (pa.bool_(), "BOOLEAN"),
    DateTime: (pa.timestamp("us", tz="UTC"), "TIMESTAMPTZ"),
    Double: (pa.float64(), "DOUBLE"),
    IntList: (pa.list_(pa.int32()), "INTEGER[]"),
    FloatList: (pa.list_(pa.float32()), "FLOAT[]"),
    Integer: (pa.int32(), "INTEGER"),
    SmallInteger: (pa.int16(), "SMALLINT"),
    Text: (pa.string(), "VARCHAR"),
    TextList: (pa.list_(pa.string()), "VARCHAR[]"),
    Vector: (pa.list_(pa.float32()), "FLOAT[]"),
}
"""The Arrow type and the DuckDB name of each column type."""


def has_vectors(table: str) -> bool:
    """Whether a table has a column of vectors, which makes it by far the largest."""
    return any(isinstance(column.type, Vector) for column in TABLES[table].columns)


def arrow_schema(table: str, *, vector_size: int | None = None, float16: bool = False) -> pa.Schema:
    """Return the Arrow schema of a table's Parquet files, which do not contain the partition columns.

    ``vector_size`` is the model's hidden size, ``float16`` the half-width storage of vectors.
    """
    vector = pa.list_(pa.float16() if float16 else pa.float32(), -1 if vector_size is None else vector_size)
    return pa.schema(
        pa.field(column.name, vector if isinstance(column.type, Vector) else _TYPES[type(column.type)][0])
        for column in TABLES[table].columns
    )


def column_names(table: str, version: int = SCHEMA_VERSION) -> list[str]:
    """Return the columns of a table's files in a run of this schema version, without those from the path."""
    return [column.name for column in TABLES[table].columns if column.info["since"] <= version]


def sql_type(column: Column[Any]) -> str:
    """Return a column's type as DuckDB names it."""
    return _TYPES[type(column.type)][1]


def data_dictionary() -> str:
    """Return the data dictionary as Markdown; ``kdb schema`` prints it, and it is stored in ``docs/schema.md``."""
    lines = ["# The warehouse's tables", "", "Every table also has these columns, from its path:", ""]
    lines += [f"- `{name}` (VARCHAR): {meaning}" for name, meaning in PARTITIONS.items()]
    for table in TABLES.values():
        lines += ["", f"## {table.name}", "", f"One row per {table.comment}.", "", *columns_of(table)]
    return "\n".join(lines) + "\n"


def find_table(name: str) -> Table:
    """Return a table by its name. Raises UnknownNameError."""
    if name not in TABLES:
        raise UnknownNameError("table", name, TABLES, f"The tables are {', '.join(TABLES)}.")
    return TABLES[name]


def columns_of(table: Table) -> list[str]:
    """Return a table's columns, without those from the path, as the lines of a Markdown table."""
    lines = ["| column | type | unit | meaning | symbol |", "| --- | --- | --- | --- | --- |"]
    for column in table.columns:
        info = column.info
        cells = (f"`{column.name}`", sql_type(column), info["unit"], column.comment, info["symbol"])
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines
