"""Numbers as text, with the digits that mean something: the rules for tables on a terminal.

    shown("accuracy", 0.94117, n=120)                        # 0.941
    with_interval("accuracy", 0.94117, 0.9, 0.97, n=120)     # 0.941 [0.90, 0.97]

The kind of a number follows from the name of its column, as the queries name them.
"""

from __future__ import annotations

import math
import re

_ENDS = re.compile(r"_(low|high)$")
_PERCENT = re.compile(r"(^|[_ ])(percent|%)$")
_SHARE = re.compile(
    r"(^|_)(accuracy|auc|f1|mrr)([_ ]|$)|^(true_(positive|negative)_rate|selectivity|area)$|^difference b - a$"
)
_LOGARITHM = re.compile(r"(^|_)(logp|logit|kl|score|entropy|gain|prob|attention)(_|$)|(^|_)p(_value)?$")

_SMALLEST = 0.001
"""Size below which a number is shown with two significant digits, and with an exponent if that is shorter."""
_LARGEST = 1e15
"""Size from which a number has an exponent."""
_MOST_DECIMALS = 6
_RESOLVED = 100
"""Largest n of which 1/n is at least 0.01: two decimals show all that n resolves."""


def shown(name: str, value: float, n: int | None = None) -> str:
    """Return a number of the column `name` as text; `n` is the number of prompts that it was measured on.

    Percent have one decimal. Accuracies and AUC have two, and three if `n` is over 100 or unknown. Log-probabilities,
    probabilities and p-values have three significant digits, other numbers four without zeros at the end. Below 0.001
    there are two, as in 1.6e-06. A number that would read as 0, 1 or 100 % and is not gets more decimals, up to six.
    """
    value += 0.0  # -0.0 becomes 0.0
    if not math.isfinite(value):
        return str(value)
    if 0 < abs(value) < _SMALLEST:
        return f"{value:.2g}"
    quantity = _ENDS.sub("", name)
    if _SHARE.search(quantity):
        return _fixed(value, _decimals_of(n), 1)
    if _PERCENT.search(quantity):
        return _fixed(value, 1, 100)
    if not value:
        return "0"
    return _significant(value, 3) if _LOGARITHM.search(quantity) else _without_zeros(_significant(value, 4))


def with_interval(
    name: str, value: float, low: float, high: float, n: int | None = None, *, symmetric: bool = False
) -> str:
    """Return a number with its interval: ``0.941 ± 0.03`` if it is `symmetric`, else ``0.941 [0.90, 0.97]``.

    The ends have as many decimals as half the interval's width needs, and no more than the number.
    """
    text, half = shown(name, value, n), (high - low) / 2
    if symmetric:
        return f"{text} ± {_without_zeros(_significant(half, 2)) if half >= _SMALLEST else f'{half:.2g}'}"
    return f"{text} [{', '.join(_end(name, end, n, text, half) for end in (low, high))}]"


def is_symmetric(value: float, low: float, high: float) -> bool:
    """Whether the interval reaches equally far to both sides, up to 5 % of its width."""
    return abs((high - value) - (value - low)) <= 0.05 * (high - low)


def _end(name: str, end: float, n: int | None, text: str, half: float) -> str:
    most = len(text.partition(".")[2])
    if "e" in text or not half > 0 or not math.isfinite(half) or 0 < abs(end) < _SMALLEST:
        return shown(name, end, n)
    share = bool(_SHARE.search(_ENDS.sub("", name)))
    needed = -math.floor(math.log10(half))
    needed = max(2, needed) if share else needed + 1
    return _fixed(end + 0.0, max(0, min(most, needed)), 1 if share else 0)


def _decimals_of(n: int | None) -> int:
    return 2 if n is not None and n <= _RESOLVED else 3


def _fixed(value: float, decimals: int, top: float) -> str:
    """Return the number with so many decimals, or more if it would read as 0 or `top` and is not."""
    for more in range(decimals, _MOST_DECIMALS + 1):
        text = f"{value:.{more}f}"
        if abs(float(text)) not in (0, top):
            return text
    return f"{value:.{decimals}f}"


def _significant(value: float, digits: int) -> str:
    if abs(value) >= _LARGEST:
        return f"{value:.{digits - 1}e}"
    exponent = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def _without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def count_of(n: int) -> str:
    """Return a large count, such as that of parameters, in millions or billions: 135 M, 1.54 B."""
    return f"{n / 1e9:.3g} B" if n >= 1e9 else f"{n / 1e6:.3g} M"


def duration(seconds: float) -> str:
    """Return a time in the unit that a reader expects, such as 8 s, 12 min or 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def data_size(n_bytes: int) -> str:
    """Return a size of data in MiB, or from one GiB on in GiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
