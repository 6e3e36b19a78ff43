"""How well estimates by one gradient agree with exact patching, and what each costs.

    python benchmarks/patching.py [--model smollm2-135m] [--dataset ioi] [--prompts 100] [--replacement pair]
    python benchmarks/patching.py --model gpt2 --dataset ioi --positions each       # the literature's setting
    python benchmarks/patching.py --speed                                           # kdb patch on all heads, and AtP

Prints, for each component, Pearson's correlation of the estimates (atp, relp) with the exact effects on logit
difference: the mean over prompts with its standard error, and the number of prompts. With ``--positions each``, each
token position is patched by itself, as in the literature; else the last position only. For GPT-2 small on IOI, RelP
(Jafari et al. 2025, arXiv 2508.21258) reports 0.753, 0.979, 0.195 for atp and 0.968, 0.962, 0.992 for relp on residual,
attention and MLP. ``--speed`` times all of kdb's parts in this process, in forward passes of the same prompts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kdb.ingest.attribution.effects import Category, Known, effect_rows, every_part, pairs
from kdb.ingest.attribution.study import KEPT_RANK
from kdb.ingest.datasets import load_dataset
from kdb.ingest.forward.ablation import Silenced, Trial, run_trials
from kdb.ingest.forward.decomposition import Decomposition, decompose
from kdb.ingest.forward.gradients import gradients
from kdb.ingest.forward.patching import Pass, Patch, entries, patched, recorded, same_length
from kdb.ingest.job import Job
from kdb.ingest.models.find import find_model
from kdb.ingest.models.load import load_model, load_tokenizer, pick_device
from kdb.ingest.prompts import pose
from kdb.ingest.settings import Measuring, Patching, Probing

COMPONENTS = ("resid", "attn", "ffn", "head")


def known(decomposition: Decomposition, dataset: str, n: int) -> dict[str, list[Known]]:
    """At most ``n`` prompts that the model answers, by category."""
    source = decomposition.loaded.source
    job = Job(source, load_dataset(dataset), Measuring(), Probing())
    posed = pose(job, load_tokenizer(source))
    trials = [Trial(p.token_ids, p.target, Silenced(), everywhere=False, rivals=p.rivals) for p in posed]
    answers = run_trials(decomposition, trials)
    found: dict[str, list[Known]] = {}
    kept = [i for i in range(len(posed)) if answers.rank[i] <= KEPT_RANK and answers.ahead[i]]
    for i in kept[:: max(1, len(kept) // n)][:n] if dataset != "ioi" else kept[:n]:
        prompt, example = posed[i], job.dataset.examples[i]
        found.setdefault(example.category or "", []).append(
            Known(
                prompt.number,
                tuple(prompt.token_ids),
                prompt.target,
                example.category or "",
                int(answers.rival[i]),
                example.relation,
            )
        )
    return found


def agreement(category: Category, replacement: str, *, each: bool) -> Iterator[tuple[str, str, float]]:
    """Yield component, method and Pearson's correlation with the exact effect, for every prompt."""
    role = "all" if each else "last"
    for component in COMPONENTS:
        cases = []
        for i, prompt in enumerate(category.prompts):
            new = category.replacement(i, role, component, replacement)
            if new is None or prompt.rival < 0:
                continue
            cases.append((prompt, category.values(role, component)[i], new))
        yield from compared(category.decomposition, component, cases, each=each)


