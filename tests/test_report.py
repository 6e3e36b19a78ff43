"""The report: complete for what was measured, plain about what was not, one file, and built on both real models."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result
from helpers.synthetic import Concept, Model, build, write_manifests

import kdb
from kdb.analysis.captions import CAVEAT
from kdb.analysis.report import Report, command
from kdb.analysis.report import build as build_report
from kdb.cli import main
from kdb.errors import UnknownNameError
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

TINY = (Model("tiny-a", "tiny", 10**8, 4, 2), Model("tiny-b", "tiny", 3 * 10**8, 6, 3))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    return build(tmp_path_factory.mktemp("w") / "w", TINY, [Concept("cities", 40, 0.9)], 12, top_k=10)


@pytest.fixture(scope="module")
def report(small: Warehouse) -> Report:
    return build_report(small)


class Links(HTMLParser):
    """Every address that a page would load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def links(page: str) -> Links:
    parser = Links()
    parser.feed(page)
    return parser


def test_the_page_needs_no_other_file_and_runs_no_script(report: Report) -> None:
    page = links(report.html())
    assert {address.partition(":")[0] for address in page.found if not address.startswith("#")} == {"data"}
    assert "script" not in page.tags


def test_every_table_and_figure_names_the_command_that_makes_it_again(report: Report) -> None:
    items = [item for chapter in report.chapters.values() for item in chapter]
    assert len(items) > 20
    for item in items:
        words = item.command.partition("   #")[0].split()
        assert words[:2] in (["kdb", "query"], ["kdb", "plot"])
        group = main.commands[words[1]]
        made = group.get_command(None, words[2])  # type: ignore[attr-defined]
        options = {name for param in made.params for name in param.opts}
        assert {word for word in words if word.startswith("-")} <= options


def test_a_report_of_everything_misses_nothing(report: Report) -> None:
    assert report.missing == []
    assert report.models == ["tiny-a", "tiny-b"]


def test_tables_of_j_and_c_say_what_they_are_worth_and_where_probes_disagree(report: Report) -> None:
    items = {item.title: item for item in report.chapters["Concept depth"] if item.frame is not None}
    for item in items.values():
        assert item.frame is not None
        if {"jump_percent", "point"} & set(item.frame.columns):
            assert CAVEAT in item.note
    measures, points = items["Measures of depth"].frame, items["J and C of every probe"].frame
    assert measures is not None
    assert points is not None
    assert {"n_test", "best_layers", "depth_90_percent", "p_beats_baseline", "p_any_rise"} <= set(measures.columns)
    assert {"logistic", "logistic-raw", "logistic-paper", "agree"} <= set(points.columns)


def test_tables_of_means_keep_datasets_apart_and_print_the_number_of_prompts(tmp_path: Path) -> None:
    wh = build(tmp_path / "w", TINY[:1], [], prompts_per_category=12, top_k=10, more_facts={"relations": 4})
    report = build_report(wh)
    items = [item for item in report.chapters["Knowledge attribution"] if item.frame is not None]
    assert len(items) >= 8
    for item in items:
        assert item.frame is not None
        assert set(item.frame["dataset"]) == {"knowledge", "relations"}, item.title
        assert {"n_prompts", "n_prompts_a"} & set(item.frame.columns), item.title
    titles = [item.title for item in items]
    assert {"Heads shared by categories", "Neurons shared by categories"} <= set(titles)
    best = next(item for item in items if item.title.startswith("Table 10"))
    for dataset, text in best.frame.select("dataset", "best first").rows():  # type: ignore[union-attr]
        assert ("–" in text) == (dataset == "knowledge"), "ranks have no range below five prompts"
    assert "below five prompts" in best.note


