"""What a model is run for: losses, statistics, perplexity and divergence, of the tokens that were asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.api.kernels import prepare_kernels
from requant.common.files import Identity
from requant.common.interrupt import run_interruptible
from requant.common.monitor import Monitor
from requant.container.source import Source, require_model
from requant.formats import Effort, by_name
from requant.model.roles import never_quantize
from requant.scoring.calibration_data import Calibration
from requant.scoring.losses import Losses

if TYPE_CHECKING:
    from requant.common.cluster import Cluster
    from requant.container.imatrix import Imatrix
    from requant.scoring.evaluate import Evaluation
    from requant.scoring.statistics import Statistics


@dataclass(frozen=True, slots=True)
class ScoringResult:
    """Losses, and for encoders that are to weigh by it what was measured on the way: statistics, and of which text."""

    losses: Losses
    measured: tuple[Statistics, str] | None = None


def score(
    source: Source,
    types: tuple[str, ...],
    imatrix: Imatrix | None,
    calibration: Calibration,
    monitor: Monitor,
    *,
    threads: int | None,
    allow_requantize: bool,
    effort: Effort | None,
    weigh: bool = False,
    cluster: Cluster | None = None,
) -> ScoringResult:
    """The losses of `types`, by default `candidates.DEFAULT_TYPES`: from gradients wherever the model can be run.

    weigh: the encoders are to weigh columns by what is measured on the way, where no imatrix is given.
    """
    from requant.scoring import fisher, layerwise
    from requant.scoring.candidates import DEFAULT_TYPES

    types = types or DEFAULT_TYPES
    prepare_kernels(monitor, {t.format for t in source.tensors} | {by_name(name) for name in types})
    common: dict[str, Any] = {
        "types": types,
        "threads": threads,
        "cluster": cluster,
        "allow_requantize": allow_requantize,
        "effort": Effort.DEFAULT if effort is None else effort,
    }
    if calibration.statistics is not None:
        statistics = read_importance(calibration.statistics, source)
        assert statistics is not None
        with monitor.progress("scoring", len(source.tensors), " tensors") as advance:
            losses = run_interruptible(
                fisher.score_by_statistics, source, statistics, imatrix=imatrix, progress=advance, **common
            )
        return ScoringResult(losses)
    reason = None if calibration.quick else fisher.cannot_run(source)
    if calibration.quick or reason is not None:
        if reason is not None:
            monitor.warn(f"scoring without gradients, which makes worse plans: {reason}")
        with monitor.progress("scoring", sum(t.n_bytes for t in source.tensors)) as advance:
            return ScoringResult(
                run_interruptible(layerwise.score, source, imatrix=imatrix, progress=advance, **common)
            )
    with monitor.working("reading text"):
        text = run_interruptible(calibration.windows, source)
    monitor.warn(*text.notes)
    with monitor.progress("scoring", fisher.n_steps(source), " layers") as advance:
        found = run_interruptible(
            fisher.score_by_gradients,
            source,
            text.windows,
            text=text.name,
            imatrix=imatrix,
            weigh=weigh,
            progress=advance,
            **common,
        )
    return ScoringResult(found.losses, (found.statistics, text.name) if weigh and imatrix is None else None)


def calibrate(
    source: Source,
    calibration: Calibration,
    out: Path,
    monitor: Monitor,
    *,
    force: bool,
    inputs: frozenset[Identity],
    no_gradients: bool,
    max_memory: int | None,
    threads: int | None,
) -> Statistics:
    """The statistics of the model on the text, written to `out`; what a stopped run has done is kept beside it."""
    from requant.container.part import Part
    from requant.scoring import calibrate as calibrate_
    from requant.scoring.statistics import write_statistics

    with Part(out, 0, force=force, inputs=inputs):
        pass
    with monitor.working("reading text"):
        text = run_interruptible(calibration.windows, source)
    monitor.warn(*text.notes)
    how: dict[str, Any] = {"gradients": not no_gradients, "max_memory": max_memory, "threads": threads}
    prepare_kernels(monitor, {t.format for t in source.tensors}, encode=False)
    n_batches = calibrate_.n_batches(source, text.windows, **how)
    kept = out.with_name(f"{out.name}.part.npz")
    steps = calibrate_.n_steps(source, n_batches, gradients=not no_gradients)
    with monitor.progress("calibrating", steps, " layers") as advance:
        found = run_interruptible(calibrate_.calibrate, source, text.windows, kept=kept, progress=advance, **how)
    write_statistics(out, found, source, text.name, force=force, inputs=inputs)
    kept.unlink(missing_ok=True)
    return found


def evaluate(
    source: Source, base: Source | None, calibration: Calibration, monitor: Monitor, *, threads: int | None
) -> Evaluation:
    """The figures of the model on the text, and its divergence from `base`."""
    from requant.model.forward.passes import read_model
    from requant.model.forward.weights import Weights
    from requant.scoring import evaluate as evaluate_

    sources = [source] if base is None else [source, base]
    model, reference = read_model(Weights(source)), None if base is None else read_model(Weights(base))
    if reference is not None:
        evaluate_.check_base(model, reference)
    with monitor.working("reading text"):
        text = run_interruptible(calibration.windows, source)
    prepare_kernels(monitor, {t.format for s in sources for t in s.tensors}, encode=False)
    steps = sum(m.architecture.n_layers for m in (model, reference) if m is not None) + 1
    with monitor.progress("evaluating", steps, " layers") as advance:
        found = run_interruptible(
            evaluate_.evaluate, model, text.windows, base=reference, threads=threads, progress=advance
        )
    of, base_name = source.header_sha256, None if base is None else base.name
    return replace(found, model=source.name, header_sha256=of, base=base_name, text=text.name)


def check_can_run(source: Source) -> None:
    """Raise BadInput where the forward pass does not know the model."""
    from requant.scoring.fisher import cannot_run

    reason = cannot_run(source)
    if reason is not None:
        raise reason


def read_importance(path: Path | None, source: Source) -> Imatrix | None:
    """The importance matrix in the file at `path`, if one is given; raises BadInput where it is of another model."""
    if path is None:
        return None
    from requant.container.imatrix import coverage, read_imatrix

    arch, imatrix = require_model(source), read_imatrix(path)
    coverage(imatrix, [t for t in source.tensors if never_quantize(arch, t.name, t.shape, t.type_id) is None])
    return imatrix
