"""Statistics of a model on a text, gathered in batches of windows, so that a long run can be taken up again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from requant.common.threads import n_threads
from requant.common.units import format_size
from requant.container.imatrix import LOOKUP
from requant.container.source import Source
from requant.errors import UsageError
from requant.model.forward.architecture import read_architecture
from requant.model.forward.checkpoints import Checkpoints
from requant.model.forward.layer import Layer
from requant.model.forward.memory import batch_windows
from requant.model.forward.passes import (
    RunnableModel,
    Tokens,
    backward,
    check_tokens,
    embedding_gradient,
    forward,
    output_gradient,
    read_model,
)
from requant.model.forward.weights import Weights
from requant.scoring.checkpoint import load_checkpoint, save_checkpoint
from requant.scoring.statistics import SquareSummer, SquareSums, Statistics

BATCH = 8  # windows that are run together, where memory does not limit it further


def calibrate(
    source: Source,
    tokens: Tokens,
    *,
    gradients: bool = True,
    max_memory: int | None = None,
    kept: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Statistics:
    """The statistics of `source` on windows of `tokens` (n_windows, n_ctx).

    max_memory: bytes that the run is to stay below. kept: where the sums so far are kept after every batch, and taken
    up from when they are of the same model and tokens; it is removed at the end. `progress` is called with steps done
    (`n_steps`). Raises UsageError where even one window needs more memory, and what `read_model` and `forward` raise.
    """
    model = read_model(Weights(source))
    check_tokens(model, tokens)
    batch = _batch(model, tokens, max_memory, threads, gradients)
    identity = _identity(source, tokens, gradients)
    statistics = _taken_up(kept, identity, source, tokens)
    done = statistics.n_tokens // tokens.shape[1]
    per_batch = n_steps(source, 1, gradients=gradients)
    progress(-(-done // batch) * per_batch)
    for first in range(done, len(tokens), batch):
        part = tokens[first : first + batch]
        run = _forward if not gradients else _there_and_back
        run(model, part, first, statistics, _Running(threads, progress))
        statistics.n_tokens += part.size
        if kept is not None:
            save_checkpoint(kept, identity, statistics)
    if kept is not None:
        kept.unlink(missing_ok=True)
    source.check_unchanged()
    return statistics


def n_steps(source: Source, n_batches: int, *, gradients: bool) -> int:
    """Steps that `progress` counts: layers, and with gradients the way back and the head."""
    n_layers = read_architecture(source).n_layers
    return n_batches * (2 * n_layers + 1 if gradients else n_layers)


def n_batches(source: Source, tokens: Tokens, *, gradients: bool, max_memory: int | None, threads: int | None) -> int:
    """How many batches `calibrate` will run."""
    return -(-len(tokens) // _batch(read_model(Weights(source)), tokens, max_memory, threads, gradients))


def _batch(model: RunnableModel, tokens: Tokens, max_memory: int | None, threads: int | None, gradients: bool) -> int:
    if max_memory is None:
        return min(BATCH, len(tokens))
    fit, least = batch_windows(model, tokens.shape[1], max_memory, n_threads(threads), gradients)
    if fit < 1:
        what = f"--max-memory {format_size(max_memory)} is too little for one window; it takes {format_size(least)}"
        raise UsageError(f"{what}, less with a smaller --window or fewer --threads")
    return min(fit, len(tokens))


@dataclass(frozen=True, slots=True)
class _Running:
    threads: int | None
    progress: Callable[[int], None]


class _Collector:
    """A sampler for each window; sums are added in the order of the windows, whatever the threads did."""

    def __init__(self, statistics: Statistics, n_windows: int, progress: Callable[[int], None]) -> None:
        self.statistics, self.progress = statistics, progress
        self.samplers = [SquareSummer() for _ in range(n_windows)]

    def watch(self, window: int) -> SquareSummer:
        return self.samplers[window]

    def collect(self, prefix: str = "") -> None:
        for i, sampler in enumerate(self.samplers):
            self.statistics.add(prefix, sampler.sums)
            self.samplers[i] = SquareSummer()
        self.progress(1)

    def done(self, layer: Layer) -> None:
        self.collect(f"blk.{layer.index}.")


def _forward(model: RunnableModel, tokens: Tokens, first: int, statistics: Statistics, running: _Running) -> None:
    collector = _Collector(statistics, len(tokens), running.progress)
    forward(model, tokens, hook=collector.watch, on_layer=collector.done, threads=running.threads)


def _there_and_back(
    model: RunnableModel, tokens: Tokens, first: int, statistics: Statistics, running: _Running
) -> None:
    threads = running.threads
    collector = _Collector(statistics, len(tokens), running.progress)
    with Checkpoints() as checkpoints:
        x = forward(model, tokens, checkpoints=checkpoints, on_layer=lambda _: running.progress(1), threads=threads)
        output_gradient(model, x, first=first, hook=collector.watch, threads=threads)
        collector.collect()
        backward(model, x, checkpoints, hook=collector.watch, on_layer=collector.done, threads=threads)
    squares = embedding_gradient(model, tokens, x)[1].sum(axis=0, dtype=np.float64)
    statistics.add("", {(LOOKUP, None): SquareSums(tokens.size, gradients=squares)})


def _identity(source: Source, tokens: Tokens, gradients: bool) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()
    files = [(f.status.st_size, f.status.st_mtime_ns) for f in source.opened]
    return json.dumps([source.header_sha256, files, digest, list(tokens.shape), gradients])


def _taken_up(path: Path | None, identity: str, source: Source, tokens: Tokens) -> Statistics:
    """What was kept of the same run, or sums of nothing."""
    n_windows, n_ctx = tokens.shape
    found = None if path is None or not path.exists() else load_checkpoint(path, identity, source, n_ctx)
    return found if found is not None and found.n_tokens <= n_windows * n_ctx else Statistics(0, n_ctx)
