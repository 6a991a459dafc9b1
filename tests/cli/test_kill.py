"""The short form of scripts/ci/kill_test.py: conversions that are killed, cut off and interrupted lose nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import names, run
from conversions import small_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "ci" / "kill_test.py"


def kill_test(*words):
    """The exit code, and what was printed, by what it is about."""
    command = [sys.executable, SCRIPT, "--quick", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    return done.returncode, lines


def test_no_kill_power_cut_or_signal_changes_a_byte():
    code, lines = kill_test("--kills", 8, "--crashes", 40, "--signals", 2, "--slowest", 0, "--processes", 0.1)
    found = {line["what"]: line for line in lines}
    assert code == 0 and "failure" not in found, lines
    assert found["kills"]["kills"] >= 8 and found["power cuts"]["cuts"] == 40
    assert all(found[name]["signals"] == 2 for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    assert found["power cuts"]["operations_lost"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_a_forgotten_flush_is_found(call):
    code, lines = kill_test("--kills", 0, "--crashes", 25, "--signals", 0, "--slowest", 0, "--without", call)
    assert code == 1 and any(line["what"] == "failure" for line in lines)


def test_files_that_only_have_names_of_sidecars_stay(tmp_path, capsys):
    model = small_model().write(tmp_path / "m.gguf")
    strangers = ["o.gguf.part.imatrix.part", "o.gguf.requant.json.0123abcd.part", "p.gguf.part.imatrix"]
    for name in ("o.gguf.part.imatrix", *strangers):
        (tmp_path / name).write_bytes(b"of somebody else")
    words = ("convert", model, tmp_path / "o.gguf", "--type", "Q8_0")
    refused = run(capsys, *words)
    assert refused.code == 5 and "o.gguf.part.imatrix: is not the importance of this output" in refused.err
    assert names(tmp_path) == sorted(["m.gguf", "o.gguf.part.imatrix", *strangers])
    (tmp_path / "o.gguf.part.imatrix").unlink()
    assert run(capsys, *words).code == 0
    assert names(tmp_path) == sorted(["m.gguf", "o.gguf", "o.gguf.requant.json", *strangers])
    assert all((tmp_path / name).read_bytes() == b"of somebody else" for name in strangers)


@pytest.mark.parametrize("call", ["link", "replace"])
def test_a_run_killed_before_the_record_has_its_name_is_finished_by_the_next(tmp_path, capsys, call):
    model = small_model().write(tmp_path / "m.gguf")
    words = ("convert", model, tmp_path / "o.gguf", "--type", "Q8_0", "--max-shard-size", "4500B")
    assert run(capsys, *words).code == 0
    made = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    assert "o-00001-of-00003.gguf" in made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, killed_at_record(getattr(os, call)))
        with pytest.raises(Killed):
            run(capsys, *words, "--force")
    assert run(capsys, *words, "--force").code == 0
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == made


class Killed(BaseException):
    """Nothing is done about it."""


def killed_at_record(call):
    """`call`, but a kill where it would give a name to a record or to its temporary file."""

    def run_or_kill(source, target, **how):
        if ".requant.json" in str(target):
            raise Killed
        call(source, target, **how)

    return run_or_kill
