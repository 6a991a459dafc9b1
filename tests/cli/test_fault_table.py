"""Every row of the table of faults: the exit code, what the one line names, what is left, and that a rerun heals.

After any of them the output is absent, its old content, or complete; the source is as it was.
"""

import contextlib
import errno
import io
import os
import re
import signal
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from commands import Ran, names, run, start
from conversions import choice, half, normal, plan_of, single, small_model
from corpus import CASES
from gguf_files import STR, File, pair, split_files, split_pairs, write_files
from shim import SMALL, Fault, injected, preamble

from requant.container.output import claim
from requant.container.source import open_source

MODEL = small_model(
    *(half(f"blk.{i}.{name}.weight", (256, 24), seed=i) for i in range(2) for name in ("attn_q", "ffn_up")),
    half("blk.2.ffn_down_exps.weight", (256, 16, 3), seed=9),
)
N_TENSORS = len(MODEL.tensors)
NOTHING, PART = frozenset(), frozenset({"out.gguf.part", "out.gguf.part.journal"})
DONE = frozenset({"out.gguf", "out.gguf.requant.json"})
OLD = b"the old output"
ANSWERED = re.compile(
    r"requant: (warning: |resuming |compiling |tensor |the source changed |\d+ damaged |the journal )"
)

TABLE = [
    *("no GGUF", "version", "count or length", "duplicate", "alignment", "offset", "truncated", "trailing bytes"),
    *("unknown type", "row and block", "shards", "split names", "not finite", "gate", "bad imatrix", "missing imatrix"),
    *("budget", "out exists", "out is input", "out is no file", "out is a link", "second run", "stale part"),
    *("free space", "disk full", "read error", "write error", "no permission", "source changed"),
    *("signal", "second signal", "killed", "bad journal", "bad part", "memory", "stdout closed", "kernel cache"),
    *("poor file system", "surroundings", "permissions", "error not printed"),
]


@dataclass(frozen=True)
class Row:
    """One fault: which row of the table it is of, how it is made, and all that must be so after it.

    given: prepares the folder; during: left before the command is tried again. says: regular
    expressions that the error line has in it, or without an error some line on stderr. again: the code of the same
    command without the fault; None where that is not tried. process: options for a process of its own.
    """

    row: str
    case: str
    code: int
    says: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    given: Callable[[Path], object] = lambda _: None
    during: Callable[[Path], contextlib.AbstractContextManager] = contextlib.nullcontext
    words: tuple[str, ...] = ()
    type: str | None = "Q4_K"
    model: str = "source.gguf"
    out: str = "out.gguf"
    left: frozenset[str] = NOTHING
    again: int | None = 0
    process: dict[str, object] | None = None
    then: str = ""
    small: bool = True
    prints: bool = True
    unmet: bool = False  # one of the faults is there to show that the run does not come that far
    also: Callable[[Path], None] = lambda _: None

    @property
    def id(self):
        return f"{self.row}: {self.case}"


def content(name):
    """A file of the malformed corpus as the source."""

    def given(folder):
        (harmful,) = CASES[name].files.values()
        (folder / "source.gguf").write_bytes(harmful)

    return given


def case(row, name, *says, code=3):
    return Row(row, name, code, says, given=content(name), again=None)


def made_of(*tensors, **changes):
    return lambda folder: replace(small_model(*tensors), **changes).write(folder / "source.gguf")


INPUTS = [
    case("no GGUF", "hdr_empty_file", r"source\.gguf: is empty \(got 0 bytes"),
    case("no GGUF", "hdr_3_bytes", r"'GGU' \(got 3 bytes, limit 24 bytes\)"),
    case("no GGUF", "hdr_bad_magic", r"got 'GG\\x1bX', \d+ bytes"),
    case("version", "hdr_version_1", r"version \(got 1, limit 2 or 3\); .* no longer read"),
    case("version", "hdr_version_4", r"version \(got 4, limit 2 or 3\)"),
    case("version", "hdr_big_endian_version", r"big-endian GGUF of version 3,.*gguf_convert_endian"),
    case("count or length", "hdr_n_tensors_2e30", r"more tensors than it can hold \(got 1073741824, limit \d+\)"),
    case("count or length", "kv_str_len_past_eof", r"key 'k' at offset \d+ .* \(got 9999 bytes, limit \d+"),
    case("count or length", "kv_arr_len_2e63", r"key 'k' at offset \d+ .* \(got 9223372036854775808 bytes, limit \d+"),
    case("duplicate", "kv_key_dup", "'general.architecture' appears twice, as key 0 and key 7"),
    case("duplicate", "ti_name_dup", "'a' appears twice, as tensor 0 and tensor 1"),
    case("alignment", "kv_align_0", r"power of two \(got 0\)"),
    case("alignment", "kv_align_13", r"power of two \(got 13\)"),
    case("alignment", "kv_align_2e31", r"too large \(got 2147483648, limit 1048576\)"),
    case("alignment", "kv_align_i32_type", r"wrong type \(got i32, limit u32\)"),
    case("offset", "ti_offset_overlap", r"'b' has the wrong data offset \(got 32, limit exactly 256\)"),
    case("offset", "ti_offset_hole", r"'b' has the wrong data offset \(got 512, limit exactly 256\)"),
    case("offset", "ti_offset_unaligned", r"'b' has the wrong data offset \(got 257, limit exactly 256\)"),
    case("offset", "ti_offset_past_eof", r"has the wrong data offset \(got 1048576, limit exactly 0\)"),
    case("truncated", "data_one_byte_short", r"1 bytes of tensor data are missing, the last whole tensor is 'a'"),
    case("truncated", "data_missing", "256 bytes of tensor data are missing, no tensor is whole"),
    case("unknown type", "ti_type_count", r"got 43\b.*newer requant"),
    case("unknown type", "ti_type_removed_q4_2", "Q4_2, removed"),
]


