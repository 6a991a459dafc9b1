"""The codec: what comes back from a format is close, what cannot be kept is said, and importance counts."""

import numpy as np
import pytest
from gguf_files import STR, File, Tensor, pair
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.container.imatrix import read_imatrix
from requant.errors import BadInput, UsageError
from requant.formats import FORMATS, by_name, codec

ENCODED = [fmt for fmt in FORMATS.values() if fmt.can_encode]
QUANTIZED = [fmt for fmt in ENCODED if fmt.block_weights > 1]
N = 512  # columns
HOLD_1E7 = ("Q6_K", "IQ3_XXS", "IQ3_S", "IQ4_XS")  # by integer scales over a half
each_encoded = pytest.mark.parametrize("fmt", ENCODED, ids=lambda fmt: fmt.name)
each_quantized = pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda fmt: fmt.name)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=10, deadline=None)


def normal(seed=0, n_rows=2, scale=0.02):
    return (scale * np.random.default_rng(seed).standard_normal((n_rows, N))).astype(np.float32)


def gamma(seed=0):
    return (np.random.default_rng(seed).gamma(0.5, 1.0, N) + 1e-3).astype(np.float32)


def back(x, fmt, importance=None):
    return codec.dequantize(codec.quantize(x, fmt, importance), fmt)


def fault(x, fmt, importance=None):
    """What the gate says of `x` in `fmt`, as converting does."""
    with np.errstate(over="ignore", invalid="ignore"):
        return codec.gate(codec.row_errors(x, back(x, fmt, importance), importance), fmt, x.size)


# round trips


@each_encoded
@given(seed=seeds, exponent=st.integers(-9, 9), n_rows=st.integers(1, 3))
@few
def test_normal_weights_of_any_usual_size_pass_the_gate(fmt, seed, exponent, n_rows):
    smallest = -5 if fmt.name == "NVFP4" else -9  # its scales are coarse below 2**-6
    x = normal(seed, n_rows, scale=2.0 ** max(exponent, smallest))
    data = codec.quantize(x, fmt)
    assert data.shape == (n_rows, fmt.n_bytes(N)) and data.dtype == np.uint8
    y = codec.dequantize(data, fmt)
    assert y.shape == x.shape and y.dtype == np.float32
    errors = codec.row_errors(x, y)
    assert codec.gate(errors, fmt, x.size) is None
    assert codec.relative_error(errors) <= 1.25 * fmt.gaussian_rmse


@each_encoded
@given(seed=seeds, weighted=st.booleans())
@few
def test_what_was_decoded_is_encoded_again_within_the_gate_and_closer_than_the_first_time(fmt, seed, weighted):
    x, importance = normal(seed), gamma(seed) if weighted else None
    once = back(x, fmt, importance)
    twice = back(once, fmt, importance)
    second = codec.row_errors(once, twice, importance)
    assert codec.gate(second, fmt, x.size) is None
    assert codec.relative_error(second) <= codec.relative_error(codec.row_errors(x, once, importance)) / 2


@each_encoded
def test_the_error_on_normal_weights_is_the_one_the_format_states(fmt):
    x = np.random.default_rng(5).standard_normal((512, N)).astype(np.float32)
    assert codec.relative_error(codec.row_errors(x, back(x, fmt))) == pytest.approx(fmt.gaussian_rmse, rel=0.03)


@each_encoded
def test_rows_are_encoded_one_by_one(fmt):
    x = normal(3, n_rows=5)
    assert np.array_equal(codec.quantize(x, fmt), np.concatenate([codec.quantize(row[None], fmt) for row in x]))


@each_encoded
def test_arrays_that_are_not_contiguous_are_read_as_what_they_show(fmt):
    x = normal(4, n_rows=4)
    data = codec.quantize(x[::2], fmt)
    assert np.array_equal(data, codec.quantize(x[::2].copy(), fmt))
    assert np.array_equal(
        codec.dequantize(np.repeat(data, 2, axis=0)[::2], fmt).view("u4"), codec.dequantize(data, fmt).view("u4")
    )


# importance


@each_quantized
@given(seed=seeds, exponent=st.integers(-60, 60))
@few
def test_the_scale_of_importance_does_not_matter(fmt, seed, exponent):
    x, importance = normal(seed), gamma(seed + 1)
    scaled = importance * np.float32(2.0**exponent)
    assert np.array_equal(codec.quantize(x, fmt, scaled), codec.quantize(x, fmt, importance))


