import os
import signal
import time

import pytest
from commands import TINY, names, start

# every chunk takes a while, as those of a large model do, and is on disk at once
SLOW = """
import time
import requant.container.output as output
import requant.conversion.write as writing
output.COMMIT_BYTES = 1
quick = writing.write_chunk
def slow(*arguments):
    time.sleep(0.3)
    return quick(*arguments)
writing.write_chunk = slow
"""
# the solver in C, deaf to signals
DEAF = """
import ctypes
import requant.api.session as job
job.Planner.best = lambda *_, **__: ctypes.CDLL(None).sleep(20)
print("ready", flush=True)
"""


def until(condition, process):
    end = time.monotonic() + 30
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def says(journal, word):
    """Whether the journal is there and has a line with `word`."""
    return journal.exists() and f'"{word}"'.encode() in journal.read_bytes()


def assert_stopped(process, number, then="run the same command again"):
    begun = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert time.monotonic() - begun < 2
    assert process.returncode == 128 + number
    assert err.splitlines() == [f"requant: error: stopped by {signal.Signals(number).name}; {then}"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_conversion_leaves_the_old_output_and_what_can_be_gone_on_with(tmp_path, number):
    def listening():  # whatever the tests themselves were started to ignore
        signal.signal(number, signal.SIG_DFL)

    out, journal = tmp_path / "out.gguf", tmp_path / "out.gguf.part.journal"
    out.write_text("the old output")
    words = ("convert", TINY, out, "--type", "Q4_K", "--force", "--json")
    process = start(*words, before=SLOW, preexec_fn=listening)
    until(lambda: says(journal, "tensor"), process)
    assert_stopped(process, number, "run the same command again to resume")
    assert names(tmp_path) == ["out.gguf", "out.gguf.part", "out.gguf.part.journal"]
    assert out.read_text() == "the old output"


def test_a_signal_before_anything_is_on_disk_leaves_everything_as_it_was(tmp_path):
    stubborn = SLOW.replace("0.3", "0.6")
    process = start("convert", TINY, tmp_path / "out.gguf", "--type", "Q4_K", before=stubborn)
    until(lambda: says(tmp_path / "out.gguf.part.journal", "head"), process)
    assert_stopped(process, signal.SIGTERM, "run the same command again to resume")
    assert names(tmp_path) == []


def test_a_signal_is_heard_while_c_code_runs(losses):
    process = start("plan", TINY, "--losses", losses, "--bpw", "4.5", before=DEAF)
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    assert_stopped(process, signal.SIGTERM)


def test_a_hangup_under_nohup_is_ignored(tmp_path):
    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    out = tmp_path / "out.gguf"
    process = start("convert", TINY, out, "--type", "Q4_K", "--no-verify", preexec_fn=nohup)
    until(lambda: any(name.startswith("out.gguf") for name in os.listdir(tmp_path)), process)  # noqa: PTH208
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 0 and out.exists()
    process.communicate()


def test_the_second_signal_ends_at_once(tmp_path):
    stubborn = SLOW.replace("0.3", "5")
    process = start("convert", TINY, tmp_path / "out.gguf", "--type", "Q4_K", before=stubborn)
    until((tmp_path / "out.gguf.part").exists, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    process.communicate(timeout=10)
    assert process.returncode == 130 and time.monotonic() - begun < 1 and not (tmp_path / "out.gguf").exists()


# the signal comes when the command is done, or when C code is importing and makes an error of its own of it
AFTER = "messages.exit_code_of = lambda _: os.kill(os.getpid(), signal.SIGTERM) or 0"
IMPORTING = """
def command(_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:
        raise ImportError("module failed to import") from error
messages.exit_code_of = command
"""


@pytest.mark.parametrize("moment", [AFTER, IMPORTING])
def test_a_signal_at_an_odd_moment_is_one_line_too(moment):
    process = start("--version", before=f"import os, signal; from requant.cli import messages\n{moment}")
    _, err = process.communicate(timeout=10)
    assert process.returncode == 143
    assert err == "requant: error: stopped by SIGTERM; run the same command again\n"
