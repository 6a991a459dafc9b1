"""Work on a pool of threads, with the results in the order of the items and few of them held at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

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
