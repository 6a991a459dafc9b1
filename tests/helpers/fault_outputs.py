"""Fault table: outputs and other files that are in the way."""

import contextlib
import os
import re

from commands import names
from conversions import small_model
from fault_inputs import shard
from fault_numbers import imatrix_file
from fault_rows import DONE, OLD, PART, Row, command
from gguf_files import split_files, write_files
from shim import Fault, injected

from requant.container.journal import Journal
from requant.container.output import claim_output


def old(folder):
    """There is an output already."""
    (folder / "out.gguf").write_bytes(OLD)


OUT = frozenset({"out.gguf"})
STRANGER = b"something of the user's"
RECORD = b'{\n  "schema": "requant.output/1",\n  "output": "another.gguf"\n}\n'


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
    with claim_output(folder / "out.gguf"):
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


def holds(name, content=STRANGER):
    """There is a file that merely has the name of one of requant's own."""
    return lambda folder: (folder / name).write_bytes(content)


def is_whole(name, content=STRANGER):
    def check(folder):
        assert (folder / name).read_bytes() == content

    return check


def stranger(name, says, *words, **how):
    return Row(
        *("not ours", f"{name} {' '.join(words)}".strip(), 5, (rf"{re.escape(name)}: {says}",)),
        words=words,
        **{"given": holds(name), "left": frozenset({name}), "again": 5, "also": is_whole(name)} | how,
    )


def second_name(name):
    """A file of requant's own has a second name, so that writing into it would change that."""

    def given(folder):
        (folder / "kept").write_bytes(b"")
        os.link(folder / "kept", folder / name)

    return given


def journal_of(folder, name):
    """The journal of the unfinished output `name` was given the name of this one's."""
    with Journal(folder / f"{name}.part.journal", folder / name) as journal:
        journal.begin({"files": [[name, 100, "0"]]})
    (folder / f"{name}.part.journal").rename(folder / "out.gguf.part.journal")


OWN_NAMES = ("out.gguf.part", "out.gguf.part.journal", "out.gguf.part.imatrix")

NOT_OURS = [
    *(stranger(name, "is not ") for name in OWN_NAMES),
    *(stranger(name, "is not ", "--restart", "--force") for name in OWN_NAMES),
    *(
        Row(
            *("not ours", f"{name}, the source", 5, (rf"{re.escape(name)}: is one of the inputs",)),
            given=lambda folder, name=name: os.link(folder / "source.gguf", folder / name),
            left=frozenset({name}),
            again=5,
        )
        for name in OWN_NAMES
    ),
    *(
        Row(
            *("not ours", f"{name}, a hard link", 5, (rf"{re.escape(name)}: has another name",)),
            given=second_name(name),
            left=frozenset({name, "kept"}),
            again=5,
            also=is_whole("kept", b""),
        )
        for name in OWN_NAMES
    ),
    Row(
        *("not ours", "a finished model of that name", 5, (r"out\.gguf\.part\.imatrix: is not the importance",)),
        given=lambda folder: small_model().write(folder / "out.gguf.part.imatrix"),
        left=frozenset({"out.gguf.part.imatrix"}),
        again=5,
    ),
    Row(
        *(
            "not ours",
            "another output's journal",
            5,
            (r"\.journal: is the journal of another output, x",),
        ),
        given=lambda folder: journal_of(folder, "x.gguf"),
        left=frozenset({"out.gguf.part.journal"}),
        again=5,
    ),
    *(
        Row(
            *("not ours", f"{name}, which no run uses", 0),
            given=holds(name),
            left=DONE | {name},
            also=is_whole(name),
        )
        for name in ("out.gguf.requant.json.0badcafe.part", "out.gguf.part.imatrix.part", "out.gguf.part.npz")
    ),
    Row("not ours", "an empty journal, as a killed run leaves it", 0, given=holds(OWN_NAMES[1], b""), left=DONE),
    Row("not ours", "an empty part, as a killed run leaves it", 0, given=holds(OWN_NAMES[0], b""), left=DONE),
    Row(
        *("not ours", "the record of another output", 5, (r"requant\.json: already exists",)),
        given=holds("out.gguf.requant.json", RECORD),
        left=frozenset({"out.gguf.requant.json"}),
        also=is_whole("out.gguf.requant.json", RECORD),
        again=5,
    ),
]

REFUSED = [
    *NOT_OURS,
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
