"""Losses for whoever asks for nothing else, and the importance measured on the way, written to a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from requant.api.invocation import score_options
from requant.api.measure import check_can_run, score
from requant.api.session import Session
from requant.common.atomic_write import check_writable
from requant.errors import UsageError
from requant.scoring.losses import Losses


def check_imatrix_output(job: Session, emitted: Path | None, *, force: bool) -> None:
    """Raise what would keep importance from being measured and written to `emitted`, where that is asked for."""
    if emitted is None:
        return
    if job.imatrix is not None or job.calibration.quick:
        raise UsageError("--emit-imatrix: nothing is measured with --imatrix, --statistics or --quick")
    check_can_run(job.source)
    check_writable(emitted, force=force, inputs=job.inputs)


def score_to_files(job: Session, *, emitted: Path | None = None, force: bool = False) -> Losses:
    """The losses of the types that the job request for; the importance measured on the way goes to `emitted`.

    Raises what scoring does, and what `check_imatrix_output` and writing do.
    """
    check_imatrix_output(job, emitted, force=force)
    scored = score(
        job.source,
        job.request.types,
        job.imatrix,
        job.calibration,
        job.monitor,
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
    return replace(scored.losses, options=score_options(job.request.types, job.imatrix, job.calibration, **how))
