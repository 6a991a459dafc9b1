"""Verification: no findings on what convert made, and one line, with names and figures, for each fault."""

import json
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
from conversions import NORM, convert, half, normal, plan_for, single, small_model, verify
from gguf_files import STR, U32, File, Tensor, pair, split_pairs, write_files
from real_models import IMATRIX, TINY

import requant
from requant.container.imatrix import read_imatrix
from requant.container.layout import lay_out
from requant.container.source import open_source
from requant.container.splitting import Splitting
from requant.conversion.record import record_path
from requant.errors import BadInput, UsageError
from requant.formats import Effort, codec, format_of

Q, UP = "blk.0.attn_q.weight", "blk.1.ffn_up.weight"
NO_DIGESTS = {"requant.digests": None}  # as another tool would write the file


@pytest.fixture
def pair_of_files(tmp_path):
    """An open source, and an output of it with a copy, a Q8_0 and a Q4_0 tensor, with its record."""
    keys = (pair("general.name", STR, "small"), pair("llama.block_count", U32, 2))
    model = small_model(half(Q, (256, 300)), single(UP, (512, 6), seed=1), pairs=keys)
    with open_source(model.write(tmp_path / "source.gguf")) as source:
        made = convert(source, plan_for(source, "Q8_0", "Q4_0"), tmp_path / "out.gguf")
        record_path(made.output).write_text(made.to_json())
        yield source, made.output


def placed(path, name):
    """Offset and bytes of a tensor in the file."""
    with open_source(path) as target:
        tensor = target.tensor(name)
        return target.opened[0].header.data_start + tensor.info.offset, tensor.n_bytes


def flip(path, name, byte, bits=1):
    offset, _ = placed(path, name)
    data = bytearray(path.read_bytes())
    data[offset + byte] ^= bits
    path.write_bytes(data)


def rewritten(path, changes, types=None):
    """Write the file again with other metadata or type names in the header, and the same data."""
    with open_source(path) as target:
        tensors = [(t.name, t.shape, t.type_id) for t in target.tensors]
        layout = lay_out(target.metadata.with_values(changes), tensors, path)
        data = path.read_bytes()[target.opened[0].header.data_start :]
    path.write_bytes(layout.header + data)


def test_nothing_is_found_in_what_convert_made(pair_of_files):
    source, out = pair_of_files
    for threads in (1, 3):
        for given in (source, None):
            checked = verify(out, source=given, threads=threads)
            assert checked.findings == ()
            assert checked.ok
            assert checked.n_tensors == 3
            assert checked.against == (("record", "digests", "source") if given else ("record", "digests"))
    record_path(out).unlink()
    assert verify(out, source=source).findings == ()
    assert verify(out).against == ("digests",)


def test_nothing_is_found_in_the_tiny_model_converted_with_importance(tmp_path):
    with open_source(TINY) as source:
        plan = plan_for(source, "Q4_K", "Q6_K", "Q8_0", "Q4_0")
        made = convert(source, plan, tmp_path / "out.gguf", imatrix=read_imatrix(IMATRIX))
        record_path(made.output).write_text(made.to_json())
        done = []
        checked = verify(made.output, source=source, progress=done.append)
    assert checked.findings == ()
    assert sum(done) == checked.n_bytes == plan.n_bytes


def test_a_source_verifies_against_itself():
    with open_source(TINY) as source:
        assert verify(TINY, source=source).ok


@pytest.mark.parametrize("name", [NORM, Q, UP])
@pytest.mark.parametrize("byte", [0, 401, -1])
def test_a_flipped_bit_anywhere_is_found_with_the_record(pair_of_files, name, byte):
    _, out = pair_of_files
    flip(out, name, byte % placed(out, name)[1])
    findings = verify(out).findings
    assert len([line for line in findings if f"'{name}' is not as it was written" in line]) == 1


def test_a_flipped_bit_in_a_copy_is_found_with_the_source(pair_of_files):
    source, out = pair_of_files
    record_path(out).unlink()
    flip(out, NORM, 401)
    (line,) = verify(out, source=source).findings
    assert f"'{NORM}' is a copy but differs from the source at its byte 401 (got" in line


