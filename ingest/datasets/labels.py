"""Read the labels of a user's file: 1 and 0, words such as yes and no, or names of classes, one of which is label 1.

rows = list(with_labels(rows, positive="animal"))
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from kdb.errors import DatasetError, UnknownNameError
from kdb.ingest.datasets.rows import Row, complaint, excerpt

WORDS = {"0": 0, "1": 1, "true": 1, "false": 0, "yes": 1, "no": 0, "positive": 1, "negative": 0}
"""Labels that say by themselves which class they are, in any case."""

_WORDS = "0, 1, true, false, yes, no, positive or negative"
_MOST_NAMED = 5
"""Maximum number of classes that a message names."""


def with_labels(rows: Sequence[Row], positive: str | None) -> Iterator[Row]:
    """Yield the rows with label 1 or 0 in the column `label`.

    With `positive`, label 1 is the class of this name, and label 0 every other class. Raises DatasetError for a row
    without a label, or one that is not among `WORDS`; UnknownNameError if no row has the class `positive`.
    """
    classes = _classes(rows)
    labels = WORDS if positive is None else _one_against_all(classes, positive)
    for row in rows:
        name = class_name(row.fields["label"])
        if name is None or name not in labels:
            raise _unusable(row, classes, positive)
        yield Row(row.location, {**row.fields, "label": labels[name]})


def class_name(value: object) -> str | None:
    """Return a label in lower case, and a whole number without decimals, as 1 for 1.0; None if the cell is empty."""
    if value is None or value != value or not str(value).strip():  # NaN, of pandas, does not equal itself
        return None
    return re.sub(r"^(-?\d+)\.0*$", r"\1", str(value).strip().lower())


def _classes(rows: Sequence[Row]) -> Mapping[str, str]:
    """Return the classes as the file writes them, in the order in which they appear, by their names."""
    classes: dict[str, str] = {}
    for row in rows:
        name = class_name(row.fields["label"])
        if name is not None:
            classes.setdefault(name, str(row.fields["label"]).strip())
    return classes


def _one_against_all(classes: Mapping[str, str], positive: str) -> Mapping[str, int]:
    chosen = class_name(positive)
    if chosen not in classes:
        raise UnknownNameError("class", positive, classes.values(), f"The column label has {_listed(classes)}.")
    return {name: int(name == chosen) for name in classes}


def _unusable(row: Row, classes: Mapping[str, str], positive: str | None) -> DatasetError:
    value = row.fields["label"]
    if class_name(value) is None:
        what = "a label" if positive is not None else f"label {_WORDS}"
        return complaint(row.location, what, f"{excerpt(value)}: write one, or remove the row")
    if len(classes) == 2:
        one, other = classes.values()
        hint = f"say which of the two classes is label 1, by --positive {one!r} or --positive {other!r}"
    else:
        hint = f"correct it, or name the class of label 1 by --positive; the column has {_listed(classes)}"
    return complaint(row.location, f"label {_WORDS}", f"{excerpt(value)}: {hint}")


def _listed(classes: Mapping[str, str]) -> str:
    shown = [excerpt(one) for one in list(classes.values())[:_MOST_NAMED]]
    more = len(classes) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") or "no labels"
