"""Activations of the FFN of one layer in a forward pass: coefficients, outputs, and the routing of its experts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdb.ingest.forward.experts import Experts, Routing, ScaledInputs
from kdb.ingest.forward.ffn import Ffn, Source, factors_in
from kdb.ingest.forward.linear import Norm, flat

if TYPE_CHECKING:
    import torch


class FfnActivations:
    """The activations of one layer's FFN, recorded while :meth:`running`, for tokens in a row.

    ``post`` is the norm behind the whole FFN, None if there is none.
    """

    def __init__(self, ffn: Ffn, post: Norm | None) -> None:
        self.ffn, self.post = ffn, post
        self._keeps_outputs = ffn.total is None or any(source.is_scaled for source in ffn.sources)
        n = len(ffn.sources)
        self.fired: list[Any] = [None] * n
        self.outputs: list[Any] = [None] * n
        self.own_scales: list[Any] = [None] * n
        self.routings: list[Routing | None] = [None] * n
        self.routers: list[Any] = [None] * n
        self.total: torch.Tensor | None = None
        self.normed: torch.Tensor | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record what a pass computes."""
        with contextlib.ExitStack() as hooks:
            for i, source in enumerate(self.ffn.sources):
                module = source.part.module
                hooks.enter_context(source.part.watched(functools.partial(self.fired.__setitem__, i)))
                hooks.enter_context(module.register_forward_hook(functools.partial(self._output, i), with_kwargs=True))
                if source.behind is not None:
                    hook = functools.partial(self._behind, i)
                    hooks.enter_context(source.behind.module.register_forward_hook(hook))
                if source.router is not None:
                    hook = functools.partial(self._router, i)
                    hooks.enter_context(source.router.module.register_forward_hook(hook))
            if self.ffn.total is not None:
                hooks.enter_context(self.ffn.total.register_forward_hook(self._total))
            if self.post is not None:
                hooks.enter_context(self.post.module.register_forward_hook(self._normed))
            yield

    def _output(self, i: int, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        part = self.ffn.sources[i].part
        if self._keeps_outputs:
            self.outputs[i] = part.output(output).float().clone()  # Llama 4 adds to it in place
        if isinstance(part, Experts):
            self.routings[i] = part.routing(args, kwargs)

    def _behind(self, i: int, _module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        behind, read, written = self.ffn.sources[i].behind, flat(args[0]).float(), flat(output).float()
        assert behind is not None
        self.own_scales[i], self.outputs[i] = behind.scale(read, written), written

    def _router(self, i: int, _module: Any, _args: Any, output: Any) -> None:
        self.routers[i] = output

    def _total(self, _module: Any, args: tuple[Any, ...], output: Any) -> None:
        written = output[0] if isinstance(output, tuple) else output
        part = next((s.part for s in self.ffn.sources if s.part.module is self.ffn.total), None)
        total = args[0] if self.ffn.is_read else written if part is None else part.output(written)
        self.total = flat(total).float().clone()  # Falcon adds to it in place

    def _normed(self, _module: Any, _args: Any, output: torch.Tensor) -> None:
        self.normed = flat(output).float()

    # Reading the record

    @functools.cached_property
    def factors(self) -> torch.Tensor | None:
        """Factor of each source (token, source) when they are added up; None if nothing does."""
        if not any(source.is_scaled for source in self.ffn.sources):
            return None
        assert self.total is not None
        return factors_in(self.total, self.outputs, [not source.is_scaled for source in self.ffn.sources])

    def summed(self) -> torch.Tensor:
        """The FFN's output (token, hidden) before a norm behind it."""
        import torch

        return torch.stack(self.outputs).sum(0) if self.total is None else self.total

    def gain(self, i: int) -> torch.Tensor | None:
        """Factor (token) of the output of a source's projection; None if nothing does."""
        factor, scale = None if self.factors is None else self.factors[:, i], self.own_scales[i]
        return factor if scale is None else scale if factor is None else factor * scale

    def coefficients(self, n_slots: int) -> torch.Tensor:
        """The coefficient (token, slot) of every slot."""
        import torch

        parts = [
            m.float() if (gain := self.gain(i)) is None else m.float() * gain[:, None] for i, m in enumerate(self.fired)
        ]
        missing = n_slots - self.ffn.layout.size
        if missing:
            parts = [*parts, torch.zeros(len(parts[0]), missing, device=parts[0].device)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def bias(self, tokens: torch.Tensor, hidden: int) -> torch.Tensor:
        """The output (token, hidden) of these tokens that belongs to no neuron, before a norm behind the FFN."""
        import torch

        out = torch.zeros(len(tokens), hidden, device=tokens.device)
        for i, source in enumerate(self.ffn.sources):
            biases = source.biases()
            if biases is not None:
                out += self.expert_scale(i, tokens) @ biases
            if source.behind is not None:
                own = source.behind.bias.expand_as(out)
                out += own if self.factors is None else own * self.factors[tokens, i, None]
        return out

    def expert_scale(self, i: int, tokens: torch.Tensor) -> torch.Tensor:
        """Factor (token, expert) of the output of each expert of a source; a dense one counts as one expert."""
        return self._weighed(self._weight(i, tokens), self.gain(i), tokens)

    def router_weight(self, i: int, tokens: torch.Tensor) -> torch.Tensor:
        """The weight (token, expert) of each expert of a source, 0 if it is not chosen."""
        router, part = self.ffn.sources[i].router, self.ffn.sources[i].part
        weight = self._weight(i, tokens)
        if isinstance(part, ScaledInputs) and router is not None and router.weights_at is not None:
            weight = router.weights(self.routers[i])[tokens]
        return self._weighed(weight, None if self.factors is None else self.factors[:, i], tokens)

    def chosen(self, i: int, tokens: torch.Tensor) -> torch.Tensor:
        """Which experts (token, expert) of a source were chosen; a dense one always is."""
        import torch

        routing, part = self.routings[i], self.ffn.sources[i].part
        if routing is not None:
            return routing.spread(part.n_experts)[1][tokens]
        if isinstance(part, ScaledInputs):
            fired: torch.Tensor = self.fired[i][tokens]
            return fired.view(len(tokens), part.n_experts, -1).any(2)
        return torch.ones(len(tokens), part.n_experts, dtype=torch.bool, device=tokens.device)

    def router_probs(self, i: int, tokens: torch.Tensor) -> torch.Tensor:
        """The share (token, expert) of each expert of a source by its router; 0 for a dense one, NaN if not known."""
        import torch

        source: Source = self.ffn.sources[i]
        if source.router is not None:
            return source.router.probs(self.routers[i])[tokens]
        unknown = float("nan") if isinstance(source.part, Experts) else 0.0
        return torch.full((len(tokens), source.part.n_experts), unknown, device=tokens.device)

    def _weight(self, i: int, tokens: torch.Tensor) -> torch.Tensor:
        routing, part = self.routings[i], self.ffn.sources[i].part
        if routing is not None:
            return routing.spread(part.n_experts)[0][tokens]
        return self.chosen(i, tokens).float()

    def _weighed(self, weight: torch.Tensor, gain: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        return weight if gain is None else weight * gain[tokens, None]
