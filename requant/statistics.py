"""Statistics of a running model: sums of squared inputs and gradients of every matrix, with the tokens behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from requant.codec import Floats
from requant.model.forward.ops import Array
from requant.model.roles import is_experts, n_matrices

Sums = NDArray[np.float64]


@dataclass(slots=True)
class Sums2:
    """Of one matrix: sums over `count` tokens of squared inputs (n_per_row,) and gradients (n_rows,), 0 without."""

    count: int = 0
    inputs: Sums | float = 0.0
    gradients: Sums | float = 0.0

    def add(self, other: Sums2) -> None:
        """Add the sums over other tokens."""
        self.count += other.count
        self.inputs = self.inputs + other.inputs
        self.gradients = self.gradients + other.gradients


@dataclass(slots=True)
class Sampler:
    """A Watch of one window that sums squares; gradients: whether it also waits for them.

    kept: the inputs and gradients themselves, where `keep`, for whoever needs more than their sums.
    """

    keep: bool = False
    sums: dict[tuple[str, int | None], Sums2] = field(default_factory=dict)
    kept: dict[tuple[str, int | None], tuple[Array, Array]] = field(default_factory=dict)

    def inputs(self, name: str, expert: int | None, x: Array) -> None:
        """Sum x^2."""
        self.sums[name, expert] = Sums2(len(x), _squares(x))

    def gradients(self, name: str, expert: int | None, x: Array, g: Array) -> None:
        """Sum g^2."""
        self.sums[name, expert].gradients = _squares(g)
        if self.keep:
            self.kept[name, expert] = x, g


def _squares(x: Array) -> Sums:
    total: Sums = np.einsum("ij,ij->j", x, x).astype(np.float64)
    return total


@dataclass(slots=True)
class Statistics:
    """Sums by matrix, (tensor name, expert or None), over `n_tokens` tokens in windows of `n_ctx`."""

    n_tokens: int
    n_ctx: int
    matrices: dict[tuple[str, int | None], Sums2] = field(default_factory=dict)

    def add(self, prefix: str, sums: Mapping[tuple[str, int | None], Sums2]) -> None:
        """Add sums over some tokens, of tensors whose names follow on `prefix`."""
        for (name, expert), found in sums.items():
            self.matrices.setdefault((prefix + name, expert), Sums2()).add(found)

    def importance(self, name: str, shape: Sequence[int]) -> Floats | None:
        """(n_matrices, n_per_row) float32, the mean square of each column's inputs; None where none was seen.

        Matrices that no token reached have the mean of the others.
        """
        experts = is_experts(name, shape)
        found = [self.matrices.get((name, m if experts else None)) for m in range(n_matrices(shape) if experts else 1)]
        seen = [np.asarray(s.inputs) / s.count for s in found if s is not None and s.count]
        if not seen:
            return None
        mean = np.mean(seen, axis=0)
        rows = [np.asarray(s.inputs) / s.count if s is not None and s.count else mean for s in found]
        return np.array(rows, np.float32)
