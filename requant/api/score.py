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


def check_imatrix_output(session: Session, emitted: Path | None, *, force: bool) -> None:
    """Raise UsageError, BadInput or OutputRefused if importance cannot be measured or written to `emitted`."""
    if emitted is None:
        return
    if session.imatrix is not None or session.calibration.quick:
        raise UsageError("--emit-imatrix: nothing is measured with --imatrix, --statistics or --quick")
    check_can_run(session.source)
    check_writable(emitted, force=force, inputs=session.inputs)


def score_to_files(session: Session, *, emitted: Path | None = None, force: bool = False) -> Losses:
    """Return the losses of the types requested; write the importance measured on the way to `emitted`.

    Raises what `score`, `check_imatrix_output` and `write_statistics` raise.
    """
    check_imatrix_output(session, emitted, force=force)
    options = session.scoring_options(session.request.types, weigh=emitted is not None)
    scored = score(session.source, session.calibration, options, session.monitor)
    if emitted is not None:
        from requant.scoring.statistics import write_statistics

        statistics, text = scored.statistics, scored.losses.calibration_text
        assert statistics is not None
        assert text is not None
        write_statistics(emitted, statistics, session.source, text, force=force, inputs=session.inputs)
    how: dict[str, Any] = {"allow_requantize": session.allow_requantize, "effort": session.effort}
    return replace(
        scored.losses, options=score_options(session.request.types, session.imatrix, session.calibration, **how)
    )
