"""Mutants of every kind of file, given to the commands that read it: a result, or one line and its code."""

import pytest
from commands import TINY, names, run
from fuzz.bases import SPLIT_NAMES
from fuzz.run import mutant

SEED, MUTANTS = 2, 120
COMMANDS = {
    "model": [["inspect"], ["diff", "{file}"], ["plan", "--vram", "1GiB", "--preset", "Q4_K_M", "--allow-requantize"]],
    "split": [["inspect", "--tensors"], ["verify"]],
    "plan": [["diff", "{file}"], ["convert", "{out}", "--plan", "{file}"]],
    "losses": [["plan", "--losses", "{file}", "--bpw", "6"]],
    "record": [["diff", "{file}"], ["verify", "--plan", "{file}"]],
    "imatrix": [["plan", "--preset", "Q4_K_M", "--imatrix", "{file}"]],
    "statistics": [["score", "--statistics", "{file}", "--json"]],
    "legacy": [["plan", "--preset", "Q4_K_M", "--imatrix", "{file}"]],
    "types": [["plan", "--preset", "Q4_K_M", "--tensor-type-file", "{file}"]],
}
OF_MODELS = ("model", "split", "record")  # the file itself comes first; else a model it does not belong to


@pytest.mark.parametrize("kind", COMMANDS)
def test_no_mutant_makes_a_command_end_in_more_than_a_line(capsys, tmp_path, kind):
    codes = set()
    for index in range(MUTANTS):
        files = mutant(kind, SEED, index)
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        file, before = tmp_path / next(iter(files)), names(tmp_path)
        for command, *words in COMMANDS[kind]:
            first = file if kind in OF_MODELS or command == "diff" else TINY
            ran = run(capsys, command, first, *(w.format(file=file, out=tmp_path / "out.gguf") for w in words))
            lines = [line for line in ran.err.splitlines() if not line.startswith("requant: warning: ")]
            assert ran.code in (0, 2, 3, 4, 8), (index, ran)
            assert len(lines) == (ran.code != 0) and all(line.isprintable() for line in lines), (index, ran)
            assert names(tmp_path) == before, (index, ran)
            codes.add(ran.code)
        for name in SPLIT_NAMES:
            (tmp_path / name).unlink(missing_ok=True)
    assert 3 in codes
