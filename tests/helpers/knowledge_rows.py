"""Rows of a knowledge run of the invented model ``alpha``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.stored import Rows, add_run, encoded, write_part
from kdb.warehouse.run_folders import table_files
from kdb.warehouse.sums import sum_neurons


def prompt(prompt_id: int, category: str, kept: bool = True, target_rank: int = 1) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "category": category, "kept": kept, "target_rank": target_rank}


def layer_rows(prompt_id: int, attn: list[float], ffn: list[float]) -> Rows:
    """layer_scores of one prompt, a layer for each score."""
    return [
        {"prompt_id": prompt_id, "layer": layer, "component": component, "score": score}
        for component, scores in (("attn", attn), ("ffn", ffn))
        for layer, score in enumerate(scores)
    ]


def head_rows(prompt_id: int, *layers: list[float]) -> Rows:
    """head_scores of one prompt: a list for each layer, a score for each head."""
    return [
        {"prompt_id": prompt_id, "layer": layer, "head": head, "score": score}
        for layer, scores in enumerate(layers)
        for head, score in enumerate(scores)
    ]


def position_rows(prompt_id: int, layer: int, head: int, *reads: tuple[str, float, float]) -> Rows:
    """head_position_scores of one prompt and head: token, attention and score at each position."""
    return [
        {"prompt_id": prompt_id, "layer": layer, "head": head, "position": i}
        | {"token": token, "attention": attention, "score": score}
        for i, (token, attention, score) in enumerate(reads)
    ]


def ffn_rows(prompt_id: int, *best: tuple[int, int, float]) -> Rows:
    """neuron_scores of FFN neurons of one prompt, best first: layer, neuron, score."""
    return [
        {"prompt_id": prompt_id, "component": "ffn", "layer": layer, "neuron": neuron, "score": score, "rank": rank}
        for rank, (layer, neuron, score) in enumerate(best, start=1)
    ]


def attn_rows(prompt_id: int, *best: tuple[int, int, int, int, float]) -> Rows:
    """The same of attention neurons: layer, head, dimension, position, score."""
    return [
        {"prompt_id": prompt_id, "component": "attn", "layer": layer, "head": head, "neuron": neuron}
        | {"position": position, "score": score, "rank": rank}
        for rank, (layer, head, neuron, position, score) in enumerate(best, start=1)
    ]


def token_rows(sign: str, tokens: list[str], **neuron: Any) -> Rows:
    return [{"sign": sign, "rank": rank, "token": token, **neuron} for rank, token in enumerate(tokens, start=1)]


def ablation_rows(method: str, k: int, after: dict[int, tuple[int, float, float]], positions: str = "last") -> Rows:
    """ablations of one method: rank, probability and log-probability after it, for each prompt."""
    before = {0: (1, 0.5, -1.0), 1: (4, 0.2, -2.0), 2: (100, 0.0, -100.0), 3: (4, 0.2, -3.0)}
    names = ("rank", "prob", "logp")
    return [
        {"prompt_id": prompt_id, "method": method, "k": k, "positions": positions, "mode": "zero"}
        | {f"{name}_before": value for name, value in zip(names, before[prompt_id], strict=True)}
        | {f"{name}_after": value for name, value in zip(names, values, strict=True)}
        for prompt_id, values in after.items()
    ]


def effect_rows(prompt_id: int, *heads: float) -> Rows:
    """effects of one prompt: what two heads of each layer cost, measured and estimated, and what layers cost."""
    key = {"prompt_id": prompt_id, "role": "last", "replacement": "mean", "direction": "noising"}
    measured = [
        key
        | {"component": "head", "layer": i // 2, "head": i % 2, "method": "exact"}
        | {"logp": -cost, "logit_diff": -2 * cost, "kl": cost * cost}
        for i, cost in enumerate(heads)
    ]
    estimated = [row | {"method": "atp", "logp": row["logp"] / 2, "kl": None} for row in measured]
    layers = [
        key | {"component": component, "layer": i // 2, "method": "atp", "logp": -cost * sign, "logit_diff": -cost}
        for component, sign in (("attn", 1.0), ("ffn", -0.5))
        for i, cost in list(enumerate(heads))[::2]
    ]
    return [*measured, *estimated, *layers]


def expert_rows(prompt_id: int, layer: int, *scores: float) -> Rows:
    """expert_scores of one prompt and layer: a score for each expert that is used, the first ones."""
    return [
        {"prompt_id": prompt_id, "layer": layer, "expert": expert, "score": score}
        for expert, score in enumerate(scores)
    ]


def router_rows(prompt_id: int, layer: int, chosen: int, *probabilities: float) -> Rows:
    """router of one prompt and layer, which chooses one expert with the weight 0.5, and a probability for each."""
    order = sorted(range(len(probabilities)), key=lambda expert: (expert != chosen, -probabilities[expert]))
    return [
        {"prompt_id": prompt_id, "layer": layer, "expert": expert, "chosen": expert == chosen, "rank": rank}
        | {"weight": 0.5 * (expert == chosen), "probability": probabilities[expert]}
        for rank, expert in enumerate(order, start=1)
    ]


def lens_rows(prompt_id: int, *ranks: int) -> Rows:
    """lens_readouts of one prompt after each block: the answer's rank."""
    return [
        {"prompt_id": prompt_id, "layer": layer, "place": "resid_post", "position": 2, "lens": "logit"}
        | {"target_rank": rank, "target_logp": -float(rank), "entropy": 1.0, "kl": 0.5, "tokens": [" Paris", "\n"]}
        | {"logps": [-0.5, -1.0]}
        for layer, rank in enumerate(ranks)
    ]


