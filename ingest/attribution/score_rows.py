"""Build the tables of the knowledge study from the scores of a chunk of prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kdb.ingest.forward.layout import FfnLayout, named_slot, named_slots
from kdb.ingest.prompts import Prompt
from kdb.ingest.rows import arrow_rows
from kdb.warehouse.schema import arrow_schema

if TYPE_CHECKING:
    import torch

    from kdb.ingest.attribution.scores import Attribution, Neurons, QueryScores
    from kdb.ingest.forward.decomposition import Decomposition

HEADS_BY_POSITION = 10
"""Number of heads of each prompt whose scores are stored by position."""

QUERY_NEURONS = 100
"""Number of query neurons to store for each prompt and kind."""

TOKENS_OF_A_NEURON = 10
"""Number of tokens to store from the top and from the bottom of a neuron's logits."""

NEXT_EXPERTS = 4
"""Number of experts to store of each layer besides those that the router chooses."""


def layouts_of(decomposition: Decomposition) -> list[FfnLayout]:
    """Return the layout of each layer's FFN."""
    return [decomposition.ffn_layout(layer) for layer in range(len(decomposition.blocks))]


def layer_rows(ids: Any, a: Attribution) -> pa.Table:
    """Rows of ``layer_scores``; ``ids`` (prompt,) number the prompts of the chunk."""
    rows = []
    for component in a.layer_components:
        layers = _with(a, component)
        keys = {"prompt_id": ids[:, None], "layer": np.array(layers), "component": component}
        rows.append(arrow_rows("layer_scores", keys | {"score": a.layer_scores[component][:, layers]}))
    return pa.concat_tables(rows)


def _with(a: Attribution, component: str) -> list[int]:
    """The layers that add something of this component."""
    return [i for i, block in enumerate(a.decomposition.blocks) if block.has(component)]


def head_rows(ids: Any, a: Attribution) -> pa.Table:
    """Rows of ``head_scores``."""
    _b, n_layers, n_heads = a.head_scores.shape
    keys = {"prompt_id": ids[:, None, None], "layer": np.arange(n_layers)[:, None], "head": np.arange(n_heads)}
    rows = arrow_rows("head_scores", keys | {"score": a.head_scores})
    if a.lacking is None:
        return rows
    exists = np.broadcast_to((~a.lacking.all(2)).cpu().numpy(), a.head_scores.shape)
    return rows.filter(pa.array(exists.ravel()))


def head_position_rows(ids: Any, a: Attribution, tokenizer: Any, chunk: Sequence[Prompt]) -> pa.Table:
    """Rows of ``head_position_scores``: every position of each prompt's best heads."""
    layer, head, attention, score = a.head_positions(HEADS_BY_POSITION)
    n_tokens = attention.shape[2]
    texts = [[tokenizer.decode([token]) for token in p.token_ids] + [""] * (n_tokens - len(p.token_ids)) for p in chunk]
    table = arrow_rows(
        "head_position_scores",
        {
            "prompt_id": ids[:, None, None],
            "layer": layer[..., None],
            "head": head[..., None],
            "position": np.arange(n_tokens),
            "token": np.array(texts, dtype=object)[:, None, :],
            "attention": attention.double(),
            "score": score,
        },
    )
    lengths = np.array([len(p.token_ids) for p in chunk])[:, None, None]
    real = np.broadcast_to(np.arange(n_tokens) < lengths, attention.shape)
    return table.filter(pa.array(real.ravel()))


def expert_rows(ids: Any, a: Attribution) -> pa.Table:
    """Rows of ``expert_scores``: the experts that are used at the last position."""
    score, used = a.expert_scores, a.cache.chosen
    if score is None or used is None:
        return arrow_schema("expert_scores").empty_table()
    layers, experts = np.arange(a.n_layers)[:, None], np.arange(score.shape[2])
    keys = {"prompt_id": ids[:, None, None], "layer": layers, "expert": experts}
    return arrow_rows("expert_scores", keys | {"score": score}).filter(_mask(used.transpose(0, 1)))


