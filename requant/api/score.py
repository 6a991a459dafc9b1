"""Scoring as a command: losses, and the importance measured on the way, written to a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from requant.api.invocation import score_arguments
from requant.api.measure import check_can_run
from requant.api.session import Session
from requant.common.atomic_write import check_writable
from requant.errors import UsageError
from requant.scoring.losses import Losses


def score_to_files(session: Session, *, emitted: Path | None = None, force: bool = False) -> Losses:
    """Return the losses of the types requested; write the importance measured on the way to `emitted`.

    Raises what scoring and writing raise, and UsageError, BadInput or OutputRefused, before any work, where importance
    cannot be measured or written.
    """
    if emitted is not None:
        if session.imatrix is not None or session.calibration.quick:
            raise UsageError("--emit-imatrix: nothing is measured with --imatrix, --statistics or --quick")
        check_can_run(session.source)
        check_writable(emitted, force=force)
    scored = session.score(session.request.types, weigh=emitted is not None)
    if emitted is not None:
        from requant.scoring.statistics import write_statistics

        statistics, text = scored.statistics, scored.losses.calibration_text
        assert statistics is not None and text is not None
        write_statistics(emitted, statistics, session.source, text, force=force)
    return replace(scored.losses, options=score_arguments(session))
