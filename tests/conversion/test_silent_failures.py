"""Failures that ggml's encoders do not report: requant refuses or handles such input, in every type it writes.

Two ways lead into an encoder: arrays (requant.quantize) and files (convert). Every cell of the table goes through both.
"""

import ctypes
import platform
import struct

import faults
import ggml
import numpy as np
import pytest
from conversions import convert, half, plan_for, single, small_model
from faults import ABORTED, FINE, FLAGGED, RUINED
from gguf_files import STR, File, Tensor, pair

import requant
from requant.container.imatrix import read_imatrix
from requant.container.source import open_source
from requant.errors import BadInput, NumericFault, RequantError, UsageError
from requant.formats import by_name, codec
from requant.model.roles import needs_importance

Q = "blk.0.attn_q.weight"
CASES = faults.cases()
LETTERS = {".": FINE, "r": RUINED, "f": FLAGGED, "a": ABORTED}
# what libggml does in the columns of CASES: r validates and is ruined, f does not validate, a aborts
BY_GGML = {
    "F32": "ff........",
    "F16": "ffrff.....",
    "Q4_0": ".frffrrf..",
    "Q4_1": ".frff.....",
    "Q5_0": ".frffrrf..",
    "Q5_1": ".frff.....",
    "Q8_0": ".frff.....",
    "Q2_K": ".frffrrrr.",
    "Q3_K": "..rfrrrf..",
    "Q4_K": ".frffrrrr.",
    "Q5_K": ".frffrrrr.",
    "Q6_K": "rrr.rrrr..",
    "IQ2_XXS": "rrr.rrr.r.",
    "IQ2_XS": "aar.arraar",
    "IQ3_XXS": "afr.arraar",
    "IQ1_S": "rrrfrrr.rr",
    "IQ4_NL": ".frffrr.r.",
    "IQ3_S": "aar.a..aa.",
    "IQ2_S": "aarfarraar",
    "IQ4_XS": "..r.rrr.r.",
    "IQ1_M": "rarfarr.rr",
    "BF16": "ff........",
    "TQ1_0": ".f.ff.....",
    "TQ2_0": ".f.ff.....",
    "MXFP4": "..........",
    "NVFP4": "..rrr.....",
    "Q1_0": "ffrff.....",
    "Q2_0": ".f.ff.....",
}
# types that hold weights of up to 1e7, and of any size; in a file NVFP4 does with its second-level scale
HOLD_1E7 = {"IQ4_NL", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S", "IQ2_S", "IQ4_XS"}
HOLD_ANY = {"F32", "BF16", "MXFP4"}
# the largest error that a type may make of input that it takes, in its own on these weights without a fault
LIMITS = {"|w| ~ 1e-7": 1.05, "|w| ~ 1e7": 1.25, "|w| ~ 1e30": 1.05}
EXACT = 1e-6
each_type = pytest.mark.parametrize("fmt", faults.TYPES, ids=lambda fmt: fmt.name)
each_case = pytest.mark.parametrize("column", CASES)


@pytest.fixture(scope="module")
def by_ggml():
    return faults.ggml_verdicts()


def refusal(column, name, *, file):
    """The error that is due, or None where the type takes such input."""
    if column in {"one NaN", "one Inf"}:
        return NumericFault
    if column in {"imatrix one NaN", "imatrix -1"}:
        return BadInput if file else UsageError
    if column == "imatrix all 0" and file and needs_importance(name, "attn_q"):
        return BadInput
    holding = {"|w| ~ 1e-7": HOLD_ANY, "|w| ~ 1e7": HOLD_ANY | HOLD_1E7, "|w| ~ 1e30": HOLD_ANY}.get(column)
    if holding is None or name in holding or (file and name == "NVFP4"):
        return None
    return NumericFault


def bound(column, name):
    return LIMITS.get(column, 1.05) * faults.by_requant(name, faults.weights(), None) + EXACT


@each_type
def test_what_ggml_does_is_what_the_table_says(fmt, by_ggml):
    assert by_ggml[fmt.name] == dict(zip(CASES, map(LETTERS.get, BY_GGML[fmt.name]), strict=True))


@each_type
@each_case
def test_arrays_are_refused_or_come_back_within_the_error_of_the_type(fmt, column):
    found = faults.by_requant(fmt.name, *CASES[column])
    due = refusal(column, fmt.name, file=False)
    if due is not None:
        assert type(found) is due, found
        assert found.exit_code == (8 if due is NumericFault else 2)
    else:
        assert found <= bound(column, fmt.name)


def imatrix_file(path, importance):
    """An imatrix of one entry, as llama-imatrix writes it."""
    tensors = (
        Tensor(f"{Q}.in_sum2", (faults.N, 1), 0, data=importance.astype("<f4").tobytes()),
        Tensor(f"{Q}.counts", (1, 1), 0, data=struct.pack("<f", 1)),
    )
    return File((pair("general.type", STR, "imatrix"),), tensors).write(path)


def converted(folder, name, x, importance):
    """The relative error of `x` converted in a file, as ggml reads that; or the error that stopped it."""
    model = small_model(single(Q, (faults.N, 2), np.concatenate([x, x]))).write(folder / "model.gguf")
    try:
        imatrix = None
        if importance is not None:
            imatrix = read_imatrix(imatrix_file(folder / "imatrix.gguf", importance))
        elif needs_importance(name, "attn_q"):
            imatrix = read_imatrix(imatrix_file(folder / "imatrix.gguf", np.ones(faults.N)))
        with open_source(model) as source:
            convert(source, plan_for(source, name), folder / "out.gguf", imatrix=imatrix)
    except RequantError as error:
        return error
    with open_source(folder / "out.gguf") as made:
        tensor = made.tensor(Q)
        assert tensor.format.name == name
        y = ggml.decode(tensor.type_id, made.read_rows(tensor))
        scale = "blk.0.attn_q.scale"
        factor = made.read_rows(made.tensor(scale)).view("<f4")[0, 0] if scale in made else np.float32(1)
    return faults.relative_error(np.concatenate([x, x]), y * factor)


@each_type
@each_case
def test_files_are_refused_or_come_back_within_the_error_of_the_type(fmt, column, tmp_path):
    found = converted(tmp_path, fmt.name, *CASES[column])
    due = refusal(column, fmt.name, file=True)
    if due is not None:
        assert type(found) is due, found
        assert found.exit_code == (8 if due is NumericFault else 3)
        assert not (tmp_path / "out.gguf").exists()
    else:
        assert found <= bound(column, fmt.name)


# rows that are not like the others


def rows(n=64, columns=512):
    return (0.02 * np.random.default_rng(1).standard_normal((n, columns))).astype(np.float32)


@each_type
@pytest.mark.parametrize("size", [0, 1e-45, 1e-40, 1e-24, 1e-19], ids=str)
def test_rows_of_nothing_beside_large_ones_are_no_fault(fmt, size):
    """Embeddings have them: tokens that were never trained."""
    x = rows()
    x[10:20] *= np.float32(size)
    y = requant.dequantize(requant.quantize(x, fmt.name), fmt.name)
    assert np.abs(y[10:20]).max() <= 1e-18
    if fmt.block_weights > 1 and fmt.name != "MXFP4" and size:
        errors = codec.row_errors(x, y)
        assert codec.vanished_rows(errors) == np.count_nonzero(x[10:20].any(axis=1))


@each_type
def test_a_tensor_of_nothing_but_such_rows_is_one_unless_it_survives(fmt):
    x = rows() * np.float32(1e-24)
    try:
        y = requant.dequantize(requant.quantize(x, fmt.name), fmt.name)
    except NumericFault as fault:
        assert fmt.name not in HOLD_ANY and "relative error 1, limit" in str(fault)
    else:
        assert faults.relative_error(x, y) <= 1.1 * max(fmt.gaussian_rmse, EXACT)


@each_type
@pytest.mark.parametrize("spike", [3, 10, 30, 100])
def test_a_few_spikes_in_a_tensor_are_no_fault(fmt, spike):
    x = rows()
    x[:, 7] *= 0
    x[::4, 7] = np.float32(0.02 * spike)
    if (fmt.name, spike) == ("Q1_0", 100):  # one bit has no other magnitude for them
        with pytest.raises(NumericFault, match=r"relative error 0\.935, limit 0\.9"):
            requant.quantize(x, fmt.name)
    else:
        requant.quantize(x, fmt.name)


@each_type
def test_rows_of_zeros_and_one_weight_survive_where_the_type_has_a_zero(fmt):
    x = np.zeros((4, 512), np.float32)
    x[1, 300] = 0.5
    if fmt.name in ("Q1_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"):
        return  # every level of these is away from zero
    y = requant.dequantize(requant.quantize(x, fmt.name), fmt.name)
    assert faults.relative_error(x, y) <= 0.3


@each_type
def test_scales_that_are_no_numbers_do_not_pass_the_gate(fmt):
    x = rows(4)
    y = codec.dequantize(codec.quantize(x, fmt), fmt)
    for value in (np.nan, np.inf):
        for row in (2, 3):  # one of them all zero, which no energy shows
            z, x[3] = y.copy(), 0
            z[row, 5] = value
            assert f"row {row} is lost" in codec.gate(codec.row_errors(x, z), fmt, x.size)


# importance that says nothing of a block


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "IQ4_NL", "IQ3_S", "IQ2_XXS", "Q1_0", "MXFP4"])
def test_a_block_whose_importance_lies_on_zeros_is_encoded_as_without(name):
    fmt, x = by_name(name), rows(2)
    importance = np.ones(512, np.float32)
    importance[:256] = 0
    importance[64:66] = 1e6  # where all weights are zero
    x[0, 64:66] = 0
    y, plain = (codec.dequantize(codec.quantize(x, fmt, w), fmt) for w in (importance, None))
    marked = codec.find_unweighted_blocks(x, fmt, importance).reshape(2, -1)
    first = np.repeat(marked[0], fmt.block_weights)
    assert first[:64].all() and not first[256:].any()
    assert np.array_equal(y[0, first], plain[0, first])
    assert np.repeat(marked[1], fmt.block_weights)[64:66].sum() == 0


