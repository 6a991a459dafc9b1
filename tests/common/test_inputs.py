"""Inputs: every file that was opened for reading, in any thread, for as long as the command or call runs."""

import os
import threading

import pytest

from requant.common import inputs as module
from requant.common.atomic_write import write_text
from requant.common.files import create_file, open_regular
from requant.common.inputs import add_inputs, collect_inputs, collect_part, find_input, is_input, own_files
from requant.common.interrupt import run_interruptible
from requant.common.serialization import read_text
from requant.common.threads import in_order
from requant.errors import OutputRefused


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "input"
    path.write_text("7")
    return path


def opened(path):
    os.close(open_regular(path))


def was_added(path):
    return is_input(path.stat())


@pytest.mark.parametrize("read", [opened, read_text, add_inputs])
@pytest.mark.parametrize(
    "run",
    [
        lambda read, path: read(path),
        lambda read, path: run_interruptible(lambda: read(path)),
        lambda read, path: list(in_order(read, [path], 2)),
        lambda read, path: run_interruptible(lambda: list(in_order(read, [path], 2))),
    ],
    ids=["here", "interruptible", "in a pool", "both"],
)
def test_what_is_opened_for_reading_is_an_input_under_any_name(file, tmp_path, read, run):
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "soft").symlink_to(file)
    with collect_inputs():
        assert not was_added(file)
        run(read, tmp_path / "soft")
        for name in ("input", "hard", "soft"):
            assert find_input((tmp_path / name).stat()) == tmp_path / "soft"
            with pytest.raises(OutputRefused, match="is one of the inputs"):
                write_text(tmp_path / name, "new", force=True)
    assert file.read_text() == "7" and not was_added(file)


def test_a_later_call_may_write_what_an_earlier_one_has_read(file):
    with collect_inputs():
        opened(file)
    with collect_inputs():
        write_text(file, "new", force=True)
        opened(file)
    with collect_inputs():
        write_text(file, "newer", force=True)
    assert file.read_text() == "newer"


def test_calls_in_threads_have_inputs_of_their_own(file):
    read, asked, found = threading.Event(), threading.Event(), []

    def reads():
        with collect_inputs():
            opened(file)
            read.set()
            asked.wait(10)

    def asks():
        with collect_inputs():
            read.wait(10)
            found.append(was_added(file))
            asked.set()

    threads = [threading.Thread(target=work) for work in (reads, asks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [False]


def test_a_call_within_a_command_adds_to_its_inputs(file):
    with collect_inputs():
        with collect_inputs():
            opened(file)
        assert was_added(file)


def test_own_files_pipes_folders_and_new_files_are_no_inputs(file, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with collect_inputs():
        with own_files():
            opened(file)
        assert not was_added(file)
        add_inputs(tmp_path, tmp_path / "pipe", tmp_path / "missing", None, 5, tmp_path / "a\0b")
        assert module._all.get() == {}
        opened(file)
        module.add_input(file, (status := file.stat()))
        file.unlink()
        module.forget_input(status)  # as for a new file that gets the number of the old one
        os.close(create_file(tmp_path / "new"))
        assert not was_added(tmp_path / "new")


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("modes", "mask", "expected"),
    [
        ([0o644], 0o022, 0o644),
        ([0o600], 0o022, 0o600),
        ([0o400], 0o022, 0o600),
        ([0o444], 0o000, 0o644),
        ([0o777], 0o000, 0o666),
        ([0o640, 0o604], 0o000, 0o600),
        ([0o660, 0o664], 0o000, 0o660),
        ([0o640], 0o077, 0o600),
        ([], 0o000, 0o666),
    ],
)
def test_an_output_has_no_permission_that_an_input_lacks(tmp_path, modes, mask, expected):
    for i, own in enumerate(modes):
        (tmp_path / f"in{i}").touch(own)
        (tmp_path / f"in{i}").chmod(own)
    before = os.umask(mask)
    try:
        with collect_inputs():
            for i in range(len(modes)):
                opened(tmp_path / f"in{i}")
            write_text(tmp_path / "out", "x", force=False)
            os.close(create_file(tmp_path / "part"))
    finally:
        os.umask(before)
    assert mode(tmp_path / "out") == mode(tmp_path / "part") == expected


@pytest.mark.parametrize(("own", "expected"), [(0o640, 0o600), (0o664, 0o644), (0o646, 0o644), (0o604, 0o600)])
def test_members_of_another_group_count_as_others(file, tmp_path, monkeypatch, own, expected):
    file.chmod(own)
    status = list(file.stat())
    status[5] = os.getegid() + 1  # st_gid
    before = os.umask(0)
    try:
        with collect_inputs():
            module.add_input(file, os.stat_result(status))
            write_text(tmp_path / "out", "x", force=False)
    finally:
        os.umask(before)
    assert mode(tmp_path / "out") == expected


def test_a_file_that_replaces_another_has_no_permission_that_it_lacked(tmp_path):
    for own, expected in ((0o600, 0o600), (0o640, 0o640), (0o400, 0o600), (0o666, 0o644)):
        (tmp_path / "out").write_text("old")
        (tmp_path / "out").chmod(own)
        before = os.umask(0o022)
        try:
            write_text(tmp_path / "out", "new", force=True)
        finally:
            os.umask(before)
        assert mode(tmp_path / "out") == expected


def test_of_several_outputs_each_depends_on_its_own_inputs(file, tmp_path):
    private = tmp_path / "private"
    private.touch(0o600)
    with collect_inputs():
        with collect_part():
            opened(private)
            write_text(tmp_path / "of private", "x", force=False)
        with collect_part():
            opened(file)
            write_text(tmp_path / "of file", "x", force=False)
            assert was_added(private)
        write_text(tmp_path / "of both", "x", force=False)
    assert [mode(tmp_path / f"of {name}") for name in ("private", "file", "both")] == [0o600, 0o644, 0o600]
