"""Rows of the fault table: a command, the fault that it meets, and how it must end."""

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from commands import run
from conversions import half, small_model
from corpus import CASES
from shim import Fault

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
    *(
        "budget",
        "out exists",
        "out is input",
        "out is no file",
        "out is a link",
        "second run",
        "stale part",
        "not ours",
    ),
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


def words_of(folder, row):
    kind = ("--type", row.type) if row.type else ()
    threads = () if "--threads" in row.words else ("--threads", "2")
    own = [folder / word if re.fullmatch(r"\w+\.(json|gguf)", word) else word for word in row.words]
    return ["convert", folder / row.model, folder / row.out, *kind, "--json", *threads, *own]


class Silent:
    """In place of capsys where nobody looks."""

    def readouterr(self):
        return "", ""


def command(folder, row):
    """The exit code of the row's command in this process."""
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        return run(Silent(), *words_of(folder, row)).code
