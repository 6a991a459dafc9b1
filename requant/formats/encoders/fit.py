"""Fit, the scales and codes of blocks before they are packed, and Levels, the values of a format's codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

LINEAR, IQ4, FP4 = 0, 1, 2  # kinds of levels: whole numbers, those of IQ4_LEVELS, those of FP4_LEVELS


class Levels(NamedTuple):
    """The levels of a format, `low` (code 0) to `high` where they are whole numbers, and its integer scales."""

    kind: int
    low: int = 0
    high: int = 0
    scale_low: int = 1  # integer scales; 1 to 1 where a block has none
    scale_high: int = 1
    min_high: int = 0  # integer minima 0 .. min_high


class Fit(NamedTuple):
    """Blocks whose weights are (d * scale) * level - dmin * min, unpacked.

    d, dmin: (n,) uint16, binary16 bits; scales, mins: (n, n_subs) integers; codes: (n, n_subs, sub) uint8. FP4 has no
    d: its scales are small floats as integers, whose values are in steps, (n, n_subs) float32.
    """

    d: NDArray[np.uint16] | None
    scales: NDArray[Any]
    codes: NDArray[np.uint8]
    dmin: NDArray[np.uint16] | None = None
    mins: NDArray[np.uint8] | None = None
    steps: NDArray[np.float32] | None = None


def encoder(fit: Callable[..., Any], pack: Callable[..., None]) -> Callable[..., None]:
    """Join fit(x, importance, effort) and pack(found, blocks) to encode(x, importance, blocks, effort)."""

    def encode(x: Any, importance: Any, blocks: Any, effort: int) -> None:
        pack(fit(x, importance, effort), blocks)

    return encode
