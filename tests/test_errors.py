"""Errors: one line with figures and a hint, an exit code each, and nothing that a terminal could act on."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant import errors
from requant.errors import (
    BadInput,
    InfeasibleBudget,
    NumericFault,
    RequantError,
    UsageError,
    brief,
    printable,
    put_path_first,
)

CODES = {
    "RequantError": 1,
    "UsageError": 2,
    "BadInput": 3,
    "InfeasibleBudget": 4,
    "OutputRefused": 5,
    "InputOutputError": 6,
    "SourceChanged": 7,
    "NumericFault": 8,
}


def test_every_kind_of_failure_has_its_exit_code():
    found = {n: c.exit_code for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, RequantError)}
    assert found == CODES


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({}, "m.gguf: is short"),
        ({"got": 3}, "m.gguf: is short (got 3)"),
        ({"limit": 4}, "m.gguf: is short (limit 4)"),
        ({"got": "a", "expected": "b"}, "m.gguf: is short (got a, expected b)"),
        ({"got": 0, "limit": 4, "hint": "get it again"}, "m.gguf: is short (got 0, limit 4); get it again"),
    ],
    ids=str,
)
def test_the_message_gives_what_is_known(figures, message):
    error = BadInput("m.gguf", "is short", **figures)
    assert str(error) == message
    assert (error.path, error.what, error.got) == ("m.gguf", "is short", figures.get("got"))


def test_a_path_is_said_once():
    for path in ("r/m.gguf", "r/a\nb.gguf"):
        assert put_path_first(path, str(BadInput(path, "is empty"))) == str(BadInput(path, "is empty"))
        assert put_path_first(path, "out of memory") == f"{printable(path)}: out of memory"


def test_the_data_of_an_error_can_be_read():
    error = InfeasibleBudget(10, 20, "too small")
    assert (error.budget, error.smallest, str(error)) == (10, 20, "too small")
    assert isinstance(NumericFault("m", "x"), BadInput) and not isinstance(UsageError("x"), BadInput)


@given(st.text())
def test_a_printable_text_is_one_line_without_controls(text):
    shown = printable(text)
    assert shown.isprintable() and len(shown.splitlines()) <= 1
    assert not any(unicodedata.category(c).startswith("C") for c in shown)
    shown.encode()
    assert printable(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m", r"\x1b[31m"),
        ("a\nb", r"a\nb"),
        ("\u202egpj", r"\u202egpj"),
        ("\udcff", r"\udcff"),
        ("\x85", r"\x85"),
        ("a\u3164\u2800\ufe0fb", r"a\u3164\u2800\ufe0fb"),
        ("\u6a21\u578b \u05d0", "\u6a21\u578b \u05d0"),
    ],
)
def test_what_a_terminal_could_act_on_is_escaped(text, shown):
    assert printable(text) == shown
    assert str(BadInput(f"{text}.gguf", "x")) == f"{shown}.gguf: x"


@given(st.text(), st.integers(1, 90))
def test_what_stands_in_a_table_keeps_to_its_place(text, most):
    shown = brief(text, most)
    assert printable(shown) == shown == brief(shown, len(shown))
    assert "  " not in shown and shown == shown.strip()
    assert len(shown) <= 10 * most + 3
    assert not any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in shown)
    kinds = "".join("m" if unicodedata.category(c) in ("Mn", "Me") else "b" for c in shown)
    assert "mmm" not in kinds and not kinds.startswith("m")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("blk.0.attn_q.weight", "blk.0.attn_q.weight"),
        ("a  Q4_K  4 ", r"a\x20 Q4_K\x20 4\x20"),
        ("x" * 90, "x" * 80 + "..."),
        ("\x1b" * 90, r"\x1b" * 80 + "..."),
        ("e\u0301t\u00e9", "e\u0301t\u00e9"),
        ("\u0301e\u0301\u0301\u0301", r"\u0301" + "e\u0301\u0301" + r"\u0301"),
        ("\u05d0 12", r"\u05d0 12"),
    ],
)
def test_a_name_in_a_table_is_cut_and_moves_nothing(text, shown):
    assert brief(text) == shown


def test_a_message_is_one_line_whatever_it_was_made_of():
    assert str(UsageError("a\x1b[2J\nb")) == r"a\x1b[2J\nb"
    assert len(str(BadInput("m", "is odd", got="x" * 2**20))) < 2000
