"""Two axes of stored hidden states: what they are, and the runs that hold them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kdb.errors import WarehouseError
from kdb.ingest.concept import derived
from kdb.ingest.concept.derived import project, refit
from kdb.ingest.concept.projections import projector
from kdb.ingest.settings import Probing
from kdb.ingest.stages import Outcome
from kdb.warehouse.store import Warehouse

pytestmark = pytest.mark.slow


def states(n: int, hidden: int, seed: int) -> NDArray[np.float32]:
    """Like a residual stream: one dimension is large and far from zero."""
    X = np.random.default_rng(seed).standard_normal((n, hidden))
    X[:, 0] = 500 * (X[:, 0] + 5)
    return X.astype(np.float32)


# Principal components --------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(n=st.integers(4, 40), hidden=st.integers(3, 40), seed=st.integers(0, 2**16))
def test_the_components_are_those_of_the_singular_value_decomposition(n: int, hidden: int, seed: int) -> None:
    X = states(n, hidden, seed)
    found = projector("pca")(X)
    U, S, _ = np.linalg.svd(X.astype(np.float64) - X.mean(axis=0, dtype=np.float64), full_matrices=False)
    np.testing.assert_allclose(np.abs(found.axes), np.abs(U[:, :2] * S[:2]), rtol=1e-4, atol=1e-4 * S[1])
    np.testing.assert_allclose(found.explained, S[:2] ** 2 / np.sum(S**2), rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_explained_shares_are_shares_and_fall(seed: int) -> None:
    first, second = projector("pca")(states(30, 12, seed)).explained or (np.nan, np.nan)
    assert 0 <= second <= first <= first + second <= 1 + 1e-12


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_same_states_have_the_same_axes_and_signs(seed: int) -> None:
    X = states(30, 12, seed)
    np.testing.assert_array_equal(projector("pca")(X).axes, projector("pca")(X.copy()).axes)


def test_umap_repeats_itself_and_explains_no_variance() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    X = states(60, 12, 0)
    first, again = projector("umap")(X), projector("umap")(X)
    assert (first.axes.shape, first.explained) == ((60, 2), None)
    np.testing.assert_array_equal(first.axes, again.axes)


# Runs ------------------------------------------------------------------------------------------------------------

POINTS = "SELECT layer, site, method, prompt_id, pc1, pc2, explained1, explained2 FROM projections ORDER BY ALL"


def test_a_projection_is_a_run_of_its_own_that_names_its_source(warehouse: Path) -> None:
    opened = Warehouse(warehouse)
    (source,) = opened.storage.run_folders()
    outcome = project(opened.storage, source, ("pca",))
    (row,) = opened.sql("SELECT * FROM runs WHERE run <> ?", [source.run]).rows(named=True)
    assert (row["run"], row["source_run"], row["variant"]) == (outcome.run, source.run, "default")
    assert row["tables"] == ["datasets", "models", "projections", "runs"]
    assert (row["torch_version"], row["device"], json.loads(row["settings"])["projections"]) == (None, "cpu", ["pca"])
    assert project(opened.storage, source, ("pca",)) == Outcome(outcome.run, "exists")


def test_every_prompt_has_a_point_at_every_layer_and_site(warehouse: Path) -> None:
    opened = Warehouse(warehouse)
    (source,) = opened.storage.run_folders()
    project(opened.storage, source, ("pca",))
    text = "SELECT vector FROM activations WHERE layer = 1 AND site = 'ffn_norm' ORDER BY prompt_id"
    expected = projector("pca")(np.array(opened.sql(text)["vector"].to_list(), dtype=np.float32))
    points = opened.sql(POINTS).rows()
    assert len(points) == 160
    stored = [row for row in points if row[:3] == (1, "ffn_norm", "pca")]
    assert [row[3] for row in stored] == list(range(40))
    np.testing.assert_array_equal([row[4:6] for row in stored], expected.axes)
    assert {row[6:] for row in stored} == {expected.explained}


def test_an_interrupted_projection_goes_on_from_its_last_finished_layer(
    warehouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Warehouse(warehouse)
    (source,) = opened.storage.run_folders()
    read: list[Any] = []

    def interrupted(activations: Any, key: Any) -> Any:
        read.append(key)
        if len(read) == 3:
            raise KeyboardInterrupt
        return real(activations, key)

    real = derived.read_layer
    monkeypatch.setattr(derived, "read_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        project(opened.storage, source, ("pca",))
    assert project(opened.storage, source, ("pca",)).status == "committed"
    assert read == [(0, "resid_post"), (1, "resid_post"), *[(0, "ffn_norm")] * 2, (1, "ffn_norm")]
    assert opened.sql("SELECT count(*) FROM projections").item() == 160


def test_a_run_without_activations_cannot_be_projected(warehouse: Path) -> None:
    opened = Warehouse(warehouse)
    (source,) = opened.storage.run_folders()
    derived_run = opened.storage.find(refit(opened.storage, source, Probing(splits=2)).run)
    with pytest.raises(WarehouseError, match=f"Run {derived_run.run} has no activations to compute from"):
        project(opened.storage, derived_run, ("pca",))


# The command -----------------------------------------------------------------------------------------------------

COMMAND = ("project", "--model", "tiny", "--dataset", "weather", "--warehouse")


def test_the_command_projects_the_newest_run(warehouse: Path, run_kdb: Callable[..., Result]) -> None:
    result = run_kdb(*COMMAND, warehouse)
    assert (result.exit_code, "tiny on weather: stored" in result.stdout) == (0, True)
    assert Warehouse(warehouse).sql("SELECT count(*) FROM projections").item() == 160
    assert "is stored already" in run_kdb(*COMMAND, warehouse).stdout


def test_umap_where_it_is_not_installed_is_refused_before_anything_is_stored(
    warehouse: Path, run_kdb: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    result = run_kdb(*COMMAND, warehouse, "--method", "umap")
    assert result.exit_code == 2
    assert "--method umap needs umap-learn: `pip install 'kdb-lm[umap]'`." in result.stderr
    assert Warehouse(warehouse).storage.local.staging.unfinished_runs() == []


def test_umap_is_stored_beside_pca(warehouse: Path, run_kdb: Callable[..., Result]) -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    assert run_kdb(*COMMAND, warehouse).exit_code == 0
    assert run_kdb(*COMMAND, warehouse, "--method", "umap").exit_code == 0
    text = "SELECT method, count(*), count(explained1) FROM projections JOIN current_runs USING (run) "
    rows = Warehouse(warehouse).sql(f"{text} WHERE table_name = 'projections' GROUP BY ALL ORDER BY ALL").rows()
    assert rows == [("pca", 160, 160), ("umap", 160, 0)]
