"""The fixed value tables of the IQ and FP4 formats: codebooks, sign bytes and non-linear levels.

Kernels take them as constants. The codebooks are ggml's iq*_grid arrays, kept in grids.npz, which
scripts/make/make_grids.py writes; a codeword holds the magnitudes (IQ1: the values) of 8 or 4 neighbouring weights.
Source: ggml-common.h.
"""

from pathlib import Path

import numpy as np

with np.load(Path(__file__).with_name("grids.npz"), allow_pickle=False) as _tables:
    IQ1_S = _tables["iq1_s"]  # (2048, 8) int8: -1, 0, 1; IQ1_M too
    IQ2_XXS = _tables["iq2_xxs"]  # (256, 8) uint8: 8, 25, 43
    IQ2_XS = _tables["iq2_xs"]  # (512, 8) uint8: 8, 25, 43
    IQ2_S = _tables["iq2_s"]  # (1024, 8) uint8: 8, 25, 43
    IQ3_XXS = _tables["iq3_xxs"]  # (256, 4) uint8: 4, 12, 20, 28, 36, 44, 52, 62
    IQ3_S = _tables["iq3_s"]  # (512, 4) uint8: 1, 3, 5 ... 15

_parity = np.array([bin(k).count("1") & 1 for k in range(128)], np.uint8)
EVEN_SIGNS = np.arange(128, dtype=np.uint8) | (
    _parity << np.uint8(7)
)  # ksigns_iq2xs: bit 7 makes the count of ones even

IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
FP4_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # E2M1, doubled; no -0
IQ1_DELTA = np.float32(0.125)