@each_quantized
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 3e38, 1e-45])
def test_importance_that_is_the_same_everywhere_is_as_none(fmt, value):
    x = normal(6)
    assert np.array_equal(codec.quantize(x, fmt, np.full(N, value, np.float32)), codec.quantize(x, fmt))


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1.0, 3e38])
def test_one_column_of_importance_is_scaled_whatever_its_size(value):
    importance = np.zeros(N, np.float32)
    importance[3] = value
    want = np.full(N, codec.IMPORTANCE_FLOOR)
    want[3] = N
    assert np.allclose(codec.scaled_importance(importance), want, rtol=1e-6)


@each_quantized
def test_importance_lowers_the_error_that_it_weighs(fmt):
    x, importance = normal(7, n_rows=64), gamma(8)
    with_it, without = (codec.row_errors(x, back(x, fmt, w), importance) for w in (importance, None))
    assert codec.relative_error(with_it) < codec.relative_error(without)


@each_quantized
@pytest.mark.parametrize(
    "unseen", [slice(0, 256), slice(0, None, 2), slice(1, None)], ids=["half", "every other", "all but one"]
)
def test_columns_without_importance_are_still_rounded(fmt, unseen):
    x, importance = normal(9, n_rows=8), np.ones(N, np.float32)
    importance[unseen] = 0
    y = back(x, fmt, importance)
    assert np.isfinite(y).all()
    assert codec.lost_row(codec.row_errors(x[:, unseen], y[:, unseen])) is None
    assert codec.gate(codec.row_errors(x, y, importance), fmt, x.size) is None


# where ggml's encoders return nonsense that validates, or abort


@each_encoded
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_found_wherever_it_is(fmt, value):
    x = normal(10, n_rows=3)
    for flat in (0, N - 1, N, 3 * N - 1):
        bad = x.copy()
        bad.flat[flat] = value
        assert codec.first_nonfinite(bad) == flat
        with np.errstate(over="ignore", invalid="ignore"):
            codec.quantize(bad, fmt)  # returns: nothing to abort on
    bad[1, 5] = value
    assert codec.first_nonfinite(bad) == N + 5
    assert codec.first_nonfinite(x) is None


def test_the_largest_and_smallest_numbers_are_finite():
    edges = np.array([[3.4028235e38, -3.4028235e38, 1e-45, -0.0]], np.float32)
    assert codec.first_nonfinite(edges) is None
    assert codec.first_nonfinite(np.empty((0, N), np.float32)) is None


@each_quantized
@pytest.mark.parametrize("size", [1e-7, 1e7, 1e30])
def test_weights_beyond_a_half_precision_scale_are_refused(fmt, size):
    x = normal(11, n_rows=1, scale=size / (1 if size > 1 else 20))
    if fmt.name == "MXFP4" or (size == 1e7 and fmt.name in HOLD_1E7):
        assert fault(x, fmt) is None
    else:
        assert fault(x, fmt) is not None


@each_quantized
@pytest.mark.parametrize("values", ["zero", "half zero", "1e-30"])
def test_importance_that_ruins_ggmls_encoders_does_no_harm(fmt, values):
    importance = {"zero": 0, "half zero": (np.arange(N) >= 256), "1e-30": 1e-30}[values] * np.ones(N, np.float32)
    x = normal(12, n_rows=4)
    plain = codec.relative_error(codec.row_errors(x, back(x, fmt)))
    got = codec.relative_error(codec.row_errors(x, back(x, fmt, importance.astype(np.float32))))
    assert got <= 1.05 * plain


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_importance_that_is_no_mean_square_never_reaches_an_encoder(tmp_path, value):
    sums = np.ones(N, "<f4")
    sums[17] = value
    tensors = (
        Tensor("output.weight.in_sum2", (N, 1), 0, data=sums.tobytes()),
        Tensor("output.weight.counts", (1, 1), 0, data=np.ones(1, "<f4").tobytes()),
    )
    path = File((pair("general.type", STR, "imatrix"),), tensors).write(tmp_path / "imatrix.gguf")
    with pytest.raises(BadInput, match=r"output\.weight.*value 17"):
        read_imatrix(path)


