"""Join an answer to its prompt as a text would: a space between words, nothing after an opening mark or in Chinese.

answer_prefix("The capital of France is", "Paris")  # " "
answer_prefix("The largest heading of HTML is <", "h")  # ""
"""

from __future__ import annotations

import re
import unicodedata

_CLOSING = ".,:;?!)]…؟،؛।"
"""Punctuation that a space follows, with the marks of Arabic and Hindi."""

_OPENED_BY = {'"': '"', "'": "'", "”": "“„", "“": "„", "’": "‘‚", "‘": "‚", "»": "«", "«": "»"}
"""Quotation marks, each with those that it closes; German and Danish close with marks that open elsewhere."""

_WITHOUT_SPACES = (
    *("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "FULLWIDTH", "IDEOGRAPHIC", "BOPOMOFO", "YI SYLLABLE"),
    *("THAI", "LAO ", "KHMER", "MYANMAR", "TIBETAN"),
)
"""How the Unicode names of characters begin whose scripts have no spaces between words."""


def answer_prefix(prompt: str, answer: str) -> str:
    """Return the white space that joins them: one space where :func:`takes_space`, else the prompt's own at its end."""
    return " " if takes_space(prompt, answer) else prompt[len(prompt.rstrip()) :]


def takes_space(prompt: str, answer: str) -> bool:
    """Whether a space belongs between them, which depends on how the prompt ends and on the script of both."""
    last = prompt.rstrip()[-1:]
    if not last or _is_without_spaces(next(filter(str.isalpha, answer), "")):
        return False
    if last in _OPENED_BY:
        return _closes(prompt.rstrip())
    return last in _CLOSING or (unicodedata.category(last)[0] in "LMN" and not _is_without_spaces(last))


def _is_without_spaces(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_WITHOUT_SPACES) if character else False


def _closes(text: str) -> bool:
    """Whether the quotation mark at the end closes one, rather than opens one or is an apostrophe."""
    mark, text = text[-1], re.sub(r"(?<=\w)['’](?=\w)", "", text)  # without the apostrophes inside words
    if mark not in "\"'":
        return sum(text.count(opening) for opening in _OPENED_BY[mark]) >= text.count(mark)
    closes = is_open = False
    for before, character in zip(f" {text}", text, strict=False):
        if character == mark:
            apostrophe = mark == "'" and not is_open and before.isalnum()
            closes = is_open and not before.isspace()
            is_open = not closes and not apostrophe
    return closes
