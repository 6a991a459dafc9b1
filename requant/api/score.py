"""Scoring as a command of its own: losses, and the importance measured on the way, written to a file."""

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
    """Raise UsageError, BadInput or OutputRefused if importance cannot be measured or written to `emitted`."""
    if emitted is None:
        return
    if job.imatrix is not None or job.calibration.quick:
        raise UsageError("--emit-imatrix: nothing is measured with --imatrix, --statistics or --quick")
    check_can_run(job.source)
    check_writable(emitted, force=force, inputs=job.inputs)


def score_to_files(job: Session, *, emitted: Path | None = None, force: bool = False) -> Losses:
    """Return the losses of the types requested; write the importance measured on the way to `emitted`.

    Raises what `score`, `check_imatrix_output` and `write_statistics` raise.
    """
    check_imatrix_output(job, emitted, force=force)
    options = job.scoring_options(job.request.types, weigh=emitted is not None)
    scored = score(job.source, job.calibration, options, job.monitor)
    if emitted is not None:
        from requant.scoring.statistics import write_statistics

        statistics, text = scored.statistics, scored.losses.calibration_text
        assert statistics is not None
        assert text is not None
        write_statistics(emitted, statistics, job.source, text, force=force, inputs=job.inputs)
    how: dict[str, Any] = {"allow_requantize": job.allow_requantize, "effort": job.effort}
    return replace(scored.losses, options=score_options(job.request.types, job.imatrix, job.calibration, **how))