def test_a_scale_that_is_no_number_is_found_without_source_and_record(pair_of_files):
    _, out = pair_of_files
    record_path(out).unlink()
    offset, _ = placed(out, Q)
    with out.open("r+b") as file:
        file.seek(offset + 34 * 9)  # the tenth block
        file.write(struct.pack("<H", 0x7E00))
    (line,) = verify(out).findings
    assert line == f"tensor '{Q}': 32 weights are not finite, the first at weight 288"


def test_a_lost_row_is_found_with_the_source(pair_of_files):
    source, out = pair_of_files
    record_path(out).unlink()
    offset, _ = placed(out, UP)
    with out.open("r+b") as file:
        file.seek(offset + 4 * 16 * 18)
        file.write(bytes(16 * 18))
    (line,) = verify(out, source=source).findings
    assert f"'{UP}', row 4 is lost: relative error (got 1, limit 0.9)" in line


def test_weights_that_are_off_are_found_by_the_recorded_error(pair_of_files):
    source, out = pair_of_files
    offset, n_bytes = placed(out, UP)
    with open_source(out) as target:
        x = codec.dequantize(source.read_rows(source.tensor(UP)), source.tensor(UP).format)
        worse = codec.quantize(x + 0.12 * normal((512, 6), seed=9), target.tensor(UP).format)
    data = bytearray(out.read_bytes())
    data[offset : offset + n_bytes] = worse.tobytes()
    out.write_bytes(data)
    assert any(
        f"'{UP}' as Q4_0 is off the source: relative error" in line for line in verify(out, source=source).findings
    )
    record_path(out).unlink()
    rewritten(out, NO_DIGESTS)
    assert verify(out, source=source).ok  # within three times the type's own error, all that is known now


def test_missing_added_changed_and_moved_keys_are_found_with_the_source(pair_of_files):
    source, out = pair_of_files
    record_path(out).unlink()
    rewritten(out, NO_DIGESTS)
    rewritten(out, {"general.name": ("str", "other"), "llama.block_count": None, "llama.new": ("u32", 1)})
    assert verify(out, source=source).findings == (
        "key 'general.name' has another value than in the source",
        "key 'llama.block_count' of the source is missing",
        "key 'llama.new' is not in the source",
    )
    with open_source(out) as target:
        name = target.metadata.get("general.name")
    rewritten(out, {"llama.new": None, "general.name": None, "llama.block_count": ("u32", 2)})
    rewritten(out, {"general.name": ("str", "small")})
    assert name == "other"
    assert verify(out, source=source).findings == ("the keys are in another order than in the source",)


def test_an_edited_header_is_found_with_the_record(pair_of_files):
    _, out = pair_of_files
    rewritten(out, {"general.name": ("str", "SMALL")})
    (line,) = verify(out).findings
    assert line.startswith("the header is not the one that was written")


def test_wrong_types_names_and_sizes_are_found_with_the_record(pair_of_files):
    source, out = pair_of_files
    convert(source, plan_for(source, "Q4_0", "Q8_0"), out, force=True)
    findings = verify(out).findings
    assert f"tensor '{Q}' is Q4_0, the record says Q8_0" in findings
    assert f"tensor '{UP}' is Q8_0, the record says Q4_0" in findings
    assert any(line.startswith("the file has ") for line in findings)
    small_model(half(Q, (256, 300)), half("blk.2.extra.weight", (32, 1))).write(out)
    findings = verify(out).findings
    assert f"tensor '{UP}' of the record is missing" in findings
    assert "tensor 'blk.2.extra.weight' is not in the record" in findings


def test_another_order_or_shape_is_found_with_the_source(pair_of_files, tmp_path):
    source, _ = pair_of_files
    other = small_model(single(UP, (512, 6), seed=1), half(Q, (256, 299))).write(tmp_path / "other.gguf")
    findings = verify(other, source=source).findings
    assert "the tensors are in another order than in the source" in findings
    assert f"tensor '{Q}' has shape [256, 299], in the source [256, 300]" in findings


def test_another_source_is_named_and_not_compared(pair_of_files, tmp_path):
    _, out = pair_of_files
    with open_source(small_model().write(tmp_path / "other.gguf")) as other:
        found = verify(out, source=other)
        (line,) = found.findings
        assert not found.ok and found.has_only_other_source and json.loads(found.to_json())["other_source"] is True
        assert line.startswith("it was made from ") and "not from" in line
        record_path(out).unlink()
        (unnamed,) = verify(out, source=other).findings
        assert unnamed == line.replace("source.gguf", "another source", 1)


