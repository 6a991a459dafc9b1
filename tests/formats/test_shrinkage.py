"""Blocks of few bits keep more of their size than least squares leaves them."""

import numpy as np
import pytest

from requant.formats import by_name, codec
from requant.formats.encoders import shrinkage

RNG = np.random.default_rng(3)
X = (RNG.standard_normal((16, 512)) * 0.02).astype(np.float32)
IMPORTANCE = (RNG.gamma(1.0, 1.0, 512) + 0.1).astype(np.float32)


def kept(name, importance):
    """The projection of the encoded weights on the weights, over the energy of these."""
    fmt, w = by_name(name), np.ones(512) if importance is None else importance
    y = codec.dequantize(codec.quantize(X, fmt, importance), fmt)
    return (w * X * y).sum() / (w * X * X).sum()


@pytest.mark.parametrize("name", ["Q2_K", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"])
@pytest.mark.parametrize("importance", [None, IMPORTANCE])
def test_half_of_the_shrinkage_is_undone(name, importance, monkeypatch):
    mended = kept(name, importance)
    monkeypatch.setattr(shrinkage, "_scale", lambda halves, factors: None)
    shrunk = kept(name, importance)
    assert shrunk < mended < 1
    assert mended == pytest.approx(np.sqrt(shrunk), abs=0.01) or name.startswith("IQ1")  # there up to a limit


def test_what_is_exact_or_zero_is_left_alone():
    for name in ("Q2_K", "IQ2_S"):
        fmt = by_name(name)
        y = codec.dequantize(codec.quantize(X, fmt), fmt)
        blocks = codec.quantize(y, fmt).reshape(-1).view(fmt.kernels.LAYOUT)
        d = blocks["d"].copy()
        shrinkage.grow(
            codec.dequantize(blocks.view(np.uint8).reshape(16, -1), fmt).reshape(-1, 256),
            np.ones((1, 256), np.float32),
            blocks,
            fmt.kernels.decode,
            d,
        )
        assert np.array_equal(d, blocks["d"])
        zero = np.zeros((2, 256), np.float32)
        d = np.ones(2, np.uint16)
        shrinkage.grow(zero, np.ones((1, 256), np.float32), blocks[:2], fmt.kernels.decode, d)
        assert np.array_equal(d, np.ones(2, np.uint16))
