"""Read states of the residual stream through the final norm and the unembedding (the logit lens).

nostalgebraist 2020, "interpreting GPT: the logit lens": the norm's scale is computed anew, and the readout after the
last block is the model's own output. Rows are those of ``lens_readouts``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kdb.ingest.forward.length_classes import forget_longest
from kdb.ingest.forward.memory import tokens_at_once
from kdb.ingest.forward.patching import LOGITS_BYTES, place

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdb.ingest.forward.blocks import Block
    from kdb.ingest.models.find import LoadedModel
    from kdb.ingest.models.structure import ModelStructure

TOKENS = 5
"""Number of tokens that each readout stores."""

STATES_BYTES = 256 * 2**20
"""Bytes of memory for the residual stream of prompts that are run together."""

Place = tuple[int, str]
"""A layer, and where in its block the residual stream is read: resid_pre, resid_mid or resid_post."""


def places(n_layers: int, blocks: Sequence[Block] | None = None) -> list[Place]:
    """List the places of a model, in its order; those between attention and FFN only if its blocks are given.

    Attention and FFN of a parallel block add to the same residual, so it has no middle; nor has a block without FFN.
    """
    found: list[Place] = [(0, "resid_pre")]
    for layer in range(n_layers):
        if blocks is not None and blocks[layer].middle:
            found.append((layer, "resid_mid"))
        found.append((layer, "resid_post"))
    return found


def residuals(
    loaded: LoadedModel,
    structure: ModelStructure,
    token_ids: Sequence[Sequence[int]],
    blocks: Sequence[Block] | None = None,
) -> torch.Tensor:
    """Run prompts of one length; return the residual stream (place, prompt, position, hidden) at all `places`, float32."""
    import torch

    ids = torch.tensor([list(tokens) for tokens in token_ids], device=loaded.device)
    seen: dict[Place, torch.Tensor] = {}
    forget_longest(loaded)
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        first = structure.blocks[0].register_forward_pre_hook(_before(seen, tuple(ids.shape)), with_kwargs=True)
        hooks.enter_context(first)
        for layer, module in enumerate(structure.blocks):
            hooks.enter_context(module.register_forward_hook(_after(seen, (layer, "resid_post"), tuple(ids.shape))))
            for component in () if blocks is None else blocks[layer].middle:
                written, _is_input = place(blocks[layer], component)
                hooks.enter_context(written.register_forward_hook(_after(seen, (layer, component), tuple(ids.shape))))
        structure.decoder(ids, use_cache=False)
        return torch.stack(list(_in_order(seen, places(len(structure.blocks), blocks), blocks)))


def _before(seen: dict[Place, torch.Tensor], shape: tuple[int, ...]) -> Callable[..., None]:
    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        seen[0, "resid_pre"] = states.reshape(*shape, states.shape[-1]).float()

    return keep


def _after(seen: dict[Place, torch.Tensor], at: Place, shape: tuple[int, ...]) -> Callable[..., None]:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        seen[at] = states.reshape(*shape, states.shape[-1]).float()

    return keep


def _in_order(
    seen: dict[Place, torch.Tensor], wanted: Sequence[Place], blocks: Sequence[Block] | None
) -> Iterator[torch.Tensor]:
    for layer, where in wanted:
        if where == "resid_mid" and blocks is not None:
            residual = seen[(layer - 1, "resid_post") if layer else (0, "resid_pre")]
            for component in blocks[layer].middle:
                residual = residual + seen[layer, component] * blocks[layer].additions.multipliers[component]
            yield residual
        else:
            yield seen[layer, where]


def tokens_of_states(loaded: LoadedModel, n_places: int) -> int:
    """Number of tokens that are run together, so that their residual stream at all places fits into memory."""
    hidden = int(loaded.model.config.get_text_config().hidden_size)
    return max(1, min(tokens_at_once(loaded), STATES_BYTES // (4 * hidden * n_places)))


# Reading ---------------------------------------------------------------------------------------------------------


def read(loaded: LoadedModel, structure: ModelStructure, states: torch.Tensor) -> torch.Tensor:
    """Compute the logits (…, vocab), in float32, of states (…, hidden) in the model's number format."""
    import torch

    return structure.readout(states.to(getattr(torch, loaded.dtype))).float()


def positions_at_once(loaded: LoadedModel) -> int:
    """Number of positions whose logits fit into memory together, with what is computed from them."""
    return max(1, LOGITS_BYTES // (16 * int(loaded.model.config.get_text_config().vocab_size)))


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (prompt, vocab) whose exponentials add up to 1 better than those of ``log_softmax``.

    In float32, these miss 1 by 1e-5 at usual logits, which a divergence of 100 nats makes 1e-3.
    """
    import torch

    log_p = logits.float().log_softmax(-1)
    return log_p - log_p.exp().sum(-1, keepdim=True, dtype=torch.float64).log().to(log_p)


def texts_of(tokenizer: Any) -> Callable[[int], str]:
    """Return the function from a token to its text, which remembers the texts."""
    return functools.cache(lambda token: str(tokenizer.decode([token])))


def readouts(
    logits: torch.Tensor,
    final: torch.Tensor,
    target: Sequence[int],
    rival: Sequence[int],
    text: Callable[[int], str],
) -> Iterator[dict[str, Any]]:
    """The columns of ``lens_readouts`` for readouts (prompt, vocab), as logits.

    ``final`` (prompt, vocab) are the log-probabilities of the model's own output. ``target`` and ``rival`` are tokens;
    −1 where there is none, whose columns are NULL.
    """
    import torch

    log_q = logits.log_softmax(-1)
    every = torch.arange(len(logits), device=logits.device)
    best = log_q.topk(min(TOKENS, log_q.shape[1]), dim=1)
    columns = {
        "entropy": -(log_q.exp() * log_q).sum(1, dtype=torch.float64),
        "kl": (final.exp() * (final - log_q)).sum(1, dtype=torch.float64).clamp_min(0),
        "tokens": best.indices,
        "logps": best.values,
    }
    for name, tokens in (("target", target), ("rival", rival)):
        own = torch.tensor([max(token, 0) for token in tokens], device=logits.device)
        columns[f"{name}_rank"] = 1 + (logits > logits[every, own, None]).sum(1)
        columns[f"{name}_logp"] = log_q[every, own].double()
    lists = {name: values.tolist() for name, values in columns.items()}
    for i in range(len(logits)):
        row = {name: values[i] for name, values in lists.items()}
        row["tokens"] = [text(one) for one in row["tokens"]]
        absent = [name for name, tokens in (("target", target), ("rival", rival)) if tokens[i] < 0]
        yield row | {f"{name}_{column}": None for name in absent for column in ("rank", "logp")}
