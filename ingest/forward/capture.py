"""Capture the last token's hidden state at every layer and site, in one batched forward pass.

Prompts are padded on the right: in a causal model, a token cannot change the states before it, so padding cannot
change a result and needs no mask. For the same reason, a cue that asks for the answer may follow each prompt. A prefix
that all prompts share is run once. The unembedding, a third of a small model's work, is not run here. In models whose
RoPE depends on the length of a text, only texts of one length class (``length_classes.py``) share a pass.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdb.errors import ModelError
from kdb.ingest.forward.length_classes import LengthClasses, forget_longest
from kdb.ingest.forward.memory import tokens_at_once
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.models.structure import ModelStructure, find_structure
from kdb.ingest.models.trace import first_tensor, without_cache
from kdb.queries.domains import SITES

if TYPE_CHECKING:
    import torch


def shared_prefix(token_ids: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all prompts share; the last token of a prompt is never part of it."""
    first, last = min(map(tuple, token_ids)), max(map(tuple, token_ids))
    longest = min(len(ids) for ids in token_ids) - 1
    return next((i for i in range(longest) if first[i] != last[i]), longest)


def batches(
    lengths: Sequence[int], budget: int, length_class: Callable[[int], Hashable], at_most: int | None = None
) -> Iterator[list[int]]:
    """Split prompts, given by falling length, into batches of one length class and at most ``budget`` padded tokens.

    A batch has at most ``at_most`` prompts, if given. Yields indices into ``lengths``.
    """
    start = 0
    while start < len(lengths):
        same, room = length_class(lengths[start]), max(1, budget // lengths[start])
        limit = min(start + min(room, at_most or room), len(lengths))
        stop = start + 1
        while stop < limit and length_class(lengths[stop]) == same:
            stop += 1
        yield list(range(start, stop))
        start = stop


def padded(token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids of a batch (prompt, position), with zeros after the end of each prompt."""
    import torch

    return torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in token_ids], batch_first=True)


@dataclass(frozen=True)
class _Way:
    """Options of a forward pass: after a cached prefix or whole, with the cue or without.

    ``states``: whether to capture hidden states. A pass with the cue also captures the state that predicts the answer.
    """

    cached: bool
    cued: bool
    states: bool


class Capture:
    """Captures hidden states of a loaded model; no hook stays attached to it."""

    def __init__(self, loaded: LoadedModel, *, batch_tokens: int | None = None) -> None:
        self.loaded = loaded
        self.structure: ModelStructure = find_structure(loaded.model)
        self.batch_tokens = batch_tokens or tokens_at_once(loaded)
        # Where padding would change a state, only texts of one length share a pass.
        self._length_class = LengthClasses(loaded.model.config) if self.structure.can_pad else int
        self._prefix: tuple[int, ...] = ()
        self._prefix_cache: Any = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one prompt's vectors: (layer, site, hidden)."""
        return len(self.structure.blocks), len(SITES), self.structure.hidden_size

    @property
    def lacking(self) -> set[tuple[int, str]]:
        """Layers and sites whose vectors are NaN, because the block has no FFN whose input could be read."""
        return {(layer, "ffn_norm") for layer, ffn in enumerate(self.structure.ffns) if ffn is None}

    @functools.cached_property
    def caches_prefixes(self) -> bool:
        """Whether a prefix can be run once; not in models that keep a state instead of each token's keys and values."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

        model = self.loaded.model
        takes = "past_key_values" in signature(self.structure.decoder.forward).parameters
        if not takes or not self.structure.can_pad or model._is_stateful or self.structure.layout.n_before:
            return False
        layers = DynamicCache(config=model.config).layers
        stateful = LinearAttentionCacheLayerMixin
        return all(isinstance(layer, DynamicLayer) and not isinstance(layer, stateful) for layer in layers)

    def vectors(self, token_ids: Sequence[Sequence[int]], prefix: Sequence[int] = ()) -> NDArray[np.float32]:
        """Capture the hidden states (prompt, layer, site, hidden) of each prompt's last token, in the order given.

        ``prefix`` are tokens that every prompt begins with; they are run once and cached.
        """
        return self.vectors_and_ends(token_ids, prefix)[0]

    def vectors_and_ends(
        self,
        token_ids: Sequence[Sequence[int]],
        prefix: Sequence[int] = (),
        cue: Sequence[int] = (),
        on_batch: Callable[[int], None] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Capture the same, and the last block's output (prompt, hidden) at the last token of the cue.

        ``cue`` are tokens that follow every prompt; in a causal model they cannot change the prompt's own states.
        ``on_batch`` is called after each batch with its number of prompt tokens.
        """
        import torch

        vectors = np.empty((len(token_ids), *self.shape), dtype=np.float32)
        ends = np.empty((len(token_ids), self.shape[-1]), dtype=np.float32)
        n_prefix = len(prefix) if prefix and self.caches_prefixes else 0
        ways = self._ways([len(ids) for ids in token_ids], n_prefix, len(cue))
        with torch.inference_mode():
            for way, prompts in ways.items():
                before, behind = tuple(prefix) if way.cached else (), tuple(cue) if way.cued else ()
                for rows, states, after in self._batched(token_ids, prompts, before, behind):
                    if way.cued:
                        ends[rows] = after
                    if way.states:
                        vectors[rows] = states
                        if on_batch is not None:
                            on_batch(sum(len(token_ids[row]) for row in rows))
        return vectors, ends

    def _ways(self, lengths: Sequence[int], n_prefix: int, n_cue: int) -> dict[_Way, list[int]]:
        """Choose the forward passes of the prompts; ordinary models need only one kind of pass.

        If the cue would put a prompt into another length class, the prompt runs twice, first without the cue. A cached
        prefix is used for prompts of its own class only.
        """
        ways: dict[_Way, list[int]] = {}
        of = self._length_class
        for row, n in enumerate(lengths):
            together = of(n) == of(n + n_cue)
            for cued in [True] if together else [False, True]:
                cached = n_prefix > 0 and of(n_prefix) == of(n + n_cue * cued)
                ways.setdefault(_Way(cached, cued, states=together or not cued), []).append(row)
        return ways

    def _batched(
        self, token_ids: Sequence[Sequence[int]], prompts: Sequence[int], prefix: tuple[int, ...], cue: tuple[int, ...]
    ) -> Iterator[tuple[list[int], NDArray[np.float32], NDArray[np.float32]]]:
        """Run prompts, given by index, in batches; yield their indices, hidden states and last blocks' outputs."""
        import torch

        n_prefix = len(prefix)
        order = sorted(prompts, key=lambda i: -len(token_ids[i]))
        lengths = [len(token_ids[i]) - n_prefix + len(cue) for i in order]
        while order:
            n = len(next(batches(lengths, self.batch_tokens, lambda n: self._length_class(n + n_prefix))))
            rows = order[:n]
            texts = [[*token_ids[row][n_prefix:], *cue] for row in rows]
            try:
                results = self._run(texts, prefix, len(cue))
            except torch.OutOfMemoryError:
                self._halve(n, lengths[0])
                continue
            yield rows, *results
            order, lengths = order[n:], lengths[n:]

    def _halve(self, n: int, n_tokens: int) -> None:
        """Halve the tokens of a batch from now on. Raises ModelError if ``n`` is one prompt already."""
        import torch

        if n == 1:
            raise ModelError(
                f"A prompt of {n_tokens:,} tokens does not fit into the memory that {self.loaded.source.name} leaves: "
                "use --quantize int8, --dtype bfloat16, or a device with more memory."
            )
        self.batch_tokens = n * n_tokens // 2
        torch.cuda.empty_cache()

    def _run(
        self, token_ids: Sequence[Sequence[int]], prefix: tuple[int, ...], n_cue: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        import torch

        device = self.loaded.device
        ids = padded(token_ids)
        end = torch.tensor([len(tokens) - 1 for tokens in token_ids], device=device)
        states = torch.full((len(token_ids), *self.shape), torch.nan, device=device)  # where a block has no FFN
        ends = torch.empty(len(token_ids), self.shape[-1], device=device)
        forget_longest(self.loaded)
        cache = self._expanded(prefix, len(token_ids))
        with self._recording(states, end - n_cue, ends, end):
            cached = {"past_key_values": cache, "use_cache": True} if cache else without_cache(self.structure.decoder)
            self.structure.decoder(ids.to(device), **cached)
        return states.cpu().numpy(), ends.cpu().numpy()

    @contextlib.contextmanager
    def _recording(
        self, states: torch.Tensor, last: torch.Tensor, ends: torch.Tensor, end: torch.Tensor
    ) -> Iterator[None]:
        """Hooks that copy the states of each row's token ``last`` into ``states`` (prompt, layer, site, hidden).

        The last block's output at the row's token ``end`` is copied into ``ends`` (prompt, hidden).
        """
        import torch

        rows = torch.arange(len(last), device=last.device)

        def keep(out: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> None:
            at = rows.to(hidden.device), positions.to(hidden.device)  # blocks may be on different GPUs
            out[:] = self.structure.layout.states(hidden, len(rows))[at].float()

        def output(out: torch.Tensor, positions: torch.Tensor) -> Callable[..., None]:
            return lambda _module, _inputs, output: keep(out, first_tensor(output), positions)

        with contextlib.ExitStack() as hooks:
            for layer, (block, ffn) in enumerate(zip(self.structure.blocks, self.structure.ffns, strict=True)):
                resid, normed = (states[:, layer, SITES.index(site)] for site in ("resid_post", "ffn_norm"))
                hooks.enter_context(block.register_forward_hook(output(resid, last)))
                if ffn is None:
                    continue
                hooks.enter_context(
                    ffn.register_forward_pre_hook(
                        lambda _m, args, kwargs, out=normed: keep(
                            out, first_tensor(args or tuple(kwargs.values())), last
                        ),
                        with_kwargs=True,
                    )
                )
            hooks.enter_context(self.structure.blocks[-1].register_forward_hook(output(ends, end)))
            yield

    def _expanded(self, prefix: tuple[int, ...], n_rows: int) -> Any:
        """Copy the cache of the prefix for each of ``n_rows`` prompts; None without a prefix."""
        import torch
        from transformers import DynamicCache

        if not prefix:
            return None
        if prefix != self._prefix:
            ids = torch.tensor([prefix], device=self.loaded.device)
            cache = DynamicCache(config=self.loaded.model.config)
            self.structure.decoder(ids, past_key_values=cache, use_cache=True)
            self._prefix, self._prefix_cache = prefix, cache
        # Copied as a whole: a sliding layer holds only the end of the prefix, but counts its positions from the start.
        fresh = copy.deepcopy(self._prefix_cache)
        fresh.batch_repeat_interleave(n_rows)
        return fresh


def gemm_rate(k: int, n: int, dtype: str, device: str) -> float:
    """Measure the FLOP/s of a plain matrix product (512, k) × (k, n) on this device."""
    import torch

    a = torch.randn(512, k, device=device, dtype=getattr(torch, dtype))
    b = torch.randn(n, k, device=device, dtype=a.dtype)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        torch.nn.functional.linear(a, b).sum().item()  # .item() waits for an asynchronous device
        times.append(time.perf_counter() - begun)
    return 2 * 512 * k * n / min(times)