def test_integers_are_compared_too(tmp_path):
    whole = Tensor("d2t", (8,), 26, data=np.arange(8, dtype="<i4").tobytes())
    source_path = small_model(whole).write(tmp_path / "source.gguf")
    other = small_model(replace(whole, data=np.arange(1, 9, dtype="<i4").tobytes())).write(tmp_path / "other.gguf")
    with open_source(source_path) as source:
        (line,) = verify(other, source=source).findings
    assert "'d2t' is a copy but differs from the source at its byte 0 (got 1, source 0)" in line


def test_a_file_that_is_no_gguf_or_a_record_that_is_none_is_an_error(pair_of_files, tmp_path):
    _, out = pair_of_files
    with pytest.raises(BadInput, match="no such file"):
        verify(out, record=tmp_path / "missing.json")
    record_path(out).write_text("{}")
    with pytest.raises(BadInput, match="another kind of file"):
        verify(out)
    out.write_bytes(out.read_bytes()[:-600])
    record_path(out).unlink()
    with pytest.raises(BadInput):
        verify(out)


def test_the_result_as_json(pair_of_files):
    source, out = pair_of_files
    flip(out, NORM, 0)
    checked = verify(out, source=source)
    raw = json.loads(checked.to_json())
    assert raw["schema"] == "requant.verify/1"
    assert (raw["ok"], raw["other_source"]) == (False, False)
    assert raw["output"] == "out.gguf"
    assert raw["findings"] == list(checked.findings)
    assert (raw["tensors"], raw["bytes"]) == (3, checked.n_bytes)


def _split(model, stem, *sizes):
    """The files of `model` split into parts of so many tensors, by name."""
    files, n, left = {}, len(model.tensors), list(model.tensors)
    for i, size in enumerate(sizes):
        pairs = (() if i else model.pairs) + split_pairs(i, len(sizes), n)
        files[f"{stem}-{i + 1:05d}-of-{len(sizes):05d}.gguf"] = File(pairs, tuple(left[:size]))
        left = left[size:]
    return files


@pytest.mark.parametrize("with_record", [True, False], ids=["record", "no record"])
@pytest.mark.parametrize("given", ["whole", "parts", "more parts"])
@pytest.mark.parametrize("made_of", ["whole", "parts"])
def test_a_source_in_another_number_of_files_is_the_same_source(tmp_path, made_of, given, with_record):
    whole = small_model(half(Q, (256, 300)), single(UP, (512, 6), seed=1))
    whole.write(tmp_path / "whole.gguf")
    write_files(tmp_path, _split(whole, "parts", 2, 1) | _split(whole, "more", 0, 1, 2))
    files = {"whole": "whole.gguf", "parts": "parts-00001-of-00002.gguf", "more parts": "more-00002-of-00003.gguf"}
    with open_source(tmp_path / files[made_of]) as source:
        made = convert(source, plan_for(source, "Q8_0", "Q4_0"), tmp_path / "out.gguf")
    if with_record:
        record_path(made.output).write_text(made.to_json())
    with open_source(tmp_path / files[given]) as source:
        found = verify(made.output, source=source)
        assert not found.findings and "source" in found.against
        flip(made.output, NORM, 1)
        assert any(NORM in line for line in verify(made.output, source=source).findings)


def test_a_source_in_another_number_of_files_with_another_key_is_another_source(tmp_path):
    whole = small_model()
    with open_source(whole.write(tmp_path / "whole.gguf")) as source:
        made = convert(source, plan_for(source, "Q8_0"), tmp_path / "out.gguf")
    other = replace(whole, pairs=(*whole.pairs, pair("general.name", STR, "other")))
    with open_source(write_files(tmp_path, _split(other, "other", 2, 1))[0]) as source:
        assert verify(made.output, source=source).other_source


