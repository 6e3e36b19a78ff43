"""Find a model's blocks and their parts by how the modules are nested; nothing is run, and no weights are needed.

blocks = text_blocks(model)
ffn_of(blocks[0])
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdb.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

_FFN = (
    *("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp", "moe", "mlp_block", "ff", "fc1", "intermediate"),
)
"""Names of a block's FFN; the first that a block has is read. ``intermediate`` is the first half of one, as in BERT."""

_FFN_CLASS = re.compile(r"mlp|moe|ffn|feedforward", re.IGNORECASE)

_MIXER_CLASS = re.compile(
    r"mamba|mixer|rwkv|lru|recurrentblock|lstm|delta|(?<!kimi)linear_?attention|lightning|shortconv", re.IGNORECASE
)
"""Classes of modules that mix tokens without attention: state-space models, linear attention, convolutions.

The names of RecurrentGemma and Kimi Linear are in the classes of their attention, too.
"""

_ATTENTION_CLASS = re.compile(r"attn|attention", re.IGNORECASE)


def setting(config: Any, name: str, otherwise: Any = None) -> Any:
    """Return a setting of a config; ``otherwise`` if it has none of that name, or another one for each layer."""
    from transformers.integrations.heterogeneity import configuration_utils as by_layer

    try:
        return getattr(config, name, otherwise)
    except by_layer.AmbiguousGlobalPerLayerAttributeError:
        return otherwise


def text_blocks(model: Any) -> tuple[nn.Module, ...]:
    """Return the blocks of the text model, in order; raise ModelError if they are not found.

    A wrapper has towers for images or sound beside its text model, with lists of blocks of their own. The text model is
    the innermost module that has both the embedding of the tokens and a list of blocks.
    """
    text = model.config.get_text_config(decoder=True)
    n_layers = getattr(text, "num_hidden_layers", None)
    lists = next(filter(None, (_lists(root, n_layers) for root in _around_embedding(model))), ())
    if len(lists) != 1:
        found = f"{len(lists)} lists" if lists else "no list"
        raise ModelError(f"{type(model).__name__}: kdb found {found} of blocks, so it cannot measure it.")
    return tuple(block for block in lists[0] if not _reads_images(block))


def _reads_images(block: nn.Module) -> bool:
    """Whether a block attends to images alone, and so does not run for a text (Mllama)."""
    names = [name for name, _child in block.named_children()]
    return "cross_attn" in names and "self_attn" not in names


def ffn_of(block: nn.Module) -> nn.Module | None:
    """Return the module whose input is a block's normalised state before its FFN; None if the block has no FFN."""
    from torch import nn

    named = next((child for name in _FFN if isinstance(child := getattr(block, name, None), nn.Module)), None)
    ffn = named or next((c for c in block.children() if is_mixture_or_mlp(c)), None)
    if ffn is None:
        return None
    children = list(ffn.children())
    # Some begin with the norm: the state after it is meant.
    return children[1] if len(children) > 1 and is_norm(children[0]) else ffn


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by its class."""
    return type(module).__name__.lower().endswith(("norm", "normgated"))


def is_mixture_or_mlp(module: nn.Module) -> bool:
    """Whether a module is an FFN or a mixture of experts, by its class."""
    return _FFN_CLASS.search(type(module).__name__) is not None


def mixer_of(block: nn.Module) -> nn.Module | None:
    """Return the module of a block that mixes tokens without attention, or None."""
    return next((m for m in block.modules() if m is not block and _MIXER_CLASS.search(type(m).__name__)), None)


def attention_of(block: nn.Module) -> nn.Module | None:
    """Return the attention of a block, the first if it has several, or None."""
    return next(
        (m for m in block.modules() if _is(m, _ATTENTION_CLASS) and not _is(m, _MIXER_CLASS) and m is not block), None
    )


def experts_of(block: nn.Module) -> nn.Module | None:
    """Return the module that holds the routed experts of a block, or None: a list of FFNs, or stacks of matrices."""
    return next((m for name, m in block.named_modules() if name.endswith("experts") and _has_weights(m)), None)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is(module: nn.Module, pattern: re.Pattern[str]) -> bool:
    return pattern.search(type(module).__name__) is not None and not is_norm(module)


def _around_embedding(model: Any) -> Iterator[nn.Module]:
    """Yield the modules that contain the embedding of the tokens, the innermost first."""
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    while name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


def _lists(root: nn.Module, n_layers: int | None) -> list[nn.ModuleList]:
    """Return the lists of blocks nearest to a module: those with ``n_layers`` parts, or all if no list has."""
    from torch import nn

    lists = [(name.count("."), m) for name, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    counted = [(depth, m) for depth, m in lists if len(m) == n_layers and any(True for _ in m[0].children())]
    some = counted or lists
    return [m for depth, m in some if depth == min(depth for depth, _m in some)]