def shards(harm):
    """A split source in which something is wrong; the model is its second file."""

    def given(folder):
        (folder / "source.gguf").unlink()
        files = split_files()
        harm(files)
        write_files(folder, files)

    return given


def shard(i, count=3):
    return f"model-{i:05d}-of-{count:05d}.gguf"


def _lost(files):
    del files[shard(1)]


def _exchanged(files):
    files[shard(1)], files[shard(3)] = files[shard(3)], files[shard(1)]


def _foreign(files):
    files[shard(3)] = split_files(per_shard=3)[shard(3)]


def _doubled(files):
    tensors = files[shard(2)].tensors
    files[shard(3)] = replace(files[shard(3)], tensors=tensors)


def _renamed(files):
    files["model.gguf"] = files.pop(shard(2))


def _many(files):
    files.clear()
    files[shard(2)] = replace(split_files()[shard(2)], pairs=split_pairs(1, 65535, 6))


def split_case(row, name, harm, *says, model=None):
    return Row(row, name, 3, says, given=shards(harm), model=model or shard(2), again=None)


SPLITS = [
    split_case("shards", "missing", _lost, "1 of 3 files are missing", "expected in .*: .*00001-of.*00003-of"),
    split_case("shards", "wrong number", _exchanged, r"'split.no' does not fit its name \(got 2, limit 0\)"),
    split_case("shards", "wrong count", _foreign, r"split\.tensors\.count.*\(got 9, limit 6\)"),
    split_case("shards", "renamed", _renamed, "its name must end in '-00002-of-00003.gguf'", model="model.gguf"),
    split_case("duplicate", "tensor in two shards", _doubled, "'blk.1.w0.weight' is also in 'model-00002-of"),
    split_case("split names", "count of 65535", _many, r"'split.count' is too large \(got 65535, limit 512\)"),
]

NAN = normal((256, 24), seed=3)
NAN[7, 5] = np.nan
LARGE = 1e9 * normal((256, 24), seed=3)
GOOD = half("blk.0.attn_q.weight", (256, 24))


def imatrix_file(folder, values, counts=(1,), width=256):
    sums = single("blk.0.attn_q.weight.in_sum2", (width, 1), np.full(width, 1.0) if values is None else values)
    n = single("blk.0.attn_q.weight.counts", (len(counts), 1), np.array(counts))
    File((pair("general.type", STR, "imatrix"),), (sums, n)).write(folder / "imatrix.gguf")


def imatrix_case(name, says, values=None, **how):
    def given(folder):
        array = None if values is None else np.where(np.arange(256) == 9, values, 1.0)
        imatrix_file(folder, array, **how)

    words = ("--imatrix", "imatrix.gguf")
    says = ("imatrix.gguf: ", "blk.0.attn_q.weight", says)
    return Row("bad imatrix", name, 3, says, given=given, words=words, again=None, left=frozenset({"imatrix.gguf"}))


def wanting(folder):
    """A plan with a type that needs an importance matrix for twelve tensors, and the model of it."""
    model = small_model(*(half(f"blk.{i}.attn_q.weight", (256, 24), seed=i) for i in range(12)))
    with open_source(model.write(folder / "source.gguf")) as source:
        types = [(t, "F32" if "norm" in t.name else "IQ2_XXS") for t in source.tensors]
        (folder / "plan.json").write_text(plan_of(source, [choice(*pair) for pair in types]).to_json())


def forcing(folder):
    """A plan with a type whose block does not divide a row."""
    model = small_model(half("blk.0.attn_q.weight", (96, 24)))
    with open_source(model.write(folder / "source.gguf")) as source:
        plan = plan_of(source, [choice(t, t.format.name) for t in source.tensors]).to_json()
    (folder / "plan.json").write_text(plan.replace('"type": "F16"', '"type": "Q4_K"'))


