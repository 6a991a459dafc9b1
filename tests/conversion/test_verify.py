"""Verification: no findings on what convert made, and one line, with names and figures, for each fault."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from conversions import NORM, convert, half, normal, plan_for, single, small_model
from gguf_files import STR, U32, File, Tensor, pair, split_pairs, write_files
from real_models import IMATRIX, TINY

from requant.container.imatrix import read_imatrix
from requant.container.layout import lay_out
from requant.container.source import open_source
from requant.conversion.record import record_path
from requant.conversion.verify import verify
from requant.errors import BadInput
from requant.formats import codec

Q, UP = "blk.0.attn_q.weight", "blk.1.ffn_up.weight"


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
            assert checked.against == (("record", "source") if given else ("record",))
    record_path(out).unlink()
    assert verify(out, source=source).findings == ()
    assert verify(out).against == ()


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
    assert verify(out, source=source).ok  # within three times the type's own error, all that is known now


def test_missing_added_changed_and_moved_keys_are_found_with_the_source(pair_of_files):
    source, out = pair_of_files
    record_path(out).unlink()
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
        assert not found.ok and found.is_itself_sound and json.loads(found.to_json())["other_source"] is True
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
