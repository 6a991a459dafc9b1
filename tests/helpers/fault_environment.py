"""Fault table: the environment of a run: limits, permissions, clocks and file systems without locks."""

import contextlib
import os
import stat

from fault_ends import PROCESS
from fault_rows import DONE, OLD, PART, Row
from shim import Fault


def environment(**variables):
    return PROCESS | {"env": os.environ | variables}


def masked(mask):
    @contextlib.contextmanager
    def given(_):
        before = os.umask(mask)
        yield
        os.umask(before)

    return given


def has_mode(mode, *names):
    def check(folder):
        assert {stat.S_IMODE((folder / name).stat().st_mode) for name in names or DONE} == {mode}

    return check


def source_of(mode):
    return lambda folder: (folder / "source.gguf").chmod(mode)


def private_output(folder):
    (folder / "out.gguf").write_bytes(OLD)
    (folder / "out.gguf").chmod(0o600)


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
        Row("permissions", f"umask {mask:03o}", 0, during=masked(mask), left=DONE, also=has_mode(0o644 & ~mask))
        for mask in (0, 0o022, 0o077)
    ),
    *(
        Row("permissions", f"a source of {mode:03o}", 0, given=source_of(mode), left=DONE, also=has_mode(left))
        for mode, left in ((0o600, 0o600), (0o640, 0o640), (0o444, 0o644), (0o604, 0o604), (0o755, 0o644))
    ),
    Row(
        *("permissions", "over a private output", 0),
        given=private_output,
        words=("--force",),
        left=DONE,
        also=has_mode(0o600, "out.gguf"),
    ),
    Row(
        *("permissions", "of what a stopped run leaves", 6, ("Input/output error",)),
        (Fault("pwrite", "EIO", 9, r"out\.gguf\.part$"),),
        given=source_of(0o600),
        left=PART,
        also=has_mode(0o600, *PART),
    ),
]
