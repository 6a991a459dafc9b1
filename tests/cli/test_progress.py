"""Progress: bars, plain lines, JSON lines; their figures; when nothing is said."""

import json
import re
import threading

import pytest
from commands import IMATRIX, TINY, run, spawn
from ptys import on_terminal

from requant.cli import console, meters, progress
from requant.cli.meters import Bar, Lines, as_json

SCORED = ("--imatrix", IMATRIX, "--losses")
WARNING = "requant: warning: "  # of an imatrix that does not cover the output
KEYS = ["schema", "stage", "done", "total", "unit", "seconds", "rate", "eta"]
ERASED = re.compile(r"\r *\r")  # how tqdm takes a bar away


@pytest.fixture(autouse=True)
def _settings():
    yield
    console.reset()


def meter(done=0, seconds=0.0, total=30, unit="layers"):
    """A meter that writes nothing, `seconds` after its stage began."""
    found = Lines(lambda *_: None, 1.0, "scoring", total, unit)
    found._time = lambda: found.start_t + seconds
    found.n = done
    return found


def test_before_the_first_sample_the_rate_is_the_mean():
    known = meter(10, 20.0).format_dict
    assert (known["rate"], known["eta"]) == (0.5, 40)
    assert known["figures"] == "10 of 30 layers, 0.5 layers/s, 40 s left"


def test_nothing_done_has_no_rate():
    known = meter(0, 20.0).format_dict
    assert known["rate"] is None and known["eta"] is None


def test_the_rate_follows_the_last_steps():
    found, now = meter(total=10_000), [0.0]
    found._time = lambda: found.start_t + now[0]
    for seconds, n in [(1.0, 100)] * 20 + [(10.0, 1)] * 60:
        now[0] += seconds
        found.advance(n)
    assert 0.1 < found.format_dict["rate"] < found.n / now[0]


def test_without_a_total_no_time_is_left_to_tell():
    known = meter(5, 1.0, total=None).format_dict
    assert known["rate"] == 5 and known["eta"] is None
    assert known["figures"] == "5 layers, 5 layers/s, 1 s"
    assert meter(0, 3.0, None, "").format_dict["figures"] == "3 s"


def test_sizes_have_our_units():
    assert meter(2**20, 1.0, 2**30, "B").format_dict["figures"].startswith("1.00 MiB of 1.00 GiB, 1.00 MiB/s, ")


