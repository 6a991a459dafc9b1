"""The corpus of malformed files: every case by name, with its verdict and its bytes.

`CASES` has exactly the names of fixtures/malformed_names.txt, `FURTHER` ones of our own. scripts/make/make_malformed.py
writes them all as files.
"""

import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from gguf_files import (
    ARCHITECTURE,
    ARR,
    BOOL,
    F32,
    I32,
    STR,
    U8,
    U32,
    U64,
    File,
    Tensor,
    array,
    pair,
    split_files,
    split_pairs,
    string,
    value,
)


@dataclass(frozen=True)
class Link:
    """A symbolic link to write in place of a file."""

    target: str


@dataclass(frozen=True)
class Sparse:
    """A file of `size` bytes that begins with `start`; the rest is a hole."""

    start: bytes
    size: int


@dataclass(frozen=True)
class Case:
    """One case. `files`: what to write by name, the first is the one to open.

    verdict: R refused, A accepted, W accepted with a warning, N accepted, but what reads its weights stops.
    level: what refuses it. parser: of a file's header; set: of all shards; model: require_model; planner: what reads
    the hyperparameters; imatrix: its reader; coverage: a model (then the last of `files`) it does not fit.
    said: an expression that is found in the message or the warning.
    """

    verdict: str
    files: dict
    said: str = ""
    level: str = "parser"

    @property
    def is_imatrix(self):
        return self.level in ("imatrix", "coverage")

    def write(self, folder):
        """Write the files; the path of the one to open."""
        for name, content in self.files.items():
            path = Path(folder) / name
            if isinstance(content, Link):
                path.symlink_to(content.target)
            elif isinstance(content, Sparse):
                path.write_bytes(content.start)
                os.truncate(path, content.size)
            else:
                path.write_bytes(content)
        return Path(folder) / next(iter(self.files))


def _r(content, said, level="parser"):
    return Case("R", {"case.gguf": content}, said, level)


def _a(content):
    return Case("A", {"case.gguf": content})


def _w(content, said):
    return Case("W", {"case.gguf": content}, said)


def _weights(n):
    """n numbers like weights as float32."""
    return struct.pack(f"<{n}f", *((i * 37 % 101 - 50) / 1000 for i in range(n)))


ARCHITECTURE_PAIR = pair(ARCHITECTURE, STR, "llama")
COUNTS = {
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 2,
    "block_count": 1,
    "vocab_size": 8,
}
FILE = File(
    (ARCHITECTURE_PAIR, *(pair(f"llama.{key}", U32, n) for key, n in COUNTS.items())), (Tensor(data=_weights(64)),)
)
N_PAIRS = len(FILE.pairs)
U32_ONE = value(U32, 1)
TWO = (Tensor("a", data=_weights(64)), Tensor("b", data=_weights(64)))


def _pairs(*raw):
    return FILE.with_pairs(*raw).encode()


def _without(name, *raw):
    """The sound file without a key, and with other pairs."""
    left = (p for p in FILE.pairs if not p.startswith(string(name)))
    return replace(FILE, pairs=(*left, *raw)).encode()


def _tensors(*tensors, **changes):
    return replace(FILE, tensors=tuple(_filled(t) for t in tensors), **changes).encode()


