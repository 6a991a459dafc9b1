"""The header parser on sound files: it reads the same as gguf-py, and fast."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
from gguf_files import ARR, F32, I32, STR, U32, File, Tensor, array, pair, string
from hypothesis import given
from hypothesis import strategies as st

from requant.container.cursor import Cursor
from requant.container.header import parse_header
from requant.errors import BadInput, InputOutputError, SourceChanged

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.mark.parametrize("name", ["tiny-llama-f16.gguf", "imatrix.gguf"])
def test_a_real_file_reads_as_gguf_py_reads_it(name):
    header, reader = parse_header(FIXTURES / name), gguf.GGUFReader(FIXTURES / name)
    assert header.data_start == reader.data_offset
    assert [t.name for t in header.tensors] == [t.name for t in reader.tensors]
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (list(ours.shape), ours.type_id) == ([int(n) for n in theirs.shape], int(theirs.tensor_type))
        assert (ours.offset + header.data_start, ours.n_bytes) == (theirs.data_offset, theirs.n_bytes)
    assert list(header.metadata) == [k for k in reader.fields if not k.startswith("GGUF.")]
    for key in header.metadata:
        assert header.metadata.get(key) == reader.fields[key].contents()


def test_the_digest_covers_every_byte_before_the_data(tmp_path):
    path = File().write(tmp_path / "m.gguf")
    header = parse_header(path)
    assert header.sha256 == hashlib.sha256(path.read_bytes()[: header.data_start]).hexdigest()


def test_a_large_vocabulary_is_parsed_in_a_blink(tmp_path):
    n = 262_144
    tokens = b"".join(string(f"token{i}") for i in range(n))
    pairs = (
        string("tokenizer.ggml.tokens") + array(STR, n, tokens),
        string("tokenizer.ggml.scores") + array(F32, n, bytes(4 * n)),
        string("tokenizer.ggml.token_type") + array(I32, n, bytes(4 * n)),
    )
    path = File().with_pairs(*pairs).write(tmp_path / "m.gguf")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        header = parse_header(path)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.15
    assert header.metadata.array_length("tokenizer.ggml.tokens") == n
    assert header.metadata.get("tokenizer.ggml.tokens")[-1] == f"token{n - 1}"


@given(st.integers(1, 3000), st.integers(0, 200), st.integers(0, 300_000))
def test_strings_may_lie_across_any_block_boundary(tmp_path_factory, count, length, last):
    path = tmp_path_factory.getbasetemp() / "strings.gguf"
    items = ["x" * length] * count + ["y" * last]
    File(tensors=()).with_pairs(pair("k", ARR, (STR, items)), pair("after", U32, 5)).write(path)
    metadata = parse_header(path).metadata
    assert metadata.get("k") == items
    assert metadata.get("after") == 5


def test_shapes_give_rows_and_bytes(tmp_path):
    path = File(tensors=(Tensor("a", (256, 3, 2), 12), Tensor("s", ()))).write(tmp_path / "m.gguf")
    a, s = parse_header(path).tensors
    assert (a.n_per_row, a.n_rows, a.n_weights, a.row_bytes, a.n_bytes) == (256, 6, 1536, 144, 864)
    assert a.format.name == "Q4_K"
    assert (s.n_per_row, s.n_rows, s.n_weights, s.n_bytes, s.offset) == (1, 1, 1, 4, 864)


def test_what_is_no_regular_file_is_refused_without_hanging(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, text in [
        ("", "is a directory"),
        ("fifo", "is a FIFO"),
        ("dangling", "links to a file that is not there"),
        ("loop", "loop of symbolic links"),
        ("missing", "no such file"),
        ("nul\0", "not a usable path"),
    ]:
        with pytest.raises(BadInput, match=text) as caught:
            parse_header(tmp_path / name)
        assert caught.value.exit_code == 3
    with pytest.raises(BadInput, match="is a character device"):
        parse_header(Path("/dev/null"))


def test_a_fifo_put_in_place_of_the_file_does_not_hang(tmp_path, monkeypatch):
    status = (File().write(tmp_path / "m.gguf")).stat()
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(Path, "stat", lambda *_, **__: status)
    with pytest.raises(BadInput, match="is a FIFO"):
        parse_header(tmp_path / "fifo")


def test_a_read_error_is_an_io_error_that_names_the_offset(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    path = File().write(tmp_path / "m.gguf")
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(InputOutputError, match=r"bytes at offset 0 failed: Input/output error"):
        parse_header(path)


def test_a_file_that_shrinks_under_the_parser_is_a_changed_source(tmp_path):
    path = File().write(tmp_path / "m.gguf")
    with path.open("rb") as file:
        cursor = Cursor(str(path), file.fileno(), path.stat().st_size + 10)
        with pytest.raises(SourceChanged, match="10 bytes at offset"):
            cursor.require(cursor.file_size, "the header")


def test_reading_a_header_loads_no_heavy_library():
    code = (
        "import sys, pathlib; from requant.container.header import parse_header;"
        f"parse_header(pathlib.Path({str(FIXTURES / 'tiny-llama-f16.gguf')!r}));"
        "import requant.container.source, requant.container.layout, requant.container.output;"
        "print([m for m in ('numba', 'highspy', 'gguf', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
