"""Mutants by kind, seed and number, each the same every time, and the run that checks them one after the other."""

import os
import random
import resource
import signal
import struct
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fuzz import bases, oracles
from fuzz.gguf_mutants import edit, edit_bytes, edit_fields
from fuzz.reader import Reader
from fuzz.shape_mutants import other_mutant, shape_mutant, sound
from fuzz.text_mutants import json_mutant, lines_mutant, tokens_mutant, toml_mutant

# kind -> its oracle, and its part of all mutants in 25ths
KINDS = {
    "model": (oracles.model, 6),
    "split": (oracles.model, 2),
    "imatrix": (oracles.gguf_imatrix, 2),
    "statistics": (oracles.gguf_imatrix, 1),
    "legacy": (oracles.gguf_imatrix, 2),
    "plan": (oracles.plan, 2),
    "losses": (oracles.losses, 2),
    "record": (oracles.record, 1),
    "types": (oracles.types, 1),
    "shapes": (oracles.shapes, 2),
    "architectures": (oracles.shapes, 2),
    "jobs": (oracles.jobs, 1),
    "tokens": (oracles.tokens, 1),
}
PARTS = sum(part for _, part in KINDS.values())
IN_SHAPES = {"shapes": shape_mutant, "architectures": other_mutant}
IN_GGUF = ("model", "split", "imatrix", "statistics")
TEXTS = {"types": lines_mutant, "jobs": toml_mutant, "tokens": tokens_mutant}  # the others of texts are JSON
# of each mutant: seconds of the processor, bytes that Python traces; of the process: seconds in all, bytes it grows by
SECONDS, MEMORY, HANGS, GROWTH = 1.0, 64 * 2**20, 30, 512 * 2**20
SHOWN, PLANNED, MEASURED = 7, 61, 499  # of so many mutants one is also shown, planned for, measured for its memory


def rng_of(kind, seed, index):
    return random.Random(f"{kind} {seed} {index}")


def mutant(kind, seed, index):
    """The files of one mutant, bytes by name; the first is the one to open."""
    rng = rng_of(kind, seed, index)
    if kind == "split":
        first, second = (_gguf(rng, base, rng.random() < 0.6) for base in bases.shards())
        files = dict(zip(bases.SPLIT_NAMES, (first, second), strict=True))
        if rng.random() < 0.03:
            del files[bases.SPLIT_NAMES[1]]
        return files
    if kind in IN_GGUF:
        return {"file": _gguf(rng, rng.choice(bases.ggufs(kind)), True)}
    if kind == "legacy":
        fields = list(bases.legacy())
        for _ in range(rng.choice((0, 1, 1, 2))):
            edit_fields(rng, fields)
        return {"file": _edited(rng, b"".join(fields))}
    if kind in IN_SHAPES:
        return {"file": IN_SHAPES[kind](rng)}
    return {"file": TEXTS.get(kind, json_mutant)(rng, bases.texts(kind))}


def _gguf(rng, base, change):
    if not change:
        return b"".join(base.fields())
    copy, other = base.copy(), rng.choice(bases.ggufs("model"))
    kind = rng.random()
    for _ in range(0 if kind < 0.15 else rng.choice((1, 1, 2, 3))):
        edit(rng, copy, other)
    try:
        fields = copy.fields()
    except (struct.error, OverflowError):  # edits that no file can say
        fields = base.fields()
    for _ in range(rng.choice((1, 1, 2)) if kind < 0.3 else 0):
        edit_fields(rng, fields)
    content = b"".join(fields)
    return _edited(rng, content) if kind > 0.9 else content


def _edited(rng, content):
    for _ in range(rng.choice((0, 1, 1, 2))):
        content = edit_bytes(rng, content, rng.choice(bases.encoded()))
    return content


