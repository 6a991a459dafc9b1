"""Writes requant/formats/grids.npz: the IQ codebooks, taken from the tables of the gguf package.

python scripts/make_grids.py
"""

from pathlib import Path

import numpy as np
from gguf import quants

TARGET = Path(__file__).parent.parent / "requant" / "formats" / "grids.npz"
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
    np.savez_compressed(TARGET, **{name: codebook(name, dtype) for name, dtype in CODEBOOKS.items()})
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
