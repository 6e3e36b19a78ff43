"""The kdb command: what it prints, where it writes, what it refuses and how it says so."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import click
import polars as pl
import pytest
from click.testing import Result
from helpers.command_line import answer, refusal
from helpers.knowledge_rows import ALPHA, add_knowledge
from helpers.stored import create_lake
from helpers.synthetic import write_manifests
from helpers.tiny_llama import ASK_OPTIONS

import kdb
from kdb.cli import main
from kdb.ingest.concept import probing
from kdb.ingest.datasets import load_dataset
from kdb.ingest.job import Job
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.schema import PARTITIONS, SCHEMA_VERSION, TABLES

RunKdb = Callable[..., Result]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, and what is in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def ingest_tiny(run_kdb: RunKdb, tiny_model: Path, user_dataset: Path) -> Callable[..., Result]:
    """``kdb ingest`` of the tiny model on ``weather.csv``; further options change it."""

    def ingest(warehouse: Path, *options: str | Path) -> Result:
        given = ["--model", tiny_model, "--warehouse", warehouse, *options]
        return run_kdb("ingest", *given, *([] if "--dataset" in options else ["--dataset", user_dataset, *ASK_OPTIONS]))

    return ingest


def commands(group: click.Group = main, prefix: str = "kdb") -> Iterator[str]:
    for name, command in group.commands.items():
        yield f"{prefix} {name}"
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix} {name}")


# Measuring and asking --------------------------------------------------------------------------------------------


def test_ingest_stores_a_run_that_queries_answer_from(
    tmp_path: Path, ingest_tiny: Callable[..., Result], run_kdb: RunKdb, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, *more = answer(ingest_tiny(tmp_path / "new")).splitlines()
    assert re.fullmatch(r"tiny on weather: stored \(run [0-9a-f]{16}\)", stored)
    assert more[0] == "  40 prompts, 20 of them with label 1"
    assert re.fullmatch(r"  12 tables, 0 MiB, measured in \d+ s", more[1])
    assert answer(ingest_tiny(tmp_path / "new")) == stored.replace("stored", "is stored already") + "\n"
    monkeypatch.chdir(tmp_path)
    for command in more[3:-1]:
        result = run_kdb(*shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
    table = answer(run_kdb("query", "concept-depth", "--warehouse", tmp_path / "new", "--format", "csv"))
    rows = [
        {
            name: row[name]
            for name in ("model", "dataset", "site", "n_layers", "best_layer", "best_accuracy", "jump_layer")
        }
        for row in csv.DictReader(StringIO(table))
    ]
    assert rows == [
        {
            "model": "tiny",
            "dataset": "weather",
            "site": site,
            "n_layers": "2",
            "best_layer": "0",  # layer 0 tells the classes apart already
            "best_accuracy": "1.0",
            "jump_layer": "",
        }
        for site in ("resid_post", "ffn_norm")
    ]


def test_a_model_and_a_dataset_are_stored_under_the_names_given(
    tmp_path: Path, ingest_tiny: Callable[..., Result], run_kdb: RunKdb
) -> None:
    answer(ingest_tiny(tmp_path / "new", "--name", "org/tiny 50%", "--dataset-name", "wet days"))
    listed = json.loads(answer(run_kdb("runs", "--warehouse", tmp_path / "new", "--format", "json")))
    assert [(row["model"], row["dataset"]) for row in listed] == [("org/tiny 50%", "wet days")]


def test_a_dry_run_says_the_cost_and_stores_nothing(tmp_path: Path, ingest_tiny: Callable[..., Result]) -> None:
    said = answer(ingest_tiny(tmp_path / "new", "--dry-run"))
    assert said.startswith("tiny on weather: 40 prompts, 2 layers, 2 sites: about 6 s (a first guess)")
    assert " at most 0 MiB on disk, " in said
    assert not (tmp_path / "new").exists()


def test_a_run_says_first_what_it_will_cost(
    tmp_path: Path, ingest_tiny: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    answer(ingest_tiny(tmp_path / "new", "--limit", "10"))
    expected = next(i for i, line in enumerate(caplog.messages) if line.startswith("tiny on weather: 20 prompts, "))
    assert caplog.messages[expected + 1].startswith("Capturing activations: ")


def test_probe_refits_and_names_its_source(warehouse: Path, run_kdb: RunKdb) -> None:
    answer(run_kdb("probe", "--model", "tiny", "--dataset", "weather", "--splits", "2", "--warehouse", warehouse))
    source, refit = json.loads(answer(run_kdb("runs", "--warehouse", warehouse, "--format", "json")))
    assert (source["source_run"], refit["source_run"]) == (None, source["run"])


def test_ctrl_c_says_that_the_same_command_goes_on(
    tmp_path: Path, ingest_tiny: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(probing, "_fits", interrupted)
        result = ingest_tiny(tmp_path / "new")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "\nInterrupted. Finished parts are kept. Run the same command again to resume.\n"
    assert "tiny on weather: stored" in answer(ingest_tiny(tmp_path / "new"))


def test_runs_tells_of_one_that_was_interrupted(warehouse: Path, run_kdb: RunKdb) -> None:
    with FolderStorage(warehouse).stage("00000000000000aa", "tiny", "snow") as staged:
        staged.write_rows("prompts", "part", [{"prompt_id": 0}])
    result = run_kdb("runs", "--warehouse", warehouse)
    assert result.stderr == "Interrupted: tiny on snow (run 00000000000000aa), 0.0 MB in staging.\n"


def test_the_warehouse_comes_from_the_environment_where_no_option_names_it(
    measured: Path, tmp_path: Path, run_kdb: RunKdb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "weather" in answer(run_kdb("runs", KDB_WAREHOUSE=str(measured)))
    refusal(run_kdb("runs", "--warehouse", tmp_path / "absent", KDB_WAREHOUSE=str(measured)))
    shutil.copytree(measured, tmp_path / "kdb-warehouse")
    assert "weather" in answer(run_kdb("runs"))


# Output ----------------------------------------------------------------------------------------------------------

TWO_ROWS = "SELECT layer, site, [1, 2] AS list, 'a|b' AS text FROM activations WHERE prompt_id = 0 AND layer = 0"
AS_TABLE = """\
layer 0 · list [1, 2] · text a|b
site
──────────
ffn_norm
resid_post
"""
AS_CSV = """\
layer,site,list,text
0,ffn_norm,"[1, 2]",a|b
0,resid_post,"[1, 2]",a|b
"""
AS_MARKDOWN = """\
| layer | site       | list   | text |
| ----- | ---------- | ------ | ---- |
| 0     | ffn_norm   | [1, 2] | a\\|b |
| 0     | resid_post | [1, 2] | a\\|b |
"""
AS_JSON = [
    {"layer": 0, "site": "ffn_norm", "list": [1, 2], "text": "a|b"},
    {"layer": 0, "site": "resid_post", "list": [1, 2], "text": "a|b"},
]


@pytest.fixture
def two_rows(run_kdb: RunKdb, measured: Path) -> Callable[..., str]:
    return lambda *options: answer(run_kdb("sql", f"{TWO_ROWS} ORDER BY site", "--warehouse", measured, *options))


@pytest.fixture(scope="module")
def write_two_rows(run_kdb: RunKdb, measured: Path) -> Callable[[Path], Result]:
    return lambda file: run_kdb("sql", f"{TWO_ROWS} ORDER BY site", "--warehouse", measured, "-o", file)


@pytest.mark.parametrize(("format_", "text"), [("table", AS_TABLE), ("csv", AS_CSV), ("markdown", AS_MARKDOWN)])
def test_an_answer_is_printed_in_the_format_asked_for(two_rows: Callable[..., str], format_: str, text: str) -> None:
    assert two_rows("--format", format_) == text


def test_an_answer_is_printed_as_json(two_rows: Callable[..., str]) -> None:
    assert json.loads(two_rows("--format", "json")) == AS_JSON


def test_an_answer_is_a_table_unless_another_format_is_asked_for(two_rows: Callable[..., str]) -> None:
    assert two_rows() == AS_TABLE


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", AS_CSV), ("a.md", AS_MARKDOWN), ("a.txt", AS_TABLE), ("a", AS_TABLE)]
)
def test_a_file_is_written_in_the_format_of_its_ending(
    write_two_rows: Callable[[Path], Result], tmp_path: Path, name: str, text: str
) -> None:
    result = write_two_rows(tmp_path / name)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"Wrote 2 rows to {tmp_path / name}.\n"
    assert (tmp_path / name).read_text() == text


def test_a_parquet_file_keeps_the_types(write_two_rows: Callable[[Path], Result], tmp_path: Path) -> None:
    write_two_rows(tmp_path / "a.parquet")
    frame = pl.read_parquet(tmp_path / "a.parquet")
    assert frame.rows(named=True) == AS_JSON
    assert frame.schema["layer"] == pl.Int16


def test_a_saved_query_takes_its_parameters_and_formats(measured: Path, run_kdb: RunKdb) -> None:
    given = ("--warehouse", measured, "--format", "json", "--site", "ffn_norm", "--classifier", "logistic-paper")
    rows = json.loads(answer(run_kdb("query", "layer-accuracy", *given)))
    assert [(row["layer"], row["site"], row["accuracy"]) for row in rows] == [(0, "ffn_norm", 1), (1, "ffn_norm", 1)]


def test_no_rows_is_said_beside_the_empty_answer(measured: Path, run_kdb: RunKdb) -> None:
    result = run_kdb("query", "top-heads", "--warehouse", measured, "--format", "csv")
    assert result.exit_code == 0
    assert result.stdout.startswith("model,dataset,category,rank,")
    assert result.stderr == "No rows. `kdb runs` lists what was measured; with --help, a query says what it needs.\n"


# Keeping ---------------------------------------------------------------------------------------------------------


def test_a_run_is_removed_by_its_id(warehouse: Path, run_kdb: RunKdb) -> None:
    (folder,) = FolderStorage(warehouse).run_folders()
    assert (
        answer(run_kdb("runs", "remove", folder.run, "--yes", "--warehouse", warehouse))
        == f"Removed run {folder.run}.\n"
    )
    assert FolderStorage(warehouse).run_folders() == []
    message = refusal(run_kdb("runs", "remove", folder.run, "--yes", "--warehouse", warehouse))
    assert message == f"Unknown run '{folder.run}'. `kdb runs` lists them."


def test_a_run_is_removed_by_its_first_digits(tmp_path: Path, run_kdb: RunKdb) -> None:
    lake = create_lake(tmp_path)
    runs = ["abcd" + "1" * 12, "abcd" + "2" * 12, "ef" * 8]
    for run, dataset in zip(runs, ("facts", "more", "others"), strict=True):
        add_knowledge(lake, "alpha", dataset, run, ALPHA)
    (tmp_path / "warehouse.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}}}')
    write_manifests(tmp_path)

    def remove(digits: str) -> Result:
        return run_kdb("runs", "remove", digits, "--yes", "--warehouse", tmp_path)

    assert refusal(remove("abcd")) == (
        f"Several runs begin with 'abcd': {runs[0]} (alpha on facts), {runs[1]} (alpha on more). Give more digits."
    )
    for digits in ("", "efe"):
        assert refusal(remove(digits)) == f"{digits!r} is too short for a run: give 4 of its digits or more."
    assert refusal(remove("abce")).startswith("Unknown run 'abce'.")
    assert len(FolderStorage(tmp_path).run_folders()) == 3
    assert answer(remove("ABCD1")) == f"Removed run {runs[0]}.\n"
    assert answer(remove("abcd")) == f"Removed run {runs[1]}.\n"
    assert [folder.run for folder in FolderStorage(tmp_path).run_folders()] == [runs[2]]


def test_a_run_that_is_named_by_digits_is_confirmed_by_its_names(tmp_path: Path, run_kdb: RunKdb) -> None:
    add_knowledge(create_lake(tmp_path), "alpha", "facts", "ef" * 8, ALPHA)
    (tmp_path / "warehouse.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}}}')
    write_manifests(tmp_path)
    result = run_kdb("runs", "remove", "efef", "--warehouse", tmp_path)
    assert f"Remove run {'ef' * 8} (alpha on facts) permanently? [y/N]" in result.stderr
    assert len(FolderStorage(tmp_path).run_folders()) == 1


def test_verify_exits_with_1_and_names_what_is_damaged(warehouse: Path, run_kdb: RunKdb) -> None:
    assert answer(run_kdb("verify", "--warehouse", warehouse)) == "All files of 1 run are as they were committed.\n"
    (folder,) = FolderStorage(warehouse).run_folders()
    (folder.path / "prompts/part.parquet").unlink()
    result = run_kdb("verify", "--warehouse", warehouse)
    assert (result.exit_code, result.stdout) == (1, f"{folder.path / 'prompts/part.parquet'}: missing\n")
    assert result.stderr.startswith(f"Damaged runs: {folder.run}. Remove each (`kdb runs remove`)")


def test_rebuild_writes_the_shells_file(warehouse: Path, run_kdb: RunKdb) -> None:
    (warehouse / "kdb.duckdb").write_bytes(b"damaged")
    assert answer(run_kdb("rebuild", "--warehouse", warehouse)) == f"Wrote {warehouse / 'kdb.duckdb'}.\n"
    assert (warehouse / "kdb.duckdb").stat().st_size > 1000


class Shell:
    """The DuckDB command line, held open on a warehouse."""

    def __init__(self, warehouse: Path) -> None:
        command = [Path(sys.executable).with_name("duckdb"), "-csv", "-noheader", warehouse / "kdb.duckdb"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, statement: str) -> list[str]:
        """The rows of a statement, as lines of CSV."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{statement};\n.print END\n")
        self._process.stdin.flush()
        return [line.strip() for line in iter(self._process.stdout.readline, "END\n")]

    def close(self) -> None:
        self._process.communicate()


