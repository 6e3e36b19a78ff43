"""Numbers on a terminal: as many digits as mean something, and never a claim that the number does not make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdb.numbers import is_symmetric, shown, with_interval

KINDS = ("accuracy", "accuracy_low", "depth_percent", "logp", "head_score", "seconds")
COUNTS = st.none() | st.integers(1, 10**6)
NUMBERS = st.floats(-1e18, 1e18) | st.floats(-1.5, 1.5) | st.floats(-1e-4, 1e-4)


def unit(text: str) -> float:
    """The unit of the last digit of a number."""
    digits, _, exponent = text.partition("e")
    return float(f"1e{int(exponent or 0) - len(digits.partition('.')[2])}")


@pytest.mark.parametrize(
    ("name", "value", "n", "text"),
    [
        ("depth_percent", 61.1111, None, "61.1"),
        ("depth %", 100.0, None, "100.0"),
        ("depth_percent", 99.96, None, "99.96"),
        ("share_percent", 0.0345, None, "0.03"),
        ("accuracy", 0.94117, 48, "0.94"),
        ("accuracy", 0.94117, 100, "0.94"),
        ("accuracy", 0.94117, 120, "0.941"),
        ("accuracy", 0.94117, None, "0.941"),
        ("accuracy", 1.0, 48, "1.00"),
        ("accuracy", 0.9996, 2500, "0.9996"),
        ("best_accuracy", 0.0, 48, "0.00"),
        ("accuracy_at_25_percent", 0.94117, 48, "0.94"),
        ("auc", 0.9983, 48, "0.998"),
        ("variation_rate", 1.10004, None, "1.1"),
        ("logp", -0.57944, None, "-0.579"),
        ("logp", -2.0, None, "-2.00"),
        ("head_score", 12.3456, None, "12.3"),
        ("value", 1.6e-6, None, "1.6e-06"),
        ("value", -0.0, None, "0"),
        ("seconds", 132.5, None, "132.5"),
        ("seconds", 98765.4, None, "98765"),
        ("seconds", 2.0, None, "2"),
        ("size", 1e20, None, "1.000e+20"),
        ("size", float("nan"), None, "nan"),
    ],
)
def test_a_number_has_the_digits_of_its_kind(name: str, value: float, n: int | None, text: str) -> None:
    assert shown(name, value, n) == text


@given(st.sampled_from(KINDS), NUMBERS, COUNTS)
def test_the_text_is_the_number_up_to_half_a_unit_of_its_last_digit(name: str, value: float, n: int | None) -> None:
    text = shown(name, value, n)
    assert abs(float(text) - value) <= 0.5 * unit(text) * (1 + 1e-9)


@given(st.sampled_from(KINDS), NUMBERS, NUMBERS, COUNTS)
def test_rounding_keeps_the_order(name: str, a: float, b: float, n: int | None) -> None:
    low, high = sorted((a, b))
    assert float(shown(name, low, n)) <= float(shown(name, high, n))


@given(st.integers(1, 10**5), st.data())
def test_no_count_of_prompts_reads_as_none_or_all_of_them(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    assert (float(shown("accuracy", k / n, n)) == 1) == (k == n)
    assert (float(shown("accuracy", k / n, n)) == 0) == (k == 0)
    assert (float(shown("kept_percent", 100 * k / n, n)) == 100) == (k == n)


@given(st.integers(1, 10**5), st.floats(0.01, 0.99))
def test_an_accuracy_has_two_or_three_decimals(n: int, value: float) -> None:
    assert len(shown("accuracy", value, n).partition(".")[2]) == (2 if n <= 100 else 3)


@pytest.mark.parametrize(
    ("name", "interval", "n", "text"),
    [
        ("accuracy", (0.94117, 0.9, 0.97), 120, "0.941 [0.90, 0.97]"),
        ("accuracy", (0.94117, 0.936, 0.946), 10_000, "0.941 [0.936, 0.946]"),
        ("accuracy", (0.979, 0.891, 0.9963), 48, "0.98 [0.89, 0.996]"),
        ("accuracy", (0.5, 0.5, 0.5), 48, "0.50 [0.50, 0.50]"),
        ("gain", (1.234, 0.04, 2.1), None, "1.23 [0.04, 2.1]"),
        ("score", (1.6e-6, 1e-6, 2e-6), None, "1.6e-06 [1e-06, 2e-06]"),
    ],
)
def test_an_interval_stands_beside_its_number(
    name: str, interval: tuple[float, float, float], n: int | None, text: str
) -> None:
    assert with_interval(name, *interval, n) == text


def test_half_the_width_says_a_symmetric_interval() -> None:
    assert is_symmetric(0.941, 0.911, 0.971)
    assert not is_symmetric(0.941, 0.90, 0.97)
    assert with_interval("accuracy", 0.9412, 0.9112, 0.9712, 120, symmetric=True) == "0.941 ± 0.03"
    assert with_interval("score", 1.6e-6, 1.4e-6, 1.8e-6, symmetric=True) == "1.6e-06 ± 2e-07"


@given(st.floats(-10, 10), st.floats(1e-6, 10), st.floats(1e-6, 10))
def test_an_end_reads_as_zero_only_if_it_is(value: float, below: float, above: float) -> None:
    low, high = value - below, value + above
    ends = with_interval("gain", value, low, high).partition("[")[2].rstrip("]").split(", ")
    for text, end in zip(ends, (low, high), strict=True):
        assert float(text) != 0 or abs(end) < 1e-6