NUMBERS = [
    Row(
        *(
            "not finite",
            "NaN",
            8,
            ("'blk.1.ffn_up.weight' is not finite: 1 of 6144 weights, the first at weight 1797 .*got nan",),
        ),
        given=made_of(GOOD, single("blk.1.ffn_up.weight", (256, 24), NAN)),
        left=PART,
        again=8,
    ),
    Row(
        *(
            "not finite",
            "Inf",
            8,
            ("'blk.1.ffn_up.weight' is not finite: 1 of 6144 weights, the first at weight 1797 .*got inf",),
        ),
        given=made_of(GOOD, single("blk.1.ffn_up.weight", (256, 24), np.where(np.isnan(NAN), np.inf, NAN))),
        left=PART,
        again=8,
    ),
    Row(
        *("gate", "weights beyond the type", 8, (r"'blk.1.ffn_up.weight' as Q4_K, .*relative error \(got \S+, limit",)),
        given=made_of(GOOD, single("blk.1.ffn_up.weight", (256, 24), LARGE)),
        left=PART,
        again=8,
    ),
    imatrix_case("NaN", "value 9 is no mean square .*finite, not negative", np.nan),
    imatrix_case("Inf", "value 9 is no mean square .*finite, not negative", np.inf),
    imatrix_case("negative", "value 9 is no mean square .*got -1.0", -1.0),
    imatrix_case("wrong size", "another size than the tensor .*got .*limit", width=128),
    imatrix_case("no counts", r"wrong number of counts \(got 0, limit 1", counts=()),
    Row(
        *(
            "missing imatrix",
            "IQ2_XXS without",
            3,
            ("12 tensors .*imatrix|12 tensors .*importance matrix", r"'blk.9.attn_q.weight' \.\.\.; "),
        ),
        given=wanting,
        words=("--plan", "plan.json"),
        type=None,
        left=frozenset({"plan.json"}),
        again=None,
    ),
    Row("budget", "too small", 4, (r"raise it to \d+",), words=("--size", "4KiB", "--quick"), type=None, again=4),
    Row(
        *("row and block", "forced by an option", 2, ("blk.0.attn_q.weight.*Q4_K.*96.*block of 256",)),
        given=made_of(half("blk.0.attn_q.weight", (96, 24)), half("blk.0.ffn_up.weight", (256, 24))),
        words=("--size", "1MiB", "--quick", "--tensor-type", "blk.0.attn_q.weight=Q4_K"),
        type=None,
        again=None,
    ),
    Row(
        *(
            "row and block",
            "forced by a plan",
            3,
            (r"choices\[1\] cannot be Q4_K \(got shape \[96, 24\], limit .* 256",),
        ),
        given=forcing,
        words=("--plan", "plan.json"),
        type=None,
        left=frozenset({"plan.json"}),
        again=None,
    ),
    Row(
        *("row and block", "of the type for all", 0),
        given=made_of(half("blk.0.attn_q.weight", (96, 24)), half("blk.0.ffn_up.weight", (256, 24))),
        left=DONE,
        again=None,
    ),
    Row(
        *("trailing bytes", "seven", 0, ("warning: source.gguf ends in 7 bytes of no tensor; dropped",)),
        given=lambda folder: replace(MODEL, trailing=b"garbage").write(folder / "source.gguf"),
        left=DONE,
    ),
]


def old(folder):
    """There is an output already."""
    (folder / "out.gguf").write_bytes(OLD)


OUT = frozenset({"out.gguf"})


def harmed(harm, *faults):
    """A run was stopped, and then something happened."""

    def given(folder):
        stop = Fault("pwrite", "EIO", 9, r"out\.gguf\.part$")
        with injected(*faults, stop):
            assert command(folder, Row("", "", 6)) == 6
        assert names(folder) == sorted(PART | {"source.gguf"})
        harm(folder)

    return given


@contextlib.contextmanager
def held(folder):
    """Another run is at work."""
    with claim(folder / "out.gguf"):
        yield


def linked(target, *, live=False):
    def given(folder):
        (folder / "disk").mkdir()
        (folder / "out.gguf").symlink_to(target)
        if live:
            (folder / target).write_bytes(OLD)

    return given


def is_link(folder):
    assert (folder / "out.gguf").is_symlink() and names(folder / "disk") == ["real.gguf"]


def split_source(folder):
    (folder / "source.gguf").unlink()
    write_files(folder, split_files())


