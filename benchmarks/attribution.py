"""Attribution of prompts against the direct way: every neuron through the whole vocabulary.

    python benchmarks/attribution.py [--model smollm2-135m] [--prompts 12] [--direct-layers 2]
    python benchmarks/attribution.py --grow                                # cost by prompt length, width, vocabulary
    python benchmarks/attribution.py --shape llama-7b --device cuda        # random weights in bfloat16

Both run in this process on the same cache, threads and weights. kdb attributes the prompts in batches, as an ingest
does: it records them, scores all layers and heads, proves the 300 best FFN and the 300 best attention neurons, and
scores the candidates for the batch's best neurons. The
direct way computes a score for every layer, head and neuron of one prompt at a time: the logits of x + v for 512
vectors v at once, log_softmax at the target, less that of x. It runs on a sample of layers of one prompt, and its time
is extrapolated to the vectors of all layers and prompts; on that sample both must give the same scores. A plain forward
pass is one of the prompt alone, up to the logits of its last token: the median of seven.

Peak memory is that of a process that does nothing but kdb's part, less the weights; PyTorch's libraries are in it.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdb.ingest.attribution.candidates import FIRST, candidate_rows
from kdb.ingest.attribution.scores import Attribution, Neurons, prompts_at_once
from kdb.ingest.attribution.targets import Target, target_token
from kdb.ingest.datasets import load_dataset, prompts
from kdb.ingest.forward.activation_cache import head_coefficients, head_vectors, run_with_cache
from kdb.ingest.forward.decomposition import Decomposition, decompose
from kdb.ingest.models.find import LoadedModel, ModelSource, find_model
from kdb.ingest.models.load import load_model
from kdb.ingest.prompts import Prompt

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("smollm2-135m", "gemma-3-270m")
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab": 151_936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
}
GROW = {"tokens": (8, 32, 128), "width": (256, 512, 1024), "vocabulary": (8_000, 32_000, 128_000)}
GROW_FROM = {"tokens": 8, "width": 256, "vocabulary": 32_000}
GROW_LAYERS = 4
TOP = 300
STAGES = ("record", "bounds", "layers", "heads", "ffn", "attn", "candidates")
SAME = 2e-3
"""Nats by which the two ways may differ."""

Prompts = list[tuple[list[int], int]]


# kdb's way -------------------------------------------------------------------------------------------------------


@dataclass
class Ours:
    """One batch, attributed, and the seconds that each stage took."""

    attribution: Attribution
    ffn: Neurons
    attn: Neurons
    seconds: dict[str, float]


def attribute(decomposition: Decomposition, batch: Prompts) -> Ours:
    seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        begun = _now(decomposition)
        yield
        seconds[stage] = _now(decomposition) - begun

    with timed("record"):
        cache = run_with_cache(decomposition, [ids for ids, _target in batch])
    a = Attribution(decomposition, cache, torch.tensor([t for _ids, t in batch], device=decomposition.loaded.device))
    with timed("bounds"):
        a.ffn_bounds, a.attn_bounds  # noqa: B018  (computed when first asked for, and kept)
    with timed("layers"):
        a.layer_scores  # noqa: B018  (kept, too)
    with timed("heads"):
        a.head_scores  # noqa: B018  (kept, too)
    with timed("ffn"):
        ffn = a.ffn_top(TOP)
    with timed("attn"):
        attn = a.attn_top(TOP)
    with timed("candidates"):  # as if all prompts of the batch were of one category
        candidates(decomposition, batch, {"ffn": ffn, "attn": attn})
    return Ours(a, ffn, attn, seconds)


def candidates(decomposition: Decomposition, batch: Prompts, best: dict[str, Neurons]) -> None:
    """Score the first candidates for the batch's best neurons in each of its prompts; this records them again."""
    wanted = {name: neurons.most.sum(0).topk(FIRST).indices.tolist() for name, neurons in best.items()}
    prompts = [Prompt(i, ids, Target(ids, "", (target,), ())) for i, (ids, target) in enumerate(batch)]
    candidate_rows(decomposition, prompts, wanted)


def batches(decomposition: Decomposition, chosen: Prompts) -> list[Prompts]:
    """Prompts by falling length, as many together as an ingest takes."""
    order, at_once = sorted(chosen, key=lambda p: -len(p[0])), prompts_at_once(decomposition)
    return [order[i : i + at_once] for i in range(0, len(order), at_once)]


