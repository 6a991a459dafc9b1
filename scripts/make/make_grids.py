"""Writes the IQ codebooks, taken from the tables of the gguf package, and the neighbours of their cells.

python scripts/make/make_grids.py
"""

from pathlib import Path

import numpy as np
from gguf import quants

from requant.formats.encoders.neighbours import STORED, find_neighbours

TARGET = Path(__file__).parents[2] / "requant" / "formats" / "grids.npz"
CODEBOOKS = {"iq1_s": "i1", "iq2_xxs": "u1", "iq2_xs": "u1", "iq2_s": "u1", "iq3_xxs": "u1", "iq3_s": "u1"}


def codebook(name: str, dtype: str) -> np.ndarray:
    """(n_codewords, 8 or 4): the values of each codeword, in ggml's order."""
    source = getattr(quants, name.upper())
    source.init_grid()
    values = source.grid.reshape(source.grid_shape)
    exact = values.astype(dtype)
    assert np.array_equal(exact, values), name
    return exact


def main() -> None:
    codebooks = {name: codebook(name, dtype) for name, dtype in CODEBOOKS.items()}
    np.savez_compressed(TARGET, **codebooks)
    np.savez_compressed(STORED, **{name: find_neighbours(words) for name, words in codebooks.items()})
    for path in (TARGET, STORED):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