REFUSED = [
    Row("out exists", "a file", 5, (r"out\.gguf: already exists; --force replaces it",), given=old, left=OUT, again=5),
    Row("out exists", "with --force", 0, given=old, words=("--force",), left=DONE),
    Row(
        "out is input",
        "the path",
        5,
        ("source.gguf: is one of the inputs .*--force does not help",),
        out="source.gguf",
        again=5,
    ),
    Row(
        *("out is input", "with --force", 5, ("is one of the inputs .*--force does not help",)),
        words=("--force",),
        out="source.gguf",
        again=5,
    ),
    Row(
        *("out is input", "a hard link", 5, (r"out\.gguf: is one of the inputs .*--force does not help",)),
        given=lambda folder: os.link(folder / "source.gguf", folder / "out.gguf"),
        left=OUT,
        again=5,
    ),
    Row(
        *("out is input", "a symbolic link", 5, (r"out\.gguf: is one of the inputs \(\S+source\.gguf\)",)),
        given=lambda folder: (folder / "out.gguf").symlink_to("source.gguf"),
        left=OUT,
        again=5,
    ),
    Row(
        *("out is input", "a shard", 5, ("00003-of-00003.gguf: is one of the inputs",)),
        given=split_source,
        model=shard(1),
        out=shard(3),
        words=("--force",),
        again=None,
    ),
    Row(
        *("out is input", "the imatrix", 5, ("imatrix.gguf: is one of the inputs",)),
        given=lambda folder: imatrix_file(folder, None),
        words=("--imatrix", "imatrix.gguf", "--force"),
        out="imatrix.gguf",
        left=frozenset({"imatrix.gguf"}),
        again=None,
    ),
    Row(
        *("out is input", "would be the part", 5, (r"out\.gguf\.part: is one of the inputs",)),
        given=lambda folder: os.link(folder / "source.gguf", folder / "out.gguf.part"),
        left=frozenset({"out.gguf.part"}),
        again=5,
    ),
    Row(
        *("out is no file", "a folder", 5, (r"out\.gguf: is a directory",)),
        given=lambda folder: (folder / "out.gguf").mkdir(),
        left=OUT,
        again=5,
    ),
    Row(
        *("out is no file", "a FIFO", 5, (r"out\.gguf: is a FIFO",)),
        given=lambda folder: os.mkfifo(folder / "out.gguf"),
        left=OUT,
        again=5,
    ),
    Row("out is no file", "a device", 5, ("/dev/null: is a character device",), out="/dev/null", again=5),
    Row("out is no file", "a full device", 5, ("is a character device",), out="/dev/full", words=("--force",), again=5),
    Row("out is a link", "dangling", 0, given=linked("disk/real.gguf"), left=DONE | {"disk"}, also=is_link),
    Row(
        *("out is a link", "live", 5, (r"out\.gguf: already exists",)),
        given=linked("disk/real.gguf", live=True),
        left=OUT | {"disk"},
        again=5,
    ),
    Row(
        *("out is a link", "live, with --force", 0),
        given=linked("disk/real.gguf", live=True),
        words=("--force",),
        left=DONE | {"disk"},
        also=is_link,
    ),
    Row(
        "out is a link",
        "a loop",
        5,
        ("is a loop of symbolic links",),
        given=linked("out.gguf"),
        left=OUT | {"disk"},
        again=5,
    ),
    Row(
        "out is a link", "to nowhere", 6, ("/nowhere",), given=linked("/nowhere/out.gguf"), left=OUT | {"disk"}, again=6
    ),
    Row(
        *("second run", "at once", 5, (rf"another run is writing it: process {os.getpid()} on \S+, started 20",)),
        during=held,
        left=frozenset({"out.gguf.part.journal"}),
    ),
    Row(
        *("stale part", "of another command", 5, ('asked type was "Q4_K", now "Q8_0"; .*--restart discards it',)),
        given=harmed(lambda _: None),
        type="Q8_0",
        left=PART,
        again=5,
    ),
    Row(
        *("stale part", "of another command, with --restart", 0),
        given=harmed(lambda _: None),
        type="Q8_0",
        words=("--restart",),
        left=DONE,
    ),
    Row(
        *("stale part", "of another source", 5, ("source 0 mtime_ns was .*, now 1000000000; ",)),
        given=harmed(lambda folder: os.utime(folder / "source.gguf", (1, 1))),
        left=PART,
        again=5,
    ),
    Row("stale part", "of the same command", 0, (r"resuming \d/6 tensors",), given=harmed(lambda _: None), left=DONE),
    Row(
        *("stale part", "not ours", 5, (r"out\.gguf\.part: is not an unfinished output",)),
        given=lambda folder: (folder / "out.gguf.part").write_bytes(b"a download of somebody's"),
        left=frozenset({"out.gguf.part"}),
        again=5,
    ),
]


