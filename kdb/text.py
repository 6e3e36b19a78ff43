"""Safe display of untrusted names and texts on a terminal, in a chart, in a page or in Markdown.

A model's name, a prompt or a token may contain anything: escape sequences, line separators, markup. There is one
function here for each place where such text is shown.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but tab and newline
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"  # line separators, and what turns the direction of a text
    "\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"  # no characters
)
_MARKUP = re.compile(r"[\\`*|~$]|\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#+=-](?![\d.])")
"""Text that is markup in its context: brackets make a link only before another bracket or a colon."""
_LINKS = (("://", "&#58;//"), ("www.", "www&#46;"), ("@", "&#64;"))
"""Text that GitHub turns into a link by itself, and how to write it so that it remains text."""

_WIDTHS = {"W": 2, "F": 2}
"""Columns of a terminal that characters of these East Asian widths take; all others take one."""

_PADDED = 40
"""Maximum width to which the cells of a Markdown table are padded with spaces."""


class Code(str):
    """Text of a Markdown table that is shown as code."""


def visible(text: str) -> str:
    """Return the text with invisible and control characters as escapes such as \\u001b."""
    return _UNSEEN.sub(lambda match: _escape(match[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: str) -> str:
    """Return the text as `visible` does, in one line, without spaces at its ends."""
    return in_line(text).strip()


def in_line(text: str) -> str:
    """Return the text as `visible` does, in one line, with the spaces at its ends: those of a token count."""
    return visible(re.sub(r"\s*\r?\n\s*|\t", " ", text))


def text_width(text: str) -> int:
    """Return the number of columns that a text takes on a terminal: two for a wide character, none for an accent."""
    if text.isascii():
        return len(text)
    return sum(_WIDTHS.get(unicodedata.east_asian_width(one), 1) for one in text if not _takes_no_place(one))


def _takes_no_place(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Me", "Cf")


def shortened(text: str, width: int) -> str:
    """Return the text in at most `width` columns of a terminal; one that is longer ends in an ellipsis."""
    if text_width(text) <= width:
        return text
    kept = text[: max(width - 1, 0)]
    while text_width(kept) > width - 1:
        kept = kept[:-1]
    return kept + "…"


def visible_within(value: Any) -> Any:
    """Return a JSON value with `visible` applied to every text in it."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible_within(key): visible_within(one) for key, one in value.items()}
    return [visible_within(one) for one in value] if isinstance(value, list | tuple) else value


def markdown(text: str) -> str:
    """Return Markdown that shows the text literally, in one line: no markup, no HTML, no links."""
    escaped = _MARKUP.sub(r"\\\g<0>", html.escape(one_line(text), quote=False))
    for link, harmless in _LINKS:
        escaped = escaped.replace(link, harmless)
    return escaped


def markdown_code(text: str) -> str:
    """Return Markdown that shows the text as code, in one line."""
    line = one_line(text)
    # Between backticks nothing can be escaped.
    return f"<code>{markdown(line)}</code>" if re.search(r"[<>&`|]|^ *$", line) else f"`{line}`"


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, whose cells are texts or `Code`. All Markdown tables are written here."""
    cells = [[markdown_code(one) if isinstance(one, Code) else markdown(one) for one in row] for row in rows]
    head = list(map(markdown, names))
    widths = [max(3, *(min(len(row[column]), _PADDED) for row in (head, *cells))) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in (head, rule, *cells)]
