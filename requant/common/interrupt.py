"""Interruptible work: run in another thread, so that the caller's hears signals (Ctrl-C) even during long C code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_TICK = 0.1  # seconds between two checks of the waiting thread for signals


class Abandoned(BaseException):
    """Raised in work that nobody waits for any more."""


def run_interruptible(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in another thread, and return or raise what it does.

    Only for work without side effects: after a signal it is not waited for. A `progress` among its arguments is called
    in the waiting thread; abandoned work ends at its next call of it.
    """
    future: Future[T] = Future()
    steps: SimpleQueue[int | None] = SimpleQueue()
    abandoned = threading.Event()
    progress: Any = kwargs.get("progress")
    call: Callable[..., T] = partial(work, *args, **kwargs)

    def relay(n: int) -> None:
        if abandoned.is_set():
            raise Abandoned
        steps.put(n)

    def run() -> None:
        try:
            future.set_result(call() if progress is None else call(progress=relay))
        except BaseException as error:  # noqa: BLE001, it is raised again below
            future.set_exception(error)
        finally:
            steps.put(None)

    threading.Thread(target=copy_context().run, args=(run,), daemon=True).start()
    try:
        while (n := _wait_for_step(steps)) is not None:
            progress(n)
    except BaseException:
        abandoned.set()
        raise
    return future.result()


def _wait_for_step(steps: SimpleQueue[int | None]) -> int | None:
    while True:
        try:
            return steps.get(timeout=_TICK)
        except Empty:
            continue
