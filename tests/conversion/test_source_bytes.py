"""Bytes of the source that were read wrongly, or that changed: never published, and the same command heals."""

import os

import pytest
from conversions import convert, half, plan_for, single, small_model, verify

from requant.container import output as output_module
from requant.container.source import Source, open_source
from requant.conversion import chunks
from requant.conversion.record import record_path
from requant.errors import InputOutputError, SourceChanged

COPY, Q, EXPERTS = "output_norm.weight", "blk.0.attn_q.weight", "blk.1.ffn_down_exps.weight"
MODEL = small_model(half(Q, (256, 12)), half(EXPERTS, (256, 8, 2), seed=1), single("blk.2.ffn_up.weight", (256, 8)))
TYPES = {"threads": ("Q4_0", "Q8_0", "Q6_K"), "scales": ("NVFP4", "NVFP4", "Q4_0")}


@pytest.fixture(autouse=True)
def _small():
    """Pieces of a few rows, each recorded as it comes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_module, "COMMIT_BYTES", 1)
        patch.setattr(chunks, "CHUNK_WEIGHTS", 1024)
        patch.setattr(chunks, "PIECE_BYTES", 2000)
        yield


def flip_read(monkeypatch, number):
    """Flip one bit in the read of rows that has this number; returns the names of the tensors that were read."""
    real, names = Source.read_rows, []

    def read(self, tensor, *rows):
        data = real(self, tensor, *rows)
        if self.path.name == "source.gguf":
            names.append(tensor.name)
            if len(names) == number:
                data[0, 0] ^= 1
        return data

    monkeypatch.setattr(Source, "read_rows", read)
    return names


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_no_read_that_went_wrong_is_published_and_the_same_call_heals(tmp_path, monkeypatch, types):
    with open_source(MODEL.write(tmp_path / "source.gguf")) as source:
        plan = plan_for(source, *types)
        names = flip_read(monkeypatch, 0)
        right = convert(source, plan, tmp_path / "right.gguf", threads=1)
        wanted = right.output.read_bytes()
        monkeypatch.undo()
        for number in range(1, len(names) + 1):
            out = tmp_path / f"{number}.gguf"
            flip_read(monkeypatch, number)
            with pytest.raises(InputOutputError, match=r"other bytes than were read|two reads .* differ") as caught:
                convert(source, plan, out, threads=1)
            assert repr(names[number - 1]) in caught.value.what and not out.exists()
            assert caught.value.path == str(source.path) and "run it again" in caught.value.hint
            monkeypatch.undo()
            again = convert(source, plan, out, threads=1)
            assert out.read_bytes() == wanted and again.tensors == right.tensors


def change_row(path, name, row):
    """Flip the signs of a row of a tensor; the file keeps its time."""
    with open_source(path) as source:
        tensor = source.tensor(name)
        start = source.opened[0].header.data_start + tensor.info.offset + row * tensor.row_bytes
        before = path.stat()
    with path.open("r+b") as file:
        file.seek(start)
        data = bytes(x ^ 0x80 if i % 2 else x for i, x in enumerate(file.read(tensor.row_bytes)))
        file.seek(start)
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class Stop(BaseException):
    """A stop between two chunks."""


def stop_after(n):
    left = iter(range(n))

    def progress(_):
        if next(left, None) is None:
            raise Stop

    return progress


@pytest.mark.parametrize("name", [COPY, Q, EXPERTS])
def test_a_row_that_changed_between_stop_and_resume_is_named_and_all_is_made_again(tmp_path, name):
    path = MODEL.write(tmp_path / "source.gguf")
    with open_source(path) as source, pytest.raises(Stop):
        convert(source, plan_for(source, "Q4_0", "Q8_0", "Q6_K"), tmp_path / "o.gguf", progress=stop_after(8))
    change_row(path, name, 0)
    with open_source(path) as source:
        plan, lines = plan_for(source, "Q4_0", "Q8_0", "Q6_K"), []
        with pytest.raises(SourceChanged, match=f"changed since .*'{name}' has other bytes") as caught:
            convert(source, plan, tmp_path / "o.gguf")
        assert caught.value.hint == "run it again: all of it is made again"
        again = convert(source, plan, tmp_path / "o.gguf", info=lines.append)
        assert lines == ["the source changed while an unfinished output was made; all of it is made again"]
        fresh = convert(source, plan, tmp_path / "fresh.gguf")
        assert again.output.read_bytes() == fresh.output.read_bytes() and again.tensors == fresh.tensors


def test_one_bad_read_while_resuming_does_no_harm(tmp_path, monkeypatch):
    with open_source(MODEL.write(tmp_path / "source.gguf")) as source:
        plan = plan_for(source, "Q4_0", "Q8_0", "Q6_K")
        right = convert(source, plan, tmp_path / "right.gguf")
        with pytest.raises(Stop):
            convert(source, plan, tmp_path / "o.gguf", progress=stop_after(8))
        flip_read(monkeypatch, 3)
        made = convert(source, plan, tmp_path / "o.gguf", threads=1)
        assert made.output.read_bytes() == right.output.read_bytes() and made.tensors == right.tensors


@pytest.mark.parametrize("name", [COPY, Q, EXPERTS])
def test_verify_compares_every_byte_of_the_source_with_what_the_output_was_made_from(tmp_path, name):
    path = MODEL.write(tmp_path / "source.gguf")
    with open_source(path) as source:
        made = convert(source, plan_for(source, "Q4_0", "Q8_0", "Q6_K"), tmp_path / "o.gguf")
        record_path(made.output).write_text(made.to_json())
        assert verify(made.output, source=source).compared[-1] == (
            "record and source: every byte that 4 tensors were made from, by SHA-256"
        )
    with path.open("r+b") as file, open_source(path) as source:
        tensor = source.tensor(name)
        file.seek(source.opened[0].header.data_start + tensor.info.offset + tensor.n_bytes - 2)
        last = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last[0] ^ 1]))
    with open_source(path) as source:
        found = verify(made.output, source=source)
    assert any(f"tensor '{name}' was made from other bytes: rows " in line for line in found.findings)
    assert found.misread_tensors == (name,) and found.verdict == "wrong"


def test_without_verification_the_output_is_not_compared_with_the_source(tmp_path, monkeypatch):
    with open_source(MODEL.write(tmp_path / "source.gguf")) as source:
        plan = plan_for(source, "Q4_0", "Q8_0", "Q6_K")
        names = flip_read(monkeypatch, 0)
        convert(source, plan, tmp_path / "right.gguf", threads=1)
        n_verified = len(names)
        names.clear()
        convert(source, plan, tmp_path / "o.gguf", threads=1, verify=False)
        assert len(names) < n_verified and sorted(set(names)) == sorted(t.name for t in source.tensors)