def _filled(tensor):
    small = tensor.data is None and tensor.type_id == 0 and 0 <= tensor.n_bytes < 2**20
    return replace(tensor, data=_weights(tensor.n_bytes // 4)) if small else tensor


def _bare(shape, type_id=0):
    """One tensor of any declared size without data."""
    return _tensors(Tensor(shape=shape, type_id=type_id, data=b""))


def _aligned(alignment):
    return replace(FILE, alignment=alignment).with_pairs(pair("general.alignment", U32, alignment)).encode()


def _alignment_key(type_id, content):
    return _pairs(pair("general.alignment", type_id, content))


def _second(offset):
    """Two tensors of 256 bytes, the second with that offset."""
    return _tensors(Tensor("a"), Tensor("b", offset=offset))


def _values(shape, type_id, data):
    """A sound matrix, and one whose data is no number somewhere."""
    odd = Tensor("blk.0.ffn_down.weight", shape, type_id, data=data)
    return Case("N", {"case.gguf": _tensors(Tensor(), odd)}, "blk.0.ffn_down.weight", "values")


def _splits(changes, said, files=None):
    """A split model of two shards, some of them changed: {index: File, Link or bytes}."""
    names = list(split_files(2, 1))
    sound = [
        replace(FILE, pairs=(FILE.pairs if i == 0 else ()) + split_pairs(i, 2, 2), tensors=(TWO[i],)) for i in (0, 1)
    ]
    contents = {name: changes.get(i, sound[i]) for i, name in enumerate(names)}
    written = {name: c.encode() if isinstance(c, File) else c for name, c in contents.items()}
    return Case("R", written, said, "set")


def _shard(number, *, no=None, count=2, n_tensors=2, tensor=None, pairs=None):
    head = (FILE.pairs if number == 0 else ()) if pairs is None else pairs
    keys = split_pairs(number if no is None else no, count, n_tensors)
    return replace(FILE, pairs=head + keys, tensors=(tensor or TWO[number],))


IMX_SUMS, IMX_COUNTS = "blk.0.ffn_up.weight.in_sum2", "blk.0.ffn_up.weight.counts"


def _imatrix(sums=None, counts=None):
    """A GGUF importance matrix of one tensor, of 32 columns."""
    sums = sums or Tensor(IMX_SUMS, (32, 1), data=struct.pack("<32f", *range(1, 33)))
    counts = counts or Tensor(IMX_COUNTS, (1, 1), data=struct.pack("<f", 4))
    return File((pair("general.type", STR, "imatrix"),), (sums, counts)).encode()


def _sums(odd):
    return Tensor(IMX_SUMS, (32, 1), data=struct.pack("<32f", odd, *range(1, 32)))


def _counts(*counts):
    return Tensor(IMX_COUNTS, (1, len(counts)), data=struct.pack(f"<{len(counts)}f", *counts))


def _legacy(name_length=None, n_values=32):
    """A legacy importance matrix of the same tensor."""
    name = b"blk.0.ffn_up.weight"
    entry = struct.pack("<i", len(name) if name_length is None else name_length) + name
    return struct.pack("<i", 1) + entry + struct.pack("<ii32f", 4, n_values, *range(1, 33))


def _imx(content, said, name="imatrix.gguf"):
    return Case("R", {name: content, "model.gguf": FILE.encode()}, said, "imatrix")


CASES = {
    # header
    "hdr_empty_file": _r(b"", "is empty"),
    "hdr_3_bytes": _r(b"GGU", "too short"),
    "hdr_magic_only": _r(b"GGUF", "too short"),
    "hdr_bad_magic": _r(replace(FILE, magic=b"GG\x1bX").encode(), r"not a GGUF file \(got 'GG\\x1bX'"),
    "hdr_version_0": _r(replace(FILE, version=0).encode(), "version"),
    "hdr_version_1": _r(replace(FILE, version=1).encode(), "version"),
    "hdr_version_4": _r(replace(FILE, version=4).encode(), "version"),
    "hdr_big_endian_version": _r(replace(FILE, version=3 << 24).encode(), "big-endian"),
    "hdr_truncated_counts": _r(FILE.encode()[:20], "too short"),
    "hdr_n_tensors_minus1": _r(replace(FILE, n_tensors=-1).encode(), "more tensors"),
    "hdr_n_tensors_2e30": _r(replace(FILE, n_tensors=2**30).encode(), "more tensors"),
    "hdr_n_kv_minus1": _r(replace(FILE, n_pairs=-1).encode(), "more keys"),
    "hdr_n_kv_2e40": _r(replace(FILE, n_pairs=2**40).encode(), "more keys"),
    "hdr_n_kv_one_too_many": _r(replace(FILE, n_pairs=N_PAIRS + 1).encode(), "past the end"),
    "hdr_n_tensors_one_too_many": _r(replace(FILE, n_tensors=2).encode(), "tensor"),
    "hdr_n_tensors_one_too_few": _w(
        replace(FILE, tensors=(Tensor("a"), Tensor("b")), n_tensors=1).encode(), "bytes of no tensor"
    ),
    "hdr_zero_kv_zero_tensors": _r(File((), ()).encode(), "architecture", "model"),
    "hdr_version_2_valid": _a(replace(FILE, version=2).encode()),
    "data_zeros_header": _r(bytes(4096), "interrupted llama-quantize"),
    "hdr_gzip_or_safetensors_magic": _r(b"\x1f\x8b\x08\x00" + bytes(60), "gzip"),
    # key-value pairs
    "kv_key_len_minus1": _r(_pairs(string("k", -1) + U32_ONE), "past the end"),
    "kv_key_len_2e62": _r(_pairs(string("k", 2**62) + U32_ONE), "past the end"),
    "kv_key_len_past_eof": _r(_pairs(string("k", 5000) + U32_ONE), "past the end"),
    "kv_key_empty": _r(_pairs(string("") + U32_ONE), "empty"),
    "kv_key_70k": _r(_pairs(string("k" * 70_000) + U32_ONE), "too long"),
    "kv_key_invalid_utf8": _r(_pairs(string(b"k\xff\xfe") + U32_ONE), "UTF-8"),
    "kv_key_nul": _r(_pairs(string("k\0x") + U32_ONE), "NUL"),
    "kv_key_dup": _r(_pairs(pair(ARCHITECTURE, STR, "x")), f"twice, as key 0 and key {N_PAIRS}"),
    "kv_type_13": _r(_pairs(string("k") + struct.pack("<II", 13, 0)), "unknown value type"),
    "kv_type_minus1": _r(_pairs(string("k") + struct.pack("<iI", -1, 0)), "unknown value type"),
    "kv_str_len_2e63": _r(_pairs(string("k") + struct.pack("<I", STR) + string("v", 2**63)), "past the end"),
    "kv_str_len_past_eof": _r(_pairs(string("k") + struct.pack("<I", STR) + string("v", 9999)), "past the end"),
    "kv_str_invalid_utf8": _a(_pairs(string("k") + struct.pack("<I", STR) + string(b"\xff\xc0v"))),
    "kv_str_nul": _a(_pairs(pair("k", STR, "a\0b"))),
    "kv_bool_2": _w(_pairs(pair("k", BOOL, 2)), "neither 0 nor 1"),
    "kv_truncated_value": _r(
        FILE.with_pairs(pair("k", U64, 1)).header().split(pair("k", U64, 1))[0] + pair("k", U64, 1)[:-4], "past the end"
    ),
    "kv_arr_len_2e63": _r(_pairs(string("k") + array(U8, 2**63)), "past the end"),
    "kv_arr_len_2e30_u8": _r(_pairs(string("k") + array(U8, 2**30)), "past the end"),
    "kv_arr_len_overflow_x8": _r(_pairs(string("k") + array(U64, 2**61 + 1, bytes(8))), "past the end"),
    "kv_arr_past_eof": _r(_pairs(string("k") + array(F32, 999)), "past the end"),
    "kv_arr_of_arr": _r(_pairs(string("k") + array(ARR, 1, struct.pack("<IQB", U8, 1, 0))), "array of arrays"),
    "kv_arr_nested_3000": _r(_pairs(string("k") + array(ARR, 1, struct.pack("<IQ", ARR, 1) * 3000)), "of arrays"),
    "kv_arr_bad_item_type": _r(_pairs(string("k") + array(99, 1, bytes(8))), "unknown value type"),
    "kv_arr_bad_item_type_len0": _r(_pairs(string("k") + array(99, 0)), "unknown value type"),
    "kv_arr_str_item_len_past_eof": _r(_pairs(string("k") + array(STR, 2, string("a") + string("b", 9999))), "item 1"),
    "kv_arr_empty_valid": _a(_pairs(pair("k", ARR, (I32, [])), pair("l", ARR, (STR, [])))),
    "kv_str_empty_valid": _a(_pairs(pair("k", STR, ""))),
    "kv_arr_str_1e6_empty": _a(_pairs(string("k") + array(STR, 10**6, bytes(8 * 10**6)))),
    "kv_align_0": _r(_alignment_key(U32, 0), "power of two"),
    "kv_align_13": _r(_alignment_key(U32, 13), "power of two"),
    "kv_align_1": _a(_aligned(1)),
    "kv_align_4": _a(_aligned(4)),
    "kv_align_2e31": _r(_alignment_key(U32, 2**31), "too large"),
    "kv_align_2e20_plus": _r(_alignment_key(U32, 2**21), "too large"),
    "kv_align_i32_type": _r(_alignment_key(I32, 32), "wrong type"),
    "kv_align_string_type": _r(_alignment_key(STR, "32"), "wrong type"),
    "kv_arch_missing": _r(_without(ARCHITECTURE), "is missing", "model"),
    "kv_arch_u32": _r(_without(ARCHITECTURE, pair(ARCHITECTURE, U32, 1)), "must be a string", "model"),
    "kv_arch_traversal": _r(_without(ARCHITECTURE, pair(ARCHITECTURE, STR, "../../etc")), "not a usable name", "model"),
    "kv_key_shadows_reader_field": _a(_pairs(pair("GGUF.version", U32, 9), pair("tensors", U32, 9))),
    "kv_chat_template_jinja_exploit": _a(_pairs(pair("tokenizer.chat_template", STR, "{{ ''.__class__ }}"))),
    "kv_name_ansi_escape": _a(_pairs(pair("general.name", STR, "\x1b[2J"))),
    "kv_block_count_2e31": _r(
        _without("llama.block_count", pair("llama.block_count", U32, 2**31)), "out of range", "planner"
    ),
    "kv_head_count_0": _r(
        _without("llama.attention.head_count", pair("llama.attention.head_count", U32, 0)), "out of range", "planner"
    ),
    "kv_quant_version_99": _w(_pairs(pair("general.quantization_version", U32, 99)), "unusual"),
    "kv_file_type_string": _w(_pairs(pair("general.file_type", STR, "Q4")), "unusual"),
    # tensor infos
    "ti_name_len_2e63": _r(_tensors(Tensor("a", name_length=2**63)), "past the end"),
    "ti_name_len_past_eof": _r(_tensors(Tensor("a", name_length=9999)), "past the end"),
    "ti_name_empty": _r(_tensors(Tensor("")), "empty"),
    "ti_name_64_bytes": _r(_tensors(Tensor("a" * 64)), "too long"),
    "ti_name_63_bytes_ok": _a(_tensors(Tensor("a" * 63))),
    "ti_name_invalid_utf8": _r(_tensors(Tensor(b"a\xff")), "UTF-8"),
    "ti_name_nul": _r(_tensors(Tensor("a\0b")), "control"),
    "ti_name_path_traversal": _a(_tensors(Tensor("../../etc/passwd"))),
    "ti_name_ansi_escape": _r(_tensors(Tensor("a\x1b[2J")), r"control"),
    "ti_name_dup": _r(_tensors(Tensor("a"), Tensor("a")), "twice, as tensor 0 and tensor 1"),
    "ti_name_bidi": _w(_tensors(Tensor("a\u202eb")), r"invisible"),
    "ti_ndims_0": _w(_tensors(Tensor(shape=())), "no dimensions"),
    "ti_ndims_5": _r(_tensors(Tensor(shape=(1, 1, 1, 1, 1))), "dimensions"),
    "ti_ndims_1e6": _r(_tensors(Tensor(n_dims=10**6)), "dimensions"),
    "ti_ndims_2e32m1": _r(_tensors(Tensor(n_dims=2**32 - 1)), "dimensions"),
    "ti_dim_0": _w(_tensors(Tensor(shape=(32, 0))), "no elements"),
    "ti_dim_minus1": _r(_bare((-1,)), "too many elements"),
    "ti_dim_2e63": _r(_bare((2**63,)), "too many elements"),
    "ti_ne_overflow": _r(_bare((2**31, 2**31, 2)), "too many elements"),
    "ti_ne_wraps_to_0": _r(_bare((2**32, 2**32)), "too many elements"),
    "ti_ne_wraps_to_4": _r(_bare((2**62 + 1, 4)), "too many elements"),
    "ti_nbytes_overflow_i64": _r(_bare((2**62,)), "too large"),
    "ti_nbytes_pad_wrap": _r(_bare((2**63 - 1,), 24), "too large"),
    "ti_total_overflow": _r(_tensors(*(Tensor(name, (2**62,), 24, data=b"") for name in "abcd")), "too large"),
    "ti_type_minus1": _r(_tensors(Tensor(type_id=-1)), "unknown type"),
    "ti_type_count": _r(_tensors(Tensor(type_id=43)), "newer requant"),
    "ti_type_9999": _r(_tensors(Tensor(type_id=9999)), "unknown type"),
    "ti_type_removed_q4_2": _r(_tensors(Tensor(type_id=4)), "Q4_2, removed"),
    "ti_type_removed_q4_0_4_4": _r(_tensors(Tensor(type_id=31)), "Q4_0_4_4, removed"),
    "ti_row_not_block_multiple_q8_0": _r(_bare((33, 2), 8), "multiple of 32"),
    "ti_row_not_block_multiple_q4_K": _r(_bare((128, 2), 12), "multiple of 256"),
    "ti_offset_minus1": _r(_tensors(Tensor(offset=-1)), "wrong data offset"),
    "ti_offset_past_eof": _r(_tensors(Tensor(offset=2**20)), "wrong data offset"),
    "ti_offset_wraps_to_header": _r(_second(2**64 - 64), "wrong data offset"),
    "ti_offset_unaligned": _r(_second(257), "wrong data offset"),
    "ti_offset_overlap": _r(_second(32), "wrong data offset"),
    "ti_offset_same": _r(_second(0), "wrong data offset"),
    "ti_offset_hole": _r(_second(512), "exactly 256"),
    "ti_offset_unordered": _r(_tensors(Tensor("a", offset=256), Tensor("b", offset=0)), "wrong data offset"),
    "ti_truncated": _r(
        FILE.header().split(string("blk.0.ffn_up.weight"))[0] + string("blk.0.ffn_up.weight")[:20], "past the end"
    ),
    # data
    "data_missing": _r(FILE.header(), "256 bytes of tensor data are missing, no tensor is whole"),
    "data_one_byte_short": _r(
        _tensors(Tensor("a"), Tensor("b"))[:-1], "1 bytes of tensor data are missing, the last whole tensor is 'a'"
    ),
    "data_last_pad_missing": _a(_tensors(Tensor(shape=(3,)), last_padding=False)),
    "data_trailing_garbage": _w(replace(FILE, trailing=b"garbage").encode(), "7 bytes of no tensor"),
    "data_f32_nan": _values((32, 2), 0, struct.pack("<64f", *[0.5] * 40, math.nan, *[0.5] * 23)),
    "data_f16_inf": _values((32, 2), 1, struct.pack("<64e", *[0.5] * 40, math.inf, *[0.5] * 23)),
    "data_q4k_scale_nan": _values((256, 2), 12, bytes(144) + struct.pack("<e", math.nan) + bytes(142)),
    "data_mxfp4_e_ff": _values((32, 2), 39, bytes(17) + b"\xff" + bytes(16)),
    # split models
    "split_count_65535": _splits({0: _shard(0, count=65_535)}, "its name must end in '-00001-of-65535.gguf'"),
    "split_no_out_of_range": _splits({0: _shard(0, no=2)}, "key 'split.no' is out of range"),
    "split_tensors_count_wrong": _splits(
        {0: _shard(0, n_tensors=3), 1: _shard(1, n_tensors=3)}, "does not fit the shards"
    ),
    "split_dup_tensor_across_shards": _splits({1: _shard(1, tensor=TWO[0])}, "'a' is also in"),
    "split_shard_is_symlink_loop": _splits({1: Link(next(reversed(split_files(2, 1))))}, "loop of symbolic links"),
    "split_name_mismatch": _splits({1: _shard(1, no=0)}, "does not fit its name"),
    # importance matrices
    "imx_zero_counts": _imx(_imatrix(counts=_counts()), "wrong number of counts"),
    "imx_nan": _imx(_imatrix(_sums(math.nan)), "is no mean square"),
    "imx_negative": _imx(_imatrix(_sums(-1.0)), "is no mean square"),
    "imx_wrong_size": replace(
        _imx(
            _imatrix(Tensor(IMX_SUMS, (16, 1), data=_weights(16)[:4] * 0 + struct.pack("<16f", *[1.0] * 16))),
            "another size",
        ),
        level="coverage",
    ),
    "imx_legacy_len_minus1": _imx(_legacy(-1), "length at offset 4 is out of range", "imatrix.dat"),
    "imx_legacy_nval_2e31": _imx(_legacy(n_values=-(2**31)), "number of values", "imatrix.dat"),
    # a file of 1 TiB that is one hole
    "sparse_1TiB_file_valid_header": Case(
        "A",
        {"case.gguf": Sparse(_bare((2**20, 2**18)), len(_bare((2**20, 2**18))) + 2**40)},
    ),
}

FURTHER = {
    "hdr_safetensors_magic": _r(struct.pack("<Q", 90) + b'{"a":' + bytes(90), "safetensors"),
    "kv_arr_bool_2": _w(_pairs(pair("k", ARR, (BOOL, [0, 1, 2]))), "neither 0 nor 1"),
    "kv_arr_str_len_overflow_x8": _r(_pairs(string("k") + array(STR, 2**61 + 1, bytes(8))), "past the end"),
    "kv_arr_str_item_len_2e64": _r(_pairs(string("k") + array(STR, 2, string("a", -1) + string("b"))), "item 0"),
    "kv_align_array_type": _r(_alignment_key(ARR, (U32, [32])), "wrong type"),
    "ti_dim_0_after_overflow": _r(_bare((2**62, 2**62, 0)), "too many elements"),
    "ti_dim_0_huge_rows": _w(_bare((0, 2**62)), "no elements"),
    "ti_dim_0_huge_columns": _w(_bare((2**62, 0)), "no elements"),
    "ti_dim_0_huge_experts": _w(_bare((0, 2, 2**62)), "no elements"),
    "imx_all_counts_0": _imx(_imatrix(counts=_counts(0.0)), "no token is behind"),
    "imx_counts_nan": _imx(_imatrix(counts=_counts(math.nan)), "is no mean square"),
    "imx_legacy_nan": _imx(_legacy()[:-4] + struct.pack("<f", math.nan), "is no mean square", "imatrix.dat"),
    "split_sibling_of_another_model": _splits(
        {1: _shard(1, pairs=(pair(ARCHITECTURE, STR, "qwen2"),))}, "different models"
    ),
    "split_sibling_missing": replace(
        _splits({}, "1 of 2 files are missing"), files=dict(list(_splits({}, "").files.items())[:1])
    ),
}