def test_the_best_heads_stand_beside_their_effects_and_say_which_are_exact(report: Report, small: Warehouse) -> None:
    items = {item.title: item for item in report.chapters["Knowledge attribution"]}
    best = items["Table 10: the ten best heads"]
    assert best.frame is not None
    row = best.frame.filter(model="tiny-a", category="capital").row(0, named=True)
    names = [entry.partition(" ")[0] for entry in row["best first"].split(", ")]
    exact, estimated = (row[name].split(", ") for name in ("exact effect", "estimated effect (atp)"))
    assert len(names) == len(exact) == len(estimated) == 8
    effects = small.query("head-effects", model="tiny-a", category="capital", k=1000)
    stored = dict(effects.select("head_name", "logp").rows())
    assert exact == [f"{stored[name]:+.2f}" if name in stored else "–" for name in names]
    assert "–" in exact
    assert "–" not in estimated
    assert "measured by running the model (exact), or estimated from a gradient (atp)" in best.note
    agreement = items["Agreement of scores and effects"].frame
    assert agreement is not None
    assert {"spearman", "low", "high", "n_parts", "n_prompts"} <= set(agreement.columns)
    for title in ("Effect of every head (atp)", "Score and effect of heads"):
        assert items[title].picture


def test_an_older_warehouse_says_what_measures_effects(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    build(folder, TINY[:1], [], prompts_per_category=6, top_k=10)
    for table in ("effects", "lens_readouts"):
        shutil.rmtree(next(folder.glob(f"lake/model=tiny-a/*/*/{table}")))
    write_manifests(folder)
    report = build_report(Warehouse(folder))
    missing = "\n".join(report.missing)
    for title in ("Effect of every head (atp)", "Agreement of scores and effects", "First layer at which"):
        assert title in missing
    assert "Effects are stored by `kdb ingest` and `kdb patch`" in missing
    best = next(item for item in report.chapters["Knowledge attribution"] if item.title.startswith("Table 10"))
    assert best.frame is not None
    assert set(best.frame["exact effect"].str.split(", ").explode()) == {"–"}
    assert "Effects are stored by" in best.note


def test_markdown_holds_the_tables_alone_and_each_row_has_all_cells(small: Warehouse) -> None:
    text = build_report(small, pictures=False).markdown()
    assert "data:image" not in text
    assert "### Table 2: methods compared" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table[:300]


def test_what_was_not_measured_is_listed_and_fails_nothing(
    measured: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    page = tmp_path / "report.html"
    arguments = ["-o", page, "--warehouse", measured]
    refused = run_kdb("report", "--model", "tiny", "--model", "absent-model", *arguments)
    assert (refused.exit_code, page.exists()) == (2, False)
    assert "Unknown model 'absent-model'" in refused.stderr
    result = run_kdb("report", "--model", "tiny", *arguments)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "knowledge" in line]
    assert lines == ["Missing: Study knowledge: nothing is stored (`kdb ingest --dataset knowledge`)."]  # once
    assert page.exists()


def test_a_report_of_unknown_models_alone_is_refused(small: Warehouse) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'tiny-b' or 'tiny-a'"):
        build_report(small, ["tiny-x"])


def test_text_of_prompts_and_tokens_is_escaped(tmp_path: Path) -> None:
    hostile = Model("<script>alert(1)</script>", "tiny", 10**8, 2, 2)
    wh = build(tmp_path / "w", [hostile], [Concept("cities", 40, 0.9)], prompts_per_category=0)
    assert "script" not in links(build_report(wh).html()).tags


HOSTILE = "<img src=x onerror=alert(1)> [free](javascript:alert(1)) a|b `c`\x01\u2028\u202e\x1b[2J"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """A warehouse whose models are called what nobody would call a model."""
    models = [Model(HOSTILE, "tiny", 10**8, 4, 2), Model("# x\u2029", "tiny", 10**8, 4, 2)]
    return build(tmp_path_factory.mktemp("w") / "w", models, [Concept("cities", 40, 0.9)], 12, top_k=10)


def test_no_name_keeps_a_report_from_being_written(
    hostile: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    assert run_kdb("report", "-o", tmp_path / "r.html", "--warehouse", hostile.storage.local.path).exit_code == 0
    page = (tmp_path / "r.html").read_text()
    assert "\\u0001\\u2028\\u202e\\u001b[2J" in page
    assert not re.search("[\x01\x1b\u2028\u202e\u2029]", page)
    assert {address.partition(":")[0] for address in links(page).found if not address.startswith("#")} == {"data"}


@pytest.mark.parametrize("ending", ["svg", "png", "pdf", "html", "json"])
def test_no_name_keeps_a_figure_from_being_drawn(
    hostile: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result], ending: str
) -> None:
    path = tmp_path / f"a.{ending}"
    result = run_kdb("plot", "depth-curves", "-o", path, "--warehouse", hostile.storage.local.path)
    assert result.exit_code == 0, result.output
    if ending == "svg":
        texts = [element.text or "" for element in ElementTree.parse(path).iter()]
        assert any("\\u0001" in text for text in texts)


def test_names_are_text_in_markdown(hostile: Warehouse, tmp_path: Path, run_kdb: Callable[..., Result]) -> None:
    place = ("--warehouse", hostile.storage.local.path)
    assert run_kdb("report", "-o", tmp_path / "r.md", *place).exit_code == 0
    assert run_kdb("export", tmp_path / "shared", *place).exit_code == 0
    assert run_kdb("query", "runs", "-o", tmp_path / "q.md", *place).exit_code == 0
    for path in (tmp_path / "r.md", tmp_path / "q.md", tmp_path / "shared/README.md"):
        text = path.read_text().partition("\n# ")[2] or path.read_text()  # without the header in YAML
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
        assert not re.search(r"<img|\[free\]\(|[\x01\x1b\u2028]|^# x", text, re.MULTILINE)


def test_no_name_sends_an_escape_sequence_to_the_terminal(hostile: Warehouse, run_kdb: Callable[..., Result]) -> None:
    for args in (
        ("runs",),
        ("query", "runs"),
        ("sql", "SELECT [model] FROM runs"),
        ("query", "top-heads", "--k", "1"),
    ):
        result = run_kdb(*args, "--warehouse", hostile.storage.local.path)
        assert result.exit_code == 0
        assert "\x1b" not in result.stdout
        whole = run_kdb(*args, "--wide", "--warehouse", hostile.storage.local.path).stdout
        assert "\\u001b[2J" in whole
        assert "\x1b" not in whole
    refused = run_kdb("query", "top-heads", "--model", "\x1b[2J", "--warehouse", hostile.storage.local.path)
    assert "\x1b" not in refused.output


def test_names_with_spaces_are_quoted_in_commands() -> None:
    assert command("query", "top-heads", {"model": ["a b"], "k": 3}) == "kdb query top-heads --model 'a b' --k 3"


def test_a_study_without_a_plain_run_shows_its_newest_variant_and_says_so(
    tiny_model: Path, user_dataset: Path, tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    options = ("--model", tiny_model, "--dataset", user_dataset, "--noise")
    assert run_kdb("ingest", *options, "--warehouse", tmp_path / "w").exit_code == 0
    report = build_report(Warehouse(tmp_path / "w"))
    assert "Study concept: there is no run of the variant 'default'; the variant 'noise' is shown." in report.missing
    curves = next(item for item in report.chapters["Concept depth"] if "Experiment 1" in item.title)
    assert "--variant noise" in curves.command


MEASURED = [
    "gemma-3-270m",
    "qwen2.5-coder-0.5b-instruct-q4",
    "qwen2.5-coder-1.5b-instruct-q4",
    "smollm2-135m",
]
"""Models of the demo warehouse."""


def test_real_models_stand_side_by_side() -> None:
    with kdb.open_demo() as opened:
        report = build_report(opened)
    assert report.models == MEASURED
    titles = {item.title for chapter in report.chapters.values() for item in chapter}
    assert titles >= {"Experiment 1: datasets within each model", "Table 4: the ten best layers", "Every head"}
    best = next(item for item in report.chapters["Knowledge attribution"] if item.title.startswith("Table 10"))
    assert best.frame is not None
    assert set(best.frame["model"]) == set(MEASURED)
    assert len(report.html()) > 100_000
