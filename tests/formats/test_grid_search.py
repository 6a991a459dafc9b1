"""What the search over codewords is to find, apart from what every encoder is held to."""

import ggml
import numpy as np
import pytest

from requant.formats import by_name, codec, grids

CODEBOOKS = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M")
each_codebook = pytest.mark.parametrize("name", CODEBOOKS)


def rows(seed: int, n_rows: int = 16) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, (n_rows, 512)) * 0.02).astype(np.float32)


def recoded(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    fmt = by_name(name)
    assert fmt is not None
    return codec.dequantize(codec.quantize(x, fmt, importance), fmt)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(("name", "unit", "sub"), [("IQ3_S", 1.0, 32), ("IQ2_S", 0.125, 16)])
def test_hardly_any_word_of_the_whole_codebook_would_be_better(name, unit, sub, skewed):
    fmt, x = by_name(name), rows(1)
    importance = (np.random.default_rng(2).gamma(0.5, 1.0, 512) + 1e-3).astype(np.float32) if skewed else None
    data = codec.quantize(x, fmt, importance)
    blocks = data.reshape(-1).view(fmt.kernels.LAYOUT)
    nibbles = np.stack([blocks["scales"] & 15, blocks["scales"] >> 4], 2).reshape(len(blocks), -1)
    scales = blocks["d"].view(np.float16).astype(np.float64)[:, None] * unit * (1 + 2.0 * nibbles)
    words = getattr(grids, name).astype(np.float64)
    dim = words.shape[1]
    scale = np.repeat(scales.ravel(), sub // dim)[:, None]
    w = np.tile(np.ones(512) if importance is None else importance, len(x)).reshape(-1, dim)
    v = np.abs(x.reshape(-1, dim)).astype(np.float64)
    least = (w * v**2).sum(1) + (scale * (scale * (w @ (words**2).T) - 2 * (w * v) @ words.T)).min(1)
    got = (w * (v - np.abs(codec.dequantize(data, fmt).reshape(-1, dim))) ** 2).sum()
    assert least.sum() <= got <= least.sum() * (1.04 if skewed else 1.01)


@each_codebook
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.1, 0.3])
def test_magnitudes_much_alike_are_no_worse_than_in_ggml(name, spread):
    rng = np.random.default_rng(3)
    x = (rng.normal(1.0, spread, (8, 512)) * rng.choice([-1, 1], (8, 512))).astype(np.float32)
    fmt = by_name(name)
    peer = np.frombuffer(ggml.quantize_chunk(fmt.type_id, x), np.uint8).reshape(len(x), -1)
    error, reference = ((y - x) ** 2 for y in (recoded(name, x), codec.dequantize(peer, fmt)))
    assert error.sum() <= 1.02 * reference.sum()


@each_codebook
@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e5, 1e19, 3e38])
def test_no_scale_is_ever_nan_or_infinite(name, size):
    x = (np.random.default_rng(4).uniform(-1, 1, (4, 512)) * size).astype(np.float32)
    half = np.where(np.arange(512) % 3, 0, 1e30).astype(np.float32)
    for importance in (None, half, np.full(512, 1e-30, np.float32)):
        assert np.isfinite(recoded(name, x, importance)).all()


@each_codebook
def test_a_mirrored_row_has_the_same_error(name):
    x = rows(5)
    here, there = (float(((recoded(name, y) - y) ** 2).sum()) for y in (x, -x))
    assert there == pytest.approx(here, rel=0.02 if name.startswith("IQ1") else 0.005)


def test_importance_moves_the_error_away_from_the_columns_that_count():
    x, importance = rows(6), np.ones(512, np.float32)
    importance[::4] = 100
    for name in CODEBOOKS:
        flat, weighted = ((recoded(name, x, w) - x) ** 2 for w in (None, importance))
        assert weighted[:, ::4].sum() < 0.8 * flat[:, ::4].sum(), name