@contextlib.contextmanager
def little_space(_):
    with pytest.MonkeyPatch.context() as patch:
        real = os.statvfs
        full = lambda path: os.statvfs_result([*real(path)[:3], 1, 1, *real(path)[5:]])  # noqa: E731
        patch.setattr(os, "statvfs", full)
        yield


PLACED = r"out\.gguf\.part$"
WRITING = "tensor '\\S+': writing 576 bytes at offset \\d+ failed: {}"
FULL = r"free some space in \S+ and run it again to resume"
COPY = "Path(path + '2').write_bytes(Path(path).read_bytes()); os.replace(path + '2', path)"
LONGER = (
    "t = os.stat(path).st_mtime_ns; Path(path).write_bytes(Path(path).read_bytes() + b'x'); os.utime(path, ns=(t, t))"
)
REWRITE = """
with open(path, "r+b") as file:
    n = len(file.read()) - 2000
    file.seek(2000)
    file.write(n * b"\\xff")
"""
OF_SOURCE = "path = path.replace('out.gguf.part', 'source.gguf')\n"
CHANGED = {
    "time": ("mtime_ns was \\d+, now 5", "os.utime(path, ns=(5, 5))"),
    "size": ("size was \\d+, now \\d+", LONGER),
    "inode": ("ino was \\d+, now \\d+", COPY),
    "removed": ("was removed", "os.unlink(path)"),
    "cut": ("shrank .* bytes at offset \\d+ are gone", "os.truncate(path, 3000)"),
    "rewritten": ("mtime_ns was", REWRITE),
}


@contextlib.contextmanager
def restored(folder):
    """The source becomes again what it was."""
    path = folder / "source.gguf"
    content, status = path.read_bytes(), path.stat()
    yield
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def mid_run(case, code, call, error, *says, nth=9, on=PLACED, left=PART):
    return Row(_row_of(call, error), case, code, says, (Fault(call, error, nth, on),), left=left)


def _row_of(call, error):
    if error in ("ENOSPC", "EDQUOT", "EFBIG"):
        return "disk full"
    return "read error" if call in ("preadv", "pread") else "write error"


MEM = ("--size", "1MiB", "--losses", "/proc/self/mem")

SYSTEM = [
    Row(
        *("free space", "too little", 6, (r"needs \S+ KiB free but has 4.00 KiB; free some space on /\S*",)),
        during=little_space,
    ),
    *(
        mid_run(f"{error} mid-run", 6, "pwrite", error, WRITING.format(os.strerror(getattr(errno, error))), hint)
        for error, hint in (("ENOSPC", FULL), ("EDQUOT", FULL), ("EFBIG", r"ulimit -f.*run it again to resume"))
    ),
    mid_run("when reserving", 6, "posix_fallocate", "ENOSPC", "cannot be reserved: No space", nth=1, left=NOTHING),
    mid_run("under the journal", 6, "pwrite", "ENOSPC", "journal: writing .* No space left", FULL, on="journal$"),
    mid_run("under the header", 6, "link", "ENOSPC", r"out\.gguf: cannot be put in place: No space", nth=1, on=""),
    mid_run(
        *("under the record", 6, "os_open", "ENOSPC", "requant.json: cannot be written: No space left"),
        nth=2,
        on=r"requant\.json\.",
        left=PART - {"out.gguf.part"} | OUT,
    ),
    mid_run(
        *("of the source", 6, "preadv", "EIO", r"source\.gguf: reading 2048 bytes at offset \d+ failed: Input/output"),
        on=r"source\.gguf$",
    ),
    Row(
        *("read error", "of the header", 6, (r"source\.gguf.*Input/output error",)),
        (Fault("preadv", "EIO", 1, r"source\.gguf$"),),
    ),
    Row(
        "read error",
        "of the losses",
        6,
        ("/proc/self/mem: cannot be read: Input/output error",),
        words=MEM,
        type=None,
        again=6,
    ),
    mid_run("of the output, read again", 6, "preadv", "EIO", "Input/output error", nth=1),
    mid_run("pwrite", 6, "pwrite", "EIO", WRITING.format("Input/output error")),
    mid_run("fdatasync of the part", 6, "fdatasync", "EIO", "out.gguf.part: flushing to disk failed: Input/output"),
    mid_run("fdatasync of the journal", 6, "fdatasync", "EIO", "journal: flushing to disk failed", on="journal$"),
    mid_run("first fdatasync", 6, "fdatasync", "EIO", "flushing to disk failed", nth=1, left=NOTHING),
    mid_run(
        "fsync of the folder",
        6,
        "fsync",
        "EIO",
        "flushing to disk failed: Input/output",
        nth=2,
        on=r"/w$",
        left=PART - {"out.gguf.part"} | OUT,
    ),
    mid_run("link", 6, "link", "EIO", r"out\.gguf: cannot be put in place: Input/output error", nth=1, on=""),
    *(
        Row(
            *(
                "no permission",
                error,
                6,
                (r"out\.gguf\.part\S* cannot be created: " + os.strerror(getattr(errno, error)),),
            ),
            (Fault("os_open", error, 1, r"out\.gguf\.part"),),
        )
        for error in ("EACCES", "EROFS", "EPERM", "ENAMETOOLONG")
    ),
    Row(
        "no permission",
        "no folder",
        6,
        (r"nowhere: there is no such folder",),
        out="nowhere/out.gguf",
        again=6,
    ),
    Row("no permission", "procfs", 6, (r"/proc\S*: cannot be ",), out="/proc/out.gguf", again=6),
    Row(
        *("no permission", "before the scoring", 6, ("cannot be created: Read-only",)),
        (Fault("os_open", "EROFS", 1, r"out\.gguf\.part"), Fault("preadv", "EIO", 2, r"source\.gguf$")),
        words=("--size", "1MiB", "--quick"),
        type=None,
        unmet=True,
    ),
    *(
        Row(
            *("source changed", kind, 7, (r"source\.gguf: .*" + says,)),
            (Fault("preadv", None, 9, r"source\.gguf$", do=do),),
            during=restored,
            left=PART,
        )
        for kind, (says, do) in CHANGED.items()
    ),
    *(
        Row(
            *("source changed", f"{kind}, after the last read", 7, (r"source\.gguf: .*" + CHANGED[kind][0],)),
            (
                Fault(
                    "preadv",
                    None,
                    1,
                    PLACED,
                    do=OF_SOURCE + CHANGED[kind][1],
                ),
            ),
            during=restored,
            left=PART,
        )
        for kind in ("rewritten", "cut")
    ),
]


