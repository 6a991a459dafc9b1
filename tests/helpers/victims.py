"""Conversions to be stopped: commands on small models, run in a child of this process or in a process of their own.

What may be in the folder at any moment is checked by `oddities`; what must be there in the end is `Case.reference`.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from conversions import half, plan_for, single, small_model

from requant.container.source import open_source

FIXTURES = Path(__file__).parents[2] / "fixtures"
OLD = b"an old output"
# weights of a chunk, bytes of a piece, bytes between two flushes: small, so that there is much to lose
SMALL = (1024, 2000, 1)
# what a run that was killed may leave beside the outputs; the next one takes it up or removes it
_LEFT = re.compile(r"\.part|\.part\.journal|\.part\.imatrix|\.requant\.json\.part")


@dataclass
class Case:
    """A command on the model `source` that makes `out` in any folder.

    sizes: as SMALL. reference: {name: bytes} of a run that was not stopped; old: of what is there before.
    """

    name: str
    source: Path
    words: tuple[str, ...]
    sizes: tuple[int, int, int] = SMALL
    old: dict[str, bytes] = field(default_factory=dict)
    reference: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0  # of an undisturbed run in a child
    process_seconds: float = 0.0  # and as a process of its own

    def argv(self, folder):
        return ["requant", "convert", str(self.source), str(folder / "o.gguf"), *self.words]

    def prepare(self, folder):
        """A new folder with what is there before."""
        folder.mkdir(parents=True)
        for name, content in self.old.items():
            (folder / name).write_bytes(content)
        return folder


def cases(folder, *, calibrated=True):
    """The commands: a plan with copies, experts and companions; split; over an old output; planned in the run."""
    folder.mkdir(parents=True, exist_ok=True)
    model = small_model(
        *(half(f"blk.{i}.{name}.weight", (256, 24), seed=i) for i in range(4) for name in ("attn_q", "ffn_up")),
        single("blk.4.attn_norm.weight", (256,), seed=5),
        half("blk.4.ffn_down_exps.weight", (256, 16, 3), seed=9),
        single("blk.5.attn_k.weight", (512, 8), seed=10),
    )
    path = model.write(folder / "model.gguf")
    with open_source(path) as source:
        (folder / "mixed.json").write_text(plan_for(source, "Q4_K", "NVFP4", "F16", "IQ3_S").to_json())
        (folder / "plain.json").write_text(plan_for(source, "Q6_K", "Q8_0", "NVFP4").to_json())
    mixed, plain = ("--plan", str(folder / "mixed.json")), ("--plan", str(folder / "plain.json"))
    quick = ("--bpw", "5", "--quick", "--types", "Q4_K,Q6_K,Q8_0")
    old = {"o.gguf": OLD, "o.gguf.requant.json": b"an old record"}
    found = [
        Case("mixed", path, mixed),
        Case("split", path, (*plain, "--max-shard-size", "20KB")),
        Case("force", path, (*plain, "--force"), old=old),
        Case("planned", path, quick),
    ]
    if calibrated:
        run = ("--bpw", "5", "--windows", "1", "--window", "16", "--types", "Q4_K,Q8_0")
        found.append(Case("calibrated", FIXTURES / "tiny-llama-f16.gguf", run, sizes=(2**16, 2**17, 2**18)))
    return found


def shrink(sizes, commit=None):
    """Make the chunks, pieces and flushes of this process those of `sizes`; `commit` bytes between flushes."""
    from requant.container import output
    from requant.conversion import chunks

    chunks.CHUNK_WEIGHTS, chunks.PIECE_BYTES, output.COMMIT_BYTES = sizes
    if commit is not None:
        output.COMMIT_BYTES = commit


def warm():
    """Import and compile here what the children will need, in this thread, as they are forked."""
    from requant.formats import by_name
    from requant.formats.codec import warm_up

    warm_up([by_name(name) for name in ("F32", "F16", "NVFP4", "Q4_K", "Q6_K", "Q8_0", "IQ3_S")])


def hear():
    """Take signals as Python does at its start, whatever the parent was started to ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Ended:
    """How a process ended: its exit code, -n for signal n, and what it said on stderr."""

    code: int
    err: str


class Child:
    """The command of `case` on `folder` in a fork of this process; `before` is called in it first."""

    def __init__(self, case, folder, before=lambda: None, commit=None, words=()):
        self.log = folder.with_name(f"{folder.name}.log")
        self.log.touch()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._become(case, folder, before, commit, words)
            except SystemExit as error:
                code = error.code or 0
            except BaseException:  # noqa: BLE001, as Python does at its end
                sys.excepthook(*sys.exc_info())
            finally:
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.flush()
                os._exit(code)

    def _become(self, case, folder, before, commit, words):
        from requant.cli import run

        hear()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
        sys.argv = [*case.argv(folder), *words]
        shrink(case.sizes, commit)
        before()
        run()

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait(self):
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace"))


