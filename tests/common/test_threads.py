"""Results in order, errors in order, and nothing left running."""

import threading
import time
from contextlib import closing

import pytest

from requant.common.threads import in_order, n_threads


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_results_come_in_the_order_of_the_items(threads):
    def late(i):
        time.sleep(0.001 * (i % 5))
        return i

    assert list(in_order(late, range(50), threads)) == list(range(50))


def test_few_items_are_taken_ahead_of_the_results():
    taken = []
    results = in_order(lambda i: i, (taken.append(i) or i for i in range(100)), 2)
    for i in range(20):
        assert next(results) == i
        assert len(taken) <= i + 1 + 2 + 2
    results.close()
    assert len(taken) < 30


def test_the_first_error_in_order_is_raised_whichever_came_first():
    def work(i):
        if i == 3:
            time.sleep(0.05)
        if i >= 3:
            raise ValueError(i)
        return i

    with pytest.raises(ValueError, match="3"):
        list(in_order(work, range(20), 4))


def test_leaving_early_begins_nothing_more_and_waits_for_what_runs():
    ran, before = [], threading.active_count()

    def work(i):
        time.sleep(0.02)
        ran.append(i)
        return i

    with pytest.raises(KeyboardInterrupt), closing(in_order(work, range(1000), 2)) as results:
        next(results)
        raise KeyboardInterrupt
    assert threading.active_count() == before
    n = len(ran)
    time.sleep(0.05)
    assert len(ran) == n < 10


def test_there_is_always_a_thread():
    assert n_threads(None) >= 1 <= n_threads(0)
    assert n_threads(3) == 3
