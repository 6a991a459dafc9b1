"""Every code of every small float, and rounding against NumPy."""

import ggml
import numba
import numpy as np
from compare import assert_same_floats
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.formats import bits

HALVES = np.arange(65536, dtype=np.uint16)
BYTES = np.arange(256, dtype=np.uint8)


@numba.njit
def _apply(function, values, out):
    for i in range(values.size):
        out[i] = function(values[i])


def apply(function, values: np.ndarray, dtype: type) -> np.ndarray:
    out = np.empty(values.size, dtype)
    _apply(function, values, out)
    return out


def test_every_half_is_the_float_of_numpy():
    want = HALVES.view(np.float16).astype(np.float32)
    assert_same_floats(apply(bits.half_to_float, HALVES, np.float32)[:, None], want[:, None], "binary16")


def test_every_half_survives_the_way_through_float():
    is_nan = np.isnan(HALVES.view(np.float16))
    back = apply(bits.float_to_half, apply(bits.half_to_float, HALVES, np.float32), np.uint16)
    assert np.array_equal(back[~is_nan], HALVES[~is_nan])
    assert np.isnan(back[is_nan].view(np.float16)).all()


def test_every_bfloat_survives_the_way_through_float():
    floats = apply(bits.bfloat_to_float, HALVES, np.float32)
    back = apply(bits.float_to_bfloat, floats, np.uint16)
    assert np.array_equal(back[~np.isnan(floats)], HALVES[~np.isnan(floats)])


def test_halves_round_to_nearest_even_between_all_neighbours():
    halves = np.sort(HALVES.view(np.float16)[np.isfinite(HALVES.view(np.float16))]).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / np.float32(2)
    around = np.concatenate([middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(0))])
    want = around.astype(np.float16).view(np.uint16)
    assert np.array_equal(apply(bits.float_to_half, around, np.uint16), want)


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_any_float_rounds_to_the_half_of_numpy(values):
    x = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    got = apply(bits.float_to_half, x, np.uint16).view(np.float16)
    assert np.array_equal(got.view(np.uint16)[~np.isnan(x)], want.view(np.uint16)[~np.isnan(x)])
    assert np.array_equal(np.isnan(got), np.isnan(x))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_any_float_rounds_to_the_nearest_bfloat(values):
    x = np.array(values, np.float32)
    got = apply(bits.float_to_bfloat, x, np.uint16)
    below = (x.view(np.uint32) >> 16).astype(np.uint64)
    rest = x.view(np.uint32) & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (below & 1 == 1))
    assert np.array_equal(got, (below + up).astype(np.uint16))


def test_every_fp4_block_scale_is_that_of_ggml():
    mxfp4 = np.zeros((256, 17), np.uint8)
    mxfp4[:, 0], mxfp4[:, 1] = BYTES, 1  # the code of level 1
    nvfp4 = np.zeros((256, 36), np.uint8)
    nvfp4[:, 0], nvfp4[:, 4] = BYTES, 1
    want = ggml.decode(39, mxfp4).reshape(256, 32)[:, :1]
    assert_same_floats(apply(bits.e8m0_half_to_float, BYTES, np.float32)[:, None], want, "E8M0", BYTES[:, None])
    want = ggml.decode(40, nvfp4).reshape(256, 64)[:, :1]
    assert_same_floats(apply(bits.ue4m3_half_to_float, BYTES, np.float32)[:, None], want, "UE4M3", BYTES[:, None])


def test_every_ue4m3_scale_survives_the_way_through_float():
    codes = np.arange(127, dtype=np.uint8)
    assert np.array_equal(
        apply(bits.nearest_ue4m3_half, apply(bits.ue4m3_half_to_float, codes, np.float32), np.uint8), codes
    )


def test_ue4m3_scales_round_to_nearest_between_all_neighbours():
    values = apply(bits.ue4m3_half_to_float, np.arange(127, dtype=np.uint8), np.float32)
    middles = (values[:-1] + values[1:]) / np.float32(2)
    above, below = np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(0))
    assert np.array_equal(apply(bits.nearest_ue4m3_half, above, np.uint8), np.arange(1, 127))
    assert np.array_equal(apply(bits.nearest_ue4m3_half, below, np.uint8), np.arange(126))
    assert np.array_equal(apply(bits.nearest_ue4m3_half, middles, np.uint8) % 2, np.zeros(126))
    beyond = np.array([225, 1e30, np.finfo(np.float32).max, np.inf], np.float32)
    assert (apply(bits.nearest_ue4m3_half, beyond, np.uint8) == 126).all()


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1, max_size=50))
def test_e8m0_floor_is_the_power_of_two_below(values):
    x = np.array(values, np.float32)
    power = 2 * apply(bits.e8m0_half_to_float, apply(bits.floor_e8m0, x, np.uint8), np.float32)
    normal = x >= 2.0**-126
    assert ((power <= x) & (x / 2 < power))[normal].all()
    assert (power <= 2.0**-127)[~normal].all()
