"""Read a user's dataset: a file whose columns determine its study.

A concept dataset has the columns `text` and `label`; a knowledge dataset has `prompt`, `answer` and `category`, and
may have `relation`, `subject`, `rival` and `corrupt`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from kdb.errors import DatasetError
from kdb.ingest.datasets.base import Dataset, Example
from kdb.ingest.datasets.joining import takes_space
from kdb.ingest.datasets.labels import with_labels
from kdb.ingest.datasets.layout import Layout, text_of, to_examples
from kdb.ingest.datasets.rows import Row, complaint, excerpt
from kdb.ingest.datasets.userformats import Table, read_table, stem_of

_CONCEPT = ("text", "label")
_KNOWLEDGE = ("prompt", "answer", "category")
_OPTIONAL = ("relation", "subject", "rival", "corrupt")
_ALL = "all"
"""Reserved name: in saved queries it means all categories."""


def load_user_file(
    path: Path, name: str | None, group_by: str | None, positive: str | None, taken: Collection[str]
) -> Dataset:
    """Read a file as the dataset `name`, by default its stem; raise DatasetError if file or name cannot be used.

    `positive` is the class that is label 1, of labels that are names of classes. `taken` are the names of kdb's own
    datasets, which a user's dataset may not have.
    """
    table = read_table(path)
    name = _usable_name(path, name, taken)
    source = f"{path.name}, a user's file"
    if _is_knowledge(table):
        refuse_groups(name, group_by)
        refuse_positive(name, positive)
        rows = table.rows(_KNOWLEDGE, _OPTIONAL)
        return Dataset(name, source, "{text}", tuple(_answered(rows)), study="knowledge")
    examples = _labelled(table, Layout(group=group_by), positive)
    source += "" if positive is None else f", label 1: {positive}"
    return Dataset(name, source, "{text}", examples)


def load_texts(path: Path, group_by: str | None = None, positive: str | None = None) -> tuple[Example, ...]:
    """Read the texts of a file, with their labels if it has a column `label`.

    Raises DatasetError for a file that has no texts, or cannot be read.
    """
    table = read_table(path)
    if not table.has("text"):
        named = ", ".join(map(repr, table.columns)) or "no columns"
        raise complaint(table.location, "a column 'text'", f"{named}: rename one")
    has_labels = table.has("label")
    if positive is not None and not has_labels:
        raise complaint(table.location, "a column 'label' for --positive", "none: leave --positive out")
    examples = _labelled(table, Layout(label="label" if has_labels else None, group=group_by), positive)
    if not examples:
        raise complaint(table.location, "at least one text below", "none")
    return examples


def _labelled(table: Table, layout: Layout, positive: str | None) -> tuple[Example, ...]:
    """Return the texts of a table with their labels, if the layout has any."""
    rows = list(table.rows(layout.needed))
    if layout.label is not None:
        rows = list(with_labels(rows, positive))
    examples = tuple(to_examples(rows, layout))
    _check_one_label(rows, examples)
    return examples


def _check_one_label(rows: Iterable[Row], examples: Iterable[Example]) -> None:
    """Raise DatasetError for a text that has both labels, and name its rows; ``examples`` are those of the rows."""
    first: dict[str, tuple[Row, Example]] = {}
    for row, example in zip(rows, examples, strict=True):
        earlier_row, earlier = first.setdefault(example.text.strip(), (row, example))
        if earlier.label != example.label:
            raise complaint(
                row.location,
                f"the label {earlier.label} that {earlier_row.location} has for the text {excerpt(example.text)}",
                f"{example.label}: keep one of the two rows",
            )


def refuse_groups(name: str, group_by: str | None) -> None:
    """Raise DatasetError if a group column is given for a knowledge dataset."""
    if group_by is not None:
        raise DatasetError(
            f"Dataset {name!r} cannot be grouped by {group_by!r}: groups are for probes, and the knowledge study fits "
            "none. Leave --group-by out."
        )


def refuse_positive(name: str, positive: str | None) -> None:
    """Raise DatasetError if a class is given for a dataset whose labels are known, or which has none."""
    if positive is not None:
        raise DatasetError(
            f"Dataset {name!r} takes no --positive: it is for a file of your own whose labels are names of classes. "
            "Leave it out."
        )


def _is_knowledge(table: Table) -> bool:
    concept, knowledge = table.has(*_CONCEPT), table.has(*_KNOWLEDGE)
    if concept != knowledge:
        return knowledge
    either = "columns 'text' and 'label', or 'prompt', 'answer' and 'category'"
    actual = ", ".join(map(repr, table.columns)) or "no columns"
    if concept:
        raise complaint(table.location, f"{either}, not both", f"{actual}: remove the columns of one study")
    raise complaint(table.location, either, f"{actual}: rename the columns")


def _answered(rows: Iterable[Row]) -> Iterator[Example]:
    """Yield one example per prompt; raise DatasetError for a prompt without an answer, or with two different ones."""
    first: dict[str, tuple[Row, Example]] = {}
    for row in rows:
        prompt, answer, category = (_filled(row, column) for column in _KNOWLEDGE)
        relation, subject, rival, corrupt = (_optional(row, column) for column in _OPTIONAL)
        if category == _ALL:
            raise complaint(row.location, "a category of another name", "'all', which means all categories: rename it")
        example = Example(
            *(prompt, None, None, category, relation, subject, answer),
            answer_prefix=_written_prefix(text_of(row, "prompt"), text_of(row, "answer")),
            rival=rival,
            corrupt=corrupt,
        )
        for what, value, other in (("rival", rival, answer), ("corrupt prompt", corrupt, prompt)):
            if value is not None and value == other:
                raise complaint(
                    row.location, f"a {what} of another text", f"{excerpt(value)}: change it or leave it out"
                )
        if prompt not in first:
            first[prompt] = row, example
            yield example
            continue
        earlier_row, earlier = first[prompt]
        for what, one, two in _told_apart(earlier, example):
            if one != two:
                raise complaint(
                    row.location,
                    f"the {what} {excerpt(one or '')} that {earlier_row.location} has for the prompt {excerpt(prompt)}",
                    f"{excerpt(two or '')}: keep one of the two rows",
                )


def _told_apart(one: Example, other: Example) -> Iterator[tuple[str, str | None, str | None]]:
    """Name and both values of what two examples of one prompt must have in common."""
    for what in ("answer", "category", "rival", "corrupt"):
        yield what, getattr(one, what), getattr(other, what)


def _written_prefix(prompt: str, answer: str) -> str | None:
    """White space before the answer; else that after a prompt that takes no space of itself, such as "x = "."""
    before = answer[: len(answer) - len(answer.lstrip())]
    after = "" if takes_space(prompt, answer) else prompt[len(prompt.rstrip()) :]
    return before or after or None


def _filled(row: Row, column: str) -> str:
    value = row.fields[column]
    if not isinstance(value, str) or not value.strip():
        kind = "an answer" if column == "answer" else f"a {column}"
        raise complaint(
            row.location, f"{kind} in column {column!r}", f"{excerpt(value)}: write it as text, or remove the row"
        )
    return text_of(row, column).strip()


def _optional(row: Row, column: str) -> str | None:
    value = row.fields.get(column)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return None if blank else text_of(row, column).strip()


def _usable_name(path: Path, name: str | None, taken: Collection[str]) -> str:
    name = stem_of(path) if name is None else name
    if not name.strip():
        raise DatasetError(f"{path.name} would be stored under a blank name: give another name with --dataset-name.")
    if name.lower() in taken:
        raise DatasetError(
            f"{path.name} would be stored as {name!r}, the name of one of kdb's own datasets: "
            "give another name with --dataset-name."
        )
    return name
