"""Measurement of a stage: the moments of its inputs, the ridges of its targets, and held-out inputs for the check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from requant.common.threads import run_indexed
from requant.conversion.compensation.encoding import Block, CheckPart, MatrixWork
from requant.conversion.compensation.memory import BATCH
from requant.conversion.compensation.moments import CHECK, Moments, add_squares, mirror, split_windows
from requant.conversion.compensation.stages import Inputs, Stage, Stream, read_inputs
from requant.conversion.compensation.targets import choose_ridges, find_feedback, run_alone, sample_rows
from requant.model.forward.layer import Layer
from requant.model.forward.passes import RunnableModel, apply_output_norm
from requant.model.forward.side_inputs import LayerEmbedding
from requant.model.forward.tape import Array, Node

_LEAST_SHARE = 4  # an expert with fewer tokens than this part of its columns is rounded plainly

# inputs of a window in the original and in the quantized model, and what the residual stream of the latter lacks
Pair = tuple[Array, Array, Array]
ReadRows = Callable[[Array], Array]  # row numbers -> these rows of a matrix


class PairReader(Protocol):
    """The inputs of matrices in both models."""

    def read(self, window: int) -> Pair:
        """Return the inputs of one window."""


@dataclass(frozen=True, slots=True)
class StageRun:
    """A stage of a layer, run in both models; layers and streams: of the original and of the quantized one."""

    stage: Stage
    layers: tuple[Layer, Layer]
    streams: Sequence[Stream]
    embedding: LayerEmbedding | None

    def inputs(self, window: int) -> tuple[Inputs, Inputs]:
        """Return the inputs of a window in both models."""
        first, second = zip(self.layers, self.streams, strict=True)
        return tuple(read_inputs(self.stage, *each, window, self.embedding) for each in (first, second))  # type: ignore[return-value]

    def read(self, window: int) -> Pair:
        """Return the inputs of a window, for a stage of single matrices."""
        own, other = self.inputs(window)
        lacking = own.stream - other.stream
        lacking /= np.float32(self.layers[0].architecture.residual_scale)
        return own.by_matrix[None][0], other.by_matrix[None][0], lacking


@dataclass(frozen=True, slots=True)
class OutputRun:
    """The inputs of the output matrix: the streams behind the last layer through the output norm."""

    model: RunnableModel
    norm: Array
    streams: Sequence[Stream]

    def read(self, window: int) -> Pair:
        """Return the inputs of a window; nothing is added to the stream behind it."""
        own, other = (apply_output_norm(self.model, Node(s.x[window]), self.norm).value for s in self.streams)
        return own, other, np.zeros((len(own), 0), own.dtype)


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows of matrices by name, of which those in `writers` add to the residual stream; a: weights of all tokens.

    columns: the blocks that have moments of their own. A block's target is for its own inputs; what the stream lacks
    is taken up only where there is one.
    """

    rows: Mapping[str, tuple[int, ReadRows]]  # how many, and how they are read
    writers: frozenset[str]
    a: Array
    columns: Sequence[slice]


def measure_dense(reader: PairReader, measured: Measured, threads: int | None) -> dict[str, MatrixWork]:
    """Return how each of the matrices, which share their inputs, is to be encoded."""
    (first, second), parts = _sum_halves(reader, measured, threads)
    for moments in (*first, *second):
        mirror(moments.h)
    wanted, names = list[list[list[Array]]](), list(measured.rows)
    for name in names:
        n, read = measured.rows[name]
        sampled = sample_rows(n)
        rows = read(sampled)
        halves = [[run_alone(partial(m.wanted, rows, name, sampled)) for m in half] for half in (first, second)]
        wanted.append(halves)
    for i, moments in enumerate(first):
        moments.add_target(second[i])
    ridges = choose_ridges([[m.h for m in half] for half in (first, second)], wanted, threads)
    blocks = []
    for moments in first:
        moments.h += second.pop(0).h  # which nothing else holds, so that its memory serves the factor
        blocks.append(Block(moments, find_feedback(moments.h)))
    work = {}
    for name, ridge in zip(names, ridges, strict=True):
        own = [part if name in measured.writers else CheckPart(part.y, part.x, part.a) for part in parts]
        work[name] = MatrixWork(blocks, name, own, ridge=ridge)
    return work


def _sum_halves(
    reader: PairReader, measured: Measured, threads: int | None
) -> tuple[list[list[Moments]], list[CheckPart]]:
    """Return the moments of both halves of the windows by block, and the inputs of those for the check."""
    n = len(measured.a)
    which, parts = split_windows(n), list[CheckPart]()
    writers = measured.writers if len(measured.columns) == 1 else ()
    n_rows = {name: measured.rows[name][0] for name in writers}
    halves = [[Moments.zeros(at, n_rows) for at in measured.columns] for _ in range(2)]
    for first in range(0, n, BATCH):
        windows = range(first, min(first + BATCH, n))
        with closing(run_indexed(lambda i: reader.read(windows[i]), len(windows), threads)) as found:  # noqa: B023
            pairs = dict(zip(windows, found, strict=True))
        for part in (0, 1, CHECK):
            chosen = [w for w in windows if which[w] == part]
            if not chosen:
                continue
            x, y, lacking = (np.concatenate([pairs[w][i] for w in chosen]) for i in range(3))
            a = measured.a[chosen].reshape(-1, 1)
            if part == CHECK:
                parts.append(CheckPart(y, x, a, lacking))
                continue
            for moments in halves[part]:
                moments.add(a, (x, y, lacking), threads)
    return halves, parts


