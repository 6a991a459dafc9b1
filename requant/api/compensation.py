"""The text of a compensated conversion, with the weight of each token in a pass back, and its limit of memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from requant.api.kernels import Purpose, prepare_kernels, prepare_meanwhile
from requant.common.interrupt import run_interruptible
from requant.common.threads import n_threads
from requant.common.units import format_size
from requant.errors import UsageError
from requant.scoring.calibration_data import TokenWindows, read_windows

if TYPE_CHECKING:
    from requant.api.session import Session
    from requant.conversion.compensation.walk import CompensationText
    from requant.model.forward.passes import RunnableModel
    from requant.planning.plan import Plan

_TIMES = 4  # as many windows as scoring runs: second moments need more tokens than their diagonals
_LEAST_DIFFERENT = 16  # tokens; what fits a text of fewer is worse than plain rounding on any other


def read_compensation_text(session: Session, plan: Plan) -> CompensationText | None:
    """Return the text by which the plan's encoders compensate their errors, None where they do not.

    Raises what `check_compensation` raises, and NumericFault where activations or gradients are not finite.
    """
    if plan.compensation is None:
        return None
    from requant.conversion.compensation.token_weights import n_weighing_steps, weigh_tokens
    from requant.conversion.compensation.walk import CompensationText
    from requant.conversion.prepare import formats_used
    from requant.model.forward.passes import check_tokens, read_model
    from requant.model.forward.weights import Weights

    source, threads, monitor = session.source, session.options.threads, session.monitor
    text = _read_text(session)
    monitor.warn(*text.notes)
    prepare_kernels(monitor, {t.format for t in source.tensors}, Purpose.DECODE)
    model = read_model(Weights(source))
    check_tokens(model, text.windows)
    room = _find_room(session, model, *text.windows.shape)
    best = plan.compensation == "best"
    purpose = Purpose.SEARCH if best else Purpose.COMPENSATE
    with (
        prepare_meanwhile(monitor, formats_used(plan), purpose, threads=threads) as finish,
        monitor.progress("weighing tokens", n_weighing_steps(model), " layers") as advance,
    ):
        weights = run_interruptible(weigh_tokens, model, text.windows, threads=threads, progress=advance)
        run_interruptible(finish)
    return CompensationText(text.name, model, text.windows, weights, best=best, room=room)


def check_compensation(session: Session) -> None:
    """Raise, before any long work, what would keep the session's encoders from compensating their errors.

    Raises UsageError for too few windows, for a text that repeats itself and for a limit of memory that is too small,
    BadInput for a text that cannot be read or is too short.
    """
    from requant.model.forward.passes import read_model
    from requant.model.forward.weights import Weights
    from requant.scoring.fisher import find_run_obstacle

    if session.compensates and find_run_obstacle(session.source) is None:
        _find_room(session, read_model(Weights(session.source)), *_read_text(session).windows.shape)


def _read_text(session: Session) -> TokenWindows:
    from requant.conversion.compensation.moments import LEAST_WINDOWS

    asked = session.calibration
    wanted = None if asked.n_windows is None else asked.n_windows * _TIMES
    with session.monitor.working("reading text"):
        text = run_interruptible(read_windows, replace(asked, n_windows=wanted), session.source)
    if len(text.windows) < LEAST_WINDOWS:
        what = f"--compensate needs {LEAST_WINDOWS} windows, and {text.name} has {len(text.windows)}"
        raise UsageError(f"{what}; give a longer text, or a smaller --window")
    share = np.unique(text.windows, return_counts=True)[1] / text.windows.size
    n_different = np.exp(-np.sum(share * np.log(share)))
    if n_different < _LEAST_DIFFERENT:
        what = f"{text.name} repeats itself: its tokens differ no more than {n_different:.0f} would in equal numbers"
        raise UsageError(f"{what}, too few for --compensate; give another text")
    return text


def _find_room(session: Session, model: RunnableModel, n_windows: int, n_ctx: int) -> int | None:
    """Return the bytes that --max-memory leaves for moments, None without it. Raises UsageError where it is too low."""
    from requant.conversion.compensation.memory import least_bytes, walk_bytes

    limit = session.options.max_memory
    if limit is None:
        return None
    least = least_bytes(model, n_windows, n_ctx, n_threads(session.options.threads))
    if limit < least:
        what = f"--max-memory {format_size(limit)} is too little for --compensate; it takes {-(-least // 2**20)} MiB"
        raise UsageError(f"{what}, less with fewer --windows, a smaller --window or fewer --threads")
    return limit - walk_bytes(model, n_windows, n_ctx)
