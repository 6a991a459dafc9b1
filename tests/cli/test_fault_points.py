"""A fault at every point: each call of the system fails in turn, each byte may be the last that fits on the disk.

Whatever fails, the output is absent, its old content, or complete, and the same command without the fault completes.
"""

import os
import re
import resource
import sys
from dataclasses import dataclass

import pytest
from commands import TINY, names, run, start
from conversions import half, small_model
from shim import SMALL, Fault, injected, preamble

from requant.container.header import parse_header

MODEL = small_model(half("blk.0.attn_q.weight", (256, 24)), half("blk.0.ffn_up.weight", (256, 32), seed=1))
OLD = b"the old output"
CALLS = {
    "preadv": ("EIO",),
    "pwrite": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO", "ENOSPC"),
    "fsync": ("EIO", "ENOSPC"),
    "link": ("EIO", "ENOSPC"),
    "replace": ("EIO", "ENOSPC"),
    "ftruncate": ("EIO",),
    "posix_fallocate": ("ENOSPC",),
    "os_open": ("EIO", "EMFILE"),
    "flock": ("EIO",),
}


@dataclass(frozen=True)
class Kind:
    """A way to convert: its options, and the files that it makes, the first of them the one that loaders open."""

    words: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def all_files(self):
        return {*self.files, f"{self.files[0]}.requant.json"}


SPLIT = tuple(f"out-{i:05d}-of-00003.gguf" for i in (1, 2, 3))
KINDS = {
    "new": Kind((), ("out.gguf",)),
    "forced": Kind(("--force",), ("out.gguf",)),
    "split": Kind(("--max-shard-size", "5KB"), SPLIT),
    "split, forced": Kind(("--max-shard-size", "5KB", "--force"), SPLIT),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)


class Trial:
    """A folder with a source, perhaps an old output, and what a run makes of it that nothing disturbs."""

    def __init__(self, base, capsys, kind):
        self.base, self.capsys, self.kind, self.n = base, capsys, kind, 0
        self.folder = self._fresh()
        assert self.run().code == 0
        self.whole = self.files()
        assert set(self.whole) == kind.all_files | {"source.gguf"}

    def _fresh(self):
        self.n += 1
        folder = self.base / str(self.n)
        folder.mkdir()
        MODEL.write(folder / "source.gguf")
        os.utime(folder / "source.gguf", (10**9, 10**9))
        if "--force" in self.kind.words:
            for name in self.kind.files:
                (folder / name).write_bytes(OLD)
        return folder

    def run(self):
        words = ["convert", self.folder / "source.gguf", self.folder / "out.gguf", "--type", "Q4_K", "--json"]
        return run(self.capsys, *words, "--threads", "2", *self.kind.words)

    def files(self):
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def with_fault(self, *faults):
        """Run with the faults in a folder of its own, check what is left and that it heals; the calls counted."""
        self.folder = self._fresh()
        with injected(*faults) as counts:
            ran = self.run()
        self.check(ran, faults)
        self.heal(ran, faults)
        return counts[0].calls

    def heal(self, ran, faults):
        if ran.code:
            again = self.run()
            assert again.code == 0 and self.files() == self.whole, (faults, ran, again, names(self.folder))

    def check(self, ran, faults):
        left = self.files()
        assert left["source.gguf"] == self.whole["source.gguf"], faults
        assert (self.folder / "source.gguf").stat().st_mtime == 10**9, faults
        for name in self.kind.files:
            assert left.get(name) in (OLD if "--force" in self.kind.words else None, self.whole[name]), (faults, name)
        first = self.kind.files[0]
        if left.get(first) == self.whole[first]:  # the name that loaders open comes last
            assert all(left[name] == self.whole[name] for name in self.kind.files), faults
        if ran.code == 0:
            assert left == self.whole, (faults, ran)
            return
        errors = [line for line in ran.err.splitlines() if line.startswith("requant: error: ")]
        assert ran.code in (3, 6) and len(errors) == 1 and ran.out == "" and ran.err.isascii(), (faults, ran)
        kept = {name: data for name, data in left.items() if name not in (*self.kind.files, "source.gguf")}
        if first in left and f"{first}.requant.json" in kept:  # all but the last step was done
            assert kept.pop(f"{first}.requant.json") == self.whole[f"{first}.requant.json"]
        assert all(name.endswith((".part", ".part.journal")) for name in kept), (faults, kept)
        assert "out.gguf.part.journal" in kept or not any(kept.values()), (faults, kept.keys())


