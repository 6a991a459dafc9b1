"""Progress: bars, plain lines, JSON lines; their figures; when nothing is said."""

import json
import re
import threading

import pytest
from commands import IMATRIX, TINY, run, spawn
from ptys import on_terminal

from requant.cli import console as speech
from requant.cli import progress
from requant.cli.progress import Meter, as_json

SCORED = ("--imatrix", IMATRIX, "--losses")
WARNING = "requant: warning: "  # of an imatrix that does not cover the output
KEYS = ["schema", "stage", "done", "total", "unit", "seconds", "rate", "eta"]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


@pytest.fixture(autouse=True)
def _settings():
    yield
    speech.reset()


def meter(clock, total=30, unit="layers"):
    return Meter("scoring", total, unit, begun=clock.now)


def advance(clock, found, *steps):
    for seconds, n in steps:
        clock.now += seconds
        found.advance(n)


def test_rate_and_time_left_are_those_of_what_was_done(clock):
    found = meter(clock)
    assert found.rate is None and found.eta is None
    advance(clock, found, *[(2.0, 1)] * 10)
    assert found.rate == pytest.approx(0.5) and found.eta == pytest.approx(40) and found.seconds == 20


def test_the_rate_is_that_of_the_last_minute(clock):
    found = meter(clock, 10_000)
    advance(clock, found, *[(1.0, 100)] * 5, *[(10.0, 1)] * 20)
    assert found.rate == pytest.approx(0.1, rel=0.2)


def test_without_a_total_no_time_is_left_to_tell(clock):
    found = meter(clock, None)
    advance(clock, found, (1.0, 5))
    assert found.rate == 5 and found.eta is None


def test_units_may_be_done_on_any_thread():
    found = Meter("scoring", 8000, "layers")
    threads = [threading.Thread(target=lambda: [found.advance(1) for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.done == 8000


def test_a_json_line_is_one_object_of_known_keys(clock):
    found = meter(clock)
    advance(clock, found, (4.0, 3))
    assert json.loads(as_json(found)) == {
        "schema": "requant.progress/1",
        "stage": "scoring",
        "done": 3,
        "total": 30,
        "unit": "layers",
        "seconds": 4.0,
        "rate": 0.75,
        "eta": 36.0,
    }
    assert json.loads(as_json(meter(clock, 2**30, "B")))["unit"] == "bytes"


def test_a_json_line_names_the_job_of_a_batch(clock, monkeypatch):
    monkeypatch.setenv(progress.JOB, "out/\x1bx.gguf")
    line = as_json(meter(clock))
    assert json.loads(line)["job"] == "out/\x1bx.gguf" and line.isascii() and "\x1b" not in line


def lines_of(err):
    return [json.loads(line) for line in err.splitlines() if line.startswith("{")]


def test_json_progress_begins_at_nothing_and_ends_at_all(tmp_path, losses):
    out = tmp_path / "out.gguf"
    ran = spawn("convert", TINY, out, *SCORED, losses, "--bpw", "4.5", "--progress", "json")
    lines = lines_of(ran.err)
    assert ran.code == 0 and all(line[0] == "{" or line.startswith(WARNING) for line in ran.err.splitlines())
    assert all(list(line) == KEYS and line["schema"] == progress.SCHEMA for line in lines)
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    assert stages == ["solving", "converting"]
    for stage in stages:
        found = [line for line in lines if line["stage"] == stage]
        assert found[0]["done"] == 0 and found[0]["rate"] is None
        assert found[-1]["done"] == (found[-1]["total"] or 0)
        assert [line["done"] for line in found] == sorted(line["done"] for line in found)
    assert lines[-1]["unit"] == "bytes" and lines[-1]["eta"] == 0


def test_scoring_counts_layers(losses, tmp_path):
    ran = spawn("score", TINY, "-o", tmp_path / "l.json", "--windows", "1", "--window", "16", "--progress=json")
    last = lines_of(ran.err)[-1]
    assert ran.code == 0 and last["stage"] == "scoring" and last["unit"] == "layers" and last["done"] == last["total"]


def test_plain_progress_says_when_a_stage_begins_and_ends(tmp_path, losses):
    ran = spawn("convert", TINY, tmp_path / "o", *SCORED, losses, "--bpw", "4.5", "--progress", "plain")
    lines = ran.err.splitlines()
    assert "requant: solving" in lines
    assert any(re.fullmatch(r"requant: solving took \d+\.\d\d s", line) for line in lines)
    assert any(re.fullmatch(r"requant: converting \d+\.\d\d MiB", line) for line in lines)
    assert any(re.fullmatch(r"requant: converting took \d+\.\d\d s, \d+\.\d\d MiB", line) for line in lines)


def test_a_batch_log_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setitem(progress.EVERY, "auto", 0.001)
    heard = threading.Event()
    say = speech.log
    monkeypatch.setattr(speech, "log", lambda text, *a: (say(text, *a), "40 %" in text and heard.set()))
    with progress.progress("scoring", 30, " layers") as advance:
        advance(12)
        assert heard.wait(30)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"requant: scoring 40 %, 12 of 30 layers, [\d.e+]+ layers/s, \d+ s left", line), line


def test_what_is_short_says_nothing_where_nobody_looks(capsys):
    with progress.progress("scoring", 30, " layers") as advance:
        advance(30)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["--progress", "none"], ["-q"]], ids=" ".join)
