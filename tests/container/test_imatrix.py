"""Importance matrices in both layouts, sound and broken."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf_files import ARR, F32, STR, U32, File, Tensor, pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from requant.container.imatrix import coverage, describe_shared_rows, importance_for, read_imatrix
from requant.errors import BadInput, RequantError

FIXTURE = Path(__file__).parents[2] / "fixtures/imatrix.gguf"
W = "blk.0.ffn_up.weight"


@dataclass(frozen=True)
class Shaped:
    name: str
    shape: tuple


def floats(name, values, shape):
    return Tensor(name, shape, 0, data=np.asarray(values, "<f4").tobytes())


def gguf(path, entries, *, pairs=None):
    """Write {name: (sums, counts)}: sums (n_matrices, n_per_row), counts (n_matrices,)."""
    tensors = []
    for name, (sums, counts) in entries.items():
        tensors.append(floats(f"{name}.in_sum2", sums, np.shape(sums)[::-1]))
        tensors.append(floats(f"{name}.counts", counts, (1, len(counts))))
    if pairs is None:
        pairs = (
            pair("general.type", STR, "imatrix"),
            pair("imatrix.datasets", ARR, (STR, ["wiki.txt"])),
            pair("imatrix.chunk_count", U32, 7),
        )
    return File(pairs=pairs, tensors=tuple(tensors)).write(path)


def legacy(entries, *, chunks=7, dataset=b"wiki.txt"):
    """The bytes of {name: (number of calls, values)} as the old llama-imatrix wrote them."""
    parts = [struct.pack("<i", len(entries))]
    for name, (n_calls, values) in entries.items():
        encoded = name.encode()
        parts += [struct.pack("<i", len(encoded)), encoded, struct.pack("<ii", n_calls, len(values))]
        parts.append(np.asarray(values, "<f4").tobytes())
    if chunks is not None:
        parts.append(struct.pack("<i", chunks))
    if dataset is not None:
        parts += [struct.pack("<i", len(dataset)), dataset]
    return b"".join(parts)


def written(path, content):
    path.write_bytes(content)
    return path


def test_the_fixture_covers_the_layers_but_not_embedding_and_output():
    imatrix = read_imatrix(FIXTURE)
    assert len(imatrix.entries) == 70
    assert (imatrix.datasets, imatrix.chunk_count, imatrix.legacy) == (("calibration.txt",), 28, False)
    assert imatrix.sha256 == "1402a2d49d634ce331cf1086209bcc4bb7adaa5431182f4a491203cf332fad39"
    found = coverage(imatrix, [Shaped("output.weight", (256, 4096)), Shaped("blk.9.ffn_down.weight", (768, 256))])
    assert (found.covered, found.missing) == (("blk.9.ffn_down.weight",), ("output.weight",))
    assert (found.weights_covered, found.weights_missing) == (768 * 256, 256 * 4096)
    assert importance_for(imatrix, "output.weight", (256, 4096)) is None


def test_importance_is_the_sum_over_the_count_unscaled(tmp_path):
    sums = np.array([[8, 4], [30, 0]])
    imatrix = read_imatrix(gguf(tmp_path / "i.gguf", {W: (sums, [4, 10])}))
    importance = importance_for(imatrix, W, (2, 5, 2))
    assert importance.dtype == np.float32
    np.testing.assert_array_equal(importance, [[2, 1], [3, 0]])
    np.testing.assert_array_equal(imatrix.entries[W].counts, [4, 10])


def test_experts_without_a_token_get_the_mean_of_the_others_and_are_counted(tmp_path):
    sums = [[2, 4], [0, 0], [6, 16]]
    imatrix = read_imatrix(gguf(tmp_path / "i.gguf", {W: (sums, [1, 0, 2])}))
    np.testing.assert_array_equal(importance_for(imatrix, W, (2, 9, 3))[1], [2.5, 6])
    assert coverage(imatrix, [Shaped(W, (2, 9, 3))]).uncovered_experts == {W: 1}


def test_one_count_serves_all_matrices_of_a_stacked_tensor(tmp_path):
    imatrix = read_imatrix(gguf(tmp_path / "i.gguf", {W: ([[2, 4], [6, 8]], [2])}))
    np.testing.assert_array_equal(importance_for(imatrix, W, (2, 9, 2)), [[1, 2], [3, 4]])
    assert not coverage(imatrix, [Shaped(W, (2, 9, 2))]).uncovered_experts


def test_an_entry_without_any_token_says_nothing(tmp_path):
    imatrix = read_imatrix(gguf(tmp_path / "i.gguf", {W: ([[0, 0]], [0]), "b.weight": ([[1, 2]], [1])}))
    assert importance_for(imatrix, W, (2, 9)) is None
    assert coverage(imatrix, [Shaped(W, (2, 9)), Shaped("b.weight", (2, 3))]).missing == (W,)


def test_an_entry_of_nothing_but_zeros_says_nothing(tmp_path):
    imatrix = read_imatrix(gguf(tmp_path / "i.gguf", {W: ([[0, 0]], [5]), "b.weight": ([[1, 2]], [1])}))
    assert importance_for(imatrix, W, (2, 9)) is None
    assert coverage(imatrix, [Shaped(W, (2, 9)), Shaped("b.weight", (2, 3))]).missing == (W,)
    old = read_imatrix(written(tmp_path / "i.dat", legacy({W: (3, [0, 0])})))
    assert importance_for(old, W, (2, 9)) is None


def test_both_layouts_give_the_same_importance(tmp_path):
    sums, counts = np.array([[8, 4, 1]], "f4"), np.array([4], "f4")
    new = read_imatrix(gguf(tmp_path / "i.gguf", {W: (sums, counts)}))
    calls = 5
    old = read_imatrix(written(tmp_path / "i.dat", legacy({W: (calls, (sums / counts * calls)[0])})))
    assert old.legacy
    assert (old.datasets, old.chunk_count) == (new.datasets, new.chunk_count) == (("wiki.txt",), 7)
    np.testing.assert_allclose(importance_for(old, W, (3, 2)), importance_for(new, W, (3, 2)), rtol=1e-6)


def test_legacy_experts_that_are_zero_throughout_saw_no_token(tmp_path):
    old = read_imatrix(written(tmp_path / "i.dat", legacy({W: (2, [2, 4, 0, 0, 6, 0])})))
    np.testing.assert_array_equal(importance_for(old, W, (2, 9, 3)), [[1, 2], [2, 1], [3, 0]])
    assert coverage(old, [Shaped(W, (2, 9, 3))]).uncovered_experts == {W: 1}


def test_legacy_values_without_calls_are_taken_as_they_are(tmp_path):
    old = read_imatrix(written(tmp_path / "i.dat", legacy({W: (0, [2, 4])})))
    np.testing.assert_array_equal(importance_for(old, W, (2, 9)), [[2, 4]])


@pytest.mark.parametrize(("chunks", "dataset"), [(None, None), (3, None), (3, b"")])
def test_the_end_of_a_legacy_file_is_optional(tmp_path, chunks, dataset):
    old = read_imatrix(written(tmp_path / "i.dat", legacy({W: (1, [1])}, chunks=chunks, dataset=dataset)))
    assert (old.chunk_count, old.datasets) == (chunks, ())


@pytest.mark.parametrize("layout", ["gguf", "legacy"])
def test_one_row_of_an_older_collector_serves_all_experts(tmp_path, layout):
    name, row = "blk.0.ffn_up_exps.weight", [1.0, 4.0, 0.0, 9.0]
    if layout == "gguf":
        path = gguf(tmp_path / "i.gguf", {name: ([[2 * x for x in row]], [2.0])})
    else:
        path = written(tmp_path / "i.dat", legacy({name: (2, [2 * x for x in row])}))
    imatrix, tensor = read_imatrix(path), Shaped(name, (4, 3, 5))
    assert importance_for(imatrix, name, tensor.shape).tolist() == [row] * 5
    assert coverage(imatrix, [tensor]).covered == (name,)
    said = describe_shared_rows(imatrix, [(name, tensor.shape), ("other", (4, 3, 5))])
    assert said == [
        "the imatrix is of an older collector: one row of importance serves all experts or heads of 1 tensor"
    ]
    assert not describe_shared_rows(imatrix, [(name, (4, 3))])
    with pytest.raises(BadInput, match="another size"):
        importance_for(imatrix, name, (2, 3, 5))


def test_an_imatrix_of_another_model_is_told_by_size(tmp_path):
    imatrix = read_imatrix(gguf(tmp_path / "i.gguf", {W: ([[1, 2]], [1])}))
    for shape in [(3, 9), (3, 9, 2), (1, 2, 2)]:
        with pytest.raises(BadInput, match=rf"another model: entry '{W}'.*limit exactly"):
            importance_for(imatrix, W, shape)
        with pytest.raises(BadInput, match="another model"):
            coverage(imatrix, [Shaped(W, shape)])


def test_an_imatrix_of_another_model_is_told_by_names(tmp_path):
    imatrix = read_imatrix(gguf(tmp_path / "i.gguf", {W: ([[1, 2]], [1])}))
    with pytest.raises(BadInput, match=r"another model.*got 1 entries"):
        coverage(imatrix, [Shaped("blk.0.attn_q.weight", (2, 9))])
    assert coverage(imatrix, []).covered == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize("where", ["sums", "counts"])
def test_values_that_are_no_mean_squares_are_refused_by_name(tmp_path, value, where):
    entry = ([[1, value]], [1]) if where == "sums" else ([[1, 2]], [value])
    with pytest.raises(BadInput, match=rf"entry '{W}'.*is no mean square"):
        read_imatrix(gguf(tmp_path / "i.gguf", {W: entry}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_legacy_values_that_are_no_mean_squares_are_refused_by_name(tmp_path, value):
    with pytest.raises(BadInput, match=rf"entry '{W}', value 1 is no mean square"):
        read_imatrix(written(tmp_path / "i.dat", legacy({W: (1, [1, value])})))


def test_a_quotient_beyond_float32_is_refused(tmp_path):
    with pytest.raises(BadInput, match="divided by its counts"):
        read_imatrix(gguf(tmp_path / "i.gguf", {W: ([[1e30, 1]], [1e-20])}))


S, C = f"{W}.in_sum2", f"{W}.counts"
KIND = pair("general.type", STR, "imatrix")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((), "holds no importance"),
        ((floats("x", [1], (1,)),), "holds no importance"),
        ((floats(S, [1, 2], (2, 1)),), "has sums, but no counts"),
        ((floats(C, [1], (1, 1)), floats("b.in_sum2", [1], (1,))), "has counts, but no sums"),
        ((floats(S, [1, 2], (2, 1)), floats(C, [1, 1], (1, 2))), r"number of counts \(got 2, limit 1 or 1\)"),
        ((floats(S, [1, 2, 3, 4], (2, 2)), floats(C, [], (1, 0))), "number of counts"),
        ((floats(S, [], (0, 1)), floats(C, [1], (1, 1))), "has no sums"),
        ((Tensor(S, (2, 1), 1, data=b"\0\0\0\0"), floats(C, [1], (1, 1))), r"wrong type \(got F16, expected F32\)"),
    ],
)
def test_malformed_gguf_files_are_refused(tmp_path, tensors, message):
    with pytest.raises(BadInput, match=message):
        read_imatrix(File(pairs=(KIND,), tensors=tensors).write(tmp_path / "i.gguf"))


def test_a_model_is_no_importance_matrix(tmp_path):
    pairs = (pair("general.type", STR, "model"),)
    with pytest.raises(BadInput, match="no importance matrix"):
        read_imatrix(File(pairs=pairs).write(tmp_path / "i.gguf"))


def test_unknown_suffixes_and_odd_metadata_are_ignored(tmp_path):
    tensors = (floats(S, [1, 2], (2, 1)), floats(C, [1], (1, 1)), floats(f"{W}.stats", [np.nan] * 12, (12,)))
    pairs = (pair("imatrix.datasets", STR, "x"), pair("imatrix.chunk_count", F32, 1.0))
    imatrix = read_imatrix(File(pairs=pairs, tensors=tensors).write(tmp_path / "i.gguf"))
    assert (imatrix.datasets, imatrix.chunk_count) == ((), None)
    assert list(imatrix.entries) == [W]


def ints(*values):
    return struct.pack(f"<{len(values)}i", *values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "number of entries"),
        (b"\1\0", "number of entries"),
        (ints(0), "number of entries"),
        (ints(-1), "number of entries"),
        (ints(2**31 - 1) + bytes(64), "number of entries"),
        (ints(1, -1) + bytes(20), "entry 0, name, length"),
        (ints(1, 2**31 - 1) + bytes(20), "entry 0, name, length"),
        (ints(1, 1) + b"a" + ints(1, 2**31 - 1) + bytes(8), "entry 'a', number of values"),
        (ints(1, 1) + b"a" + ints(1, 0) + bytes(8), "entry 'a', number of values"),
        (ints(1, 1) + b"a" + ints(-1, 1) + bytes(8), "entry 'a', number of calls"),
        (ints(1, 2) + b"\xff\xfe" + ints(1, 1) + bytes(8), "not valid UTF-8"),
        (ints(2) + 2 * (ints(1) + b"a" + ints(1, 1) + bytes(4)), "appears twice"),
        (legacy({W: (1, [1])}) + b"x", "1 bytes are left over"),
        (legacy({W: (1, [1])})[:-1], "data set"),
        (legacy({W: (1, [1])}, chunks=-1), "chunk count"),
    ],
)
def test_malformed_legacy_files_are_refused(tmp_path, content, message):
    with pytest.raises(BadInput, match=message):
        read_imatrix(written(tmp_path / "i.dat", content))


def test_a_missing_file_and_a_folder_are_bad_input(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BadInput):
            read_imatrix(path)


def sound(tmp_path):
    entries = {W: ([[1, 2], [3, 4]], [1, 0]), "b.weight": ([[5, 6, 7]], [2])}
    new = gguf(tmp_path / "sound.gguf", entries).read_bytes()
    return new, legacy({W: (1, [1, 2, 3, 4]), "b.weight": (2, [5, 6, 7])})


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_escapes_as_anything_but_an_error_of_ours(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(sound(tmp_path))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\1\0\0\0", b"\0\0\0\x7f", b""]))
    path = written(tmp_path / "damaged", bytes(content))
    try:
        imatrix = read_imatrix(path)
        importance = importance_for(imatrix, W, (2, 9, 2))
    except RequantError:
        return
    assert importance is None or (importance.shape == (2, 2) and np.isfinite(importance).all())
    assert importance is None or (importance >= 0).all()
