"""Resumed runs: the same bytes and the same record as of a run that was never stopped."""

import json
import os
import random
import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
from conversions import convert, half, plan_for, single, small_model, verify
from gguf_files import ARCHITECTURE, STR, U32, File, pair, split_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.common import files as files_module
from requant.container import output as output_module
from requant.container import source as source_module
from requant.container.journal import Journal
from requant.container.source import open_source
from requant.container.splitting import WHOLE, Splitting
from requant.conversion import chunks
from requant.conversion.prepare import prepare_output
from requant.errors import BadInput, InputOutputError, OutputRefused, SourceChanged
from requant.formats import codec

TYPES = ("Q4_K", "Q8_0", "Q6_K")
MODEL = small_model(
    *(half(f"blk.{i}.{name}.weight", (256, 24), seed=i) for i in range(4) for name in ("attn_q", "ffn_up")),
    half("blk.4.ffn_down_exps.weight", (256, 16, 3), seed=9),
)


class Stop(BaseException):
    """A stop that only cleanup code handles."""


@pytest.fixture(autouse=True)
def _small():
    """Pieces of a few rows, each flushed as it comes, so that the run can be resumed at every moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_module, "COMMIT_BYTES", 1)
        patch.setattr(chunks, "CHUNK_WEIGHTS", 1024)
        patch.setattr(chunks, "PIECE_BYTES", 2000)
        yield


@pytest.fixture
def source(tmp_path):
    with open_source(MODEL.write(tmp_path / "source.gguf")) as source:
        yield source


@contextmanager
def stopped(after, error=Stop):
    """Yields the progress of a run that stops after so many chunks."""
    left = [after]

    def progress(_):
        left[0] -= 1
        if left[0] < 0:
            raise error

    with pytest.raises(error):
        yield progress


def made(source, out, **options):
    """The files of a conversion, and its record."""
    done = convert(source, plan_for(source, *TYPES), out, threads=2, **options)
    folder = done.output.parent
    return {p.name: p.read_bytes() for p in folder.iterdir()}, replace(done, output=None)


def interrupted(source, out, after, **options):
    with stopped(after) as progress:
        convert(source, plan_for(source, *TYPES), out, threads=2, progress=progress, **options)


@pytest.mark.parametrize("after", [0, 1, 7, 20, 38, 41, 50])
def test_a_stopped_run_goes_on_and_makes_the_same(tmp_path, source, after):
    whole = made(source, _folder(tmp_path, "whole") / "o.gguf")
    out = _folder(tmp_path, "again") / "o.gguf"
    interrupted(source, out, after)
    kept = {p.name for p in out.parent.iterdir()}
    assert kept == ({"o.gguf.part", "o.gguf.part.journal"} if after else set())
    told = []
    assert made(source, out, info=told.append) == whole
    assert not after or re.fullmatch(r"resuming \d+/10 tensors", told[0])


def _folder(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    return path


def test_a_run_may_stop_again_and_again(tmp_path, source):
    whole = made(source, _folder(tmp_path, "whole") / "o.gguf")
    out = _folder(tmp_path, "again") / "o.gguf"
    for after in (3, 9, 15, 30, 40):
        interrupted(source, out, after)
    assert made(source, out) == whole


def test_what_is_recorded_is_not_encoded_again(tmp_path, source, monkeypatch):
    out = tmp_path / "o.gguf"
    interrupted(source, out, 30)
    encoded = []
    real = codec.quantize
    monkeypatch.setattr(codec, "quantize", lambda x, *rest: encoded.append(len(x)) or real(x, *rest))
    convert(source, plan_for(source, *TYPES), out)
    n_rows = sum(t.n_rows for t in source.tensors if t.name != "output_norm.weight")
    assert 0 < sum(encoded) < n_rows * 0.7


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_end_of_the_journal_may_be_lost_or_damaged(tmp_path_factory, data):
    tmp_path = tmp_path_factory.mktemp("damaged")
    with open_source(MODEL.write(tmp_path / "source.gguf")) as source:
        whole = made(source, _folder(tmp_path, "whole") / "o.gguf")
        out = _folder(tmp_path, "again") / "o.gguf"
        interrupted(source, out, data.draw(st.integers(2, 40)))
        journal = out.with_name("o.gguf.part.journal")
        content = bytearray(journal.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            del content[at if at > 8 else 0 :]  # of fewer bytes nobody can tell whether they are of a journal
        else:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        journal.write_bytes(content)
        assert made(source, out) == whole


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_flipped_bit_of_the_part_is_found_and_made_again(tmp_path_factory, data):
    tmp_path = tmp_path_factory.mktemp("flipped")
    with open_source(MODEL.write(tmp_path / "source.gguf")) as source:
        whole = made(source, _folder(tmp_path, "whole") / "o.gguf")
        out = _folder(tmp_path, "again") / "o.gguf"
        interrupted(source, out, 41)
        part = out.with_name("o.gguf.part")
        content = bytearray(part.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        part.write_bytes(content)
        assert made(source, out) == whole


def test_padding_of_the_part_that_is_not_zero_is_made_zero_again(tmp_path):
    odd = small_model(single("blk.0.attn_norm.weight", (9,)), half("blk.0.attn_q.weight", (256, 24)))
    with open_source(odd.write(tmp_path / "odd.gguf")) as source:
        whole = made(source, _folder(tmp_path, "whole") / "o.gguf")
        out = _folder(tmp_path, "again") / "o.gguf"
        interrupted(source, out, 3)
        (start, stop), *_ = prepare_output(source, plan_for(source, *TYPES), None, None, WHOLE).layouts[0].padding
        with out.with_name("o.gguf.part").open("r+b") as file:
            file.seek(start)
            file.write(b"x" * (stop - start))
        assert made(source, out) == whole


def test_a_changed_tensor_of_the_part_is_named(tmp_path, source):
    out = tmp_path / "o.gguf"
    interrupted(source, out, 41)
    part = out.with_name("o.gguf.part")
    content = bytearray(part.read_bytes())
    with Journal(out.with_name("o.gguf.part.journal"), out) as journal:
        content[journal.past.records[3]["offset"] + 5] ^= 1
    part.write_bytes(content)
    told = []
    convert(source, plan_for(source, *TYPES), out, info=told.append)
    assert any("is not as it was recorded; it is made again" in line for line in told)


def test_a_part_that_was_lost_or_cut_is_made_again(tmp_path, source):
    whole = made(source, _folder(tmp_path, "whole") / "o.gguf")
    for number, harm in enumerate((lambda p: p.unlink(), lambda p: os.truncate(p, 100))):
        out = _folder(tmp_path, f"again{number}") / "o.gguf"
        interrupted(source, out, 20)
        harm(out.with_name("o.gguf.part"))
        assert made(source, out) == whole


def test_another_plan_is_refused_and_names_the_difference(tmp_path, source):
    out = tmp_path / "o.gguf"
    interrupted(source, out, 20)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(OutputRefused, match=r'type was "Q4_K", now "Q8_0"; the same command .*--restart') as caught:
        convert(source, plan_for(source, "Q8_0"), out)
    assert caught.value.exit_code == 5
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    owner = [line for line in after["o.gguf.part.journal"].splitlines() if b'"owner"' in line]
    assert after["o.gguf.part"] == before["o.gguf.part"] and len(owner) == 2


def test_a_source_that_was_exchanged_between_the_runs_is_refused(tmp_path, source):
    out = tmp_path / "o.gguf"
    interrupted(source, out, 20)
    os.utime(tmp_path / "source.gguf", (1, 1))
    with (
        open_source(tmp_path / "source.gguf") as again,
        pytest.raises(OutputRefused, match=r"source 0 mtime_ns was \d+, now 1000000000"),
    ):
        convert(again, plan_for(again, *TYPES), out)


def test_what_was_made_from_a_source_that_changed_is_not_gone_on_with(tmp_path, source):
    out = tmp_path / "o.gguf"
    path, status = tmp_path / "source.gguf", (tmp_path / "source.gguf").stat()
    seen = []

    def touch(_):
        seen.append(1)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (len(seen) > 20)))

    with pytest.raises(SourceChanged, match="mtime_ns was"):
        convert(source, plan_for(source, *TYPES), out, progress=touch)
    assert {p.name for p in tmp_path.iterdir()} == {"source.gguf", "o.gguf.part", "o.gguf.part.journal"}
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    told = []
    convert(source, plan_for(source, *TYPES), out, info=told.append)
    assert told == ["the source changed while an unfinished output was made; all of it is made again"]


def test_a_second_run_is_refused_and_told_who_has_the_output(tmp_path, source):
    out = tmp_path / "o.gguf"
    refused = []

    def second(_):
        with pytest.raises(OutputRefused, match=rf"another run is writing it: process {os.getpid()} on .*, started 20"):
            convert(source, plan_for(source, *TYPES), out)
        refused.append(1)

    convert(source, plan_for(source, *TYPES), out, progress=second)
    assert len(refused) > 10 and out.exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_run_stopped_after_publishing_only_finishes(tmp_path, source, force):
    whole = made(source, _folder(tmp_path, "whole") / "o.gguf")
    out = _folder(tmp_path, "again") / "o.gguf"
    if force:
        out.write_bytes(b"old")

    def stop(_):
        raise Stop

    with pytest.raises(Stop):
        convert(source, plan_for(source, *TYPES), out, record=stop, force=force)
    inode = out.stat().st_ino
    recorded = []
    assert made(source, out, record=recorded.append) == whole
    assert out.stat().st_ino == inode and len(recorded) == 1


def test_a_run_stopped_between_the_two_names_only_finishes(tmp_path, source, monkeypatch):
    out = tmp_path / "o.gguf"
    link = os.link

    def stop(*names):
        link(*names)
        raise Stop

    monkeypatch.setattr(os, "link", stop)
    with pytest.raises(Stop):
        convert(source, plan_for(source, *TYPES), out)
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} == {"source.gguf", "o.gguf", "o.gguf.part", "o.gguf.part.journal"}
    convert(source, plan_for(source, *TYPES), out)
    assert {p.name for p in tmp_path.iterdir()} == {"source.gguf", "o.gguf"}


def test_a_link_to_the_new_name_that_the_journal_does_not_know_of_is_undone(tmp_path, source, monkeypatch):
    whole = made(source, _folder(tmp_path, "whole") / "o.gguf")
    out = _folder(tmp_path, "again") / "o.gguf"
    link = os.link

    def stop(*names):
        link(*names)
        raise Stop

    monkeypatch.setattr(os, "link", stop)
    with pytest.raises(Stop):
        convert(source, plan_for(source, *TYPES), out)
    monkeypatch.undo()
    journal = out.with_name("o.gguf.part.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    assert b"sealed" in lines[-1]
    journal.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(OutputRefused, match="already exists"):
        convert(source, plan_for(source, *TYPES), out)
    assert made(source, out, force=True) == whole


def test_a_published_output_that_was_changed_before_it_was_finished_is_not_called_good(tmp_path, source):
    out = tmp_path / "o.gguf"

    def stop(_):
        raise Stop

    with pytest.raises(Stop):
        convert(source, plan_for(source, *TYPES), out, record=stop)
    content = bytearray(out.read_bytes())
    content[-1000] ^= 1
    out.write_bytes(content)
    with pytest.raises(InputOutputError, match="is not as it was written"):
        convert(source, plan_for(source, *TYPES), out)


def test_an_output_that_reads_back_wrong_is_not_published_and_mended_by_the_next_run(tmp_path, source, monkeypatch):
    whole = made(source, _folder(tmp_path, "whole") / "o.gguf")
    out = _folder(tmp_path, "again") / "o.gguf"
    seal = output_module.Output.seal

    def harm(self, layouts):
        seal(self, layouts)
        self.write_at(0, self.layouts[0].size - 200, b"harmful!")

    monkeypatch.setattr(output_module.Output, "seal", harm)
    with pytest.raises(InputOutputError, match="does not read back as it was written"):
        convert(source, plan_for(source, *TYPES), out)
    assert not out.exists()
    monkeypatch.undo()
    assert made(source, out) == whole


@pytest.mark.parametrize("content", [b"GGUF" + bytes(5000), b"a download of somebody's", bytes(24) + b"theirs", b""])
def test_a_part_file_that_is_not_ours_is_kept(tmp_path, source, content):
    part, out = tmp_path / "o.gguf.part", tmp_path / "o.gguf"
    part.write_bytes(content)
    if content:
        with pytest.raises(OutputRefused, match="is not an unfinished output"):
            convert(source, plan_for(source, *TYPES), out)
        assert part.read_bytes() == content and not out.exists()
        assert not out.with_name("o.gguf.part.journal").exists()
    else:
        convert(source, plan_for(source, *TYPES), out)


@pytest.mark.parametrize("kind", ["fifo", "folder", "symlink"])
def test_a_journal_that_is_no_file_is_refused(tmp_path, source, kind):
    journal = tmp_path / "o.gguf.part.journal"
    {"fifo": lambda: os.mkfifo(journal), "folder": journal.mkdir, "symlink": lambda: journal.symlink_to("x")}[kind]()
    with pytest.raises(OutputRefused, match=r"journal: is a .*, not a journal"):
        convert(source, plan_for(source, *TYPES), tmp_path / "o.gguf")
    assert not (tmp_path / "x").exists()


HOSTILE = [{"tensor": 1, "piece": []}, {"tensor": "a", "piece": 0, "sha256": 5, "errors": "x"}, {"sealed": 1}, {}]


def test_a_journal_of_lies_is_checked_against_the_bytes(tmp_path, source):
    whole = made(source, _folder(tmp_path, "whole") / "o.gguf")
    out = _folder(tmp_path, "again") / "o.gguf"
    interrupted(source, out, 30)
    path = out.with_name("o.gguf.part.journal")
    with Journal(path, out) as journal:
        lies = [line | {"sha256": "0" * 64, "errors": [0.5] * 4} for line in journal.past.records[:4]]
        odd = [line | {"errors": [float(i)] * i} for i, line in enumerate(journal.past.records[4:8])]
        journal.append([*HOSTILE, *lies, *odd])
    assert made(source, out) == whole


def _split_model(tmp_path):
    tensors = MODEL.tensors
    parts = tensors[:3], tensors[3:7], tensors[7:]
    for i, own in enumerate(parts):
        keys = (pair(ARCHITECTURE, STR, "llama"), pair("general.file_type", U32, 1)) if i == 0 else ()
        keys += split_pairs(i, 3, len(tensors))
        File(keys, own).write(tmp_path / f"in-{i + 1:05d}-of-00003.gguf")
    return tmp_path / "in-00002-of-00003.gguf"


SHARDS = ["o-00001-of-00003.gguf", "o-00002-of-00003.gguf", "o-00003-of-00003.gguf"]


def test_a_split_output_is_the_whole_one_in_parts(tmp_path):
    with open_source(_split_model(tmp_path)) as source:
        out = _folder(tmp_path, "split") / "o.gguf"
        plan = plan_for(source, *TYPES)
        done = convert(source, plan, out, splitting=Splitting(keep=True))
        assert sorted(p.name for p in out.parent.iterdir()) == SHARDS
        assert done.output.name == SHARDS[0]
        whole = convert(source, plan, tmp_path / "whole.gguf")
        assert verify(done.output, source=source).ok
        with open_source(out.with_name(SHARDS[1])) as a, open_source(whole.output) as b:
            assert [(t.name, t.format.name) for t in a.tensors] == list(plan.types().items())
            assert [t.file for t in a.tensors] == [t.file for t in source.tensors]
            for t in b.tensors:
                assert (a.read_rows(a.tensor(t.name)) == b.read_rows(t)).all()
            assert a.header_sha256 == done.header_sha256
        assert done.tensors == whole.tensors


@pytest.mark.parametrize("size", [11_000, 20_000, 10**6])
def test_no_file_is_larger_than_asked(tmp_path, source, size):
    out = _folder(tmp_path, "split") / "o.gguf"
    done = convert(source, plan_for(source, *TYPES), out, splitting=Splitting(max_size=size))
    files = sorted(out.parent.iterdir())
    assert all(p.stat().st_size <= size for p in files) and (len(files) > 1) == (size < 10**6)
    assert sum(p.stat().st_size for p in files) == done.size
    assert verify(done.output, source=source).ok


def test_a_tensor_larger_than_a_file_may_be_is_refused(tmp_path, source):
    with pytest.raises(BadInput, match=r"'blk.4.ffn_down_exps.weight' alone is larger.*must be at least"):
        convert(source, plan_for(source, "Q8_0"), tmp_path / "o.gguf", splitting=Splitting(max_size=9000))
    with pytest.raises(BadInput, match="the keys alone"):
        convert(source, plan_for(source, "Q8_0"), tmp_path / "o.gguf", splitting=Splitting(max_size=100))


@pytest.mark.parametrize("seed", range(12))
def test_a_stopped_split_run_goes_on_and_makes_the_same(tmp_path, seed):
    rng = random.Random(seed)
    with open_source(_split_model(tmp_path)) as source:
        how = {"splitting": Splitting(keep=True)}
        whole = made(source, _folder(tmp_path, "whole") / "o.gguf", **how)
        out = _folder(tmp_path, "again") / "o.gguf"
        interrupted(source, out, rng.randrange(2, 50), **how)
        assert {p.name for p in out.parent.iterdir()} == {f"{n}.part" for n in SHARDS} | {"o.gguf.part.journal"}
        if seed % 3 == 0:
            out.with_name(f"{SHARDS[rng.randrange(3)]}.part").unlink()
        assert made(source, out, **how) == whole


@pytest.mark.parametrize("placed", [0, 1, 2])
def test_the_first_file_is_put_in_place_last_and_a_stop_in_between_is_mended(tmp_path, monkeypatch, placed):
    with open_source(_split_model(tmp_path)) as source:
        how = {"splitting": Splitting(keep=True)}
        whole = made(source, _folder(tmp_path, "whole") / "o.gguf", **how)
        out = _folder(tmp_path, "again") / "o.gguf"
        put, left = output_module.PartFile.put_in_place, [placed]

        def stop(self):
            if left[0] == 0:
                raise Stop
            left[0] -= 1
            put(self)

        monkeypatch.setattr(output_module.PartFile, "put_in_place", stop)
        with pytest.raises(Stop):
            convert(source, plan_for(source, *TYPES), out, **how)
        monkeypatch.setattr(output_module.PartFile, "put_in_place", put)
        assert [name for name in SHARDS if out.with_name(name).exists()] == SHARDS[1 : 1 + placed]
        assert made(source, out, **how) == whole


def test_the_record_of_a_split_output_lies_beside_its_first_file(tmp_path, source):
    from requant.conversion.record import record_path

    done = convert(source, plan_for(source, *TYPES), tmp_path / "o.gguf", splitting=Splitting(max_size=20_000))
    record_path(done.output).write_text(done.to_json())
    assert json.loads(record_path(done.output).read_text())["output"] == done.output.name
    assert verify(done.output).against == ("record", "digests")


def test_a_part_file_of_zeros_without_a_journal_may_be_somebodys(tmp_path, source):
    out = tmp_path / "o.gguf"
    interrupted(source, out, 20)
    out.with_name("o.gguf.part.journal").unlink()
    found = out.with_name("o.gguf.part").read_bytes()
    assert found[:24] == bytes(24)
    for _ in range(2):
        with pytest.raises(OutputRefused, match="is not an unfinished output"):
            convert(source, plan_for(source, *TYPES), out)
    assert out.with_name("o.gguf.part").read_bytes() == found


def test_a_header_that_reads_otherwise_is_found_before_the_output_is_published(tmp_path, source, monkeypatch):
    read, path = files_module.read_into, source.opened[0].path

    def flip(file, descriptor, target, offset):
        read(file, descriptor, target, offset)
        if file == path and offset == 0:
            target[40] ^= 1

    monkeypatch.setattr(source_module, "read_into", flip)
    with pytest.raises(SourceChanged, match="its header reads otherwise"):
        convert(source, plan_for(source, *TYPES), tmp_path / "o.gguf")
    assert not (tmp_path / "o.gguf").exists()
