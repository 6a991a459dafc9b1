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
