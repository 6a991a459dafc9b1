"""Preparation of kernels: what a command needs is compiled before its work begins, or while the model is run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from requant.common.address_space import check_address_space
from requant.common.interrupt import run_interruptible
from requant.common.monitor import Monitor

if TYPE_CHECKING:
    from requant.formats import BlockFormat


class Purpose(StrEnum):
    """Purposes of kernels; each has the kernels of those above it. SEARCH is encoding with `--compensate=best`."""

    DECODE = "decode"
    ENCODE = "encode"
    COMPENSATE = "compensate"
    SEARCH = "search"


_COMPILING = "compiling the block kernels, once; this takes up to half a minute"


def prepare_kernels(
    monitor: Monitor,
    formats: Iterable[BlockFormat | None],
    purpose: Purpose = Purpose.ENCODE,
    *,
    threads: int | None = None,
) -> None:
    """Load the kernels of `formats`, and log it if they must be compiled."""
    from requant.api.compile_kernels import compile_apart

    missing = _load_known(formats, purpose)
    if not missing:
        return
    monitor.info(_COMPILING)
    with (
        monitor.progress("compiling", len(missing), " types") as advance,
        compile_apart(missing, purpose, threads=threads) as wait,
    ):
        run_interruptible(wait, progress=advance)
        run_interruptible(load_kernels, missing, purpose)


@contextmanager
def prepare_meanwhile(
    monitor: Monitor,
    formats: Iterable[BlockFormat | None],
    purpose: Purpose = Purpose.ENCODE,
    *,
    threads: int | None = None,
) -> Iterator[Callable[[], None]]:
    """Begin to compile what is missing of the kernels of `formats`, and yield a function that waits until all is ready.

    Log it if they must be compiled.
    """
    from requant.api.compile_kernels import compile_apart

    missing = _load_known(formats, purpose)
    if missing:
        monitor.info(_COMPILING)
    with compile_apart(missing, purpose, threads=threads) as wait:

        def finish() -> None:
            wait(lambda _: None)
            load_kernels(missing, purpose)

        yield finish


def _load_known(formats: Iterable[BlockFormat | None], purpose: Purpose) -> list[BlockFormat]:
    """Load the kernels that the cache has, and return the formats of which it lacks some."""
    check_address_space()
    return run_interruptible(_load_cached, [f for f in formats if f is not None and f.can_decode], purpose)


def _load_cached(formats: Sequence[BlockFormat], purpose: Purpose) -> list[BlockFormat]:
    from numba.core.event import Listener, install_listener

    own = threading.get_ident()

    class Refuser(Listener):  # Numba needs a class; loading from its cache is no compile event
        def on_start(self, event: Any) -> None:
            if threading.get_ident() == own:  # another thread may compile its own
                raise _NotCached

        def on_end(self, event: Any) -> None:
            pass

    missing = []
    with install_listener("numba:compile", Refuser()):
        for fmt in formats:
            try:
                load_kernels([fmt], purpose)
            except _NotCached:
                missing.append(fmt)
    return missing


def load_kernels(formats: Sequence[BlockFormat], purpose: Purpose) -> None:
    """Load the kernels of `formats` from the cache, or compile them."""
    from requant.formats import codec, feedback

    codec.warm_up(formats, encode=purpose is not Purpose.DECODE)
    if purpose in {Purpose.COMPENSATE, Purpose.SEARCH}:
        feedback.warm_up(formats, search=purpose is Purpose.SEARCH)


class _NotCached(Exception):
    """Raised where a kernel would have to be compiled."""
