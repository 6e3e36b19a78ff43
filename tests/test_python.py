"""kdb from Python: what a warehouse shows of itself, `kdb.ingest`, `kdb.attribute`, and errors in Python's words."""

from __future__ import annotations

import json
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from click.testing import Result
from helpers.measured import measure
from helpers.tiny_llama import ASK

import kdb
import kdb.ingest.job  # importing a module of the package leaves kdb.ingest callable
from kdb.analysis.figures import FIGURES
from kdb.errors import KdbError, ModelError, UnknownNameError, WarehouseError
from kdb.ingest.models.find import LoadedModel
from kdb.queries.catalogue import load_catalogue
from kdb.warehouse.notes import KdbNote
from kdb.wording import in_python, python_words

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


# The module ------------------------------------------------------------------------------------------------------


def test_help_lists_the_functions_and_the_version_is_there() -> None:
    text = pydoc.plain(pydoc.render_doc(kdb))
    assert [name for name in kdb.__all__ if f"{name}(" not in text] == []
    assert {*kdb.__all__, "__version__"} <= set(dir(kdb))
    assert "Measure models on datasets, and store each run" in str(type(kdb.ingest).__call__.__doc__)
    process = subprocess.run([sys.executable, "-m", "kdb", "--version"], capture_output=True, text=True, check=True)
    assert process.stdout.split()[-1] == kdb.__version__


def test_importing_kdb_and_naming_its_functions_loads_nothing_large() -> None:
    code = "import sys, kdb; kdb.__version__, kdb.ingest, kdb.attribute; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "duckdb", "polars", "numpy"} & set(process.stdout.split())


# A warehouse in a notebook ---------------------------------------------------------------------------------------


def test_a_warehouse_says_what_it_holds(tmp_path: Path) -> None:
    for model in ("one", "<b>two</b>"):
        measure(tmp_path / "w", model=model)
    wh = kdb.open(tmp_path / "w")
    assert repr(wh) == f"<kdb warehouse {str(tmp_path / 'w')!r}: 2 runs, 2 models, 1 dataset>"
    page = wh._repr_html_()
    assert "<td>one</td><td>d</td><td>1</td>" in page
    assert "&lt;b&gt;two&lt;/b&gt;" in page
    assert "<b>" not in page


def test_only_some_of_many_models_are_shown(tmp_path: Path) -> None:
    for number in range(12):
        measure(tmp_path / "w", model=f"m{number:02}")
    page = kdb.open(tmp_path / "w")._repr_html_()
    assert page.count("<tr>") == 1 + 10
    assert "and 2 more models" in page


def test_a_snapshot_says_what_it_holds_and_draws(measured: Path) -> None:
    with kdb.open(measured) as wh, wh.snapshot() as frozen:
        assert "1 run, 1 model, 1 dataset" in repr(frozen)
        assert frozen.plot("depth-curves").to_dict() == wh.plot("depth-curves").to_dict()


def test_queries_figures_models_and_datasets_are_frames(measured: Path) -> None:
    wh = kdb.open(measured)
    assert wh.queries()["query"].to_list() == list(load_catalogue())
    assert wh.figures()["figure"].to_list() == list(FIGURES)
    assert "prompt*" in wh.figures().filter(figure="lens-map")["parameters"].item()
    assert wh.models()["model"].to_list() == ["tiny"]
    assert wh.datasets().to_dicts() == [
        {"dataset": "weather", "study": "concept", "n_prompts": 40, "n_models": 1, "n_runs": 1}
    ]


def test_a_chart_shows_itself_in_a_notebook(measured: Path) -> None:
    chart = kdb.open(measured).plot("depth-curves", metric="auc")
    assert "vegaEmbed" in str(chart._repr_mimebundle_(None, None))


def test_the_demo_is_there_within_its_block_and_without_one() -> None:
    with kdb.open_demo() as wh:
        folder = Path(wh.storage.location)
        assert repr(wh).startswith("<kdb warehouse 'demo': ")
        assert len(wh.query("concept-depth")) > 0
    assert not folder.exists()
    wh = kdb.open_demo()
    assert len(wh.datasets()) > 0
    folder = Path(wh.storage.location)
    del wh
    assert not folder.exists()


# Measuring -------------------------------------------------------------------------------------------------------


def test_python_measures_the_run_of_the_command(
    measured: Path, tiny_model: Path, user_dataset: Path, tmp_path: Path
) -> None:
    [run] = kdb.open(measured).runs()
    [ended] = kdb.ingest(tiny_model, user_dataset, warehouse=tmp_path / "w", **ASK)
    assert (ended.model, ended.dataset, ended.status, ended.run) == ("tiny", "weather", "committed", run)
    [again] = kdb.ingest(tiny_model, user_dataset, warehouse=kdb.open(tmp_path / "w"), **ASK)
    assert (again.status, again.run) == ("exists", run)


