"""Outputs of one or more files: data on disk before its record, headers after the data, the first name last of all."""

import errno
import os
import time

import pytest
from gguf_files import File

from requant.common.inputs import add_inputs, collect_inputs
from requant.common.sidecars import Sidecar
from requant.container import output as output_module
from requant.container.layout import lay_out
from requant.container.metadata import Metadata
from requant.container.output import Output, can_resume, claim_output, discard_unfinished
from requant.errors import InputOutputError, OutputRefused, SourceChanged

LAYOUTS = tuple(
    lay_out(Metadata("m", {}).with_values({"k": ("u8", i)}), [(f"t{i}", (256, 4), 0)], "out") for i in range(3)
)
NAMES = [f"o-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
JOURNAL = "o.gguf.part.journal"
HEAD = {"plan": "p"}


def opened(folder, journal, *, head=HEAD, force=False, extras=(), layouts=LAYOUTS):
    paths = [folder / name for name in NAMES[: len(layouts)]]
    return Output(paths, layouts, head, journal, force=force, extras=extras)


def data_of(i):
    return bytes([i + 1]) * LAYOUTS[i].tensors[0].n_bytes


def fill(output, numbers=(0, 1, 2)):
    for i in numbers:
        placed = LAYOUTS[i].tensors[0]
        output.write_at(i, placed.offset, data_of(i))
        output.record({"tensor": placed.name, "piece": 0, "file": i}, placed.n_bytes)


def whole(i):
    return LAYOUTS[i].header + data_of(i)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def stopped(folder, numbers=(0, 1), error=KeyboardInterrupt, **options):
    """Stop a run when it has written so many files."""
    with pytest.raises(error), claim_output(folder / "o.gguf") as journal, opened(folder, journal, **options) as output:
        fill(output, numbers)
        raise error("stopped")


def finished(folder, **options):
    """Finish a run; return its output object."""
    with claim_output(folder / "o.gguf") as journal, opened(folder, journal, **options) as output:
        if not output.is_published:
            done = {record["file"] for record in output.records if "file" in record}
            fill(output, set(range(len(output.layouts))) - done)
            output.seal(output.layouts)
            output.publish()
        output.finish()
    return output


PARTS = [f"{name}.part" for name in NAMES]


def test_the_files_are_there_when_all_are_whole(tmp_path):
    output = finished(tmp_path)
    assert names(tmp_path) == NAMES and output.notes == [] and output.warnings == [] and output.is_published
    assert [(tmp_path / name).read_bytes() for name in NAMES] == [whole(i) for i in range(3)]


def test_the_files_are_known_by_their_parts_until_then(tmp_path):
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        assert output.part_files == [tmp_path / name for name in PARTS]
        assert not output.is_published and output.records == ()
        assert names(tmp_path) == sorted([*PARTS, JOURNAL])
        fill(output)
        found = bytearray(10)
        output.read_at(1, LAYOUTS[1].tensors[0].offset, memoryview(found))
        assert found == data_of(1)[:10]
    assert names(tmp_path) == sorted([*PARTS, JOURNAL])


def test_a_stopped_run_goes_on_with_what_it_has_recorded(tmp_path):
    stopped(tmp_path)
    assert names(tmp_path) == sorted([*PARTS, JOURNAL])
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        assert [record["tensor"] for record in output.records] == ["t0", "t1"]
        assert output.notes == ["resuming 2/3 tensors"]
        assert journal.past.file_names() == NAMES
    finished(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in NAMES] == [whole(i) for i in range(3)]


def test_a_run_that_has_recorded_nothing_leaves_nothing(tmp_path):
    extra = tmp_path / "o.gguf.part.imatrix"
    extra.write_bytes(b"measured")
    stopped(tmp_path, numbers=(), extras=[Sidecar(extra, "ours"), Sidecar(tmp_path / "missing", "ours")])
    assert names(tmp_path) == []


def test_a_run_that_goes_on_and_stops_at_once_keeps_everything(tmp_path):
    extra = tmp_path / "o.gguf.part.imatrix"
    extra.write_bytes(b"measured")
    stopped(tmp_path, extras=[Sidecar(extra, "ours")])
    stopped(tmp_path, numbers=(), extras=[Sidecar(extra, "ours")])
    assert names(tmp_path) == sorted([*PARTS, JOURNAL, extra.name])
    finished(tmp_path, extras=[Sidecar(extra, "ours")])
    assert names(tmp_path) == NAMES


def test_a_part_that_was_lost_or_cut_is_begun_again(tmp_path):
    stopped(tmp_path)
    (tmp_path / PARTS[1]).unlink()
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        assert [record["tensor"] for record in output.records] == ["t0"]
        assert output.notes == ["resuming 1/3 tensors"]
        assert (tmp_path / PARTS[1]).stat().st_size == LAYOUTS[1].size


def test_a_header_of_an_earlier_run_is_taken_away_until_the_file_is_whole(tmp_path):
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        fill(output)
        output.seal(output.layouts)
    assert (tmp_path / PARTS[0]).read_bytes()[:4] == b"GGUF"
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal):
        assert (tmp_path / PARTS[0]).read_bytes()[:24] == bytes(24)


