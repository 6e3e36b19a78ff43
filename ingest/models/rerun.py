"""Read out states of models in which no module leads from the last block to the unembedding."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import nn

from kdb.errors import ModelError
from kdb.ingest.models.trace import BlockOutput, first_tensor, without_cache


class Rerun(nn.Module):
    """The part of a model between its last block and its unembedding, where no module does all of it.

    The model reads a token, and the given states replace the output of the last block.
    """

    def __init__(self, model: Any, block: nn.Module, unembed: nn.Module, layout: BlockOutput) -> None:
        super().__init__()
        # In a tuple, so that the model's modules do not become parts of this one.
        self.parts, self.layout = (model, block, unembed), layout

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Convert states (…, hidden) after the last block into what the unembedding reads (…, width)."""
        model, block, unembed = self.parts
        rows = states.reshape(-1, states.shape[-1])
        read: list[torch.Tensor] = []
        ids = torch.ones(len(rows), 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(block.register_forward_hook(functools.partial(self._replace, rows)))
            hooks.enter_context(unembed.register_forward_pre_hook(lambda _m, args: read.append(args[0])))
            model(ids, **without_cache(model))
        normed = read[0].reshape(len(rows), -1, read[0].shape[-1])[:, -1]
        return normed.reshape(*states.shape[:-1], -1)

    def _replace(self, rows: torch.Tensor, _block: nn.Module, _args: Any, output: Any) -> Any:
        first = first_tensor(output)
        if first is None or not (type(output) in (tuple, list) or output is first):
            raise ModelError(
                f"{type(self.parts[0]).__name__}: its blocks pass on more than one vector per token, and kdb does not "
                "know which of them the logits are made of, so it cannot measure it."
            )
        new = self.layout.replaced(first, rows.to(first.device))
        return new if output is first else (new, *output[1:])