def test_a_loaded_model_measures_the_same_run_and_is_not_loaded_again(
    measured: Path, tiny_loaded: LoadedModel, user_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdb.ingest.models import load

    monkeypatch.setattr(load, "load_model", None)
    [ended] = kdb.ingest(tiny_loaded, user_dataset, warehouse=tmp_path / "w", **ASK)
    assert ended.run == kdb.open(measured).runs()[0]
    with pytest.raises(KdbError, match=r"^The model is loaded already. Leave dtype out"):
        kdb.ingest(tiny_loaded, user_dataset, warehouse=tmp_path / "w", dtype="bfloat16")


def test_progress_and_warnings_are_printed_unless_the_program_has_a_log_of_its_own(
    tiny_model: Path, user_dataset: Path, tmp_path: Path
) -> None:
    code = (
        "import logging, sys, kdb\n"
        "def measure(folder): kdb.ingest(sys.argv[1], sys.argv[2], warehouse=folder)\n"
        "measure(sys.argv[3] + '/a')\n"
        "sys.stderr.write('and now\\n')\n"
        "logging.getLogger('kdb').addHandler(logging.NullHandler())\n"
        "measure(sys.argv[3] + '/b')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, tiny_model, user_dataset, tmp_path], capture_output=True, text=True, check=True
    )
    first, _, second = process.stderr.partition("and now\n")
    assert "`ask` and `answers` ask a question." in first
    assert "tiny on weather: 40 prompts" in first
    assert second == ""


def test_a_file_that_changed_is_read_again(tiny_loaded: LoadedModel, user_dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    lines = user_dataset.read_text().splitlines(keepends=True)
    runs = []
    for n in (31, 41):
        file.write_text("".join(lines[:n]))
        runs += kdb.ingest(tiny_loaded, file, warehouse=tmp_path / "w")
    assert [one.status for one in runs] == ["committed", "committed"]
    assert sorted(kdb.open(tmp_path / "w").sql("SELECT n_prompts FROM datasets")["n_prompts"]) == [30, 40]


def test_when_one_of_several_runs_fails_the_others_are_stored_and_the_error_follows(
    tiny_loaded: LoadedModel, user_dataset: Path, tmp_path: Path
) -> None:
    long = tmp_path / "long.csv"
    long.write_text("text,label\n" + "".join(f"{'x' * 200} {i},{i % 2}\n" for i in range(20)))
    with pytest.raises(KdbError, match=r"^1 of 2 runs failed; the others are stored.\ntiny on long: Prompt 0"):
        kdb.ingest(tiny_loaded, [long, user_dataset], warehouse=tmp_path / "w")
    assert kdb.open(tmp_path / "w").datasets()["dataset"].to_list() == ["weather"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"^top_k is 0, expected a whole number from 1\.$"),
        ({"splits": True}, r"^splits is True, expected a whole number from 1\.$"),
        ({"dtype": "float8"}, r"^dtype is 'float8', expected one of float32, bfloat16, float16\.$"),
        ({"classifiers": ["forest"]}, r"^classifiers is 'forest', expected one of logistic, "),
        ({"effects": "no"}, r"^effects is 'no', expected True or False\.$"),
        ({"template": 3}, r"^template is 3, expected a text\.$"),
        ({"limits": 3}, r"^Unknown option 'limits'. Did you mean 'limit'"),
        ({"ask": "Is it so?"}, r"^`ask` needs the two answers: add `answers`"),
        ({"dataset_name": "a\0b"}, r"^dataset_name is 'a\\x00b', expected a text without NUL characters\.$"),
    ],
)
def test_wrong_options_are_told_in_the_words_of_python(
    tiny_model: Path, user_dataset: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(KdbError, match=message) as caught:
        kdb.ingest(tiny_model, user_dataset, warehouse=tmp_path / "w", **options)
    assert "--" not in str(caught.value)


# One prompt ------------------------------------------------------------------------------------------------------

STORED = {
    "layers": ("layer_scores", ["layer", "component"], ["score"]),
    "heads": ("head_scores", ["layer", "head"], ["score"]),
    "neurons": ("neuron_scores", ["component", "layer", "head", "neuron"], ["score", "coefficient", "position"]),
    "lens": ("lens_readouts", ["layer", "place"], ["target_rank", "target_logp", "entropy", "tokens"]),
}
"""The frames of an attribution: the table of a run with the same rows, its key, and columns to compare."""


@pytest.fixture(scope="module")
def facts(best: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    return [(text, f"{best(text)}x") for text in ("The sky of Bonn", "The sky of Ulm")]


@pytest.fixture(scope="module")
def stored(tiny_loaded: LoadedModel, facts: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of the same prompts, and of two more whose answers are wrong."""
    folder = tmp_path_factory.mktemp("facts")
    wrong = next(letter for letter in "qkzj" if letter not in {answer[0] for _text, answer in facts})
    lines = ["prompt,answer,category", *(f"{text},{answer},sky" for text, answer in facts), f"The sea,{wrong}x,sky"]
    (folder / "facts.csv").write_text("\n".join(lines) + "\n")
    kdb.ingest(tiny_loaded, folder / "facts.csv", warehouse=folder / "w", ablate_k=0, effects=False, top_k=5)
    return kdb.open(folder / "w")


@pytest.mark.parametrize("frame", STORED)
def test_one_prompt_has_the_numbers_that_a_run_stores(
    tiny_loaded: LoadedModel, facts: list[tuple[str, str]], stored: Any, frame: str
) -> None:
    table, key, columns = STORED[frame]
    found = getattr(kdb.attribute(tiny_loaded, *facts[0], top_k=5), frame).sort(key)
    expected = stored.sql(f"FROM {table} WHERE prompt_id = 0").sort(key)
    assert len(found) == len(expected) > 0
    for column in (*key, *columns):
        if found[column].dtype.is_float():
            assert found[column].to_list() == pytest.approx(expected[column].to_list(), abs=1e-6)
        else:
            assert found[column].to_list() == expected[column].to_list()


def test_log_probability_and_rank_are_those_of_the_model(
    tiny_loaded: LoadedModel, facts: list[tuple[str, str]]
) -> None:
    text, answer = facts[0]
    ids = tiny_loaded.tokenizer(f"{text} ")["input_ids"]
    with torch.inference_mode():
        log_p = tiny_loaded.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    for one in (answer[0], "q"):  # one that the model knows, and one that a run would leave out
        token = tiny_loaded.tokenizer.convert_tokens_to_ids(one)
        found = kdb.attribute(tiny_loaded, text, one)
        assert found.target == one
        assert found.logp == pytest.approx(log_p[token].item(), abs=1e-5)
        assert found.rank == 1 + int((log_p > log_p[token]).sum())
        assert found.layers["score"].is_sorted(descending=True)


def test_effects_replace_by_zero_or_by_the_corrupt_prompt(tiny_loaded: LoadedModel) -> None:
    alone = kdb.attribute(tiny_loaded, "The sky of Bonn", "q").effects
    assert set(alone["replacement"]) == {"zero"}
    assert set(alone["method"]) == {"atp"}
    assert alone["logit_diff"].null_count() == len(alone)
    pair = kdb.attribute(tiny_loaded, "The sky of Bonn", "q", corrupt="The sky of Kiel", rival="k", exact=True).effects
    assert set(pair["replacement"]) == {"pair"}
    assert set(pair["method"]) == {"atp", "exact"}
    assert pair["logit_diff"].null_count() == 0
    assert pair["logp"].abs().is_sorted(descending=True)
    assert len(pair.filter(component="head", method="exact")) == 2 * 2


def test_the_corrupt_prompt_that_is_the_prompt_changes_nothing(tiny_loaded: LoadedModel) -> None:
    text = "The sky of Bonn"
    effects = kdb.attribute(tiny_loaded, text, "q", corrupt=text, exact=True).effects
    assert effects["logp"].abs().max() == pytest.approx(0, abs=1e-6)


def test_a_neuron_with_a_negative_coefficient_promotes_the_tokens_that_it_would_lower(
    tiny_loaded: LoadedModel, facts: list[tuple[str, str]], stored: Any
) -> None:
    found = kdb.attribute(tiny_loaded, *facts[0], top_k=5).neurons
    assert {True, False} == set((found["coefficient"] < 0).to_list())
    tokens = stored.table("neuron_tokens", everything=True).sort("rank")
    for row in found.to_dicts():
        own = tokens.filter(*(pl.col(name).eq_missing(row[name]) for name in ("component", "layer", "head", "neuron")))
        sign = "top" if row["coefficient"] >= 0 else "bottom"
        assert row["promotes"] == own.filter(sign=sign)["token"].to_list()


def test_an_attribution_shows_itself_in_a_notebook(tiny_loaded: LoadedModel) -> None:
    found = kdb.attribute(tiny_loaded, "<b>The</b>", "q")
    assert repr(found).startswith("PromptAttribution(model='tiny', prompt='<b>The</b>', answer='q', target='q', logp=")
    assert "shape:" not in repr(found)
    page = found._repr_html_()
    assert "&lt;b&gt;The&lt;/b&gt;" in page
    assert page.count("<table>") == 2
    assert "LlamaForCausalLM(" not in repr(tiny_loaded)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": " "}, r"^answer is ' ': expected a text\.$"),
        ({"prompt": 3}, r"^prompt is 3: expected a text\.$"),
        ({"rival": "quince"}, r"^The rival 'quince' begins with the same token as the answer\."),
        ({"corrupt": "The"}, r"^The corrupt prompt has 4 tokens, and the prompt 8\."),
        ({"prompt": "x" * 200}, r"has 201 tokens, and tiny reads at most 128"),
        ({"top_k": 0}, r"^top_k is 0, expected a whole number from 1\.$"),
    ],
)
def test_a_prompt_that_cannot_be_attributed(tiny_loaded: LoadedModel, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(KdbError, match=message):
        kdb.attribute(tiny_loaded, **{"prompt": "The sky", "answer": "q", **changed})


# Errors ----------------------------------------------------------------------------------------------------------


def test_an_error_speaks_python_to_python_and_shell_to_the_shell(
    tmp_path: Path, run_kdb: Callable[..., Result]
) -> None:
    with pytest.raises(WarehouseError, match=r"Create one with `kdb.ingest\(\)`, or name another folder\."):
        kdb.open(tmp_path / "nothing")
    result = run_kdb("runs", "--warehouse", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "Create one with `kdb ingest`, or name another folder." in result.stderr


def test_a_note_speaks_python_to_python_and_shell_to_the_shell(tmp_path: Path, run_kdb: Callable[..., Result]) -> None:
    measure(tmp_path / "w", model="one")
    measure(tmp_path / "w", model="two", variant="limit=20")
    with pytest.warns(KdbNote, match=r"two \(limit=20\)\. `variant` chooses another\."):
        kdb.open(tmp_path / "w").query("layer-accuracy")
    result = run_kdb("query", "layer-accuracy", "--warehouse", tmp_path / "w")
    assert "two (limit=20). --variant chooses another." in result.stderr


def test_names_of_models_and_figures_are_told_in_the_words_of_python(measured: Path) -> None:
    with pytest.raises(ModelError, match=r"^There is no file 'x.gguf': `model` takes the path of a .gguf file\.$"):
        kdb.load_model("x.gguf")
    with pytest.raises(ModelError, match="leave `device` out"):
        kdb.load_model("smollm2-135m", device="nowhere")
    wh = kdb.open(measured)
    with pytest.raises(UnknownNameError, match=r"`Warehouse.figures\(\)` lists them"):
        wh.plot("depth")
    with pytest.raises(UnknownNameError, match=r"`Warehouse.queries\(\)` lists them"):
        wh.query("nope")
    for read in (wh.table, wh.scan):
        with pytest.raises(UnknownNameError, match=r"`Warehouse.tables\(\)` lists them"):
            read("nope")


@pytest.mark.parametrize(
    ("shell", "python"),
    [
        ("Use --answer-tokens all to compare.", "Use `answer_tokens='all'` to compare."),
        ("Leave --ask and --answers out.", "Leave `ask` and `answers` out."),
        ("give equal texts one group (--group-by).", "give equal texts one group (`group_by`)."),
        ("Run `kdb probe --model x` first.", "Run `kdb probe --model x` first."),
        ("Stored: --lens logit (--variant 'limit=20').", "Stored: `lens='logit'` (`variant='limit=20'`)."),
        ("`kdb query kept-prompts` lists them.", "`Warehouse.query('kept-prompts')` lists them."),
        ("a--b 1 -- 2", "a--b 1 -- 2"),
    ],
)
def test_options_become_keywords_and_commands_stay(shell: str, python: str) -> None:
    assert in_python(shell) == python


def test_a_library_that_is_not_installed_is_an_error_that_says_how_to_install_it() -> None:
    with pytest.raises(KdbError, match=r"^This needs altair, which is not installed: `pip install"), python_words():
        raise ModuleNotFoundError("No module named 'altair'", name="altair")
    with pytest.raises(ModuleNotFoundError, match="own"), python_words():
        raise ModuleNotFoundError("No module named 'own'", name="own")


# The docs --------------------------------------------------------------------------------------------------------


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def cells(notebook: str) -> list[str]:
    content = json.loads((ROOT / "docs" / notebook).read_text())
    assert content["nbformat"] == 4
    assert all(not cell.get("outputs") for cell in content["cells"])  # they would show numbers of another day
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("code", [blocks("python.md"), cells("notebook.ipynb")], ids=["python.md", "notebook.ipynb"])
def test_documented_python_runs_block_by_block(
    code: list[str], smollm2_135m: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kdb, "load_model", lambda name: {"smollm2-135m": smollm2_135m}[name])
    names: dict[str, Any] = {}
    assert len(code) > 4
    for block in code:
        exec(compile(block, "block", "exec"), names)  # the code is ours
    assert names["found"].rank == 1


def test_the_notebook_has_no_output_and_ends_with_one_prompt() -> None:
    assert cells("notebook.ipynb")[0].startswith("import kdb\n")
    assert any("kdb.attribute(" in cell for cell in cells("notebook.ipynb"))
