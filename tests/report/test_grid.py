"""Columns, and what is left of them where there is little room."""

from requant.report.text.grid import fit_grid, grid, label_lines

ROWS = [["size", "gap", "cache", "speed"], ["12 GiB", "0 %", "f16/f16", "10.0"]]


def test_a_grid_that_fits_has_all_its_columns():
    assert fit_grid(ROWS, 40, right=(3,), spare=(2, 1)) == grid(ROWS, right=(3,))


def test_columns_go_one_after_the_other_until_the_grid_fits():
    assert fit_grid(ROWS, 24, right=(3,), spare=(2, 1)) == ["size    gap  speed", "12 GiB  0 %   10.0"]
    assert fit_grid(ROWS, 14, right=(3,), spare=(2, 1)) == ["size    speed", "12 GiB   10.0"]


def test_what_cannot_be_spared_stays_whatever_the_width():
    assert fit_grid(ROWS, 1, right=(), spare=(2, 1)) == ["size    speed", "12 GiB  10.0"]


def test_a_label_is_not_said_twice_and_lines_are_wrapped():
    found = label_lines([("note", "a b c"), ("note", "d"), ("size", "word " * 10)], 32)
    assert found[:2] == ["note        a b c", "            d"]
    assert found[2].startswith("size        word") and all(len(line) <= 32 for line in found)
