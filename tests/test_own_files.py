"""A user's own file is read in every format, with the habits of the programs that wrote it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdb.errors import DatasetError, KdbError, UnknownNameError
from kdb.ingest.datasets import load_dataset
from kdb.ingest.datasets.userfile import load_texts

EVERY_LABEL = "label 0, 1, true, false, yes, no, positive or negative"
WEATHER = [("It rains.", 1), ("It snows; and, it hails.", 0), ('"It" pours', 1)]

Rows = list[dict[str, str]]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def message(name: str, **options: object) -> str:
    with pytest.raises(KdbError) as caught:
        load_dataset(name, **options)  # type: ignore[arg-type]
    return str(caught.value)


def read(name: str, **options: object) -> list[tuple[str, int | None]]:
    return [(example.text, example.label) for example in load_dataset(name, **options).examples]  # type: ignore[arg-type]


def separated(rows: Rows, delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parquet(rows: Rows) -> bytes:
    content = io.BytesIO()
    pl.DataFrame(rows).write_parquet(content)
    return content.getvalue()


WRITERS: dict[str, Callable[[Rows], str | bytes]] = {
    "d.csv": separated,
    "declared/d.csv": lambda rows: "sep=;\n" + separated(rows, ";"),
    "quoted/d.csv": lambda rows: '"sep=|"\r\n' + separated(rows, "|"),
    "semicolons/d.csv": lambda rows: separated(rows, ";"),
    "tabs/d.csv": lambda rows: separated(rows, "\t"),
    "d.tsv": lambda rows: separated(rows, "\t"),
    "d.json": json.dumps,
    "inside/d.json": lambda rows: json.dumps({"version": 1, "tags": ["a"], "data": rows}, indent=1),
    "d.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "d.parquet": parquet,
    "d.csv.gz": lambda rows: gzip.compress(separated(rows).encode()),
    "d.tsv.gz": lambda rows: gzip.compress(separated(rows, "\t").encode()),
    "d.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "d.jsonl.gz": lambda rows: gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()),
}

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40).filter(
    lambda text: bool(text.strip())
)


@st.composite
def concept_rows(draw: st.DrawFn) -> Rows:
    texts = draw(st.lists(TEXTS, min_size=2, max_size=6, unique_by=str.strip))
    text, label = draw(st.sampled_from([("text", "label"), ("Text", "LABEL"), (" TEXT", "Label ")]))
    labels = [draw(st.sampled_from("01")) for _ in texts[2:]]
    return [{text: one, label: two} for one, two in zip(texts, ["0", "1", *labels], strict=True)]


@st.composite
def knowledge_rows(draw: st.DrawFn) -> Rows:
    prompts = draw(st.lists(TEXTS, min_size=2, max_size=4, unique_by=str.strip))
    one, other = draw(st.lists(TEXTS, min_size=2, max_size=2, unique_by=str.strip))
    names = draw(st.sampled_from([("prompt", "answer", "category"), ("Prompt", "Answer", "Category")]))
    answers = [one if i % 2 else other for i in range(len(prompts))]
    return [dict(zip(names, (p, a, "c"), strict=True)) for p, a in zip(prompts, answers, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(concept_rows() | knowledge_rows())
def test_the_same_rows_are_the_same_dataset_in_every_format(folder: Path, rows: Rows) -> None:
    found = {}
    for name, written in WRITERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        found[name] = load_dataset(write(folder / name, written(rows)))
    first = found["d.csv"]
    assert {dataset.name for dataset in found.values()} == {"d"}
    assert {(dataset.study, dataset.examples, dataset.fingerprint) for dataset in found.values()} == {
        (first.study, first.examples, first.fingerprint)
    }
    assert len(first.examples) == len(rows)


# --- separators and cells ---


def test_a_header_with_commas_is_never_split_at_semicolons(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", "text,label,a;b\none;two,1,x\nthree,0,y\n")) == [("one;two", 1), ("three", 0)]


def test_a_cell_longer_than_csv_reads_by_itself_is_read(tmp_path: Path) -> None:
    long = "word " * 60_000
    assert read(write(tmp_path / "a.csv", f"text,label\n{long},1\nshort,0\n")) == [(long, 1), ("short", 0)]


def test_lines_are_counted_with_the_one_that_declares_the_separator(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "sep=;\ntext;label\none;1\ntwo\n")
    assert message(file) == "a.csv, line 4: expected 2 cells, found 1: complete the row, or remove it"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text,label\nYes, it is,1\n", "put a text that contains a comma in quotes"),
        ("a.csv", "text;label\nYes; it is;1\n", "put a text that contains a semicolon in quotes"),
        ("a.tsv", 'text\tlabel\n"Yes" it is\t1\n', "put a text with quotation marks in quotes, and double the marks"),
    ],
)
def test_a_row_that_cannot_be_split_says_how_to_write_it(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    said = message(write(tmp_path / name, content))
    assert said.startswith(f"{name}, line 2: expected ") and said.endswith(f": {expected}")


def test_a_column_that_two_names_mean_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "Text,TEXT,label\na,b,1\n")
    assert message(file) == "a.csv, line 1: expected one column 'text', found 'Text', 'TEXT', 'label'"
    exact = write(tmp_path / "b.csv", "text,TEXT,label\na,b,1\nc,d,0\n")
    assert read(exact) == [("a", 1), ("c", 0)]


def test_a_group_is_found_in_any_case(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "Text,Label,Town\na,1,Bonn\nb,0,Kiel\n")
    assert [example.group for example in load_dataset(file, group_by="town").examples] == ["Bonn", "Kiel"]


# --- JSON ---


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '{"text": {"0": "a"}, "label": {"0": 1}}',
            "a.json: expected a list of objects, or one object with one such list, found an object with 0 lists of "
            "objects: write a list, in pandas by to_json(orient='records')",
        ),
        ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "found an object with 2 lists of objects"),
        ("3", "found int: write a list"),
        (
            '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n',
            "a.json, line 2: expected valid JSON, found Extra data. If it has an object in each line, name it a.jsonl",
        ),
        ('[{"text": "a",}]', "a.json, line 1: expected valid JSON, found "),
        ("[" * 100_000, "a.json: expected JSON that Python can read, found "),
        ('[{"text": "a", "label": 1}, 5]', "a.json, record 2: expected a JSON object, found 5"),
        (
            '[{"text": "a", "label": 1},\n{"text": "b"}]',
            "a.json, record 2: expected one column 'label', found 'text'",
        ),
        ("[]", "a.json, record 1: expected columns 'text' and 'label', or "),
    ],
)
def test_json_of_another_shape_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    assert expected in message(write(tmp_path / "a.json", content))


def test_objects_may_write_a_column_in_different_cases(tmp_path: Path) -> None:
    lines = '{"Text": "a", "label": 1}\n{"text": "b", "Label": 0, "relation": "r"}\n'
    assert read(write(tmp_path / "a.jsonl", lines)) == [("a", 1), ("b", 0)]


# --- compressed files ---


def test_a_damaged_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"text,label\na,1\nb,0\n")
    for content in (b"text,label\na,1\n", whole[:-9], whole[:12] + b"\xff" * 20):
        file = write(tmp_path / "a.csv.gz", content)
        assert message(file).startswith(f"Cannot read '{file}' as gzip: ")
        assert message(file).endswith("Compress the file again.")


def test_a_file_of_another_format_is_told_which_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.xlsx", "")
    ending = "its name must end in .csv, .tsv, .json, .jsonl or .parquet. Save it as one of these."
    assert message(file) == f"Cannot read '{file}': {ending}"
    with pytest.raises(DatasetError, match="Save it as one of these"):
        load_texts(tmp_path / "a.parquet.gz")


# --- labels ---


@pytest.mark.parametrize("labels", [("1.0", "0.0"), ("1.", "0."), ("TRUE", "False"), (" yes", "No "), ("1.0", "0")])
def test_labels_of_other_programs_are_read(tmp_path: Path, labels: tuple[str, str]) -> None:
    one, zero = labels
    assert read(write(tmp_path / "a.csv", f"text,label\na,{one}\nb,{zero}\n")) == [("a", 1), ("b", 0)]


@pytest.mark.parametrize("dtype", ["Int64", "int8", "Float64", "float32", "boolean", "string", "category", "object"])
def test_labels_of_pandas_are_read_from_parquet(tmp_path: Path, dtype: str) -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [1, 0, 1]})
    values = frame["label"].astype(str).replace({"1": "yes", "0": "no"}) if dtype in ("string", "category") else None
    frame["label"] = (frame["label"] if values is None else values).astype(dtype)
    frame.to_parquet(tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == [("a", 1), ("b", 0), ("c", 1)]


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "boolean", "float64"])
def test_a_label_that_pandas_left_empty_is_named_by_its_row(tmp_path: Path, dtype: str) -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": pd.array([1, 0, None], dtype="Int64").astype(dtype)})
    frame.to_parquet(tmp_path / "a.parquet")
    said = message(str(tmp_path / "a.parquet"))
    assert said.startswith(f"a.parquet, row 3: expected {EVERY_LABEL}, found ")
    assert said.endswith(": write one, or remove the row")


KINDS = "text,label\na dog,animal\nan oak,plant\na cat, Animal\n"


def test_the_class_that_is_label_1_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "kinds.csv", KINDS)
    assert read(file, positive="animal") == [("a dog", 1), ("an oak", 0), ("a cat", 1)]
    animals, plants = load_dataset(file, positive="ANIMAL"), load_dataset(file, positive="plant")
    assert [example.label for example in plants.examples] == [0, 1, 0]
    assert animals.fingerprint != plants.fingerprint
    assert plants.source == "kinds.csv, a user's file, label 1: plant"


def test_without_it_two_classes_are_listed(tmp_path: Path) -> None:
    assert message(write(tmp_path / "kinds.csv", KINDS)) == (
        f"kinds.csv, line 2: expected {EVERY_LABEL}, found 'animal': say which of the two classes is label 1, by "
        "--positive 'animal' or --positive 'plant'"
    )


def test_of_several_classes_one_is_set_against_all_others(tmp_path: Path) -> None:
    file = write(tmp_path / "kinds.csv", KINDS + "".join(f"text {i},kind {i}\n" for i in range(5)))
    assert sum(label or 0 for _text, label in read(file, positive="kind 3")) == 1
    assert message(file).endswith(
        ": correct it, or name the class of label 1 by --positive; the column has 'animal', 'plant', 'kind 0', "
        "'kind 1', 'kind 2' and 2 more"
    )


def test_a_class_that_is_not_in_the_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "kinds.csv", KINDS)
    with pytest.raises(UnknownNameError) as caught:
        load_dataset(file, positive="animls")
    assert str(caught.value) == (
        "Unknown class 'animls'. Did you mean 'animal'? The column label has 'animal', 'plant'."
    )
    empty = write(tmp_path / "empty.csv", "text,label\na,animal\nb,\n")
    assert message(empty, positive="animal") == (
        "empty.csv, line 3: expected a label, found '': write one, or remove the row"
    )


def test_a_class_is_only_for_labels_of_a_users_file(tmp_path: Path) -> None:
    facts = write(tmp_path / "facts.csv", "prompt,answer,category\na,b,c\nd,e,c\n")
    for name in ("world-cities", "knowledge", facts):
        assert "takes no --positive: it is for a file of your own whose labels are names" in message(name, positive="x")
    texts = tmp_path / "texts.csv"
    write(texts, "text\na\n")
    with pytest.raises(DatasetError, match="expected a column 'label' for --positive, found none"):
        load_texts(texts, positive="x")


def test_new_texts_have_the_same_labels(tmp_path: Path) -> None:
    write(tmp_path / "kinds.csv", KINDS)
    assert [example.label for example in load_texts(tmp_path / "kinds.csv", positive="animal")] == [1, 0, 1]
    write(tmp_path / "texts.tsv.gz", gzip.compress(b"Text\na\nb\n"))
    assert [(e.text, e.label) for e in load_texts(tmp_path / "texts.tsv.gz")] == [("a", None), ("b", None)]
