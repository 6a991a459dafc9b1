"""Fault table: processes that are stopped, killed or out of memory, and what the next run finds."""

import os
import signal

from conversions import half
from fault_outputs import harmed
from fault_rows import DONE, PART, Row, content, made_of
from fault_system import PLACED
from shim import Fault


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
    Row(
        *("not ours", "a part without its journal", 5, (r"out\.gguf\.part: is not an unfinished output",)),
        given=harmed(lose("out.gguf.part.journal")),
        left=frozenset({"out.gguf.part"}),
        again=5,
    ),
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