TEN_TOKENS = [" Paris", "\n", 'say "hi"', "d", "e", "f", "g", "h", "i", "j", "the eleventh is not asked for"]

UNTOUCHED = {0: (1, 0.5, -1.0), 1: (4, 0.2, -2.0), 2: (1, 1.0, 0.0), 3: (4, 0.2, -3.0)}

HURT = {0: (2, 0.1, -4.0), 1: (4, 0.1, -4.0), 2: (100, 1.0, -100.0), 3: (4, 0.1, -4.0)}


ALPHA: dict[str, Rows] = {
    "models": [
        {"n_layers": 3, "dtype": "float32", "n_heads": 2, "head_dim": 8, "intermediate_size": 16},
    ],
    "prompts": [
        prompt(0, "language"),
        prompt(1, "language", target_rank=4),
        prompt(2, "language", kept=False, target_rank=100),
        prompt(3, "capital", target_rank=4),
        prompt(4, "capital", kept=False, target_rank=2),
        prompt(5, "month", kept=False, target_rank=11),
        prompt(6, "zoo"),
    ],
    "layer_scores": [
        *layer_rows(0, attn=[1.0, 0.0], ffn=[0.5, 2.5]),
        *layer_rows(1, attn=[3.0, 2.0], ffn=[0.5, 0.5]),
        *layer_rows(3, attn=[1.0, 1.0], ffn=[1.0, 1.0]),
        *layer_rows(6, attn=[1.0, 0.0], ffn=[-1.0, 0.0]),
        *(row for i in (2, 4, 5) for row in layer_rows(i, attn=[0.0, 0.0], ffn=[100.0, 0.0])),
    ],
    "head_scores": [
        *head_rows(0, [1.0, 0.0], [2.0, 0.0]),
        *head_rows(1, [1.0, 0.0], [4.0, 2.0]),
        *head_rows(3, [0.0, 1.0], [5.0, 0.0]),
        *head_rows(6, [5.0, 1.0], [4.0, 0.0]),
        *(row for i in (2, 4, 5) for row in head_rows(i, [0.0, 100.0], [0.0, 0.0])),
    ],
    "head_position_scores": [
        *position_rows(0, 1, 0, (" the", 0.25, 0.5), (" France", 0.5, 2.0), (" the", 0.25, 0.25)),
        *position_rows(1, 1, 0, (" the", 0.5, 0.25), (" Spain", 0.25, 3.0), (" of", 0.25, 0.5)),
        *position_rows(0, 0, 0, (" the", 1.0, 1.0)),
        *position_rows(2, 1, 0, (" the", 1.0, 100.0)),
    ],
    "expert_scores": [
        *expert_rows(0, 2, 1.0, 2.0),
        *expert_rows(1, 2, 3.0),
        *expert_rows(3, 2, 0.5, 0.25),
        *expert_rows(6, 2, 0.0, 1.0),
        *(row for i in (2, 4, 5) for row in expert_rows(i, 2, 100.0)),
    ],
    "router": [
        *router_rows(0, 2, 0, 0.5, 0.25, 0.25),
        *router_rows(1, 2, 1, 0.25, 0.5, 0.25),
        *router_rows(3, 2, 1, 0.0, 0.75, 0.25),
        *router_rows(6, 2, 2, 0.0, 0.25, 0.75),
        *(row for i in (2, 4, 5) for row in router_rows(i, 2, 2, 0.0, 0.0, 1.0)),
    ],
    "routing": [{"prompt_id": i, "layer": 2, "entropy": 0.25 * i} for i in range(7)],
    "effects": [
        *effect_rows(0, 1.0, 0.25, 2.0, 0.0),
        *effect_rows(1, 0.0, 0.5, 3.0, 1.0),
        *effect_rows(3, 0.5, 1.0, 0.0, 4.0),
        *effect_rows(6, 2.0, 0.0, 1.0, 0.25),
        *(row for i in (2, 4, 5) for row in effect_rows(i, 100.0, 0.0, 0.0, 0.0)),
    ],
    "lens_readouts": [
        *lens_rows(0, 3, 1, 1),
        *lens_rows(1, 1, 2, 1),
        *lens_rows(3, 9, 5, 4),
        *lens_rows(6, 1, 1, 1),
        *(row for i in (2, 4, 5) for row in lens_rows(i, 7, 7, 7)),
    ],
    "neuron_scores": [
        *ffn_rows(0, (1, 7, 4.0), (0, 3, 2.0)),
        *ffn_rows(1, (0, 3, 4.0), (1, 9, 1.0)),
        *ffn_rows(2, (1, 9, 100.0)),
        *ffn_rows(3, (1, 9, 1.0), (0, 3, 1.0)),
        *attn_rows(0, (1, 1, 5, 0, 1.0), (1, 1, 5, 2, 0.5), (0, 0, 4, 1, 0.4)),
        *attn_rows(1, (0, 0, 4, 1, 2.0)),
        *attn_rows(2, (1, 1, 5, 0, 100.0)),
    ],
    "neuron_tokens": [
        *token_rows("top", TEN_TOKENS, component="ffn", layer=0, neuron=3),
        *token_rows("bottom", ["it's", " ü"], component="ffn", layer=0, neuron=3),
        *token_rows("top", [" a"], component="attn", layer=0, head=0, neuron=4),
        *token_rows("top", [" not this one"], component="attn", layer=0, head=1, neuron=4),
    ],
    "query_neuron_scores": [
        {"prompt_id": 0, "activates": "attn", "layer": 0, "neuron": 3, "score": 0.5, "rank": 1},
        {"prompt_id": 0, "activates": "attn", "layer": 0, "neuron": 8, "score": 0.25, "rank": 2},
        {"prompt_id": 1, "activates": "attn", "layer": 0, "neuron": 8, "score": 0.5, "rank": 1},
        {"prompt_id": 1, "activates": "ffn", "layer": 1, "neuron": 2, "score": 0.5, "rank": 1},
        {"prompt_id": 2, "activates": "attn", "layer": 0, "neuron": 3, "score": 100.0, "rank": 1},
    ],
    "query_layer_scores": [
        {"prompt_id": i, "activates": "attn", "layer": layer, "component": component, "score": score}
        for i, scores in ((0, (0.5, 0.25, 0.25)), (1, (0.5, 0.75, 0.25)), (2, (0.0, 0.0, 100.0)))
        for (component, layer), score in zip((("embed", None), ("attn", 0), ("ffn", 0)), scores, strict=True)
    ],
    "ablations": [
        *ablation_rows("norm", 10, UNTOUCHED),
        *ablation_rows("log_prob_increase", 10, HURT),
        *ablation_rows("log_prob_increase", 5, UNTOUCHED),
        *ablation_rows("norm", 10, HURT, positions="all"),
    ],
    "checks": [
        {"check": "ffn_sum", "value": 0.5, "tolerance": 1.0, "passed": True},
        {"check": "logits", "value": 0.0001, "tolerance": 0.001, "passed": True},
    ],
}


def add_knowledge(lake: Path, model: str, dataset: str, run: str, tables: dict[str, Rows], **info: Any) -> None:
    """Commit a run of the knowledge study, with the sums of its neurons' scores."""
    derived = ["neuron_sums"] if "neuron_scores" in tables else []
    named = [*tables, "runs", *derived]
    add_run(lake, model, dataset, run, runs=[{"study": "knowledge", "tables": named, **info}], **tables)
    folder = lake / f"model={encoded(model)}/dataset={encoded(dataset)}/run={run}"
    for table in derived:
        sums = sum_neurons(*(table_files(folder, table) for table in ("neuron_scores", "candidate_scores", "prompts")))
        write_part(folder / table, sums)
