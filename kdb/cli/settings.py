"""Options of the commands that measure."""

from __future__ import annotations

from pathlib import Path

import click

from kdb.cli.completion import measurable, stored
from kdb.cli.options import Command
from kdb.ingest.settings import (
    ALWAYS_FITTED,
    ANSWER_TOKENS,
    DTYPES,
    LEAST,
    QUANTIZATIONS,
    STORED_DTYPES,
    Attributing,
    Measuring,
    Probing,
)
from kdb.queries.domains import CLASSIFIERS, LARGEST

POSITIVE = "Class that is label 1, if the labels of your own file are names of classes, such as animal."
"""Help of ``--positive``."""


def dataset_options(command: Command) -> Command:
    """Options that choose the prompts."""
    for option in reversed(
        (
            click.option(
                "--dataset",
                "datasets_",
                multiple=True,
                shell_complete=measurable("dataset"),
                help="Name of a dataset, or your own .csv, .tsv, .json, .jsonl or .parquet file; repeatable.  "
                "[default: all built-in ones]",
            ),
            click.option(
                "--dataset-name",
                help="Name under which a dataset from a file is stored; defaults to the file name without its ending.",
            ),
            click.option(
                "--data-dir",
                type=click.Path(path_type=Path),
                envvar="KDB_DATA_DIR",
                help="Folder with the papers' original files; defaults to $KDB_DATA_DIR, then to the cache folder.",
            ),
            click.option("--positive", metavar="CLASS", help=POSITIVE),
            click.option("--template", help="Prompt template, such as 'Is it true? {text}'."),
            click.option("--ask", help="Question that follows each text of your own file, such as 'Is it true?'."),
            click.option("--answers", help="Answers to the question, first that of label 0, such as no,yes."),
            click.option("--limit", type=int, help="Use only the first N texts of each class."),
            click.option(
                "--group-by",
                help="Column of groups for a grouped split: a group is not divided between training and test.",
            ),
            click.option("--noise", is_flag=True, help="Put aaa or bbb, chosen by --seed, before each text."),
        )
    ):
        command = option(command)
    return command


def probe_options(command: Command) -> Command:
    """Options of the probes."""
    for option in reversed(
        (
            click.option(
                "--classifier",
                "classifiers",
                multiple=True,
                type=click.Choice(CLASSIFIERS),
                help=f"Additional classifier to fit; {', '.join(ALWAYS_FITTED)} are always fitted. Repeatable.",
            ),
            click.option(
                "--splits",
                type=click.IntRange(LEAST["splits"]),
                default=Probing.splits,
                show_default=True,
                help="Number of splits: the paper's, then seeded stratified ones.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(LEAST["seed"], LARGEST),
                default=Measuring.seed,
                show_default=True,
                help="Seed of the noise, of shuffled labels and of all splits except the paper's.",
            ),
        )
    ):
        command = option(command)
    return command


