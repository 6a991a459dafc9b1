"""Calibration: statistics of a model on a text, gathered in batches of windows so that a stopped run can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from requant.common.threads import n_threads
from requant.common.units import format_size
from requant.container.imatrix import LOOKUP
from requant.errors import UsageError
from requant.model.forward.checkpoints import Checkpoints
from requant.model.forward.memory import memory_needs
from requant.model.forward.passes import (
    RunnableModel,
    Tokens,
    check_tokens,
    embedding_gradient,
    read_model,
    side_inputs,
)
from requant.model.forward.weights import Weights
from requant.model.llama_cpp import ENGINE
from requant.scoring import gradient_run
from requant.scoring.checkpoint import checkpoint_sidecar, load_checkpoint, save_checkpoint
from requant.scoring.engine_run import collect_sums
from requant.scoring.gradient_run import GradientRun
from requant.scoring.statistics import SquareSums, Statistics

if TYPE_CHECKING:
    from requant.container.source import Source
    from requant.scoring.options import StatisticsOptions

BATCH = 8  # windows that are run together, where memory does not limit it further


def calibrate(
    source: Source,
    tokens: Tokens,
    options: StatisticsOptions,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Statistics:
    """Return the statistics of `source` on windows of `tokens` (n_windows, n_ctx).

    checkpoint: a file with the sums so far, written after every batch, read first if it is of the same model and
    tokens, and removed at the end. `progress` is called with steps done (`n_steps`). Raises UsageError where even one
    window needs more memory, and what `read_model` and `GradientRun` raise.
    """
    model = read_model(Weights(source))
    check_tokens(model, tokens)
    batch = _batch(model, tokens, options)
    identity = _identity(source, tokens, options.gradients)
    statistics = _resume(checkpoint, identity, source, tokens)
    done = statistics.n_tokens // tokens.shape[1]
    progress(-(-done // batch) * gradient_run.n_steps(model.architecture, gradients=options.gradients))
    for first in range(done, len(tokens), batch):
        part = tokens[first : first + batch]
        side = side_inputs(model, part) if options.gradients else None
        run = GradientRun(model, part, statistics, options.threads, progress, first, side)
        if options.gradients:
            _sum_gradients(run)
        else:
            run.forward()
        statistics.n_tokens += run.tokens.size
        if checkpoint is not None:
            save_checkpoint(checkpoint, identity, statistics)
    if checkpoint is not None:
        checkpoint_sidecar(checkpoint).remove()
    source.check_unchanged()
    return statistics


def calibrate_in_engine(
    source: Source,
    tokens: Tokens,
    options: StatisticsOptions,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Statistics:
    """Return the statistics of `source` run by llama.cpp, without gradients; as `calibrate`, but steps are windows.

    Raises what `engine_run.collect_sums` does.
    """
    identity = _identity(source, tokens, ENGINE)
    statistics = _resume(checkpoint, identity, source, tokens)
    statistics.engine = ENGINE
    done = statistics.n_tokens // tokens.shape[1]
    progress(done)

    def add(found: Statistics) -> None:
        statistics.add("", found.matrices)
        statistics.n_tokens += found.n_tokens
        if checkpoint is not None:
            save_checkpoint(checkpoint, identity, statistics)

    if done < len(tokens):
        collect_sums(source, tokens[done:], add, threads=options.threads, progress=progress)
    if checkpoint is not None:
        checkpoint_sidecar(checkpoint).remove()
    source.check_unchanged()
    return statistics


def _sum_gradients(run: GradientRun) -> None:
    """Run forward and backward, and sum the squared gradients at the embedding's rows as well."""
    with Checkpoints() as checkpoints:
        x = run.forward(checkpoints)
        run.output_gradient(x)
        run.backward(x, checkpoints)
    squares = embedding_gradient(run.model, run.tokens, x)[1].sum(axis=0, dtype=np.float64)
    run.statistics.add("", {(LOOKUP, None): SquareSums(run.tokens.size, gradients=squares)})


def n_steps(source: Source, tokens: Tokens, options: StatisticsOptions) -> int:
    """Return the steps that `calibrate` counts in all."""
    model = read_model(Weights(source))
    n_batches = -(-len(tokens) // _batch(model, tokens, options))
    return n_batches * gradient_run.n_steps(model.architecture, gradients=options.gradients)


def _batch(model: RunnableModel, tokens: Tokens, options: StatisticsOptions) -> int:
    """Return the windows of a batch. Raise UsageError where even one needs more memory."""
    if options.max_memory is None:
        return min(BATCH, len(tokens))
    limit, threads = options.max_memory, n_threads(options.threads)
    fixed, per_window = memory_needs(model, tokens.shape[1], threads, options.gradients)
    if limit < fixed + per_window:
        what, least = f"--max-memory {format_size(limit)} is too little for one window", format_size(fixed + per_window)
        raise UsageError(f"{what}; it takes {least}, less with a smaller --window or fewer --threads")
    return min((limit - fixed) // per_window, len(tokens))


def _identity(source: Source, tokens: Tokens, how: bool | str) -> str:
    """Return what a checkpoint must agree on: the files, the tokens, and how: with gradients or not, or the engine."""
    digest = hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()
    files = [(f.status.st_size, f.status.st_mtime_ns) for f in source.opened]
    return json.dumps([source.header_sha256, files, digest, list(tokens.shape), how])


def _resume(checkpoint: Path | None, identity: str, source: Source, tokens: Tokens) -> Statistics:
    """Return the sums in the checkpoint of the same run, or empty ones."""
    n_windows, n_ctx = tokens.shape
    found = None
    if checkpoint is not None and checkpoint.exists():
        found = load_checkpoint(checkpoint, identity, source, n_ctx)
    return found if found is not None and found.n_tokens <= n_windows * n_ctx else Statistics(0, n_ctx)
