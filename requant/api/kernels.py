"""Preparation of kernels: what a command needs is compiled before its work begins."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from requant.common.address_space import check_address_space
from requant.common.interrupt import Abandoned, run_interruptible
from requant.common.monitor import Advance, Monitor

if TYPE_CHECKING:
    from requant.formats import BlockFormat


def prepare_kernels(monitor: Monitor, formats: Iterable[BlockFormat | None], *, encode: bool = True) -> None:
    """Load the kernels of `formats`, without `encode` those that decode, and log it if they must be compiled."""
    check_address_space()
    from numba.core.event import Event, Listener, install_listener

    from requant.formats.codec import warm_up

    wanted = [fmt for fmt in formats if fmt is not None and fmt.can_decode]
    compiling = False

    def warm(progress: Advance) -> None:
        class Announcer(Listener):  # Numba needs a class; loading from its cache is no compile event
            def on_start(self, event: Event) -> None:
                nonlocal compiling
                if not compiling:
                    compiling = True
                    with suppress(Abandoned):  # a thread of another caller may be compiling
                        progress(0)

            def on_end(self, event: Event) -> None:
                pass

        with install_listener("numba:compile", Announcer()):
            for fmt in wanted:
                warm_up([fmt], encode=encode)
                progress(1)

    with ExitStack() as stack:
        ready, advance = 0, list[Advance]()

        def step(n: int) -> None:
            nonlocal ready
            ready += n
            if compiling and not advance:
                monitor.info("compiling the block kernels, once; this takes up to half a minute")
                advance.append(stack.enter_context(monitor.progress("compiling", len(wanted), " types")))
                advance[0](ready)
            elif advance:
                advance[0](n)

        run_interruptible(warm, progress=step)
