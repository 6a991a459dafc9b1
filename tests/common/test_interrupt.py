"""Interruptible work: results, errors, progress, and its end when nobody waits any more; the monitor."""

import logging
import threading
import warnings

import pytest

from requant.common.interrupt import Abandoned, run_interruptible
from requant.common.monitor import SILENT, Progress, report_to
from requant.errors import BadInput, RequantWarning


def test_results_and_errors_come_through():
    assert run_interruptible(lambda a, b=0: a + b, 1, b=2) == 3

    def fail():
        raise BadInput("f", "is broken")

    with pytest.raises(BadInput, match="is broken"):
        run_interruptible(fail)


def test_progress_is_called_in_order_in_the_thread_that_waits():
    seen = []

    def work(progress):
        for i in range(100):
            progress(i)
        return threading.current_thread()

    def step(n):
        seen.append((n, threading.current_thread()))

    assert run_interruptible(work, progress=step) is not threading.current_thread()
    assert seen == [(i, threading.current_thread()) for i in range(100)]


def test_work_that_nobody_waits_for_ends_at_its_next_step():
    ended = threading.Event()

    def work(progress):
        try:
            while True:
                progress(1)
        except Abandoned:
            ended.set()
            raise

    def step(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_interruptible(work, progress=step)
    assert ended.wait(60)


def test_a_callback_hears_of_the_beginning_and_of_every_step():
    seen = []
    with report_to(seen.append).progress("scoring", 3, " layers") as advance:
        advance(1)
        advance(2)
    assert seen == [Progress("scoring", n, 3, " layers") for n in (0, 1, 3)]
    assert report_to(None) is SILENT


def test_without_a_monitor_warnings_are_pythons_and_the_rest_is_logged(caplog):
    with pytest.warns(RequantWarning) as caught:
        SILENT.warn("one", "two")
    assert [str(w.message) for w in caught] == ["one", "two"]
    with caplog.at_level(logging.INFO, logger="requant"):
        SILENT.info("compiling %s")
    assert [r.getMessage() for r in caplog.records] == ["compiling %s"]
    with warnings.catch_warnings(), SILENT.progress("a", 1) as advance, SILENT.resumable():
        warnings.simplefilter("error")
        advance(1)
