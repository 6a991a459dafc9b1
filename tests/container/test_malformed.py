"""Every case of the malformed-GGUF corpus gets its verdict, at once and without memory, and so does any mutant."""

import os
import struct
import time
import tracemalloc

import pytest
from corpus import CASES
from gguf_files import ARR, F32, STR, U32, File, Tensor, array, pair, string
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.container.header import parse_header
from requant.container.source import open_source, require_model
from requant.errors import BadInput, RequantError


def _cases(verdicts):
    return [pytest.param(content, text, id=name) for name, (v, content, text) in CASES.items() if v in verdicts]


def _file(tmp_path, content):
    path = tmp_path / "case.gguf"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("content", "text"), _cases("R"))
def test_bad_files_are_refused_in_one_clear_line(tmp_path, content, text):
    path = _file(tmp_path, content)
    with pytest.raises(BadInput, match=text) as caught:
        parse_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400
    with pytest.raises(BadInput, match=text):
        open_source(path)


def test_refusing_takes_neither_time_nor_memory(tmp_path):
    tracemalloc.start()
    try:
        for name, (verdict, content, _) in CASES.items():
            if verdict == "R":
                path = _file(tmp_path, content)
                tracemalloc.reset_peak()
                start = time.perf_counter()
                with pytest.raises(BadInput):
                    parse_header(path)
                assert time.perf_counter() - start < 1, name
                assert tracemalloc.get_traced_memory()[1] < 64 * 2**20, name
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("content", "text"), _cases("A"))
def test_odd_but_sound_files_are_accepted_and_keep_their_bytes(tmp_path, content, text):
    start = time.perf_counter()
    with open_source(_file(tmp_path, content)) as source:
        assert time.perf_counter() - start < 1
        assert require_model(source) == "llama"
        assert source.warnings == ()
        metadata = source.metadata.encode()
        assert content[24 : 24 + len(metadata)] == metadata
        for tensor in source.tensors:
            assert source.read_rows(tensor).tobytes() in content


@pytest.mark.parametrize(("content", "text"), _cases("W"))
def test_suspicious_files_are_accepted_with_a_warning(tmp_path, content, text):
    with open_source(_file(tmp_path, content)) as source:
        (warning,) = source.warnings
        assert text in warning
        assert warning.isprintable()


@pytest.mark.parametrize(("content", "text"), _cases("M"))
def test_what_is_no_model_can_be_opened_but_not_used_as_one(tmp_path, content, text):
    with open_source(_file(tmp_path, content)) as source, pytest.raises(BadInput, match=text):
        require_model(source)


def test_a_sparse_terabyte_is_inspected_at_once(tmp_path):
    path = File(tensors=(Tensor(shape=(2**20, 2**18), type_id=0, data=b""),)).write(tmp_path / "sparse.gguf")
    try:
        os.truncate(path, path.stat().st_size + 2**40)
    except OSError:  # a file system with smaller files
        pytest.skip("the file system does not hold a sparse terabyte")
    start = time.perf_counter()
    assert parse_header(path).tensors[0].n_bytes == 2**40
    assert time.perf_counter() - start < 1


def test_a_header_of_more_than_half_a_gibibyte_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.gguf"
    path.write_bytes(File((string("k") + array(0, 2**30),), ()).header())
    os.truncate(path, 2**31)
    start = time.perf_counter()
    with pytest.raises(BadInput, match="the header is too large"):
        parse_header(path)
    assert time.perf_counter() - start < 1


BASES = [
    File().encode(),
    File(tensors=(Tensor("a", (256, 2), 12), Tensor("b", (3,)), Tensor("c", (32, 2, 2), 8))).encode(),
    File().with_pairs(pair("t", ARR, (STR, ["a", "bc", ""])), pair("s", ARR, (F32, [1, 2]))).encode(),
    File(tensors=(Tensor("a", (5,)), Tensor("b")), alignment=8).with_pairs(pair("general.alignment", U32, 8)).encode(),
]
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    13,
    31,
    32,
    33,
    63,
    64,
    255,
    256,
    2**16,
    2**31,
    2**32 - 1,
    2**61,
    2**62,
    2**63,
    2**64 - 1,
]


@st.composite
def mutants(draw):
    """A sound file after one to four edits: numbers overwritten, bytes flipped, cut out, doubled or cut off."""
    content = bytearray(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(content) - 1, 400))))
        kind = draw(st.sampled_from(["u64", "u64", "u32", "u32", "byte", "cut", "double", "end"]))
        n = draw(st.integers(1, 40))
        if kind == "u64":
            content[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(NUMBERS)))
        elif kind == "u32":
            content[at : at + 4] = struct.pack("<I", draw(st.sampled_from(NUMBERS)) & 2**32 - 1)
        elif kind == "byte":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "cut":
            del content[at : at + n]
        elif kind == "double":
            content[at:at] = content[at : at + n]
        else:
            del content[at:]
    return bytes(content)


@settings(max_examples=1500, deadline=1000)
@given(mutants())
def test_no_mutant_escapes_as_anything_but_a_requant_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "mutant.gguf"
    path.write_bytes(content)
    try:
        with open_source(path) as source:
            for key in source.metadata:
                source.metadata.get(key)
            for tensor in source.tensors:
                assert source.read_rows(tensor).nbytes == tensor.n_bytes
            require_model(source)
    except RequantError as error:
        assert str(error).isprintable()
