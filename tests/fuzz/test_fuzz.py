"""Mutants of every kind of file, 40,000 a run and 200,000 in the slow tests: used or refused in one line.

Each within a limit of time and of memory.
"""

import os

import pytest

from fuzz.run import KINDS, mutant, numbers, run

MUTANTS, ALL, SEED = 40_000, 200_000, 1
HEAVY = {"shapes": 8, "architectures": 16}  # of a kind that is scored and converted, one mutant in so many


@pytest.mark.parametrize("mutants", [MUTANTS, pytest.param(ALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_mutant_escapes_as_anything_but_a_requant_error(tmp_path, kind, mutants):
    wanted = numbers(kind, mutants) // HEAVY.get(kind, 1)
    outcome = run(kind, SEED, range(wanted), tmp_path, compare=4)
    assert outcome.failures == [], f"{len(outcome.failures)}, written to {os.fspath(tmp_path)}"
    n = outcome.verdicts.total()
    assert n == wanted
    # the mutator is worth something only if files get through, and others do not
    assert 0.1 * n < outcome.verdicts[kind, "refused"] < 0.9 * n


def test_a_mutant_is_the_same_every_time():
    for kind in KINDS:
        first = [mutant(kind, SEED, index) for index in range(300)]
        assert [mutant(kind, SEED, index) for index in reversed(range(300))] == first[::-1]


def test_the_shares_of_the_kinds_make_up_all_mutants():
    assert sum(numbers(kind, MUTANTS) for kind in KINDS) == MUTANTS
    assert sum(numbers(kind, ALL) for kind in KINDS) == ALL