def test_the_digests_in_the_metadata_find_what_the_record_would(pair_of_files):
    """A download without its record: zeroed bytes, one bit, another header; nothing but the file is needed."""
    _, out = pair_of_files
    record_path(out).unlink()
    whole = out.read_bytes()
    found = verify(out)
    assert (found.verdict, found.ok, found.against) == ("same", True, ("digests",))
    for name in (NORM, Q, UP):
        flip(out, name, placed(out, name)[1] - 1)
        found = verify(out)
        assert found.findings == (f"tensor '{name}' is not as it was written, by its digest in the metadata",)
        assert (found.verdict, found.wrong_tensors) == ("wrong", (name,))
        out.write_bytes(whole)
    start, n_bytes = placed(out, Q)
    out.write_bytes(whole[:start] + bytes(n_bytes) + whole[start + n_bytes :])
    assert verify(out).verdict == "wrong"
    out.write_bytes(whole.replace(b"small", b"SMALL"))
    (line,) = verify(out).findings
    assert line.startswith("all 3 tensors are as they were written, but the header is not: another tool has edited")
    at = whole.index(b"requant.digests\t") + 40
    out.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert verify(out).verdict == "wrong"


def test_a_file_that_another_tool_made_of_an_output_is_told(pair_of_files, tmp_path):
    """llama-quantize, gguf-split and gguf-py keep keys that they do not know."""
    source, out = pair_of_files
    with open_source(out) as target:
        tensors = [(t.name, t.shape, t.type_id) for t in target.tensors]
        layout = lay_out(target.metadata, tensors[::-1], out)
        rows = b"".join(target.read_rows(t).tobytes() for t in reversed(target.tensors))
    record_path(out).unlink()
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(layout.header + rows)
    (line,) = verify(moved).findings
    assert line.startswith("all 3 tensors are as they were written, but the header is not")
    again = convert(source, plan_for(source, "Q4_0", "Q8_0"), tmp_path / "again.gguf").output
    with open_source(out) as target, open_source(again) as other:
        digests = {key: target.metadata.values[key] for key in target.metadata if key.startswith("requant.digests")}
        metadata = replace(other.metadata, values=other.metadata.values | digests)
        layout = lay_out(metadata, [(t.name, t.shape, t.type_id) for t in other.tensors], again)
        rows = again.read_bytes()[other.opened[0].header.data_start :]
    again.write_bytes(layout.header + rows)
    (line,) = verify(again).findings
    assert line.startswith(f"the header and 2 of 3 tensors are not those that were written, the first '{Q}'")


@pytest.mark.parametrize(
    "changes",
    [
        {"requant.digests": ("arr_u8", [])},
        {"requant.digests": ("arr_u8", [1])},
        {"requant.digests": ("arr_u8", [0] * 160)},
        {"requant.digests": ("u8", 1)},
        {"requant.digests": ("arr_str", ["x"])},
        {"requant.digests.schema": ("u8", 1)},
        {"requant.digests.schema": ("str", "requant.digests/2")},
        {"requant.digests": None},
    ],
    ids=str,
)
def test_digests_that_are_none_are_no_crash(pair_of_files, changes):
    source, out = pair_of_files
    record_path(out).unlink()
    rewritten(out, changes)
    found = verify(out, source=source)
    known = "digests" in found.against
    assert found.verdict == ("wrong" if known else "plausible")
    assert verify(out).verdict == ("wrong" if known else "readable")
    told = "digests in its metadata: not compared, their form is not known"
    assert (told in found.compared) == (not known and changes != NO_DIGESTS)


def test_an_output_of_an_output_has_digests_of_its_own(pair_of_files, tmp_path):
    _, out = pair_of_files
    with open_source(out) as source:
        again = convert(source, plan_for(source), tmp_path / "again.gguf")
    with open_source(again.output) as target:
        assert list(target.metadata).count("requant.digests") == 1
    assert verify(again.output).verdict == "same"


def test_one_byte_that_is_not_what_the_source_becomes_is_found_by_encoding_again(pair_of_files):
    source, out = pair_of_files
    flip(out, UP, 5)  # in a block's weights: no sample of rows can tell
    record_path(out).unlink()
    rewritten(out, NO_DIGESTS)
    assert verify(out, source=source).verdict == "plausible"
    plan = plan_for(source, "Q8_0", "Q4_0")
    found = requant.verify(out, source=source.path, plan=plan, full=True)
    (line,) = found.findings
    assert line.startswith(f"tensor '{UP}' is not what its source becomes when it is encoded again: byte 5 (got ")
    assert found.wrong_tensors == (UP,) and "encodings" in found.against


