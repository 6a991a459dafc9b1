"""The searches over uneven levels: against the whole table, against every scale there is, and on hopeless rows."""

import ggml
import numba
import numpy as np
import pytest
from compare import assert_same_floats
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.formats import Effort, by_name
from requant.formats.base import BlockFormat
from requant.formats.encoders import iq4, levels
from requant.formats.grids import FP4_LEVELS, IQ4_LEVELS

IQ4 = IQ4_LEVELS.astype(np.float32)
FP4 = FP4_LEVELS.astype(np.float32)
HALF_SCALED = ("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "Q1_0")


@numba.njit
def _apply(function, values, out):
    for i in range(values.size):
        out[i] = function(values[i])


def apply(function, values: np.ndarray, dtype: type) -> np.ndarray:
    out = np.empty(values.size, dtype)
    _apply(function, values.astype(np.float32), out)
    return out


def encode(fmt: BlockFormat, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """x: (n_blocks, N) -> ggml's reading of what was encoded, the same shape."""
    weights = np.ones((1, fmt.block_weights), np.float32) if importance is None else importance
    blocks = np.zeros(len(x), fmt.kernels.LAYOUT)
    fmt.kernels.encode(x, weights, blocks, Effort.DEFAULT.value)
    return ggml.decode(fmt.type_id, blocks.view(np.uint8)).reshape(x.shape)


def errors(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (w * (x.astype(np.float64) - y) ** 2).sum(1)


def test_every_value_goes_to_the_nearest_level_of_iq4():
    v = np.arange(-140, 140, 0.25)
    code, level = apply(iq4.code_of_iq4, v, np.uint8), apply(iq4.level_of_iq4, v, np.float32)
    assert np.array_equal(level, IQ4[code])
    assert np.array_equal(np.abs(level - v), np.abs(IQ4 - v[:, None]).min(1))
    tied = np.abs(IQ4[np.minimum(code + 1, 15)] - v) == np.abs(level - v)
    assert not (tied & (code < 15)).any()  # the upper one, as in ggml


def test_every_value_goes_to_the_nearest_level_of_fp4():
    v = np.concatenate([np.arange(-20, 20, 0.125), [1e-40, -1e-40, 1e30, -3.4e38]])
    code = apply(levels.code_of_fp4, v, np.uint8)
    assert np.array_equal(np.abs(FP4[code] - v), np.abs(FP4 - v[:, None]).min(1))
    assert np.array_equal(apply(levels.level_of_fp4, np.abs(v), np.float32), np.abs(FP4[code]))
    assert not (code == 8).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_mxfp4_takes_the_best_of_all_exponents(weighted):
    rng = np.random.default_rng(1)
    x = (rng.standard_t(3, (500, 32)) * np.exp(rng.normal(0, 5, (500, 1)))).astype(np.float32)
    w = rng.gamma(0.5, 1, x.shape).astype(np.float32) + np.float32(1e-3) if weighted else np.ones((1, 32), np.float32)
    ours = errors(x, encode(by_name("MXFP4"), x, w), w)
    scales = 2.0 ** (np.floor(np.log2(np.abs(x).max(1))) + np.arange(-6, 4)[:, None])[:, :, None]
    nearest = FP4[np.abs(FP4 - (x / scales)[..., None]).argmin(-1)] * scales
    best = np.min([errors(x, y, w) for y in nearest], axis=0)
    assert ours.sum() <= 1.001 * best.sum()
    assert np.mean(ours > 1.0001 * best) < 0.05  # with importance, the best may clip further than is tried


def test_nvfp4_reaches_scales_that_ggml_never_writes():
    x = np.zeros((128, 64), np.float32)
    x[:, ::16] = 6 * np.linspace(256, 416, 128)[:, None]
    assert np.abs(encode(by_name("NVFP4"), x) / np.where(x == 0, 1, x) - (x != 0)).max() < 0.05


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ternary_scale_is_close_to_the_best_there_is(name, weighted):
    rng = np.random.default_rng(2)
    x = (rng.standard_t(5, (200, 256)) * 0.02).astype(np.float32)
    w = rng.gamma(0.5, 1, (200, 256)).astype(np.float32) if weighted else np.ones((200, 256), np.float32)
    order = np.argsort(-np.abs(x), axis=1)  # the best codes are the signs of the largest magnitudes
    sorted_w = np.take_along_axis(w, order, 1)
    products = np.cumsum(sorted_w * np.take_along_axis(np.abs(x), order, 1), axis=1, dtype=np.float64)
    best = (w * x.astype(np.float64) ** 2).sum(1) - (products**2 / np.cumsum(sorted_w, axis=1)).max(1)
    assert errors(x, encode(by_name(name), x, w), w).sum() <= 1.01 * best.sum()


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_0"])
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.01, 1))
@settings(max_examples=10, deadline=None)
def test_ternary_weights_are_kept_exactly(name, seed, share):
    rng = np.random.default_rng(seed)
    fmt, scale = by_name(name), np.float32(0.125)
    trits = rng.choice([-1, 0, 1], (8, fmt.block_weights), p=[share / 2, 1 - share, share / 2]).astype(np.float32)
    assert_same_floats(encode(fmt, trits * scale) + 0, trits * scale + 0, name)


def test_one_bit_has_the_scale_of_least_weighted_error():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(50, 128)).astype(np.float32)
    w = rng.gamma(0.5, 1, x.shape).astype(np.float32)
    y = encode(by_name("Q1_0"), x, w)
    assert np.array_equal(y > 0, x >= 0)
    assert np.allclose(np.abs(y[:, 0]), (w * np.abs(x)).sum(1) / w.sum(1), rtol=1e-3)


@pytest.mark.parametrize("name", [*HALF_SCALED, "MXFP4", "NVFP4", "Q2_0"])
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e4])
def test_rows_of_any_size_become_numbers(name, size):
    fmt = by_name(name)
    x = np.random.default_rng(4).uniform(-size, size, (3, 256)).astype(np.float32).reshape(-1, fmt.block_weights)
    assert np.abs(encode(fmt, x)).max() <= 2 * size + 2.0**-24


@pytest.mark.parametrize("name", [*HALF_SCALED, "MXFP4", "NVFP4"])
@pytest.mark.parametrize("size", [1e7, 1e30, 3e38])
def test_weights_beyond_the_scale_become_its_largest(name, size):
    fmt = by_name(name)
    x = np.random.default_rng(5).uniform(-size, size, (3, 256)).astype(np.float32).reshape(-1, fmt.block_weights)
    y = encode(fmt, x)
    assert np.isfinite(y).all()
    assert np.sum(np.float64(y) * x) > 0