def killed_by(number, *, twice=False):
    after = "time.sleep(0.3); os.kill(os.getpid(), signal.SIGINT); time.sleep(30)" if twice else "time.sleep(0.1)"
    return (Fault("pwrite", None, 9, PLACED, do=f"os.kill(os.getpid(), signal.{number}); {after}"),)


def heard():
    """Whatever the tests themselves were started to ignore."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def cut_journal(folder):
    path = folder / "out.gguf.part.journal"
    os.truncate(path, path.stat().st_size - 40)


def flip(name, at):
    def harm(folder):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 4
        (folder / name).write_bytes(content)

    return harm


def flip_first_record(folder):
    """In the journal's third line, after owner and head."""
    path = folder / "out.gguf.part.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + bytes([lines[2][0] ^ 4]) + lines[2][1:] + b"".join(lines[3:]))


def lose(name):
    return lambda folder: (folder / name).unlink()


PROCESS = {"preexec_fn": heard}
RESUME = "stopped by {}; run the same command again to resume"
MEMORY = """
n = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + 2**20
resource.setrlimit(resource.RLIMIT_AS, (n, resource.getrlimit(resource.RLIMIT_AS)[1]))
os.used_up = []  # what was freed before, and would be handed out again whatever the limit
try:
    while True:
        os.used_up.append(bytearray(2**20))
except MemoryError:
    pass
"""
NO_THREADS = """
import threading
def start(_):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
"""
NO_MEMORY = "raise MemoryError('Unable to allocate 3.00 GiB for an array')"

