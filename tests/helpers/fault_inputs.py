"""Fault table: sources, shards and other inputs that are damaged or do not fit."""

from dataclasses import replace

from fault_rows import Row, case
from gguf_files import split_files, split_pairs, write_files

INPUTS = [
    case("no GGUF", "hdr_empty_file", r"source\.gguf: is empty \(got 0 bytes"),
    case("no GGUF", "hdr_3_bytes", r"'GGU' \(got 3 bytes, limit 24 bytes\)"),
    case("no GGUF", "hdr_bad_magic", r"got 'GG\\x1bX', \d+ bytes"),
    case("version", "hdr_version_1", r"version \(got 1, limit 2 or 3\); .* no longer read"),
    case("version", "hdr_version_4", r"version \(got 4, limit 2 or 3\)"),
    case("version", "hdr_big_endian_version", r"big-endian GGUF of version 3,.*gguf_convert_endian"),
    case("count or length", "hdr_n_tensors_2e30", r"more tensors than it can hold \(got 1073741824, limit \d+\)"),
    case("count or length", "kv_str_len_past_eof", r"key 'k' at offset \d+ .* \(got 9999 bytes, limit \d+"),
    case("count or length", "kv_arr_len_2e63", r"key 'k' at offset \d+ .* \(got 9223372036854775808 bytes, limit \d+"),
    case("duplicate", "kv_key_dup", "'general.architecture' appears twice, as key 0 and key 7"),
    case("duplicate", "ti_name_dup", "'a' appears twice, as tensor 0 and tensor 1"),
    case("alignment", "kv_align_0", r"power of two \(got 0\)"),
    case("alignment", "kv_align_13", r"power of two \(got 13\)"),
    case("alignment", "kv_align_2e31", r"too large \(got 2147483648, limit 1048576\)"),
    case("alignment", "kv_align_i32_type", r"wrong type \(got i32, limit u32\)"),
    case("offset", "ti_offset_overlap", r"'b' has the wrong data offset \(got 32, limit exactly 256\)"),
    case("offset", "ti_offset_hole", r"'b' has the wrong data offset \(got 512, limit exactly 256\)"),
    case("offset", "ti_offset_unaligned", r"'b' has the wrong data offset \(got 257, limit exactly 256\)"),
    case("offset", "ti_offset_past_eof", r"has the wrong data offset \(got 1048576, limit exactly 0\)"),
    case("truncated", "data_one_byte_short", r"1 bytes of tensor data are missing, the last whole tensor is 'a'"),
    case("truncated", "data_missing", "256 bytes of tensor data are missing, no tensor is whole"),
    case("unknown type", "ti_type_count", r"got 43\b.*newer requant"),
    case("unknown type", "ti_type_removed_q4_2", "Q4_2, removed"),
]


def shards(harm):
    """A split source in which something is wrong; the model is its second file."""

    def given(folder):
        (folder / "source.gguf").unlink()
        files = split_files()
        harm(files)
        write_files(folder, files)

    return given


def shard(i, count=3):
    return f"model-{i:05d}-of-{count:05d}.gguf"


def _lost(files):
    del files[shard(1)]


def _exchanged(files):
    files[shard(1)], files[shard(3)] = files[shard(3)], files[shard(1)]


def _foreign(files):
    files[shard(3)] = split_files(per_shard=3)[shard(3)]


def _doubled(files):
    tensors = files[shard(2)].tensors
    files[shard(3)] = replace(files[shard(3)], tensors=tensors)


def _renamed(files):
    files["model.gguf"] = files.pop(shard(2))


def _many(files):
    files.clear()
    files[shard(2)] = replace(split_files()[shard(2)], pairs=split_pairs(1, 65535, 6))


def split_case(row, name, harm, *says, model=None):
    return Row(row, name, 3, says, given=shards(harm), model=model or shard(2), again=None)


SPLITS = [
    split_case("shards", "missing", _lost, "1 of 3 files are missing", "expected in .*: .*00001-of.*00003-of"),
    split_case("shards", "wrong number", _exchanged, r"'split.no' does not fit its name \(got 2, limit 0\)"),
    split_case("shards", "wrong count", _foreign, r"split\.tensors\.count.*\(got 9, limit 6\)"),
    split_case("shards", "renamed", _renamed, "its name must end in '-00002-of-00003.gguf'", model="model.gguf"),
    split_case("duplicate", "tensor in two shards", _doubled, "'blk.1.w0.weight' is also in 'model-00002-of"),
    split_case("split names", "count of 65535", _many, r"its name must end in '-00002-of-65535.gguf'"),
]