def test_sealed_parts_whose_journal_is_lost_may_be_somebodys_and_are_kept(tmp_path):
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        fill(output)
        output.seal(output.layouts)
    (tmp_path / JOURNAL).unlink()
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(OutputRefused, match=f"{PARTS[0]}: is not an unfinished output"):
        finished(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before and before.keys() == set(PARTS)


def test_damaged_lines_are_told_of(tmp_path):
    stopped(tmp_path)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b"torn\ntorn")
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        assert output.notes == ["resuming 2/3 tensors", "2 damaged lines of the journal were dropped"]


def test_a_journal_without_a_sound_head_is_told_of_and_all_is_made_again(tmp_path):
    stopped(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"damage\n" + (tmp_path / JOURNAL).read_bytes())
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        assert output.notes == ["the journal of an unfinished output was damaged; all of it is made again"]
        assert output.records == () and not any((tmp_path / PARTS[0]).read_bytes())
    assert names(tmp_path) == []


@pytest.mark.parametrize("change", [{"head": {"plan": "q"}}, {"layouts": LAYOUTS[:2]}])
def test_what_another_command_began_is_refused_and_kept(tmp_path, change):
    stopped(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in PARTS}
    text = (
        r"o-00001-of-00003.gguf: is unfinished, begun by another command: .* was .*, now .*; the same command resumes"
    )
    with pytest.raises(OutputRefused, match=text), claim_output(tmp_path / "o.gguf") as journal:
        opened(tmp_path, journal, **change)
    assert {name: (tmp_path / name).read_bytes() for name in PARTS} == before
    with claim_output(tmp_path / "o.gguf") as journal:
        assert can_resume(journal, HEAD, tmp_path / "o.gguf")
        assert not can_resume(claim_output(tmp_path / "other.gguf"), HEAD, tmp_path / "other.gguf")


def test_what_was_made_of_a_source_that_changed_is_not_gone_on_with(tmp_path):
    with (
        pytest.raises(SourceChanged),
        claim_output(tmp_path / "o.gguf") as journal,
        opened(tmp_path, journal) as output,
    ):
        fill(output, [0])
        output.flush()
        raise SourceChanged("m.gguf", "changed")
    assert b'"invalid": "changed"' in (tmp_path / JOURNAL).read_bytes()
    with claim_output(tmp_path / "o.gguf") as journal:
        assert not can_resume(journal, {"plan": "of another command"}, tmp_path / "o.gguf")
        with opened(tmp_path, journal) as output:
            text = "the source changed while an unfinished output was made; all of it is made again"
            assert output.notes == [text] and output.records == ()