def router_rows(ids: Any, a: Attribution) -> tuple[pa.Table, pa.Table]:
    """Rows of ``router`` and ``routing``: what each layer's router chose at the last position, and how surely."""
    cache = a.cache
    if cache.router_weight is None or cache.router_probs is None or cache.chosen is None:
        return arrow_schema("router").empty_table(), arrow_schema("routing").empty_table()
    n_routed = {layer: of.n_routed for layer, of in enumerate(layouts_of(a.decomposition)) if of.n_routed}
    routers = [_router_of_layer(ids, a, layer, n) for layer, n in n_routed.items()]
    entropies = [
        arrow_rows("routing", {"prompt_id": ids, "layer": layer, "entropy": _entropy(cache.router_probs[layer, :, :n])})
        for layer, n in n_routed.items()
    ]
    return pa.concat_tables(routers), pa.concat_tables(entropies)


def _router_of_layer(ids: Any, a: Attribution, layer: int, n_routed: int) -> pa.Table:
    """The experts that are chosen in any way, and the most probable of the others, as rows of ``router``."""
    import torch

    assert a.cache.router_weight is not None and a.cache.router_probs is not None and a.cache.chosen is not None
    arrays = (a.cache.router_weight, a.cache.router_probs, a.cache.chosen)
    weight, probability, chosen = (x[layer, :, :n_routed] for x in arrays)
    # Chosen ones first: a bias or groups of experts may have preferred them to more probable ones.
    order = (probability.double() + chosen * (1 + probability.abs().max())).argsort(dim=1, descending=True, stable=True)
    weight, probability, chosen = (x.gather(1, order) for x in (weight, probability, chosen))
    rank = torch.arange(n_routed, device=order.device)
    stored = rank < chosen.sum(1, keepdim=True) + NEXT_EXPERTS
    columns = {"expert": order, "chosen": chosen, "weight": weight.double(), "probability": probability.double()}
    keys = {"prompt_id": ids[:, None], "layer": layer, "rank": rank + 1}
    return arrow_rows("router", keys | columns).filter(_mask(stored))


def _entropy(probability: torch.Tensor) -> torch.Tensor:
    """Entropy (b) of numbers (b, n), divided by their sum: the scores of a sigmoid do not add up to 1."""
    import torch

    p = probability.double() / probability.double().sum(1, keepdim=True)
    entropy: torch.Tensor = torch.special.entr(p).sum(1)
    return entropy


def _mask(wanted: torch.Tensor) -> pa.Array:
    return pa.array(wanted.cpu().numpy().ravel())


def neuron_rows(ids: Any, layouts: Sequence[FfnLayout], n: Neurons) -> pa.Table:
    """Rows of ``neuron_scores``."""
    table = arrow_rows(
        "neuron_scores",
        {
            "prompt_id": ids[:, None],
            "component": "ffn" if n.head is None else "attn",
            "layer": n.layer,
            "head": n.head,
            **(named_slots(layouts, n.layer, n.neuron) if n.head is None else {"neuron": n.neuron}),
            "position": n.position,
            "coefficient": n.coefficient.double(),
            "score": n.score,
            "lower": n.lower,
            "upper": n.upper,
            "exact": n.exact,
            "rank": np.arange(1, n.layer.shape[1] + 1),
        },
    )
    return table.filter(_mask(n.layer >= 0))