def test_units_may_be_done_on_any_thread():
    found = meter(total=8000)
    threads = [threading.Thread(target=lambda: [found.advance(1) for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.n == 8000


@pytest.mark.parametrize("total", [None, 0, 4])
def test_more_than_there_was_to_do_is_drawn_too(total, capsys):
    bar = Bar("scoring", total, "layers")
    bar.advance(5)
    bar.show(meters.GOES_ON)
    bar.close()
    assert "scoring" in capsys.readouterr().err


def test_a_line_comes_where_more_was_done_and_not_too_often():
    written = []
    found = Lines(lambda _, when: written.append(when), 3600.0, "scoring", 30, "layers")
    found.show(meters.BEGINS)
    found.advance(1)
    found.refresh()
    assert written == [meters.BEGINS]
    found.every = 0.0
    found.refresh()
    found.refresh()  # nothing new
    found.show(meters.ENDS)
    assert written == [meters.BEGINS, meters.GOES_ON, meters.ENDS]


def test_a_json_line_is_one_object_of_known_keys():
    line = json.loads(as_json(meter(3, 4.0)))
    assert list(line) == KEYS
    assert line == {
        "schema": "requant.progress/1",
        "stage": "scoring",
        "done": 3,
        "total": 30,
        "unit": "layers",
        "seconds": 4.0,
        "rate": 0.75,
        "eta": 36.0,
    }
    assert json.loads(as_json(meter(unit="B")))["unit"] == "bytes"


def test_a_json_line_names_the_job_of_a_batch(monkeypatch):
    monkeypatch.setenv(console.JOB, "out/\x1bx.gguf")
    line = as_json(meter())
    assert json.loads(line)["job"] == "out/\x1bx.gguf" and line.isascii() and "\x1b" not in line


def lines_of(err):
    return [json.loads(line) for line in err.splitlines() if line.startswith("{")]


def test_json_progress_begins_at_nothing_and_ends_at_all(tmp_path, losses):
    out = tmp_path / "out.gguf"
    ran = spawn("convert", TINY, out, *SCORED, losses, "--bpw", "4.5", "--progress", "json")
    lines = lines_of(ran.err)
    assert ran.code == 0 and all(line[0] == "{" or line.startswith(WARNING) for line in ran.err.splitlines())
    assert all(list(line) == KEYS and line["schema"] == meters.SCHEMA for line in lines)
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
    say = console.log
    monkeypatch.setattr(console, "log", lambda text, *a: (say(text, *a), "40 %" in text and heard.set()))
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


@pytest.mark.parametrize("columns, width", [(70, 70), (0, 80)])
def test_a_bar_is_drawn_on_a_terminal_and_gone_at_the_end(columns, width, tmp_path, losses):
    words = ("convert", TINY, tmp_path / "o", *SCORED, losses, "--bpw", "4.5")
    code, shown, _ = on_terminal(*words, columns=columns, stdout=False, stderr=True)
    drawn = [line.rstrip() for line in shown.split("\r") if line.strip()]
    assert code == 0 and shown.count("\n") == ERASED.split(shown)[-1].count(WARNING)
    assert any(line.startswith("converting ") and " MiB" in line and "%" in line for line in drawn)
    assert any("100 %" in line and "/s" in line and "#]" in line for line in drawn)
    assert max(len(line) for line in drawn if WARNING not in line) < width


def test_a_dumb_terminal_gets_no_bar(tmp_path, losses):
    words = ("convert", TINY, tmp_path / "o", *SCORED, losses, "--bpw", "4.5")
    _, shown, _ = on_terminal(*words, stdout=False, stderr=True, env={"TERM": "dumb"})
    assert "\r" not in shown and "\x1b" not in shown


def test_a_line_takes_the_place_of_the_bar(capsys):
    console.settings.progress = "bar"
    with progress.progress("scoring", 3, "layers"):
        console.log("something")
    shown = ERASED.sub("\n", capsys.readouterr().err)
    assert "requant: something" in shown.splitlines() and shown.endswith("\n")


def test_a_failure_takes_the_bar_away(capsys):
    console.settings.progress = "bar"
    with pytest.raises(KeyError), progress.progress("scoring", 3, "layers"):
        raise KeyError
    console.log("after")
    assert re.search(r"\r *\rrequant: after\n$", capsys.readouterr().err)


@pytest.mark.parametrize("words", [["--progress", "none"], ["-q"]], ids=" ".join)
def test_without_progress_nothing_is_loaded_for_it(words, tmp_path, losses):
    before = "import atexit, sys; atexit.register(lambda: print('tqdm' in sys.modules, file=sys.stderr))"
    words = ("convert", TINY, tmp_path / "o", *SCORED, losses, "--bpw", "4.5", *words)
    assert spawn(*words, before=before).err.splitlines()[-1] == "False"


def test_what_a_stage_took_is_told_to_those_who_ask_without_progress(capsys):
    console.settings.progress, console.settings.level = "none", console.VERBOSE
    with progress.progress("scoring", 3, " layers") as advance:
        advance(3)
    assert re.fullmatch(r"requant: scoring took \d+\.\d\d s, 3 layers\n", capsys.readouterr().err)


@pytest.mark.parametrize("how", console.PROGRESS)
def test_a_stderr_that_cannot_be_written_to_stops_nothing(how, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    for stream in (Full(), None):
        monkeypatch.setattr("sys.stderr", stream)
        console.settings.progress = "plain" if how == "auto" else how
        with progress.progress("scoring", 3, "layers") as advance:
            advance(1)


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
