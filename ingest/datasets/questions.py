"""Readers of published quizzes: questions whose words and answer identify one of the six categories."""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kdb.ingest.datasets.base import Example
from kdb.ingest.datasets.layout import text_of
from kdb.ingest.datasets.rows import complaint, excerpt, numbered_cells, read_bytes, read_jsonl
from kdb.ingest.datasets.world import answers_by_category

_NEEDS_CHOICES = re.compile(r"\b(of these|the following|of the below|listed)\b", re.IGNORECASE)


def read_triviaqa(files: Sequence[Path]) -> Iterator[Example]:
    """Read TriviaQA: lists of questions with all accepted spellings, then the file with the best spelling of each."""
    *topics, canonical = files
    best = {}
    for row in read_jsonl(canonical, ["context", "answer"]):
        question = text_of(row, "context").removeprefix("Question:").removesuffix("Answer:").strip()
        best[question] = text_of(row, "answer")
    for path in topics:
        for location, cells in numbered_cells(path, "\t", csv.QUOTE_MINIMAL):
            if len(cells) != 2:
                raise complaint(location, "2 cells", str(len(cells)))
            question = _unquoted(cells[0].strip())
            yield from _examples(question, [best[question]] if question in best else _spellings(location, cells[1]))


def _unquoted(cell: str) -> str:
    """Undo the second quoting that some cells of the published file have."""
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"').strip()
    return cell


def _spellings(location: str, cell: str) -> list[str]:
    try:
        listed = ast.literal_eval(_unquoted(cell))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        listed = None
    if not isinstance(listed, list) or not all(isinstance(answer, str) for answer in listed):
        raise complaint(location, "a list of answers", excerpt(cell))
    return listed


def read_opentriviaqa(files: Sequence[Path]) -> Iterator[Example]:
    """Read OpenTriviaQA. A question may have several lines; the line of its answer ends it."""
    for path in files:
        question: list[str] = []
        asked = ""
        for location, line in _lines(path):
            if line.startswith("#Q"):
                question, asked = [line.removeprefix("#Q").strip()], location
            elif line.startswith("^"):
                if not question:
                    raise complaint(location, "a question before its answer", excerpt(line))
                yield from _examples(" ".join(filter(None, question)), [line[1:].strip()], path.name)
                question = []
            elif question:
                question.append(line.strip())
        if question:
            raise complaint(asked, "an answer after the question", "none")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield every line with its position in the file; lines that are not UTF-8 are read as Windows-1252."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            text = _windows(f"{path.name}, line {number}", line)
        yield f"{path.name}, line {number}", text.removesuffix("\r")


def _windows(location: str, line: bytes) -> str:
    try:
        return line.decode("cp1252")
    except UnicodeDecodeError as error:
        actual = f"the byte 0x{line[error.start]:02x}"
        raise complaint(location, "UTF-8 or Windows-1252 text", actual) from error


def _examples(question: str, accepted: Iterable[str], relation: str | None = None) -> Iterator[Example]:
    """Yield one example for each different answer, or one without a category if no answer is in one of the six."""
    if not question or _NEEDS_CHOICES.search(question):
        return
    accepted = list(accepted)
    category, answers = answers_by_category(question, accepted) or (None, accepted[:1])
    for answer in answers:
        yield Example(question, category=category, relation=relation, answer=answer)
