"""The Python API for arrays."""

import ggml
import numpy as np
import pytest
from compare import assert_same_bytes, assert_same_floats

import requant
from requant.api import arrays
from requant.errors import NumericFault, UsageError
from requant.formats import FORMATS, Effort, by_name, codec

RNG = np.random.default_rng(5)
X = (RNG.standard_normal((6, 512)) * 0.02).astype(np.float32)
IMPORTANCE = (RNG.gamma(1.0, 1.0, 512) + 0.1).astype(np.float32)
ENCODED = [f.name for f in FORMATS.values() if f.can_encode]


@pytest.mark.parametrize("name", ENCODED)
def test_ggml_reads_what_was_quantized(name):
    data = requant.quantize(X, name, IMPORTANCE)
    fmt = by_name(name)
    assert data.dtype == np.uint8 and data.shape == (6, fmt.n_bytes(512))
    y = requant.dequantize(data, name)
    assert_same_floats(y.reshape(-1, 1), ggml.decode(fmt.type_id, data).reshape(-1, 1), name, data)
    assert np.sum((y - X) ** 2) < 0.6 * np.sum(X**2)


def test_any_number_of_threads_and_chunks_gives_the_same_bytes(monkeypatch):
    whole = requant.quantize(X, "Q4_K", IMPORTANCE, threads=1)
    monkeypatch.setattr(arrays, "CHUNK_WEIGHTS", 1)
    assert_same_bytes(requant.quantize(X, "Q4_K", IMPORTANCE, threads=3), whole, "Q4_K")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, bool])
def test_any_real_numbers_are_taken_as_float32(dtype):
    x = (X * 1000).astype(dtype)
    assert_same_bytes(requant.quantize(x, "q8_0"), requant.quantize(x.astype(np.float32), "Q8_0"), "Q8_0")


def test_every_effort_is_passed_on():
    for effort in Effort:
        expected = codec.quantize(X, by_name("IQ4_NL"), None, effort)
        assert_same_bytes(requant.quantize(X, "IQ4_NL", effort=effort.name.lower()), expected, effort.name)


def test_each_matrix_of_a_stack_has_its_own_importance():
    stack, weights = X.reshape(2, 3, 512), np.stack([IMPORTANCE, IMPORTANCE[::-1]])
    data = requant.quantize(stack, "Q4_K", weights)
    assert data.shape == (2, 3, 288)
    for matrix, own, rows in zip(stack, weights, data, strict=True):
        assert_same_bytes(rows, requant.quantize(matrix, "Q4_K", own), "Q4_K")
    assert requant.dequantize(data, "Q4_K").shape == stack.shape


@pytest.mark.parametrize("shape", [(512,), (0, 512), (2, 0, 512), (1, 1, 2, 512)])
def test_shapes_are_kept_but_for_the_last_axis(shape):
    data = requant.quantize(np.zeros(shape, np.float32), "Q6_K")
    assert data.shape == (*shape[:-1], 420)
    assert requant.dequantize(data, "Q6_K").shape == shape


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: requant.quantize(X, "Q4_Z"), "did you mean"),
        (lambda: requant.quantize(X, "I32"), "cannot be written"),
        (lambda: requant.quantize(X[:, :100], "Q4_K"), "whole blocks"),
        (lambda: requant.quantize(np.float32(1), "F32"), "shape ()"),
        (lambda: requant.quantize(X.astype(complex), "F32"), "complex"),
        (lambda: requant.quantize(X, "Q4_K", IMPORTANCE[1:]), "(512,)"),
        (lambda: requant.quantize(X, "Q4_K", -IMPORTANCE), "not negative"),
        (lambda: requant.quantize(X, "Q4_K", IMPORTANCE * np.nan), "finite"),
        (lambda: requant.quantize(X, "Q4_K", effort="more"), "fast, default, best"),
        (lambda: requant.dequantize(X, "Q4_K"), "float32"),
        (lambda: requant.dequantize(np.zeros((2, 143), np.uint8), "Q4_K"), "144 bytes"),
        (lambda: requant.dequantize(np.zeros((2, 8), np.uint8), "I64"), "no weights"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(call, said):
    with pytest.raises(UsageError) as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    x = X.copy()
    x[4, 77] = bad
    x[5, 500:] = bad
    with pytest.raises(NumericFault, match="13 of 3072 weights are not finite, the first at row 4, column 77"):
        requant.quantize(x, "Q8_0")


def test_an_error_far_beyond_what_is_usual_is_refused_where_no_row_is_lost():
    x = (1e-7 * np.random.default_rng(0).standard_normal((2, 512))).astype(np.float32)
    with pytest.raises(NumericFault, match=r"does not survive as Q4_0: relative error 0\.\d+, limit 0\.108"):
        requant.quantize(x, "Q4_0")


def test_numbers_beyond_float32_are_not_finite():
    with pytest.raises(NumericFault, match="1 of 3072 weights"):
        requant.quantize(np.where(np.arange(3072).reshape(X.shape) == 9, 1e39, X.astype(float)), "Q8_0")


@pytest.mark.parametrize(("name", "size"), [("Q4_0", 1e-9), ("Q4_K", 1e30), ("F16", 1e-9), ("NVFP4", 1e-6)])
def test_a_row_that_would_be_lost_is_named(name, size):
    x = X.copy()
    x[3] = np.float32(size) * np.sign(x[3])
    with pytest.raises(NumericFault, match=f"does not survive as {name}: row 3 is lost: relative error"):
        requant.quantize(x, name)


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-7, 1e7, 1e30, 3.4e38])
def test_rows_of_any_size_survive_or_are_refused(name, size):
    x = (np.random.default_rng(6).uniform(-1, 1, (2, 512)) * size).astype(np.float32)
    try:
        y = requant.dequantize(requant.quantize(x, name), name)
    except NumericFault:
        return
    assert np.isfinite(y).all()
    error, energy = (((a.astype(np.float64) / size) ** 2).sum(axis=1) for a in (x.astype(np.float64) - y, x))
    assert (error <= 0.82 * energy).all()


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("importance", [0.0, 1e-38, 1e38])
def test_importance_of_any_size_is_taken(name, importance):
    for weights in (np.full(512, importance), np.where(np.arange(512) < 256, importance, 1.0)):
        y = requant.dequantize(requant.quantize(X, name, weights.astype(np.float32)), name)
        assert np.isfinite(y).all() and np.abs(y).max() <= 3 * np.abs(X).max()
