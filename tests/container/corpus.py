"""The malformed-GGUF corpus: every named case with its verdict and its bytes.

R the parser refuses, M it accepts but require_model refuses, A accepted, W accepted with a warning.
"""

import struct
from dataclasses import replace

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
    string,
    value,
)

FILE = File()
U32_ONE = value(U32, 1)


def _pairs(*raw):
    return FILE.with_pairs(*raw).encode()


def _tensors(*tensors, **changes):
    return replace(FILE, tensors=tensors, **changes).encode()


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


CASES = {
    # header
    "hdr_empty_file": ("R", b"", "is empty"),
    "hdr_3_bytes": ("R", b"GGU", "too short"),
    "hdr_magic_only": ("R", b"GGUF", "too short"),
    "hdr_bad_magic": ("R", replace(FILE, magic=b"GG\x1bX").encode(), r"not a GGUF file \(got 'GG\\x1bX'"),
    "hdr_version_0": ("R", replace(FILE, version=0).encode(), "version"),
    "hdr_version_1": ("R", replace(FILE, version=1).encode(), "version"),
    "hdr_version_4": ("R", replace(FILE, version=4).encode(), "version"),
    "hdr_big_endian_version": ("R", replace(FILE, version=3 << 24).encode(), "big-endian"),
    "hdr_truncated_counts": ("R", FILE.encode()[:20], "too short"),
    "hdr_n_tensors_minus1": ("R", replace(FILE, n_tensors=-1).encode(), "more tensors"),
    "hdr_n_tensors_2e30": ("R", replace(FILE, n_tensors=2**30).encode(), "more tensors"),
    "hdr_n_kv_minus1": ("R", replace(FILE, n_pairs=-1).encode(), "more keys"),
    "hdr_n_kv_2e40": ("R", replace(FILE, n_pairs=2**40).encode(), "more keys"),
    "hdr_n_kv_one_too_many": ("R", replace(FILE, n_pairs=2).encode(), "past the end"),
    "hdr_n_tensors_one_too_many": ("R", replace(FILE, n_tensors=2).encode(), "tensor"),
    "hdr_n_tensors_one_too_few": (
        "W",
        replace(FILE, tensors=(Tensor("a"), Tensor("b")), n_tensors=1).encode(),
        "bytes of no tensor",
    ),
    "hdr_zero_kv_zero_tensors": ("M", File((), ()).encode(), "architecture"),
    "hdr_version_2_valid": ("A", replace(FILE, version=2).encode(), ""),
    "data_zeros_header": ("R", bytes(4096), "interrupted llama-quantize"),
    "hdr_gzip_magic": ("R", b"\x1f\x8b\x08\x00" + bytes(60), "gzip"),
    "hdr_safetensors_magic": ("R", struct.pack("<Q", 90) + b'{"a":' + bytes(90), "safetensors"),
    # key-value pairs
    "kv_key_len_minus1": ("R", _pairs(string("k", -1) + U32_ONE), "past the end"),
    "kv_key_len_2e62": ("R", _pairs(string("k", 2**62) + U32_ONE), "past the end"),
    "kv_key_len_past_eof": ("R", _pairs(string("k", 5000) + U32_ONE), "past the end"),
    "kv_key_empty": ("R", _pairs(string("") + U32_ONE), "empty"),
    "kv_key_70k": ("R", _pairs(string("k" * 70_000) + U32_ONE), "too long"),
    "kv_key_invalid_utf8": ("R", _pairs(string(b"k\xff\xfe") + U32_ONE), "UTF-8"),
    "kv_key_nul": ("R", _pairs(string("k\0x") + U32_ONE), "NUL"),
    "kv_key_dup": ("R", _pairs(pair(ARCHITECTURE, STR, "x")), "twice, as key 0 and key 1"),
    "kv_type_13": ("R", _pairs(string("k") + struct.pack("<II", 13, 0)), "unknown value type"),
    "kv_type_minus1": ("R", _pairs(string("k") + struct.pack("<iI", -1, 0)), "unknown value type"),
    "kv_str_len_2e63": ("R", _pairs(string("k") + struct.pack("<I", STR) + string("v", 2**63)), "past the end"),
    "kv_str_len_past_eof": ("R", _pairs(string("k") + struct.pack("<I", STR) + string("v", 9999)), "past the end"),
    "kv_str_invalid_utf8": ("A", _pairs(string("k") + struct.pack("<I", STR) + string(b"\xff\xc0v")), ""),
    "kv_str_nul": ("A", _pairs(pair("k", STR, "a\0b")), ""),
    "kv_bool_2": ("W", _pairs(pair("k", BOOL, 2)), "neither 0 nor 1"),
    "kv_arr_bool_2": ("W", _pairs(pair("k", ARR, (BOOL, [0, 1, 2]))), "neither 0 nor 1"),
    "kv_truncated_value": ("R", FILE.with_pairs(pair("k", U64, 1)).header()[:70], "past the end"),
    "kv_arr_len_2e63": ("R", _pairs(string("k") + array(U8, 2**63)), "past the end"),
    "kv_arr_len_2e30_u8": ("R", _pairs(string("k") + array(U8, 2**30)), "past the end"),
    "kv_arr_len_overflow_x8": ("R", _pairs(string("k") + array(U64, 2**61 + 1, bytes(8))), "past the end"),
    "kv_arr_str_len_overflow_x8": ("R", _pairs(string("k") + array(STR, 2**61 + 1, bytes(8))), "past the end"),
    "kv_arr_past_eof": ("R", _pairs(string("k") + array(F32, 999)), "past the end"),
    "kv_arr_of_arr": ("R", _pairs(string("k") + array(ARR, 1, struct.pack("<IQB", U8, 1, 0))), "array of arrays"),
    "kv_arr_nested_3000": ("R", _pairs(string("k") + array(ARR, 1, struct.pack("<IQ", ARR, 1) * 3000)), "of arrays"),
    "kv_arr_bad_item_type": ("R", _pairs(string("k") + array(99, 1, bytes(8))), "unknown value type"),
    "kv_arr_bad_item_type_len0": ("R", _pairs(string("k") + array(99, 0)), "unknown value type"),
    "kv_arr_str_item_len_past_eof": (
        "R",
        _pairs(string("k") + array(STR, 2, string("a") + string("b", 9999))),
        "item 1",
    ),
    "kv_arr_str_item_len_2e64": ("R", _pairs(string("k") + array(STR, 2, string("a", -1) + string("b"))), "item 0"),
    "kv_arr_empty_valid": ("A", _pairs(pair("k", ARR, (I32, [])), pair("l", ARR, (STR, []))), ""),
    "kv_str_empty_valid": ("A", _pairs(pair("k", STR, "")), ""),
    "kv_arr_str_1e6_empty": ("A", _pairs(string("k") + array(STR, 10**6, bytes(8 * 10**6))), ""),
    "kv_align_0": ("R", _alignment_key(U32, 0), "power of two"),
    "kv_align_13": ("R", _alignment_key(U32, 13), "power of two"),
    "kv_align_1": ("A", _aligned(1), ""),
    "kv_align_4": ("A", _aligned(4), ""),
    "kv_align_2e31": ("R", _alignment_key(U32, 2**31), "too large"),
    "kv_align_2e20_plus": ("R", _alignment_key(U32, 2**21), "too large"),
    "kv_align_i32_type": ("R", _alignment_key(I32, 32), "wrong type"),
    "kv_align_string_type": ("R", _alignment_key(STR, "32"), "wrong type"),
    "kv_align_array_type": ("R", _alignment_key(ARR, (U32, [32])), "wrong type"),
    "kv_arch_missing": ("M", File(()).encode(), "architecture"),
    "kv_arch_u32": ("M", File((pair(ARCHITECTURE, U32, 1),)).encode(), "must be a string"),
    "kv_arch_traversal": ("M", File((pair(ARCHITECTURE, STR, "../../etc"),)).encode(), "not a usable name"),
    "kv_key_shadows_reader_field": ("A", _pairs(pair("GGUF.version", U32, 9), pair("tensors", U32, 9)), ""),
    "kv_chat_template_jinja_exploit": ("A", _pairs(pair("tokenizer.chat_template", STR, "{{ ''.__class__ }}")), ""),
    "kv_name_ansi_escape": ("A", _pairs(pair("general.name", STR, "\x1b[2J")), ""),
    "kv_block_count_2e31": ("A", _pairs(pair("llama.block_count", U32, 2**31)), ""),
    "kv_head_count_0": ("A", _pairs(pair("llama.attention.head_count", U32, 0)), ""),
    "kv_quant_version_99": ("W", _pairs(pair("general.quantization_version", U32, 99)), "unusual"),
    "kv_file_type_string": ("W", _pairs(pair("general.file_type", STR, "Q4")), "unusual"),
    # tensor infos
    "ti_name_len_2e63": ("R", _tensors(Tensor("a", name_length=2**63)), "past the end"),
    "ti_name_len_past_eof": ("R", _tensors(Tensor("a", name_length=9999)), "past the end"),
    "ti_name_empty": ("R", _tensors(Tensor("")), "empty"),
    "ti_name_64_bytes": ("R", _tensors(Tensor("a" * 64)), "too long"),
    "ti_name_63_bytes_ok": ("A", _tensors(Tensor("a" * 63)), ""),
    "ti_name_invalid_utf8": ("R", _tensors(Tensor(b"a\xff")), "UTF-8"),
    "ti_name_nul": ("R", _tensors(Tensor("a\0b")), "control"),
    "ti_name_path_traversal": ("A", _tensors(Tensor("../../etc/passwd")), ""),
    "ti_name_ansi_escape": ("R", _tensors(Tensor("a\x1b[2J")), r"control"),
    "ti_name_dup": ("R", _tensors(Tensor("a"), Tensor("a")), "twice, as tensor 0 and tensor 1"),
    "ti_name_bidi": ("W", _tensors(Tensor("a\u202eb")), r"invisible"),
    "ti_ndims_0": ("W", _tensors(Tensor(shape=())), "no dimensions"),
    "ti_ndims_5": ("R", _tensors(Tensor(shape=(1, 1, 1, 1, 1))), "dimensions"),
    "ti_ndims_1e6": ("R", _tensors(Tensor(n_dims=10**6)), "dimensions"),
    "ti_ndims_2e32m1": ("R", _tensors(Tensor(n_dims=2**32 - 1)), "dimensions"),
    "ti_dim_0": ("W", _tensors(Tensor(shape=(32, 0))), "no elements"),
    "ti_dim_minus1": ("R", _bare((-1,)), "too many elements"),
    "ti_dim_2e63": ("R", _bare((2**63,)), "too many elements"),
    "ti_dim_0_after_overflow": ("R", _bare((2**62, 2**62, 0)), "too many elements"),
    "ti_ne_overflow": ("R", _bare((2**31, 2**31, 2)), "too many elements"),
    "ti_ne_wraps_to_0": ("R", _bare((2**32, 2**32)), "too many elements"),
    "ti_ne_wraps_to_4": ("R", _bare((2**62 + 1, 4)), "too many elements"),
    "ti_nbytes_overflow_i64": ("R", _bare((2**62,)), "too large"),
    "ti_nbytes_pad_wrap": ("R", _bare((2**63 - 1,), 24), "too large"),
    "ti_total_overflow": (
        "R",
        _tensors(*(Tensor(name, (2**62,), 24, data=b"") for name in "abcd")),
        "too large",
    ),
    "ti_type_minus1": ("R", _tensors(Tensor(type_id=-1)), "unknown type"),
    "ti_type_count": ("R", _tensors(Tensor(type_id=43)), "newer requant"),
    "ti_type_9999": ("R", _tensors(Tensor(type_id=9999)), "unknown type"),
    "ti_type_removed_q4_2": ("R", _tensors(Tensor(type_id=4)), "Q4_2, removed"),
    "ti_type_removed_q4_0_4_4": ("R", _tensors(Tensor(type_id=31)), "Q4_0_4_4, removed"),
    "ti_row_not_block_multiple_q8_0": ("R", _bare((33, 2), 8), "multiple of 32"),
    "ti_row_not_block_multiple_q4_K": ("R", _bare((128, 2), 12), "multiple of 256"),
    "ti_offset_minus1": ("R", _tensors(Tensor(offset=-1)), "wrong data offset"),
    "ti_offset_past_eof": ("R", _tensors(Tensor(offset=2**20)), "wrong data offset"),
    "ti_offset_wraps_to_header": ("R", _second(2**64 - 64), "wrong data offset"),
    "ti_offset_unaligned": ("R", _second(257), "wrong data offset"),
    "ti_offset_overlap": ("R", _second(32), "wrong data offset"),
    "ti_offset_same": ("R", _second(0), "wrong data offset"),
    "ti_offset_hole": ("R", _second(512), "exactly 256"),
    "ti_offset_unordered": ("R", _tensors(Tensor("a", offset=256), Tensor("b", offset=0)), "wrong data offset"),
    "ti_truncated": ("R", FILE.header()[:104], "past the end"),
    # data
    "data_missing": ("R", FILE.header(), "256 bytes of tensor data are missing, no tensor is whole"),
    "data_one_byte_short": (
        "R",
        _tensors(Tensor("a"), Tensor("b"))[:-1],
        "1 bytes of tensor data are missing, the last whole tensor is 'a'",
    ),
    "data_last_pad_missing": ("A", _tensors(Tensor(shape=(3,)), last_padding=False), ""),
    "data_trailing_garbage": ("W", replace(FILE, trailing=b"garbage").encode(), "7 bytes of no tensor"),
}
