"""One run, from prompts to commit: what it stores, what it repeats, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers.interruptions import interrupt_after, no_model

from kdb.errors import DatasetError, ModelError, WarehouseError
from kdb.ingest.concept import probing
from kdb.ingest.concept import study as run
from kdb.ingest.concept.derived import refit
from kdb.ingest.concept.probing import task_of_tables
from kdb.ingest.concept.splits import make_splits
from kdb.ingest.cost import cost
from kdb.ingest.datasets import Dataset, Example
from kdb.ingest.execution import processes
from kdb.ingest.forward.capture import Capture
from kdb.ingest.forward.checks import CHECK_PROMPTS, untouched
from kdb.ingest.job import Job
from kdb.ingest.measure import ingest
from kdb.ingest.models.find import LoadedModel, ModelSource
from kdb.ingest.settings import Measuring, Probing
from kdb.ingest.stages import Outcome
from kdb.warehouse.folder_storage import FolderStorage
from kdb.warehouse.staged_run import StagedRun
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

MakeJob = Callable[..., Job]


@pytest.fixture
def opened(tmp_path: Path) -> Warehouse:
    return Warehouse.create(tmp_path / "warehouse")


@pytest.fixture
def uninterrupted(
    tmp_path: Path, tiny_job: MakeJob, tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[tuple[Any, ...]]]:
    """The results of a run without interruption. Every run of these tests has four parts of activations, not one."""
    monkeypatch.setattr(run, "prompts_per_part", lambda *_: 10)
    plain = Warehouse.create(tmp_path / "uninterrupted")
    ingest(plain.storage, tiny_job(), lambda: tiny_loaded)
    return results(plain)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each call of the model, including the calls of the checks."""
    calls: list[int] = []
    real = Capture.vectors_and_ends

    def counted(self: Capture, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(token_ids))
        return real(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(Capture, "vectors_and_ends", counted)
    return calls


RESULTS = {
    "activations": "SELECT prompt_id, layer, site, vector FROM activations ORDER BY ALL",
    "probe_scores": "SELECT * EXCLUDE (run) FROM probe_scores ORDER BY ALL",
    "probe_predictions": "SELECT * EXCLUDE (run) FROM probe_predictions ORDER BY ALL",
    "zero_shot": "SELECT * EXCLUDE (run) FROM zero_shot ORDER BY ALL",
    "prompts": "SELECT * EXCLUDE (run) FROM prompts ORDER BY ALL",
    "checks": "SELECT * EXCLUDE (run) FROM checks ORDER BY ALL",
}


def results(opened: Warehouse) -> dict[str, list[tuple[Any, ...]]]:
    return {table: opened.sql(text).rows() for table, text in RESULTS.items()}


# What a run stores -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def asked(measured: Path) -> Warehouse:
    """The warehouse with one plain run, for reading."""
    return Warehouse(measured)


def test_every_prompt_has_a_vector_at_every_layer_and_site(asked: Warehouse) -> None:
    shape = "SELECT layer, site, count(DISTINCT prompt_id) AS n, min(len(vector)), max(len(vector)) FROM activations"
    assert asked.sql(f"{shape} GROUP BY layer, site ORDER BY layer, site").rows() == [
        (0, "ffn_norm", 40, 16, 16),
        (0, "resid_post", 40, 16, 16),
        (1, "ffn_norm", 40, 16, 16),
        (1, "resid_post", 40, 16, 16),
    ]


def test_a_stored_vector_is_the_models_own_hidden_state(asked: Warehouse, tiny_loaded: LoadedModel) -> None:
    text = "SELECT p.text, a.vector FROM activations a JOIN prompts p USING (model, dataset, run, prompt_id)"
    for prompt, vector in asked.sql(f"{text} WHERE layer = 0 AND site = 'resid_post' AND prompt_id < 5").rows():
        states, _ = untouched(tiny_loaded, tiny_loaded.tokenizer(prompt)["input_ids"])
        np.testing.assert_allclose(vector, states[1].numpy(), rtol=1e-4, atol=1e-5)


def test_prompts_are_stored_as_the_model_read_them(asked: Warehouse) -> None:
    rows = asked.sql("SELECT prompt_id, text, label, group_id, n_tokens FROM prompts ORDER BY prompt_id").rows()
    assert len(rows) == 40
    assert rows[0] == (0, "Day 0: rain in Bonn.", 0, None, 20)
    assert rows[11] == (11, "Day 11: rain in Jena!", 1, None, 21)


def test_a_probe_learns_the_label_and_is_scored_on_every_layer(asked: Warehouse) -> None:
    columns = "layer, depth, site, classifier, split, n_train, n_test, accuracy, auc"
    rows = asked.sql(f"SELECT {columns} FROM probe_scores ORDER BY ALL").rows()
    assert rows == [
        (layer, layer / 2, site, classifier, "paper", 24, 16, 1.0, 1.0)
        for layer in (0, 1)
        for site in ("ffn_norm", "resid_post")
        for classifier in ("logistic", "logistic-paper", "logistic-raw", "mean-difference")
    ]


def test_a_run_carries_how_far_it_can_be_trusted(asked: Warehouse) -> None:
    rows = asked.sql('SELECT "check", value <= tolerance, passed FROM checks WHERE passed ORDER BY 1').rows()
    names = ("final_norm", "readout", "readout_kl", "resid_post", "stored_answers", "stored_states")
    assert rows == [(name, True, True) for name in names]
    counts = asked.sql('SELECT "check", value, tolerance FROM checks WHERE passed IS NULL ORDER BY 1').rows()
    assert counts == [
        (name, 0, None)
        for name in ("doubled_bos", "repeated_texts", "special_tokens_in_text", "texts_on_both_sides_paper")
    ]


@pytest.mark.parametrize(("which", "check"), [(0, "stored_states"), (1, "stored_answers")])
def test_what_only_the_batches_of_the_run_get_wrong_is_refused(
    opened: Warehouse,
    tiny_job: MakeJob,
    tiny_loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    which: int,
    check: str,
) -> None:
    real = Capture.vectors_and_ends

    def wrong(self: Capture, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        found = real(self, token_ids, *args, **kwargs)
        if len(token_ids) > CHECK_PROMPTS:
            found[which][...] = np.roll(found[which], 1, axis=0)  # each has its neighbour's
        return found

    monkeypatch.setattr(Capture, "vectors_and_ends", wrong)
    with pytest.raises(ModelError, match=rf"^tiny cannot be measured: {check} is off by "):
        ingest(opened.storage, tiny_job(), lambda: tiny_loaded)
    assert opened.storage.run_folders() == []


def test_a_run_tells_its_model_dataset_and_settings(asked: Warehouse) -> None:
    model = asked.sql("SELECT model, family, architecture, n_layers, hidden_size, vocab_size, dtype FROM models").row(0)
    assert model == ("tiny", "llama", "LlamaForCausalLM", 2, 16, 256, "float32")
    dataset = asked.sql("SELECT dataset, study, template, n_prompts, n_positive FROM datasets").row(0)
    assert dataset == ("weather", "concept", "{text}", 40, 20)
    (row,) = asked.sql("SELECT * FROM runs").rows(named=True)
    assert (row["study"], row["variant"], row["source_run"], row["device"]) == ("concept", "default", None, "cpu")
    assert row["tables"] == [
        *("activations", "baseline_predictions", "baselines", "checks", "datasets", "models", "probe_predictions"),
        *("probe_scores", "probe_weights", "prompts", "runs", "zero_shot"),
    ]
    classifiers = ["logistic", "logistic-raw", "logistic-paper", "mean-difference"]
    assert json.loads(row["settings"])["classifiers"] == classifiers
    assert row["seconds"] > 0


def test_only_a_dataset_with_groups_gets_the_grouped_split(
    opened: Warehouse, tiny_job: MakeJob, tiny_loaded: LoadedModel
) -> None:
    ingest(opened.storage, tiny_job(group_by="town"), lambda: tiny_loaded)
    assert opened.sql("SELECT DISTINCT split FROM probe_scores ORDER BY 1").rows() == [("grouped",), ("paper",)]
    assert opened.sql("SELECT group_id FROM prompts WHERE prompt_id IN (0, 1, 39) ORDER BY prompt_id").rows() == [
        *(("Bonn 0",), ("Bonn 0",), ("Ulm 4",))
    ]


@pytest.mark.parametrize(("dataset", "first"), [("weather", 1), ("cities", 1), ("stsa", 0)])
def test_a_refit_of_an_older_run_has_the_published_split(warehouse: Path, dataset: str, first: int) -> None:
    opened = Warehouse(warehouse)
    older = {"prompts": "FROM prompts", "datasets": "SELECT NULL::SMALLINT AS first_label FROM datasets"}
    task = task_of_tables(lambda table: opened.sql(older[table]).to_arrow(), dataset, Probing(), 42)
    labels = [i % 2 for i in range(40)]
    assert (task.first_label, task.splits[0].name) == (first, "paper")
    assert task.splits[0].test.tolist() == make_splits(labels, first_label=first)[0].test.tolist()


def test_a_run_stores_which_label_its_paper_split_puts_first(
    opened: Warehouse, tiny_job: MakeJob, tiny_loaded: LoadedModel
) -> None:
    jobs = [tiny_job(), dataclasses.replace(tiny_job(), dataset=dataclasses.replace(tiny_job().dataset, first_label=0))]
    runs = [ingest(opened.storage, job, lambda: tiny_loaded).run for job in jobs]
    for one, job in zip(runs, jobs, strict=True):
        stored = opened.sql("SELECT first_label FROM datasets WHERE run = ?", [one]).item()
        labels = [e.label for e in job.dataset.examples]
        test = make_splits(labels, first_label=job.dataset.first_label)[0].test
        predicted = opened.sql("SELECT DISTINCT prompt_id FROM probe_predictions WHERE run = ?", [one])
        assert (stored, set(predicted["prompt_id"])) == (job.dataset.first_label, set(test.tolist()))


def test_repeated_texts_are_counted_and_told(
    opened: Warehouse,
    tmp_path: Path,
    tiny_job: MakeJob,
    tiny_loaded: LoadedModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [(f"Day {i // 2 % 15} {'rains' if i % 2 else 'shines'}.", i % 2) for i in range(40)]
    ingest(opened.storage, tiny_job(dataset=csv(tmp_path / "days.csv", rows)), lambda: tiny_loaded)
    counts = dict(opened.sql('SELECT "check", value FROM checks WHERE passed IS NULL').rows())
    test = set(opened.sql("SELECT DISTINCT prompt_id FROM probe_predictions")["prompt_id"])
    trained = {rows[i][0] for i in range(40) if i not in test}
    assert counts["repeated_texts"] == 10
    assert counts["texts_on_both_sides_paper"] == sum(rows[i][0] in trained for i in test) > 0
    assert any(message.startswith("10 of 40 prompts of days repeat a text") for message in caplog.messages)


def test_a_dataset_without_repeated_texts_is_counted_and_not_told(
    opened: Warehouse, tiny_job: MakeJob, tiny_loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    ingest(opened.storage, tiny_job(group_by="town"), lambda: tiny_loaded)
    counts = dict(opened.sql('SELECT "check", value FROM checks WHERE passed IS NULL').rows())
    assert {name: counts[name] for name in counts if "texts" in name} == {
        "repeated_texts": 0,
        "texts_on_both_sides_paper": 0,
        "texts_on_both_sides_grouped": 0,
    }
    assert "repeat a text" not in caplog.text


def test_noise_is_in_the_prompts_that_the_model_reads(
    opened: Warehouse, tiny_job: MakeJob, tiny_loaded: LoadedModel
) -> None:
    ingest(opened.storage, tiny_job(noise=True), lambda: tiny_loaded)
    texts = opened.sql("SELECT text FROM prompts ORDER BY prompt_id")["text"].to_list()
    assert {text[:7] for text in texts} == {"aaa Day", "bbb Day"}
    assert opened.sql("SELECT noise, variant FROM runs").rows() == [("aaa or bbb", "noise")]


def test_float16_storage_keeps_the_vectors_to_its_precision(
    opened: Warehouse, asked: Warehouse, tiny_job: MakeJob, tiny_loaded: LoadedModel
) -> None:
    ingest(opened.storage, tiny_job(store="float16"), lambda: tiny_loaded)
    half, full = (np.array(w.sql(RESULTS["activations"])["vector"].to_list()) for w in (opened, asked))
    np.testing.assert_array_equal(half, full.astype(np.float16))


def test_each_test_prompt_has_a_prediction_and_they_make_the_scores(asked: Warehouse) -> None:
    text = """
    SELECT layer, site, classifier, split, n_test, accuracy, f1, count(*) AS n, avg(correct::INT) AS found,
           2 * sum((predicted = 1 AND label = 1)::INT) / sum(predicted + label) AS found_f1,
           bool_and(correct = (predicted = label)) AS agree
    FROM probe_scores JOIN probe_predictions USING (run, layer, site, classifier, split)
    JOIN prompts USING (run, prompt_id) GROUP BY ALL
    """
    rows = asked.sql(text).rows(named=True)
    assert len(rows) == 16
    for row in rows:
        assert (row["n"], row["found"], row["agree"]) == (row["n_test"], row["accuracy"], True)
        assert row["found_f1"] == pytest.approx(row["f1"])


def test_the_control_task_is_the_same_for_every_layer_and_told_by_its_seed(
    opened: Warehouse, tiny_job: MakeJob, tiny_loaded: LoadedModel
) -> None:
    ingest(opened.storage, tiny_job(group_by="town"), lambda: tiny_loaded)
    (source,) = opened.storage.run_folders()
    refit(opened.storage, source, Probing(), seed=7)
    text = "SELECT selectivity = accuracy - control_accuracy, run = ?, list(control_accuracy) FROM probe_scores"
    rows = opened.sql(f"{text} WHERE split = 'paper' GROUP BY ALL ORDER BY 2", [source.run]).rows()
    assert [row[:2] for row in rows] == [(True, False), (True, True)]
    assert rows[0][2] != rows[1][2]


# What is done once -----------------------------------------------------------------------------------------------


def test_the_same_ingest_again_loads_no_model_and_changes_nothing(
    warehouse: Path, tiny_job: MakeJob, captured: list[int]
) -> None:
    opened = Warehouse(warehouse)
    before = results(opened)
    (folder,) = opened.storage.run_folders()
    assert ingest(opened.storage, tiny_job(), no_model) == Outcome(folder.run, "exists")
    assert results(opened) == before
    assert captured == []


def test_an_interrupted_capture_goes_on_from_its_last_finished_part(
    opened: Warehouse,
    uninterrupted: dict[str, list[tuple[Any, ...]]],
    tiny_job: MakeJob,
    tiny_loaded: LoadedModel,
    captured: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Capture, "vectors_and_ends", interrupt_after(4, Capture.vectors_and_ends))
        with pytest.raises(KeyboardInterrupt):
            ingest(opened.storage, tiny_job(), lambda: tiny_loaded)
    assert captured == [8, 10, 10]  # the checks, and two parts
    assert opened.storage.run_folders() == []
    captured.clear()
    assert ingest(opened.storage, tiny_job(), lambda: tiny_loaded).status == "committed"
    assert captured == [10, 10]
    assert results(opened) == uninterrupted


def test_an_interrupted_probe_needs_no_model_to_go_on(
    opened: Warehouse,
    uninterrupted: dict[str, list[tuple[Any, ...]]],
    tiny_job: MakeJob,
    tiny_loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[list[Any]] = []
    mapped = processes.mapped

    def stops_after_one(work: Any, inputs: Any, shards: Any, n_jobs: int) -> Iterator[Any]:
        fitted.append([shard.work for shard in shards])
        yield next(iter(mapped(work, inputs, shards[:1], n_jobs)))
        raise KeyboardInterrupt

    def watched(work: Any, inputs: Any, shards: Any, n_jobs: int) -> Iterator[Any]:
        fitted.append([shard.work for shard in shards])
        return mapped(work, inputs, shards, n_jobs)

    monkeypatch.setattr(probing, "_n_jobs", lambda *_: 2)
    monkeypatch.setattr(processes, "mapped", stops_after_one)
    with pytest.raises(KeyboardInterrupt):
        ingest(opened.storage, tiny_job(), lambda: tiny_loaded)
    monkeypatch.setattr(processes, "mapped", watched)
    assert ingest(opened.storage, tiny_job(), no_model).status == "committed"
    assert fitted[1] == [(1, "resid_post"), (0, "ffn_norm"), (1, "ffn_norm")]
    assert results(opened) == uninterrupted
    assert opened.sql("SELECT device FROM runs").item() == "cpu"  # as the first part of the run remembered it


def test_a_failure_while_probing_comes_without_warnings_from_the_workers(
    opened: Warehouse,
    tiny_job: MakeJob,
    tiny_loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    def fails(staged: StagedRun, table: str, *args: Any, **kwargs: Any) -> None:
        if table == "probe_scores":
            raise WarehouseError("the disk is full")
        write(staged, table, *args, **kwargs)

    write = StagedRun.write
    monkeypatch.setattr(StagedRun, "write", fails)
    with pytest.raises(WarehouseError):
        ingest(opened.storage, tiny_job(), lambda: tiny_loaded)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_commit_that_was_cut_off_is_ended_without_the_model(
    opened: Warehouse,
    tiny_job: MakeJob,
    tiny_loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupt_after(1, Path.rename))
        with pytest.raises(KeyboardInterrupt):
            ingest(opened.storage, tiny_job(), lambda: tiny_loaded)
    assert ingest(opened.storage, tiny_job(), no_model).status == "exists"
    assert opened.sql("SELECT count(*) FROM activations").item() == 160


# What sets runs apart --------------------------------------------------------------------------------------------

SOURCE = ModelSource("tiny", None, "tiny", "cafe", Path("tiny"))
DATASET = Dataset("weather", "a test", "{text}", (Example("Rain.", 0), Example("Rain!", 1)))
PLAIN = Job(SOURCE, DATASET, Measuring(), Probing())


def changed(job: Job = PLAIN, **settings: Any) -> Job:
    return dataclasses.replace(job, **settings)


OTHER_JOBS = {
    "model": changed(source=dataclasses.replace(SOURCE, name="other")),
    "revision": changed(source=dataclasses.replace(SOURCE, revision="beef")),
    "dataset": changed(dataset=dataclasses.replace(DATASET, name="other")),
    "text": changed(dataset=dataclasses.replace(DATASET, examples=(Example("Hail.", 0), Example("Rain!", 1)))),
    "label": changed(dataset=dataclasses.replace(DATASET, examples=(Example("Rain.", 1), Example("Rain!", 1)))),
    "group": changed(dataset=dataclasses.replace(DATASET, examples=(Example("Rain.", 0, "a"), Example("Rain!", 1)))),
    "template": changed(dataset=dataclasses.replace(DATASET, template="Is it so? {text}")),
    "answers": changed(dataset=dataclasses.replace(DATASET, answers=("false", "true"))),
    "dtype": changed(measuring=Measuring(dtype="bfloat16")),
    "quantize": changed(measuring=Measuring(quantize="int8")),
    "noise": changed(measuring=Measuring(noise=True)),
    "seed": changed(measuring=Measuring(seed=7)),
    "store": changed(measuring=Measuring(store="float16")),
    "limit": changed(measuring=Measuring(limit=5)),
    "classifiers": changed(probing=Probing(classifiers=("logistic", "logistic-paper", "random-forest"))),
    "splits": changed(probing=Probing(splits=3)),
}


@pytest.mark.parametrize("setting", OTHER_JOBS)
def test_every_setting_that_changes_a_result_changes_the_run_id(setting: str) -> None:
    assert OTHER_JOBS[setting].run != PLAIN.run


def test_how_vectors_are_stored_does_not_set_a_knowledge_run_apart() -> None:
    knowledge = dataclasses.replace(DATASET, study="knowledge")
    full, half = (changed(dataset=knowledge, measuring=Measuring(store=store)) for store in ("float32", "float16"))
    assert (half.run, half.variant) == (full.run, "default")


def test_where_things_lie_and_what_they_are_called_there_does_not_change_the_run_id() -> None:
    source = dataclasses.replace(SOURCE, path=Path("/elsewhere"), source="elsewhere", family="llama")
    dataset = dataclasses.replace(DATASET, source="another file")
    assert changed(source=source, dataset=dataset, custom_template=True).run == PLAIN.run


@pytest.mark.parametrize(
    ("job", "variant"),
    [
        (PLAIN, "default"),
        (changed(probing=Probing(splits=5)), "default"),
        (changed(source=dataclasses.replace(SOURCE, pinned="v1.0")), "revision=v1.0"),
        (changed(measuring=Measuring(limit=5)), "limit=5"),
        (changed(measuring=Measuring(noise=True)), "noise"),
        (changed(measuring=Measuring(noise=True, seed=7)), "noise=7"),
        (changed(measuring=Measuring(seed=7)), "default"),
        (changed(measuring=Measuring(dtype="bfloat16")), "bfloat16"),
        (changed(measuring=Measuring(quantize="int8")), "int8"),
        (changed(measuring=Measuring(store="float16")), "store=float16"),
        (
            changed(dataset=dataclasses.replace(DATASET, template="Is it so? {text}"), custom_template=True),
            "template=551fc97a",
        ),
        (changed(measuring=Measuring(noise=True, dtype="float16", limit=5)), "limit=5 noise float16"),
    ],
)
def test_a_variant_names_what_sets_a_run_apart(job: Job, variant: str) -> None:
    assert job.variant == variant


# Probing again ---------------------------------------------------------------------------------------------------


def test_a_refit_is_a_run_of_its_own_that_names_its_source(warehouse: Path) -> None:
    opened = Warehouse(warehouse)
    (source,) = opened.storage.run_folders()
    outcome = refit(opened.storage, source, Probing(splits=2))
    assert outcome.status == "committed"
    (row,) = opened.sql("SELECT * FROM runs WHERE run <> ?", [source.run]).rows(named=True)
    assert (row["run"], row["source_run"], row["variant"]) == (outcome.run, source.run, "default")
    assert row["tables"] == [
        *("baseline_predictions", "baselines", "datasets", "models", "probe_predictions", "probe_scores"),
        *("probe_weights", "runs"),
    ]
    assert (row["torch_version"], row["transformers_version"], row["device"]) == (None, None, "cpu")
    settings = json.loads(row["settings"])
    assert (settings["model"], settings["splits"]) == ("tiny", 2)


def test_a_refit_is_what_queries_read_while_activations_stay_with_their_source(warehouse: Path) -> None:
    opened = Warehouse(warehouse)
    (source,) = opened.storage.run_folders()
    outcome = refit(opened.storage, source, Probing(splits=2))
    current = dict(opened.sql("SELECT table_name, run FROM current_runs").rows())
    assert (current["probe_scores"], current["models"]) == (outcome.run, outcome.run)
    assert (current["activations"], current["prompts"]) == (source.run, source.run)
    splits = opened.query("layer-accuracy", split="stratified-43")
    assert len(splits) > 0


def test_a_refit_of_the_same_kind_scores_the_same(warehouse: Path) -> None:
    opened = Warehouse(warehouse)
    (source,) = opened.storage.run_folders()
    outcome = refit(opened.storage, source, Probing())
    scores = "SELECT * EXCLUDE (run) FROM probe_scores WHERE run = ? ORDER BY ALL"
    assert opened.sql(scores, [outcome.run]).rows() == opened.sql(scores, [source.run]).rows()
    assert refit(opened.storage, source, Probing()) == Outcome(outcome.run, "exists")


def test_another_seed_is_another_refit(warehouse: Path) -> None:
    opened = Warehouse(warehouse)
    (source,) = opened.storage.run_folders()
    runs = {refit(opened.storage, source, Probing(splits=2), seed=seed).run for seed in (42, 7)}
    assert len(runs) == 2
    assert opened.sql("SELECT DISTINCT split FROM probe_scores ORDER BY 1")["split"].to_list() == [
        *("paper", "stratified-43", "stratified-8")
    ]


def test_a_run_without_activations_cannot_be_refitted(warehouse: Path) -> None:
    lake = FolderStorage(warehouse)
    (source,) = lake.run_folders()
    derived = lake.find(refit(lake, source, Probing(splits=2)).run)
    with pytest.raises(WarehouseError, match=f"Run {derived.run} has no activations to compute from"):
        refit(lake, derived, Probing(splits=3))


# What is refused -------------------------------------------------------------------------------------------------


def csv(path: Path, rows: list[tuple[str, int]]) -> Path:
    pl.DataFrame(rows, schema=["text", "label"], orient="row").write_csv(path)
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("Rain.", 0), ("Rain!", 1)],
            (
                "Probing needs at least 6 prompts of each label, 5 to train on and one to test on; label 0 has 1. "
                "Add prompts of this label: 20 of each are enough for most splits."
            ),
        ),
        (
            [("Rain.", 0), ("Rain!", 1)] * 3 + [("x" * 121, 1)],
            f"Prompt 6 of 'few', '{'x' * 56}..., has 121 tokens and 8 of its cue, and tiny reads at most 128: "
            "shorten the text, or use a model with a longer context.",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_stored(
    opened: Warehouse, tmp_path: Path, tiny_job: MakeJob, rows: list[tuple[str, int]], message: str
) -> None:
    job = tiny_job(dataset=csv(tmp_path / "few.csv", rows))
    with pytest.raises(DatasetError) as caught:
        ingest(opened.storage, job, no_model)
    assert str(caught.value) == message
    assert opened.storage.run_folders() == []
    assert opened.storage.local.staging.unfinished_runs() == []


def test_a_plan_says_what_a_run_will_cost_and_loads_no_weights(tiny_job: MakeJob) -> None:
    said = cost(tiny_job(), "cpu")
    # 40 prompts × 2 layers × 2 sites × 16 floats of 4 bytes; "Day " is run once for all, and the cue after each.
    assert (said.n_prompts, said.n_layers, said.disk_bytes) == (40, 2, 10_240)
    n_tokens = sum(len(example.text) - len("Day ") + len("\nAnswer:") for example in tiny_job().dataset.examples)
    assert said.n_tokens == n_tokens
    assert cost(tiny_job(store="float16"), "cpu").disk_bytes == 5_120
