"""Compensated encoding: exact blocks, less error at the output than plain encoding, the same bytes in any division."""

import ggml
import numpy as np
import pytest
from compare import assert_same_bytes, assert_same_floats

from requant.formats import FORMATS, Effort, by_name, codec, feedback
from requant.formats.base import BlockFormat
from requant.formats.encoders.search import LANES
from requant.formats.encoders.tiles import to_rows
from requant.formats.polish import polish_fits

COMPENSATED = [fmt for fmt in FORMATS.values() if fmt.can_encode and feedback.can_compensate(fmt)]
each_format = pytest.mark.parametrize("fmt", COMPENSATED, ids=lambda fmt: fmt.name)
N_IN = {32: 352, 64: 320, 256: 512}  # by the weights of a block: not a whole number of panels where a format allows


def moment(n: int, seed: int = 1) -> np.ndarray:
    """Return the second moment (n, n) of correlated inputs with a decaying spectrum, float64."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    inputs = (rng.standard_normal((8 * n, n)) / np.sqrt(np.arange(1, n + 1))) @ basis * np.exp(rng.normal(0, 0.5, n))
    return inputs.T @ inputs / len(inputs)


def factors(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return U and the importance of `h`, damped."""
    diagonal = np.diag(h)
    damped = h + np.diag(0.01 * diagonal + 1e-6 * diagonal.mean())
    r = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    u = np.triu(np.linalg.inv(r))
    return np.ascontiguousarray(u, np.float32), (np.diag(r) ** 2).astype(np.float32)


def rows_of(n_rows: int, n_in: int, seed: int = 2) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, (n_rows, n_in)) * 0.02).astype(np.float32)


