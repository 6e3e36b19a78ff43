"""Replace parts of a forward pass by other values, and measure what changes in the output.

A part is what a head, an attention layer, an FFN layer or one FFN neuron adds to the residual stream, or the stream
itself after a block. Exact patching (Vig et al. 2020, arXiv 2004.12265; Zhang and Nanda 2023, arXiv 2309.16042) runs
the model with the replacement: the tokens before the first patched one are cached, the blocks before the patched one
are skipped, and everything behind is computed anew, norms included. Attribution patching estimates the same from one
backward pass: :mod:`kdb.ingest.forward.gradients`.

Only prompts of one length share a batch, so no row has padding.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdb.errors import ModelError
from kdb.ingest.forward.blocks import Block
from kdb.ingest.forward.decomposition import Decomposition
from kdb.ingest.forward.length_classes import forget_longest
from kdb.ingest.forward.memory import tokens_at_once

if TYPE_CHECKING:
    import torch
    from torch import nn

LOGITS_BYTES = 256 * 2**20
"""Memory for the logits of one batch, and for what is computed from them."""

CACHE_BYTES = 512 * 2**20
"""Memory for the cached keys and values of one batch."""


_NOTHING = 0.0
"""Output of a layer without the component: zeros of its width."""

SMALL_ROWS = 64
"""Rows of a batch below which patches of several layers share it."""


@dataclass(frozen=True, order=True)
class Part:
    """A part of a model. ``head`` is −1 unless the component is 'head', ``neuron`` unless it is 'ffn_neuron'."""

    component: str
    layer: int
    head: int = -1
    neuron: int = -1


@dataclass(frozen=True)
class Pass:
    """A prompt that is run with replacements at ``positions``; ``rival`` is −1 if it has none."""

    token_ids: Sequence[int]
    positions: tuple[int, ...]
    target: int
    rival: int = -1


@dataclass(frozen=True)
class Patch:
    """One replacement in the pass with this index: ``values`` (position, width) are put where the part writes."""

    of: int
    part: Part
    values: torch.Tensor


@dataclass(frozen=True)
class Together:
    """Several replacements at once in the pass with this index.

    ``values``: by component and layer, some entries of what the component writes, and their values (position, entry).
    """

    of: int
    values: Mapping[tuple[str, int], tuple[Sequence[int], torch.Tensor]]


@dataclass(frozen=True)
class Changes:
    """Changes (patch) by each replacement, with it minus without.

    ``logp`` is that of the target's log-probability, ``logit_diff`` that of its logit minus the rival's (NaN without
    one), ``kl`` the KL divergence, in nats, of the output with it from that without.
    """

    logp: NDArray[np.float64]
    logit_diff: NDArray[np.float64]
    kl: NDArray[np.float64]


def width(decomposition: Decomposition, component: str) -> int:
    """Number of entries that all parts of one component write in a layer."""
    heads, neurons = decomposition.n_heads * decomposition.head_size, decomposition.n_slots
    return {"head": heads, "ffn_neuron": neurons}.get(component, decomposition.hidden_size)


def entries(decomposition: Decomposition, part: Part) -> slice:
    """The entries of a layer that one part writes."""
    if part.component == "head":
        size = decomposition.head_size
        return slice(part.head * size, (part.head + 1) * size)
    return slice(part.neuron, part.neuron + 1) if part.component == "ffn_neuron" else slice(None)


def place(block: Block, component: str) -> tuple[nn.Module, bool]:
    """The module at which a component is read and replaced, and whether it is there the module's input."""
    if component == "head":
        assert block.attn_out is not None
        return block.attn_out, True
    if component == "resid":
        return block.module, False
    # A norm behind attention or FFN (Gemma 2 and 3) is part of what is added.
    post, out = {
        "attn": (block.attn_post, block.attn_out),
        "ffn": (block.ffn_post, block.ffn.total),
        "mixer": (None, block.mixer),
    }[component]
    module = out if post is None else post.module
    if module is None:
        raise ModelError("The FFN of this model is a sum that no module computes, so that it cannot be replaced.")
    return module, False


