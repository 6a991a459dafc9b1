"""The layout: computed before a byte is written, and the same as every reader finds afterwards."""

import math

import gguf
import pytest
from gguf_files import ARR, STR, File, pair
from hypothesis import given
from hypothesis import strategies as st
from test_against_ggml import Reader

from requant.container.header import parse_header
from requant.container.layout import lay_out
from requant.container.metadata import Metadata
from requant.errors import BadInput
from requant.formats import FORMATS

EMPTY = Metadata("m.gguf", {})


@st.composite
def tensors(draw):
    """Up to six tensors of any type and small shape."""
    count = draw(st.integers(0, 6))
    made = []
    for i in range(count):
        block = draw(st.sampled_from(list(FORMATS.values())))
        shape = (block.block_weights * draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 3), max_size=3)))
        made.append((f"blk.{i}.w", shape, block.type_id))
    return made


@given(tensors(), st.sampled_from([None, 1, 8, 32, 64, 4096]))
def test_a_file_filled_as_laid_out_is_parsed_as_laid_out(tmp_path_factory, wanted, alignment):
    metadata = EMPTY.with_values({"general.alignment": ("u32", alignment)} if alignment else {"a": ("str", "")})
    layout = lay_out(metadata, wanted, "out.gguf")
    path = tmp_path_factory.getbasetemp() / "laid_out.gguf"
    path.write_bytes(layout.header.ljust(layout.size, b"\0"))
    header = parse_header(path)
    assert header.metadata.encode() == metadata.encode()
    assert (header.version, header.data_start, header.sha256) == (3, layout.data_start, layout.sha256)
    assert [(t.name, t.shape, t.type_id) for t in header.tensors] == wanted
    assert header.trailing_bytes == 0
    alignment = alignment or 32
    end = layout.data_start
    for placed, info in zip(layout.tensors, header.tensors, strict=True):
        assert placed.offset == end == layout.data_start + info.offset
        assert placed.n_bytes == info.n_bytes == info.format.n_bytes(math.prod(placed.shape))
        end += math.ceil(placed.n_bytes / alignment) * alignment
    assert end == layout.size


def test_a_laid_out_file_opens_in_gguf_py_and_ggml(tmp_path):
    metadata = EMPTY.with_values({"general.architecture": ("str", "llama"), "general.alignment": ("u32", 64)})
    wanted = [("a", (256, 2), 12), ("b", (3,), 0), ("c", (32, 2, 2), 8), ("d", (5, 3), 30)]
    layout = lay_out(metadata, wanted, "out.gguf")
    path = tmp_path / "out.gguf"
    path.write_bytes(layout.header.ljust(layout.size, b"\0"))
    for ours, theirs in zip(layout.tensors, gguf.GGUFReader(path).tensors, strict=True):
        assert (ours.name, ours.offset, ours.n_bytes) == (theirs.name, theirs.data_offset, theirs.n_bytes)
    reader = Reader()
    assert reader.opens(path)
    reader.close()


def test_a_source_of_version_2_is_written_as_version_3(tmp_path):
    source = parse_header(File(version=2).with_pairs(pair("k", ARR, (STR, ["", "a"]))).write(tmp_path / "m.gguf"))
    layout = lay_out(source.metadata, [(t.name, t.shape, t.type_id) for t in source.tensors], "out.gguf")
    old = (tmp_path / "m.gguf").read_bytes()
    assert layout.header == old[:4] + b"\3\0\0\0" + old[8 : layout.data_start]


def test_layout_keeps_a_header_byte_for_byte(tmp_path):
    path = File().with_pairs(pair("k", ARR, (STR, ["", "a"]))).write(tmp_path / "m.gguf")
    source = parse_header(path)
    layout = lay_out(source.metadata, [(t.name, t.shape, t.type_id) for t in source.tensors], "out.gguf")
    assert layout.header == path.read_bytes()[: source.data_start]
    assert layout.size == source.file_size


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ([("a", (33,), 8)], r"'a' cannot be Q8_0.*\(got 33, limit a multiple of 32\)"),
        ([("a" * 64, (32,), 8)], "name of the wrong length"),
        ([("", (32,), 8)], "name of the wrong length"),
        ([("a", (32,), 8), ("a", (32,), 8)], "'a' would be written twice"),
        ([("a", (1, 1, 1, 1, 1), 0)], "too many dimensions"),
    ],
)
def test_what_no_reader_would_take_is_refused_before_writing(wanted, text):
    with pytest.raises(BadInput, match=f"out.gguf: tensor {text}|out.gguf: .*{text}"):
        lay_out(EMPTY, wanted, "out.gguf")


def test_a_bad_alignment_is_refused():
    with pytest.raises(BadInput, match="power of two"):
        lay_out(EMPTY.with_values({"general.alignment": ("u32", 48)}), [], "out.gguf")