def output_errors(x: np.ndarray, y: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Return the error at the output of each row, e H e', float64."""
    e = y.astype(np.float64) - x
    return np.einsum("ij,ij->i", e @ h, e)


def decode(fmt: BlockFormat, data: np.ndarray) -> np.ndarray:
    return ggml.decode(fmt.type_id, data).reshape(len(data), -1)


@pytest.fixture(scope="module")
def problems() -> dict[int, tuple[np.ndarray, ...]]:
    """By the weights of a block: rows, H, U and the importance."""
    made = {}
    for width, n_in in N_IN.items():
        h = moment(n_in)
        made[width] = (rows_of(LANES + 9, n_in), h, *factors(h))
    return made


@each_format
def test_error_at_the_output_is_far_below_that_of_plain_encoding(fmt, problems):
    x, h, u, importance = problems[fmt.block_weights]
    blocks, rounding = feedback.encode_compensated(fmt, x, u, importance)
    ours = output_errors(x, decode(fmt, blocks), h)
    plain = output_errors(x, decode(fmt, codec.quantize(x, fmt, np.diag(h).astype(np.float32))), h)
    assert np.median(ours / plain) < (0.7 if fmt.bpw < 3 else 0.6)
    assert ours.sum() < 0.75 * plain.sum() and (ours < plain).mean() > 0.95
    assert np.all((rounding > 0) & (rounding < (2 * fmt.gaussian_rmse) ** 2))


@each_format
def test_blocks_decode_to_the_values_that_were_counted(fmt, problems):
    x, _, u, importance = problems[fmt.block_weights]
    for effort in Effort:
        fits, values, _ = feedback.round_rows(fmt, x, u, importance, effort)
        assert np.array_equal(decode(fmt, feedback.pack_rows(fmt, fits)), to_rows(values, len(x)))


@each_format
def test_polishing_lowers_the_error_of_every_row(fmt, problems):
    x, h, u, importance = problems[fmt.block_weights]
    fits, values, _ = feedback.round_rows(fmt, x, u, importance, Effort.DEFAULT)
    before = output_errors(x, to_rows(values, len(x)), h)
    polish_fits(fmt.kernels, fits, values, x, h.astype(np.float32))
    after = decode(fmt, feedback.pack_rows(fmt, fits))
    assert np.array_equal(after, to_rows(values, len(x)))
    ratio = output_errors(x, after, h) / before
    assert ratio.max() < 1 + 1e-5 and np.median(ratio) < 0.96


@each_format
@pytest.mark.parametrize("polished", [False, True], ids=["fast", "best"])
def test_rows_do_not_depend_on_the_rows_beside_them(fmt, polished, problems):
    x, h, u, importance = problems[fmt.block_weights]
    kept = {"polish": h.astype(np.float32) if polished else None}
    together, rounding = feedback.encode_compensated(fmt, x, u, importance, **kept)
    parts = [feedback.encode_compensated(fmt, part, u, importance, **kept) for part in (x[:1], x[1:8], x[8:70], x[70:])]
    assert_same_bytes(np.concatenate([blocks for blocks, _ in parts]), together, fmt.name)
    assert np.array_equal(np.concatenate([own for _, own in parts]), rounding)


@each_format
def test_independent_columns_are_encoded_as_without_compensation(fmt, problems):
    x, h, *_ = problems[fmt.block_weights]
    diagonal = np.diag(h).astype(np.float32)
    u = np.diag(1 / np.sqrt(diagonal))
    blocks, _ = feedback.encode_compensated(fmt, x, u, diagonal)
    ours, plain = decode(fmt, blocks), decode(fmt, codec.quantize(x, fmt, diagonal))
    weighted = [(diagonal * (x.astype(np.float64) - y) ** 2).sum() for y in (ours, plain)]
    assert weighted[0] <= 1.001 * weighted[1]


@each_format
@pytest.mark.parametrize("polished", [False, True], ids=["fast", "best"])
def test_odd_rows_stay_finite(fmt, polished, problems):
    x, h, u, importance = problems[fmt.block_weights]
    kept = {"polish": h.astype(np.float32) if polished else None}
    odd = x[:8].copy()
    odd[0] = 0
    odd[1] = 0.01
    odd[2] = 1e30
    odd[3] = 1e-30
    odd[4, ::7] = 3e4
    odd[5, 40:] = 0
    odd[6] *= 1e5
    blocks, rounding = feedback.encode_compensated(fmt, odd, u, importance, **kept)
    values = decode(fmt, blocks)
    fits = np.arange(8) != 2  # a scale of 1e29 is beyond what most formats hold
    assert np.isfinite(values[fits]).all() and np.isfinite(rounding[fits]).all()
    assert rounding[2] > 0.5 or np.abs(values[2] / odd[2] - 1).max() < 1
    assert not values[0].any() and rounding[0] == 0
    assert np.abs(values[3]).max() <= 2.0**-24
    assert_same_bytes(blocks[7:], feedback.encode_compensated(fmt, odd[7:], u, importance, **kept)[0], fmt.name)


@each_format
def test_polishing_bears_inputs_that_were_never_seen(fmt, problems):
    x, h, u, importance = problems[fmt.block_weights]
    h = h.astype(np.float32)
    h[:40] = h[:, :40] = 0
    fits, values, _ = feedback.round_rows(fmt, x[:5], u, importance, Effort.DEFAULT)
    before = output_errors(x[:5], to_rows(values, 5), h)
    polish_fits(fmt.kernels, fits, values, x[:5], h)
    after = decode(fmt, feedback.pack_rows(fmt, fits))
    assert np.isfinite(after).all() and (output_errors(x[:5], after, h) <= (1 + 1e-5) * before).all()


@each_format
@pytest.mark.parametrize("columns", [1, 2, 300])
def test_columns_without_importance_stay_in_range(fmt, columns, problems):
    x, _, u, importance = problems[fmt.block_weights]
    weights = importance.copy()
    weights[:300:columns] = 0
    if columns == 300:  # whole blocks that the text never reached
        weights[:300] = 0
    blocks, _ = feedback.encode_compensated(fmt, x[:5], u, weights)
    assert np.abs(decode(fmt, blocks)).max() <= 4 * np.abs(x).max()


def test_inputs_are_left_alone(problems):
    x, _, u, importance = problems[256]
    before = [a.copy() for a in (x, u, importance)]
    feedback.encode_compensated(by_name("Q3_K"), x, u, importance)
    for a, b in zip((x, u, importance), before, strict=True):
        assert_same_floats(a, b, "input")