def compared(
    decomposition: Decomposition,
    component: str,
    cases: Sequence[tuple[Known, torch.Tensor, torch.Tensor]],
    *,
    each: bool,
) -> Iterator[tuple[str, str, float]]:
    """Compare estimates with exact effects for prompts with their own and replaced values (layer, position, width)."""
    parts, passes, patches, owners = every_part(decomposition, component), [], [], []
    for number, (prompt, own, new) in enumerate(cases):
        last = len(prompt.token_ids) - 1
        for column, position in enumerate(range(last + 1) if each else [last]):
            if torch.equal(own[:, column], new[:, column]):
                continue  # nothing to replace: the effect is 0 by any method
            passes.append(Pass(prompt.token_ids, (position,), prompt.target, prompt.rival))
            patches += [
                Patch(len(passes) - 1, part, new[part.layer, [column]][:, entries(decomposition, part)])
                for part in parts
            ]
            owners.append((number, column))
    exact = patched(decomposition, passes, patches).logit_diff.reshape(len(passes), len(parts))
    whole = [
        Pass(p.token_ids, tuple(range(len(p.token_ids))) if each else (len(p.token_ids) - 1,), p.target, p.rival)
        for p, _own, _new in cases
    ]
    for method in ("atp", "relp"):
        slopes = gradients(decomposition, whole, [component], method)
        estimate = np.empty_like(exact)
        for row, (number, column) in enumerate(owners):
            _prompt, own, new = cases[number]
            product = slopes[number][component][1, :, column].double() * (new - own)[:, column].double()
            estimate[row] = [product[part.layer, entries(decomposition, part)].sum().item() for part in parts]
        for number in sorted({n for n, _ in owners}):
            mine = [row for row, (n, _column) in enumerate(owners) if n == number]
            a, b = exact[mine].ravel(), estimate[mine].ravel()
            if a.std() and b.std():
                yield component, method, float(np.corrcoef(a, b)[0, 1])


def speed(decomposition: Decomposition, by_category: dict[str, list[Known]]) -> None:
    """Print what parts cost, in forward passes of the same prompts."""
    prompts = [p for some in by_category.values() for p in some]
    ids = [p.token_ids for p in prompts]

    def forward() -> None:
        with torch.inference_mode():
            for rows in same_length(ids, 1536):
                decomposition.structure.decoder(torch.tensor([ids[i] for i in rows]), use_cache=False)

    forward()
    unit = statistics.median(timed(forward) for _ in range(3))
    last = [[len(i) - 1] for i in ids]
    passes = [Pass(p.token_ids, (len(p.token_ids) - 1,), p.target, p.rival) for p in prompts]
    every = ("head", "attn", "ffn", "resid")
    print(f"{len(prompts)} prompts; a forward pass takes {1000 * unit / len(prompts):.1f} ms a prompt")
    for name, work in (
        ("values of all parts", lambda: recorded(decomposition, ids, last, every)),
        ("atp of all parts", lambda: gradients(decomposition, passes, every)),
        ("relp of all parts", lambda: gradients(decomposition, passes, every, "relp")),
    ):
        print(f"{name:24} {timed(work) / unit:6.2f} forward passes a prompt")
    wanted = Patching(components=("head",))
    heads = {"head": every_part(decomposition, "head")}
    total = sum(
        timed(lambda some=some: effect_rows(Category(decomposition, some), range(len(some)), wanted, heads))
        for some in by_category.values()
    )
    n = len(prompts) * len(heads["head"])
    print(f"{'exact, all heads, mean':24} {total:6.1f} s for {n:,} patches, {1000 * total / n:.2f} ms each")


def timed(work) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="ioi")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--replacement", default=None, help="zero, mean, resample or pair; pair for ioi, else mean")
    parser.add_argument("--positions", choices=["last", "each"], default="last")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    decomposition = decompose(load_model(find_model(args.model), device=pick_device(None)))
    by_category = known(decomposition, args.dataset, args.prompts)
    if args.speed:
        speed(decomposition, by_category)
        return
    by = args.replacement or ("pair" if args.dataset == "ioi" else "mean")
    found: dict[tuple[str, str], list[float]] = {}
    for some in by_category.values():
        for component, method, r in agreement(Category(decomposition, some), by, each=args.positions == "each"):
            found.setdefault((component, method), []).append(r)
    n_pairs = sum(len(pairs(some)) for some in by_category.values())
    n = sum(map(len, by_category.values()))
    print(f"{args.model} on {args.dataset}: {n} kept prompts, {n_pairs} with a pair; replaced by {by}")
    print(f"{'component':10} {'method':6} {'Pearson':>8} {'± s.e.':>7} {'prompts':>8}")
    for (component, method), values in found.items():
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(f"{component:10} {method:6} {statistics.mean(values):8.3f} {error:7.3f} {len(values):8}")


if __name__ == "__main__":
    main()
