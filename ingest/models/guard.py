"""Convert any error of transformers, tokenizers or torch about a user's model to a ModelError."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator

from kdb.errors import KdbError, ModelError

_MIXED = re.compile(r"same dtype|mixed dtype|scalar type|did not match (Float|BFloat16|Half)")
"""Messages of torch about tensors of two number formats, as the code of some models makes in half precision."""


@contextlib.contextmanager
def model_errors(what: str) -> Iterator[None]:
    """Convert any error within, except kdb's own, to a ModelError whose message begins with ``what``."""
    try:
        yield
    except KdbError:
        raise
    except BaseException as error:
        # A panic in the Rust code of tokenizers or safetensors is not an Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            advice = "Use a model whose class is part of transformers"
            raise ModelError(f"{what}: it needs custom code, which kdb does not run. {advice}.") from error
        if isinstance(error, RuntimeError) and _MIXED.search(str(error)):
            advice = "Its code mixes number formats; `--dtype float32` avoids that"
            raise ModelError(f"{what}: {brief(error)}. {advice}.") from error
        raise ModelError(f"{what}: {brief(error)}") from error


def not_finite(name: str, dtype: str, found_by: str) -> ModelError:
    """Return the error about a model whose values are infinite or no numbers."""
    return ModelError(
        f"{name} cannot be measured: it computes values that are not finite numbers (found by {found_by}). Its weights "
        f"may be damaged or empty; {dtype} may be too small for its values."
    )


def brief(error: BaseException) -> str:
    """Describe an error in one line; with its type if the message alone is not clear."""
    text = textwrap.shorten(str(error), 240, placeholder=" …")
    if isinstance(error, KeyError):
        return f"it has no {text}"
    kind = type(error).__name__
    if isinstance(error, TypeError | AttributeError):
        return f"something in it has the wrong type ({text})"
    explains = " " in text or isinstance(error, OSError)
    return text if explains else f"{kind}: {text}" if text else kind
