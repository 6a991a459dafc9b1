"""Sizes: read with their unit, written in the largest binary one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.common.units import format_budget, format_duration, format_size, parse_size, suggest_number
from requant.errors import UsageError


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4096", 4096),
        ("1B", 1),
        ("12GiB", 12 * 2**30),
        ("800MB", 800 * 10**6),
        (" 1.5 gib ", 3 * 2**29),
        ("2KiB", 2048),
        ("2kb", 2000),
        ("0.5TiB", 2**39),
        ("1.9B", 1),
    ],
)
def test_a_size_is_read_with_its_unit(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "12G", "12 G", "1e9", "1,5GiB", "1.GiB", ".5GiB", "12GiBx", "nan", "inf"]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"is not a size; .*\(12GiB\)"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0.1B", "0GiB", "4194304TiB", "9" * 25])
def test_sizes_that_cannot_be_are_refused(text):
    with pytest.raises(UsageError, match="out of range"):
        parse_size(text)


def test_a_size_beyond_all_numbers_is_refused():
    with pytest.raises(UsageError, match="out of range"):
        parse_size("9" * 400 + "GiB")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1.5 * 2**30, "1.50 GiB"),
        (-(2**20), "-1.00 MiB"),
        (5 * 2**50, "5120.00 TiB"),
    ],
)
def test_a_size_is_written_in_the_largest_unit_that_leaves_one(n_bytes, text):
    assert format_size(n_bytes) == text


@given(st.integers(1, 2**61))
def test_what_is_written_is_read_back_within_its_two_decimals(n_bytes):
    assert parse_size(format_size(n_bytes)) == pytest.approx(n_bytes, rel=0.005, abs=1 + 0.005 * n_bytes)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (3600, "1 h 0 min"), (12_034, "3 h 20 min")],
)
def test_a_duration_is_said_in_two_units_at_most(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "meant"), [("12G", "12GiB or 12GB"), ("1,5 g", "1.5GiB or 1.5GB"), ("800megs", "800MiB or 800MB")]
)
def test_what_is_like_a_size_names_the_sizes_that_may_be_meant(text, meant):
    with pytest.raises(UsageError, match=f"did you mean {meant}[?] write a number"):
        parse_size(text)


def test_what_is_like_no_size_names_none():
    with pytest.raises(UsageError, match="is not a size; write a number"):
        parse_size("much")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (6_000_000, "5.72 MiB (6 MB)"),
        (12 * 10**9, "11.18 GiB (12 GB)"),
        (6_250_000, "5.96 MiB (6.25 MB)"),
        (3 * 10**12, "2.73 TiB (3 TB)"),
        (12 * 2**30, "12.00 GiB"),
        (1536 * 2**20, "1.50 GiB"),
        (6_000_001, "5.72 MiB"),
        (999, "999 B"),
    ],
)
def test_a_budget_in_powers_of_ten_is_shown_as_it_was_given(n_bytes, text):
    assert format_budget(n_bytes) == text


@pytest.mark.parametrize(
    ("text", "whole", "hint"),
    [
        ("4,5", False, "did you mean 4.5?"),
        ("16,384", True, "did you mean 16384?"),
        ("16.384", True, "did you mean 16384?"),
        ("1'000'000", True, "did you mean 1000000?"),
        ("16k", True, "did you mean 16384?"),
        ("4,5", True, ""),
        ("16k", False, ""),
        ("x", True, ""),
    ],
)
def test_a_number_written_otherwise_is_suggested(text, whole, hint):
    assert suggest_number(text, whole=whole) == hint
