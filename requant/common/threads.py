"""A pool of threads that returns results in the order of the items, and holds only a few of them at a time."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from contextvars import copy_context
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # items beyond one per thread that may be queued or done, so that no thread waits for a slow one
_TICK = 0.1  # seconds between two checks of the main thread for signals


def n_threads(threads: int | None) -> int:
    """The number of threads; for None one per processor."""
    return max(1, threads or os.cpu_count() or 1)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result, None, None]:
    """Yield `work` of every item, in their order; raise the first error in that order, whichever came first in time.

    Close the generator (contextlib.closing) where it may be left early: then no more items are begun, and running ones
    are waited for.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            if len(waiting) >= threads + _AHEAD:
                yield _wait_for(waiting.popleft())
            waiting.append(pool.submit(copy_context().run, work, item))
        while waiting:
            yield _wait_for(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _wait_for(future: Future[Result]) -> Result:
    while not wait([future], timeout=_TICK).done:
        pass
    return future.result()


@cache
def _find_blas() -> ThreadpoolController:
    """Find the BLAS that NumPy uses, which takes milliseconds."""
    from threadpoolctl import ThreadpoolController  # here: most commands need no BLAS

    return ThreadpoolController().select(user_api="blas")


class _BlasLimit:
    """The number of callers that limit BLAS to one thread; the last to leave restores its own limit."""

    lock = threading.Lock()
    n = 0
    limiter: Any = None


@contextmanager
def _limit_blas() -> Iterator[None]:
    with _BlasLimit.lock:
        if not _BlasLimit.n:
            _BlasLimit.limiter = _find_blas().limit(limits=1)
        _BlasLimit.n += 1
    try:
        yield
    finally:
        with _BlasLimit.lock:
            _BlasLimit.n -= 1
            if not _BlasLimit.n:
                _BlasLimit.limiter.restore_original_limits()


def for_each(work: Callable[[int], None], n: int, threads: int | None) -> None:
    """Run `work` for 0 to n - 1 in threads, as `run_indexed` does."""
    with closing(run_indexed(work, n, threads)) as results:
        for _ in results:
            pass


def run_indexed(work: Callable[[int], Result], n: int, threads: int | None) -> Generator[Result, None, None]:
    """Yield `work` of 0 to n - 1, in threads with one BLAS thread each; overflow is left to the caller to check."""
    import numpy as np

    def quiet(index: int) -> Result:
        with np.errstate(over="ignore", invalid="ignore"):
            return work(index)

    with _limit_blas(), closing(in_order(quiet, range(n), n_threads(threads))) as results:
        yield from results