class Place:
    """Where mutants are put: one file in memory that is written again and again, or a folder for several."""

    def __init__(self):
        self.descriptor = os.memfd_create("mutant")
        self.path = Path(f"/proc/{os.getpid()}/fd/{self.descriptor}")
        memory = Path("/dev/shm")
        self.folder = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)

    def put(self, files):
        """The path of the first of `files`."""
        if len(files) == 1 and "file" in files:
            content = files["file"]
            os.ftruncate(self.descriptor, len(content))
            os.pwrite(self.descriptor, content, 0)
            return self.path
        folder = Path(self.folder.name)
        for name in bases.SPLIT_NAMES:
            if name in files:
                (folder / name).write_bytes(files[name])
            else:
                (folder / name).unlink(missing_ok=True)
        return folder / next(iter(files))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.descriptor)
        self.folder.cleanup()


@dataclass
class Outcome:
    """What became of a run: mutants by (kind, verdict), those that ggml read too, the slowest, and what failed."""

    verdicts: Counter = field(default_factory=Counter)
    compared: int = 0
    slowest: float = 0.0  # seconds of CPU
    most_memory: int = 0  # bytes, of those that were measured
    failures: list = field(default_factory=list)

    def add(self, other):
        self.verdicts.update(other.verdicts)
        self.compared += other.compared
        self.slowest, self.most_memory = max(self.slowest, other.slowest), max(self.most_memory, other.most_memory)
        self.failures += other.failures


def numbers(kind, n):
    """How many of `n` mutants are of the kind."""
    return n * KINDS[kind][1] // PARTS


def run(kind, seed, indices, keep, *, compare=1):
    """Check the mutants `indices` of the kind. A mutant that fails is written into the folder `keep`, under its name.

    compare: one of so many that requant's parser takes is given to ggml's too.
    """
    outcome = Outcome()
    with warnings.catch_warnings(), Reader() as reader, Place() as place:
        warnings.simplefilter("error")
        signal.signal(signal.SIGALRM, _stop)
        if kind in IN_SHAPES:  # kernels are compiled or loaded before any mutant's time is taken
            oracles.shapes(place.put({"file": b"".join(sound().fields())}), 2)
        for index in indices:
            files = mutant(kind, seed, index)
            try:
                _check(kind, index, place.put(files), outcome, reader if index % compare == 0 else None)
            except Exception as error:  # noqa: BLE001, whatever it is
                name = f"{kind}-{seed}-{index}"
                outcome.failures.append(f"{name}: {type(error).__name__}: {error}"[:1000])
                for file, content in files.items():
                    (Path(keep) / f"{name}.{file}").write_bytes(content)
    return outcome


def _most_memory():
    """The most bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _stop(*_):
    raise oracles.Escaped(f"had not ended after {HANGS} s")


def _check(kind, index, path, outcome, reader):
    depth = 2 if index % PLANNED == 0 else 1 if index % SHOWN == 0 else 0
    oracle, measured = KINDS[kind][0], index % MEASURED == 0
    if measured:
        tracemalloc.start()
    most = _most_memory()
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    start = time.process_time()
    try:
        verdict = oracle(path, depth)
        took = time.process_time() - start
        memory = tracemalloc.get_traced_memory()[1] if measured else 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if measured:
            tracemalloc.stop()
    if _most_memory() > most + GROWTH:
        raise oracles.Escaped(f"the process grew by {_most_memory() - most} bytes")
    outcome.verdicts[kind, verdict] += 1
    outcome.slowest, outcome.most_memory = max(outcome.slowest, took), max(outcome.most_memory, memory)
    if took > SECONDS * (1 + 3 * measured):  # tracing takes its time
        raise oracles.Escaped(f"took {took:.2f} s")
    if memory > MEMORY:
        raise oracles.Escaped(f"took {memory} bytes")
    if reader is not None and kind in IN_GGUF and (verdict != "refused" or oracles.opens(path)):
        outcome.compared += 1
        if not reader.opens(path):
            raise oracles.Escaped("ggml refuses it")
