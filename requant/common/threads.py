"""Work on a pool of threads, with the results in the order of the items and few of them held at a time."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # items beyond one per thread that may be queued or done, so that nobody waits for a slow neighbour
_TICK = 0.1  # seconds after which the main thread looks for signals again


def n_threads(asked: int | None) -> int:
    """The number of threads for `asked`; None means one per processor."""
    return max(1, asked or os.cpu_count() or 1)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result, None, None]:
    """`work` of every item, in their order; the first error in that order is raised, whichever came first in time.

    Close the generator (contextlib.closing) where it may be left early: nothing more is begun then, and what runs is
    waited for.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            if len(waiting) >= threads + _AHEAD:
                yield _awaited(waiting.popleft())
            waiting.append(pool.submit(work, item))
        while waiting:
            yield _awaited(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _awaited(future: Future[Result]) -> Result:
    while not wait([future], timeout=_TICK).done:
        pass
    return future.result()


@cache
def _blas() -> ThreadpoolController:
    """The BLAS that NumPy uses; looking for it takes milliseconds."""
    from threadpoolctl import ThreadpoolController  # here: most commands need no BLAS

    return ThreadpoolController().select(user_api="blas")


class _Held:
    """How many runs hold BLAS at one thread; the last to leave gives it back what it had."""

    lock = threading.Lock()
    n = 0
    limiter: Any = None


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    with _Held.lock:
        if not _Held.n:
            _Held.limiter = _blas().limit(limits=1)
        _Held.n += 1
    try:
        yield
    finally:
        with _Held.lock:
            _Held.n -= 1
            if not _Held.n:
                _Held.limiter.restore_original_limits()


def for_each(work: Callable[[int], None], n: int, threads: int | None) -> None:
    """`work` of 0 to n - 1 in threads, as by `run_indexed`."""
    with closing(run_indexed(work, n, threads)) as results:
        for _ in results:
            pass


def run_indexed(work: Callable[[int], Result], n: int, threads: int | None) -> Generator[Result, None, None]:
    """`work` of 0 to n - 1 in threads, with BLAS in one each; what overflows is found by who looks at the results."""

    import numpy as np

    def quiet(index: int) -> Result:
        with np.errstate(over="ignore", invalid="ignore"):
            return work(index)

    with _one_blas_thread(), closing(in_order(quiet, range(n), n_threads(threads))) as results:
        yield from results