def attribution_options(command: Command) -> Command:
    """Options of knowledge attribution."""
    for option in reversed(
        (
            click.option(
                "--answer-prefix",
                metavar="TEXT",
                help="Knowledge: text between prompt and answer, such as ''; defaults to the white space before the "
                "answer in the file, then to a space after a letter, digit or closing mark.",
            ),
            click.option(
                "--answer-tokens",
                type=click.Choice(ANSWER_TOKENS),
                default=Attributing.answer_tokens,
                show_default=True,
                help="Knowledge: tokens of the answer to compare with other answers. Scores explain the first one "
                "always.",
            ),
            click.option(
                "--top-k",
                type=click.IntRange(LEAST["top_k"]),
                default=Attributing.top_k,
                show_default=True,
                help="Knowledge: number of best neurons of each component to store for each prompt.",
            ),
            click.option(
                "--all-neurons",
                is_flag=True,
                help="Knowledge: store all neurons, each with a certified interval of its score.",
            ),
            click.option(
                "--query-values",
                type=click.IntRange(LEAST["query_values"]),
                default=Attributing.query_values,
                show_default=True,
                help="Knowledge: number of value neurons to trace back to query neurons.",
            ),
            click.option(
                "--ablate-k",
                type=click.IntRange(LEAST["ablate_k"]),
                default=Attributing.ablate_k,
                show_default=True,
                help="Knowledge: number of best neurons of each method to set to zero; 0 skips the comparison.",
            ),
            click.option(
                "--effects/--no-effects",
                default=Attributing.effects,
                show_default=True,
                help="Knowledge: store causal effects of heads and layers beside their scores.",
            ),
        )
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """Options that choose the models, and how they run."""
    for option in reversed(
        (
            click.option(
                "--model",
                "models_",
                multiple=True,
                shell_complete=measurable("model"),
                help="Model: name (`kdb models`), hub id, folder, or .gguf file; repeatable.",
            ),
            click.option("--name", help="Name under which the model is stored; defaults to its own name."),
            click.option(
                "--revision",
                "revisions",
                multiple=True,
                help="Branch, tag or commit on the hub, or checkpoint in a local folder; repeatable.",
            ),
            click.option(
                "--device",
                help="Device: cpu, cuda, cuda:1, …, or auto (spread over all GPUs).  [default: cuda if available, "
                "else cpu]",
            ),
            click.option(
                "--dtype",
                type=click.Choice(DTYPES),
                default=Measuring.dtype,
                show_default=True,
                help="Weight dtype for the forward pass.",
            ),
            click.option(
                "--quantize", type=click.Choice(QUANTIZATIONS), help="Quantize the weights, but not the activations."
            ),
            click.option(
                "--store",
                type=click.Choice(STORED_DTYPES),
                default=Measuring.store,
                show_default=True,
                help="Number format of the vectors on disk.",
            ),
            click.option(
                "--batch-tokens",
                type=click.IntRange(LEAST["batch_tokens"]),
                help="Tokens per batch; changes speed and memory use. Hidden states then agree to about 1e-5 in "
                "float32, 1e-2 in bfloat16 and 1e-3 in float16.",
            ),
        )
    ):
        command = option(command)
    return command


def engine_options(command: Command) -> Command:
    """Options that choose where models run."""
    for option in reversed(
        (
            click.option(
                "--engine",
                type=click.Choice(["local", "ray"]),
                default="local",
                show_default=True,
                help="Run models in this process (local), or on the workers of a Ray cluster (ray).",
            ),
            click.option("--address", help="Ray: HOST:PORT of the cluster; defaults to a new one on this machine."),
            click.option(
                "--worker-cpus",
                type=click.IntRange(1),
                help="Ray: CPUs per worker; defaults to all CPUs of the smallest node.",
            ),
            click.option(
                "--worker-gpus",
                type=click.IntRange(0),
                help="Ray: GPUs per worker; defaults to 1 if the cluster has GPUs, else 0.",
            ),
        )
    ):
        command = option(command)
    return command


def stored_options(command: Command) -> Command:
    """Options that choose a stored run."""
    for option in reversed(
        (
            click.option("--model", required=True, help="Name of a stored model.", shell_complete=stored("model")),
            click.option(
                "--dataset", required=True, help="Name of a stored dataset.", shell_complete=stored("dataset")
            ),
            variant_option,
        )
    ):
        command = option(command)
    return command


variant_option = click.option(
    "--variant",
    default="default",
    show_default=True,
    help="Variant of the run (`kdb runs`).",
    shell_complete=stored("variant"),
)


def knowledge_run_options(command: Command) -> Command:
    """Options that choose a stored run, by default of the dataset knowledge, and the model that it measured."""
    for option in reversed(
        (
            click.option(
                "--model",
                required=True,
                help="Model: name (`kdb models`), hub id, folder, or .gguf file.",
                shell_complete=stored("model"),
            ),
            click.option(
                "--name", "model_name", help="Name under which the model is stored; defaults to its own name."
            ),
            click.option("--revision", help="Branch, tag or commit on the hub."),
            click.option(
                "--dataset",
                default="knowledge",
                show_default=True,
                help="Name of a stored dataset.",
                shell_complete=stored("dataset"),
            ),
            variant_option,
        )
    ):
        command = option(command)
    return command
