"""Readers of published facts, one per format: they convert a dataset's files to prompts that the answer continues.

A reader takes the files in the order in which the dataset declares them. It drops facts that are in none of the six
categories. Its caller handles prompts with several answers.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from kdb.ingest.datasets.base import Example
from kdb.ingest.datasets.layout import text_of
from kdb.ingest.datasets.rows import (
    Row,
    complaint,
    excerpt,
    numbered_cells,
    numbered_lines,
    read_csv,
    read_json_examples,
    read_json_list,
    read_json_object,
    read_jsonl,
    require,
)
from kdb.ingest.datasets.world import MONTHS

RELATIONS = {
    "factual/country_language": "language",
    "factual/person_native_language": "language",
    "commonsense/fruit_inside_color": "color",
    "commonsense/fruit_outside_color": "color",
    "factual/presidents_birth_year": "number",
    "factual/presidents_election_year": "number",
    "factual/country_capital_city": "capital",
    "factual/city_in_country": "country",
    "factual/food_from_country": "country",
    "factual/landmark_in_country": "country",
}

# Relations of Wikidata. P1376 relates a capital to its country or region.
WIKIDATA = {
    **dict.fromkeys(("P37", "P103", "P407", "P364", "P1412"), "language"),
    **dict.fromkeys(("P36", "P1376"), "capital"),
    **dict.fromkeys(("P17", "P27", "P495"), "country"),
}

# The first matching beginning decides the category of a row.
_BEGINNINGS = {
    "The native language of": "language",
    "The language of": "language",
    "The official language of": "language",
    "The language used in": "language",
    "The languages spoken, written or signed by": "language",
    "The eye color": "color",
    "The color of": "color",
    "The streak color": "color",
    "The official color": "color",
    "The emergency phone number of": "number",
    "The capital of": "capital",
    "The country of citizenship of": "country",
    "The country of": "country",
    "The original country": "country",
    "The country for sport": "country",
    "The month of the year of": "month",
}

# Answers in the wrong category: a region, and programming languages. Answers of one letter are dropped, too: they are
# truncated, or the language R.
_MISPLACED = frozenset({"Middle East", "Pascal", "Python"})

_ESCAPED = re.compile(r"\\u[0-9a-fA-F]{4}")
_ENDS_IN_ANSWER = re.compile(r"\s*\[Y\]\s*\.?\s*")


def read_relations(files: Sequence[Path]) -> Iterator[Example]:
    """Read the relations of evandez/relations, with every zero-shot template for every sample."""
    for path, category in zip(files, RELATIONS.values(), strict=True):
        templates = _templates(read_json_object(path, ["prompt_templates_zs"]))
        samples = list(read_json_examples(path, ["subject", "object"], key="samples"))
        for template in templates:
            for row in samples:
                subject = _unescaped(text_of(row, "subject"))
                prompt = template.replace("{}", subject)
                yield from _example(prompt, _unescaped(text_of(row, "object")), category, path.stem, subject)


def _templates(row: Row) -> list[str]:
    templates = row.fields["prompt_templates_zs"]
    if not isinstance(templates, list) or not all(isinstance(t, str) and "{}" in t for t in templates):
        raise complaint(row.location, "templates with {} in 'prompt_templates_zs'", excerpt(templates))
    return templates


def _unescaped(text: str) -> str:
    """Undo a second JSON escape, as in the literal text Bras\\u00edlia."""
    return _ESCAPED.sub(lambda match: str(json.loads(f'"{match[0]}"')), text)


def read_pararel(files: Sequence[Path]) -> Iterator[Example]:
    """Read ParaRel, whose files of facts and patterns alternate: every pattern that ends in [Y] with every fact."""
    for facts, patterns in zip(files[::2], files[1::2], strict=True):
        rows = list(read_jsonl(facts, ["sub_label", "obj_label"]))
        for row in read_jsonl(patterns, ["pattern"]):
            pattern = text_of(row, "pattern")
            end = _ENDS_IN_ANSWER.search(pattern)
            if end is None or end.end() < len(pattern):
                continue
            for fact in rows:
                subject = text_of(fact, "sub_label")
                prompt = pattern[: end.start()].replace("[X]", subject)
                yield from _example(
                    prompt, text_of(fact, "obj_label"), WIKIDATA[facts.stem], relation=facts.stem, subject=subject
                )


def read_known(files: Sequence[Path]) -> Iterator[Example]:
    """Read the known facts of the ROME paper, which contain the whole prompt."""
    for row in read_json_list(files[0], ["prompt", "attribute", "relation_id", "subject"]):
        relation = text_of(row, "relation_id")
        yield from _example(
            text_of(row, "prompt"), text_of(row, "attribute"), WIKIDATA.get(relation), relation, text_of(row, "subject")
        )


def read_wikidata(files: Sequence[Path]) -> Iterator[Example]:
    """Read the rows of BIG-bench's QA Wikidata whose beginning identifies one of the six categories."""
    for row in read_jsonl(files[0], ["context", "continuation"]):
        context = text_of(row, "context")
        beginning = next((words for words in _BEGINNINGS if context.startswith(f"{words} ")), "")
        subject = context[len(beginning) :].strip().removeprefix("of ").removesuffix(" is")
        yield from _example(
            context, text_of(row, "continuation"), _BEGINNINGS.get(beginning), beginning or None, subject
        )


