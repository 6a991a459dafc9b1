"""One suite for every format of FORMATS: sizes, decoding bit for bit as ggml does, compiled or not."""

import os
import subprocess
import sys
from pathlib import Path

import ggml
import gguf
import naive
import numpy as np
import pytest
from blocks import edge_blocks, random_blocks, sane_blocks
from compare import assert_same_bytes, assert_same_floats
from hypothesis import given, settings
from hypothesis import strategies as st
from uncompiled import compensate_rows

from requant.formats import FORMATS, Effort, by_name, feedback
from requant.formats.base import BlockFormat

GOLDEN = Path(__file__).parents[2] / "fixtures" / "decode_golden.npz"
DECODED = [fmt for fmt in FORMATS.values() if fmt.can_decode]
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
each_decoded = pytest.mark.parametrize("fmt", DECODED, ids=lambda fmt: fmt.name)


def decode(fmt: BlockFormat, data: np.ndarray) -> np.ndarray:
    """(n, block_bytes) uint8 -> (n, block_weights) float32."""
    out = np.full((data.shape[0], fmt.block_weights), -7, np.float32)
    fmt.kernels.decode(data.view(fmt.kernels.LAYOUT)[:, 0], out)
    return out


def decode_by_ggml(fmt: BlockFormat, data: np.ndarray) -> np.ndarray:
    return ggml.decode(fmt.type_id, data).reshape(-1, fmt.block_weights)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as stored:
        return dict(stored)


@each_format
def test_name_and_sizes_are_those_of_ggml(fmt):
    assert ggml.type_name(fmt.type_id).upper() == fmt.name
    assert ggml.type_sizes(fmt.type_id) == (fmt.block_weights, fmt.block_bytes)
    assert by_name(fmt.name.lower()) is fmt


@each_decoded
def test_layout_is_as_large_as_the_block(fmt):
    assert fmt.kernels.LAYOUT.itemsize == fmt.block_bytes
    assert fmt.block_weights == fmt.kernels.N


@each_decoded
def test_golden_blocks_decode_to_the_stored_bits(fmt, golden):
    data = np.concatenate([golden[f"{fmt.name}.sane"], golden[f"{fmt.name}.edges"]])
    assert_same_floats(decode(fmt, data), golden[f"{fmt.name}.values"].view(np.float32), fmt.name, data)


def test_golden_file_has_no_type_that_is_not_decoded(golden):
    assert {key.partition(".")[0] for key in golden} == {fmt.name for fmt in DECODED}


@each_decoded
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_bytes_decode_as_ggml_decodes_them(fmt, data):
    n = data.draw(st.integers(1, 3))
    drawn = data.draw(st.binary(min_size=n * fmt.block_bytes, max_size=n * fmt.block_bytes))
    blocks = np.frombuffer(drawn, np.uint8).reshape(n, fmt.block_bytes)
    assert_same_floats(decode(fmt, blocks), decode_by_ggml(fmt, blocks), fmt.name, blocks)


@each_decoded
def test_every_byte_value_decodes_as_ggml_decodes_it(fmt):
    blocks = random_blocks(fmt, 1 + 65536 // fmt.block_bytes, np.random.default_rng(1))
    assert_same_floats(decode(fmt, blocks), decode_by_ggml(fmt, blocks), fmt.name, blocks)


@each_decoded
def test_every_half_or_byte_scale_decodes_as_ggml_decodes_it(fmt):
    rng = np.random.default_rng(2)
    blocks = np.concatenate([edge_blocks(fmt, rng) for _ in range(8)])
    assert_same_floats(decode(fmt, blocks), decode_by_ggml(fmt, blocks), fmt.name, blocks)


@each_decoded
def test_a_decoder_in_numpy_gives_the_same(fmt):
    blocks = sane_blocks(fmt, 64, np.random.default_rng(3))
    if fmt.name in naive.DECODERS:
        want = naive.DECODERS[fmt.name](blocks)
    else:
        want = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(fmt.type_id))
    assert_same_floats(decode(fmt, blocks), want.reshape(-1, fmt.block_weights).astype(np.float32), fmt.name, blocks)


@each_decoded
def test_decoding_leaves_its_input_alone(fmt):
    blocks = random_blocks(fmt, 5, np.random.default_rng(4))
    before = blocks.copy()
    decode(fmt, blocks)
    assert_same_bytes(blocks, before, fmt.name)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(5).standard_t(5, (1, 256)).astype(np.float32) * np.float32(0.02)


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory, rows) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("uncompiled")
    np.save(folder / "rows.npy", rows)
    command = [sys.executable, str(Path(__file__).with_name("uncompiled.py")), str(GOLDEN)]
    done = subprocess.run(
        [*command, str(folder / "rows.npy"), str(folder / "out.npz")],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as stored:
        return dict(stored)


@each_decoded
def test_uncompiled_kernels_give_the_same_bits(fmt, golden, rows, uncompiled):
    assert f"{fmt.name}.failure" not in uncompiled, str(uncompiled[f"{fmt.name}.failure"])
    for kind in ("sane", "edges"):
        data = golden[f"{fmt.name}.{kind}"]
        assert_same_floats(uncompiled[f"{fmt.name}.{kind}"], decode(fmt, data), f"{fmt.name} {kind}", data)
    if fmt.can_encode:
        x = rows.reshape(-1, fmt.block_weights)
        blocks = np.zeros(x.shape[0], fmt.kernels.LAYOUT)
        fmt.kernels.encode(x, np.ones((1, fmt.block_weights), np.float32), blocks, Effort.DEFAULT.value)
        assert_same_bytes(uncompiled[f"{fmt.name}.encoded"], blocks.view(np.uint8).reshape(x.shape[0], -1), fmt.name)
    if fmt.can_encode and feedback.can_compensate(fmt):
        assert_same_bytes(uncompiled[f"{fmt.name}.compensated"], compensate_rows(fmt, rows), f"{fmt.name} compensated")