def test_an_open_duckdb_shell_blocks_nothing_and_sees_the_new_run(
    warehouse: Path, ingest_tiny: Callable[..., Result], run_kdb: RunKdb
) -> None:
    if not Path(sys.executable).with_name("duckdb").exists():
        pytest.skip("no DuckDB shell beside this Python: the package duckdb-cli is not installed")
    accuracies = "SELECT variant, layer, accuracy FROM runs JOIN probe_scores USING (run) WHERE site = 'resid_post'"
    accuracies += " AND classifier = 'logistic' ORDER BY ALL"
    shell = Shell(warehouse)
    assert shell.ask(accuracies) == ["default,0,1.0", "default,1,1.0"]
    answer(ingest_tiny(warehouse, "--limit", "10"))
    queried = answer(run_kdb("query", "layer-accuracy", "--variant", "limit=10", "--warehouse", warehouse))
    assert "weather" in queried
    assert shell.ask(accuracies) == ["default,0,1.0", "default,1,1.0", "limit=10,0,1.0", "limit=10,1,1.0"]
    shell.close()


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["query", "concept-dept"], "Unknown query 'concept-dept'. Did you mean 'concept-depth' or 'kept-prompts'?"),
        (["queries", "layer-acuracy"], "Unknown query 'layer-acuracy'. Did you mean 'layer-accuracy'"),
        (["query", "layer-accuracy", "--sit", "x"], "No such option '--sit'. (Did you mean one of: '--site'"),
        (["query", "concept-depth", "--jump-ratio", "big"], "Invalid value for '--jump-ratio': 'big' is not a valid"),
        (["query", "prompt-story"], "Missing option '--prompt'."),
        (["probe", "--model", "tiny"], "Missing option '--dataset'."),
        (["sql", "SELECT layr FROM activations"], 'Binder Error: Referenced column "layr" not found'),
        (["sql", "SELECT 1; SELECT 2"], "SQL runs one statement at a time, found 2."),
        (["sql", "SELECT 1", "--format", "parquet"], "--format parquet needs a file. Name it with -o FILE."),
        (["sql", "SELECT 1", "-o", "/absent/a.csv"], "Cannot write '/absent/a.csv': there is no folder '/absent'."),
        (["probe", "--model", "tini", "--dataset", "weather"], "Unknown stored model 'tini'. Did you mean 'tiny'?"),
        (
            ["probe", "--model", "tiny", "--dataset", "wether"],
            "Unknown stored dataset 'wether'. Did you mean 'weather'",
        ),
        (
            ["probe", "--model", "tiny", "--dataset", "weather", "--variant", "nois"],
            "Unknown stored variant 'nois'. `kdb runs` lists what is stored",
        ),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(
    measured: Path, run_kdb: RunKdb, args: list[str], message: str
) -> None:
    given = [] if args[0] == "queries" else ["--warehouse", measured]
    assert refusal(run_kdb(*args, *given)).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "smollm2-135"], "Unknown model 'smollm2-135'. Did you mean 'smollm2-135m'"),
        (["--model", "./absent.gguf"], "There is no file 'absent.gguf'"),
        (["--dataset", "world-city"], "Unknown dataset 'world-city'. Did you mean 'world-cities'?"),
        (["--dataset", "absent.csv"], "There is no file 'absent.csv' in "),
        (["--limit", "0"], "limit counts the examples of each class or category: expected 1 or more, found 0."),
        (["--template", "no place"], "The template 'no place' has no place for the text"),
        (
            ["--group-by", "village"],
            "weather.csv, line 1: expected one column 'village', found 'text', 'label', 'town'",
        ),
        (["--device", "cuda:99"], "This machine has no device 'cuda:99': leave --device out, or use cpu."),
        (["--revision", "v1"], "--revision is for models on the hub"),
        (["--dtype", "float8"], "Invalid value for '--dtype': 'float8' is not one of"),
        (["--splits", "0"], "Invalid value for '--splits': 0 is not in the range x>=1."),
    ],
)
def test_an_ingest_of_what_does_not_exist_is_refused(
    tmp_path: Path, ingest_tiny: Callable[..., Result], options: list[str], message: str
) -> None:
    assert refusal(ingest_tiny(tmp_path / "new", *options)).startswith(message)
    assert not (tmp_path / "new" / "lake" / "model=tiny").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise", "0.5"], "Option '--noise' takes no value. Remove '0.5'."),
        (["--no-effects", "yes", "--limit", "5"], "Option '--no-effects' takes no value. Remove 'yes'."),
        (["world-cities"], "Invalid value for '[PLAN.yaml]': there is no plan 'world-cities'. A plan is a YAML file"),
    ],
)
def test_a_word_that_is_no_plan_is_refused_as_what_it_is(
    run_kdb: RunKdb, tmp_path: Path, options: list[str], message: str
) -> None:
    given = ("ingest", "--model", "smollm2-135m", "--dry-run", "--warehouse", tmp_path / "w")
    assert message in refusal(run_kdb(*given, *options))
    plan = tmp_path / "plan.yaml"
    plan.write_text("runs: [{model: smollm2-135, dataset: knowledge}]")
    assert refusal(run_kdb("ingest", "--noise", plan, "--dry-run")).startswith("Unknown model 'smollm2-135'.")


