"""BlockFormat, the facts of a ggml type; its kernels are imported on first use."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from requant.formats.jit import Kernel

DEVICE_ALIGNMENT = 128  # bytes, of each tensor in a CUDA buffer (ggml_backend_cuda_buffer_type_get_alignment)
HOST_ALIGNMENT = 32  # bytes, of each tensor in a CPU buffer (TENSOR_ALIGNMENT in ggml-backend.cpp)


class Effort(IntEnum):
    """The effort of an encoder's search, time against error; its value is an index into a format's table of budgets."""

    FAST = 0
    DEFAULT = 1
    BEST = 2


class Kernels(Protocol):
    """The interface of a format's module.

    LAYOUT: the block as a structured dtype, field by field ggml's C struct.
    decode(blocks, out): (n,) LAYOUT -> (n, N) float32, bit for bit what ggml's `to_float` gives.
    encode(x, importance, blocks, effort): (n, N) float32 and (k, N) float32 -> (n,) LAYOUT; block b is weighted by
    importance[b % k], so k is 1, or the number of blocks in a row. effort: an Effort as int.
    A type that feedback.py writes has encode in two steps, fit(x, importance, effort) and pack(found, blocks), and the
    LEVELS of its codes (encoders/fit.py) or the WORDS and SHAPE of its codebook (encoders/grid_search.py).
    """

    LAYOUT: np.dtype[np.void]
    decode: Kernel
    encode: Kernel


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A ggml type: its name and id, the weights and bytes of one block, and whether requant reads and writes it.

    gaussian_rmse: relative error of our encoder on normally distributed weights (scripts/bench/bench_formats.py).
    """

    name: str
    type_id: int
    block_weights: int
    block_bytes: int
    can_decode: bool = True
    can_encode: bool = False
    gaussian_rmse: float = 0.0

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block_weights

    def divides(self, n_per_row: int) -> bool:
        """Return whether a row of `n_per_row` weights is a whole number of blocks."""
        return n_per_row % self.block_weights == 0

    def n_bytes(self, n_weights: int) -> int:
        """Bytes of `n_weights` weights, which must be whole blocks."""
        assert self.divides(n_weights), (self.name, n_weights)
        return n_weights // self.block_weights * self.block_bytes

    @property
    def kernels(self) -> Kernels:
        """The module `requant.formats.<name>`, imported with Numba on first use."""
        assert self.can_decode, self.name
        return importlib.import_module(f"requant.formats.{self.name.lower()}")
