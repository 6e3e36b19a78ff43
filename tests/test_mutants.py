"""The list of deliberate faults stays applicable: a mutant whose line has moved would be caught by nothing."""

from __future__ import annotations

from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).parents[1]


def test_every_mutant_changes_one_line_that_is_there() -> None:
    moved = [str(m) for m in MUTANTS if (ROOT / m.file).read_text().count(m.old) != 1]
    assert moved == []
    assert [str(m) for m in MUTANTS if m.new == m.old] == []


def test_every_mutant_names_tests_that_are_there() -> None:
    named = {word.partition("::")[0] for m in MUTANTS for word in m.tests.split() if word.startswith("tests/")}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
