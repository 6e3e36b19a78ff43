"""One batched forward pass records the last token's hidden state at every layer and site.

Prompts are padded on the right: in a causal model nothing that comes later can change what came before, so
padding cannot change a result and needs no mask. A prefix that all prompts share is run once. For the same reason a
cue may follow each prompt, after which the model would answer. The unembedding, a third of a small model's work, is
not run here at all.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdb.errors import ModelError
from kdb.ingest.anatomy import SITES, Anatomy, describe
from kdb.ingest.memory import tokens_at_once
from kdb.ingest.models import LoadedModel

if TYPE_CHECKING:
    import torch

CHECK_PROMPTS = 8
"""Prompts on which each run is compared with the untouched model."""

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 2e-2}
"""Largest relative difference of a hidden state that rounding can explain, by the weights' dtype."""


def shared_prefix(token_ids: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all prompts share, short of each one's last."""
    first, last = min(map(tuple, token_ids)), max(map(tuple, token_ids))
    longest = min(len(ids) for ids in token_ids) - 1
    return next((i for i in range(longest) if first[i] != last[i]), longest)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Split prompts, given by falling length, into batches of at most ``budget`` padded tokens.

    Yields the prompts' places in ``lengths``.
    """
    start = 0
    while start < len(lengths):
        stop = start + max(1, budget // lengths[start])
        yield list(range(start, min(stop, len(lengths))))
        start = stop


class Capture:
    """Reads hidden states from a loaded model; nothing stays attached to it."""

    def __init__(self, loaded: LoadedModel, *, batch_tokens: int | None = None) -> None:
        self.loaded = loaded
        self.anatomy: Anatomy = describe(loaded.model)
        self.batch_tokens = batch_tokens or tokens_at_once(loaded)
        self._prefix: tuple[int, ...] = ()
        self._prefix_cache: Any = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, sites and hidden size of one prompt's vectors."""
        hidden = int(self.loaded.model.config.get_text_config().hidden_size)
        return len(self.anatomy.blocks), len(SITES), hidden

    def vectors(self, token_ids: Sequence[Sequence[int]], prefix: Sequence[int] = ()) -> NDArray[np.float32]:
        """Hidden states (prompt, layer, site, hidden) of each prompt's last token, in the order given.

        ``prefix`` is a run of tokens that every prompt begins with; it is run once and remembered.
        """
        return self.vectors_and_ends(token_ids, prefix)[0]

    def vectors_and_ends(
        self,
        token_ids: Sequence[Sequence[int]],
        prefix: Sequence[int] = (),
        cue: Sequence[int] = (),
        on_batch: Callable[[int], None] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same, and the last block's output (prompt, hidden) where the model would go on after the cue.

        ``cue`` are tokens that follow every prompt; in a causal model they cannot change the prompt's own states.
        ``on_batch`` is told after each batch how many tokens of prompts it had.
        """
        import torch

        vectors = np.empty((len(token_ids), *self.shape), dtype=np.float32)
        ends = np.empty((len(token_ids), self.shape[-1]), dtype=np.float32)
        order = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
        lengths = [len(token_ids[i]) - len(prefix) + len(cue) for i in order]
        with torch.inference_mode():
            while order:
                n = len(next(batches(lengths, self.batch_tokens)))
                rows = order[:n]
                texts = [[*token_ids[row][len(prefix) :], *cue] for row in rows]
                try:
                    vectors[rows], ends[rows] = self._run(texts, tuple(prefix), len(cue))
                except torch.OutOfMemoryError:
                    self._halve(n, lengths[0])
                    continue
                order, lengths = order[n:], lengths[n:]
                if on_batch is not None:
                    on_batch(sum(len(token_ids[row]) for row in rows))
        return vectors, ends

    def _halve(self, n: int, n_tokens: int) -> None:
        """Take half as many tokens from now on. Raises ModelError where ``n`` is one prompt already."""
        import torch

        if n == 1:
            raise ModelError(
                f"A prompt of {n_tokens:,} tokens does not fit into the memory that {self.loaded.source.name} leaves: "
                "give --quantize int8, --dtype bfloat16, or a device with more."
            )
        self.batch_tokens = n * n_tokens // 2
        torch.cuda.empty_cache()

    def _run(
        self, token_ids: Sequence[Sequence[int]], prefix: tuple[int, ...], n_cue: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        import torch

        device = self.loaded.device
        ids = torch.zeros(len(token_ids), max(map(len, token_ids)), dtype=torch.long)
        for row, tokens in enumerate(token_ids):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        end = torch.tensor([len(tokens) - 1 for tokens in token_ids], device=device)
        states = torch.empty(len(token_ids), *self.shape, device=device)
        ends = torch.empty(len(token_ids), self.shape[-1], device=device)
        cache = self._expanded(prefix, len(token_ids))
        with self._recording(states, end - n_cue, ends, end):
            self.anatomy.decoder(ids.to(device), past_key_values=cache, use_cache=cache is not None)
        return states.cpu().numpy(), ends.cpu().numpy()

    @contextlib.contextmanager
    def _recording(
        self, states: torch.Tensor, last: torch.Tensor, ends: torch.Tensor, end: torch.Tensor
    ) -> Iterator[None]:
        """Hooks that copy each row's token ``last`` into ``states`` (prompt, layer, site, hidden).

        And the last block's output at its token ``end`` into ``ends`` (prompt, hidden).
        """
        import torch

        rows = torch.arange(len(last), device=last.device)

        def keep(out: torch.Tensor, hidden: torch.Tensor, places: torch.Tensor) -> None:
            # OPT flattens batch and position before its FFN.
            at = rows.to(hidden.device), places.to(hidden.device)  # a block may lie on another GPU than the first
            out[:] = hidden.reshape(len(rows), -1, hidden.shape[-1])[at].float()

        handles = []
        for layer, (block, ffn) in enumerate(zip(self.anatomy.blocks, self.anatomy.ffns, strict=True)):
            resid, normed = states[:, layer, 0], states[:, layer, 1]
            handles += [
                block.register_forward_hook(lambda _m, _i, output, out=resid: keep(out, _tensor(output), last)),
                ffn.register_forward_pre_hook(lambda _m, inputs, out=normed: keep(out, inputs[0], last)),
            ]
        final = self.anatomy.blocks[-1]
        handles.append(final.register_forward_hook(lambda _m, _i, output: keep(ends, _tensor(output), end)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _expanded(self, prefix: tuple[int, ...], n_rows: int) -> Any:
        """A fresh cache that holds the prefix for each of ``n_rows`` prompts; None without a prefix."""
        import torch
        from transformers import DynamicCache

        if not prefix:
            return None
        if prefix != self._prefix:
            ids = torch.tensor([prefix], device=self.loaded.device)
            cache = DynamicCache(config=self.loaded.model.config)
            self.anatomy.decoder(ids, past_key_values=cache, use_cache=True)
            self._prefix, self._prefix_cache = prefix, cache
        # Copied whole: a sliding layer holds the end of the prefix alone, but counts its positions from the start.
        fresh = copy.deepcopy(self._prefix_cache)
        fresh.batch_repeat_interleave(n_rows)
        return fresh


def gemm_rate(k: int, n: int, dtype: str, device: str) -> float:
    """FLOP/s of a plain matrix product (512, k) × (k, n) on this device, measured for a moment."""
    import torch

    a = torch.randn(512, k, device=device, dtype=getattr(torch, dtype))
    b = torch.randn(n, k, device=device, dtype=a.dtype)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        torch.nn.functional.linear(a, b).sum().item()  # .item() waits for an asynchronous device
        times.append(time.perf_counter() - begun)
    return 2 * 512 * k * n / min(times)


def untouched(loaded: LoadedModel, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model itself says of one prompt, alone and without hooks: hidden states, logits.

    The states (layer + 1, hidden) and logits (vocab) are those of the last token; transformers applies the
    final norm to the last of the states.
    """
    import torch

    with torch.inference_mode():
        ids = torch.tensor([list(token_ids)], device=loaded.device)
        # Logits of every position would take a gigabyte for a thousand tokens of a 262,144-token vocabulary.
        last = {"logits_to_keep": 1} if "logits_to_keep" in signature(loaded.model.forward).parameters else {}
        output = loaded.model(ids, output_hidden_states=True, use_cache=False, **last)
    states = torch.stack([state[0, -1].float() for state in output.hidden_states])
    return states, output.logits[0, -1].float()


def check_capture(
    capture: Capture, token_ids: Sequence[Sequence[int]], prefix: Sequence[int] = (), cue: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Compare batched capture and readout with the untouched model: rows of ``checks``.

    Raises ModelError where a difference is more than the weights' dtype explains.
    """
    import torch

    loaded = capture.loaded
    vectors = torch.from_numpy(capture.vectors_and_ends(token_ids, prefix, cue)[0]).to(loaded.device)
    dtype = getattr(torch, loaded.dtype)
    found: dict[str, list[float]] = {"resid_post": [], "final_norm": [], "readout": [], "readout_kl": []}
    for row, ids in enumerate(token_ids):
        states, logits = untouched(loaded, ids)
        resid = vectors[row, :, 0]
        with torch.inference_mode():
            normed = capture.anatomy.final_norm(resid[-1].to(dtype)).float()
            read = capture.anatomy.readout(resid[-1].to(dtype)).float()
        found["resid_post"].extend(map(_relative, resid[:-1], states[1:-1]))
        found["final_norm"].append(_relative(normed, states[-1]))
        found["readout"].append(_relative(read, logits))
        found["readout_kl"].append(_kl(logits, read))
    # numpy's max, unlike Python's, does not lose a NaN.
    return [_check_row(name, float(np.max(of, initial=0)), loaded, len(token_ids)) for name, of in found.items()]


_DETAIL = {
    "resid_post": "largest ‖captured − untouched‖ / ‖untouched‖ over layers, batched with padding and shared "
    "prefix against one prompt at a time",
    "final_norm": "the same for the last layer, after the final norm",
    "readout": "the same for the logits that the last captured state gives",
    "readout_kl": "KL divergence, in nats, of those logits from the model's own",
}


def _check_row(check: str, value: float, loaded: LoadedModel, n_prompts: int) -> dict[str, Any]:
    tolerance = _TOLERANCE[loaded.dtype]
    if not value <= tolerance:
        raise ModelError(
            f"{loaded.source.name} cannot be measured: {check} is off by {value:.2g}, and {loaded.dtype} "
            f"explains {tolerance:.2g} ({_DETAIL[check]})."
        )
    detail = f"{_DETAIL[check]}; first {n_prompts} prompts, {loaded.dtype}"
    return {"check": check, "value": value, "tolerance": tolerance, "passed": True, "detail": detail}


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum().abs())


def _tensor(output: Any) -> torch.Tensor:
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first