# sums and the gate


@given(seed=seeds, n_rows=st.integers(1, 4), n=st.integers(1, 70), weighted=st.booleans())
@settings(max_examples=40, deadline=None)
def test_row_errors_are_numpys_in_double_precision(seed, n_rows, n, weighted):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, n_rows, n)).astype(np.float32)
    importance = rng.gamma(0.5, 1.0, n).astype(np.float32) if weighted else None
    a, b = x.astype(np.float64), y.astype(np.float64)
    w = np.ones(n) if importance is None else importance.astype(np.float64)
    sums = (a**2, (a - b) ** 2, w * a**2, w * (a - b) ** 2)
    want = np.stack([s.sum(axis=1) for s in sums], axis=1)
    assert np.allclose(codec.row_errors(x, y, importance), want, rtol=1e-6)


def test_the_relative_error_is_weighted():
    errors = np.array([[100.0, 100.0, 4.0, 1.0], [100.0, 100.0, 0.0, 0.0]])
    assert codec.relative_error(errors) == 0.5
    assert codec.relative_error(np.zeros((2, 4))) == 0.0
    assert codec.relative_error(np.array([[0.0, 9.0, 0.0, 9.0]])) == 3.0
    assert np.isnan(codec.relative_error(np.array([[1.0, np.nan, 1.0, np.nan]])))


@pytest.mark.parametrize(("error", "row"), [(0.8, None), (0.82, 1), (1.0, 1), (np.inf, 1), (np.nan, 1)], ids=str)
def test_a_row_is_lost_at_a_relative_error_of_nine_tenths(error, row):
    errors = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, error, 1.0, error], [1.0, 1.0, 1.0, 1.0]])[: 3 if row else 2]
    assert codec.lost_row(errors) == row


@each_encoded
def test_one_lost_row_among_good_ones_is_named(fmt):
    x = normal(13, n_rows=64)
    y = back(x, fmt)
    y[41] = 0
    assert f"row 41 is lost: relative error 1, limit {codec.row_limit(fmt)}" in codec.gate(
        codec.row_errors(x, y), fmt, x.size
    )
    y[41] = np.nan
    assert "row 41 is lost: relative error nan" in codec.gate(codec.row_errors(x, y), fmt, x.size)


@each_encoded
def test_an_error_beyond_three_times_the_usual_one_fails_the_gate(fmt):
    limit = min(3 * fmt.gaussian_rmse, 0.9)
    # by importance alone, as no row is lost
    passing, failing = (np.array([[1.0, 0.0, 1.0, e * e]]) for e in (0.999 * limit, 1.001 * limit + 1e-9))
    assert codec.gate(passing, fmt, 1) is None
    assert f"limit {limit:.3g} for {fmt.name}" in codec.gate(failing, fmt, 1)


@each_encoded
def test_rows_of_zeros_pass(fmt):
    assert fault(np.zeros((2, N), np.float32), fmt) is None


# requests that make no sense


def test_a_type_that_cannot_be_written_is_refused():
    fmt = by_name("I32")
    with pytest.raises(UsageError, match="I32 cannot be written"):
        codec.quantize(normal(), fmt)
    with pytest.raises(UsageError, match="cannot be read as rows of I32"):
        codec.dequantize(np.zeros((1, 4), np.uint8), fmt)


@each_quantized
def test_rows_that_are_not_whole_blocks_are_refused(fmt):
    with pytest.raises(UsageError, match=f"no multiple of {fmt.name}'s block of {fmt.block_weights}"):
        codec.quantize(normal()[:, :-1], fmt)
    with pytest.raises(UsageError, match=f"cannot be read as rows of {fmt.name}"):
        codec.dequantize(np.zeros((2, fmt.block_bytes + 1), np.uint8), fmt)


@pytest.mark.parametrize("shape", [(N,), (1, 2, N)], ids=str)
def test_only_rows_are_taken(shape):
    fmt = by_name("Q8_0")
    with pytest.raises(UsageError):
        codec.quantize(np.zeros(shape, np.float32), fmt)
    with pytest.raises(UsageError):
        codec.dequantize(np.zeros((*shape[:-1], 34), np.uint8), fmt)
