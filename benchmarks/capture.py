"""Capture against the plain loop: one prompt, one forward pass, all hidden states.

    python benchmarks/capture.py [--pairs smollm2-135m:cities gemma-3-270m:cities …] [--data DIR] [--memory imdb]
    python benchmarks/capture.py --shape llama-7b --device cuda            # random weights in bfloat16

Both run in this process on the same threads and weights. The loop runs on a sample of the prompts, half before and half
after kdb, which runs on all of them and writes its Parquet files: a part while the next is captured, and once more each
in its turn. What is compared is seconds per prompt. FLOP/s count two operations for each weight of the blocks and each
token that had to be run (shared prefix and padding left out), as a share of what a plain square matrix product reaches
here. With --memory, a last process ingests that dataset with each model and its peak is compared with the weights.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kdb.ingest.datasets import load_dataset, prompts
from kdb.ingest.execution.writer import write_behind
from kdb.ingest.forward.capture import Capture, shared_prefix
from kdb.ingest.models.find import LoadedModel, find_model
from kdb.ingest.models.load import load_model
from kdb.ingest.rows import Rows
from kdb.queries.domains import SITES
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.vectors import GPU_PART_BYTES, PART_BYTES, activation_groups, prompts_per_part

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ("smollm2-135m:cities", "gemma-3-270m:cities", "smollm2-135m:strategyqa", "gemma-3-270m:strategyqa")


def loop(capture: Capture, token_ids: Sequence[Sequence[int]]) -> float:
    """Seconds per prompt of the plain loop."""
    device = capture.loaded.device
    begun = now(device)
    with torch.inference_mode():
        for ids in token_ids:
            output = capture.loaded.model(
                torch.tensor([ids], device=device), output_hidden_states=True, use_cache=False
            )
            torch.stack([state[0, -1] for state in output.hidden_states]).float().cpu()
    return (now(device) - begun) / len(token_ids)


def now(device: torch.device) -> float:
    """Return the time after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def batched(
    capture: Capture, token_ids: Sequence[Sequence[int]], lake: FolderStorage, *, behind: bool
) -> tuple[float, float]:
    """Seconds for all prompts: capture and writing, and capture alone. Writing waits its turn, or goes on behind."""
    begun, capturing = time.perf_counter(), 0.0
    prefix = token_ids[0][: shared_prefix(token_ids)]
    order = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
    size = prompts_per_part(*capture.shape, GPU_PART_BYTES if capture.loaded.device.type == "cuda" else PART_BYTES)

    def parts() -> Iterator[tuple[str, Rows]]:
        nonlocal capturing
        for start in range(0, len(order), size):
            ids, at = order[start : start + size], time.perf_counter()
            vectors = capture.vectors([token_ids[i] for i in ids], prefix)
            capturing += time.perf_counter() - at
            yield f"part-{start:06}", Rows("activations", list(activation_groups(ids, SITES, vectors)), 0.0)

    with lake.stage(f"{random.getrandbits(64):016x}", "model", "dataset") as staged:
        if behind:
            write_behind(
                staged, parts(), last="activations", n_writers=4 if capture.loaded.device.type == "cuda" else 1
            )
        else:
            for name, rows in parts():
                staged.write(rows.table, name, rows.groups)
    return time.perf_counter() - begun, capturing


def square_product(loaded: LoadedModel) -> float:
    """FLOP/s of a plain matrix product in the model's dtype, on its device: the median of seven."""
    n = 2048 if loaded.device.type == "cpu" else 8192
    a = torch.randn(n, n, device=loaded.device, dtype=getattr(torch, loaded.dtype))
    times = []
    for _ in range(7):
        begun = now(loaded.device)
        a @ a
        times.append(now(loaded.device) - begun)
    return 2 * n**3 / sorted(times)[3]


def compare_pair(pair: str, data: Path, sample: int) -> None:
    """Print one row: a model on a dataset."""
    name, dataset = pair.split(":")
    loaded = load_model(find_model(name))
    compare(pair, loaded, loaded.tokenizer(prompts(load_dataset(dataset, data_dir=data)))["input_ids"], sample)


