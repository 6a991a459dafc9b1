import errno
import os

import pytest

from requant.common.atomic_write import check_writable, has_schema, write_text
from requant.common.inputs import add_inputs, collect_inputs
from requant.errors import InputOutputError, OutputRefused


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_whole_with_the_usual_permissions(tmp_path):
    path = tmp_path / "a.json"
    mask = os.umask(0o027)
    try:
        write_text(path, "naïve\n", force=False)
    finally:
        os.umask(mask)
    assert path.read_bytes() == "naïve\n".encode() and path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("act", [check_writable, lambda path, **how: write_text(path, "new", **how)])
def test_what_must_not_be_replaced_is_refused(tmp_path, act):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OutputRefused, match="already exists"):
        act(path, force=False)
    with collect_inputs(), pytest.raises(OutputRefused, match="one of the inputs"):
        add_inputs(path)
        act(path, force=True)
    with pytest.raises(OutputRefused, match="is a directory"):
        act(tmp_path, force=True)
    with pytest.raises(OutputRefused, match="not a usable path"):
        act(tmp_path / "a\0b", force=True)
    with pytest.raises(InputOutputError, match="there is no such folder"):
        act(tmp_path / "none" / "b", force=True)
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_checking_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "a", force=False)
    assert names(tmp_path) == []


def test_a_file_of_ones_own_schema_is_replaced(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n  "schema": "requant.output/1",\n  "x": 1\n}')
    assert has_schema(path, "requant.output/1") and not has_schema(path, "requant.plan/1")
    with pytest.raises(OutputRefused):
        write_text(path, "new", force=False, is_own=lambda path: has_schema(path, "requant.plan/1"))
    write_text(path, "new", force=False, is_own=lambda path: has_schema(path, "requant.output/1"))
    assert path.read_text() == "new"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "b").write_text("old")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    write_text(tmp_path / "a", "new", force=True)
    assert (tmp_path / "a").is_symlink() and (tmp_path / "b").read_text() == "new"


def test_a_write_that_fails_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputOutputError, match="No space left"):
        write_text(path, "new", force=True)
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


@pytest.fixture(params=[None, errno.EOPNOTSUPP, errno.EISDIR, "no link"])
def poor(request, monkeypatch):
    """A file system without files that have no name, or without hard links."""
    real_open, real_link = os.open, os.link

    def no_unnamed(path, flags, *mode, **named):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(request.param, "no")
        return real_open(path, flags, *mode, **named)

    def no_link(*arguments, **named):
        raise OSError(errno.EPERM, "no")

    if request.param == "no link":
        monkeypatch.setattr(os, "link", no_link)
    elif request.param is not None:
        monkeypatch.setattr(os, "open", no_unnamed)
    return real_link


@pytest.mark.parametrize("old", [False, True])
def test_every_file_system_will_do(tmp_path, poor, old):
    path = tmp_path / "a"
    if old:
        path.write_text("old")
    check_writable(path, force=old)
    write_text(path, "new", force=old)
    assert path.read_text() == "new" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("old", [False, True])
def test_strangers_files_beside_it_are_left_alone(tmp_path, monkeypatch, old):
    path = tmp_path / "a"
    (tmp_path / "a.part").write_text("mine")
    (tmp_path / "a.0badcafe.part").write_text("mine")
    if old:
        path.write_text("old")
    write_text(path, "new", force=True)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "a": "new",
        "a.part": "mine",
        "a.0badcafe.part": "mine",
    }


def test_what_a_killed_run_left_between_link_and_renaming_is_taken_over(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a.part").write_text("new")
    write_text(tmp_path / "a", "new", force=True)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "new"


def test_what_appears_in_the_last_moment_is_kept(tmp_path, monkeypatch):
    path, link = tmp_path / "a", os.link

    def late(*arguments, **named):
        path.write_text("other")
        link(*arguments, **named)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(OutputRefused, match="already exists"):
        write_text(path, "new", force=False)
    assert path.read_text() == "other" and names(tmp_path) == ["a"]


def test_a_renaming_that_fails_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(InputOutputError, match="cannot be put in place: Input/output error"):
        write_text(path, "new", force=True)
    assert path.read_text() == "old" and names(tmp_path) == ["a"]
