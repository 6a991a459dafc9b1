"""Whatever a file holds, a command ends in a result or in one line, and leaves the folder as it should."""

import hashlib
import json
import time

import pytest
from commands import names, run
from corpus import CASES, FURTHER, Case
from model.forward import families

from requant.container.source import open_source

ALL = CASES | FURTHER
READS_WEIGHTS = ("score", "plan", "convert")
RUNS_MODELS = ("calibrate", "evaluate")  # which no case is one for
HUGE = "sparse_1TiB_file_valid_header"  # only for commands that do not read its weights
ANY_GGUF = ("verify", "diff")  # what a GGUF file is of is no matter to them
COMMANDS = {
    "inspect": ["{model}", "--tensors", "--json"],
    "score": ["{model}", "--quick", "--types", "Q8_0,Q4_0", "--allow-requantize", "--json"],
    "plan": ["{model}", "--vram", "1GiB", "--quick", "--types", "Q8_0,Q4_0", "--allow-requantize", "--json"],
    "convert": ["{model}", "{folder}/out.gguf", "--type", "Q8_0", "--allow-requantize", "--json"],
    "verify": ["{model}", "--source", "{model}", "--json"],
    "evaluate": ["{model}", "--tokens", "{folder}/ids.txt", "--window", "16", "--json"],
    "calibrate": ["{model}", "-o", "{folder}/out.gguf", "--tokens", "{folder}/ids.txt", "--window", "16"],
    "diff": ["{model}", "{model}", "--json"],
}


def expected(command, case):
    """The exit code."""
    if command in RUNS_MODELS:
        return 3
    if case.is_imatrix:
        return 3 if command in READS_WEIGHTS else 0
    if case.verdict == "R":
        harmless = case.level == "model" and command in ANY_GGUF
        harmless |= case.level == "planner" and command in ("inspect", *ANY_GGUF)
        return 0 if harmless else 3
    if case.verdict == "N":
        return 8 if command in READS_WEIGHTS else 3 if command == "verify" else 0
    return 4 if command == "plan" and case is ALL[HUGE] else 0  # over its budget


def go_through(capsys, folder, command, case, words=None):
    """Run the command, as in COMMANDS by default, on the case; its code, after all that holds whatever the case."""
    folder.mkdir()
    path = case.write(folder)
    model = folder / list(case.files)[-1] if case.is_imatrix else path
    (folder / "ids.txt").write_text(" ".join("1234567" * 8))
    words = [word.format(model=model, folder=folder) for word in words or COMMANDS[command]]
    words += ["--imatrix", path] if case.is_imatrix and command in READS_WEIGHTS else []
    before, files = _digests(folder), names(folder)
    start = time.process_time()
    ran = run(capsys, command, *words)
    took = time.process_time() - start
    errors = [line for line in ran.err.splitlines() if not line.startswith("requant: warning: ")]
    assert all(line.isprintable() for line in ran.err.splitlines()), ran
    assert [line.startswith("requant: error: ") for line in errors] == [True] * (ran.code != 0), ran
    if ran.code == 0:
        assert command == "calibrate" or json.loads(ran.out)["schema"], ran
    elif command != "verify":  # which shows what it found
        assert ran.out == "", ran
    written = ["out.gguf", "out.gguf.requant.json"] if command == "convert" and ran.code == 0 else []
    left = [n for n in names(folder) if not (ran.code == 8 and n.startswith("out.gguf.part"))]  # kept to go on from
    assert left == sorted(files + written), ran
    assert before.items() <= _digests(folder).items()
    assert took < 1, ran
    return ran.code, ran


def _digests(folder):
    small = (p for p in folder.iterdir() if p.is_file() and p.stat().st_size < 2**30)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in small}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_case_of_the_corpus_ends_with_its_code_and_at_most_one_line(capsys, tmp_path, command):
    found = {}
    for name, case in ALL.items():
        if name == HUGE and command in ("score", "convert", "verify"):
            continue
        code, ran = go_through(capsys, tmp_path / name, command, case)
        if code != expected(command, case):
            found[name] = ran
    assert found == {}


@pytest.mark.parametrize("command", ["plan", "evaluate", "calibrate", "convert"])
def test_a_weight_that_is_no_number_stops_every_run_of_a_model(capsys, tmp_path, command):
    path = families.write("qwen3", tmp_path / "case.gguf")
    with open_source(path) as source:
        at = source.opened[0].header.data_start + source.tensor("blk.1.ffn_up.weight").info.offset
    content = bytearray(path.read_bytes())
    content[at : at + 4] = b"\xff\xff\xff\xff"
    case = Case("N", {"case.gguf": bytes(content)})
    words = [word for word in COMMANDS[command] if word != "--quick"]
    code, ran = go_through(capsys, tmp_path / "run", command, case, words)
    assert code == 8 and "blk.1.ffn_up.weight" in ran.err
