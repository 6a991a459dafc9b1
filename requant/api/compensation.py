"""The text of a compensated conversion: its windows of tokens, and the weight of each token in a pass back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from requant.api.kernels import Use, prepare_kernels, prepare_meanwhile
from requant.common.interrupt import run_interruptible
from requant.errors import UsageError
from requant.scoring.calibration_data import read_windows

if TYPE_CHECKING:
    from requant.api.session import Session
    from requant.conversion.compensation.walk import CompensationText
    from requant.planning.plan import Plan

_TIMES = 4  # as many windows as scoring runs: second moments need more tokens than their diagonals


def read_compensation_text(session: Session, plan: Plan) -> CompensationText | None:
    """Return the text by which the plan's encoders compensate their errors, None where they do not.

    Raises UsageError for too few windows, BadInput for a text that is too short, NumericFault where activations or
    gradients are not finite.
    """
    if plan.compensation is None:
        return None
    from requant.conversion.compensation.moments import LEAST_WINDOWS
    from requant.conversion.compensation.token_weights import n_weighing_steps, weigh_tokens
    from requant.conversion.compensation.walk import CompensationText
    from requant.conversion.prepare import formats_used
    from requant.model.forward.passes import check_tokens, read_model
    from requant.model.forward.weights import Weights

    source, asked, threads, monitor = session.source, session.calibration, session.options.threads, session.monitor
    wanted = None if asked.n_windows is None else asked.n_windows * _TIMES
    with monitor.working("reading text"):
        text = run_interruptible(read_windows, replace(asked, n_windows=wanted), source)
    if len(text.windows) < LEAST_WINDOWS:
        what = f"--compensate needs {LEAST_WINDOWS} windows, and {text.name} has {len(text.windows)}"
        raise UsageError(f"{what}; give a longer --text, or a smaller --window")
    monitor.warn(*text.notes)
    prepare_kernels(monitor, {t.format for t in source.tensors}, Use.DECODE)
    model = read_model(Weights(source))
    check_tokens(model, text.windows)
    best = plan.compensation == "best"
    with (
        prepare_meanwhile(
            monitor, formats_used(plan), Use.SEARCH if best else Use.COMPENSATE, threads=threads
        ) as finish,
        monitor.progress("weighing tokens", n_weighing_steps(model), " layers") as advance,
    ):
        weights = run_interruptible(weigh_tokens, model, text.windows, threads=threads, progress=advance)
        run_interruptible(finish)
    return CompensationText(text.name, model, text.windows, weights, best=best)
