"""Metadata: edited keys change, all others keep their bytes and order."""

import struct

import pytest
from gguf_files import ARR, BOOL, F32, I32, STR, U8, U16, U32, U64, File, array, pair, string
from hypothesis import given
from hypothesis import strategies as st

from requant.container.header import parse_header
from requant.container.metadata import SCALARS, Metadata, decode_value, encode_value, read_alignment
from requant.errors import BadInput, UsageError

INT_RANGES = {"u8": (0, 8), "i8": (1, 8), "u16": (0, 16), "i16": (1, 16), "u32": (0, 32), "i32": (1, 32)}
INT_RANGES |= {"u64": (0, 64), "i64": (1, 64)}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def metadata_of(tmp_path, *pairs):
    return parse_header(File().with_pairs(*pairs).write(tmp_path / "m.gguf")).metadata


def _items(type_name):
    if type_name == "str":
        return TEXTS
    if type_name == "bool":
        return st.booleans()
    if type_name in INT_RANGES:
        signed, bits = INT_RANGES[type_name]
        low = -(2 ** (bits - 1)) if signed else 0
        return st.integers(low, low + 2**bits - 1)
    return st.floats(width=int(type_name[1:]), allow_nan=False)


@st.composite
def typed_values(draw):
    type_name = draw(st.sampled_from([*SCALARS, "str"]))
    if draw(st.booleans()):
        return f"arr_{type_name}", draw(st.lists(_items(type_name), max_size=5))
    return type_name, draw(_items(type_name))


@given(typed_values())
def test_every_type_comes_back_as_it_went_in(typed):
    value = encode_value("k", *typed)
    assert value.type_name == typed[0]
    assert decode_value(value) == typed[1]


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=6), typed_values()), st.data())
def test_editing_changes_the_named_keys_and_nothing_else(pairs, data):
    before = Metadata("m", {}).with_values(pairs)
    edits = data.draw(st.dictionaries(st.sampled_from([*pairs, "new"]), st.none() | typed_values()))
    after = before.with_values(edits)
    kept = [k for k in before if edits.get(k, "") is not None]
    assert list(after) == kept + [k for k in edits if k not in pairs and edits[k] is not None]
    for key in after:
        assert after.values[key] == (encode_value(key, *edits[key]) if key in edits else before.values[key])
    assert before == Metadata("m", {}).with_values(pairs)


def test_unedited_pairs_are_copied_byte_for_byte(tmp_path):
    odd = [
        pair("empty.strings", ARR, (STR, ["", ""])),
        pair("empty.array", ARR, (I32, [])),
        pair("small.ints", ARR, (U8, [1, 2])),
        pair("odd.bool", BOOL, 7),
        string("bad.utf8") + struct.pack("<I", STR) + string(b"\xff\xfe"),
        pair("nul", STR, "a\0b"),
    ]
    metadata = metadata_of(tmp_path, *odd)
    changed = metadata.with_values({"small.ints": None, "added": ("u32", 5)})
    del odd[2]
    assert changed.encode() == b"".join([*File().pairs, *odd, pair("added", U32, 5)])


def test_strings_that_are_not_utf8_can_be_read_and_written_back(tmp_path):
    raw = string("k") + struct.pack("<I", STR) + string(b"a\xff")
    metadata = metadata_of(tmp_path, raw)
    text = metadata.get("k")
    assert text == "a\udcff"
    assert metadata.with_values({"k": ("str", text)}).encode() == metadata.encode()


def test_an_array_is_counted_without_being_decoded(tmp_path):
    metadata = metadata_of(tmp_path, string("k") + array(STR, 3, string("a") * 3), pair("n", U32, 3))
    assert metadata.array_length("k") == 3
    assert metadata.array_length("n") is None
    assert metadata.array_length("missing") is None


def test_a_value_of_the_wrong_type_is_bad_input_that_names_key_and_type(tmp_path):
    metadata = metadata_of(tmp_path, pair("n", ARR, (F32, [1.0])), pair("b", BOOL, 1), pair("i", U64, 7))
    with pytest.raises(BadInput, match=r"key 'n' must be an integer \(got arr_f32\)"):
        metadata.get_int("n")
    with pytest.raises(BadInput, match=r"key 'b' must be a number \(got bool\)"):
        metadata.get_float("b")
    with pytest.raises(BadInput, match=r"key 'i' must be a string"):
        metadata.get_str("i")
    with pytest.raises(BadInput, match=r"key 'i' must be a bool"):
        metadata.get_bool("i")
    with pytest.raises(BadInput, match=r"key 'i' must be an array"):
        metadata.get_list("i")


def test_missing_keys_give_the_default(tmp_path):
    metadata = metadata_of(tmp_path, pair("i", U64, 7))
    assert (metadata.get("x"), metadata.get_int("x", 3), metadata.get_str("x"), metadata.get_float("i")) == (
        None,
        3,
        None,
        7.0,
    )


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("k", ("u8", 256)),
        ("k", ("u32", -1)),
        ("k", ("u32", "1")),
        ("k", ("f32", 1e300)),
        ("k", ("str", 5)),
        ("k", ("arr_str", [1])),
        ("k", ("arr_u8", 5)),
        ("k", ("u33", 5)),
        ("", ("u8", 5)),
        ("k" * 65_536, ("u8", 5)),
        ("a\0b", ("u8", 5)),
    ],
)
def test_what_cannot_be_written_is_a_usage_error(key, change):
    with pytest.raises(UsageError, match="metadata key"):
        Metadata("m", {}).with_values({key: change})


def test_alignment_is_32_unless_the_file_says_otherwise(tmp_path):
    assert read_alignment(metadata_of(tmp_path)) == 32
    assert read_alignment(Metadata("m", {}).with_values({"general.alignment": ("u32", 64)})) == 64
    with pytest.raises(BadInput, match="wrong type"):
        read_alignment(Metadata("m", {}).with_values({"general.alignment": ("u64", 64)}))


def test_keys_of_shards_may_have_any_integer_type(tmp_path):
    assert metadata_of(tmp_path, pair("split.no", U16, 3)).get_int("split.no") == 3
