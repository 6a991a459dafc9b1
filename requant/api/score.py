"""Scoring as a command: losses, and the importance measured on the way, written to a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from requant.api.invocation import score_words
from requant.api.measure import check_can_run
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

    Raises what scoring, `check_imatrix_output` and writing raise.
    """
    check_imatrix_output(session, emitted, force=force)
    scored = session.score(session.request.types, weigh=emitted is not None)
    if emitted is not None:
        from requant.scoring.statistics import write_statistics

        statistics, text = scored.statistics, scored.losses.calibration_text
        assert statistics is not None
        assert text is not None
        write_statistics(emitted, statistics, session.source, text, force=force, inputs=session.inputs)
    return replace(scored.losses, options=score_words(session))
