"""Probes applied to other datasets, and their directions outside of kdb."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from helpers.command_line import refusal
from helpers.stored import assert_same_in_the_shell, needs_shell
from helpers.tiny_llama import make_tiny_model, weather
from sklearn.metrics import roc_auc_score

import kdb
from kdb.errors import QueryError, WarehouseError
from kdb.ingest.concept.transfer import transfer
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


def vectors(wh: Warehouse, dataset: str, layer: int) -> np.ndarray:
    query = "SELECT vector FROM activations WHERE dataset = ? AND layer = ? AND site = 'resid_post' ORDER BY prompt_id"
    return np.stack(wh.sql(query, [dataset, layer])["vector"].to_list())


def test_a_transfer_is_the_stored_direction_applied_to_the_prompts_that_it_has_not_seen(opened: Warehouse) -> None:
    direction = opened.direction(model="tiny", dataset="weather", layer=1)
    test = "SELECT prompt_id FROM current.probe_predictions WHERE dataset = 'weather' AND layer = 1"
    trained = sorted(set(range(40)) - set(opened.sql(f"{test} AND site = 'resid_post'")["prompt_id"]))
    texts = dict(opened.sql("SELECT prompt_id, text FROM prompts WHERE dataset = 'weather'").rows())
    winter = opened.sql("SELECT prompt_id, text, label FROM prompts WHERE dataset = 'winter' ORDER BY 1").rows()
    unseen = [i for i, text, _ in winter if text not in {texts[t] for t in trained}]
    assert 30 <= len(unseen) < 40
    labels = np.array([winter[i][2] for i in unseen])
    decision = direction.decision(vectors(opened, "winter", 1)[unseen])
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


def test_a_direction_of_another_width_is_refused(opened: Warehouse) -> None:
    with pytest.raises(QueryError, match="has 16 entries, but the hidden states have 3"):
        opened.direction(model="tiny", dataset="weather", layer=0).decision(np.zeros((2, 3)))


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
            "No stored direction",
        ),
        (("direction", "--model", "tiny", "--dataset", "weather", "--layer", "0", "-o", "x.csv"), "ends in .npz"),
    ],
)
def test_what_is_not_stored_is_one_message(two: Path, run_kdb: RunKdb, arguments: tuple[str, ...], said: str) -> None:
    assert said in refusal(run_kdb(*arguments, "--warehouse", two))
