"""Readers, one per file format: they yield rows with their position in the file.

A reader takes a path and the needed columns, and yields rows that have all of them. If it cannot read something, it
raises a DatasetError with file, line, what was expected and what was found. CSV is read by the standard library and
not by Polars, since only the former gives the line of every row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdb.errors import DatasetError


@dataclass(frozen=True)
class Row:
    """One record, and its position in the file, such as "cities.csv, line 17"."""

    location: str
    fields: Mapping[str, object]


Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
Reader = Callable[[Path, Collection[str]], Iterator[Row]]


def complaint(location: str, expected: str, actual: str) -> DatasetError:
    """Build a DatasetError about a file's content; all have the same form."""
    return DatasetError(f"{location}: expected {expected}, found {actual}")


def excerpt(value: object) -> str:
    """Quote a value for a message, shortened to a readable length."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def require(location: str, columns: Collection[str], needed: Collection[str]) -> None:
    """Raise DatasetError unless each needed column exists exactly once."""
    for name in needed:
        if list(columns).count(name) != 1:
            raise complaint(location, f"one column {name!r}", ", ".join(map(repr, columns)) or "no columns")


def read_csv(path: Path, needed: Collection[str]) -> Iterator[Row]:
    """Read comma-separated values with a header; cells may be quoted."""
    return _delimited(path, needed, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def read_tsv(path: Path, needed: Collection[str]) -> Iterator[Row]:
    """Read tab-separated values with a header; quotes are plain text."""
    return _delimited(path, needed, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_jsonl(path: Path, needed: Collection[str]) -> Iterator[Row]:
    """Read one JSON object per line."""
    for location, line in numbered_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        yield _object_row(location, record, line, needed)


def read_json_examples(path: Path, needed: Collection[str], key: str = "examples") -> Iterator[Row]:
    """Read one JSON object with a list of objects at the key `key`."""
    return _listed(path, needed, rf'"{key}"\s*:\s*\[', f'a list named "{key}"')


def read_json_list(path: Path, needed: Collection[str]) -> Iterator[Row]:
    """Read one JSON list of objects."""
    return _listed(path, needed, r"\A\s*\[", "a JSON list")


def _listed(path: Path, needed: Collection[str], opening: str, expected: str) -> Iterator[Row]:
    text = _read_text(path)
    _parsed(path, text)
    start = re.search(opening, text)
    if start is None:
        raise complaint(path.name, expected, "none")
    for line, element in _array_elements(text, start.end()):
        yield _object_row(f"{path.name}, line {line}", element, element, needed)


def read_json_object(path: Path, needed: Collection[str]) -> Row:
    """Read one JSON object."""
    text = _read_text(path)
    return _object_row(path.name, _parsed(path, text), text, needed)


def _parsed(path: Path, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise complaint(f"{path.name}, line {error.lineno}", "valid JSON", error.msg) from error


def read_label_first(path: Path, needed: Collection[str]) -> Iterator[Row]:
    """Read lines with a label, a space and a text, as columns `label` and `text`."""
    for location, line in numbered_lines(path):
        label, _, text = line.partition(" ")
        fields = {"label": label, "text": text}
        require(location, fields, needed)
        yield Row(location, fields)


def read_parquet(path: Path, needed: Collection[str]) -> Iterator[Row]:
    """Read the needed columns of a Parquet file; positions are rows, counted from 1."""
    import polars as pl  # takes a third of a second, which would slow down `kdb --help`

    try:
        with path.open("rb") as file:
            require(path.name, list(pl.read_parquet_schema(file)), needed)
            file.seek(0)
            frame = pl.read_parquet(file, columns=list(needed))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _not_parquet(path, error) from error
    for number, fields in enumerate(frame.iter_rows(named=True), start=1):
        yield Row(f"{path.name}, row {number}", fields)


def _parquet_columns(path: Path) -> list[str]:
    import polars as pl

    try:
        with path.open("rb") as file:
            return list(pl.read_parquet_schema(file))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _not_parquet(path, error) from error


def _not_parquet(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"Cannot read {str(path)!r} as Parquet: {error}")


def column_names(path: Path) -> tuple[str, list[str]]:
    """Return the columns of a .csv or .parquet file, or of a .jsonl file's first object, with their position."""
    if path.suffix.lower() == ".parquet":
        return path.name, _parquet_columns(path)
    nothing: tuple[str, list[str]] = (f"{path.name}, line 1", [])
    if path.suffix.lower() == ".jsonl":
        return next(((row.location, list(row.fields)) for row in read_jsonl(path, ())), nothing)
    return next(numbered_cells(path, ",", csv.QUOTE_MINIMAL), nothing)


def _delimited(path: Path, needed: Collection[str], *, delimiter: str, quoting: Quoting) -> Iterator[Row]:
    rows = numbered_cells(path, delimiter, quoting)
    location, header = next(rows, (f"{path.name}, line 1", []))
    require(location, header, needed)
    for location, cells in rows:
        if len(cells) != len(header):
            raise complaint(location, f"{len(header)} cells", str(len(cells)))
        yield Row(location, dict(zip(header, cells, strict=True)))


def numbered_cells(path: Path, delimiter: str, quoting: Quoting) -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of every row that is not blank, with the position where the row begins."""
    # newline="" leaves line ends to csv: a line end inside quotes is part of a text.
    source = io.StringIO(_read_text(path), newline="")
    table = csv.reader(source, delimiter=delimiter, quoting=quoting, strict=True)
    line = 1
    try:
        for cells in table:
            if cells:
                yield f"{path.name}, line {line}", cells
            line = table.line_num + 1
    except csv.Error as error:
        actual = f"one that cannot be split ({error})"
        raise complaint(f"{path.name}, line {line}", "a row of whole cells", actual) from error


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield every line that is not blank, with its position."""
    # Not splitlines: it also splits at U+0085 and U+2028, which occur inside texts.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path.name}, line {number}", line.removesuffix("\r")


def _array_elements(text: str, position: int) -> Iterator[tuple[int, object]]:
    """Yield the elements of the array that begins before `position` in valid JSON, each with its line."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    while True:
        while text[position] in " \t\r\n,":
            position += 1
        if text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        element, position = decoder.raw_decode(text, position)
        yield line, element


def _object_row(location: str, record: object, shown: object, needed: Collection[str]) -> Row:
    if not isinstance(record, dict):
        raise complaint(location, "a JSON object", excerpt(shown))
    require(location, record, needed)
    return Row(location, record)


def read_bytes(path: Path) -> bytes:
    """Read all bytes of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"Cannot read {str(path)!r}: {error.strerror}") from error


def _read_text(path: Path) -> str:
    """Read a UTF-8 file; a byte order mark, which spreadsheets write, is dropped."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        actual = f"the byte 0x{error.object[error.start]:02x}"
        raise complaint(f"{path.name}, line {line}", "UTF-8 text", actual) from error