def logged(monkeypatch, folder):
    """The calls that matter, as they come: ("sync", name), ("link", name), lines of the journal counted."""
    calls = []
    for call in ("fdatasync", "fsync"):
        real = getattr(os, call)

        def sync(descriptor, real=real):
            calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))  # noqa: PTH115, PTH119
            real(descriptor)

        monkeypatch.setattr(os, call, sync)
    link = os.link
    monkeypatch.setattr(os, "link", lambda old, new: calls.append(f"link {new.name}") or link(old, new))
    return calls


def test_data_is_flushed_before_its_record_when_there_is_enough_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(output_module, "COMMIT_BYTES", 2 * LAYOUTS[0].tensors[0].n_bytes)
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        calls = logged(monkeypatch, tmp_path)
        n_lines = (tmp_path / JOURNAL).read_bytes().count(b"\n")
        fill(output, [0])
        assert calls == [] and (tmp_path / JOURNAL).read_bytes().count(b"\n") == n_lines
        fill(output, [1])
        assert calls == [*PARTS, JOURNAL] and (tmp_path / JOURNAL).read_bytes().count(b"\n") == n_lines + 2
        fill(output, [2])
        output.flush()
        assert calls == [*PARTS, JOURNAL] * 2 and (tmp_path / JOURNAL).read_bytes().count(b"\n") == n_lines + 3
        output.flush()
        assert calls == [*PARTS, JOURNAL] * 2
        fill(output, [0])
        assert calls == [*PARTS, JOURNAL] * 2


def test_data_is_flushed_when_the_last_time_is_long_ago(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        calls = logged(monkeypatch, tmp_path)
        now[0] += output_module.COMMIT_SECONDS - 1
        fill(output, [0])
        assert calls == []
        now[0] += 1
        fill(output, [1])
        assert calls == [*PARTS, JOURNAL]
        now[0] += output_module.COMMIT_SECONDS - 1
        fill(output, [2])
        assert calls == [*PARTS, JOURNAL]


def test_a_crash_costs_little():
    assert (output_module.COMMIT_BYTES, output_module.COMMIT_SECONDS) == (2**30, 30.0)


def test_after_a_failed_flush_nothing_is_recorded_any_more(tmp_path, monkeypatch):
    calls = []

    def fails(descriptor):
        calls.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    with (
        pytest.raises(InputOutputError, match="flushing to disk failed"),
        claim_output(tmp_path / "o.gguf") as journal,
        opened(tmp_path, journal) as output,
    ):
        fill(output, [0])
        output.flush()
        n_lines = (tmp_path / JOURNAL).read_bytes().count(b"\n")
        fill(output, [1])
        monkeypatch.setattr(os, "fdatasync", fails)
        output.flush()
    assert len(calls) == 1
    assert (tmp_path / JOURNAL).read_bytes().count(b"\n") == n_lines


def test_headers_come_after_the_data_and_the_first_name_last(tmp_path, monkeypatch):
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        fill(output)
        calls = logged(monkeypatch, tmp_path)
        output.seal(output.layouts)
        assert calls == [*PARTS, JOURNAL, *(name for name in PARTS for _ in range(2))]
        assert all((tmp_path / name).read_bytes()[:4] == b"GGUF" for name in PARTS)
        calls.clear()
        output.publish()
        folder = tmp_path.name
        last = [f"link {NAMES[0]}", folder]
        assert calls == [JOURNAL, f"link {NAMES[1]}", folder, f"link {NAMES[2]}", folder, *last]
        assert b'{"sealed": true}' in (tmp_path / JOURNAL).read_bytes()
        calls.clear()
        output.finish()
        assert calls == [folder, JOURNAL, folder] and names(tmp_path) == NAMES


def test_the_names_are_on_disk_before_the_first_record(tmp_path, monkeypatch):
    calls = logged(monkeypatch, tmp_path)
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal):
        assert calls == [JOURNAL, JOURNAL, tmp_path.name]


