"""What is done with tensors that hold weights which are no numbers, before anything else is."""

from __future__ import annotations

from requant.container.source import Source
from requant.interruptible import interruptible
from requant.stages.kernels import prepare_kernels
from requant.teller import Teller

KEEP_TYPE = "keep-type"
WAYS = ("error", KEEP_TYPE)


def settle(source: Source, nonfinite: str, teller: Teller, *, threads: int | None) -> None:
    """With `keep-type`, read all of the model, and have the tensors that are not finite stay as they are."""
    from requant.finite import keep_nonfinite

    if nonfinite != KEEP_TYPE:
        return
    prepare_kernels(teller, {t.format for t in source.tensors}, encode=False)
    with teller.progress("scanning", sum(t.n_bytes for t in source.tensors)) as advance:
        found = interruptible(keep_nonfinite, source, threads=threads, progress=advance)
    teller.warn(*found)
