"""What the encoders make of weights that never change, as hashes: bound to the encoders' version by encodings.json."""

import hashlib

import numpy as np
import real_models

from requant.container.source import open_source
from requant.formats import FORMATS, BlockFormat, Effort, codec

N_ROWS = 12


def weights() -> tuple[np.ndarray, np.ndarray]:
    """(N_ROWS, 768) float32 of the tiny model, the last ones tiny, large, spiky and zero; and importance (768,)."""
    with open_source(real_models.TINY) as source:
        x = source.read_rows(source.tensor("blk.0.ffn_down.weight"), 0, N_ROWS + 1).view("<f2").astype(np.float32)
    importance = x[N_ROWS] ** 2
    importance[:64] = 0
    x = x[:N_ROWS]
    x[-4] *= np.float32(2.0**-12)
    x[-3] *= np.float32(2.0**10)
    x[-2, 5::37] *= np.float32(64)
    x[-1] = 0
    return x, importance


def digests() -> dict[str, str]:
    """For every type that is written: the hash of its bytes at each effort, unweighted and weighted."""
    x, importance = weights()
    return {fmt.name: _digest(fmt, x, importance) for fmt in FORMATS.values() if fmt.can_encode}


def _digest(fmt: BlockFormat, x: np.ndarray, importance: np.ndarray) -> str:
    found = hashlib.sha256()
    for effort in Effort:
        for own in (None, importance):
            found.update(encoded(fmt, x, own, effort).tobytes())
    return found.hexdigest()[:16]


def encoded(fmt: BlockFormat, x: np.ndarray, importance: np.ndarray | None, effort: int) -> np.ndarray:
    """(N_ROWS, row_bytes) uint8."""
    return codec.quantize(x, fmt, importance, Effort(effort))
