"""Differential tests against ggml's own reader: we refuse what it refuses, so all that we accept opens there."""

import ctypes
import math

import ggml
import numpy as np
import pytest
from corpus import CASES, FURTHER
from fuzz.gguf_mutants import NUMBERS, SCALARS, SIZES, Gguf, value_fields
from fuzz.reader import Reader
from gguf_files import ARR, F32, F64, STR
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.container.header import parse_header
from requant.container.source import open_source
from requant.errors import BadInput
from requant.formats import FORMATS, codec

ALL = CASES | FURTHER
BAD_BYTES = (0x00, 0x3C, 0x7C, 0x7D, 0x7E, 0x7F, 0x80, 0xFC, 0xFE, 0xFF)  # those that make infinities and NaN


@pytest.fixture(scope="module")
def ggml_reader():
    with Reader() as reader:
        yield reader


def _accepted(path):
    try:
        parse_header(path)
    except BadInput:
        return False
    return True


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in ALL.items()])
def test_every_case_of_the_corpus_that_we_accept_opens_in_ggml(tmp_path, ggml_reader, case):
    case.write(tmp_path)
    for path in tmp_path.iterdir():
        assert not _accepted(path) or ggml_reader.opens(path)


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20)
names = st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126), min_size=1, max_size=63)


@st.composite
def values(draw, *, nested=True):
    """Any value's fields."""
    type_id = draw(st.sampled_from((*SCALARS, STR, *((ARR,) if nested else ()))))
    if type_id == ARR:
        item = draw(st.sampled_from((*SCALARS, STR)))
        return value_fields(ARR, (item, draw(st.lists(_content(item), max_size=5))))
    return value_fields(type_id, draw(_content(type_id)))


def _content(type_id):
    if type_id == STR:
        return text
    return st.floats(width=32) if type_id in (F32, F64) else st.sampled_from(NUMBERS)


@st.composite
def sound_files(draw):
    """A file of any keys, values and tensors, all of it right."""
    keys = draw(st.lists(text.filter(bool), unique=True, max_size=6))
    pairs = [(key.encode(), draw(values())) for key in keys if not key.startswith("general.")]
    alignment = draw(st.sampled_from((None, 1, 8, 32, 256)))
    if alignment is not None:
        pairs.append((b"general.alignment", value_fields(4, alignment)))
    tensors = []
    for name in draw(st.lists(names, unique=True, max_size=5)):
        type_id = draw(st.sampled_from(sorted(SIZES)))
        rows = draw(st.lists(st.integers(0, 3), max_size=3))
        tensors.append([name.encode(), (SIZES[type_id][0] * draw(st.integers(1, 2)), *rows), type_id])
    return Gguf(pairs, tensors, draw(st.sampled_from((2, 3))), alignment or 32)


@settings(max_examples=500, deadline=None)
@given(sound_files())
def test_every_sound_file_opens_in_both_and_holds_the_same(tmp_path_factory, file):
    content = b"".join(file.fields())
    path = tmp_path_factory.getbasetemp() / "sound.gguf"
    path.write_bytes(content)
    with open_source(path) as source:
        header = source.opened[0].header
        ours = {t.name: (t.type_id, header.data_start + t.info.offset, t.n_bytes) for t in source.tensors}
        assert content[24:].startswith(source.metadata.encode())
        for key in source.metadata:
            source.metadata.get(key)
    assert ggml.file_tensors(path) == ours


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.can_decode], ids=lambda fmt: fmt.name)
def test_what_ggml_does_not_take_for_weights_is_not_finite_here(fmt):
    validate = ggml.library().ggml_validate_row_data
    validate.restype, validate.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    rng = np.random.default_rng(fmt.type_id)
    blocks = rng.integers(0, 256, (400, max(1, 4 // fmt.block_bytes) * fmt.block_bytes), np.uint8)
    blocks[::2] &= rng.integers(0, 2, blocks[::2].shape, np.uint8) * 255  # many codes of zero
    odd = rng.random(blocks.shape) < 0.3
    blocks[odd] = rng.choice(BAD_BYTES, odd.sum())
    refused = 0
    for block in blocks:
        finite = codec.first_nonfinite(codec.dequantize(block[None], fmt)) is None
        valid = validate(fmt.type_id, block.ctypes.data, block.size)
        refused += not valid
        assert valid or not finite, block.tobytes().hex()
    assert refused or fmt.name in ("I8", "I16", "I32", "I64", "F64", "NVFP4"), math.nan