def read_memory_colors(files: Sequence[Path]) -> Iterator[Example]:
    """Read the questions of Memory Colors, and strip the spaces around its cells and names."""
    rows = numbered_cells(files[0], ",", csv.QUOTE_MINIMAL)
    location, header = next(rows, (f"{files[0].name}, line 1", []))
    names = [name.strip() for name in header]
    require(location, names, ["Descriptor", "Item", "Color"])
    for location, cells in rows:
        if len(cells) != len(names):
            raise complaint(location, f"{len(names)} cells", str(len(cells)))
        row = Row(location, dict(zip(names, (cell.strip() for cell in cells), strict=True)))
        thing = f"{row.fields['Descriptor']} {text_of(row, 'Item')}".strip()
        yield from _example(f"What is the color of {thing}?", text_of(row, "Color"), "color", "color-of", thing)


def read_independence_days(files: Sequence[Path]) -> Iterator[Example]:
    """Read the month and the year in which countries became independent, and put them into our own sentences.

    The column with the event is not used, since it may contain the answer.
    """
    for row in read_csv(files[0], ["Country", "Date_holiday", "Year_celebrated"]):
        country = _in_reading_order(text_of(row, "Country").strip())
        month = _month(row)
        yield from _example(
            f"Each year, {country} celebrates its independence in the month of",
            month,
            "month",
            "month-of-independence",
            country,
        )
        year = text_of(row, "Year_celebrated").strip()
        yield from _example(
            f"Historians say that {country} became independent in the year",
            year,
            "number",
            "year-of-independence",
            country,
        )


def _in_reading_order(country: str) -> str:
    """Convert "Korea, South" to "South Korea"."""
    name, comma, before = country.partition(", ")
    return f"{before} {name}" if comma else country


def _month(row: Row) -> str:
    month, _, day = text_of(row, "Date_holiday").partition("/")
    try:
        return MONTHS[date(2000, int(month), int(day)).month - 1]
    except ValueError as error:
        raise complaint(row.location, "a date such as 8/19", excerpt(row.fields["Date_holiday"])) from error


def read_numersense(files: Sequence[Path]) -> Iterator[Example]:
    """Read the sentences of NumerSense up to their mask, since a causal model cannot see the words after it."""
    for path in files:
        for location, line in numbered_lines(path):
            sentence, tab, number = line.partition("\t")
            before, mask, _ = sentence.partition("<mask>")
            if not tab or not mask or not number.strip():
                raise complaint(location, "a sentence with <mask>, a tab and a word", excerpt(line))
            yield from _example(before, number, "number")


def _example(
    prompt: str, answer: str, category: str | None, relation: str | None = None, subject: str | None = None
) -> Iterator[Example]:
    """Yield the example, unless the prompt is empty (a mask comes first) or the answer is in the wrong category."""
    prompt, answer = prompt.strip(), answer.strip()
    misplaced = answer in _MISPLACED or (len(answer) == 1 and not answer.isdigit())
    if prompt and not misplaced:
        yield Example(prompt, category=category, relation=relation, subject=subject, answer=answer)