@pytest.mark.parametrize("n_placed", [0, 1, 2, 3])
@pytest.mark.parametrize("between", [False, True])
def test_a_run_stopped_while_it_publishes_is_finished_by_the_next(tmp_path, monkeypatch, n_placed, between):
    link, unlink = os.link, os.unlink
    left = [n_placed]

    def limited(*arguments):
        left[0] -= 1
        if left[0] < 0 and not between:
            raise KeyboardInterrupt
        link(*arguments)
        if left[0] < 0:
            raise KeyboardInterrupt

    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        fill(output)
        output.seal(output.layouts)
        monkeypatch.setattr(os, "link", limited)
        if n_placed < 3:
            with pytest.raises(KeyboardInterrupt):
                output.publish()
        else:
            output.publish()
    assert os.unlink is unlink
    monkeypatch.undo()
    in_place = [name for name in NAMES if (tmp_path / name).exists()]
    assert len(in_place) == n_placed + (between and n_placed < 3)
    output = finished(tmp_path)
    assert names(tmp_path) == NAMES
    assert [(tmp_path / name).read_bytes() for name in NAMES] == [whole(i) for i in range(3)]
    assert bool(output.notes) == (len(in_place) < 3)


def test_a_published_output_is_read_and_never_written(tmp_path):
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        fill(output)
        output.seal(output.layouts)
        output.publish()
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        assert output.is_published and [r.get("tensor") for r in output.records] == ["t0", "t1", "t2", None]
        found = bytearray(7)
        output.read_at(2, LAYOUTS[2].tensors[0].offset, memoryview(found))
        assert found == data_of(2)[:7]
        text = f"{NAMES[1]}: is not as it was written; --restart and --force make it again"
        with pytest.raises(InputOutputError, match=text):
            output.write_at(1, 0, b"x")
    assert names(tmp_path) == sorted([*NAMES, JOURNAL])
    assert len(os.listdir("/proc/self/fd")) < 100  # noqa: PTH208


def test_an_output_exchanged_after_it_was_published_is_not_finished(tmp_path):
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        fill(output)
        output.seal(output.layouts)
        output.publish()
    (tmp_path / NAMES[2]).unlink()
    File().write(tmp_path / NAMES[2])
    with (
        pytest.raises(OutputRefused, match=f"{NAMES[2]}: already exists"),
        claim_output(tmp_path / "o.gguf") as journal,
    ):
        opened(tmp_path, journal)
    (tmp_path / NAMES[2]).write_bytes(b"no model")
    with (
        pytest.raises(OutputRefused, match=f"{NAMES[2]}: already exists"),
        claim_output(tmp_path / "o.gguf") as journal,
    ):
        opened(tmp_path, journal)


def test_descriptors_are_closed_whatever_happens(tmp_path):
    def count():
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = count()
    stopped(tmp_path)
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        fill(output, [2])
        output.seal(output.layouts)
        output.publish()
    finished(tmp_path)
    (tmp_path / NAMES[0]).rename(tmp_path / "away")
    with pytest.raises(OutputRefused), claim_output(tmp_path / "o.gguf") as journal:
        opened(tmp_path, journal)
    assert count() == before


@pytest.mark.parametrize("number", [0, 2])
def test_a_name_that_is_taken_or_an_input_is_refused_and_nothing_is_left(tmp_path, number):
    taken = tmp_path / NAMES[number]
    taken.write_bytes(b"old")
    for inputs, text in (((), "already exists"), ((taken,), "is one of the inputs")):
        with (
            collect_inputs(),
            pytest.raises(OutputRefused, match=text),
            claim_output(tmp_path / "o.gguf") as journal,
        ):
            add_inputs(*inputs)
            opened(tmp_path, journal, force=bool(inputs))
        assert names(tmp_path) == [taken.name] and taken.read_bytes() == b"old"
    finished(tmp_path, force=True)
    assert taken.read_bytes() == whole(number)