class Process:
    """The same as a process of its own, from the start of Python on."""

    def __init__(self, case, folder, commit=None, words=(), before=""):
        code = f"import sys; sys.path[:0] = {sys.path[:3]!r}; import victims; victims.hear()"
        code += f"; victims.shrink({case.sizes!r}, {commit!r})\n{before}\nfrom requant.cli import run; run()"
        self.log = folder.with_name(f"{folder.name}.log")
        with self.log.open("w") as log:
            argv = [sys.executable, "-c", code, *case.argv(folder)[1:], *words]
            self._process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=log)
        self.pid = self._process.pid

    def kill(self, number=signal.SIGKILL):
        self._process.send_signal(number)

    def wait(self):
        return Ended(self._process.wait(), self.log.read_text(errors="replace"))


def contents(folder):
    """{name: bytes} of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def take_reference(case, folder):
    """Run it undisturbed, twice, and keep what it made; the names and numbers of the calls that it made."""
    counts = folder.with_name("counts.json")
    begun = time.monotonic()
    ended = Child(case, case.prepare(folder), lambda: count_calls(counts)).wait()
    case.seconds = time.monotonic() - begun
    assert ended.code == 0, ended.err
    case.reference = contents(folder)
    again = folder.with_name(f"{folder.name}-again")
    assert Child(case, case.prepare(again), commit=2**30).wait().code == 0
    assert contents(again) == case.reference, f"{case.name}: two undisturbed runs differ"
    return json.loads(counts.read_text())


def oddities(case, folder):
    """What must not be in the folder at this moment, in words; None where all is well."""
    found = contents(folder)
    for name in case.reference:
        allowed = [case.reference[name], *([case.old[name]] if name in case.old else [])]
        if name in found and found[name] not in allowed:
            return f"{name} is neither old nor complete"
        if name in case.old and name not in found:
            return f"the old {name} has gone"
    outputs = sorted(name for name in case.reference if name.endswith(".gguf"))
    if outputs[0] in found and outputs[0] not in case.old and not found.keys() >= set(outputs):
        return "the first file is there before the others"
    for name in found.keys() - case.reference.keys():
        stem = next((s for s in ("o.gguf", *outputs) if name.startswith(s)), None)
        if stem is None or not _LEFT.fullmatch(name[len(stem) :]):
            return f"{name} is left behind"
    return None


def is_done(case, folder):
    return contents(folder) == case.reference


def resume(case, folder, *, whole=False, harmed=False):
    """Run the command until it is done: how many runs it took, or in words what was wrong.

    harmed: the journal was damaged, so that what it does not speak of any more may be refused: a whole output, which is
    made again with --force, or a whole unfinished one, with --restart.
    """
    words = ()
    for n in range(1, 5):
        if is_done(case, folder):
            return n - 1
        ended = (Process if whole else Child)(case, folder, words=words).wait()
        if ended.code == 0:
            return n if is_done(case, folder) else f"differs: {_difference(case, folder)}"
        hint = "--force" if "already exists" in ended.err else "--restart"
        refused = "already exists" in ended.err or "is not an unfinished output" in ended.err
        if ended.code == 5 and harmed and refused and hint not in words:
            words = (*words, hint)
        elif not (ended.code == 5 and is_done(case, folder)):
            return f"exit code {ended.code}: {ended.err[-2000:]}"
    return "never done"


def _difference(case, folder):
    found = contents(folder)
    return [name for name in {*found, *case.reference} if found.get(name) != case.reference.get(name)]


# --- the calls by which a run changes the disk

CALLS = (
    "open",
    "pwrite",
    "fdatasync",
    "fsync",
    "link",
    "unlink",
    "replace",
    "rename",
    "ftruncate",
    "posix_fallocate",
    "close",
)


def _hook(name, before, after):
    """Have the calls of os.`name` go through `before(n, *arguments)` and `after(n)`; n counts them."""
    real, n = getattr(os, name), 0

    def call(*arguments, **named):
        nonlocal n
        if name == "open" and not arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            return real(*arguments, **named)
        n += 1
        own = n
        before(own, real, *arguments)
        result = real(*arguments, **named)
        after(own)
        return result

    setattr(os, name, call)


def count_calls(path):
    """Write {call: how often} to `path` after every call; the last is the whole run."""
    counts = dict.fromkeys(CALLS, 0)

    def note(name):
        def before(n, *_):
            counts[name] = n

        return before

    for name in CALLS:
        _hook(name, note(name), lambda _: None)

    from requant.cli import messages

    leave = messages.leave

    def dump(code):
        Path(path).write_text(json.dumps(counts))
        leave(code)

    messages.leave = dump


def die_at(name, number, moment):
    """Be killed by SIGKILL before, after or (pwrite) in the middle of the call of os.`name` of that number."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def before(n, real, *arguments):
        if n != number or moment == "after":
            return
        if moment == "during" and name == "pwrite":
            descriptor, data, offset = arguments
            real(descriptor, data[: len(data) // 2], offset)
        die()

    _hook(name, before, lambda n: die() if n == number and moment == "after" else None)
