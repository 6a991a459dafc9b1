"""The session of a command: the model open, its warnings on stderr, the workers of --cluster connected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.api.session import Session, apply_nonfinite_policy, connect_cluster, open_session
from requant.cli import messages
from requant.container.source import open_source
from requant.model.tensor_shapes import describe_misfits

if TYPE_CHECKING:
    from requant.api.session_options import SessionOptions
    from requant.planning.request import PlanFrom, PlanRequest
    from requant.scoring.options import CalibrationOptions


def without_unkept(session: Session, kept: Path | None) -> Session:
    """Return the session; where it would measure importance and no file keeps that, one that measures none."""
    if kept is not None or not session.measures_importance:
        return session
    return replace(session, options=replace(session.options, no_imatrix=True))


@contextmanager
def open_model_session(
    *,
    model: Path,
    request: PlanRequest,
    calibration: CalibrationOptions,
    session_options: SessionOptions,
    plan_from: PlanFrom | None = None,
    cluster: str | None = None,
) -> Iterator[Session]:
    """Open a session on the model at `model`; its policy for NaN and infinity is applied first."""
    monitor = messages.MONITOR
    with open_source(model) as source, connect_cluster(cluster, messages.info) as workers:
        messages.warn(*source.warnings, *describe_misfits(source))
        apply_nonfinite_policy(source, session_options, monitor)
        yield open_session(
            *(source, request, calibration, plan_from, session_options), cluster=workers, monitor=monitor
        )