def test_encoding_again_needs_the_importance_and_says_what_was_left_out(tmp_path):
    with open_source(TINY) as source:
        made = convert(source, plan_for(source, "Q4_K", "Q8_0"), tmp_path / "out.gguf", imatrix=read_imatrix(IMATRIX))
    record_path(made.output).write_text(made.to_json())
    found = requant.verify(made.output, source=TINY, full=True, imatrix=IMATRIX)
    assert found.ok and found.compared[-1] == "encoded again: every byte of 72 encoded tensors"
    assert "encodings" in found.against
    found = requant.verify(made.output, source=TINY, full=True)
    *_, encoded, left = found.compared
    assert encoded == "encoded again: every byte of 2 encoded tensors" and "encodings" not in found.against
    assert left.startswith(
        "not encoded again: 70 encoded tensors, weighted by importance that is not given (imatrix.gguf"
    )
    record_path(made.output).write_text(replace(made, kernels=0).to_json())
    found = requant.verify(made.output, source=TINY, full=True)
    assert found.compared[-1].startswith("encoders of version 0 wrote it, these are version ")
    record_path(made.output).write_text(replace(made, imatrix=None, imatrix_sha256=None).to_json())
    with pytest.raises(BadInput, match=r"is not the importance that the output was made with .*expected none"):
        requant.verify(made.output, source=TINY, full=True, imatrix=IMATRIX)


def test_encoding_again_covers_second_level_scales(tmp_path):
    with open_source(small_model(half(Q, (256, 64))).write(tmp_path / "source.gguf")) as source:
        made = convert(source, plan_for(source, "NVFP4"), tmp_path / "out.gguf")
    record_path(made.output).write_text(made.to_json())
    assert requant.verify(made.output, source=tmp_path / "source.gguf", full=True).ok
    flip(made.output, "blk.0.attn_q.scale", 0)
    record_path(made.output).unlink()
    found = requant.verify(made.output, source=tmp_path / "source.gguf", full=True, plan=made.plan)
    assert any("'blk.0.attn_q.scale' is not what its source becomes" in line for line in found.findings)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"full": True}, UsageError, "--full encodes the source again; give it with --source"),
        ({"imatrix": IMATRIX}, UsageError, "--imatrix is for encoding again; give --full with it"),
    ],
)
def test_options_of_encoding_again_that_miss_another(options, error, said):
    with pytest.raises(error, match=said):
        requant.verify(TINY, **options)


def test_digests_of_a_split_output_are_in_its_first_file(tmp_path):
    model = small_model(half(Q, (256, 300)), single(UP, (512, 6), seed=1))
    with open_source(model.write(tmp_path / "source.gguf")) as source:
        splitting = Splitting(max_size=44_000)
        out = convert(source, plan_for(source, "Q4_0"), tmp_path / "o.gguf", splitting=splitting).output
    shards = sorted(tmp_path.glob("o-*.gguf"))
    assert len(shards) > 1
    for shard in shards:
        assert verify(shard).verdict == "same"
    flip(shards[-1], UP, 0)
    assert verify(out).findings == (f"tensor '{UP}' is not as it was written, by its digest in the metadata",)


def test_the_record_of_another_file_is_told_from_damage(pair_of_files, tmp_path):
    source, out = pair_of_files
    other = convert(source, plan_for(source, "Q4_0", "Q8_0"), tmp_path / "other.gguf")
    record_path(out).write_text(replace(other, output=out).to_json())
    assert verify(out).findings[-1].startswith("by the digests in its own metadata it is as it was written: the record")
    flip(out, Q, 0)
    assert not any("of another file" in line for line in verify(out).findings)


@pytest.mark.parametrize("digests", [[], [[300, 0, "0"]], [[2**62, 1, "0"]], [[100, 100, "0"]], None], ids=str)
def test_a_record_without_usable_digests_of_the_source_compares_the_rest(pair_of_files, digests):
    """Old records have none; those that do not suit the tensor are not believed."""
    source, out = pair_of_files
    raw = json.loads(record_path(out).read_text())
    for tensor in raw["tensors"]:
        if digests is None:
            del tensor["source"], tensor["weighted"]
        else:
            tensor["source"] = [dict(zip(("n_rows", "leaf_rows", "sha256"), x, strict=True)) for x in digests]
    record_path(out).write_text(json.dumps(raw))
    found = verify(out, source=source)
    assert found.ok and found.verdict == "same"
    assert found.compared[-1] == "source: 1 copied tensors byte for byte, 2 encoded tensors by up to 64 rows each"


