"""Scoring as a command: losses, and the importance measured on the way in a file beside theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from requant.api.importance import importance_file, is_importance_file
from requant.api.invocation import score_arguments
from requant.api.measure import check_can_run
from requant.api.session import Session, measured_importance
from requant.common.atomic_write import check_writable, write_text
from requant.errors import UsageError
from requant.scoring.losses import Losses


def score_to_files(
    session: Session,
    *,
    out: Path | None = None,
    emitted: Path | None = None,
    folder: Path | None = None,
    force: bool = False,
) -> Losses:
    """Return the losses of the types requested, and write them to `out`.

    The importance measured on the way is part of the losses, and is written to `emitted`, by default beside `out`.
    folder: the folder of the losses' file where that is not `out`, None where it is not known; the losses point to the
    file of the importance from there.
    Raises what scoring and writing raise, and UsageError, BadInput or OutputRefused, before any work, where importance
    cannot be measured or a file cannot be written.
    """
    if emitted is not None and not session.measures_importance:
        if session.imatrix is not None or session.calibration.quick or session.options.no_imatrix:
            others = "--imatrix, --no-imatrix, --statistics or --quick"
            raise UsageError(f"--emit-imatrix: nothing is measured with {others}")
        check_can_run(session.source, "`requant calibrate` collects an imatrix for it")
    kept = None
    if session.measures_importance:
        kept = emitted or (None if out is None else importance_file(out))
    if out is not None:
        check_writable(out, force=force)
    if kept is not None:
        check_writable(kept, force=force and kept == emitted, is_own=is_importance_file if force else None)
    scored = session.score(session.types, weigh=session.measures_importance)
    losses = replace(scored.losses, options=score_arguments(session))
    importance = session.importance
    if (measured := measured_importance(scored)) is not None and kept is not None:
        importance = replace(measured, file=measured.save(kept, session.source, force=force), path=kept)
    if importance.imatrix is not None:
        folder = folder if out is None else out.parent
        file = importance.file if folder is None else importance.path_from(folder)
        losses = replace(losses, imatrix_file=file)
    if out is not None:
        write_text(out, losses.to_json(), force=force)
    return losses
