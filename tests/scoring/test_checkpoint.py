"""The checkpoint of a calibration: taken up only where it is what `save_checkpoint` wrote for the same run."""

import io
import os
import pickle
import resource
import zipfile

import numpy as np
import pytest
from model.forward import families

from requant.container.source import open_source
from requant.errors import OutputRefused
from requant.scoring.checkpoint import checkpoint_sidecar, load_checkpoint, save_checkpoint
from requant.scoring.statistics import SquareSums, Statistics

NAME, RUN = "blk.0.attn_q.weight", "this run"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with open_source(families.write("qwen3", tmp_path_factory.mktemp("kept") / "m.gguf")) as opened:
        yield opened


@pytest.fixture
def kept(source, tmp_path):
    shape = source.tensor(NAME).shape
    statistics = Statistics(32, 16, {(NAME, None): SquareSums(32, np.arange(shape[0]) + 0.5, np.ones(shape[1]))})
    save_checkpoint(tmp_path / "k.npz", RUN, statistics)
    return tmp_path / "k.npz"


def changed(path, edit=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The archive at `path` with its members edited; None drops one."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            if (data := edit(name, data)) is not None:
                archive.writestr(name, data)


def array(values):
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


def test_sums_read_back_as_they_were_kept(source, kept):
    changed(kept)
    found = load_checkpoint(kept, RUN, source, 16)
    assert (found.n_tokens, found.n_ctx, [*found.matrices]) == (32, 16, [(NAME, None)])
    sums = found.matrices[NAME, None]
    assert sums.count == 32 and sums.inputs[1] == 1.5 and (sums.gradients == 1).all()
    assert sorted(np.load(kept, allow_pickle=False)) == ["gradients0", "head", "inputs0"]


def test_other_runs_are_not_taken_up(source, kept):
    assert load_checkpoint(kept, "another", source, 16) is None
    assert load_checkpoint(kept, RUN, source, 24) is None
    assert load_checkpoint(kept.with_name("none"), RUN, source, 16) is None


CHANGES = {
    "pickle": lambda data: array(np.array([Exploit()], object)),
    "bare pickle": lambda data: pickle.dumps(Exploit()),
    "terabytes": lambda data: data[:70] + b"9" * 20 + data[90:],
    "other type": lambda data: array(np.frombuffer(data[128:], np.float32)),
    "too many": lambda data: array(np.ones(100_000)),
    "too few": lambda data: array(np.ones(3)),
    "a single one": lambda data: array(np.float64(3)),
    "negative": lambda data: array(-np.frombuffer(data[128:])),
    "not finite": lambda data: array(np.frombuffer(data[128:]) * np.nan),
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "missing": lambda data: None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("member", ["inputs0.npy", "gradients0.npy", "head.npy"])
def test_an_archive_that_was_tampered_with_is_as_good_as_none(source, kept, monkeypatch, change, member):
    if member == "head.npy" and change in (CHANGES["negative"], CHANGES["not finite"], CHANGES["other type"]):
        change = CHANGES["empty"]  # those are of floats
    monkeypatch.chdir(kept.parent)
    changed(kept, lambda name, data: change(data) if name == member else data)
    assert load_checkpoint(kept, RUN, source, 16) is None
    assert [path.name for path in kept.parent.iterdir()] == ["k.npz"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"expert": null', b'"expert": 1e99'),
        (b'"count": 32', b'"count": -1'),
        (NAME.encode(), b"../../etc/x"),
        (b'"n_tokens": 32', b'"n_tokens": 33'),
        (b'"keys": [', b'"keys": [[], '),
        (b"requant.kept/1", b"requant.kept/2"),
    ],
)
def test_a_head_that_is_not_ours_is_refused(source, kept, old, new):
    def edit(name, data):
        assert name != "head.npy" or old in data
        text = data[128:].replace(old, new)
        return array(np.frombuffer(text, np.uint8)) if name == "head.npy" else data

    changed(kept, edit)
    assert load_checkpoint(kept, RUN, source, 16) is None


def test_a_bomb_is_not_unpacked(source, kept):
    with zipfile.ZipFile(kept, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("head.npy", "w") as member:
        for _ in range(256):
            member.write(bytes(2**20))
    assert kept.stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_checkpoint(kept, RUN, source, 16) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 2**10  # KiB


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"no archive", b"PK\x05\x06" + bytes(18), b"\x80\x04."])
def test_what_is_no_archive_is_as_good_as_none(source, kept, data):
    kept.write_bytes(data)
    assert load_checkpoint(kept, RUN, source, 16) is None


def test_a_pipe_is_not_waited_for_and_a_link_is_not_written_through(source, kept):
    kept.unlink()
    os.mkfifo(kept)
    assert load_checkpoint(kept, RUN, source, 16) is None
    kept.unlink()
    other = kept.with_name("precious")
    other.write_text("precious")
    kept.symlink_to(other)
    with pytest.raises(OutputRefused, match="already exists"):
        save_checkpoint(kept, RUN, Statistics(0, 16))
    with pytest.raises(OutputRefused, match="is a symbolic link, not a checkpoint of a calibration"):
        checkpoint_sidecar(kept).remove()
    assert other.read_text() == "precious" and kept.is_symlink()
