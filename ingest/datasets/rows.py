"""Readers, one per file format: they yield rows with their position in the file.

A reader takes a path and the needed columns, and yields rows that have all of them. If it cannot read something, it
raises a DatasetError with file, line, what was expected and what was found. CSV is read by the standard library and
not by Polars, since only the former gives the line of every row.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdb.errors import DatasetError


@dataclass(frozen=True)
class Row:
    """One record, and its position in the file, such as "cities.csv, line 17"."""

    location: str
    fields: Mapping[str, object]


_LONGEST_CELL = 2**31 - 1
"""Characters of the longest cell of a file: the greatest number that csv takes on every platform."""

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
        yield object_row(location, record, line, needed)


def read_json_examples(path: Path, needed: Collection[str], key: str = "examples") -> Iterator[Row]:
    """Read one JSON object with a list of objects at the key `key`."""
    return _listed(path, needed, rf'"{key}"\s*:\s*\[', f'a list named "{key}"')


def read_json_list(path: Path, needed: Collection[str]) -> Iterator[Row]:
    """Read one JSON list of objects."""
    return _listed(path, needed, r"\A\s*\[", "a JSON list")


def _listed(path: Path, needed: Collection[str], opening: str, expected: str) -> Iterator[Row]:
    text = read_text(path)
    parsed_json(path.name, text)
    start = re.search(opening, text)
    if start is None:
        raise complaint(path.name, expected, "none")
    for line, element in _array_elements(text, start.end()):
        yield object_row(f"{path.name}, line {line}", element, element, needed)


def read_json_object(path: Path, needed: Collection[str]) -> Row:
    """Read one JSON object."""
    text = read_text(path)
    return object_row(path.name, parsed_json(path.name, text), text, needed)


def parsed_json(name: str, text: str) -> object:
    """Parse the JSON of the file `name`; raise DatasetError, with the line if it is known."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise complaint(f"{name}, line {error.lineno}", "valid JSON", error.msg) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, or too many brackets
        raise complaint(name, "JSON that Python can read", str(error)) from error


def read_label_first(path: Path, needed: Collection[str]) -> Iterator[Row]:
    """Read lines with a label, a space and a text, as columns `label` and `text`."""
    for location, line in numbered_lines(path):
        label, _, text = line.partition(" ")
        fields = {"label": label, "text": text}
        require(location, fields, needed)
        yield Row(location, fields)


def parquet_columns(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file."""
    import polars as pl  # takes a third of a second, which would slow down `kdb --help`

    with _parquet_errors(path), path.open("rb") as file:
        return list(pl.read_parquet_schema(file))


def read_parquet(path: Path, needed: Collection[str]) -> Iterator[Row]:
    """Read the needed columns of a Parquet file; positions are rows, counted from 1."""
    import polars as pl

    with _parquet_errors(path), path.open("rb") as file:
        frame = pl.read_parquet(file, columns=list(needed))
    for number, fields in enumerate(frame.iter_rows(named=True), start=1):
        yield Row(f"{path.name}, row {number}", fields)


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import polars as pl

    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DatasetError(f"Cannot read {str(path)!r} as Parquet: {error}. Write the file again.") from error


def _delimited(path: Path, needed: Collection[str], *, delimiter: str, quoting: Quoting) -> Iterator[Row]:
    rows = numbered_cells(path, delimiter, quoting)
    location, header = next(rows, (f"{path.name}, line 1", []))
    require(location, header, needed)
    for location, cells in rows:
        check_width(location, header, cells)
        yield Row(location, dict(zip(header, cells, strict=True)))


def check_width(location: str, header: Sequence[str], cells: Sequence[str], hint: str = "") -> None:
    """Raise DatasetError unless a row has a cell for each column."""
    if len(cells) != len(header):
        raise complaint(location, f"{len(header)} cells", f"{len(cells)}{hint}")


def numbered_cells(path: Path, delimiter: str, quoting: Quoting) -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of every row that is not blank, with the position where the row begins."""
    return cells_of(path.name, read_text(path), delimiter, quoting)


def cells_of(name: str, text: str, delimiter: str, quoting: Quoting) -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of every row of the text of a file `name`, as :func:`numbered_cells` does."""
    csv.field_size_limit(_LONGEST_CELL)
    # newline="" leaves line ends to csv: a line end inside quotes is part of a text.
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    line = 1
    try:
        for cells in table:
            if cells:
                yield f"{name}, line {line}", cells
            line = table.line_num + 1
    except csv.Error as error:
        actual = f"one that cannot be split ({error}): put a text with quotation marks in quotes, and double the marks"
        raise complaint(f"{name}, line {line}", "a row of whole cells", actual) from error


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield every line that is not blank, with its position."""
    # Not splitlines: it also splits at U+0085 and U+2028, which occur inside texts.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
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


def object_row(location: str, record: object, shown: object, needed: Collection[str] = ()) -> Row:
    """Return a JSON object as a row; raise DatasetError for another value, or without the needed keys."""
    if not isinstance(record, dict):
        raise complaint(location, "a JSON object", excerpt(shown))
    require(location, record, needed)
    return Row(location, record)


def read_bytes(path: Path) -> bytes:
    """Read all bytes of a file; of one that ends in .gz, those that it holds compressed."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DatasetError(f"Cannot read {str(path)!r} as gzip: {error}. Compress the file again.") from error
    except OSError as error:
        raise DatasetError(f"Cannot read {str(path)!r}: {error.strerror}") from error


def read_text(path: Path) -> str:
    """Read a UTF-8 file; a byte order mark, which spreadsheets write, is dropped."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        actual = f"the byte 0x{error.object[error.start]:02x}: save the file as UTF-8"
        raise complaint(f"{path.name}, line {line}", "UTF-8 text", actual) from error
