"""Read a user's file as a table: its columns, and its rows with their positions.

    table = read_table(Path("my.csv.gz"))
    table.rows(["text", "label"])  # columns that the file may write as Text and LABEL

The formats are CSV, tab-separated values, JSON, JSON lines and Parquet; all but Parquet may be compressed by gzip.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kdb.errors import DatasetError, did_you_mean
from kdb.ingest.datasets.rows import (
    Row,
    cells_of,
    check_width,
    complaint,
    numbered_lines,
    object_row,
    parquet_columns,
    parsed_json,
    read_jsonl,
    read_parquet,
    read_text,
)

_DECLARED = re.compile(r'"?sep=([^\w\s"]|\t)"?')
"""A first line that declares the separator, as Excel reads and writes it."""

_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}


@dataclass(frozen=True)
class Table:
    """The columns of a file, the position where they are named, and a function that reads the rows of some of them."""

    location: str
    columns: Sequence[str]
    read: Callable[[Collection[str]], Iterable[Row]]

    def has(self, *names: str) -> bool:
        """Whether the file has all these columns, in any case."""
        return all(_same(self.columns, name) for name in names)

    def rows(self, needed: Collection[str], optional: Collection[str] = ()) -> Iterator[Row]:
        """Yield the rows with these columns under these names; an optional column may be missing in some rows.

        Raises DatasetError for a needed column that is missing, and for a column that the file has twice.
        """
        wanted = [_only(self.location, self.columns, name) for name in needed]
        extra = [_only(self.location, self.columns, name) for name in optional if self.has(name)]
        for row in self.read(list(dict.fromkeys([*wanted, *extra]))):
            named = [*needed, *(name for name in optional if _same(row.fields, name))]
            fields = {name: row.fields[_only(row.location, row.fields, name)] for name in named}
            yield Row(row.location, fields)


def _same(columns: Collection[str], name: str) -> list[str]:
    """Return the columns of this name; if there are none, those that differ from it in case or outer spaces only."""
    return [c for c in columns if c == name] or [c for c in columns if c.strip().lower() == name.strip().lower()]


def _only(location: str, columns: Collection[str], name: str) -> str:
    found = _same(columns, name)
    if len(found) != 1:
        raise complaint(location, f"one column {name!r}", ", ".join(map(repr, columns)) or "no columns")
    return found[0]


def format_of(name: str) -> str | None:
    """Return the ending of a file's name that says its format, without .gz; None if it says none that kdb reads."""
    path = Path(name.lower())
    if path.suffix == ".gz":
        ending = Path(path.stem).suffix
        return ending if ending in _READERS and ending != ".parquet" else None
    return path.suffix if path.suffix in _READERS else None


def stem_of(path: Path) -> str:
    """Return a file's name without the endings that say its format."""
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def read_table(path: Path) -> Table:
    """Read the columns of a file; raise DatasetError for one that is missing, or cannot be read."""
    ending = format_of(path.name)
    if ending is None:
        raise DatasetError(f"Cannot read {str(path)!r}: its name must end in {ENDINGS}. Save it as one of these.")
    if not path.exists():
        raise _missing(path)
    if path.is_dir():
        raise DatasetError(f"Cannot read {str(path)!r}: it is a folder. Name a file in it.")
    return _READERS[ending](path)


def _missing(path: Path) -> DatasetError:
    """Return the error for a file that does not exist, with the names in its folder that are near."""
    if not path.parent.is_dir():
        return DatasetError(f"There is no file {str(path)!r}: no such folder {str(path.parent)!r}. Check the path.")
    names = [one.name for one in path.parent.iterdir() if format_of(one.name)]
    where = f"in {str(path.parent)!r}" if path.is_absolute() else f"in {str(path.parent.absolute())!r}"
    return DatasetError(
        f"There is no file {path.name!r} {where}.{did_you_mean(path.name, names)} Check the name, or give its path."
    )


# Formats ---------------------------------------------------------------------------------------------------------


def _separated(path: Path, *, separator: str | None = None) -> Table:
    """Read cells with a separator, which the file declares, or which its header shows if none is given."""
    first = next((line for _location, line in numbered_lines(path)), "")
    declared = _DECLARED.fullmatch(first.rstrip(" "))
    chosen = declared[1] if declared else separator or _shown(first)
    cells = cells_of(path.name, read_text(path), chosen, csv.QUOTE_MINIMAL)
    if declared:
        next(cells)
    location, header = next(cells, (f"{path.name}, line 1", []))
    return Table(location, header, lambda _columns: _cell_rows(header, cells, chosen))


def _shown(header: str) -> str:
    """Return the separator of a header: a semicolon or a tab only if no comma is there."""
    return next((one for one in ";\t" if one in header and "," not in header), ",")


def _cell_rows(header: Sequence[str], rows: Iterable[tuple[str, list[str]]], separator: str) -> Iterator[Row]:
    name = _SEPARATORS.get(separator, repr(separator))
    more, fewer = f"put a text that contains {name} in quotes", "complete the row, or remove it"
    for location, cells in rows:
        check_width(location, header, cells, f": {more if len(cells) > len(header) else fewer}")
        yield Row(location, dict(zip(header, cells, strict=True)))


def _records(path: Path, rows: Sequence[Row], where: str) -> Table:
    """Return a table of objects, whose columns are those of the first one."""
    location, columns = (rows[0].location, list(rows[0].fields)) if rows else (f"{path.name}, {where}", [])
    return Table(location, columns, lambda _columns: rows)


def _json_lines(path: Path) -> Table:
    return _records(path, list(read_jsonl(path, ())), "line 1")


def _json(path: Path) -> Table:
    """Read a list of objects, or an object with one such list. Positions are records: the file may be one line."""
    text = read_text(path)
    try:
        content = parsed_json(path.name, text)
    except DatasetError as error:
        lines = "Extra data" in str(error)
        hint = f". If it has an object in each line, name it {stem_of(path)}.jsonl" if lines else ": correct it"
        raise DatasetError(f"{error}{hint}") from error
    numbered = enumerate(_list_in(path.name, content), start=1)
    rows = [object_row(f"{path.name}, record {number}", one, one) for number, one in numbered]
    return _records(path, rows, "record 1")


def _list_in(name: str, content: object) -> list[object]:
    if isinstance(content, list):
        return content
    inside = content if isinstance(content, dict) else {}
    lists = [value for value in inside.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1:
        return lists[0]
    actual = f"an object with {len(lists)} lists of objects" if isinstance(content, dict) else type(content).__name__
    raise complaint(
        name,
        "a list of objects, or one object with one such list",
        f"{actual}: write a list, in pandas by to_json(orient='records')",
    )


def _parquet(path: Path) -> Table:
    return Table(path.name, parquet_columns(path), partial(read_parquet, path))


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _separated,
    ".tsv": partial(_separated, separator="\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}

ENDINGS = f"{', '.join(list(_READERS)[:-1])} or {list(_READERS)[-1]}"
"""The endings of files that kdb reads, for messages."""
