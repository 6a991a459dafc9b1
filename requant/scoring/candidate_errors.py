"""Errors of candidates: blocks of rows encoded in every candidate type, their errors weighted by F.

Blocks are encoded by threads, or by the workers of a cluster; a block takes its F along, at most 2 MiB, or vectors
where F has factors, and the weights are read where it is encoded. The losses are the same wherever they are measured,
to the last bit on machines of one kind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from requant.common.cluster import Cluster
from requant.common.threads import run_indexed
from requant.container.remote import RemoteReader, RemoteSource
from requant.container.source import Source, SourceTensor
from requant.errors import quote
from requant.formats import BlockFormat, Effort, codec
from requant.formats.codec import Floats

BlockErrors = tuple[NDArray[np.float64], list[codec.Errors]]  # by format: the weighted error, and codec.row_errors


@dataclass(frozen=True, slots=True)
class WeightRows:
    """`n` rows of a matrix from the tensor's row `first` on; the model multiplies their weights by `factor`."""

    tensor: SourceTensor
    first: int
    n: int
    factor: np.float32

    @property
    def shape(self) -> tuple[int, int]:
        """(n_rows, n_per_row)."""
        return self.n, self.tensor.n_per_row

    def decode(self, source: Source | RemoteReader) -> Floats:
        """Read the weights of `source`, not yet multiplied by the factor."""
        return codec.dequantize(source.read_rows(self.tensor, self.first, self.n), self.tensor.format)


@dataclass(frozen=True, slots=True)
class FisherFactors:
    """F in factors: the product of a vector over rows and one over columns, plus a vector added to every row."""

    rows: Floats | None
    columns: Floats | None
    every: Floats | None

    def expand(self, shape: tuple[int, int]) -> Floats:
        """Return F itself, (n_rows, n_per_row)."""
        found = np.zeros(shape, np.float32)
        if self.rows is not None and self.columns is not None:
            found += np.outer(self.rows, self.columns)
        if self.every is not None:
            found += self.every
        return found


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows to encode in `formats`, each after division by its level; f: their F; importance: (n_per_row,) or None."""

    rows: WeightRows
    f: Floats | FisherFactors
    importance: Floats | None
    formats: tuple[BlockFormat, ...]
    levels: tuple[float, ...]
    effort: Effort


def measure_errors(
    source: Source,
    make_block: Callable[[int], RowBlock],
    n: int,
    threads: int | None,
    remote: tuple[Cluster, RemoteSource] | None,
) -> list[BlockErrors]:
    """Return the errors of a tensor's blocks 0 to n - 1, encoded in threads of this process.

    remote: a cluster that encodes them instead, and the tensor's file as its workers read it.
    """
    if remote is None:
        with closing(run_indexed(lambda i: _measure_block(source, make_block(i)), n, threads)) as results:
            return list(results)
    cluster, file = remote
    with closing(run_indexed(make_block, n, threads)) as blocks:
        items = ((file, block) for block in blocks)
        named = cluster.in_order(_measure_on_worker, items, lambda item: f"tensor {quote(item[1].rows.tensor.name)}")
        with closing(named) as results:
            return list(results)


def _measure_on_worker(item: tuple[RemoteSource, RowBlock]) -> BlockErrors:
    file, block = item
    with RemoteReader(file) as source, np.errstate(over="ignore", invalid="ignore"):
        return _measure_block(source, block)


def _measure_block(source: Source | RemoteReader, block: RowBlock) -> BlockErrors:
    x = block.rows.decode(source)
    f = block.f.expand(block.rows.shape) if isinstance(block.f, FisherFactors) else block.f
    losses, errors = np.zeros(len(block.formats)), []
    for i, (fmt, level) in enumerate(zip(block.formats, block.levels, strict=True)):
        y = codec.reconstruct(x, fmt, block.importance, block.effort, level)
        errors.append(codec.row_errors(x, y, block.importance))
        y -= x
        losses[i] = np.einsum("ij,ij,ij->", f, y, y) * float(block.rows.factor) ** 2
    return losses, errors
