"""Every row of the fault table: the exit code, the line, what is left, and that a rerun heals.

After each of them the output is absent, its old content, or complete, and the source is as it was.
"""

import os
import re
from dataclasses import replace

import pytest
from commands import Ran, names, run, start
from fault_ends import ENDED
from fault_environment import AROUND
from fault_inputs import INPUTS, SPLITS
from fault_numbers import NUMBERS
from fault_outputs import REFUSED
from fault_rows import ANSWERED, DONE, MODEL, PART, TABLE, command, words_of
from fault_system import SYSTEM
from shim import SMALL, injected, preamble

ROWS = [*INPUTS, *SPLITS, *NUMBERS, *REFUSED, *SYSTEM, *ENDED, *AROUND]


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
