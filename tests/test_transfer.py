"""Probes applied to other datasets, and their directions outside of kdb."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import Result
from helpers.command_line import refusal
from helpers.stored import assert_same_in_the_shell, needs_shell
from helpers.tiny_llama import make_tiny_model, weather
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from test_schemas import unpacked

import kdb
from kdb.errors import QueryError, WarehouseError
from kdb.ingest.concept.metrics import auc_interval
from kdb.ingest.concept.transfer import transfer
from kdb.numbers import shown
from kdb.warehouse.database import Database
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow

RunKdb = Callable[..., Result]
DIRECTION = ("direction", "--model", "tiny", "--dataset", "weather")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, user_dataset: Path, run_kdb: RunKdb) -> Path:
    """A warehouse of two datasets, which share ten texts, and the transfer between them."""
    folder = tmp_path_factory.mktemp("transfer")
    rows = weather(40).splitlines()
    (folder / "winter.csv").write_text("\n".join([*rows[:11], *(row.replace("rain", "snow") for row in rows[11:])]))
    for dataset in (user_dataset, folder / "winter.csv"):
        result = run_kdb("ingest", "--model", tiny_model, "--dataset", dataset, "--warehouse", folder / "w")
        assert result.exit_code == 0, result.output
    result = run_kdb("transfer", "--model", "tiny", "--warehouse", folder / "w")
    assert result.exit_code == 0, result.output
    return folder / "w"


@pytest.fixture
def opened(two: Path) -> Warehouse:
    return kdb.open(two)


def vectors(wh: Warehouse, dataset: str, layer: int, site: str = "resid_post") -> np.ndarray:
    query = "SELECT vector FROM activations WHERE dataset = ? AND layer = ? AND site = ? ORDER BY prompt_id"
    return np.stack(wh.sql(query, [dataset, layer, site])["vector"].to_list())


def test_a_transfer_is_the_stored_direction_applied_to_the_prompts_that_it_has_not_seen(opened: Warehouse) -> None:
    direction = opened.direction(model="tiny", dataset="weather", layer=1)
    test = "SELECT prompt_id FROM current.probe_predictions WHERE dataset = 'weather' AND layer = 1"
    trained = sorted(set(range(40)) - set(opened.sql(f"{test} AND site = 'resid_post'")["prompt_id"]))
    texts = dict(opened.sql("SELECT prompt_id, text FROM prompts WHERE dataset = 'weather'").rows())
    winter = opened.sql("SELECT prompt_id, text, label FROM prompts WHERE dataset = 'winter' ORDER BY 1").rows()
    unseen = [i for i, text, _ in winter if text not in {texts[t] for t in trained}]
    assert 30 <= len(unseen) < 40
    labels = np.array([winter[i][2] for i in unseen])
    decision = direction.decision_function(vectors(opened, "winter", 1)[unseen])
    row = (
        opened.query("probe-transfer", layer=1, dataset=["winter"]).filter(source_dataset="weather").row(0, named=True)
    )
    assert (row["n"], row["n_left_out"]) == (len(unseen), 40 - len(unseen))
    assert row["accuracy"] == np.mean((decision > 0) == labels)
    assert row["auc"] == pytest.approx(roc_auc_score(labels, decision))
    assert row["auc_low"] <= row["auc"] <= row["auc_high"]


def test_within_one_dataset_the_probe_meets_its_test_part_alone(opened: Warehouse) -> None:
    rows = opened.query("probe-transfer", dataset=["weather"]).filter(source_dataset="weather")
    scores = opened.table("probe_scores").filter(dataset="weather", site="resid_post").sort("layer")
    assert rows["accuracy"].to_list() == scores["accuracy"].to_list()
    assert rows["auc"].to_list() == pytest.approx(scores["auc"].to_list(), abs=1e-6)
    assert rows["cosine"].to_list() == pytest.approx([1.0, 1.0])
    assert set(rows["n"]) == {16}


@needs_shell
def test_transfers_are_the_same_in_the_shell(two: Path) -> None:
    with Database(two / "lake") as database:
        assert_same_in_the_shell(two / "lake", database, "probe-transfer")


def test_a_transfer_that_is_stored_is_not_computed_again(two: Path, run_kdb: RunKdb) -> None:
    result = run_kdb("transfer", "--model", "tiny", "--warehouse", two)
    assert result.exit_code == 0
    assert result.output.count("is stored already") == 2


def test_a_direction_predicts_what_the_probe_predicted_and_is_exported(
    opened: Warehouse, two: Path, tmp_path: Path, run_kdb: RunKdb
) -> None:
    direction = opened.direction(model="tiny", dataset="weather", layer=0, classifier="mean-difference")
    rows = opened.sql(
        "SELECT prompt_id, predicted FROM probe_predictions WHERE dataset = 'weather' AND layer = 0 AND "
        "site = 'resid_post' AND classifier = 'mean-difference' AND split = 'paper'"
    )
    predicted = direction.predict(vectors(opened, "weather", 0)[rows["prompt_id"].to_numpy()])
    assert predicted.tolist() == rows["predicted"].to_list()
    chosen = ("--model", "tiny", "--dataset", "weather", "--layer", "0", "--classifier", "mean-difference")
    result = run_kdb("direction", *chosen, "-o", tmp_path / "d.npz", "--warehouse", two)
    assert result.exit_code == 0, result.output
    written = np.load(tmp_path / "d.npz")
    assert written["weights"].tolist() == direction.weights.tolist()
    assert (str(written["site"]), str(written["revision"])) == ("resid_post", direction.revision)
    assert np.linalg.norm(direction.unit) == pytest.approx(1.0)


# In Python -------------------------------------------------------------------------------------------------------


def test_a_stored_probe_predicts_as_a_fitted_scikit_learn_classifier_does(opened: Warehouse) -> None:
    probe = opened.probe(model="tiny", dataset="weather", layer=1, site="ffn_norm", classifier="logistic-raw")
    X = vectors(opened, "weather", 1, "ffn_norm")
    stored = opened.sql(
        "SELECT prompt_id, predicted FROM probe_predictions WHERE dataset = 'weather' AND layer = 1 AND "
        "site = 'ffn_norm' AND classifier = 'logistic-raw' AND split = 'paper' ORDER BY prompt_id"
    )
    same = LogisticRegression()
    same.classes_, same.coef_, same.intercept_ = np.array([0, 1]), probe.weights[None], np.array([probe.intercept])
    assert probe.predict(X)[stored["prompt_id"].to_numpy()].tolist() == stored["predicted"].to_list()
    assert probe.predict(X).tolist() == same.predict(X).tolist()
    np.testing.assert_allclose(probe.decision_function(X), same.decision_function(X), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(probe.predict_proba(X), same.predict_proba(X), atol=1e-5)


def test_a_stored_probe_says_what_it_belongs_to(opened: Warehouse) -> None:
    probe = opened.probe(model="tiny", dataset="weather", layer=1)
    row = opened.table("probe_scores").filter(dataset="weather", site="resid_post", layer=1).row(0, named=True)
    assert (probe.scale, probe.accuracy, probe.auc) == (row["scale"], row["accuracy"], row["auc"])
    assert (probe.site, probe.split, probe.classifier) == ("resid_post", "paper", "logistic")
    assert probe.revision == opened.table("models")["revision"][0]
    for fact in ("label 1", "scale", "site", "revision"):
        assert fact in (type(probe).__doc__ or "")


def test_the_difference_of_means_has_no_probabilities(opened: Warehouse) -> None:
    probe = opened.probe(model="tiny", dataset="weather", layer=1, classifier="mean-difference")
    with pytest.raises(QueryError, match="mean-difference has no probabilities: use decision_function"):
        probe.predict_proba(np.zeros((1, 16)))


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (np.zeros((2, 3)), r"has 16 weights, but the hidden states have the shape \(2, 3\)"),
        (np.zeros((2, 2, 16)), r"shape \(2, 2, 16\)"),
        (np.float64(1), r"shape \(\)"),
        ([[0.0] * 16, [0.0]], "not an array of numbers"),
        (np.full((1, 16), np.nan), "infinite values or NaN"),
    ],
)
def test_what_is_no_state_of_the_layer_is_refused(opened: Warehouse, states: Any, said: str) -> None:
    with pytest.raises(QueryError, match=said):
        opened.probe(model="tiny", dataset="weather", layer=0).predict(states)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"layer": 2}, "has the layer 2. Stored: 0 to 1"),
        ({"site": "nowhere"}, "has the site 'nowhere'. Stored: ffn_norm, resid_post"),
        ({"classifier": "random-forest"}, "has the classifier 'random-forest'. Stored: logistic, "),
        ({"split": "grouped"}, "has the split 'grouped'. Stored: paper"),
        ({"dataset": "whether"}, "Stored: tiny on weather; tiny on winter"),
        ({"variant": "noise"}, "No stored probe of tiny on weather, variant noise. It has the variants default."),
    ],
)
def test_a_probe_that_is_not_stored_is_named_beside_those_that_are(
    opened: Warehouse, chosen: dict[str, Any], said: str
) -> None:
    with pytest.raises(QueryError, match=re.escape(said)):
        opened.probe(**{"model": "tiny", "dataset": "weather", "layer": 0, **chosen})


def test_a_run_of_an_older_kdb_has_no_weights_and_the_message_says_what_fits_them(tmp_path: Path) -> None:
    old = kdb.open(unpacked(4, tmp_path / "w"))
    model, dataset = old.sql("SELECT model, dataset FROM current.probe_scores LIMIT 1").row(0)
    with pytest.raises(QueryError, match=f"without weights. Run `kdb probe --model {model} --dataset {dataset}` first"):
        old.probe(model=model, dataset=dataset, layer=0)


# New texts -------------------------------------------------------------------------------------------------------


def scored(run_kdb: RunKdb, warehouse: Path, output: Path, *args: str | Path) -> tuple[Result, pl.DataFrame]:
    """Run `kdb transfer --to` with the probes of weather, and read the scores that it writes."""
    result = run_kdb("transfer", "--dataset", "weather", *args, "-o", output, "--warehouse", warehouse)
    assert result.exit_code == 0, result.output
    return result, pl.read_parquet(output)


@pytest.mark.parametrize("site", ["resid_post", "ffn_norm"])
def test_new_texts_have_the_decision_values_of_their_hidden_states_and_keep_what_was_trained_on_apart(
    two: Path, opened: Warehouse, tmp_path: Path, tiny_model: Path, user_dataset: Path, run_kdb: RunKdb, site: str
) -> None:
    args = ("--model", tiny_model, "--to", user_dataset, "--site", site, "--wide")
    result, texts = scored(run_kdb, two, tmp_path / "s.parquet", *args)
    assert texts["text_id"].n_unique() * 2 == len(texts) == 80
    rows = texts.filter(layer=1, site=site)
    probe = opened.probe(model="tiny", dataset="weather", layer=1, site=site)
    decision = probe.decision_function(vectors(opened, "weather", 1, site))
    np.testing.assert_allclose(rows["decision"], decision, atol=1e-3 * np.abs(decision).max())
    np.testing.assert_allclose(rows["probability"], 1 / (1 + np.exp(-rows["decision"].to_numpy())))
    assert (rows["predicted"] == (rows["decision"] > 0)).all()
    test = opened.table("probe_predictions").filter(dataset="weather", layer=1, site=site)["prompt_id"]
    assert set(rows.filter(~pl.col("in_training"))["text_id"]) == set(test)
    assert rows["probe_run"].unique().to_list() == [probe.run]
    score = opened.table("probe_scores").filter(dataset="weather", layer=1, site=site).row(0, named=True)
    (line,) = [line for line in result.stdout.splitlines() if re.match(f" +1  {site}", line)]
    cells = line.split()
    names = ("accuracy", "auc", "auc", "auc_low", "auc_high", "accuracy", "accuracy_low", "accuracy_high")
    assert cells[2:] == [*(shown(name, score[name], 16) for name in names), "16", "24"]


def test_texts_without_labels_are_scored_and_shown_at_the_best_layer(
    two: Path, tmp_path: Path, tiny_model: Path, run_kdb: RunKdb
) -> None:
    (tmp_path / "new.jsonl").write_text("".join(f'{{"text": "Day {i}: hail{"!" * (i % 2)}"}}\n' for i in range(30)))
    args = ("--model", tiny_model, "--to", tmp_path / "new.jsonl", "--classifier", "mean-difference")
    result, texts = scored(run_kdb, two, tmp_path / "s.parquet", *args)
    assert len(texts) == 30 * 2 * 2
    assert texts["label"].null_count() == texts["probability"].null_count() == len(texts)
    assert result.stdout.count("hail") == 20
    assert "auc" not in result.stdout


def test_texts_of_one_label_have_an_accuracy_and_no_auc(
    two: Path, tmp_path: Path, tiny_model: Path, run_kdb: RunKdb
) -> None:
    pl.DataFrame({"text": ["Day 1: hail!", "Day 2: sun!"], "label": [True, True]}).write_parquet(tmp_path / "n.parquet")
    args = ("--model", tiny_model, "--to", tmp_path / "n.parquet", "--layer", "0", "--site", "ffn_norm")
    result, texts = scored(run_kdb, two, tmp_path / "s.parquet", *args)
    assert len(texts) == 2
    assert re.search(r"  1\.00 +1\.00 +– +0\.50 ± ", result.stdout)


def test_new_texts_are_read_with_the_template_and_the_noise_of_the_run_that_ran_the_model(
    tmp_path: Path, tiny_model: Path, user_dataset: Path, run_kdb: RunKdb
) -> None:
    folder, model = tmp_path / "w", ("--model", "tiny", "--dataset", "weather")
    texts = ("--noise", "--seed", "7", "--template", "So: {text} So")
    measured = ("ingest", "--model", tiny_model, "--dataset", user_dataset, *texts, "--warehouse", folder)
    assert run_kdb(*measured).exit_code == 0
    opened = kdb.open(folder)
    variant = opened.sql("SELECT variant FROM runs").item()
    refit = ("probe", *model, "--variant", variant, "--seed", "8", "--splits", "2", "--warehouse", folder)
    assert run_kdb(*refit).exit_code == 0
    args = ("--model", tiny_model, "--variant", variant, "--to", user_dataset, "--site", "resid_post")
    _, scores = scored(run_kdb, folder, tmp_path / "s.parquet", *args, "--split", "stratified-9")
    probe = opened.probe(model="tiny", dataset="weather", layer=1, variant=variant, split="stratified-9")
    decision = probe.decision_function(vectors(opened, "weather", 1))
    np.testing.assert_allclose(scores.filter(layer=1)["decision"], decision, atol=1e-3 * np.abs(decision).max())
    assert scores.filter(layer=1)["in_training"].sum() == 24


def test_groups_of_new_texts_widen_the_intervals(two: Path, tmp_path: Path, tiny_model: Path, run_kdb: RunKdb) -> None:
    rows = [f"Day {i}: hail in {town}{'!' * (i % 2)},{i % 2},{town}" for town in ("Ulm", "Bonn") for i in range(8)]
    (tmp_path / "new.csv").write_text("\n".join(["text,label,town", *rows]))
    args = ("--model", tiny_model, "--to", tmp_path / "new.csv", "--layer", "0", "--site", "ffn_norm", "--wide")
    alone, _ = scored(run_kdb, two, tmp_path / "s.parquet", *args)
    grouped, texts = scored(run_kdb, two, tmp_path / "s.parquet", *args, "--group-by", "town")
    labels, decision = texts["label"].to_numpy(), texts["decision"].to_numpy()
    _, low, high = auc_interval(labels, decision, np.repeat([0, 1], 8))
    assert shown("auc", low, 16) in grouped.stdout.split()
    assert shown("auc", high, 16) in grouped.stdout.split()
    assert alone.stdout != grouped.stdout


def test_new_texts_may_have_names_of_classes(two: Path, tmp_path: Path, tiny_model: Path, run_kdb: RunKdb) -> None:
    rows = [f"Day {i} of {'hail' if i % 2 else 'sun'}\t{'bad' if i % 2 else 'good'}" for i in range(8)]
    (tmp_path / "new.tsv").write_text("\n".join(["Text\tLabel", *rows]))
    args = ("--model", tiny_model, "--to", tmp_path / "new.tsv", "--layer", "0", "--site", "ffn_norm")
    _, texts = scored(run_kdb, two, tmp_path / "s.parquet", *args, "--positive", "good")
    assert texts["label"].to_list() == [1, 0] * 4
    refused = run_kdb("transfer", *args, "--dataset", "weather", "--positive", "goud", "--warehouse", two)
    assert refusal(refused).startswith("Unknown class 'goud'. Did you mean 'good'?")


@pytest.mark.parametrize(
    ("text", "args", "said"),
    [
        ("text,label\nA!,1\n", ("--dataset", "whether"), "No stored probe of tiny on whether"),
        ("text,label\nA!,1\n", ("--dataset", "weather", "--layer", "7"), "has the layer 7. Stored: 0 to 1"),
        ("text,label\nA!,1\n", ("--dataset", "weather", "--split", "grouped"), "has the split 'grouped'"),
        ("text,label\nA!,1\n", ("--dataset", "weather", "--dataset", "winter"), "exactly one --dataset"),
        ("text,label\nA!,1\n", ("--dataset", "weather", "-o", "x.npz"), "ends in .csv, .json, .parquet"),
        ("text,label\nA!,1\n", ("--dataset", "weather", "--group-by", "town"), "expected one column 'town'"),
        ("text,label\nA!,perhaps\n", ("--dataset", "weather"), "new.csv, line 2: expected label 0, 1, true"),
        ("text,label\n", ("--dataset", "weather"), "expected at least one text below, found none"),
        ("", ("--dataset", "weather"), "expected a column 'text', found no columns"),
        ("prompt,answer\nA,B\n", ("--dataset", "weather"), "expected a column 'text', found 'prompt', 'answer'"),
        (f"text\n{'A' * 200}\n", ("--dataset", "weather"), "tiny reads at most 128"),
    ],
)
def test_new_texts_that_cannot_be_scored_are_one_message(
    two: Path, tmp_path: Path, tiny_model: Path, run_kdb: RunKdb, text: str, args: tuple[str, ...], said: str
) -> None:
    (tmp_path / "new.csv").write_text(text)
    given = ("transfer", "--model", tiny_model, "--to", tmp_path / "new.csv", *args, "--warehouse", two)
    assert said in refusal(run_kdb(*given))


def test_new_texts_are_not_read_by_another_model(
    two: Path, tmp_path: Path, user_dataset: Path, run_kdb: RunKdb
) -> None:
    other = make_tiny_model(tmp_path / "tiny")
    config = (other / "config.json").read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0')
    (other / "config.json").write_text(config)
    given = ("--dataset", "weather", "--to", user_dataset, "--warehouse", two)
    assert "the given model is another one" in refusal(run_kdb("transfer", "--model", other, *given))
    assert "a folder or a .gguf file works too" in refusal(run_kdb("transfer", "--model", "tiny", *given))


def test_a_model_that_cannot_be_loaded_scores_nothing(
    two: Path, tmp_path: Path, tiny_model: Path, user_dataset: Path, run_kdb: RunKdb
) -> None:
    given = ("transfer", "--model", tiny_model, "--dataset", "weather", "--to", user_dataset, "--warehouse", two)
    assert "no device 'cuda:99'" in refusal(run_kdb(*given, "--device", "cuda:99", "-o", tmp_path / "s.csv"))
    assert not (tmp_path / "s.csv").exists()


def test_options_of_new_texts_are_refused_without_new_texts(two: Path, run_kdb: RunKdb) -> None:
    result = run_kdb("transfer", "--model", "tiny", "--layer", "1", "--group-by", "town", "--warehouse", two)
    assert "--layer, --group-by: only with --to" in refusal(result)


# What is refused -------------------------------------------------------------------------------------------------


def test_a_probe_is_not_applied_to_another_model(
    two: Path, tmp_path: Path, tiny_model: Path, user_dataset: Path, run_kdb: RunKdb
) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "w"))
    other = make_tiny_model(tmp_path / "tiny")
    config = (other / "config.json").read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0')
    (other / "config.json").write_text(config)
    arguments = ("--model", other, "--dataset", user_dataset, "--dataset-name", "else", "--warehouse", folder)
    assert run_kdb("ingest", *arguments).exit_code == 0
    storage = kdb.open(folder).storage
    runs = {run.dataset: run for run in storage.run_folders() if (run.path / "probe_weights").exists()}
    with pytest.raises(WarehouseError, match="differ in revision"):
        transfer(storage, probed=[runs["weather"]], measured=runs["else"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("transfer", "--model", "tinny"), "No stored hidden states of model 'tinny', variant 'default'"),
        (("transfer", "--model", "tiny", "--dataset", "whether"), "Did you mean 'weather'"),
        (
            ("direction", "--model", "tiny", "--dataset", "weather", "--layer", "9", "-o", "x.npz"),
            "has the layer 9",
        ),
        (("direction", "--model", "tiny", "--dataset", "weather", "--layer", "0", "-o", "x.csv"), "ends in .npz"),
    ],
)
def test_what_is_not_stored_is_one_message(two: Path, run_kdb: RunKdb, arguments: tuple[str, ...], said: str) -> None:
    assert said in refusal(run_kdb(*arguments, "--warehouse", two))