@pytest.mark.parametrize(
    ("importance", "count"),
    [
        (np.ones(512), 0),
        (np.full(512, 1e-30), 0),
        (np.full(512, 1e30), 0),
        (np.zeros(512), 16),
        (np.arange(512) >= 256, 8),
        (np.where(np.arange(512) < 32, 1e30, 1e-30), 15),
        (np.where(np.arange(512) % 32, 0, 1), 0),
        (np.geomspace(1e-30, 1e30, 512), 13),
    ],
    ids=["ones", "tiny", "huge", "zeros", "half", "mixed", "one of each block", "all sizes"],
)
def test_blocks_without_usable_importance_are_counted(importance, count):
    fmt, x, importance = by_name("Q4_0"), rows(3), importance.astype(np.float32)
    x[2] = 0  # which needs none
    assert np.count_nonzero(codec.find_unweighted_blocks(x, fmt, importance)) == 2 * count
    y = codec.dequantize(codec.quantize(x, fmt, importance), fmt)
    assert faults.relative_error(x, y) <= 1.5 * fmt.gaussian_rmse


def test_the_record_says_how_many_blocks_had_no_importance(tmp_path):
    x, importance = rows(3), (np.arange(512) >= 256).astype(np.float32)
    importance[64:66] = 1e-30
    imatrix = read_imatrix(imatrix_file(tmp_path / "imatrix.gguf", importance))
    with open_source(small_model(half(Q, (512, 3), x)).write(tmp_path / "model.gguf")) as source:
        made = convert(source, plan_for(source, "Q4_0"), tmp_path / "out.gguf", imatrix=imatrix)
    assert made.notes == (f"24 blocks of tensor '{Q}' had no usable importance; their columns count alike",)
    assert next(t for t in made.tensors if t.name == Q).odd.unweighted == 24


