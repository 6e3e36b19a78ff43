"""Estimates are corrected by the time that finished runs took on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kdb.ingest import speed
from kdb.ingest.cost import Cost
from kdb.ingest.speed import calibrated, learn

ESTIMATE = Cost("knowledge cpu float32", "a", 10, 100, 2, 1000, 1000, {"Loading": 4.0, "Attributing": 20.0})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(speed, "user_cache_path", lambda _: tmp_path / "cache")
    return tmp_path / "cache" / "speed.json"


def test_an_estimate_is_a_first_guess_until_a_run_has_ended() -> None:
    assert calibrated(ESTIMATE) == ESTIMATE
    assert "about 24 s (a first guess)" in str(ESTIMATE)


def test_the_ratio_of_a_phase_corrects_its_next_estimate() -> None:
    learn(ESTIMATE, {"Loading": 2.0, "Attributing": 50.0})
    assert calibrated(ESTIMATE).phases == {"Loading": 2.0, "Attributing": 50.0}
    later = calibrated(replace(ESTIMATE, phases={"Loading": 4.0, "Attributing": 40.0}))
    assert "about 102 s, at most" in str(later)
    assert "about 100 s, at most" in str(later.after("Loading"))


def test_a_model_that_was_never_measured_is_corrected_by_the_last_run_of_its_kind() -> None:
    learn(ESTIMATE, {"Attributing": 50.0})
    learn(replace(ESTIMATE, model="b"), {"Attributing": 80.0})
    assert calibrated(ESTIMATE).seconds == 54.0
    assert calibrated(replace(ESTIMATE, model="c")).seconds == 84.0
    assert not calibrated(replace(ESTIMATE, kind="concept cpu float32")).is_calibrated


def test_a_short_phase_corrects_nothing() -> None:
    learn(ESTIMATE, {"Loading": speed.SHORTEST / 2, "Attributing": speed.SHORTEST / 2})
    learn(replace(ESTIMATE, phases={"Attributing": 0.01}), {"Attributing": 20.0})
    assert not calibrated(ESTIMATE).is_calibrated


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "x"}', '{"a": null}', '{"a": NaN, "b": -1}'])
def test_a_damaged_cache_is_ignored_and_replaced(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert calibrated(ESTIMATE) == ESTIMATE
    learn(ESTIMATE, {"Attributing": 50.0})
    assert calibrated(ESTIMATE).seconds == 54.0


def test_a_cache_that_cannot_be_written_stops_no_run(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    learn(ESTIMATE, {"Attributing": 50.0})
    assert calibrated(ESTIMATE) == ESTIMATE
