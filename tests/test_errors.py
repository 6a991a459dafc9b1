"""Errors: one line with figures and a hint, an exit code each, and nothing that a terminal could act on."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant import errors
from requant.errors import BadInput, InfeasibleBudget, NumericFault, RequantError, UsageError, printable

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
        ({"got": 0, "limit": 4, "hint": "get it again"}, "m.gguf: is short (got 0, limit 4); get it again"),
    ],
    ids=str,
)
def test_the_message_gives_what_is_known(figures, message):
    error = BadInput("m.gguf", "is short", **figures)
    assert str(error) == message
    assert (error.path, error.what, error.got) == ("m.gguf", "is short", figures.get("got"))


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
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m", r"\x1b[31m"),
        ("a\nb", r"a\nb"),
        ("\u202egpj", r"\u202egpj"),
        ("\udcff", r"\udcff"),
        ("\x85", r"\x85"),
    ],
)
def test_what_a_terminal_could_act_on_is_escaped(text, shown):
    assert printable(text) == shown
    assert str(BadInput(f"{text}.gguf", "x")) == f"{shown}.gguf: x"
