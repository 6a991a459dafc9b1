"""Fault table: calls of the system that fail, and sources that change, in the middle of a run."""

import contextlib
import errno
import os

import pytest
from fault_outputs import OUT
from fault_rows import NOTHING, PART, Row
from shim import Fault


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
        *("under the record", 6, "fsync", "ENOSPC", "requant.json: cannot be written: No space left"),
        nth=1,
        on=r" \(deleted\)$",  # it has no name yet
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
