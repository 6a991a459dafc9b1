"""Runs of a model: losses, statistics, perplexity and divergence on the calibration data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.api.kernels import Purpose, prepare_kernels, prepare_meanwhile
from requant.common.atomic_write import check_writable
from requant.common.inputs import add_inputs
from requant.common.interrupt import run_interruptible
from requant.container.source import Source, require_model
from requant.errors import UsageError
from requant.formats import by_name
from requant.model.kept import projector_types
from requant.model.roles import never_quantize
from requant.scoring.calibration_data import read_windows
from requant.scoring.losses import ScoringResult

if TYPE_CHECKING:
    from requant.common.monitor import Monitor
    from requant.container.imatrix import Imatrix
    from requant.scoring.calibration_data import TokenWindows
    from requant.scoring.evaluate import Evaluation
    from requant.scoring.options import CalibrationOptions, ScoringOptions, StatisticsOptions
    from requant.scoring.statistics import Statistics


def score(source: Source, calibration: CalibrationOptions, options: ScoringOptions, monitor: Monitor) -> ScoringResult:
    """Return the losses of `options.types`: from gradients wherever the model can be run.

    The result has statistics only where the encoders weight columns by them: with `options.weigh`, without an imatrix.
    """
    from requant.model.forward.architecture import NotRun
    from requant.scoring import fisher, layerwise

    decoded, by_statistics = {t.format for t in source.tensors}, calibration.statistics is not None
    wanted = [*decoded, *(by_name(name) for name in options.types)]
    reason = None if calibration.quick or by_statistics else fisher.find_run_obstacle(source)
    if calibration.quick or by_statistics or reason is not None:
        prepare_kernels(monitor, wanted, threads=options.threads)
    if calibration.statistics is not None:
        statistics = read_importance(calibration.statistics, source)
        assert statistics is not None
        with monitor.progress("scoring", len(source.tensors), " tensors") as advance:
            return ScoringResult(
                run_interruptible(fisher.score_by_statistics, source, statistics, options, progress=advance)
            )
    if calibration.quick or reason is not None:
        if reason is not None:
            hint = ""
            if isinstance(reason, NotRun) and options.imatrix is None:
                hint = "; with an imatrix plans are better: `requant calibrate`, where llama.cpp runs it"
            why = reason.with_hint(None)
            monitor.warn(f"scoring without gradients: {why}; losses are in points and no KL divergence{hint}")
        with monitor.progress("scoring", sum(t.n_bytes for t in source.tensors)) as advance:
            return ScoringResult(run_interruptible(layerwise.score, source, options, progress=advance))
    with monitor.working("reading text"):
        text = run_interruptible(read_windows, calibration, source)
    monitor.warn(*text.notes)
    prepare_kernels(monitor, decoded, Purpose.DECODE)
    with (
        prepare_meanwhile(monitor, wanted, threads=options.threads) as finish,
        monitor.progress("scoring", fisher.n_steps(source), " layers") as advance,
    ):
        found = run_interruptible(
            fisher.score_by_gradients, source, text, options, before_encoding=finish, progress=advance
        )
    return found if options.weigh and options.imatrix is None else ScoringResult(found.losses)


def calibrate(
    source: Source,
    calibration: CalibrationOptions,
    options: StatisticsOptions,
    out: Path,
    monitor: Monitor,
    *,
    force: bool,
) -> Statistics:
    """Write the statistics of the model on the text to `out`, and return them; a stopped run leaves a checkpoint."""
    from requant.api.engine import choose_engine, read_windows_for_engine
    from requant.scoring import calibrate as calibrate_
    from requant.scoring.checkpoint import checkpoint_sidecar
    from requant.scoring.statistics import write_statistics

    engine = choose_engine([source], wanted=options.engine)
    if engine is not None and options.max_memory is not None:
        raise UsageError("--max-memory does not limit llama.cpp, which maps the file; leave it out")
    source.add_to_inputs()
    add_inputs(calibration.text, calibration.tokens)
    check_writable(out, force=force)
    checkpoint = checkpoint_sidecar(out.with_name(f"{out.name}.part.npz"))
    checkpoint.check()
    if engine is not None:
        with engine.explained(monitor):
            text = read_windows_for_engine(source, calibration, monitor)
            with monitor.progress("calibrating", len(text.windows), " windows") as advance:
                found = calibrate_.calibrate_in_engine(
                    source, text.windows, options, checkpoint=checkpoint.path, progress=advance
                )
            write_statistics(out, found, source, text.name, force=force)
        return found
    with monitor.working("reading text"):
        text = run_interruptible(read_windows, calibration, source)
    monitor.warn(*text.notes)
    prepare_kernels(monitor, {t.format for t in source.tensors}, Purpose.DECODE)
    steps = calibrate_.n_steps(source, text.windows, options)
    with monitor.progress("calibrating", steps, " layers") as advance:
        found = run_interruptible(
            calibrate_.calibrate, source, text.windows, options, checkpoint=checkpoint.path, progress=advance
        )
    write_statistics(out, found, source, text.name, force=force)
    return found


def evaluate(
    source: Source,
    base: Source | None,
    calibration: CalibrationOptions,
    monitor: Monitor,
    *,
    threads: int | None,
    engine: bool = False,
) -> Evaluation:
    """Return the figures of the model on the text, and its divergence from `base`; engine: as llama.cpp runs them."""
    from requant.api.engine import choose_engine
    from requant.model.forward.passes import read_model
    from requant.model.forward.weights import Weights
    from requant.scoring import evaluate as evaluate_

    sources = [source] if base is None else [source, base]
    chosen = choose_engine(sources, wanted=engine)
    if chosen is not None:
        with chosen.explained(monitor):
            return _evaluate_in_engine(source, base, calibration, monitor, threads=threads)
    model, reference = read_model(Weights(source)), None if base is None else read_model(Weights(base))
    if base is not None:
        evaluate_.check_base(source, base)
    with monitor.working("reading text"):
        text = run_interruptible(read_windows, calibration, source)
    prepare_kernels(monitor, {t.format for s in sources for t in s.tensors}, Purpose.DECODE)
    steps = sum(m.architecture.n_layers for m in (model, reference) if m is not None) + 1
    with monitor.progress("evaluating", steps, " layers") as advance:
        found = run_interruptible(
            evaluate_.evaluate, model, text.windows, base=reference, threads=threads, progress=advance
        )
    return _describe_evaluation(found, source, base, text)


def _evaluate_in_engine(
    source: Source, base: Source | None, calibration: CalibrationOptions, monitor: Monitor, *, threads: int | None
) -> Evaluation:
    """Return the figures of the model in llama.cpp, and its divergence from `base` there."""
    from requant.api.engine import read_windows_for_engine
    from requant.model.llama_cpp import ENGINE
    from requant.scoring import evaluate as evaluate_
    from requant.scoring.engine_run import measure_figures

    if base is not None:
        evaluate_.check_base(source, base)
    text = read_windows_for_engine(source, calibration, monitor)
    base_path = None if base is None else base.path
    with monitor.progress("evaluating", len(text.windows), " windows") as advance:
        figures = measure_figures(source.path, base_path, text.windows, threads=threads, progress=advance)
    for other in filter(None, (source, base)):
        other.check_unchanged()
    return _describe_evaluation(replace(evaluate_.summary(figures, text.windows), engine=ENGINE), source, base, text)


def _describe_evaluation(found: Evaluation, source: Source, base: Source | None, text: TokenWindows) -> Evaluation:
    """Return the figures with the names of what was measured."""
    base_name = None if base is None else base.name
    return replace(found, model=source.name, header_sha256=source.header_sha256, base=base_name, text=text.name)


def check_can_run(source: Source, instead: str) -> None:
    """Raise BadInput where the model cannot be run; instead: the hint where only requant does not run it."""
    from requant.model.forward.architecture import NotRun
    from requant.scoring.fisher import find_run_obstacle

    reason = find_run_obstacle(source)
    if reason is not None:
        raise reason.with_hint(instead) if isinstance(reason, NotRun) else reason


def read_importance(path: Path | None, source: Source) -> Imatrix | None:
    """Return the importance matrix in the file at `path`, if any. Raise BadInput for one of another model."""
    if path is None:
        return None
    from requant.container.imatrix import coverage, read_imatrix

    arch, imatrix, projectors = require_model(source), read_imatrix(path), projector_types(source.metadata)
    reasons = ((t, never_quantize(arch, t.name, t.shape, t.type_id, projectors=projectors)) for t in source.tensors)
    coverage(imatrix, [t for t, reason in reasons if reason is None])
    return imatrix