PADDED = ("blk.0.attn_norm.weight", "blk.1.attn_norm.weight")  # 36 bytes, so there is padding after each
AFTER = "bytes after its last tensor, which belong to no tensor"
FILLED = "bytes that are not zero in its padding, the first"


@pytest.fixture
def padded(tmp_path):
    """An output without its record, and its source: padding is in the middle, at the end and before the data."""
    norms = [single(name, (9,), seed=i) for i, name in enumerate(PADDED)]
    model = small_model(norms[0], half(Q, (256, 30)), norms[1], pairs=(pair("general.alignment", U32, 512),))
    model = replace(model, alignment=512)
    with open_source(model.write(tmp_path / "source.gguf")) as source:
        made = convert(source, plan_for(source, "Q8_0"), tmp_path / "out.gguf")
        yield source, made


def ends(path):
    """Where each tensor ends in the file, by name."""
    with open_source(path) as target:
        return {t.name: sum(placed(path, t.name)) for t in target.tensors}


def put(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


DAMAGES = {
    "a zero appended": (lambda out: put(out, out.stat().st_size, b"\0"), f"the file has 1 {AFTER}"),
    "zeros appended": (lambda out: put(out, out.stat().st_size, bytes(100)), f"the file has 100 {AFTER}"),
    "bytes appended": (lambda out: put(out, out.stat().st_size, b"x" * 5000), f"the file has 5000 {AFTER}"),
    "a hole appended": (lambda out: put(out, out.stat().st_size + 2**20, b"x"), f"the file has {2**20 + 1} {AFTER}"),
    "between": (lambda out: put(out, ends(out)[PADDED[0]], b"\1"), f"the file has {FILLED} after tensor '{PADDED[0]}'"),
    "at the end": (lambda out: put(out, ends(out)[PADDED[1]] + 27, b"\x80"), f"{FILLED} after tensor '{PADDED[1]}'"),
    "cut": (lambda out: os.truncate(out, out.stat().st_size - 9), "the last 9 bytes of its padding"),
    "before the data": (lambda out: put(out, data_start(out) - 1, b"\1"), f"{FILLED} before the first tensor"),
}


def data_start(path):
    with open_source(path) as target:
        assert target.opened[0].header.padding
        return target.opened[0].header.data_start


@pytest.mark.parametrize("known", ["digests", "record", "source", "source and record", "nothing"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_bytes_that_belong_to_no_tensor_are_found(padded, damage, known):
    source, made = padded
    out, (harm, told) = made.output, DAMAGES[damage]
    if "record" in known:
        record_path(out).write_text(made.to_json())
    if known == "nothing":
        rewritten(out, NO_DIGESTS)
    assert verify(out).ok
    harm(out)
    found = verify(out, source=source if "source" in known else None)
    if known == "nothing":  # other tools may append and pad with anything
        assert found.verdict == "readable"
        return
    assert found.verdict == "wrong" and told in found.findings[-1]
    assert not any("of another file" in line for line in found.findings)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_bytes_after_any_shard_are_found(tmp_path, number):
    model = small_model(half(Q, (256, 300)), single(UP, (512, 6), seed=1))
    with open_source(model.write(tmp_path / "source.gguf")) as source:
        made = convert(source, plan_for(source, "Q4_0"), tmp_path / "o.gguf", splitting=Splitting(max_size=44_000))
    shards = sorted(tmp_path.glob("o-*.gguf"))
    put(shards[number], shards[number].stat().st_size, bytes(32))
    for shard in shards:
        assert verify(shard).findings == (f"'{shards[number].name}' has 32 {AFTER}",)
    record_path(made.output).write_text(made.to_json())
    assert verify(shards[0]).findings[-1] == f"'{shards[number].name}' has 32 {AFTER}"


def test_shards_that_are_missing_swapped_or_of_another_output(tmp_path):
    model = small_model(half(Q, (256, 300)), single(UP, (512, 6), seed=1))
    outputs = {}
    with open_source(model.write(tmp_path / "source.gguf")) as source:
        for name, types in (("a", ("Q4_0",)), ("b", ("Q4_0", "Q4_1"))):
            convert(source, plan_for(source, *types), tmp_path / f"{name}.gguf", splitting=Splitting(max_size=44_000))
            outputs[name] = sorted(tmp_path.glob(f"{name}-*.gguf"))
    first, second, third = outputs["a"]
    whole = [shard.read_bytes() for shard in outputs["a"]]
    (tmp_path / "a-00009-of-00009.gguf").write_bytes(whole[1])
    assert verify(first).verdict == "same"  # no shard of it
    assert [p.name[1:] for p in outputs["a"]] == [p.name[1:] for p in outputs["b"]]
    third.write_bytes(outputs["b"][2].read_bytes())
    assert verify(first).verdict == "wrong"
    third.write_bytes(whole[2])
    first.write_bytes(whole[1])
    second.write_bytes(whole[0])
    with pytest.raises(BadInput):
        verify(first)
    second.unlink()
    with pytest.raises(BadInput):
        verify(first)


def test_digests_in_another_order_are_found(pair_of_files):
    _, out = pair_of_files
    record_path(out).unlink()
    with open_source(out) as target:
        start, stop = target.metadata.find_items("requant.digests")
    data = out.read_bytes()
    digests = data[start:stop]
    put(out, start, digests[:16] + digests[32:48] + digests[16:32] + digests[48:])
    assert verify(out).findings == ("the digests in the metadata are not in the order in which they were written",)


def test_types_effort_and_importance_are_in_the_file_itself(tmp_path):
    """A download without its record can be encoded again."""
    with open_source(TINY) as source:
        plan = replace(plan_for(source, "Q4_K", "F16", "Q8_0"), effort=Effort.BEST)
        out = convert(source, plan, tmp_path / "out.gguf", imatrix=read_imatrix(IMATRIX)).output
        plain = convert(source, plan, tmp_path / "plain.gguf").output
    found = requant.verify(out, source=TINY, full=True, imatrix=IMATRIX)
    assert found.ok and "encodings" in found.against
    n = found.compared[-1]
    assert n.startswith("encoded again: every byte of ")
    found = requant.verify(out, source=TINY, full=True)
    assert found.ok and "encodings" not in found.against
    assert found.compared[-1].endswith("that is not given (imatrix.gguf); give its file with --imatrix")
    assert requant.verify(plain, source=TINY, full=True).compared[-1] == n
    with pytest.raises(BadInput, match=r"is not the importance that the output was made with .*expected none"):
        requant.verify(plain, source=TINY, full=True, imatrix=IMATRIX)
    rewritten(out, {"quantize.imatrix.entries_count": ("u32", 7)})
    with pytest.raises(BadInput, match=r"got 70 entries of 28 chunks, expected 7 entries of 28 chunks"):
        requant.verify(out, source=TINY, full=True, imatrix=IMATRIX)
    rewritten(plain, NO_DIGESTS | {"requant.effort": ("str", "heroic")})
    with pytest.raises(BadInput, match=r"key 'requant\.effort' has an unknown value"):
        requant.verify(plain, source=TINY, full=True)


def test_a_byte_that_does_not_follow_from_the_source_is_found_without_record_and_digests(pair_of_files):
    source, out = pair_of_files
    record_path(out).unlink()
    flip(out, UP, 5)
    rewritten(out, NO_DIGESTS)
    found = requant.verify(out, source=source.path, full=True)
    (line,) = found.findings
    assert line.startswith(f"tensor '{UP}' is not what its source becomes when it is encoded again: byte 5 (got ")
    rewritten(out, {"requant.kernels": None, "requant.effort": None})
    (line,) = requant.verify(out, source=source.path, full=True).findings
    assert "encoders of an unknown version or another tool wrote it" in line


def test_types_that_requant_does_not_write_are_not_encoded_again(pair_of_files):
    source, _ = pair_of_files
    q = source.tensor(Q)
    raw = np.zeros(30 * 256, "<i1").tobytes()
    assert not format_of("I8").can_encode and q.n_rows == 300
    other = small_model(Tensor(Q, (256, 30), format_of("I8").type_id, data=raw)).write(source.path.with_name("i8.gguf"))
    origin = small_model(half(Q, (256, 30))).write(source.path.with_name("f16.gguf"))
    found = requant.verify(other, source=origin, full=True)
    assert found.compared[-1] == "not encoded again: 1 encoded tensors of types that requant does not write"
    assert "encodings" not in found.against
