"""Whatever a stranger's model makes transformers, tokenizers or torch raise becomes one ModelError."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator

from kdb.errors import KdbError, ModelError


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Raise a ModelError that begins with ``what`` could not be done, for any error within but kdb's own."""
    try:
        yield
    except KdbError:
        raise
    except BaseException as error:
        # A panic of tokenizers' or safetensors' Rust is no Exception, and has no class that can be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(f"{what}: it comes with code of its own, and kdb never runs that.") from error
        raise ModelError(f"{what}: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """What an error says, in a line; its kind where it says nothing that can be understood alone."""
    text = textwrap.shorten(str(error), 240, placeholder=" …")
    if isinstance(error, KeyError):
        return f"it has no {text}"
    kind = type(error).__name__
    if isinstance(error, TypeError | AttributeError):
        return f"something in it has the wrong type ({text})"
    explains = " " in text or isinstance(error, OSError)
    return text if explains else f"{kind}: {text}" if text else kind