def query_neuron_rows(ids: Any, layouts: Sequence[FfnLayout], activates: str, q: QueryScores) -> pa.Table:
    """Rows of ``query_neuron_scores``; ``activates`` is the component of the value neurons that they activate."""
    n = q.neurons.shape[2]
    best = q.neurons.flatten(1).topk(min(QUERY_NEURONS, q.neurons[0].numel()), dim=1)
    table = arrow_rows(
        "query_neuron_scores",
        {
            "prompt_id": ids[:, None],
            "activates": activates,
            "layer": best.indices // n,
            **named_slots(layouts, best.indices // n, best.indices % n),
            "score": best.values.double(),
            "rank": np.arange(1, best.indices.shape[1] + 1),
            "total_share": q.total_share.double()[:, None],
        },
    )
    return table.filter(_mask(best.values > -float("inf")))  # −∞: no further neuron fires


def query_layer_rows(ids: Any, a: Attribution, activates: str, q: QueryScores) -> pa.Table:
    """Rows of ``query_layer_scores``."""
    keys = {"prompt_id": ids[:, None], "activates": activates, "total_share": q.total_share.double()[:, None]}
    rows = []
    for component in a.layer_components:
        layers = _with(a, component)
        of = keys | {"component": component, "layer": np.array(layers)}
        rows.append(arrow_rows("query_layer_scores", of | {"score": getattr(q, component)[:, layers]}))
    return pa.concat_tables(
        [arrow_rows("query_layer_scores", keys | {"component": "embed", "score": q.embed[:, None]}), *rows]
    )


def method_rows(
    a: Attribution, top: Neurons, chunk: Sequence[Prompt], k: int, batch_tokens: int | None
) -> tuple[pa.Table, pa.Table]:
    """Rows of ``ablated_parts`` and ``ablations``: each method's best neurons, and the target after zeroing them.

    They are zeroed at the last position, and at all.
    """
    from kdb.ingest.attribution.rankings import best_neurons
    from kdb.ingest.forward.ablation import Chosen, Intervention, intervene

    n, layouts = a.ffn_coefficients.shape[2], layouts_of(a.decomposition)
    best = {method: _listed(indices) for method, indices in best_neurons(a, k, top).items()}
    interventions = [
        Intervention(
            prompt.number,
            prompt.token_ids,
            prompt.target,
            positions,
            Chosen(method, silenced_ffn(indices[i], n), len(indices[i])),
        )
        for method, indices in best.items()
        for i, prompt in enumerate(chunk)
        for positions in ("last", "all")
    ]
    chosen = [
        {
            "prompt_id": prompt.number,
            "method": method,
            "rank": rank,
            "layer": index // n,
            "component": "ffn",
            **named_slot(layouts[index // n], index % n),
        }
        for method, indices in best.items()
        for i, prompt in enumerate(chunk)
        for rank, index in enumerate(indices[i], start=1)
    ]
    zeroed = intervene(a.decomposition, interventions, batch_tokens=batch_tokens)
    return pa.Table.from_pylist(chosen, arrow_schema("ablated_parts")), zeroed


def _listed(indices: torch.Tensor) -> list[list[int]]:
    """The neurons of each prompt, of which some may have fewer than others."""
    return [[index for index in row if index >= 0] for row in indices.tolist()]


def silenced_ffn(indices: Sequence[int], n: int) -> Any:
    """Convert FFN slots, given by index into (l · n), to the entries that an intervention sets to zero."""
    from kdb.ingest.forward.ablation import Silenced

    by_layer: dict[int, list[int]] = {}
    for index in indices:
        by_layer.setdefault(index // n, []).append(index % n)
    return Silenced(ffn=by_layer)


def token_rows(decomposition: Decomposition, neurons: pa.Table, on_batch: Callable[[int], None]) -> Iterator[pa.Table]:
    """Rows of ``neuron_tokens`` for neurons given by component, layer, head, expert and neuron."""
    import torch

    table, tokenizer = decomposition.readout.table, decomposition.loaded.tokenizer
    missing = _missing_tokens(tokenizer, table)
    most = min(TOKENS_OF_A_NEURON, len(table) - len(missing))
    text = functools.cache(lambda token: tokenizer.decode([token]))
    for (component, layer), group in _by(neurons.to_pylist(), "component", "layer"):
        columns = decomposition.ffn_columns(layer) if component == "ffn" else decomposition.attn_columns(layer)
        width = decomposition.head_size
        for start in range(0, len(group), 256):
            some = group[start : start + 256]
            slot = decomposition.ffn_layout(layer).slot
            rows = [
                slot(r["expert"], r["neuron"]) if component == "ffn" else r["head"] * width + r["neuron"] for r in some
            ]
            with torch.inference_mode():
                logits = columns[rows] @ table.T
                ends = []
                for largest, never in ((True, -torch.inf), (False, torch.inf)):
                    logits[:, missing] = never
                    ends.append(logits.topk(most, dim=1, largest=largest))
            for sign, end in zip(("top", "bottom"), ends, strict=True):
                yield pa.Table.from_pylist(
                    [
                        {
                            **row,
                            "sign": sign,
                            "rank": j + 1,
                            "token": text(end_tokens[j]),
                            "token_id": end_tokens[j],
                            "logit": end_logits[j],
                        }
                        for row, end_tokens, end_logits in zip(
                            some, end.indices.tolist(), end.values.tolist(), strict=True
                        )
                        for j in range(most)
                    ],
                    arrow_schema("neuron_tokens"),
                )
            on_batch(len(some))


def _missing_tokens(tokenizer: Any, table: torch.Tensor) -> torch.Tensor:
    """Rows of the unembedding that are no token of the tokenizer: padding to a round number of rows."""
    import torch

    missing = sorted(set(range(len(table))).difference(tokenizer.get_vocab().values()))
    return torch.tensor(missing, dtype=torch.long, device=table.device)


def _by(rows: Sequence[dict[str, Any]], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    yield from groups.items()
