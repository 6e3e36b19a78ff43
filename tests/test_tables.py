"""Tables on a terminal: they fit its width, leave nothing out unsaid, and other formats stay complete."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from io import StringIO
from itertools import pairwise, takewhile
from pathlib import Path

import polars as pl
import pytest
from click.testing import Result
from helpers.command_line import answer, refusal
from helpers.knowledge_rows import ALPHA, add_knowledge
from helpers.stored import create_lake
from helpers.synthetic import NINE_CONCEPTS, NINE_MODELS, build, write_manifests

from kdb.queries.catalogue import load_catalogue
from kdb.tables import View, draw
from kdb.text import text_width
from kdb.warehouse.schema import SCHEMA_VERSION
from kdb.warehouse.store import Warehouse

RunKdb = Callable[..., Result]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """Two models, each with two concept datasets and the knowledge study."""
    return build(tmp_path_factory.mktemp("stored") / "w", NINE_MODELS[:2], NINE_CONCEPTS[:2], 6, 20)


def folder(stored: Warehouse) -> Path:
    return Path(stored.storage.local.path)


def frame_of(stored: Warehouse, name: str) -> pl.DataFrame:
    """The first rows of a saved query's answer."""
    given = {"prompt": 0, "layer": 1, "head": 0, "neuron": "f1_0"}
    params = {param.name: given[param.name] for param in load_catalogue()[name].params if param.name in given}
    sizes = {"size": 1.0, "within": 1000} if name == "families-at-size" else {}
    return stored.query(name, **params, **sizes).head(200)


def table(frame: pl.DataFrame, width: int = 100, **view: object) -> str:
    return draw(frame, View(**view), width=width)


def heading(text: str) -> list[str]:
    """The names above the rule of a table, in their order; a name in several lines is one of them."""
    lines = text.splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("─"))
    places = [match.span() for match in re.finditer("─+", lines[rule])]
    gaps = [(end, start) for (_, end), (start, _) in pairwise([*places, (len(text), len(text))])]
    above = takewhile(lambda line: not any(line[a:b].strip() for a, b in gaps), reversed(lines[:rule]))
    head = list(above)[::-1]
    return ["".join(line[start:end].strip() for line in head) for start, end in places]


# Width -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 80])
@pytest.mark.parametrize("name", sorted(load_catalogue()))
def test_every_saved_query_fits_the_width(stored: Warehouse, name: str, width: int) -> None:
    text = table(frame_of(stored, name), width)
    assert max(map(text_width, text.splitlines())) <= width


@pytest.mark.parametrize("name", sorted(load_catalogue()))
def test_every_column_is_shown_or_named_as_left_out(stored: Warehouse, name: str) -> None:
    frame = frame_of(stored, name)
    if frame.is_empty():
        return
    text = table(frame, 80)
    shown = {*re.findall(r"\w+", text), *(heading(text) if "─" in text else ())}
    assert {name for name in frame.columns if not name.endswith(("_low", "_high"))} <= shown


@pytest.mark.parametrize("name", sorted(load_catalogue()))
def test_the_number_of_prompts_is_never_left_out(stored: Warehouse, name: str) -> None:
    frame = frame_of(stored, name)
    left_out = re.search(r"Not shown: ([^.]*)\.", table(frame, 60).replace("\n", " "))
    assert left_out is None or not {"n", "n_prompts", "n_test"} & set(left_out[1].split(", "))


def test_what_is_equal_in_all_rows_is_one_line_above() -> None:
    frame = pl.DataFrame({"model": ["a", "a"], "n_prompts": [5, 5], "layer": [1, 2], "x": [None, None]})
    assert table(frame) == "model a · n_prompts 5 · without a value: x\nlayer\n─────\n    1\n    2"


def test_values_that_only_read_alike_stay_in_the_table() -> None:
    assert heading(table(pl.DataFrame({"layer": [1, 2], "accuracy": [0.90001, 0.90002]}))) == ["layer", "accuracy"]


def test_rows_that_are_all_equal_keep_their_columns() -> None:
    assert heading(table(pl.DataFrame({"a": [1, 1], "b": ["x", "x"]}))) == ["a", "b"]