# the processor


class FlushedSubnormals:
    """This thread's MXCSR with DAZ and FTZ set, as code that was compiled with -ffast-math leaves it."""

    def __enter__(self):
        self.libm = ctypes.CDLL("libm.so.6")
        self.before = (ctypes.c_ubyte * 32)()
        self.libm.fegetenv(self.before)
        changed = bytearray(self.before)
        (mxcsr,) = struct.unpack_from("<I", changed, 28)
        struct.pack_into("<I", changed, 28, mxcsr | 0x8040)
        self.libm.fesetenv(bytes(changed))

    def __exit__(self, *_):
        self.libm.fesetenv(self.before)


on_x86 = pytest.mark.skipif(platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="MXCSR")


@on_x86
@each_type
def test_bytes_never_depend_on_how_the_processor_treats_subnormals(fmt):
    x = rows(2)
    x[0] *= np.float32(1e-38)
    x[1, ::7] *= np.float32(1e-38)
    data = codec.quantize(x, fmt)
    with FlushedSubnormals(), pytest.raises(NumericFault, match="flush subnormal numbers"):
        codec.quantize(x, fmt)
    with FlushedSubnormals(), pytest.raises(NumericFault, match="flush subnormal numbers"):
        codec.dequantize(data, fmt)
    assert np.array_equal(codec.quantize(x, fmt), data)


@on_x86
def test_no_kernel_changes_how_the_processor_treats_subnormals():
    for fmt in faults.TYPES:
        codec.dequantize(codec.quantize(rows(2), fmt, np.ones(512, np.float32)), fmt)
    before = (ctypes.c_ubyte * 32)()
    ctypes.CDLL("libm.so.6").fegetenv(before)
    assert struct.unpack_from("<I", before, 28)[0] & 0x8040 == 0


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_subnormal_weights_survive_a_copy(name, tmp_path):
    fmt = by_name(name)
    data = np.arange(1, 513, dtype=f"<u{fmt.block_bytes}")  # the smallest there are, as bits
    file = small_model(Tensor(Q, (512, 1), fmt.type_id, data=data.tobytes()))
    with open_source(file.write(tmp_path / "model.gguf")) as source:
        made = convert(source, plan_for(source), tmp_path / "out.gguf")
    with open_source(made.output) as target:
        assert target.read_rows(target.tensor(Q)).tobytes() == data.tobytes()