def test_none_and_quiet_draw_no_bar(words, tmp_path, losses):
    code, shown, _ = on_terminal(
        *("convert", TINY, tmp_path / "o", *SCORED, losses, "--bpw", "4.5", *words), stdout=False, stderr=True
    )
    assert code == 0 and all(line.startswith(WARNING) for line in shown.splitlines())


def test_a_bar_is_drawn_on_a_terminal_and_gone_at_the_end(tmp_path, losses):
    code, shown, _ = on_terminal(
        *("convert", TINY, tmp_path / "o", *SCORED, losses, "--bpw", "4.5"), columns=70, stdout=False, stderr=True
    )
    drawn = [line for line in shown.split(speech.ERASE) if line]
    assert code == 0 and shown.count("\n") == shown.rpartition(speech.ERASE)[2].count(WARNING)
    assert any(line.startswith("converting ") and " MiB" in line and "%" in line for line in drawn)
    assert any("100 %" in line and "/s" in line for line in drawn)
    assert max(len(line) for line in drawn if WARNING not in line) < 70


def test_a_dumb_terminal_gets_no_bar(tmp_path, losses):
    words = ("convert", TINY, tmp_path / "o", *SCORED, losses, "--bpw", "4.5")
    _, shown, _ = on_terminal(*words, stdout=False, stderr=True, env={"TERM": "dumb"})
    assert "\r" not in shown and "\x1b" not in shown


def test_a_line_that_is_said_takes_the_place_of_the_bar(capsys):
    with speech.drawing():
        speech.log("something")
    err = capsys.readouterr().err
    assert err == f"{speech.ERASE}requant: something\n{speech.ERASE}"


def test_a_failure_ends_the_bar_and_is_told_after_it(capsys):
    speech.settings.progress = "bar"
    with pytest.raises(KeyError), progress.progress("scoring", 3, "layers"):
        raise KeyError
    assert capsys.readouterr().err.endswith(speech.ERASE) and speech.settings.bars == 0


def test_every_worker_of_a_batch_is_told_how_to_say_it(tmp_path):
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(
        f'[[job]]\nsource = "{TINY}"\noutput = "out/{{stem}}-{{encoding}}.gguf"\nbudgets = [{{ preset = "Q4_K_M" }}, '
        '{ preset = "Q5_K_M" }]\n'
    )
    ran = spawn("batch", jobs, "--jobs", 2, "--progress", "json", "-q")
    lines = lines_of(ran.err)
    assert ran.code == 0 and ran.err.count("\n") == len(lines), ran.err
    outputs = {line["job"].rpartition("/")[2] for line in lines if line["stage"] == "converting"}
    assert len(outputs) == 2 and all(name.endswith(".gguf") for name in outputs)
    total = [line for line in lines if line["stage"] == "batch"]
    assert total[0]["done"] == 0 and total[-1]["done"] == total[-1]["total"] == 2 and total[-1]["unit"] == "outputs"


def test_an_unknown_way_is_answered_with_the_nearest(capsys):
    ran = run(capsys, "inspect", TINY, "--progress", "jsn")
    assert ran.code == 2 and "did you mean json?" in ran.err