def test_what_does_not_fit_is_named_with_how_to_see_it() -> None:
    frame = pl.DataFrame({f"column{i}": [i, i + 1] for i in range(10)} | {"n_prompts": [7, 8]})
    text = table(frame, 60)
    assert heading(text)[-1] == "n_prompts"
    *_, first, second = text.splitlines()
    assert f"{first} {second}" == (
        f"Not shown: {', '.join(f'column{i}' for i in range(5, 10))}. "
        "To see all: --wide or --vertical; --columns a,b chooses."
    )
    assert heading(table(frame, 60, wide=True)) == frame.columns


def test_long_texts_are_shortened_and_that_is_said() -> None:
    frame = pl.DataFrame({"layer": [1, 2], "text": ["x" * 200, "漢" * 200]})
    text = table(frame)
    assert max(map(text_width, text.splitlines())) <= 100
    assert "Long texts are shortened." in text
    assert "x" * 200 in table(frame, wide=True)


def test_one_row_that_does_not_fit_is_shown_from_top_to_bottom() -> None:
    frame = pl.DataFrame({f"column{i}": [i] for i in range(20)})
    assert table(frame).splitlines() == [f"{f'column{i}':10}{i}" for i in range(20)]
    assert heading(table(frame[:, :3])) == ["column0", "column1", "column2"]


def test_rows_as_lines_follow_each_other() -> None:
    frame = pl.DataFrame({"layer": [1, 2], "accuracy": [0.5, None]})
    assert table(frame, vertical=True) == "layer     1\naccuracy  0.500\n\nlayer     2\naccuracy  –"


def test_vectors_are_counted() -> None:
    assert "[576 numbers]" in table(pl.DataFrame({"layer": [1, 2], "vector": [[0.1] * 576, [0.2] * 576]}))


# Intervals and marks ---------------------------------------------------------------------------------------------


def test_an_interval_stands_beside_its_number() -> None:
    ends = {"accuracy_low": [0.9, 0.4, None], "accuracy_high": [0.97, 0.6, None], "n_test": [120, 120, 121]}
    frame = pl.DataFrame({"accuracy": [0.94117, 0.5, 0.25]} | ends)
    text = table(frame)
    assert heading(text) == ["accuracy", "n_test"]
    assert [re.split(r"\s{2,}", line.strip())[0] for line in text.splitlines()[2:]] == [
        "0.941 [0.90, 0.97]",
        "0.500 [0.40, 0.60]",
        "0.250",
    ]
    assert heading(table(frame, wide=True)) == frame.columns


def test_an_interval_without_any_number_is_no_column() -> None:
    nothing = pl.DataFrame({"layer": [1, 2], "auc": [None, None], "auc_low": [None, None], "auc_high": [None, None]})
    assert table(nothing).splitlines()[:2] == ["without a value: auc", "layer"]
    texts = nothing.with_columns(auc_low=pl.Series(["a", "b"]))
    assert heading(table(texts)) == ["layer", "auc_low"]


def test_low_and_high_belong_to_the_number_before_them() -> None:
    frame = pl.DataFrame({"b - a": [0.1, 0.2], "low": [0.0, 0.1], "high": [0.2, 0.3], "p": [0.5, 0.6]})
    assert heading(table(frame)) == ["b - a", "p"]
    assert "0.1 ± 0.1" in table(frame)
    prices = frame.rename({"b - a": "close"}).with_columns(close=pl.Series([9.0, 9.5]))
    assert heading(table(prices)) == ["close", "low", "high", "p"]


def test_the_best_row_of_each_ranking_is_bold() -> None:
    frame = pl.DataFrame({"category": ["a", "a", "b", "b"], "rank": [1, 2, 1, 2], "score": [4.0, 3.0, 2.0, 1.0]})
    bold = [line for line in draw(frame, View(), width=100, bold=True).splitlines() if "\x1b[1m" in line]
    assert [line.count("\x1b[0m") for line in bold] == [1, 1]
    assert "\x1b" not in draw(frame, View(), width=100)
    assert "\x1b" not in draw(frame.filter(rank=1), View(), width=100, bold=True)


