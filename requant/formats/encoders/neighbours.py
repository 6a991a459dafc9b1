"""The codewords nearest to a point: NEAREST of them for each cell of a codebook's space.

A cell is a point whose weights are all levels of the codebook, as rounding weight by weight gives it. Its number has
the first weight on top: level_0 * n**(dim - 1) + level_1 * n**(dim - 2) + ... of n levels. The words are stored in
neighbours.npz, which scripts/make/make_grids.py writes: reading them takes 2 ms, finding them 10 to 400 ms.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from requant.formats import grids

# 16 candidates lose 0.01 % rmse against trying all words of IQ3_S, 1 % with very uneven importance; 8 lose 0.3 and 3 %
NEAREST = 16
STORED = Path(__file__).with_name("neighbours.npz")
_CHUNK = 512  # cells at a time: 4 MB of distances


def find_neighbours(words: NDArray[np.generic]) -> NDArray[np.uint16]:
    """Find the nearest of words (n_words, dim): (n_cells, NEAREST) uint16, nearest first, then by number."""
    exact = words.astype(np.float32)  # and so are the distances, below 2**24
    levels = np.unique(exact)
    n_words, dim = words.shape
    cells = levels[np.indices((len(levels),) * dim).reshape(dim, -1).T]
    found = np.empty((len(cells), NEAREST), np.uint16)
    for first in range(0, len(cells), _CHUNK):
        points = cells[first : first + _CHUNK]
        distance = (exact**2).sum(1) - 2 * (points @ exact.T) + (points**2).sum(1)[:, None]
        keys = distance.astype(np.int32) * n_words + np.arange(n_words, dtype=np.int32)
        found[first : first + _CHUNK] = np.sort(np.partition(keys, NEAREST - 1)[:, :NEAREST]) % n_words
    return found


class Neighbours(NamedTuple):
    """A codebook as the encoders use it: words of four weights by their values, words of eight by their levels."""

    near: NDArray[np.uint16]  # (n_cells, NEAREST) word numbers
    values: NDArray[np.int8]  # (n_cells, 4, NEAREST) of words of four
    codes: NDArray[np.uint16]  # (n_cells, NEAREST) of words of eight: three levels 0, 1, 2 in two bits each
    words: NDArray[np.float32]  # (n_words, dim), the codebook


@functools.cache
def neighbours(name: str) -> Neighbours:
    """Return the stored neighbours of the codebook grids.<name>."""
    with np.load(STORED, allow_pickle=False) as stored:
        near = stored[name.lower()]
    words = getattr(grids, name).astype(np.int8)
    if words.shape[1] == 4:
        return Neighbours(
            near, np.ascontiguousarray(words[near].transpose(0, 2, 1)), near[:0], words.astype(np.float32)
        )
    codes = np.searchsorted(np.unique(words), words).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
    return Neighbours(
        near, np.empty((0, 4, NEAREST), np.int8), codes.sum(1, dtype=np.uint16)[near], words.astype(np.float32)
    )
