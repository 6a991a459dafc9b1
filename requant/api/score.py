"""Losses for whoever asks for nothing else, and the importance measured on the way, written to a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from requant.api.invocation import score_words
from requant.api.measure import check_can_run, score
from requant.api.session import Job
from requant.common.atomic_write import check_writable
from requant.errors import UsageError
from requant.scoring.losses import Losses


def check_emitted(job: Job, emitted: Path | None, *, force: bool) -> None:
    """Raise what would keep importance from being measured and written to `emitted`, where that is asked for."""
    if emitted is None:
        return
    if job.imatrix is not None or job.calibration.quick:
        raise UsageError("--emit-imatrix: nothing is measured with --imatrix, --statistics or --quick")
    check_can_run(job.source)
    check_writable(emitted, force=force, inputs=job.inputs)


def losses_of(job: Job, *, emitted: Path | None = None, force: bool = False) -> Losses:
    """The losses of the types that the job wishes for; the importance measured on the way goes to `emitted`.

    Raises what scoring does, and what `check_emitted` and writing do.
    """
    check_emitted(job, emitted, force=force)
    scored = score(
        job.source,
        job.wishes.types,
        job.imatrix,
        job.calibration,
        job.teller,
        threads=job.threads,
        allow_requantize=job.allow_requantize,
        effort=job.effort,
        weigh=emitted is not None,
        cluster=job.cluster,
    )
    if emitted is not None:
        from requant.scoring.statistics import write_statistics

        assert scored.measured is not None
        statistics, text = scored.measured
        write_statistics(emitted, statistics, job.source, text, force=force, inputs=job.inputs)
    how: dict[str, Any] = {"allow_requantize": job.allow_requantize, "effort": job.effort}
    return replace(scored.losses, options=score_words(job.wishes.types, job.imatrix, job.calibration, **how))
