"""Sidecars: opened, taken over and removed only where they are ours."""

import os

import pytest

from requant.common.inputs import add_inputs, collect_inputs
from requant.common.sidecars import Sidecar
from requant.errors import OutputRefused

OURS = b"ours"


@pytest.fixture
def sidecar(tmp_path):
    return Sidecar(tmp_path / "o.own", "our own file", lambda file: os.pread(file, 4, 0) == OURS)


def strange(path):
    path.write_bytes(b"other")


def linked(path):
    path.with_name("other").write_bytes(OURS)
    path.symlink_to("other")


def hard(path):
    path.write_bytes(OURS)
    os.link(path, path.with_name("other"))


KINDS = {
    "stranger": (strange, "is not our own file"),
    "link": (linked, "is a symbolic link, not our own file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "is a symbolic link"),
    "hard link": (hard, "has another name"),
    "folder": (lambda path: path.mkdir(), "is a directory, not our own file"),
    "FIFO": (os.mkfifo, "is a FIFO, not our own file"),
}
ACTS = [Sidecar.open, Sidecar.open_or_make, Sidecar.check, Sidecar.remove]


def state(folder):
    return {p.name: (p.lstat().st_ino, p.read_bytes() if p.is_file() else None) for p in folder.iterdir()}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("make", "says"), KINDS.values(), ids=KINDS)
def test_what_is_not_ours_is_refused_and_left_alone(tmp_path, sidecar, act, make, says):
    make(sidecar.path)
    before = state(tmp_path)
    with pytest.raises(OutputRefused, match=rf"o\.own: {says}.*move it away"):
        act(sidecar)
    assert state(tmp_path) == before


@pytest.mark.parametrize("act", ACTS)
def test_an_input_is_not_ours_whatever_it_looks_like(sidecar, act):
    sidecar.path.write_bytes(OURS)
    with collect_inputs(), pytest.raises(OutputRefused, match="is one of the inputs, not our own file"):
        add_inputs(sidecar.path)
        act(sidecar)
    assert sidecar.path.read_bytes() == OURS


def test_ours_is_opened_as_it_is_and_removed(sidecar):
    assert sidecar.open() is None
    sidecar.remove()
    sidecar.check()
    os.close(sidecar.open_or_make())
    sidecar.path.write_bytes(OURS)
    descriptor = sidecar.open_or_make()
    assert os.pread(descriptor, 9, 0) == OURS
    os.close(descriptor)
    sidecar.remove()
    assert not sidecar.path.exists()


def test_one_that_changes_hands_before_it_is_removed_is_left(sidecar, monkeypatch):
    sidecar.path.write_bytes(OURS)
    real = os.pread

    def exchanged(*arguments):
        sidecar.path.unlink()
        sidecar.path.write_bytes(b"of the other run")
        monkeypatch.undo()
        return real(*arguments)

    monkeypatch.setattr(os, "pread", exchanged)
    sidecar.remove()
    assert sidecar.path.read_bytes() == b"of the other run"