def test_escape_sequences_in_names_and_values_reach_no_terminal() -> None:
    frame = pl.DataFrame({"a\x1b[2J": ["x\x1b[31m", "y\ny"], "b": [1, 2]})
    for view in (View(), View(wide=True), View(vertical=True)):
        text = draw(frame, view, width=100, bold=True)
        assert "\x1b" not in text
        assert "\\u001b[31m" in text


# The options -----------------------------------------------------------------------------------------------------


@pytest.fixture
def concept_depth(run_kdb: RunKdb, stored: Warehouse) -> Callable[..., Result]:
    return lambda *options: run_kdb("query", "concept-depth", "--warehouse", folder(stored), *options)


def test_columns_are_those_asked_for_in_that_order(concept_depth: Callable[..., Result]) -> None:
    assert heading(answer(concept_depth("--columns", "n_test, model,best_accuracy"))) == [
        *("n_test", "model", "best_accuracy")
    ]
    rows = csv.DictReader(StringIO(answer(concept_depth("--columns", "site,model", "--format", "csv"))))
    assert rows.fieldnames == ["site", "model"]


def test_an_unknown_column_is_refused_with_those_there_are(concept_depth: Callable[..., Result]) -> None:
    said = refusal(concept_depth("--columns", "best_acuracy"))
    assert said.startswith("Unknown column 'best_acuracy'. Did you mean 'best_accuracy'")
    assert "The columns are model, dataset, site, " in said
    assert "needs names" in refusal(concept_depth("--columns", ","))


def test_rows_as_lines_are_no_csv(concept_depth: Callable[..., Result]) -> None:
    assert "--vertical is for tables" in refusal(concept_depth("--vertical", "--format", "csv"))


@pytest.mark.parametrize("format_", ["csv", "json"])
def test_other_formats_stay_complete_and_unrounded(
    stored: Warehouse, concept_depth: Callable[..., Result], format_: str
) -> None:
    text, expected = answer(concept_depth("--format", format_)), stored.query("concept-depth")
    rows = json.loads(text) if format_ == "json" else list(csv.DictReader(StringIO(text)))
    assert list(rows[0]) == expected.columns
    assert [float(row["best_accuracy"]) for row in rows] == expected["best_accuracy"].to_list()


def test_commands_of_several_tables_say_where_columns_work(run_kdb: RunKdb, stored: Warehouse) -> None:
    runs = stored.sql("SELECT run FROM runs WHERE dataset = 'cities' ORDER BY run")["run"].to_list()
    said = refusal(run_kdb("compare", *runs, "--columns", "a", "--warehouse", folder(stored)))
    assert said == "The tables of a comparison have different columns. Use --columns with -o FILE."


# The terminal ----------------------------------------------------------------------------------------------------


def on_a_terminal(*args: str | Path, **environment: str) -> str:
    """The output of a kdb command on a terminal of 80 columns and 10 lines."""
    ours, theirs = pty.openpty()
    size = {"COLUMNS": "80", "LINES": "10", "TERM": "xterm", "PAGER": "sed s/^/PAGED:/"}
    command = [Path(sys.executable).with_name("kdb"), *args]
    started = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **size, **environment}
    )
    os.close(theirs)
    said = b""
    while part := _read(ours):
        said += part
    os.close(ours)
    assert started.wait(60) == 0
    return said.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that nobody writes any more
        return b""


@pytest.fixture(scope="module")
def ranking(stored: Warehouse) -> tuple[str | Path, ...]:
    return ("query", "top-heads", "--category", "capital", "--warehouse", folder(stored))


def test_a_long_table_goes_through_the_pager_of_a_terminal(ranking: tuple[str | Path, ...]) -> None:
    assert "PAGED:" in on_a_terminal(*ranking)
    assert "PAGED:" not in on_a_terminal(*ranking, "--no-pager")
    assert "\x1b[1m" in on_a_terminal(*ranking, PAGER="cat")  # a pager other than less gets no colour
    assert "PAGED:" not in on_a_terminal(*ranking, LINES="100")
    assert "PAGED:" not in on_a_terminal(*ranking, "--k", "1", LINES="12")


