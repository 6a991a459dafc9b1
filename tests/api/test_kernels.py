"""Kernels that are compiled in processes of their own."""

from __future__ import annotations

import sys

import pytest

from requant.api import compile_kernels, kernels
from requant.api.compile_kernels import compile_apart
from requant.api.kernels import Purpose
from requant.formats import by_name

FORMATS = [by_name(name) for name in ("Q4_0", "Q8_0", "Q4_K", "IQ3_S")]


def test_types_with_one_search_are_compiled_by_one_process():
    assert compile_kernels._group_by_search(FORMATS) == [["Q4_0", "Q8_0"], ["Q4_K"], ["IQ3_S"]]


@pytest.mark.parametrize("threads", [1, 2])
def test_processes_tell_when_types_are_done(threads):
    steps = []
    with compile_apart(FORMATS, Purpose.DECODE, threads=threads) as wait:
        wait(steps.append)
    assert sorted(steps) == [1, 1, 2]


def test_what_compensation_needs_is_loaded_before_it_begins():
    kernels.load_kernels(FORMATS[:1], Purpose.SEARCH)
    assert kernels._load_cached(FORMATS[:1], Purpose.SEARCH) == []


@pytest.mark.parametrize("python", ["/nonexistent/python", "/bin/false"])
def test_processes_that_cannot_be_started_or_end_are_not_waited_for(monkeypatch, python):
    monkeypatch.setattr(sys, "executable", python)
    steps = []
    with compile_apart(FORMATS, Purpose.DECODE) as wait:
        wait(steps.append)
    assert steps == []


def test_an_interruption_ends_the_processes(monkeypatch):
    started, start = [], compile_kernels._start_worker
    monkeypatch.setattr(compile_kernels, "_start_worker", lambda use: started.append(start(use)) or started[-1])
    with pytest.raises(KeyboardInterrupt), compile_apart(FORMATS, Purpose.DECODE, threads=2):
        raise KeyboardInterrupt
    assert len(started) == 2 and all(worker.poll() is not None for worker in started)