def forward(decomposition: Decomposition, token_ids: Sequence[Sequence[int]]) -> float:
    """Seconds of a plain forward pass up to the logits of each prompt's last token: the median of seven."""
    ids = torch.zeros(len(token_ids), max(map(len, token_ids)), dtype=torch.long)
    for row, tokens in enumerate(token_ids):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    ids, rows = ids.to(decomposition.loaded.device), range(len(token_ids))
    last = [len(tokens) - 1 for tokens in token_ids]
    times = []
    for _ in range(8):
        begun = _now(decomposition)
        decomposition.structure.unembed_normed(decomposition.structure.decoder(ids, use_cache=False)[0][rows, last])
        times.append(_now(decomposition) - begun)
    return statistics.median(times[1:])


def _now(decomposition: Decomposition) -> float:
    if decomposition.loaded.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# The direct way --------------------------------------------------------------------------------------------------


@dataclass
class Direct:
    """Scores of the sampled layers of one prompt by (component, layer), and how long they took."""

    scores: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def n_vectors(self) -> int:
        """Number of vectors that were scored."""
        return sum(score.numel() for score in self.scores.values())


def direct(a: Attribution, row: int, layers: Sequence[int], block: int) -> Direct:
    """Score every layer, head and neuron of some layers at one row of a batch."""
    decomposition, r, out = a.decomposition, a.cache, Direct()
    last, target = int(r.last[row]), int(a.target[row])
    readout, scale = decomposition.readout, r.final_scale[row]

    def increase(x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        def log_p(points: torch.Tensor) -> torch.Tensor:
            return ((points * scale) @ readout.table.T + readout.constant).log_softmax(-1)[:, target]

        return torch.cat([log_p(x + some) for some in vectors.split(block)]) - log_p(x[None])

    begun = _now(decomposition)
    for i in layers:
        x, attn, ffn = (states[i, row, last] for states in (r.resid_pre, r.attn, r.ffn))
        before_ffn = x if decomposition.blocks[i].parallel else x + attn
        out.scores["attn layer", i] = increase(x, attn[None])
        out.scores["ffn layer", i] = increase(before_ffn, ffn[None])
        out.scores["heads", i] = increase(x, head_vectors(decomposition, r, i)[row])
        m = r.coefficients[i, row, last] * r.ffn_scale[i, row, last]
        out.scores["ffn", i] = increase(before_ffn, m[:, None] * decomposition.ffn_columns(i))
        m = head_coefficients(r, i)[row, :, : last + 1] * r.attn_scale[i, row, last]  # head, position, entry
        columns = decomposition.attn_columns(i).view(m.shape[0], 1, m.shape[2], -1)
        score = [increase(x, (m[h, :, :, None] * columns[h]).flatten(0, 1)) for h in range(m.shape[0])]
        out.scores["attn", i] = torch.stack(score).view(m.shape)
    out.seconds = _now(decomposition) - begun
    return out


def largest_difference(ours: Ours, row: int, found: Direct) -> float:
    """Largest difference of a layer's, a head's or a best neuron's score.

    A neuron that only the direct way puts among the best differs by what it has more than the last of ours.
    """
    a, off = ours.attribution, [0.0]
    for (part, i), score in found.scores.items():
        if part in ("ffn", "attn"):
            top = ours.ffn if part == "ffn" else ours.attn
            here = top.layer[row] == i
            place = [x[row, here] for x in (top.head, top.position, top.neuron) if x is not None]
            off += (score[tuple(place)] - top.score[row, here]).abs().tolist()
            others = score.clone()
            others[tuple(place)] = -torch.inf
            if top.layer[row, -1] >= 0:
                off.append(float(others.max() - top.score[row, -1]))
        else:
            component = part.removesuffix(" layer")
            expected = a.head_scores[row, i] if part == "heads" else a.layer_scores[component][row, i]
            off.append(float((score - expected).abs().max()))
    return max(off)


def n_vectors(decomposition: Decomposition, n_tokens: int) -> int:
    """Vectors that the direct way scores for one prompt: layers, heads, FFN and attention neurons."""
    widths = [
        (len(decomposition.ffn_columns(i)), len(decomposition.attn_columns(i)))
        for i in range(len(decomposition.blocks))
    ]
    return sum(2 + decomposition.n_heads + ffn + attn * n_tokens for ffn, attn in widths)


# Models and prompts ----------------------------------------------------------------------------------------------


def random_model(device: str, dtype: str, vocab: int = 32_000, model_type: str = "llama", **sizes: Any) -> LoadedModel:
    """A model with random weights, a Llama if nothing else is said, and no tokenizer."""
    for chatter in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatter).setLevel(logging.ERROR)
    no_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(model_type, vocab_size=vocab, **no_tokens, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.eval().requires_grad_(False)
    source = ModelSource("random", model_type, "random", "random", Path())
    return LoadedModel(source, model, None, dtype, torch.device(device), None)


def random_prompts(n: int, n_tokens: int, vocab: int) -> Prompts:
    ids = torch.randint(vocab, (n, n_tokens + 1), generator=torch.Generator().manual_seed(0)).tolist()
    return [(row[:-1], row[-1]) for row in ids]


def real_prompts(loaded: LoadedModel, n: int, path: Path) -> Prompts:
    """The first prompts of a file with columns prompt and answer, or of the built-in dataset, with their targets."""
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            pairs = [(row["prompt"], row["answer"]) for row in csv.DictReader(file)]
    else:
        dataset = load_dataset("knowledge")
        pairs = [(t, e.answer or "") for t, e in zip(prompts(dataset), dataset.examples, strict=True)]
    return [target_token(loaded.tokenizer, *pair) for pair in pairs[:n]]


def load(options: argparse.Namespace, name: str) -> tuple[Decomposition, Prompts]:
    if options.shape:
        loaded = random_model(options.device, "bfloat16", max_position_embeddings=512, **SHAPES[options.shape])
        chosen = random_prompts(options.prompts, 10, loaded.model.config.vocab_size)
    else:
        loaded = load_model(find_model(name), device=options.device)
        chosen = real_prompts(loaded, options.prompts, options.prompts_file)
    return decompose(loaded), chosen


# What is printed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """For each prompt: seconds by stage, of its forward pass alone and of its share of a batched one; exact scores."""

    stages: dict[str, float]
    alone: float
    batched: float
    n_scored: float

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(self.stages.values())


def measure(decomposition: Decomposition, chosen: Prompts) -> tuple[Cost, Ours]:
    """Return kdb's cost, and its results for the middle batch. Forward passes are timed before and after its stages."""
    groups, kept = batches(decomposition, chosen), None
    totals, n_scored = dict.fromkeys(STAGES, 0.0), len(chosen) * len(decomposition.blocks) * (2 + decomposition.n_heads)

    def passes() -> tuple[float, float]:
        alone = statistics.mean(forward(decomposition, [ids]) for ids, _target in chosen)
        return alone, sum(forward(decomposition, [ids for ids, _target in group]) for group in groups) / len(chosen)

    attribute(decomposition, groups[0])  # warm
    before = passes()
    for i, group in enumerate(groups):
        ours = attribute(decomposition, group)
        kept = ours if i == len(groups) // 2 else kept
        totals = {stage: seconds + ours.seconds[stage] for stage, seconds in totals.items()}
        n_scored += int(ours.ffn.n_scored.sum() + ours.attn.n_scored.sum())
    alone, batched = ((a + b) / 2 for a, b in zip(before, passes(), strict=True))
    each = {stage: seconds / len(chosen) for stage, seconds in totals.items()}
    assert kept is not None
    return Cost(each, alone, batched, n_scored / len(chosen)), kept


def report(options: argparse.Namespace, name: str) -> bool:
    """Print the cost of kdb and of the direct way for one model; return whether both gave the same scores."""
    decomposition, chosen = load(options, name)
    cost, ours = measure(decomposition, chosen)
    lengths = [len(ids) for ids, _target in chosen]
    print(
        f"\n{name}, {decomposition.loaded.dtype} on {decomposition.loaded.device}: {len(chosen)} prompts of "
        f"{min(lengths)} to "
        f"{max(lengths)} tokens, in batches of {len(batches(decomposition, chosen)[0])}"
    )
    print(
        f"  kdb     {cost.seconds:9.3f} s a prompt = {cost.seconds / cost.alone:.1f} plain forward passes of it alone "
        f"({1000 * cost.alone:.1f} ms) = {cost.seconds / cost.batched:.1f} in a batch ({1000 * cost.batched:.1f} ms)"
    )
    stages = (f"{stage} {1000 * s:.1f} ms ({s / cost.alone:.1f})" for stage, s in cost.stages.items())
    print("          " + ", ".join(stages) + "; in brackets: forward passes")
    print(f"          {cost.n_scored:,.0f} exact scores a prompt", flush=True)
    agreed = report_direct(options, decomposition, cost, ours, lengths) if options.direct_layers else True
    del ours
    print(f"  peak memory {peak_memory(options, name, decomposition, chosen)}", flush=True)
    return agreed


def report_direct(
    options: argparse.Namespace, decomposition: Decomposition, cost: Cost, ours: Ours, lengths: Sequence[int]
) -> bool:
    n_layers, row = (
        len(decomposition.blocks),
        ours.attribution.n_prompts // 2,
    )  # prompts are sorted: one of middling length
    spread = torch.linspace(0, n_layers - 1, min(options.direct_layers, n_layers) + 2)[1:-1].round().int().tolist()
    layers = spread if options.direct_layers < n_layers else list(range(n_layers))
    found = direct(ours.attribution, row, layers, options.block)
    every = statistics.mean(n_vectors(decomposition, n_tokens) for n_tokens in lengths)
    seconds = cost.alone + found.seconds * every / found.n_vectors
    off = largest_difference(ours, row, found)
    print(
        f"  direct  {seconds:9.1f} s a prompt, extrapolated from {found.seconds:.1f} s for the {found.n_vectors:,} "
        f"vectors of layers {', '.join(map(str, layers))} and {int(ours.attribution.cache.last[row]) + 1} tokens "
        f"to {every:,.0f} vectors"
    )
    print(f"  ratio   {seconds / cost.seconds:9.0f}; largest difference of a score {off:.1g}{' OUT' * (off > SAME)}")
    return off <= SAME


def peak_memory(options: argparse.Namespace, name: str, decomposition: Decomposition, chosen: Prompts) -> str:
    """Peak memory over the weights: on a GPU what PyTorch allocated there, else that of a process of its own."""
    weights = sum(p.nbytes for p in decomposition.loaded.model.parameters())
    if decomposition.loaded.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run_all(decomposition, chosen)
        peak = torch.cuda.max_memory_allocated()
    else:
        command = [sys.executable, __file__, "--only-kdb", "--prompts", str(options.prompts)]
        command += ["--shape", options.shape] if options.shape else ["--model", name]
        child = subprocess.run([*command, "--prompts-file", str(options.prompts_file)], stdout=subprocess.PIPE)
        if child.returncode:
            sys.exit(f"kdb's part failed on {name}")
        peak = int(child.stdout)
    return f"{peak / 2**30:.2f} GiB = weights {weights / 2**30:.2f} + {(peak - weights) / 2**30:.2f} GiB"


def own_peak() -> int:
    """Bytes of memory that this process has held at most.

    Not getrusage's figure: to that Linux adds the peak of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def run_all(decomposition: Decomposition, chosen: Prompts) -> None:
    for group in batches(decomposition, chosen):
        attribute(decomposition, group)


def grow(n_prompts: int) -> None:
    """Print a row per model: one of prompt length, width and vocabulary grows, the others stay as they are."""
    print(f"\nLlamas of {GROW_LAYERS} layers with random weights, {n_prompts} prompts: milliseconds for each prompt")
    widths = f"{'tokens':>6} {'width':>6} {'vocab':>8} {'forward':>8} {'kdb':>9} {'kdb/forward':>12} {'exact':>7}"
    print(f"{'grows':11} {widths}  " + " ".join(f"{stage:>8}" for stage in STAGES))
    for what, sizes in GROW.items():
        for size in sizes:
            shape = GROW_FROM | {what: size}
            tokens, width, vocab = (shape[key] for key in GROW_FROM)
            sizes_of = {"num_hidden_layers": GROW_LAYERS, "num_attention_heads": width // 64}
            loaded = random_model(
                "cpu", "float32", vocab=vocab, hidden_size=width, intermediate_size=3 * width, **sizes_of
            )
            cost, _ours = measure(decompose(loaded), random_prompts(n_prompts, tokens, vocab))
            print(
                f"{what:11} {tokens:6} {width:6} {vocab:8,} {1000 * cost.alone:8.1f} {1000 * cost.seconds:9.1f} "
                f"{cost.seconds / cost.alone:12.1f} {cost.n_scored:7.0f}  "
                + " ".join(f"{1000 * s:8.1f}" for s in cost.stages.values()),
                flush=True,
            )


def main() -> None:
    """Print a few rows per model, or a table of models that grow; exit with 1 where scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="name, folder or .gguf file; the two small real ones if none")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape, in bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--prompts-file", type=Path, default=ROOT.parent / "shared/golden/prompts.csv")
    parser.add_argument("--direct-layers", type=int, default=2, help="layers that the direct way runs on; 0 for none")
    parser.add_argument("--block", type=int, default=512, help="vectors that the direct way unembeds at once")
    parser.add_argument("--grow", action="store_true", help="print how cost grows with length, width and vocabulary")
    parser.add_argument("--only-kdb", action="store_true", help=argparse.SUPPRESS)  # for peak memory
    options = parser.parse_args()
    names = [options.shape] if options.shape else options.model or MODELS
    with torch.inference_mode():
        if options.only_kdb:
            run_all(*load(options, names[0]))
            print(own_peak())
            return
        load_average = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores{load_average}")
        if options.grow:
            grow(options.prompts)
            return
        agreed = [report(options, name) for name in names]
    sys.exit(not all(agreed))


if __name__ == "__main__":
    main()