def test_the_best_row_is_bold_unless_colour_is_off(ranking: tuple[str | Path, ...]) -> None:
    assert on_a_terminal(*ranking, "--no-pager").count("\x1b[1m") == 2  # one a model
    assert "\x1b" not in on_a_terminal(*ranking, "--no-pager", NO_COLOR="1")


def test_a_table_fits_the_terminal_and_a_pipe_of_100_columns(
    run_kdb: RunKdb, stored: Warehouse, concept_depth: Callable[..., Result]
) -> None:
    narrow = on_a_terminal("query", "concept-depth", "--warehouse", folder(stored), "--no-pager", COLUMNS="60")
    assert max(map(text_width, narrow.splitlines())) <= 60
    piped = max(map(text_width, answer(concept_depth()).splitlines()))
    assert 60 < piped <= 100


# Workbooks -------------------------------------------------------------------------------------------------------


def test_a_workbook_holds_whole_numbers_and_no_formulas(run_kdb: RunKdb, measured: Path, tmp_path: Path) -> None:
    pytest.importorskip("xlsxwriter")
    text = "SELECT 0.123456789012 AS number, '=1+1' AS formula, [1, 2] AS list, NULL AS nothing, 'nan'::DOUBLE AS nan"
    given = ("--warehouse", measured, "-o", tmp_path / "a.xlsx")
    assert run_kdb("sql", text, *given).stderr == f"Wrote 1 rows to {tmp_path / 'a.xlsx'}.\n"
    with zipfile.ZipFile(tmp_path / "a.xlsx") as book:
        sheet, texts = (ET.fromstring(book.read(f"xl/{name}.xml")) for name in ("worksheets/sheet1", "sharedStrings"))
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    assert "0.123456789012" in [value.text for value in sheet.iter(f"{space}v")]
    assert {"number", "=1+1", "[1, 2]"} <= {value.text for value in texts.iter(f"{space}t")}


def test_what_a_sheet_cannot_hold_is_refused(run_kdb: RunKdb, measured: Path, tmp_path: Path) -> None:
    pytest.importorskip("xlsxwriter")
    given = ("--warehouse", measured, "-o", tmp_path / "a.xlsx")
    assert "a sheet of Excel holds 1,048,575" in refusal(run_kdb("sql", "SELECT * FROM range(1048576)", *given))
    assert "cannot be written as xlsx" in refusal(run_kdb("sql", "SELECT repeat('x', 40000) AS long", *given))
    assert list(tmp_path.iterdir()) == []
    said = refusal(run_kdb("sql", "SELECT 1", "--warehouse", measured, "--format", "xlsx"))
    assert said == "--format xlsx needs a file. Name it with -o FILE."


def test_a_workbook_names_the_extra_that_it_needs(
    run_kdb: RunKdb, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xlsxwriter", None)
    said = refusal(run_kdb("sql", "SELECT 1", "--warehouse", measured, "-o", tmp_path / "a.xlsx"))
    assert said == "kdb sql: this needs xlsxwriter, which is not installed: `pip install 'kdb-lm[excel]'`."


# Models that an answer leaves out --------------------------------------------------------------------------------


def test_an_answer_names_the_models_that_it_leaves_out(run_kdb: RunKdb, tmp_path: Path) -> None:
    lake = create_lake(tmp_path / "w")
    add_knowledge(lake, "alpha", "facts", "a" * 16, ALPHA)
    add_knowledge(lake, "beta", "facts", "b" * 16, ALPHA, variant="limit=5")
    (tmp_path / "w/warehouse.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}}}')
    write_manifests(tmp_path / "w")
    left_out = "Note: Not shown, without a run of the variant 'default': beta (limit=5). --variant chooses another.\n"
    given = ("query", "top-heads", "--warehouse", tmp_path / "w")
    assert run_kdb(*given).stderr == left_out
    assert run_kdb(*given, "--model", "alpha").stderr == ""
    assert "alpha (default)" in run_kdb(*given, "--variant", "limit=5").stderr
    assert "Not shown" not in run_kdb("query", "checks", "--warehouse", tmp_path / "w").stderr  # of all variants


def test_nothing_is_said_if_nothing_is_left_out(concept_depth: Callable[..., Result]) -> None:
    assert concept_depth().stderr == ""
