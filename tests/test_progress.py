"""Long work shows what it does: a line that moves on a terminal, and lines in a log."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from kdb.ingest import progress as shown_progress
from kdb.ingest.progress import Progress, phase, progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    """Standard error as a terminal. pytest sets it for each test anew, so a fixture could not replace it."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(Terminal()) as stream:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "80")
        yield stream


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_log_gets_a_line_for_each_phase_at_its_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with phase("Loading tiny"):
        assert caplog.messages == ["Loading tiny"]
        with progress("Attributing", 12, "prompts", done=2):
            assert caplog.messages[1:] == ["Attributing: 10 prompts"]
    assert len(caplog.messages) == 2


def test_a_log_gets_lines_from_a_phase_that_does_not_advance(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shown_progress, "LOG_EVERY", 0.01)
    with phase("Loading tiny"):
        wait_until(lambda: len(caplog.messages) > 2)
    assert caplog.messages[1] == "Loading tiny: 0 s"


def test_the_line_on_a_terminal_moves_without_any_progress() -> None:
    with terminal() as shown, phase("Loading tiny"):
        wait_until(lambda: shown.getvalue().count("Loading tiny") > 3)
    assert shown.getvalue().endswith("\x1b[2K")


def test_lines_are_removed_from_a_terminal_and_messages_stay() -> None:
    with terminal() as shown:
        with phase("Preparing"), progress("Attributing", 12, "prompts") as counter:
            print("a message", file=sys.stderr)
            counter.advance(3)
            wait_until(lambda: "3 of 12 prompts" in shown.getvalue())
        assert "a message\n" in shown.getvalue()
        assert shown.getvalue().endswith("\x1b[2K")  # the line is cleared
        assert shown_progress._displays == []


def test_a_failure_in_a_phase_leaves_no_display() -> None:
    with terminal() as shown:
        with pytest.raises(ZeroDivisionError), phase("Preparing"), phase("Loading"):
            _ = 1 / 0
        with phase("Fitting"):
            wait_until(lambda: "Fitting" in shown.getvalue())


def test_a_name_cannot_write_markup_or_escape_sequences_to_a_terminal() -> None:
    with terminal() as shown, phase("Loading [red]a\x1b[31mb"):
        wait_until(lambda: "[red]a\\u001b[31mb" in shown.getvalue())
    assert "a\x1b[31mb" not in shown.getvalue()


def test_the_remaining_time_is_that_of_work_done_now(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(shown_progress.time, "monotonic", lambda: now[0])
    shown = Progress("Attributing", 12, "prompts", done=6)
    assert str(shown) == "6 of 12 prompts, 0 s"
    now[0] += 30
    shown.advance(3)
    assert str(shown) == "9 of 12 prompts, 10.0 s each, 30 s left"
    shown.advance(3)
    assert str(shown) == "12 of 12 prompts, 5.0 s each, 0 s left"


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_has_a_line_that_moves_if_it_can_draw_one(monkeypatch: pytest.MonkeyPatch, widgets: bool) -> None:
    assert not shown_progress._in_notebook()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object() if widgets else None)
    assert shown_progress._in_notebook() is widgets