Touch = Callable[[str, int, "torch.Tensor"], "torch.Tensor | None"]


@contextlib.contextmanager
def touched(
    decomposition: Decomposition,
    components: Sequence[str],
    shape: tuple[int, int],
    touch: Touch,
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Call ``touch(component, layer, states)`` with the states (row, position, width) of each component in a pass.

    ``shape`` is the shape (row, position) of the input. What ``touch`` returns, if not None, takes the states' place.
    A layer's FFN neurons may come in several calls, one for each projection, with zeros for the others. Heads are those
    of the layer that has most and largest, with zeros for what a layer lacks. Layers without the component are left
    out.
    """
    with contextlib.ExitStack() as hooks:
        for layer in range(len(decomposition.blocks)) if layers is None else layers:
            for component in components:
                if component == "ffn_neuron":
                    for watched in _touching_neurons(decomposition, layer, shape, touch):
                        hooks.enter_context(watched)
                elif _has(decomposition.blocks[layer], component):
                    module, is_input = place(decomposition.blocks[layer], component)
                    watch = _padding_heads(decomposition, layer, touch) if component == "head" else touch
                    hooks.enter_context(_touching(module, is_input, component, layer, shape, watch))
        yield


def can_be_replaced(decomposition: Decomposition, component: str) -> bool:
    """Whether a module computes what each layer writes of a component, so that it can be replaced there."""
    if component != "ffn":
        return True
    blocks = [block for block in decomposition.blocks if block.has("ffn")]
    return all((block.ffn.total if block.ffn_post is None else block.ffn_post.module) is not None for block in blocks)


def has_part(decomposition: Decomposition, part: Part) -> bool:
    """Whether the model has this part: the component in its layer, with so many heads or slots."""
    few = part.head < decomposition.heads_in(part.layer) and part.neuron < decomposition.ffn_layout(part.layer).size
    return _has(decomposition.blocks[part.layer], part.component) and few


def _has(block: Block, component: str) -> bool:
    """Whether the block writes something of a component of `kdb.queries.domains.PARTS`."""
    return component == "resid" or block.has({"head": "attn", "ffn_neuron": "ffn"}.get(component, component))


def _padding_heads(decomposition: Decomposition, layer: int, touch: Touch) -> Touch:
    """Let ``touch`` see the heads of a layer among those of the layer that has most and largest."""
    import torch

    n, size = decomposition.heads_in(layer), decomposition.head_size_in(layer)
    more_heads, more_entries = decomposition.n_heads - n, decomposition.head_size - size
    if not (more_heads or more_entries):
        return touch

    def padded_touch(component: str, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        padded = torch.nn.functional.pad(states.unflatten(-1, (n, size)), (0, more_entries, 0, more_heads))
        new = touch(component, layer, padded.flatten(-2))
        return None if new is None else new.unflatten(-1, padded.shape[-2:])[..., :n, :size].flatten(-2)

    return padded_touch


def _touching_neurons(decomposition: Decomposition, layer: int, shape: tuple[int, int], touch: Touch) -> Iterator[Any]:
    """Hooks on the sources of a layer's FFN."""
    n, start = decomposition.n_slots, 0
    for source in decomposition.blocks[layer].ffn.sources:
        watch = functools.partial(_changed_slots, layer, start, n, shape, touch)
        yield source.part.watched(watch)
        start += source.part.size


def _changed_slots(
    layer: int, start: int, n_slots: int, shape: tuple[int, int], touch: Touch, fired: torch.Tensor
) -> torch.Tensor | None:
    """Let ``touch`` see the coefficients (token, neuron) of a source among all slots, and return those that it sets."""
    import torch

    size = fired.shape[-1]
    every = fired if size == n_slots else torch.nn.functional.pad(fired, (start, n_slots - start - size))
    new = touch("ffn_neuron", layer, every.reshape(*shape, n_slots))
    return None if new is None else new.reshape(-1, n_slots)[:, start : start + size]


def _touching(module: nn.Module, is_input: bool, component: str, layer: int, shape: tuple[int, int], touch: Any) -> Any:
    def changed(states: torch.Tensor) -> torch.Tensor | None:
        new = touch(component, layer, states.reshape(*shape, states.shape[-1]))
        return None if new is None else new.reshape(states.shape).to(states.dtype)

    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = changed(args[0])
        return None if new is None else (new, *args[1:])

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = changed(output[0] if isinstance(output, tuple) else output)
        return None if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_pre_hook(before) if is_input else module.register_forward_hook(after)


def recorded(
    decomposition: Decomposition,
    token_ids: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    components: Sequence[str],
) -> list[dict[str, torch.Tensor]]:
    """Run prompts, and return for each what every component writes at its positions: (layer, position, width).

    The values are float32, on the CPU. ``components`` are some of `kdb.queries.domains.PARTS`.
    """
    import torch

    n_layers = len(decomposition.blocks)
    found: list[dict[str, list[Any]]] = [{c: [_NOTHING] * n_layers for c in components} for _ in token_ids]
    device = decomposition.loaded.device
    most = tokens_at_once(decomposition.loaded)
    for rows in same_length(token_ids, most):
        ids = torch.tensor([token_ids[i] for i in rows], device=device)

        def keep(component: str, layer: int, states: torch.Tensor, rows: list[int] = rows) -> None:
            values = states.float().cpu()
            for row, i in enumerate(rows):
                found[i][component][layer] = found[i][component][layer] + values[row, list(positions[i])]

        forget_longest(decomposition.loaded)
        with torch.inference_mode(), touched(decomposition, components, (ids.shape[0], ids.shape[1]), keep):
            decomposition.structure.decoder(ids, use_cache=False)
    none = [{c: torch.zeros(len(at), width(decomposition, c)) for c in components} for at in positions]
    return [
        {c: torch.stack([zeros[c] if value is _NOTHING else value for value in values]) for c, values in one.items()}
        for one, zeros in zip(found, none, strict=True)
    ]


def same_length(token_ids: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Yield the numbers of prompts of one length, at most ``most`` tokens (but one prompt) at a time."""
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(token_ids):
        by_length.setdefault(len(ids), []).append(i)
    for length, rows in sorted(by_length.items()):
        size = max(1, most // length)
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


def patched(
    decomposition: Decomposition,
    passes: Sequence[Pass],
    patches: Sequence[Patch],
) -> Changes:
    """Run the model once for each patch, and return what changes, in the order of ``patches``."""
    out = Changes(*(np.empty(len(patches)) for _ in range(3)))
    for numbers, rows, prompts, logits in run_patched(decomposition, passes, patches):
        out.logp[numbers], out.logit_diff[numbers], out.kl[numbers] = prompts.compared(rows, logits)
    return out


def run_patched(
    decomposition: Decomposition, passes: Sequence[Pass], patches: Sequence[Patch | Together]
) -> Iterator[tuple[list[int], list[int], Prompts, torch.Tensor]]:
    """Run the model once for each patch, in batches, and yield the logits (row, vocab) of each batch.

    Before them stand the numbers of its patches, their rows among the batch's prompts, and these prompts.
    """
    by_pass: dict[int, list[int]] = {}
    for number, patch in enumerate(patches):
        by_pass.setdefault(patch.of, []).append(number)
    first = [min(_layers(patch)) for patch in patches]
    for some in _alike([passes[i] for i in by_pass], tokens_at_once(decomposition.loaded)):
        these = [list(by_pass)[i] for i in some]
        prompts = Prompts(decomposition, [passes[i] for i in these])
        row_of = {i: row for row, i in enumerate(these)}
        numbers = sorted((n for i in these for n in by_pass[i]), key=first.__getitem__)
        for batch in prompts.batches(numbers, [first[n] for n in numbers]):
            rows = [row_of[patches[n].of] for n in batch]
            yield batch, rows, prompts, prompts.patched_logits(rows, [patches[n] for n in batch])


def _layers(patch: Patch | Together) -> list[int]:
    return [patch.part.layer] if isinstance(patch, Patch) else [layer for _component, layer in patch.values]


def _alike(passes: Sequence[Pass], most: int) -> Iterator[list[int]]:
    """Yield the numbers of passes that share their length and first patched position, ``most`` tokens at a time."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, one in enumerate(passes):
        groups.setdefault((len(one.token_ids), min(one.positions)), []).append(i)
    for (length, _start), rows in sorted(groups.items()):
        size = max(1, most // length)
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


class Prompts:
    """Prompts of one length, run once without replacements from their first patched position on."""

    def __init__(self, decomposition: Decomposition, passes: Sequence[Pass]) -> None:
        import torch

        self.decomposition, self.passes, device = decomposition, passes, decomposition.loaded.device
        self.start = min(passes[0].positions) if decomposition.can_resume else 0
        ids = torch.tensor([list(p.token_ids) for p in passes], device=device)
        self.ids, self.target = ids[:, self.start :], torch.tensor([p.target for p in passes], device=device)
        self.rival = torch.tensor([p.rival for p in passes], device=device)
        self.blocks = [block.module for block in decomposition.blocks]
        self.before: list[torch.Tensor] = []  # block inputs (row, position, hidden)
        self.tuples: list[int] = []  # the number of a block's outputs, 0 if it is not a tuple
        forget_longest(decomposition.loaded)
        with torch.inference_mode():
            self.cache = self._cached(ids[:, : self.start])
            with contextlib.ExitStack() as hooks:
                for block in self.blocks:
                    hooks.enter_context(block.register_forward_hook(self._keep, with_kwargs=True))
                self.logits = self._last_logits(self.ids, self._rows(list(range(len(passes)))))
            self.log_p = self.logits.log_softmax(-1)
            self.p = self.log_p.exp()

    def _keep(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.before.append(args[0] if args else kwargs["hidden_states"])
        self.tuples.append(len(output) if isinstance(output, tuple) else 0)

    def _cached(self, ids: torch.Tensor) -> Any:
        if not ids.shape[1]:
            return None
        from transformers import DynamicCache

        cache = DynamicCache(config=self.decomposition.loaded.model.config)
        self.decomposition.structure.decoder(ids, past_key_values=cache, use_cache=True)
        return cache

    def _rows(self, rows: Sequence[int]) -> Any:
        """Copy the cache of some prompts; a prompt may stand in several rows."""
        import torch

        if self.cache is None:
            return None
        fresh = copy.copy(self.cache)
        fresh.layers = [copy.copy(layer) for layer in self.cache.layers]
        fresh.batch_select_indices(torch.tensor(rows, device=self.ids.device))
        return fresh

    def _last_logits(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        structure = self.decomposition.structure
        hidden = structure.decoder(ids, past_key_values=cache, use_cache=cache is not None)[0]
        return structure.unembed_normed(hidden[:, -1]).float()

    def batches(self, numbers: Sequence[int], layers: Sequence[int]) -> Iterator[list[int]]:
        """Divide patches, by rising layer, into batches that fit into memory.

        A batch begins at its first patched block. It is of one layer, or so small that reading the weights takes
        longer than the blocks that some of its rows could have skipped.
        """
        most = max(1, tokens_at_once(self.decomposition.loaded) // self.ids.shape[1])
        most = min(most, max(1, LOGITS_BYTES // (16 * self.logits.shape[1])))
        if self.cache is not None:
            used = [layer for layer in self.cache.layers if layer.keys is not None]  # Mllama skips some without images
            kept = sum(layer.keys[0].nbytes + layer.values[0].nbytes for layer in used)
            most = min(most, max(1, CACHE_BYTES // max(1, kept)))
        if not self.decomposition.can_resume:  # no row can skip a block
            layers = [0] * len(numbers)
        start = 0
        while start < len(numbers):
            stop = next((i for i in range(start, len(numbers)) if layers[i] != layers[start]), len(numbers))
            stop = min(max(stop, start + SMALL_ROWS), start + most, len(numbers))
            yield list(numbers[start:stop])
            start = stop

    def patched_logits(self, rows: Sequence[int], patches: Sequence[Patch | Together]) -> torch.Tensor:
        """Run some prompts with one patch each, by rising layer; return the logits (patch, vocab) of the last token."""
        import torch

        by_place: dict[tuple[str, int], list[tuple[int, slice | Sequence[int], torch.Tensor]]] = {}
        for row, patch in enumerate(patches):
            for place, which, values in self._replaced(patch):
                by_place.setdefault(place, []).append((row, which, values))
        at = [torch.tensor(self.passes[row].positions) - self.start for row in rows]

        def replace(component: str, layer: int, states: torch.Tensor) -> torch.Tensor | None:
            if (component, layer) not in by_place:
                return None
            new = states.clone()
            for row, which, values in by_place[component, layer]:
                if isinstance(which, slice):
                    new[row, at[row], which] = values.to(new)
                else:
                    new[row, at[row][:, None], torch.tensor(which)] = values.to(new)
            return new

        components, layers = sorted({c for c, _layer in by_place}), sorted({layer for _c, layer in by_place})
        with (
            torch.inference_mode(),
            self._from(layers[0] if self.decomposition.can_resume else 0, rows),
            touched(self.decomposition, components, (len(rows), self.ids.shape[1]), replace, layers),
        ):
            return self._last_logits(self.ids[list(rows)], self._rows(rows))

    def _replaced(
        self, patch: Patch | Together
    ) -> Iterator[tuple[tuple[str, int], slice | Sequence[int], torch.Tensor]]:
        if isinstance(patch, Patch):
            part = patch.part
            yield (part.component, part.layer), entries(self.decomposition, part), patch.values
        else:
            yield from ((place, which, values) for place, (which, values) in patch.values.items())

    def compared(self, rows: Sequence[int], logits: torch.Tensor) -> tuple[Any, Any, Any]:
        """The changes (patch) of ``Changes``, from the logits with one patch in each of these rows."""
        import torch

        with torch.inference_mode():
            return self._compared(torch.tensor(rows, device=logits.device), logits)

    def _compared(self, rows: torch.Tensor, logits: torch.Tensor) -> tuple[Any, Any, Any]:
        import torch

        log_q, log_p = logits.log_softmax(-1), self.log_p[rows]
        every, target, rival = torch.arange(len(rows), device=rows.device), self.target[rows], self.rival[rows]
        logp = log_q[every, target].double() - log_p[every, target]
        # A difference of two logits is one of log-probabilities, too.
        beside = log_q[every, rival.clamp_min(0)].double() - log_p[every, rival.clamp_min(0)]
        kl = (log_p.sub_(log_q) * self.p[rows]).sum(-1, dtype=torch.float64).clamp_min(0)
        diff = (logp - beside).masked_fill(rival < 0, torch.nan)
        return logp.cpu().numpy(), diff.cpu().numpy(), kl.cpu().numpy()

    @contextlib.contextmanager
    def _from(self, layer: int, rows: Sequence[int]) -> Iterator[None]:
        """Let a pass begin at a block, with its recorded input; the blocks before it return what they are given."""

        def skipped(n_outputs: int) -> Callable[..., Any]:
            def forward(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
                return (hidden_states, *[None] * (n_outputs - 1)) if n_outputs else hidden_states

            return forward

        def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            states = self.before[layer][list(rows)]
            if "hidden_states" in kwargs:
                return args, kwargs | {"hidden_states": states}
            return (states, *args[1:]), kwargs

        with contextlib.ExitStack() as stack:
            for block, n_outputs in zip(self.blocks[:layer], self.tuples, strict=False):
                block.forward = skipped(n_outputs)
                stack.callback(delattr, block, "forward")
            stack.enter_context(self.blocks[layer].register_forward_pre_hook(begin, with_kwargs=True))
            yield
