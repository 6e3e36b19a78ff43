"""Effect of batching on hidden states by --batch-tokens and dtype, against those of one prompt at a time.

    python benchmarks/batches.py [--model smollm2-135m] [--dataset world-cities] [--limit 12] [--dtype float32 …]

The batches are those of a run: padded, behind the prefix that all prompts share. They are compared with the same model
in the same dtype, one prompt at a time, without padding or cache; the first row of a dtype says how far that is from
float32. Numbers are ‖difference‖ / ‖state‖ over all layers but the last and over all prompts.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from kdb.ingest.datasets import load_dataset, prompts
from kdb.ingest.forward.capture import Capture, shared_prefix
from kdb.ingest.forward.checks import untouched
from kdb.ingest.models.find import find_model
from kdb.ingest.models.load import load_model
from kdb.ingest.models.tokens import read_texts

LONG = [sentence * n for sentence in ("Paris is in France. ", "Two and two are four. ") for n in (3, 12, 30)]
"""Prompts beside those of the dataset, so that batches have much to pad."""


def off(found: NDArray[np.float32], expected: NDArray[np.float32]) -> str:
    """Say how far states are from those expected."""
    by = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    same = (found == expected).all(axis=-1).mean()
    return f"largest {by.max():.1e}, median {np.median(by):.1e}, bit by bit the same {same:.0%}"


def main() -> None:
    """Print a row for each dtype and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="world-cities")
    parser.add_argument("--limit", type=int, default=12, help="prompts of each label")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--batch-tokens", nargs="*", type=int, default=[1, 64, 256, 1536])
    options = parser.parse_args()
    texts = prompts(load_dataset(options.dataset, limit=options.limit)) + LONG
    exact = None
    for dtype in options.dtype:
        loaded = load_model(find_model(options.model), dtype=dtype)
        ids = read_texts(loaded.tokenizer, texts)
        alone = np.stack([untouched(loaded, row)[0][1:-1].numpy() for row in ids])
        exact = alone if exact is None else exact
        print(f"{dtype:9} one prompt at a time, against {options.dtype[0]}: {off(alone, exact)}", flush=True)
        for budget in options.batch_tokens:
            vectors = Capture(loaded, batch_tokens=budget).vectors(ids, ids[0][: shared_prefix(ids)])
            print(f"{dtype:9} --batch-tokens {budget:5}: {off(vectors[:, :-1, 0], alone)}", flush=True)


if __name__ == "__main__":
    main()
