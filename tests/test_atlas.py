"""The atlas on a tiny model: benchmarks/atlas.py measures and resumes, benchmarks/reduce_atlas.py makes what is served.

Also benchmarks/assemble.py, on wheels of a few bytes.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command_line import refusal
from helpers.tiny_llama import weather

import kdb
from kdb.ingest.datasets import Dataset, Example, load_dataset
from kdb.queries.catalogue import load_catalogue
from kdb.warehouse.store import Warehouse

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import assemble
import atlas
import reduce_atlas
from assemble import Assembled, AssembleError
from atlas import AtlasModel

pytestmark = pytest.mark.slow

TOWNS = ("Rome", "Bern", "Kyiv", "Oslo", "Lima", "Bonn")


# Datasets --------------------------------------------------------------------------------------------------------


def test_a_sample_of_facts_has_every_relation_of_its_category() -> None:
    whole, some = load_dataset("knowledge"), atlas.knowledge_dataset(12)
    assert {example.relation for example in some.examples} == {example.relation for example in whole.examples}
    assert set(Counter(example.category for example in some.examples).values()) == {12}
    assert "12 prompts of each category" in some.source


def test_a_sample_says_so_and_a_whole_dataset_is_the_one_that_everybody_measures(tmp_path: Path) -> None:
    (some,) = (one for one in atlas.concept_datasets(None, atlas.Limits(built_in=5)) if one.name == "world-cities")
    assert (len(some.examples), some.source.rpartition("; ")[2]) == (10, "the first 5 of label 1 and 5 of label 0")
    (whole,) = (one for one in atlas.concept_datasets(tmp_path, atlas.Limits()) if one.name == "world-cities")
    assert whole == load_dataset("world-cities")


# Measuring and reducing ------------------------------------------------------------------------------------------


def texts(name: str, n: int = 24) -> Dataset:
    rows = [line.split(",") for line in weather(n).splitlines()[1:]]
    examples = tuple(Example(text, label=int(label), group=town) for text, label, town in rows)
    return Dataset(name, "made for a test", "{text}", examples, answers=("no", "yes"))


@pytest.fixture(scope="module")
def datasets(best: Callable[[str], str]) -> list[Dataset]:
    """Two concept datasets, with the names of one that may be published and of one that may not, and facts."""
    asked = [(kind, f"The {kind} of {town} is", town) for kind in ("sky", "sea") for town in TOWNS]
    facts = tuple(
        Example(text, category=kind, relation=kind, subject=town, answer=f"{best(text)}x") for kind, text, town in asked
    )
    others = tuple(  # another answer in each category, which the prompts' own ones beat
        Example(f"The {kind} is", category=kind, relation=kind, answer=f"{min(set('qk') - {best(f'The {kind} is')})}x")
        for kind in ("sky", "sea")
    )
    knowledge = Dataset("knowledge", "made for a test", "{text}", (*facts, *others), study="knowledge")
    return [texts("world-cities"), texts("cities"), knowledge]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> AtlasModel:
    return AtlasModel("tiny-atlas", str(tiny_model))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, model: AtlasModel, datasets: list[Dataset]) -> Path:
    folder = tmp_path_factory.mktemp("atlas") / "full"
    assert atlas.measure(folder, [model], datasets) == 0
    return folder


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory, measured: Path) -> Path:
    """The folder of the reduced warehouse, packed and unpacked."""
    folder = tmp_path_factory.mktemp("reduced")
    reduce_atlas.reduce(kdb.open(measured), folder / "small")
    reduce_atlas.pack(folder / "small", folder / "small.zip")
    with zipfile.ZipFile(folder / "small.zip") as packed:
        packed.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_a_measured_atlas_has_both_studies_and_everything_derived_from_them(measured: Path) -> None:
    stored = kdb.open(measured).sql("SELECT dataset, unnest(tables) AS table FROM runs WHERE source_run IS NOT NULL")
    assert {("knowledge", "effects"), ("knowledge", "ablations"), ("knowledge", "lens_readouts")} < set(stored.rows())
    assert {("world-cities", "projections"), ("cities", "probe_transfer")} < set(stored.rows())
    assert set(kdb.open(measured).sql("SELECT variant FROM runs")["variant"]) == {
        "default",
        "ablate=best-heads mode=mean",
    }


def test_an_atlas_that_was_measured_is_not_measured_again(
    measured: Path, model: AtlasModel, datasets: list[Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    before = kdb.open(measured).sql("SELECT run, finished_at FROM runs ORDER BY run")
    assert atlas.measure(measured, [model], datasets) == 0
    assert "8 of 8 steps stored, about 0 min left" in capsys.readouterr().out
    assert kdb.open(measured).sql("SELECT run, finished_at FROM runs ORDER BY run").equals(before)


def test_no_step_begins_when_the_time_is_over_and_the_next_command_takes_it_up(
    tmp_path: Path, model: AtlasModel, datasets: list[Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    assert atlas.measure(tmp_path / "w", [model], datasets, 0) == 8
    assert "Run the same command again to continue." in capsys.readouterr().out
    assert kdb.open(tmp_path / "w").sql("FROM runs").is_empty()


def test_a_failed_step_is_told_and_the_others_continue(
    tmp_path: Path, model: AtlasModel, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = tuple(Example(f"The sky of {town} is", category="sky", answer=f"{town}Z") for town in TOWNS)
    facts = Dataset("knowledge", "made for a test", "{text}", unknown, study="knowledge")
    left = atlas.measure(tmp_path / "w", [model], [texts("world-cities"), facts])
    printed = capsys.readouterr().out
    assert left == printed.count("Left: tiny-atlas") == 3
    assert "ablate (ablations): failed: kdb ablate: " in printed
    assert "transfer (probe_transfer): stored" in printed


def test_every_saved_query_answers_on_the_reduced_atlas(reduced: Path) -> None:
    wh = kdb.open(reduced)
    one = {"prompt": 0, "layer": 1, "head": 0, "neuron": "f1_1", "size": 0.2, "within": 2}
    for name, saved in load_catalogue().items():
        required = {param.name: one[param.name] for param in saved.params if param.required}
        rows = wh.query(name, **required)
        assert not rows.is_empty() or name in {"depth-by-step", "scores-by-step", "families-at-size", "lens-fits"} | {
            "expert-scores",
            "router-by-category",
            "top-experts",
            "neuron-by-category",
            "neuron-in-prompts",
            "neuron-tokens",
        }, name


def test_the_reduced_atlas_has_scores_and_neither_vectors_nor_texts_without_a_licence(
    reduced: Path, measured: Path
) -> None:
    wh = kdb.open(reduced)
    tables = set(wh.sql("SELECT DISTINCT unnest(tables) AS t FROM runs")["t"])
    assert not tables & {"activations", "probe_weights"}
    prompts = wh.sql("SELECT dataset, text, subject, group_id, token_ids FROM prompts")
    shown = set(prompts.filter(dataset="cities")["text"])
    assert shown == {reduce_atlas.WITHOUT_TEXT}
    assert set(prompts.filter(dataset="cities")["group_id"]) == {f"group {n}" for n in range(1, 13)}
    assert "Day 0: rain in Bonn." in set(prompts.filter(dataset="world-cities")["text"])
    for query in ("concept-depth", "top-heads", "attribution-methods"):
        assert (
            wh.query(query).drop("run", strict=False).equals(kdb.open(measured).query(query).drop("run", strict=False))
        )


def test_runs_of_the_reduced_atlas_name_each_other(reduced: Path) -> None:
    wh = kdb.open(reduced)
    runs = set(wh.sql("SELECT run FROM runs")["run"])
    assert set(wh.sql("SELECT source_run FROM runs WHERE source_run IS NOT NULL")["source_run"]) <= runs
    assert set(wh.sql("SELECT probe_run FROM probe_transfer")["probe_run"]) <= runs
    assert wh.query("probe-transfer", model="tiny-atlas")["best"].any()


@pytest.mark.parametrize(
    "command",
    [
        ("project", "--dataset", "world-cities"),
        ("probe", "--dataset", "world-cities"),
        ("transfer", "--dataset", "world-cities"),
        ("direction", "--dataset", "world-cities", "--layer", "1", "-o", "direction.npz"),
    ],
)
def test_a_command_that_needs_what_was_left_out_says_so(
    reduced: Path, run_kdb: Callable[..., object], command: tuple[str, ...], tmp_path: Path
) -> None:
    given = [str(tmp_path / word) if word.endswith(".npz") else word for word in command]
    message = refusal(run_kdb(given[0], "--model", "tiny-atlas", *given[1:], "--warehouse", reduced))
    assert "not stored" in message
    assert "reduced copy" in message


# Assembling ------------------------------------------------------------------------------------------------------


def model_in_parts(folder: Path, contents: list[bytes]) -> Assembled:
    """Write a wheel for each part, as pip would have downloaded it; returns the model's record."""
    whole = b"".join(contents)
    record = Assembled("m.gguf", "some-model", "1.0", len(contents), len(whole), hashlib.sha256(whole).hexdigest())
    wheels = folder / "some-model-wheels"
    wheels.mkdir(parents=True)
    for number, content in enumerate(contents, start=1):
        with zipfile.ZipFile(wheels / f"some_model_part{number}-1.0-py3-none-any.whl", "w") as packed:
            packed.writestr(f"some_model_part{number}/__init__.py", "")
            packed.writestr(f"some_model_part{number}/data/part{number:02d}.bin", content)
    return record


def test_parts_are_joined_by_number_and_wheels_deleted(tmp_path: Path) -> None:
    contents = [bytes([number]) * 3 for number in range(12)]
    path = assemble.assemble(model_in_parts(tmp_path, contents), tmp_path)
    assert path.read_bytes() == b"".join(contents)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_a_file_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    record = model_in_parts(tmp_path, [b"one", b"two"])
    written = assemble.assemble(record, tmp_path).stat().st_mtime_ns  # the wheels are gone, and nothing is downloaded
    assert assemble.assemble(record, tmp_path).stat().st_mtime_ns == written


def test_a_file_with_another_hash_is_refused_and_not_left_behind(tmp_path: Path) -> None:
    record = replace(model_in_parts(tmp_path, [b"one", b"two"]), sha256="0" * 64)
    with pytest.raises(AssembleError, match=r"SHA-256 is .*, expected 0000"):
        assemble.assemble(record, tmp_path)
    assert not list(tmp_path.glob("m.*"))


def test_the_reduced_file_of_a_folder_depends_on_its_contents_alone(tmp_path: Path) -> None:
    Warehouse.create(tmp_path / "w")
    for name in ("a.zip", "b.zip"):
        reduce_atlas.pack(tmp_path / "w", tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