def measure_tied(normed: Array, a: Array, lookup: Array, columns: Sequence[slice], threads: int | None) -> MatrixWork:
    """Return how an embedding is to be encoded that gives the logits too.

    normed: its inputs as the output matrix (n_windows, n_ctx, n_embd); a: weights of tokens. lookup: (n_embd,), the
    squared gradients at the rows that are looked up, in the same unit, summed over tokens.
    """
    which, parts = split_windows(len(a)), list[CheckPart]()
    sums = [np.zeros((at.stop - at.start,) * 2, np.float32) for at in columns]
    for part, y, weights in zip(which, normed, a, strict=True):
        if part == CHECK:
            parts.append(CheckPart(y, y, weights[:, None]))
            continue
        for at, h in zip(columns, sums, strict=True):
            add_squares(h, weights[:, None], y[:, at], threads)
    shares = [np.float32(np.mean(found)) for found in (which != CHECK, which == CHECK)]
    per_row, blocks = lookup.astype(np.float32), []
    for at, h in zip(columns, sums, strict=True):
        mirror(h)
        h[np.diag_indices(len(h))] += per_row[at] * shares[0]
        blocks.append(Block(Moments(at, h), find_feedback(h)))
    return MatrixWork(blocks, parts=parts, lookup=per_row * shares[1])


def measure_several(
    run: StageRun, a: Array, n_matrices: int, columns: Sequence[slice], threads: int | None
) -> Iterator[MatrixWork]:
    """Yield how each expert's (or head's) matrix is to be encoded: without a target, its moments near those of all.

    An expert of few tokens gets the moments (N h + n h_all) / (N + n), of means over its N tokens and over all.
    """
    which = split_windows(len(a))
    seen = [_Seen() for _ in range(n_matrices)]
    with closing(run_indexed(run.inputs, len(a), threads)) as found:
        for window, (own, other) in enumerate(found):
            for matrix, (y, tokens) in other.by_matrix.items():
                assert matrix is not None
                at = np.arange(a.shape[1]) if tokens is None else tokens
                if which[window] == CHECK:
                    x = _match(own.by_matrix.get(matrix), at, y)
                    seen[matrix].parts.append(CheckPart(y, x, a[window, at].reshape(-1, 1)))
                else:
                    seen[matrix].inputs.append((y, a[window, at].reshape(-1, 1)))
    totals = [np.zeros((block.stop - block.start,) * 2, np.float32) for block in columns]
    for each in seen:
        each.join(columns[-1].stop)
        for block, total in zip(columns, totals, strict=True):
            add_squares(total, each.a, each.y[:, block], threads)
    n = np.float32(sum(len(each.y) for each in seen))
    means = [np.divide(total, n, out=total) for total in totals]
    for each in seen:
        yield each.work(columns, means, threads)


def _match(found: tuple[Array, Array | None] | None, tokens: Array, y: Array) -> Array:
    """Return the inputs in the original model of these tokens; of a token that it sends elsewhere, those in `y`."""
    if found is None:
        return y
    x, at = found
    own = tokens if at is None else at
    _, here, there = np.intersect1d(tokens, own, assume_unique=True, return_indices=True)
    matched = y.copy()
    matched[here] = x[there]
    return matched


class _Seen:
    """The inputs of one expert: of each window in the quantized model with the weights of tokens, and for the check."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Array, Array]] = []
        self.parts: list[CheckPart] = []

    def join(self, n: int) -> None:
        """Join the inputs of all windows to y (n_tokens, n) and their weights a (n_tokens, 1)."""
        none = np.zeros((0, n), np.float32), np.zeros((0, 1), np.float32)
        self.y, self.a = (np.concatenate(part) for part in zip(none, *self.inputs, strict=True))
        self.inputs.clear()

    def work(self, columns: Sequence[slice], means: Sequence[Array], threads: int | None) -> MatrixWork:
        """Return how the matrix is to be encoded; means: the moments over all experts, per token, of each block."""
        n, blocks = columns[-1].stop, list[Block]()
        if len(self.y) * _LEAST_SHARE < n or not self.parts:
            return MatrixWork(parts=self.parts)
        for at, mean in zip(columns, means, strict=True):
            h = mean * np.float32(n)
            add_squares(h, self.a, self.y[:, at], threads)
            mirror(h)
            blocks.append(Block(Moments(at, h), find_feedback(h)))
        return MatrixWork(blocks, parts=self.parts)
