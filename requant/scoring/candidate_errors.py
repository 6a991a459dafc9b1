"""Weighing: blocks of rows encoded as every candidate, their errors weighed by F, by threads or by a cluster's workers.

A block's F goes with it: made here, it is at most 2 MiB, or two vectors where it is their product. Weights are read by
whoever encodes them. The losses are the same wherever they are measured, to the last bit on machines of one kind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from requant.common.cluster import Cluster
from requant.common.threads import run_indexed
from requant.container.remote import Reader, RemoteSource
from requant.container.source import Source, SourceTensor
from requant.errors import quoted
from requant.formats import BlockFormat, Effort, codec
from requant.formats.codec import Floats

Tried = tuple[NDArray[np.float64], list[codec.Errors]]  # by format: the weighed error, and codec.row_errors


@dataclass(frozen=True, slots=True)
class Rows:
    """`n` rows of a matrix from the tensor's row `first` on; the model multiplies their weights by `factor`."""

    source: Source
    tensor: SourceTensor
    first: int
    n: int
    factor: np.float32

    @property
    def shape(self) -> tuple[int, int]:
        """(n_rows, n_per_row)."""
        return self.n, self.tensor.n_per_row

    def weights(self) -> Floats:
        """Their weights as the model sees them, read now."""
        x: Floats = codec.dequantize(self.source.read_rows(self.tensor, self.first, self.n), self.tensor.format)
        return x * self.factor


@dataclass(frozen=True, slots=True)
class Product:
    """F as the product of a vector over rows and one over columns, plus one that is the same in every row."""

    rows: Floats | None
    columns: Floats | None
    every: Floats | None

    def whole(self, shape: tuple[int, int]) -> Floats:
        """F itself, (n_rows, n_per_row)."""
        found = np.zeros(shape, np.float32)
        if self.rows is not None and self.columns is not None:
            found += np.outer(self.rows, self.columns)
        if self.every is not None:
            found += self.every
        return found


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows to be encoded in `formats`, each after division by its level; f: their F; importance: (n_per_row,) or None.

    factor: what the model multiplies the weights by.
    """

    tensor: SourceTensor
    first: int
    n: int
    f: Floats | Product
    factor: float
    importance: Floats | None
    formats: tuple[BlockFormat, ...]
    levels: tuple[float, ...]
    effort: Effort


def measure_errors(
    source: Source,
    make: Callable[[int], RowBlock],
    n: int,
    threads: int | None,
    there: tuple[Cluster, RemoteSource] | None,
) -> list[Tried]:
    """What comes of blocks 0 to n - 1 of a tensor, which `make` makes, in threads of this process.

    there: they are encoded by a cluster instead, whose workers read the file of the tensor.
    """
    if there is None:
        with closing(run_indexed(lambda i: _tried(source, make(i)), n, threads)) as results:
            return list(results)
    cluster, origin = there
    with closing(run_indexed(make, n, threads)) as blocks:
        items = ((origin, block) for block in blocks)
        with closing(cluster.in_order(_tried_there, items, _name)) as results:
            return list(results)


def _name(item: tuple[RemoteSource, RowBlock]) -> str:
    return f"tensor {quoted(item[1].tensor.name)}"


def _tried_there(item: tuple[RemoteSource, RowBlock]) -> Tried:
    """On a worker."""
    origin, block = item
    with Reader(origin) as source, np.errstate(over="ignore", invalid="ignore"):
        return _tried(source, block)


def _tried(source: Source | Reader, block: RowBlock) -> Tried:
    x = codec.dequantize(source.read_rows(block.tensor, block.first, block.n), block.tensor.format)
    f = block.f.whole((block.n, block.tensor.n_per_row)) if isinstance(block.f, Product) else block.f
    losses, errors = np.zeros(len(block.formats)), []
    for i, (fmt, level) in enumerate(zip(block.formats, block.levels, strict=True)):
        y = codec.reconstruct(x, fmt, block.importance, block.effort, level)
        errors.append(codec.row_errors(x, y, block.importance))
        y -= x
        losses[i] = np.einsum("ij,ij,ij->", f, y, y) * block.factor**2
    return losses, errors