def points(n):
    """Which of `n` calls to fail: all of the few at either end, some in between."""
    return sorted({*range(1, 6), *range(6, n - 4, max(1, n // 6)), *range(max(1, n - 4), n + 1)})


def every_point(trial, call, error):
    n = 1
    while trial.with_fault(Fault(call, error, n, str(trial.base))) >= n:
        n += 1
    return n - 1


@pytest.mark.parametrize("kind", ["new", "split, forced"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_does_no_lasting_harm(tmp_path, capsys, call, kind):
    trial = Trial(tmp_path, capsys, KINDS[kind])
    n = trial.with_fault(Fault(call, None, 0, str(tmp_path)))
    error = CALLS[call][0]
    assert n > 0 or call in ("link", "replace")
    for i in points(n)[:: 1 if n < 12 else 2]:
        trial.with_fault(Fault(call, error, i, str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("call", "error"), [(call, error) for call in CALLS for error in CALLS[call]])
def test_any_call_that_fails_does_no_lasting_harm(tmp_path, capsys, call, error, kind):
    trial = Trial(tmp_path, capsys, KINDS[kind])
    n = every_point(trial, call, error)
    assert n > 0 or call in ("link", "replace")


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_disk_that_stays_broken_is_not_tried_again(tmp_path, capsys, call):
    trial = Trial(tmp_path, capsys, KINDS["new"])
    calls = trial.with_fault(Fault(call, "EIO", 6, r"\.part$", always=True))
    assert calls <= 6 + (call == "pwrite") * 3  # what other threads had begun


@pytest.mark.parametrize("kind", ["new", "split"])
def test_a_disk_may_be_full_at_the_end_of_any_tensor(tmp_path, capsys, kind):
    trial = Trial(tmp_path, capsys, KINDS[kind])
    limits = set()
    for name in trial.kind.files:
        header = parse_header(trial.folder / name)
        starts = [header.data_start + t.offset for t in header.tensors]
        ends = [start + t.n_bytes for start, t in zip(starts, header.tensors, strict=True)]
        limits |= {n + i for n in (24, *starts, *ends) for i in (-1, 0, 1)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limited = "resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"
    failed = 0
    for limit in sorted(limits):
        # after the space was reserved: as if the disk had been filled by others, or does not keep its promises
        fault = Fault("pwrite", None, 1, r"\.part$", do=limited.format(limit))
        trial.folder = trial._fresh()
        try:
            with injected(fault):
                ran = trial.run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        trial.check(ran, limit)
        failed += ran.code == 6 and "File too large" in ran.err
        trial.heal(ran, limit)
    assert failed >= len(limits) - 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_killed_at_any_call_is_gone_on_with(tmp_path, capsys, kind):
    trial = Trial(tmp_path, capsys, KINDS[kind])
    fatal = "os.kill(os.getpid(), signal.SIGKILL)"
    points = [("pwrite", 12), ("fdatasync", 5), ("replace" if "forced" in kind else "link", 1), ("fsync", 2)]
    for call, n in points:
        trial.folder = trial._fresh()
        fault = Fault(call, None, n, str(tmp_path), do=fatal)
        words = ["convert", trial.folder / "source.gguf", trial.folder / "out.gguf", "--type", "Q4_K", "--json"]
        process = start(*words, *trial.kind.words, before=preamble(fault))
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (-9, "", ""), (call, err)
        again = trial.run()
        assert again.code == 0 and trial.files() == trial.whole, (call, again)
        assert re.search(r"resuming \d/3 tensors", again.err) or call in ("link", "replace", "fsync")


SMALL_OUTPUTS = {
    "score": ("losses.json", ("--quick",)),
    "plan": ("plan.json", ("--size", "64KiB", "--quick")),
    "calibrate": ("stats.gguf", ("--windows", "2", "--window", "16", "--no-gradients", "--threads", "2")),
}
WRITES = ("os_open", "pwrite", "posix_fallocate", "fsync", "fdatasync", "replace", "link")


@pytest.mark.parametrize("old", [False, True], ids=["new", "forced"])
@pytest.mark.parametrize("name", SMALL_OUTPUTS)
def test_a_small_output_is_whole_or_what_it_was(tmp_path, capsys, name, old):
    file, words = SMALL_OUTPUTS[name]
    source = TINY if name == "calibrate" else MODEL.write(tmp_path / "source.gguf")

    def made(number, *faults):
        folder = tmp_path / str(number)
        folder.mkdir()
        if old:
            (folder / file).write_bytes(OLD)
        given = [name, source, "-o", folder / file, *words, *(["--force"] if old else [])]
        with injected(*faults) as counts:
            ran = run(capsys, *given)
        return folder, ran, counts, given

    folder, ran, _, _ = made("whole")
    assert ran.code == 0
    whole, n_met = (folder / file).read_bytes(), 0
    for call in WRITES:
        for n in (1, 2, 3):
            folder, ran, (count,), given = made(f"{call}{n}", Fault(call, "EIO", n, rf"{tmp_path}/\w+\d"))
            n_met += count.calls >= n
            if count.calls < n:
                assert ran.code == 0 and (folder / file).read_bytes() == whole
                break
            assert ran.code == 6 and ran.out == "" and ran.err.count("\n") == 1, ran
            # the next run takes up a checkpoint
            left = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".npz"}
            assert left in ({file: OLD} if old else {}, {file: whole}), (call, n, set(left))
            again = run(capsys, *given, "--force")
            assert again.code == 0 and (folder / file).read_bytes() == whole and names(folder) == [file]
    assert n_met >= 3


ODD = os.fsdecode(b"m\xff\xe8del \n.gguf"), os.fsdecode(b"\xfe\xc3\xa9\x1b[31m.gguf")
POSIX = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", [{}, POSIX], ids=["the usual locale", "locale C"])
def test_names_that_are_no_text_are_files_like_others(tmp_path, capsys, locale):
    source, out = MODEL.write(tmp_path / ODD[0]), tmp_path / ODD[1]
    fault = Fault("pwrite", "EIO", 9, r"\.part$")
    for faults, code in (((fault,), 6), ((), 0), ((), 5)):
        words = ("convert", source, out, "--type", "Q4_K", "--threads", "1")
        process = start(*words, before=preamble(*faults), env=os.environ | locale)
        text, err = process.communicate(timeout=60)
        assert process.returncode == code, (text, err)
        assert all(line.isprintable() for line in err.splitlines()) and "\x1b" not in text
    assert sys.getfilesystemencoding() == "utf-8"
    assert set(names(tmp_path)) == {*ODD, f"{ODD[1]}.requant.json"}
    assert run(capsys, "verify", out, "--source", source).code == 0