FOUR_ROWS = "text,label\nRain.,0\nRain!,1\nHail.,0\nHail!,1\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "d.csv",
            "text,label\nRain.,0\nRain!,maybe\n",
            "d.csv, line 3: expected label 0, 1, true, false, yes, no, positive or",
        ),
        ("d.csv", "text,label\nRain.,0\nRain!,1,2\n", "d.csv, line 3: expected 2 cells, found 3"),
        ("d.csv", 'text,label\nRain.,0\n"Rain!,1\n', "d.csv, line 3: expected a row of whole cells"),
        ("d.csv", "text,label\nRain.,0\n ,1\n", "d.csv, line 3: expected a text in column 'text', found ' '"),
        (
            "d.csv",
            "texts,label\nRain.,0\n",
            "d.csv, line 1: expected columns 'text' and 'label', or 'prompt', 'answer' and 'category'",
        ),
        ("d.csv", b"text,label\nRain.,0\n\xff,1\n", "d.csv, line 3: expected UTF-8 text, found the byte 0xff"),
        ("d.csv", "text,label\nRain.,0\nHail.,0\n", "Dataset 'd' (d.csv, a user's file) has no example with label 1"),
        ("d.jsonl", '{"text": "Rain.", "label": 0}\n{"text": "Ra', "d.jsonl, line 2: expected a JSON object"),
        ("d.parquet", b"PAR1", "Cannot read "),
        ("d.csv", "text,label\nRain.,0\nRain!,1\n", "Probing needs at least 6 prompts of each label"),
        (
            "d.csv",
            f"{FOUR_ROWS}{'x' * 129},1\n",
            f"Prompt 4 of 'd', '{'x' * 56}..., has 129 tokens, and tiny reads at most",
        ),
        (
            "d.csv",
            "text,label\n" + "".join(f"Rain {i}.,{i % 2}\n" for i in range(12)),
            "Split 'paper' needs at least 5 prompts of label 0 in its training part, and has ",
        ),
        (
            "d.csv",
            "text,label\n" + "".join(f"Rain {i}.,{int(i < 3)}\n" for i in range(40)),
            "Probing needs at least 6 prompts of each label, 5 to train on and one to test on; label 1 has 3.",
        ),
        (
            "d.csv",
            f"{FOUR_ROWS}Rain!,0\n",
            "d.csv, line 6: expected the label 1 that d.csv, line 3 has for the text 'Rain!', found 0",
        ),
    ],
)
def test_a_dataset_that_cannot_be_measured_is_refused_whole(
    tmp_path: Path, ingest_tiny: Callable[..., Result], name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(ingest_tiny(tmp_path / "new", "--dataset", path)).startswith(message)
    assert not (tmp_path / "new" / "lake" / "model=tiny").exists()


@pytest.mark.parametrize(
    ("n_groups", "message"), [(1, "needs at least two groups"), (4, "needs at least 5 groups with")]
)
def test_groups_that_are_too_few_are_refused(
    tmp_path: Path, ingest_tiny: Callable[..., Result], n_groups: int, message: str
) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label,place\n" + "".join(f"Rain {i}.,{i % 2},{i // 2 % n_groups}\n" for i in range(40)))
    assert message in refusal(ingest_tiny(tmp_path / "new", "--dataset", path, "--group-by", "place"))
    assert not (tmp_path / "new" / "lake" / "model=tiny").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ask", "So?"], "--ask needs the two answers"),
        (["--answers", "no,yes"], "--answers needs a question"),
        (["--ask", "So?", "--answers", "yes"], "--answers: expected two different words"),
        (["--ask", "So?", "--answers", "yes,YES"], "--answers: expected two different words"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(
    tmp_path: Path, ingest_tiny: Callable[..., Result], user_dataset: Path, options: list[str], message: str
) -> None:
    assert refusal(ingest_tiny(tmp_path / "new", "--dataset", user_dataset, *options)).startswith(message)


def test_what_is_asked_is_part_of_the_identity_of_a_run(user_dataset: Path, tiny_job: Callable[..., Job]) -> None:
    def run(**options: str) -> str:
        return dataclasses.replace(tiny_job(), dataset=load_dataset(str(user_dataset), **options)).run

    asked = [{}, *({"ask": ask, "answers": answers} for ask in ("So?", "Or?") for answers in ("no,yes", "yes,no"))]
    assert len({run(**options) for options in asked}) == 5


def test_the_class_of_label_1_is_part_of_the_identity_of_a_run(tmp_path: Path, tiny_job: Callable[..., Job]) -> None:
    file = tmp_path / "kinds.csv"
    file.write_text("text,label\na dog,animal\nan oak,plant\na stone,thing\n")
    datasets = [load_dataset(str(file), positive=positive) for positive in ("animal", "plant", "thing", "ANIMAL")]
    runs = [dataclasses.replace(tiny_job(), dataset=dataset).run for dataset in datasets]
    assert len(set(runs)) == 3 and runs[0] == runs[3]


def test_a_file_with_names_of_classes_is_measured(tmp_path: Path, ingest_tiny: Callable[..., Result]) -> None:
    file = tmp_path / "kinds.tsv"
    rows = [f"{'A dog' if i % 2 else 'An oak'} of number {i}.\t{'animal' if i % 2 else 'plant'}" for i in range(40)]
    file.write_text("\n".join(["Text\tLabel", *rows]) + "\n")
    assert "by --positive 'plant' or --positive 'animal'" in refusal(ingest_tiny(tmp_path / "w", "--dataset", file))
    assert ingest_tiny(tmp_path / "w", "--dataset", file, "--positive", "animal").exit_code == 0
    labels = kdb.open(tmp_path / "w").sql(
        "SELECT label, count(*) AS n, any_value(source) AS source FROM prompts "
        "JOIN datasets USING (run) GROUP BY label ORDER BY label"
    )
    source = "kinds.tsv, a user's file, label 1: animal"
    assert labels.rows() == [(0, 20, source), (1, 20, source)]


@pytest.mark.parametrize("args", [["runs"], ["query", "concept-depth"], ["sql", "SELECT 1"], ["verify"], ["rebuild"]])
def test_a_folder_that_is_no_warehouse_is_refused_by_every_command(
    tmp_path: Path, run_kdb: RunKdb, args: list[str]
) -> None:
    missing = tmp_path / "absent"
    assert refusal(run_kdb(*args, "--warehouse", missing)).startswith(f"There is no warehouse at '{missing}'")
    assert refusal(run_kdb(*args, "--warehouse", tmp_path)).startswith(f"'{tmp_path}' is not a kdb warehouse")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(run_kdb(*args, "--warehouse", tmp_path / "file"))


def test_an_ingest_leaves_a_folder_of_someone_elses_alone(tmp_path: Path, ingest_tiny: Callable[..., Result]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    message = f"'{tmp_path}' is not empty and not a kdb warehouse. Name a new or empty folder with --warehouse."
    assert refusal(ingest_tiny(tmp_path)) == message
    assert tree(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("command", ["ingest", "runs", "verify", "rebuild"])
def test_a_warehouse_of_a_newer_kdb_is_refused_and_left_as_it_is(
    warehouse: Path, ingest_tiny: Callable[..., Result], run_kdb: RunKdb, command: str
) -> None:
    (warehouse / "warehouse.json").write_text('{"schema_version": 99}')
    before = tree(warehouse)
    result = ingest_tiny(warehouse) if command == "ingest" else run_kdb(command, "--warehouse", warehouse)
    newer = f"was written by a newer kdb (schema 99, this one knows {SCHEMA_VERSION}). Upgrade kdb"
    assert newer in refusal(result)
    assert tree(warehouse) == before


def hold(folder: str, run: str, held: Event, release: Event) -> None:
    with FolderStorage(Path(folder)).stage(run, "tiny", "weather"):
        held.set()
        release.wait()


@pytest.mark.slow
def test_a_second_ingest_of_a_run_in_progress_is_refused(
    tmp_path: Path, ingest_tiny: Callable[..., Result], tiny_job: Callable[..., Job], processes: ForkServerContext
) -> None:
    held, release = processes.Event(), processes.Event()
    FolderStorage.create(tmp_path / "new")
    other = processes.Process(target=hold, args=(str(tmp_path / "new"), tiny_job().run, held, release))
    other.start()
    assert held.wait(timeout=60)
    message = refusal(ingest_tiny(tmp_path / "new"))
    assert message.startswith(f"Run {tiny_job().run} (tiny on weather) is being measured by another process")
    release.set()
    other.join()
    answer(ingest_tiny(tmp_path / "new"))


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE mine (a INTEGER)",
        "INSERT INTO runs SELECT * FROM runs",
        "DELETE FROM runs",
        "DROP VIEW runs",
        "COPY (SELECT 1) TO '{lake}/stray.parquet'",
        "COPY runs TO '{lake}/model=tiny/stray.parquet'",
        "EXPORT DATABASE '{lake}/stray'",
        "ATTACH '{lake}/stray.duckdb'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{lake}/stray.parquet'",
        "WITH one AS (SELECT 1) INSERT INTO runs SELECT * FROM one",
        "SET allowed_directories = ['/']",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT 1; DROP VIEW runs",
        "",
    ],
)
def test_sql_changes_nothing_in_the_warehouse(measured: Path, run_kdb: RunKdb, statement: str) -> None:
    before = tree(measured)
    refusal(run_kdb("sql", statement.format(lake=measured / "lake"), "--warehouse", measured))
    assert tree(measured) == before


def test_a_full_disk_costs_nothing_that_is_stored(
    small_disk: Any, measured: Path, ingest_tiny: Callable[..., Result], run_kdb: RunKdb
) -> None:
    warehouse = Path(shutil.copytree(measured, small_disk.path / "warehouse"))
    answer(run_kdb("rebuild", "--warehouse", warehouse))
    for free in (0, 16_384, 32_768):
        small_disk.fill(leave=free)
        message = refusal(ingest_tiny(warehouse, "--limit", "10"))
        assert message.startswith("Cannot write to the warehouse at ")
        assert message.endswith(": the disk is full. Free some space, then run the same command again to resume.")
        answer(run_kdb("verify", "--warehouse", warehouse))
    small_disk.free()
    assert "tiny on weather: stored" in answer(ingest_tiny(warehouse, "--limit", "10"))
    assert "All files of 2 runs" in answer(run_kdb("verify", "--warehouse", warehouse))


def test_a_read_only_disk_can_be_asked_and_not_written(
    small_disk: Any, measured: Path, ingest_tiny: Callable[..., Result], run_kdb: RunKdb
) -> None:
    warehouse = Path(shutil.copytree(measured, small_disk.path / "warehouse"))
    small_disk.make_read_only()
    assert "weather" in answer(run_kdb("runs", "--warehouse", warehouse))
    assert "weather" in answer(run_kdb("query", "concept-depth", "--warehouse", warehouse))
    (folder,) = FolderStorage(warehouse).run_folders()
    for result in (
        ingest_tiny(warehouse, "--limit", "10"),
        ingest_tiny(small_disk.path / "new"),
        run_kdb("runs", "remove", folder.run, "--yes", "--warehouse", warehouse),
        run_kdb("rebuild", "--warehouse", warehouse),
    ):
        assert refusal(result).endswith(": the file system is read-only. Name another folder with --warehouse.")


# Documentation ---------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def test_schema_prints_what_the_docs_hold(run_kdb: RunKdb) -> None:
    assert answer(run_kdb("schema")) == (ROOT / "docs/schema.md").read_text()


def test_schema_prints_one_table(run_kdb: RunKdb) -> None:
    printed = answer(run_kdb("schema", "probe_scores", COLUMNS="100"))
    assert printed.startswith("probe_scores: one row per layer × site × classifier × split.\n")
    for column in (*PARTITIONS, *TABLES["probe_scores"].columns.keys()):
        assert re.search(rf"^{column}  [A-Z]+ ", printed, re.MULTILINE)
    assert max(map(len, printed.splitlines())) <= 100
    said = refusal(run_kdb("schema", "probe_score"))
    assert said.startswith("Unknown table 'probe_score'. Did you mean 'probe_scores'")
    assert said.endswith(f"The tables are {', '.join(TABLES)}.")


@pytest.mark.parametrize("command", commands())
def test_every_command_is_documented(command: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(re.search(rf"\b{command}\b", page.read_text()) for page in pages)


@pytest.mark.parametrize("command", ["models", "datasets", "queries"])
def test_catalogues_name_what_can_be_asked_for(run_kdb: RunKdb, command: str) -> None:
    expected = {"models": "smollm2-135m", "datasets": "world-cities", "queries": "concept-depth"}
    assert expected[command] in answer(run_kdb(command))


@pytest.mark.parametrize("command", ["models", "datasets"])
def test_catalogues_are_tables_that_fit(run_kdb: RunKdb, command: str, tmp_path: Path) -> None:
    printed = answer(run_kdb(command))
    assert max(map(len, printed.splitlines())) <= 100
    assert answer(run_kdb(command, "--columns", "name")).splitlines()[0] == "name"
    rows = json.loads(answer(run_kdb(command, "--format", "json")))
    assert [row["name"] for row in rows] == re.findall(r"^([a-z][^ ]+)  ", printed, re.MULTILINE)[1:]
    assert run_kdb(command, "-o", tmp_path / "names.csv").exit_code == 0
    assert len((tmp_path / "names.csv").read_text().splitlines()) == len(rows) + 1


def test_numbers_too_small_for_four_decimals_are_printed_with_an_exponent(measured: Path, run_kdb: RunKdb) -> None:
    select = "SELECT 1.6e-6 AS small, 0.5::DOUBLE AS other UNION ALL SELECT 0, 0.25 UNION ALL SELECT NULL, 12.34567 "
    for format_, nothing, largest in (("table", "0", "12.35"), ("markdown", "0.0", "12.3457")):
        given = ("--warehouse", measured, "--format", format_)
        printed = answer(run_kdb("sql", f"{select} ORDER BY other", *given))
        cells = [re.findall(r"[\w.-]+", line) for line in printed.splitlines() if re.search(r"\d", line)]
        assert [row[0] for row in cells][:2] == [nothing, "1.6e-06"]
        assert [row[-1] for row in cells] == ["0.25", "0.5", largest]