def test_space_is_checked_for_all_files_together(tmp_path, monkeypatch):
    need = sum(layout.size for layout in LAYOUTS)
    status = os.statvfs(tmp_path)
    fields = list(status)
    for room, fits in ((need - 1, False), (need, True)):
        fields[:5] = [1, 1, 2**40, 2**40, room]  # f_bsize, f_frsize, f_blocks, f_bfree, f_bavail
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
        with claim_output(tmp_path / "o.gguf") as journal:
            if fits:
                opened(tmp_path, journal).__exit__(None, None, None)
            else:
                with pytest.raises(InputOutputError, match=r"needs .* free but has"):
                    opened(tmp_path, journal)
        assert names(tmp_path) == []


def test_what_the_file_system_cannot_do_is_said_once(tmp_path, monkeypatch):
    def no(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", no)
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        assert output.warnings == ["the output's file system reserves no space: a full disk may show late"]


def test_restart_discards_all_files_and_nothing_else(tmp_path):
    stopped(tmp_path)
    (tmp_path / "o.gguf.part").write_bytes(bytes(30))
    (tmp_path / "other.gguf.part").write_bytes(b"of another output")
    (tmp_path / "o.gguf").write_bytes(b"old")
    with claim_output(tmp_path / "o.gguf") as journal:
        discard_unfinished(journal, tmp_path / "o.gguf")
        assert names(tmp_path) == ["o.gguf", JOURNAL, "other.gguf.part"]
        assert journal.past.file_names() == []
    assert names(tmp_path) == ["o.gguf", "other.gguf.part"]


def test_restart_does_not_follow_a_journal_out_of_the_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "x.part").write_bytes(b"precious")
    shard = "o-00001-of-00002.gguf"
    (tmp_path / "in" / f"{shard}.part").write_bytes(bytes(4))
    odd = [["../x", 8], [str(tmp_path / "x"), 8], ["..", 1], ["", 1], [5, 1], [], "z", ["o.gguf"], [shard, 4, "h"]]
    with claim_output(folder / "o.gguf") as journal:
        journal.begin({"files": odd})
    with claim_output(folder / "o.gguf") as journal:
        assert journal.past.file_names() == [shard]
        discard_unfinished(journal, folder / "o.gguf")
    assert names(folder) == [] and (tmp_path / "x.part").read_bytes() == b"precious"


def test_restart_discards_nothing_where_one_file_is_not_ours(tmp_path):
    stopped(tmp_path)
    (tmp_path / PARTS[2]).write_bytes(b"somebody else's")
    before = names(tmp_path)
    with claim_output(tmp_path / "o.gguf") as journal, pytest.raises(OutputRefused, match=f"{PARTS[2]}: is not an unf"):
        discard_unfinished(journal, tmp_path / "o.gguf")
    assert names(tmp_path) == before and (tmp_path / PARTS[2]).read_bytes() == b"somebody else's"


@pytest.mark.parametrize("files", [None, 5, {"a": 1}])
def test_a_journal_whose_files_are_no_list_names_none(tmp_path, files):
    with claim_output(tmp_path / "o.gguf") as journal:
        journal.begin({"files": files})
    with claim_output(tmp_path / "o.gguf") as journal:
        assert journal.past.file_names() == []


def test_an_input_is_not_discarded(tmp_path):
    part = tmp_path / "o.gguf.part"
    part.write_bytes(b"the source")
    with (
        collect_inputs(),
        pytest.raises(OutputRefused, match="is one of the inputs"),
        claim_output(tmp_path / "o.gguf") as journal,
    ):
        add_inputs(part)
        discard_unfinished(journal, tmp_path / "o.gguf")
    assert part.read_bytes() == b"the source"


