"""Work in a thread of its own, so that whoever waits for it hears signals (Ctrl-C) even inside long C code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_TICK = 0.1  # seconds after which the waiting thread looks for signals again


class Abandoned(BaseException):
    """Nobody waits for this work any more."""


def run_interruptible(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns or raises, done in another thread.

    Only for work that leaves nothing behind: after a signal it is not waited for. A `progress` among its arguments is
    called in the thread that waits; work that has one ends when it next calls it.
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

    threading.Thread(target=run, daemon=True).start()
    try:
        while (n := _next(steps)) is not None:
            progress(n)
    except BaseException:
        abandoned.set()
        raise
    return future.result()


def _next(steps: SimpleQueue[int | None]) -> int | None:
    while True:
        try:
            return steps.get(timeout=_TICK)
        except Empty:
            continue
