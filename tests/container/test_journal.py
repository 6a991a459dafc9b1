"""The journal: an opened one holds what was on disk, without torn or damaged lines."""

import errno
import fcntl
import json
import os
import platform
import re
import zlib
from datetime import datetime, timezone

import pytest

from requant.container import journal as journal_module
from requant.container.journal import Journal, JournalContents
from requant.errors import InputOutputError, OutputRefused

HEAD = {"plan": {"types": ["Q4_K", "Q8_0"]}, "source": [{"size": 5}]}
RECORDS = ({"tensor": "a", "piece": 0}, {"tensor": "b", "piece": 0, "errors": [0.1, 2.0]}, {"sealed": True})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "o.gguf.part.journal"


def opened(path):
    return Journal(path, path.with_name("o.gguf"))


def kept(path, head=HEAD, records=RECORDS):
    """A journal on disk; its bytes."""
    with opened(path) as journal:
        journal.begin(head)
        journal.append(records)
    return path.read_bytes()


def past_of(path):
    with opened(path) as journal:
        return journal.past


def test_what_was_written_is_read_again(path):
    content = kept(path)
    past = past_of(path)
    assert (past.head, past.records, past.n_bytes, past.n_dropped) == (HEAD, RECORDS, len(content), 0)
    assert past.owner["pid"] == os.getpid() and past.owner["host"] == platform.node()
    started = datetime.fromisoformat(past.owner["started"])
    assert started.utcoffset() == timezone.utc.utcoffset(None) and started.microsecond == 0
    assert abs((datetime.now(timezone.utc) - started).total_seconds()) < 300


def test_a_line_is_its_checksum_and_its_json(path):
    lines = kept(path).splitlines()
    assert [next(iter(json.loads(line[9:]))) for line in lines] == ["owner", "head", "tensor", "tensor", "sealed"]
    assert all(line[:9] == b"%08x " % zlib.crc32(line[9:]) for line in lines)


def test_a_new_journal_holds_nothing_and_goes_when_it_is_closed(path):
    with opened(path) as journal:
        assert journal.past == JournalContents() and not journal.has_head and journal.warnings == []
        assert b'"owner"' in path.read_bytes()
        journal.append([RECORDS[0]])
    assert not path.exists()
    journal.close()


def test_every_run_adds_itself_as_owner_and_keeps_the_rest(path):
    content = kept(path)
    with opened(path) as journal:
        assert journal.has_head
        journal.append([{"tensor": "c"}])
    assert path.read_bytes().startswith(content)
    past = past_of(path)
    assert past.records == (*RECORDS, {"tensor": "c"}) and path.read_bytes().count(b'"owner"') == 3


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_whatever_is_lost_or_damaged_ends_the_journal_before_it(path, harm):
    content = kept(path)
    ends = [m.end() for m in re.finditer(rb"\n", content)]
    for at in range(0, len(content), 3):
        damaged = content[:at] if harm == "cut" else content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]
        path.write_bytes(damaged)
        if 0 < len(damaged) < 9:  # too little to be told from another file
            with pytest.raises(OutputRefused, match="is not a journal"):
                opened(path)
            continue
        past = past_of(path)
        n_sound = sum(end <= at for end in ends)
        assert past.n_bytes == ([0, *ends][n_sound])
        assert past.records == RECORDS[: max(0, n_sound - 2)]
        assert (past.head == HEAD) == (n_sound > 1)
        n_more = damaged[past.n_bytes :].count(b"\n") + (damaged[-1:] not in (b"\n", b""))
        assert past.n_dropped == n_more
        if past.head is not None:  # what was damaged is gone, and what comes next is read
            assert path.read_bytes()[: past.n_bytes] == content[: past.n_bytes]
            assert past_of(path).n_dropped == 0
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("text", [b"[1]", b"5", b"{", b"[" * 5000, b"\xff", b""])
def test_a_sound_checksum_of_something_odd_is_a_damaged_line_too(path, text):
    content = kept(path)
    path.write_bytes(content + b"%08x %s\n" % (zlib.crc32(text), text))
    past = past_of(path)
    assert past.records == RECORDS and past.n_dropped == 1


def test_a_head_or_owner_that_is_no_object_is_a_record(path):
    kept(path, records=[{"head": 1}, {"owner": [2]}])
    past = past_of(path)
    assert past.head == HEAD and past.records == ({"head": 1}, {"owner": [2]})


def test_beginning_forgets_what_there_was(path):
    kept(path)
    with opened(path) as journal:
        journal.begin({"other": 1})
        assert journal.past == JournalContents() and journal.has_head
    past = past_of(path)
    assert (past.head, past.records) == ({"other": 1}, ())


def test_a_forgotten_journal_holds_nothing_that_binds(path):
    kept(path)
    with opened(path) as journal:
        journal.clear()
        assert journal.past == JournalContents() and not journal.has_head
        lines = path.read_bytes().splitlines()
        assert len(lines) == 1 and b'"owner"' in lines[0]
    assert not path.exists()


def test_what_is_appended_is_on_disk_unless_it_need_not_be(path, monkeypatch):
    real, synced = os.fdatasync, []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(path.read_bytes().count(b"\n")) or real(fd))
    with opened(path) as journal:
        assert synced == []
        journal.begin(HEAD)
        assert synced == [1, 2]
        journal.append(RECORDS)
        journal.append([{}], sync=False)
        assert synced == [1, 2, 5]


def test_a_second_run_is_told_who_has_it(path):
    with opened(path) as journal:
        journal.begin(HEAD)
        with pytest.raises(OutputRefused) as caught:
            opened(path)
        started = path.read_bytes().split(b'"started": "')[1][:25].decode()
        who = f"process {os.getpid()} on {platform.node()[:40]}, started {started}"
        assert str(caught.value) == f"{path.with_name('o.gguf')}: another run is writing it: {who}"
        journal.append(RECORDS)
    assert past_of(path).records == RECORDS