def test_the_claim_follows_a_link_to_its_target(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "o.gguf").symlink_to(tmp_path / "there" / "real.gguf")
    with claim_output(tmp_path / "o.gguf") as journal:
        assert journal.path == tmp_path / "there" / "real.gguf.part.journal" and journal.path.exists()
        with pytest.raises(OutputRefused, match=f"{tmp_path / 'o.gguf'}: another run"):
            claim_output(tmp_path / "o.gguf")


def test_an_output_of_one_file_is_made_and_gone_on_with(tmp_path):
    stopped(tmp_path, [0], layouts=LAYOUTS[:1])
    output = finished(tmp_path, layouts=LAYOUTS[:1])
    assert output.notes == ["resuming 1/1 tensors"] and names(tmp_path) == NAMES[:1]


def test_files_and_layouts_must_be_as_many(tmp_path):
    with claim_output(tmp_path / "o.gguf") as journal, pytest.raises(ValueError, match="longer"):
        Output([tmp_path / "o.gguf"], LAYOUTS, HEAD, journal, force=False)


def test_a_flush_comes_at_the_very_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(output_module, "COMMIT_BYTES", 100)
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        calls = logged(monkeypatch, tmp_path)
        for _ in range(2):
            output.record({}, 99)
            assert calls == []
            output.record({}, 1)
            assert calls == [*PARTS, JOURNAL]
            calls.clear()


def test_a_disk_that_fails_on_the_way_out_does_not_hide_what_led_there(tmp_path, monkeypatch):
    def fails(_):
        raise OSError(errno.EIO, "Input/output error")

    with (
        claim_output(tmp_path / "o.gguf") as journal,
        pytest.raises(KeyboardInterrupt),
        opened(tmp_path, journal) as output,
    ):
        fill(output, [0])
        monkeypatch.setattr(os, "fdatasync", fails)
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_extra_that_is_not_there_is_not_missed(tmp_path):
    finished(tmp_path, extras=[Sidecar(tmp_path / "missing", "ours")])
    assert names(tmp_path) == NAMES


def test_files_in_place_that_no_run_has_put_there_are_kept(tmp_path):
    stopped(tmp_path, [0, 1, 2])
    for i, name in enumerate(NAMES):
        (tmp_path / PARTS[i]).unlink()
        (tmp_path / name).write_bytes(whole(i))
    with pytest.raises(OutputRefused, match="already exists"), claim_output(tmp_path / "o.gguf") as journal:
        opened(tmp_path, journal)
    assert [(tmp_path / name).read_bytes() for name in NAMES] == [whole(i) for i in range(3)]


def test_a_part_that_was_cut_short_is_begun_again(tmp_path):
    stopped(tmp_path)
    os.truncate(tmp_path / PARTS[0], 50)
    finished(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in NAMES] == [whole(i) for i in range(3)]


def test_a_source_that_changed_before_anything_was_written_is_told_of(tmp_path):
    with claim_output(tmp_path / "o.gguf") as journal:
        journal.begin(HEAD)
        journal.append([{"invalid": "changed"}])
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        assert output.notes == ["the source changed while an unfinished output was made; all of it is made again"]


def test_what_has_no_records_binds_nobody(tmp_path):
    with claim_output(tmp_path / "o.gguf") as journal:
        journal.begin({"plan": "of another command"})
    with claim_output(tmp_path / "o.gguf") as journal:
        assert not can_resume(journal, HEAD, tmp_path / "o.gguf")
        with opened(tmp_path, journal) as output:
            assert output.notes == []


def test_names_taken_back_are_on_disk_before_the_headers_go(tmp_path, monkeypatch):
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        fill(output)
        output.seal(output.layouts)
        output.publish()
    (tmp_path / NAMES[1]).rename(tmp_path / PARTS[1])
    calls = logged(monkeypatch, tmp_path)
    with claim_output(tmp_path / "o.gguf") as journal, opened(tmp_path, journal) as output:
        assert calls == [tmp_path.name] and not output.is_published
        assert names(tmp_path) == sorted([*PARTS, JOURNAL])
