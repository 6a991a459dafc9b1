"""Messages on headers that are refused or unusual: the thing, its place, the value found, and the right one."""

import re

import pytest
from gguf_files import ARR, BOOL, STR, U32, File, Tensor, array, pair, string

from requant.container.header import parse_header
from requant.container.layout import lay_out
from requant.container.metadata import Metadata
from requant.errors import BadInput


def _said(tmp_path, content):
    """The message on the file, without its name."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as caught:
        parse_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


LONG_KEY = "k" * 60
WHOLE = File(
    (
        pair(LONG_KEY, STR, "l" * 50),
        pair("numbers", ARR, (U32, [1, 2])),
        pair("n", U32, 7),
        pair("words", ARR, (STR, ["a", "b"])),
    ),
    (Tensor("t", (32, 2), 8),),
)
PLACES = [  # beyond the counts, which are checked first
    "key 0",
    *(f"key '{LONG_KEY}'{part}" for part in (", type", ", length", "")),
    *("key 1 length", "key 1"),
    *(f"key 'numbers'{part}" for part in (", type", ", item type", ", count", "")),
    *("key 2 length", "key 2", "key 'n', type", "key 'n'"),
    *("key 3 length", "key 3"),
    *(f"key 'words'{part}" for part in (", type", ", item type", ", count", "", ", item 1, length", ", item 1,")),
    *("tensor 0, name length", "tensor 0, name"),
    *(f"tensor 't', {part}" for part in ("number of dimensions", "dimension 0", "dimension 1", "type", "offset")),
    "the padding before the tensor data",
]


def test_a_header_that_ends_too_early_says_in_what(tmp_path):
    content, said = WHOLE.encode(), []
    for n in range(24, len(WHOLE.header())):
        what = re.split(r" at offset| of \d+ strings", _said(tmp_path, content[:n]))[0]
        if what not in said and not what.startswith("declares more"):
            said.append(what)
    assert said == PLACES


KEY, NAME = b"\xff" * 100, b"\xff" * 60
HINT = "a newer requant may know it"
FORK = "a type of ik_llama.cpp, which requant neither reads nor writes); start from a model in types of llama.cpp"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (File(n_pairs=999), "declares more keys than it can hold (got 999, limit 27)"),
        (File(n_tensors=99), "declares more tensors than it can hold (got 99, limit 14)"),
        (File((string(KEY),)), f"key 0 is not valid UTF-8 (got {KEY[:80]!r})"),
        (File((pair("", U32, 1),)), "key 0 is empty"),
        (File((pair("a\0", U32, 1),)), "key 0 contains a NUL"),
        (
            File((pair("a", U32, 1), string("k") + b"\x0d\0\0\0" + bytes(8))),
            "key 'k' has an unknown value type (got 13, limit 12)",
        ),
        (File((string("k") + array(13, 1, bytes(8)),)), "key 'k', item has an unknown value type (got 13, limit 12)"),
        (File(tensors=(Tensor(NAME),)), f"tensor 0, name is not valid UTF-8 (got {NAME!r})"),
        (File(tensors=(Tensor("t", n_dims=5),)), "tensor 't' has too many dimensions (got 5, limit 4)"),
        (
            File(tensors=(Tensor("t", (2**62, 4), data=b""),)),
            f"tensor 't' has too many elements (got {2**62} x 4)",
        ),
        (File(tensors=(Tensor("t", type_id=9999),)), f"tensor 't' has an unknown type (got 9999); {HINT}"),
        (
            File(tensors=(Tensor("t", type_id=139),)),
            f"tensor 't' has an unknown type (got 139: IQ4_K, {FORK}",
        ),
        (
            File(tensors=(Tensor("t", type_id=399),)),
            f"tensor 't' has an unknown type (got 399: Q8_K_R8, {FORK}",
        ),
        (File(tensors=(Tensor("t", type_id=-1),)), "tensor 't' has an unknown type (got -1)"),
        (File(tensors=(Tensor("t", type_id=4),)), "tensor 't' has an unknown type (got 4: Q4_2, removed from ggml)"),
        (
            File(tensors=(Tensor("t", (), 8, data=bytes(34)),)),
            "tensor 't' of type Q8_0 has rows that are not whole blocks (got 1, limit a multiple of 32)",
        ),
        (
            File(tensors=(Tensor("t", offset=32),)),
            "tensor 't' has the wrong data offset (got 32, limit exactly 0)",
        ),
        (
            File(tensors=(Tensor("t", (2**61, 2), 0, data=b""),)),
            f"tensor 't' is too large to address (got {2**64} bytes)",
        ),
        (
            File(tensors=(Tensor("a", (32,)), Tensor("b", (32, 4)))).encode()[:-1],
            "is truncated: 1 bytes of tensor data are missing, the last whole tensor is 'a' "
            "(got 799 bytes, limit 800 bytes); an interrupted download or copy; fetch it again",
        ),
        (
            File(tensors=(Tensor("a", (32,)), Tensor("b", (32, 4)))).encode()[:-512],
            "is truncated: 512 bytes of tensor data are missing, the last whole tensor is 'a' "
            "(got 288 bytes, limit 800 bytes); an interrupted download or copy; fetch it again",
        ),
    ],
)
def test_a_refusal_says_what_was_found_and_what_would_be_right(tmp_path, content, said):
    found = _said(tmp_path, content)
    assert found == said


@pytest.mark.parametrize(
    ("values", "n"),
    [
        ((BOOL, 0), 0),
        ((BOOL, 1), 0),
        ((BOOL, 2), 1),
        ((ARR, (BOOL, [])), 0),
        ((ARR, (BOOL, [0, 1, 1])), 0),
        ((ARR, (BOOL, [2, 1])), 1),
        ((ARR, (BOOL, [1, ord("X")])), 1),
        ((U32, 7), 0),
    ],
)
def test_a_bool_is_odd_where_it_is_neither_0_nor_1(tmp_path, values, n):
    header = parse_header(File().with_pairs(pair("k", *values)).write(tmp_path / "m.gguf"))
    text = "key 'k' holds a bool that is neither 0 nor 1; its bytes are kept"
    assert header.warnings == (text,) * n


@pytest.mark.parametrize(("shape", "what"), [((), "no dimensions"), ((0,), "no elements"), ((4, 0, 2), "no elements")])
def test_a_tensor_without_elements_or_dimensions_is_warned_of(tmp_path, shape, what):
    header = parse_header(File(tensors=(Tensor("t", shape, data=bytes(4 * (not shape))),)).write(tmp_path / "m.gguf"))
    assert header.warnings == (f"tensor 't' has {what}; it is copied as it is",)


def test_padding_is_wanted_only_where_data_follows(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(File(tensors=()).encode().rstrip(b"\0"))
    header = parse_header(path)
    assert (header.tensors, header.data_size, header.trailing_bytes) == ((), 0, 0)
    assert header.data_start == header.file_size == path.stat().st_size
    empty = File(tensors=(Tensor("t", (0,), data=b""),))
    size = len(empty.header())
    assert "the padding before the tensor data" in _said(tmp_path, empty.encode()[: size - 1])


EMPTY = Metadata("m", {})


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (("a" * 64, (32,), 0), f"tensor '{'a' * 64}' has a name of the wrong length (got 64 bytes, limit 63)"),
        (("a", (1, 1, 1, 1, 1), 0), "tensor 'a' has too many dimensions (got 5, limit 4)"),
        (
            ("a", (), 8),
            "tensor 'a' cannot be Q8_0: its rows are not whole blocks (got 1, limit a multiple of 32)",
        ),
    ],
)
def test_a_layout_that_cannot_be_says_why(tensor, said):
    with pytest.raises(BadInput) as caught:
        lay_out(EMPTY, [tensor], "out.gguf")
    assert str(caught.value) == f"out.gguf: {said}"


def test_a_layout_tells_the_types_and_has_room_for_the_longest_name():
    layout = lay_out(EMPTY, [("a" * 63, (32,), 8), ("b", (), 0)], "out.gguf")
    assert [(t.name, t.shape, t.type_id, t.n_bytes) for t in layout.tensors] == [
        ("a" * 63, (32,), 8, 34),
        ("b", (), 0, 4),
    ]