def test_a_second_run_is_told_that_the_first_has_just_begun(path):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputRefused, match=r"o.gguf: another run is writing it: it has just begun$"):
        opened(path)
    os.close(descriptor)
    assert path.exists()


def test_the_host_of_a_strange_journal_is_shown_cut_and_escaped(path):
    text = json.dumps({"owner": {"host": "\x1b[31m" + "x" * 100}}).encode()
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text))
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputRefused) as caught:
        opened(path)
    os.close(descriptor)
    assert str(caught.value).isprintable()
    assert re.search(r": process None on .{40}, started None$", str(caught.value))


def test_what_the_last_owner_added_before_it_let_go_is_read(path, monkeypatch):
    content = kept(path)
    real = fcntl.flock

    def late(descriptor, how):
        text = json.dumps({"tensor": "late"}).encode()
        path.write_bytes(content + b"%08x %s\n" % (zlib.crc32(text), text))
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with opened(path) as journal:
        assert journal.past.records[-1] == {"tensor": "late"}


@pytest.mark.parametrize("gone", [False, True])
def test_a_journal_that_changes_hands_before_the_lock_is_left_to_the_other_run(path, monkeypatch, gone):
    kept(path)
    real = fcntl.flock

    def late(descriptor, how):
        path.unlink()
        if not gone:
            path.write_bytes(b"of the other run")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputRefused, match="another run is writing it"):
        opened(path)
    assert gone or path.read_bytes() == b"of the other run"


def test_a_file_put_in_place_of_the_journal_is_not_removed(path):
    with opened(path):
        path.unlink()
        path.write_bytes(b"somebody else's")
    assert path.read_bytes() == b"somebody else's"


def test_a_journal_that_is_removed_lets_go_of_the_lock(path):
    journal = opened(path)
    journal.begin(HEAD)
    journal.remove()
    assert not path.exists()
    with opened(path) as other:
        assert other.past == JournalContents()
    journal.remove()
    journal.close()


def test_a_file_system_without_locks_is_warned_of(path, monkeypatch):
    def no(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no)
    with opened(path) as journal:
        assert [w.split(":")[0] for w in journal.warnings] == ["the output's file system has no locks"]


def _fails(*_):
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("fdatasync", "flushing to disk failed: Input/output error"),
        ("ftruncate", "cannot be written: Input/output error"),
        ("pwrite", "writing .* failed: Input/output error"),
    ],
)
def test_a_failing_disk_is_an_io_error_that_names_the_journal(path, monkeypatch, call, text):
    with opened(path) as journal:
        monkeypatch.setattr(os, call, _fails)
        with pytest.raises(InputOutputError, match=f"{re.escape(str(path))}: {text}"):
            journal.begin(HEAD)
        monkeypatch.undo()


def test_a_disk_that_fails_when_it_is_opened_leaves_no_descriptor(path, monkeypatch):
    kept(path)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for call, text in (("ftruncate", "cannot be written: Input"), ("pwrite", "writing"), ("preadv", "reading")):
        monkeypatch.setattr(os, call, _fails)
        with pytest.raises(InputOutputError, match=f"^{re.escape(str(path))}: {text}"):
            opened(path)
        monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert past_of(path).head == HEAD


def test_a_journal_beyond_all_measure_is_read_up_to_the_limit(path, monkeypatch):
    content = kept(path)
    monkeypatch.setattr(journal_module, "_MAX_JOURNAL", len(content) - 3)
    past = past_of(path)
    assert past.records == RECORDS[:-1] and past.n_dropped == 1


def test_a_figure_that_json_does_not_have_is_not_written(path):
    with opened(path) as journal, pytest.raises(ValueError, match="not JSON compliant"):
        journal.append([{"errors": [float("nan")]}])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (HEAD, HEAD, None),
        (HEAD, {"plan": {"types": ("Q4_K", "Q8_0")}}, None),  # what is not in the new one is not looked at
        (HEAD, {"source": [{"size": 6}]}, "source 0 size was 5, now 6"),
        (HEAD, {"plan": {"types": ["Q4_K"]}}, 'plan types 1 was "Q8_0", now not given'),
        (HEAD, {"plan": {"types": ["Q4_K", "Q8_0", 1]}}, "plan types 2 was not given, now 1"),
        (HEAD, {"plan": [1]}, 'plan was {"types": ["Q4_K", "Q8_0"]}, now [1]'),
        (HEAD, {"asked": {}}, "asked was not given, now {}"),
        (None, {"a\x1b": 1}, "a\\x1b was not given, now 1"),
        ({"a": "x" * 78}, {"a": 0}, f'a was "{"x" * 78}", now 0'),
        ({"a": "x" * 79}, {"a": 0}, f'a was "{"x" * 76}..., now 0'),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3, "b": 4}}, "a c was 2, now 3"),
    ],
)
def test_the_first_difference_of_two_heads_is_named(old, new, said):
    assert JournalContents(old).difference(new) == said


def test_what_is_no_file_is_no_journal(path):
    path.mkdir()
    with pytest.raises(OutputRefused, match=f"^{re.escape(str(path))}: is a directory, not a journal;"):
        opened(path)


def test_a_lock_that_fails_names_the_journal(path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _fails)
    with pytest.raises(InputOutputError, match=f"^{re.escape(str(path))}: cannot be locked: Input/output error"):
        opened(path)


def test_a_journal_that_cannot_be_removed_hides_no_error(path, monkeypatch):
    with pytest.raises(KeyError), opened(path):
        monkeypatch.setattr(os, "unlink", _fails)
        raise KeyError
