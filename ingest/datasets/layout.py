"""Convert the rows of a source to examples, by the meaning of its columns and their allowed values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from kdb.ingest.datasets.base import Example
from kdb.ingest.datasets.rows import Row, complaint, excerpt

ZERO_ONE: Mapping[str, int | None] = {"0": 0, "1": 1}
YES_NO: Mapping[str, int | None] = {"yes": 1, "no": 0}

_REWRITE = "write it as text, or remove the row"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Layout:
    """Names of the columns of a source, by meaning; None if the source has no such column.

    Without a column `label`, examples have no label. `labels` maps every allowed value of the label column, in lower
    case, to its class; rows whose class is None are skipped.
    """

    text: str = "text"
    label: str | None = "label"
    labels: Mapping[str, int | None] = field(default_factory=lambda: ZERO_ONE)
    group: str | None = None
    category: str | None = None
    relation: str | None = None
    subject: str | None = None

    @property
    def needed(self) -> list[str]:
        """Columns that the source must have, each once."""
        columns = (self.text, self.label, self.group, self.category, self.relation, self.subject)
        return list(dict.fromkeys(column for column in columns if column is not None))


def to_examples(rows: Iterable[Row], layout: Layout) -> Iterator[Example]:
    """Convert rows to examples; raise DatasetError at the first value that a study cannot use."""
    for row in rows:
        label = _label(row, layout)
        if label is not None or layout.label is None:
            yield Example(
                text=text_of(row, layout.text),
                label=label,
                group=_value(row, layout.group),
                category=_value(row, layout.category),
                relation=_value(row, layout.relation),
                subject=_value(row, layout.subject),
            )


def _label(row: Row, layout: Layout) -> int | None:
    if layout.label is None:
        return None
    value = row.fields[layout.label]
    label = str(value).strip().lower()
    if label not in layout.labels:
        *others, last = layout.labels
        raise complaint(row.location, f"label {', '.join(others)} or {last}", excerpt(value))
    return layout.labels[label]


def text_of(row: Row, column: str) -> str:
    """Return the text in a column; raise DatasetError if it is not a text, is empty, or cannot be stored."""
    value = row.fields[column]
    if not isinstance(value, str) or not value.strip():
        raise complaint(row.location, f"a text in column {column!r}", f"{excerpt(value)}: {_REWRITE}")
    if _LONE_SURROGATE.search(value):  # JSON can contain half a character (a lone surrogate), which no file can store
        raise complaint(row.location, f"whole characters in column {column!r}", f"{excerpt(value)}: {_REWRITE}")
    return value


def _value(row: Row, column: str | None) -> str | None:
    if column is None:
        return None
    value = row.fields[column]
    if value is None or value == "":
        raise complaint(row.location, f"a value in column {column!r}", f"none: {_REWRITE}")
    return str(value)
