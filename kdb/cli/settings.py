"""Options of the commands that measure."""

from __future__ import annotations

from pathlib import Path

import click

from kdb.cli.options import Command


def dataset_options(command: Command) -> Command:
    """Which prompts."""
    for option in reversed(
        (
            click.option(
                "--dataset",
                "datasets_",
                multiple=True,
                help="Name or .csv, .jsonl or .parquet file; repeatable. Else every built-in one.",
            ),
            click.option("--dataset-name", help="Name to store a file of your own under; else its stem."),
            click.option(
                "--data-dir",
                type=click.Path(path_type=Path),
                envvar="KDB_DATA_DIR",
                help="Folder with the papers' original files; else $KDB_DATA_DIR, else the cache.",
            ),
            click.option("--template", help="Prompt template, such as 'Is it true? {text}'."),
            click.option("--limit", type=int, help="Take the first N of each class."),
            click.option("--group-by", help="Column that a grouped split keeps on one side."),
            click.option("--noise", is_flag=True, help="Put aaa or bbb before each text, by seed."),
        )
    ):
        command = option(command)
    return command


def probe_options(command: Command) -> Command:
    """How they are probed."""
    for option in reversed(
        (
            click.option(
                "--classifier",
                "classifiers",
                multiple=True,
                type=click.Choice(["logistic", "logistic-paper", "logistic-standardised", "random-forest"]),
                help="Fit this too; logistic and logistic-paper always are.",
            ),
            click.option(
                "--splits",
                type=click.IntRange(1),
                default=1,
                show_default=True,
                help="Splits in all: the paper's, then seeded stratified ones.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(0, 2**31 - 1),
                default=42,
                show_default=True,
                help="Seed of noise, of shuffled labels and of all splits but the paper's.",
            ),
        )
    ):
        command = option(command)
    return command


def attribution_options(command: Command) -> Command:
    """What is kept of their attribution."""
    for option in reversed(
        (
            click.option(
                "--top-k",
                type=click.IntRange(1),
                default=300,
                show_default=True,
                help="Knowledge: neurons of each component to store for a prompt, proved to be the best.",
            ),
            click.option(
                "--all-neurons",
                is_flag=True,
                help="Knowledge: store every neuron, with a certified interval of its score.",
            ),
            click.option(
                "--query-values",
                type=click.IntRange(1),
                default=30,
                show_default=True,
                help="Knowledge: value neurons that are traced back to query neurons.",
            ),
            click.option(
                "--ablate-k",
                type=click.IntRange(0),
                default=10,
                show_default=True,
                help="Knowledge: neurons of each method that are zeroed; 0 skips the comparison.",
            ),
        )
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """Which models, and how they run."""
    for option in reversed(
        (
            click.option(
                "--model",
                "models_",
                multiple=True,
                help="Name (`kdb models`), hub id, folder, or .gguf file; repeatable.",
            ),
            click.option("--name", help="Name to store the model under; else its own."),
            click.option(
                "--revision",
                "revisions",
                multiple=True,
                help="Branch, tag or commit on the hub, or checkpoint in a folder of them; repeatable.",
            ),
            click.option(
                "--device", help="cpu, cuda, cuda:1, …, or auto: spread over all GPUs; else CUDA where there is one."
            ),
            click.option(
                "--dtype",
                type=click.Choice(["float32", "bfloat16", "float16"]),
                default="float32",
                show_default=True,
                help="Of the weights in the forward pass.",
            ),
            click.option("--quantize", type=click.Choice(["int8"]), help="Quantize the weights alone."),
            click.option(
                "--store",
                type=click.Choice(["float32", "float16"]),
                default="float32",
                show_default=True,
                help="Of the vectors on disk.",
            ),
            click.option(
                "--batch-tokens",
                type=click.IntRange(1),
                help="Tokens per batch; changes speed and memory. Hidden states agree to about 1e-5 in float32, and "
                "to the rounding of half precision in bfloat16 (about 1e-2) and float16 (about 1e-3).",
            ),
        )
    ):
        command = option(command)
    return command


def engine_options(command: Command) -> Command:
    """Where models run."""
    for option in reversed(
        (
            click.option(
                "--engine",
                type=click.Choice(["local", "ray"]),
                default="local",
                show_default=True,
                help="Where models run: in this process, or on the workers of a Ray cluster.",
            ),
            click.option("--address", help="Ray's HOST:PORT; else a Ray of this machine's own."),
            click.option(
                "--worker-cpus", type=click.IntRange(1), help="Ray: CPUs of a worker; else all of the smallest node."
            ),
            click.option(
                "--worker-gpus", type=click.IntRange(0), help="Ray: GPUs of a worker; else one, where there are any."
            ),
        )
    ):
        command = option(command)
    return command


def stored_options(command: Command) -> Command:
    """A run that is stored."""
    for option in reversed(
        (
            click.option("--model", required=True, help="Model, as stored."),
            click.option("--dataset", required=True, help="Dataset, as stored."),
            click.option("--variant", default="default", show_default=True, help="Variant of the run (`kdb runs`)."),
        )
    ):
        command = option(command)
    return command