ENDED = [
    *(
        Row("signal", name, code, (RESUME.format(name),), killed_by(name), left=PART, process=PROCESS)
        for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129))
    ),
    Row(
        "second signal",
        "SIGINT twice",
        130,
        (),
        killed_by("SIGINT", twice=True),
        left=PART,
        process=PROCESS,
        prints=False,
    ),
    Row("killed", "SIGKILL", -9, (), killed_by("SIGKILL"), left=PART, process=PROCESS, prints=False),
    Row(
        *("bad journal", "torn", 0, ("1 damaged lines of the journal were dropped", r"resuming \d/6 tensors")),
        given=harmed(cut_journal),
        left=DONE,
    ),
    Row(
        *("bad journal", "a flipped bit", 0, (r"1 damaged lines of the journal were dropped",)),
        given=harmed(flip("out.gguf.part.journal", -100)),
        left=DONE,
    ),
    Row(
        *("bad journal", "a flipped bit in its first record", 0, (r"\d damaged lines of the journal were dropped",)),
        given=harmed(flip_first_record),
        left=DONE,
    ),
    Row(
        *("bad journal", "a flipped bit in its head", 0, ("journal of an unfinished output was damaged",)),
        given=harmed(flip("out.gguf.part.journal", 300)),
        left=DONE,
    ),
    Row("bad journal", "empty", 0, given=harmed(lambda f: os.truncate(f / "out.gguf.part.journal", 0)), left=DONE),
    Row("bad journal", "lost", 0, given=harmed(lose("out.gguf.part.journal")), left=DONE),
    Row(
        *("bad part", "a flipped bit", 0, (r"tensor '\S+' is not as it was recorded; it is made again",)),
        given=harmed(flip("out.gguf.part", 2000)),
        left=DONE,
    ),
    Row("bad part", "lost", 0, given=harmed(lose("out.gguf.part")), left=DONE),
    Row("bad part", "cut", 0, given=harmed(lambda folder: os.truncate(folder / "out.gguf.part", 99)), left=DONE),
    Row(
        *("memory", "none for an array", 6, (r"out of memory \(got Unable to allocate 3.00 GiB.*fewer --threads",)),
        (Fault("preadv", None, 9, r"source\.gguf$", do=NO_MEMORY),),
        left=PART,
    ),
    Row(
        *("memory", "while planning", 6, (r"out of memory; ",)),
        (Fault("preadv", None, 1, r"source\.gguf$", do="raise MemoryError"),),
        words=("--size", "1MiB", "--quick"),
        type=None,
    ),
    Row(
        *("memory", "a limit", 6, (r"out of memory \(got Unable to allocate.*limit .*iB, ulimit -v\).*--threads",)),
        (Fault("preadv", None, 2, r"source\.gguf$", do=MEMORY),),
        given=made_of(half("blk.0.attn_q.weight", (256, 8192))),
        words=("--threads", "1"),  # Thread.start waits for ever for a thread that has no memory to begin
        small=False,
        left=PART,
        process=PROCESS,
    ),
    Row(
        *("memory", "no more threads", 6, ("no more threads can be started",)),
        process=PROCESS,
        then=NO_THREADS,
    ),
    Row("stdout closed", "a pipe without a reader", 0, left=DONE, process={"stdout": "pipe"}, prints=False),
    Row("stdout closed", "no stdout", 0, left=DONE, process={"preexec_fn": lambda: os.close(1)}, prints=False),
    Row(
        *("stdout closed", "a full disk", 6, ("stdout: cannot be written: No space left",)),
        left=DONE,
        process={"stdout": "/dev/full"},
    ),
    Row(
        *("error not printed", "bad input", 3),
        given=content("hdr_bad_magic"),
        process={"stderr": "/dev/full"},
        prints=False,
        again=None,
    ),
    Row(
        *("error not printed", "mid-run", 6, (), (Fault("pwrite", "EIO", 9, PLACED),)),
        process={"stderr": "/dev/full"},
        left=PART,
        prints=False,
    ),
    Row("error not printed", "no error at all", 0, left=DONE, process={"stderr": "/dev/full"}, prints=False),
]


def environment(**variables):
    return PROCESS | {"env": os.environ | variables}


def masked(mask):
    @contextlib.contextmanager
    def given(_):
        before = os.umask(mask)
        yield
        os.umask(before)

    return given


def has_mode(mode):
    def check(folder):
        assert {stat.S_IMODE((folder / name).stat().st_mode) for name in DONE} == {mode}

    return check


def blocked(folder):
    (folder / "cache").write_text("no folder")
    (folder / "tmp").mkdir()


def without(case, call, error, says, **how):
    return Row("poor file system", case, 0, (says,), (Fault(call, error, 1, always=True, **how),), left=DONE)


NO_LOCKS = "has no locks: do not start a second run"
C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
JUMPS = "import time\nreal, n = time.time, iter(range(10**9))\ntime.time = lambda: real() + (-1) ** next(n) * 1e9"

AROUND = [
    *(without(f"flock: {error}", "flock", error, NO_LOCKS) for error in ("ENOLCK", "EOPNOTSUPP", "ENOSYS")),
    *(without(f"link: {error}", "link", error, "has no hard links") for error in ("EPERM", "EOPNOTSUPP", "EMLINK")),
    without("no fallocate", "posix_fallocate", "EOPNOTSUPP", "reserves no space: a full disk may show late"),
    without("fallocate: EINVAL", "posix_fallocate", "EINVAL", "reserves no space: a full disk may show late"),
    without("no fsync of folders", "fsync", "EINVAL", "flushes no folders", on=r"/w$"),
    Row(
        *("kernel cache", "a file where the folder should be", 0, ("kernels are not kept in cache/kernels-",)),
        given=blocked,
        type="F16",
        left=DONE | {"cache", "tmp"},
        process=environment(REQUANT_CACHE_DIR="cache", TMPDIR="tmp"),
    ),
    Row("surroundings", "locale C", 0, left=DONE, process=environment(**C_LOCALE)),
    Row("surroundings", "no such time zone", 0, left=DONE, process=environment(TZ="Mars/Olympus")),
    Row("surroundings", "a clock that jumps", 0, left=DONE, process=PROCESS, then=JUMPS),
    Row(
        *("surroundings", "a source from before 1970", 0),
        given=lambda folder: os.utime(folder / "source.gguf", (-1, -1)),
        left=DONE,
    ),
    *(
        Row("permissions", f"umask {mask:03o}", 0, during=masked(mask), left=DONE, also=has_mode(0o666 & ~mask))
        for mask in (0, 0o022, 0o077)
    ),
]