def compare_shape(options: argparse.Namespace) -> None:
    """Print one row: random weights, prompts of random tokens that share a beginning, as templates do."""
    from attribution import SHAPES, random_model

    loaded = random_model(options.device, options.dtype, **SHAPES[options.shape])
    ids = torch.randint(
        loaded.model.config.vocab_size, (options.prompts, options.tokens), generator=torch.Generator().manual_seed(0)
    )
    ids[:, : options.tokens // 4] = ids[0, : options.tokens // 4]
    compare(f"{options.shape} {options.dtype} {options.device}", loaded, ids.tolist(), options.sample)
    if options.device.startswith("cuda"):
        print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def compare(label: str, loaded: LoadedModel, token_ids: Sequence[Sequence[int]], sample: int) -> None:
    """Print how the loop and kdb compare."""
    capture = Capture(loaded)
    by_length = sorted(token_ids, key=len)  # every so many of these: as long, on average, as all of them
    chosen = by_length[:: max(1, len(by_length) // sample)]
    random.Random(0).shuffle(chosen)
    loop(capture, chosen[:5]), capture.vectors(token_ids[:32])  # warm
    with tempfile.TemporaryDirectory() as folder:
        before = loop(capture, chosen[::2])
        rate = square_product(loaded)
        lake = FolderStorage.create(Path(folder) / "w")
        in_turn, capturing = batched(capture, token_ids, lake, behind=False)
        seconds, _ = batched(capture, token_ids, lake, behind=True)
        rate = (rate + square_product(loaded)) / 2
        after = loop(capture, chosen[1::2])
    plain, each = (before + after) / 2, seconds / len(token_ids)
    tokens = sum(len(ids) - shared_prefix(token_ids) for ids in token_ids)
    flops = 2 * weights_used(loaded, capture) * tokens / capturing
    print(
        f"{label:26} loop {1000 * plain:6.1f} ms, kdb {1000 * each:6.2f} ms a prompt (writing included): "
        f"{plain / each:5.1f} x; {flops / 1e9:4.0f} of {rate / 1e9:4.0f} GFLOP/s = {flops / rate:4.0%}; "
        f"{tokens / seconds:,.0f} tokens/s; {in_turn / seconds:.2f} x as fast as writing in turn",
        flush=True,
    )


def weights_used(loaded: LoadedModel, capture: Capture) -> float:
    """Weights of the blocks by which a token is multiplied: of experts, the share that a router chooses."""
    config = loaded.model.config
    chosen = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    named = [pair for block in capture.structure.blocks for pair in block.named_parameters()]
    return float(sum(p.numel() * (chosen if ".experts." in name else 1.0) for name, p in named))


def peak_memory(name: str, dataset: str, data: Path, limit: int | None) -> None:
    """Print the peak memory of a whole ingest beyond the model's weights."""
    weights = 4 * sum(p.numel() for p in load_model(find_model(name)).model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kdb", "ingest", "--model", name, "--dataset", dataset]
        command += ["--data-dir", str(data), "--warehouse", folder] + (["--limit", str(limit)] if limit else [])
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
    peak = usage.ru_maxrss * 1024
    if status:
        sys.exit(f"the ingest of {dataset} failed")
    print(
        f"{name}:{dataset}: peak {peak / 2**30:.2f} GiB = weights {weights / 2**30:.2f} + "
        f"{(peak - weights) / 2**30:.2f} GiB"
    )


def main() -> None:
    """Print a row per pair, then peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="*", default=PAIRS)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/concept_depth")
    parser.add_argument("--sample", type=int, default=120, help="prompts that the plain loop runs on")
    parser.add_argument("--shape", help="random weights of this shape: llama-7b, qwen3-30b-a3b, tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of a shape")
    parser.add_argument("--prompts", type=int, default=4000, help="of a shape")
    parser.add_argument("--tokens", type=int, default=64, help="of each of these")
    parser.add_argument("--memory", help="dataset whose ingest is watched for its peak memory")
    parser.add_argument("--limit", type=int, help="of each class of that dataset")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    if options.shape:
        compare_shape(options)
        return
    for pair in options.pairs:
        compare_pair(pair, options.data, options.sample)
    if options.memory:
        for name in ("smollm2-135m", "gemma-3-270m"):
            peak_memory(name, options.memory, options.data, options.limit)


if __name__ == "__main__":
    main()
