"""Many runs in one command: plans, checkpoints, and going on past a run that fails."""

from __future__ import annotations

import shutil
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from helpers.stored import assert_same_in_the_shell, needs_shell
from hypothesis import given
from hypothesis import strategies as st

import kdb
from kdb.errors import UnknownNameError
from kdb.ingest.models.find import training_step
from kdb.ingest.plan_file import combine
from kdb.ingest.settings import ALWAYS_FITTED
from kdb.warehouse.database import Database

pytestmark = pytest.mark.slow

FACTS = "prompt,answer,category\n" + "\n".join(
    f"Line {number} begins with,{letter},letter {number % 26}" for number, letter in enumerate(2 * string.ascii_letters)
)
"""Every letter is some prompt's answer, so the tiny model knows some of them."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with two checkpoints of the tiny model, the second with other weights."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints") / "growing"
    shutil.copytree(tiny_model, folder / "step1000")
    shutil.copytree(tiny_model, folder / "step2000")
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) / 10)
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    model.save_pretrained(folder / "step2000")
    return folder


@pytest.fixture(scope="session")
def grown(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, user_dataset: Path, run_kdb: Callable[..., Result]
) -> tuple[Path, Result]:
    """A warehouse with both checkpoints on both studies, and what the command said."""
    folder = tmp_path_factory.mktemp("grown")
    facts = folder / "letters.csv"
    facts.write_text(FACTS)
    plan = folder / "plan.yaml"
    runs = f"- model: {checkpoints}\n  revision: [step1000, step2000]\n  dataset: [{user_dataset}, {facts}]\n"
    plan.write_text(f"ablate-k: 2\nruns:\n{runs}")
    return folder / "w", run_kdb("ingest", plan, "--warehouse", folder / "w")


def test_a_plan_is_every_combination(grown: tuple[Path, Result], checkpoints: Path) -> None:
    warehouse, result = grown
    assert result.exit_code == 0, result.output
    lines, following = result.stdout.splitlines()[:4], result.stdout.splitlines()[4:]
    assert [line.partition("]")[0] for line in lines] == ["[1/4", "[2/4", "[3/4", "[4/4"]
    assert all(": stored (run " in line for line in lines)
    assert following[0] == "Next:"
    runs = kdb.open(warehouse).query("runs").select("model", "dataset", "variant").rows()
    assert {(model, dataset) for model, dataset, _ in runs} == {("growing", "weather"), ("growing", "letters")}
    assert {variant.split()[0] for *_, variant in runs} == {"revision=step1000", "revision=step2000"}


def test_a_plan_may_ask_about_a_file(
    tmp_path: Path, tiny_model: Path, user_dataset: Path, run_kdb: Callable[..., Result]
) -> None:
    plan = tmp_path / "plan.yaml"
    run = f"{{model: {tiny_model}, dataset: {user_dataset}, ask: 'Did it rain?', answers: 'no,yes'}}"
    plan.write_text(f"classifier: [logistic-standardised]\nruns: [{run}]")
    result = run_kdb("ingest", plan, "--warehouse", tmp_path / "w")
    assert result.exit_code == 0, result.output
    opened = kdb.open(tmp_path / "w")
    assert opened.sql("SELECT DISTINCT negative, positive FROM zero_shot").rows() == [("no", "yes")]
    fitted = set(opened.sql("SELECT DISTINCT classifier FROM probe_scores")["classifier"])
    assert fitted == {*ALWAYS_FITTED, "logistic-standardised"}
    plan.write_text(f"runs: [{run}, {{model: {tiny_model}, dataset: {user_dataset}, ask: 'Did it rain?'}}]")
    refused = run_kdb("ingest", plan, "--warehouse", tmp_path / "w")
    assert (refused.exit_code, "--ask needs the two answers" in refused.stderr) == (2, True)


def test_a_plan_that_was_carried_out_does_nothing(grown: tuple[Path, Result], run_kdb: Callable[..., Result]) -> None:
    warehouse, _ = grown
    again = run_kdb("ingest", warehouse.parent / "plan.yaml", "--warehouse", warehouse)
    assert again.exit_code == 0
    assert again.stdout.count("is stored already") == 4


def test_when_a_concept_was_learned(grown: tuple[Path, Result]) -> None:
    wh = kdb.open(grown[0])
    rows = wh.query("depth-by-step")
    assert rows.select("model", "dataset", "step", "revision").rows() == [
        ("growing", "weather", 1000, "step1000"),
        ("growing", "weather", 2000, "step2000"),
    ]
    for step, best in rows.select("step", "best_accuracy").rows():
        accuracy = wh.query("layer-accuracy", variant=f"revision=step{step}")
        assert best == accuracy["accuracy"].max()
    with pytest.raises(UnknownNameError, match="Unknown variant 'bfloat16'"):
        wh.query("depth-by-step", variant="bfloat16")


def test_when_knowledge_was_learned(grown: tuple[Path, Result]) -> None:
    wh = kdb.open(grown[0])
    rows = wh.query("scores-by-step", variant="ablate-k=2")
    assert wh.query("scores-by-step").is_empty()
    assert set(rows["step"]) == {1000, 2000}
    for row in rows.to_dicts():
        layers = wh.query("top-layers", k=100, variant=f"revision={row['revision']} ablate-k=2")
        mine = layers.filter(component=row["component"], category=row["category"])
        assert row["score"] == pytest.approx(mine["score"].sum())
        assert row["best_layer"] == mine.sort("rank")["layer_name"][0]


@needs_shell
@pytest.mark.parametrize(
    ("query", "variant"), [("depth-by-step", "default"), ("scores-by-step", "ablate-k=2")], ids=["depth", "scores"]
)
def test_saved_query_answers_the_same_in_the_shell(grown: tuple[Path, Result], query: str, variant: str) -> None:
    lake = grown[0] / "lake"
    with Database(lake) as database:
        assert_same_in_the_shell(lake, database, query, variant=variant)


def test_a_run_that_fails_does_not_keep_the_next_from_being_measured(
    tmp_path: Path, checkpoints: Path, user_dataset: Path, run_kdb: Callable[..., Result]
) -> None:
    command = ["ingest", "--model", checkpoints, "--dataset", user_dataset, "--warehouse", tmp_path / "w"]
    command += ["--revision", "step1000", "--revision", "step1500", "--revision", "step2000"]
    result = run_kdb(*command)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()[:3]
    assert [line.split(": ")[1].split(" (")[0] for line in lines] == ["stored", "FAILED", "stored"]
    assert "1 of 3 runs failed" in result.stderr
    assert "Unknown revision 'step1500'. Did you mean 'step1000'" in result.stderr
    assert len(kdb.open(tmp_path / "w").query("runs")) == 2


def test_one_checkpoint_that_there_is_not_is_wrong_input(
    tmp_path: Path, checkpoints: Path, user_dataset: Path, run_kdb: Callable[..., Result]
) -> None:
    command = ["ingest", "--model", checkpoints, "--dataset", user_dataset, "--revision", "step3"]
    result = run_kdb(*command, "--warehouse", tmp_path / "w")
    assert result.exit_code == 2
    assert "Unknown revision 'step3'" in result.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("runs: [{model: tiny, dtpye: float32}]", "Unknown option 'dtpye'. Did you mean 'dtype'"),
        ("runs: [{model: tiny, seed: many}]", "seed is 'many', expected a whole number"),
        ("runs: [{model: tiny, noise: 1}]", "noise is 1, expected true or false"),
        ("runs: [{model: tiny, limit: true}]", "limit is True, expected a whole number"),
        ("runs: [{model: [1]}]", "model is 1, expected a text"),
        ("runs: [{dataset: world-cities}]", "run 1: `model` is missing"),
        ("runs: [tiny]", "run 1: expected `model: …` and options"),
        ("runs: []", "a plan has a list `runs`"),
        ("- tiny", "a plan has a list `runs`"),
        ("runs: [", "is not YAML"),
        ("runs: [{model: tiny, model: other}]", "'model' is given twice"),
        ("runs: [{model: tiny, classifier: [logistc]}]", "plan.yaml, tiny: "),
        ("runs: [{model: tiny, dataset: [world-cities, world-cities]}]", "tiny on world-cities is planned twice"),
        ("runs: [{model: a, name: x}, {model: b, name: x}]", "is also what a would be"),
        ("runs: [{model: gpt2, dataset: nothing}]", "Unknown dataset 'nothing'"),
        ("runs: [{model: gpt2, dataset: knowledge}, {model: gpt3}]", "Unknown model 'gpt3'. Did you mean 'gpt2'"),
        ("runs: [{model: tiny, dtype: float8, dataset: world-cities}, {model: b}]", "'float8' is not one of"),
    ],
)
def test_a_wrong_plan_is_one_message(tmp_path: Path, run_kdb: Callable[..., Result], plan: str, told: str) -> None:
    (tmp_path / "plan.yaml").write_text(plan)
    result = run_kdb("ingest", tmp_path / "plan.yaml", "--warehouse", tmp_path / "w")
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("args", [["nowhere.yaml"], ["plan.yaml", "--model", "x"], []])
def test_a_plan_stands_alone(run_kdb: Callable[..., Result], args: list[str]) -> None:
    result = run_kdb("ingest", *args)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("revision", "step"),
    [
        ("step1000", 1000),
        ("stage1-step140000-tokens294B", 140000),
        ("checkpoint-500", 500),
        ("global_step20", 20),
        ("main", None),
        ("v1.0", None),
        (None, None),
    ],
)
def test_a_revision_tells_its_training_step(revision: str | None, step: int | None) -> None:
    assert training_step(revision) == step


names = st.lists(st.text("abc", min_size=1), max_size=3, unique=True)


@given(models=names, revisions=names, datasets=names)
def test_every_combination_is_asked_for_once(models: list[str], revisions: list[str], datasets: list[str]) -> None:
    asked = combine({"model": models, "revision": revisions, "dataset": datasets, "seed": 1})
    pairs = [(one.model, one.revision) for one in asked]
    assert pairs == [(model, revision) for model in models for revision in revisions or [None]]
    assert all(one.datasets == tuple(datasets) and one.options == {"seed": 1} for one in asked)