ROWS = [*INPUTS, *SPLITS, *NUMBERS, *REFUSED, *SYSTEM, *ENDED, *AROUND]


def words_of(folder, row):
    kind = ("--type", row.type) if row.type else ()
    own = [folder / word if re.fullmatch(r"\w+\.(json|gguf)", word) else word for word in row.words]
    return ["convert", folder / row.model, folder / row.out, *kind, "--json", "--threads", "2", *own]


class Silent:
    """In place of capsys where nobody looks."""

    def readouterr(self):
        return "", ""


def command(folder, row):
    """The exit code of the row's command in this process."""
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        return run(Silent(), *words_of(folder, row)).code


def state(folder):
    """Whatever is in the folder, with what is in it and when that was written."""
    return {p.name: (p.read_bytes() if p.is_file() else None, p.lstat().st_mtime_ns) for p in folder.iterdir()}


def result(folder):
    return {name: (folder / name).read_bytes() for name in DONE}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "w"
    path.mkdir()
    MODEL.write(path / "source.gguf")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What runs without a fault make, by source and words; each is made once."""
    made = {}

    def files(folder, row):
        key = (folder / row.model).read_bytes(), row.type, row.words
        if key not in made:
            alone = tmp_path_factory.mktemp("whole")
            (alone / "source.gguf").write_bytes(key[0])
            assert command(alone, replace(row, model="source.gguf", out="out.gguf")) == 0
            made[key] = result(alone)
        return made[key]

    return files


def test_the_table_is_complete():
    assert {row.row for row in ROWS} == set(TABLE)
    assert len({row.id for row in ROWS}) == len(ROWS)


def spawned(folder, row):
    options, opened = dict(row.process), []
    for stream in options.keys() & {"stdout", "stderr"}:
        if options[stream] == "pipe":
            reading, writing = os.pipe()
            os.close(reading)
        else:
            writing = os.open(options[stream], os.O_WRONLY)
        options[stream] = writing
        opened.append(writing)
    process = start(
        *words_of(folder, row), before=preamble(*row.faults, small=row.small, then=row.then), cwd=folder, **options
    )
    for descriptor in opened:
        os.close(descriptor)
    out, err = process.communicate(timeout=120)
    return Ran(process.returncode, out or "", err or "")


def faulty(capsys, folder, row):
    if row.process is not None:
        return spawned(folder, row)
    with injected(*row.faults) as counts:
        ran = run(capsys, *words_of(folder, row))
    met = [count.calls >= fault.nth for count, fault in zip(counts, row.faults, strict=True)]
    assert row.unmet or all(met), "the fault was not met"
    return ran


def check_lines(row, ran):
    lines = ran.err.splitlines()
    assert all(line.isprintable() for line in lines), lines
    errors = [line for line in lines if not ANSWERED.match(line)]
    if row.code:
        assert ran.out == "" and len(errors) == 1 and errors[0].startswith("requant: error: "), ran
    else:
        assert not errors, lines
    for says in row.says:
        assert any(re.search(says, line) for line in (errors if row.code else lines)), (says, lines)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_fault_ends_as_the_table_says(capsys, folder, whole, row):
    row.given(folder)
    with row.during(folder):
        before = state(folder)
        sources = {name for name in before if name == row.model or name.startswith("model")} - row.left
        ran = faulty(capsys, folder, row)
        assert ran.code == row.code, ran
        if row.prints:
            check_lines(row, ran)
        after = state(folder)
        kept = {"source.gguf", "out.gguf"} if row.code else {"source.gguf"}
        if row.row == "source changed":  # perhaps removed, and in any case not as it was
            assert set(after) - sources == row.left
            sources = kept = set()
        else:
            assert set(after) == sources | row.left
        kept = (kept | sources) & before.keys()
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    row.also(folder)
    if row.left >= DONE:
        assert result(folder) == whole(folder, row)
    elif row.again is not None:
        ran = run(capsys, *words_of(folder, row))
        assert ran.code == row.again, ran
        if row.again == 0:
            assert result(folder) == whole(folder, row)
            assert set(names(folder)) == {row.model} | DONE | (row.left - PART)
            resumed = row.left >= PART and row.row != "source changed"
            assert bool(re.search(r"resuming \d+/\d+ tensors", ran.err)) == resumed or row.left & {"out.gguf"}
