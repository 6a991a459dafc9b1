"""Columns: what stands under each other does so on a terminal, whatever the names are made of."""

from hypothesis import given
from hypothesis import strategies as st

from requant.errors import brief
from requant.report.grid import GAP, columns, grid


def test_wide_characters_take_two_columns_and_marks_none():
    assert [columns(text) for text in ("abc", "\u6a21\u578b", "e\u0301", "\uff21")] == [3, 4, 1, 2]


@given(st.lists(st.tuples(st.text().map(brief), st.integers(0, 9999).map(str)), min_size=1))
def test_every_row_is_a_line_and_its_cells_stand_under_each_other(rows):
    lines = grid([("name", "size"), *rows], right=(1,))
    assert len(lines) == 1 + len(rows)
    assert len({columns(line) for line in lines}) == 1
    for (name, size), line in zip(rows, lines[1:], strict=True):
        assert line.startswith(name) and line.endswith(" " + size) and GAP in line
