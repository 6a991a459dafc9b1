"""The short form of scripts/kill_test.py: conversions that are killed, cut off and interrupted lose nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_test.py"


def kill_test(*words):
    """The exit code, and what was printed, by what it is about."""
    command = [sys.executable, SCRIPT, "--quick", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    return done.returncode, lines


def test_no_kill_power_cut_or_signal_changes_a_byte():
    code, lines = kill_test("--kills", 12, "--crashes", 60, "--signals", 3, "--slowest", 0, "--processes", 0.1)
    found = {line["what"]: line for line in lines}
    assert code == 0 and "failure" not in found, lines
    assert found["kills"]["kills"] == 12 and found["power cuts"]["cuts"] == 60
    assert all(found[name]["signals"] == 3 for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    assert found["power cuts"]["operations_lost"] > 0


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_a_forgotten_flush_is_found(call):
    code, lines = kill_test("--kills", 0, "--crashes", 60, "--signals", 0, "--slowest", 0, "--without", call)
    assert code == 1 and any(line["what"] == "failure" for line in lines)
